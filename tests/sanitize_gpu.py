"""A small sweep of every Triton kernel, to be run under NVIDIA's compute-sanitizer; a program, not a test of pytest's:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitize_gpu.py
    compute-sanitizer --tool racecheck --error-exitcode 9 python tests/sanitize_gpu.py

racecheck does not follow mbarriers. On an H200 (CUDA 13.0) it reports cuBLAS' own kernels (nvjet), whose warps hand
work to each other by them, and ``warpgroups``, which does so too; of the other kernels it reports none.

Each tensor has memory of its own (torch's allocator must not cache), of exactly its size, so that a read past its end
is one past an allocation. Results are compared with float64 all the same.
"""

from __future__ import annotations

import sys

import torch

import vecmat
from cases import KERNELS, asked, numbers, refusal
from oracle import Truth
from vecmat.problem import DTYPES

FORMATS = ("bf16", "fp16", "fp32", "int8", "int8:g64", "int4:g128", "int4:g64:zp", "fp8")
# (M, N, K): an edge in each of them, and one of few columns, whose K is cut.
PROBLEMS = ((1, 72, 520), (3, 40, 264), (17, 130, 392), (33, 72, 2056), (64, 64, 4096), (100, 200, 136))


def main() -> None:
    ran, wrong = 0, []
    for fmt in FORMATS:
        for m, n, k in PROBLEMS:
            x_name = fmt if fmt in DTYPES and fmt != "fp8" else "bf16"
            a, w, b = numbers("plain", m, n, k, x_name, fmt)
            x, bias = (t.to("cuda", DTYPES[x_name]) for t in (a, b))
            for layout in ("nk", "kn") if fmt == x_name else ("nk",):
                weight = vecmat.quantize((w if layout == "nk" else w.t().contiguous()).cuda(), fmt, layout=layout)
                truth = Truth.of(x, weight, bias)
                problem = asked(m, n, k, x_name, fmt, layout=layout, bias=True, packable=True)
                for kernel in (name for name in KERNELS if name.startswith("triton_")):
                    if refusal(kernel, problem, "cuda") is not None:
                        continue
                    ran += 1
                    if said := truth.verdict(vecmat.matmul(x, weight, bias, kernel=kernel)):
                        wrong.append(f"{kernel} {problem.key()}: {said}")
    torch.cuda.synchronize()
    print(f"{ran} products, {len(wrong)} wrong", *wrong, sep="\n")
    sys.exit(1 if wrong or not ran else 0)


if __name__ == "__main__":
    main()
