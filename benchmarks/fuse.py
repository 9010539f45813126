"""What fusing is worth to a small model on a CPU: ``python benchmarks/fuse.py``.

The packaged SmolLM2-135M in bf16 with int8 weights, its layers apart and fused, in interleaved rounds: a prompt of 64
tokens, and 16 decoded tokens after it. Prints the medians in ms and the median ratio of a round.
"""

from __future__ import annotations

import copy
import inspect
import statistics
import time
from typing import Any

import torch

import vecmat
from vecmat import models

ROUNDS, STEPS = 9, 16
PROMPT = torch.arange(64)[None]


def measure(model: Any, cache: str) -> tuple[float, float]:
    """(ms of the prompt, ms of a step)."""
    start = time.perf_counter()
    out = model(PROMPT, use_cache=True)
    middle = time.perf_counter()
    for _ in range(STEPS):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, use_cache=True, **{cache: out[cache]})
    return (middle - start) * 1e3, (time.perf_counter() - middle) / STEPS * 1e3


@torch.no_grad()
def main() -> None:
    model, _ = models.load(models.find(), torch.bfloat16, torch.device("cpu"), lambda done, total: None)
    apart = vecmat.convert(model.eval().requires_grad_(False), "int8")
    fused = copy.deepcopy(apart)
    groups = len(vecmat.fuse(fused).joined)
    cache = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    measure(apart, cache), measure(fused, cache)
    rounds = [(measure(apart, cache), measure(fused, cache)) for _ in range(ROUNDS)]
    print(f"{groups} groups, {torch.get_num_threads()} threads; median of {ROUNDS} interleaved rounds")
    for place, name in enumerate(("prompt of 64, ms", f"step of {STEPS}, ms")):
        one, other = ([pair[side][place] for pair in rounds] for side in (0, 1))
        ratio = statistics.median(a / b for a, b in zip(one, other, strict=True))
        told = f"apart {statistics.median(one):7.2f}   fused {statistics.median(other):7.2f}"
        print(f"{name:<18} {told}   {ratio:.3f} x as fast")


if __name__ == "__main__":
    main()
