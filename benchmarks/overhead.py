"""What a warm call costs beyond torch's own: ``python benchmarks/overhead.py``.

Times small products on the CPU, where the call is all there is, in interleaved rounds; prints the median of the
rounds' medians in microseconds and the difference from torch's call of the same round. ``--cold``: what the short way
(src/vecmat/ready.py) saves of a call whose weight comes from memory, and drives Python's own data out of the cache.
"""

from __future__ import annotations

import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

import vecmat

ROUNDS, CALLS = 41, 500
COLD = (576, 576), (576, 1536), (640, 2048)
COLD_FORMATS = ("int8", "cpu_panels"), ("int4", "cpu_panels"), ("bf16", "cpu_packed"), ("fp32", "cpu_packed")


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
    int8_peer = "_weight_int8pack_mm", lambda: torch._weight_int8pack_mm(x16, packed, scale)
    operands = int8.data, int8.scale, None, None, "int8", 64, "nk", None, None, None
    theirs16 = torch.nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
    ours8 = vecmat.Linear.from_linear(theirs16, "int8")
    pairs: list[tuple[str, Callable[[], object], str, Callable[[], object]]] = [
        ("matmul(x, w)", lambda: vecmat.matmul(x, w), "F.linear(x, w)", lambda: F.linear(x, w)),
        ("the same by torch_dense", lambda: vecmat.matmul(x, w, kernel="torch_dense"), "F.linear(x, w)",
         lambda: F.linear(x, w)),
        ("matmul(x, w, b)", lambda: vecmat.matmul(x, w, b), "F.linear(x, w, b)", lambda: F.linear(x, w, b)),
        ("matmul(x, Weight fp32)", lambda: vecmat.matmul(x, dense), "F.linear(x, w)", lambda: F.linear(x, w)),
        ("vecmat.Linear(x)", lambda: ours(x), "nn.Linear(x)", lambda: theirs(x)),
        ("matmul(x, Weight int8)", lambda: vecmat.matmul(x16, int8), *int8_peer),
        ("the same by torch_int8", lambda: vecmat.matmul(x16, int8, kernel="torch_int8"), *int8_peer),
        ("vecmat.Linear(x), int8", lambda: ours8(x16), "nn.Linear(x), bf16", lambda: theirs16(x16)),
        ("in Inductor's code, int8", lambda: torch.ops.vecmat.direct(x16, *operands), *int8_peer),
        ("by the dispatcher, int8", lambda: torch.ops.vecmat._matmul.default(x16, *operands), *int8_peer),
    ]  # fmt: skip
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"64x64, one row; median of {ROUNDS} interleaved rounds of {CALLS} calls, us a call\n")
    with torch.inference_mode():
        for name, call, peer_name, peer in pairs:
            per_call_us(call), per_call_us(peer)
            rounds = [(per_call_us(call), per_call_us(peer)) for _ in range(ROUNDS)]
            ours_us, theirs_us = (statistics.median(times) for times in zip(*rounds, strict=True))
            more = statistics.median(a - b for a, b in rounds)
            print(f"{name:<26}{ours_us:7.2f}   {peer_name:<22}{theirs_us:7.2f}   {more:+6.2f}")


def cold() -> None:
    """One row, weights that rotate through 96 MB: a call, and the same by kernel name, which goes the long way."""
    print("one row, K x N, weights from memory; medians of 16 interleaved rounds, us a call\n")
    with torch.inference_mode():
        for (k, n), (fmt, kernel) in itertools.product(COLD, COLD_FORMATS):
            first = vecmat.quantize(torch.randn(n, k), fmt)
            weights = [first, *(first.copy() for _ in range((96 << 20) // first.nbytes))]
            x = torch.randn(1, k, dtype=first.data.dtype if first.format.dense else torch.bfloat16)
            times: dict[str | None, list[float]] = {None: [], kernel: []}
            for turn in range(16 + 3):  # the first ones pack, and make calls ready
                for named in sorted(times, key=str, reverse=turn % 2 == 0):
                    start = time.perf_counter()
                    for weight in weights:
                        vecmat.matmul(x, weight, kernel=named)
                    times[named].append((time.perf_counter() - start) / len(weights) * 1e6)
            short, long = (statistics.median(spans[3:]) for spans in times.values())
            chosen = vecmat.explain(x, first).plan.kernel.name
            print(f"{k}x{n} {fmt:<6} {chosen:<11}{short:7.1f}   by name {long:7.1f}   {long - short:+6.1f}", flush=True)


if __name__ == "__main__":
    cold() if "--cold" in sys.argv[1:] else main()
