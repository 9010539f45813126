"""Dense weights on a CPU, read where they are: vecmat's own kernel (csrc/dense.h)."""

from __future__ import annotations

from ctypes import addressof

import torch
from torch import Tensor
from torch.nn import functional as F

from ..device import Device
from ..native import DenseSpec, native
from ..problem import DTYPES, Problem
from ._cpu import TYPES, pairs, rejects_native, spec_of
from .base import Config, Direct, Kernel, Run, time_us

# 1e12 operations a second and thread, in fp32: 0.095 with AVX-512 (docs/cpu.md), the others by their registers' width.
_RATES = {"portable": 0.012, "avx2": 0.07}
# x as the kernel copies it: so much of it, in bytes, stays in the last cache while the weight goes by; 29 MB did not
# (14336x4096, 512 rows: 2.9 times F.linear's time). Fewer rows at a time would read the weight too often.
_TAKEN, _FEWEST = 6 << 20, 96


class CpuDense(Kernel):
    """Dense fp32, bf16 or fp16 weight (N, K), x of any of the three; nothing is packed.

    Each number is a dot product along two rows: a register's lanes take the k in turn, each sums its own in fp32 in
    the order of k, and the lanes are added up at the end; the order is the same for every M and every number of
    threads. bf16 by bf16 uses the instruction for pairs where there is one (it takes subnormal numbers for zeros, as
    torch's own product does there); everything else is widened to fp32, exactly.
    """

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if (reason := rejects_native(problem, device)) is not None:
            return reason
        if not problem.weight.dense:
            return f"the weight is {problem.weight}; this kernel multiplies dense weights"
        if problem.layout != "nk":
            return "the weight is (K, N); this kernel reads (N, K) row by row"
        return None

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        rate = 0.19 if pairs(problem, device.native) else _RATES.get(device.native, 0.095)
        moved = time_us(problem.bytes_moved, 0.95 * device.read_gbs, fixed_us=3.0)
        later = 2.0 * (problem.m - 1) * problem.n * problem.k  # the first row is multiplied while the weight arrives
        return moved + later / (rate * device.units) * 1e-6

    def reduction(self, problem: Problem, config: Config) -> str:
        isa = native().isa
        return f"k in turn to the lanes of {isa}, {'pairs of bf16' if pairs(problem, isa) else 'fp32'}"

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        multiply = native().dense
        n, k, out = problem.n, problem.k, DTYPES[problem.out]
        spec = spec_of(problem, device)
        address = addressof(spec)
        x_size, y_size = DTYPES[problem.x].itemsize, out.itemsize
        most = _most(problem, device)

        def run(x: Tensor, weight: Tensor, bias: Tensor | None, spec: DenseSpec = spec) -> Tensor:
            rows = x if x.dim() == 2 else x.reshape(-1, k)
            if rows.stride(1) != 1:
                rows = rows.contiguous()
            if weight.stride(1) != 1:
                weight = weight.contiguous()
            start = None if bias is None else (bias if bias.stride(0) == 1 else bias.contiguous())
            try:
                places = rows.data_ptr(), weight.data_ptr(), None if start is None else start.data_ptr()
            except RuntimeError:  # torch.func's tensors have no memory of their own; torch can multiply them
                return F.linear(x.to(out), weight.to(out), None if bias is None else bias.to(out))
            y = torch.empty((*x.shape[:-1], n), dtype=out, device="cpu")  # whatever torch's default device is
            m, ldx, to = rows.shape[0], rows.stride(0), y.data_ptr()
            for first in range(0, m, most):
                if not multiply(
                    address, places[0] + first * ldx * x_size, ldx, places[1], weight.stride(0),
                    to + first * n * y_size, places[2], min(most, m - first),
                ):  # fmt: skip
                    raise MemoryError(f"matmul: no memory to work in for {problem}")
            return y

        return run

    def direct(self, problem: Problem, device: Device, config: Config) -> Direct | None:
        if problem.m > _most(problem, device):
            return None
        return Direct(
            function="dense", spec=spec_of(problem, device),
            x=TYPES[problem.x], w=TYPES[problem.weight.name], y=TYPES[problem.out],
        )  # fmt: skip


def _most(problem: Problem, device: Device) -> int:
    """Rows of x that one call takes."""
    return max(_FEWEST, _TAKEN // (problem.k * (2 if pairs(problem, device.native) else 4)))
