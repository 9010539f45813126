"""What a warm call costs beyond torch's own: ``python benchmarks/overhead.py``.

Times small products on the CPU, where the call is all there is, in interleaved rounds; prints the median of the
rounds' medians in microseconds and the difference from ``F.linear`` of the same round.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import vecmat

ROUNDS, CALLS = 41, 500


def per_call_us(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    x, w, b = torch.randn(1, 64), torch.randn(64, 64), torch.randn(64)
    dense, int8 = vecmat.quantize(w, "fp32"), vecmat.quantize(w, "int8")
    x16 = x.to(torch.bfloat16)
    theirs = torch.nn.Linear(64, 64).requires_grad_(False)
    ours = vecmat.Linear.from_linear(theirs)
    packed, scale = int8.data, int8.scale.view(-1).to(torch.bfloat16)
    pairs: list[tuple[str, Callable[[], object], str, Callable[[], object]]] = [
        ("matmul(x, w)", lambda: vecmat.matmul(x, w), "F.linear(x, w)", lambda: F.linear(x, w)),
        ("matmul(x, w, b)", lambda: vecmat.matmul(x, w, b), "F.linear(x, w, b)", lambda: F.linear(x, w, b)),
        ("matmul(x, Weight fp32)", lambda: vecmat.matmul(x, dense), "F.linear(x, w)", lambda: F.linear(x, w)),
        ("vecmat.Linear(x)", lambda: ours(x), "nn.Linear(x)", lambda: theirs(x)),
        ("matmul(x, Weight int8)", lambda: vecmat.matmul(x16, int8, kernel="torch_int8"),
         "_weight_int8pack_mm", lambda: torch._weight_int8pack_mm(x16, packed, scale)),
    ]  # fmt: skip
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"64x64, one row; median of {ROUNDS} interleaved rounds of {CALLS} calls, us a call\n")
    with torch.inference_mode():
        for name, call, peer_name, peer in pairs:
            per_call_us(call), per_call_us(peer)
            rounds = [(per_call_us(call), per_call_us(peer)) for _ in range(ROUNDS)]
            ours_us, theirs_us = (statistics.median(times) for times in zip(*rounds, strict=True))
            more = statistics.median(a - b for a, b in rounds)
            print(f"{name:<24}{ours_us:7.2f}   {peer_name:<22}{theirs_us:7.2f}   {more:+6.2f}")


if __name__ == "__main__":
    main()
