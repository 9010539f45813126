"""Dense weights on a CPU, packed once so that columns of y lie in a register: vecmat's own kernel (csrc/packed.h)."""

from __future__ import annotations

from ctypes import addressof
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..device import Device
from ..native import DenseSpec, native
from ..problem import DTYPES, Problem
from ..weights import Weight
from ._cpu import TYPES, Memory, PackedDense, pairs, rejects_native, spec_of, state_of
from .base import Config, Direct, Run, time_us

# 1e12 operations a second and thread: fp32, pairs of bf16. 4096x4096, 128 rows, on a Zen 4 (docs/cpu.md); portable by
# its registers' width.
_RATES = {"portable": (0.012, 0.012), "avx2": (0.1, 0.1), "avx512_bf16": (0.105, 0.21)}
_AVX512 = (0.105, 0.105)


class Packed:
    """A weight in panels, its one tensor. rows: the plain weight (N, K); state: of the data it was made from."""

    __slots__ = ("address", "owner", "rows", "state", "tensors")

    def __init__(self, weight: Weight, memory: Memory) -> None:
        self.state = state_of(weight.data)
        self.rows = (weight.data.t() if weight.layout == "kn" else weight.data).detach()
        rows = self.rows if self.rows.stride(1) == 1 else self.rows.contiguous()
        spec = DenseSpec(weight.n, weight.k, 0, TYPES[weight.format.name], 0, torch.get_num_threads())
        data, self.owner = memory.take(native().packed_bytes(addressof(spec)))
        native().pack_dense(addressof(spec), rows.data_ptr(), rows.stride(0), data.data_ptr())
        self.tensors, self.address = (data,), data.data_ptr()


class CpuPacked(PackedDense):
    """Dense fp32, bf16 or fp16 ``Weight``, both layouts, x of any of the three; a packed copy of the weight's size.

    Each number is summed in fp32 over a block of up to 256 of k (32 for a result in fp32) in their order, and these
    sums in theirs, the same for every M and every number of threads. bf16 by bf16 uses the instruction for pairs where
    there is one (it takes subnormal numbers for zeros, as torch's own product does there); everything else is widened
    to fp32, exactly. The copy is made anew once the weight was written to, as torch counts that (not for inference
    tensors, nor writes through ``.data``).
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._memory = Memory()

    @property
    def packing(self) -> str:  # type: ignore[override]
        return f"cpu_packed_{native().isa}"

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if (reason := rejects_native(problem, device)) is not None:
            return reason
        if not problem.weight.dense:
            return f"the weight is {problem.weight}; this kernel multiplies dense weights"
        if not problem.packable:
            return "the weight is a plain tensor; only a Weight may have a packed copy"
        if problem.compute:
            return f"compute={problem.compute!r} quantises x; this kernel does not"
        return None

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        rate = _RATES.get(device.native, _AVX512)[pairs(problem, device.native)]
        return time_us(problem.bytes_moved, device.read_gbs, problem.flops, rate * device.units, 3.0)

    def reduction(self, problem: Problem, config: Config) -> str:
        isa = native().isa
        span = "32 of k" if problem.out == "fp32" else "a block of k"
        return f"{span} in turn, then these sums, {isa}, {'pairs of bf16' if pairs(problem, isa) else 'fp32'}"

    def prepare(self, weight: Weight) -> Packed:
        return Packed(weight, self._memory)

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        multiply = native().packed
        n, k, out = problem.n, problem.k, DTYPES[problem.out]
        spec = spec_of(problem, device)
        address = addressof(spec)

        def run(x: Tensor, operand: Any, bias: Tensor | None, spec: DenseSpec = spec) -> Tensor:
            rows = x if x.dim() == 2 else x.reshape(-1, k)
            if rows.stride(1) != 1:
                rows = rows.contiguous()
            start = None if bias is None else (bias if bias.stride(0) == 1 else bias.contiguous())
            try:
                at, added = rows.data_ptr(), None if start is None else start.data_ptr()
            except RuntimeError:  # torch.func's tensors have no memory of their own; torch can multiply them
                return F.linear(x.to(out), operand.rows.to(out), None if bias is None else bias.to(out))
            y = torch.empty((*x.shape[:-1], n), dtype=out, device="cpu")  # whatever torch's default device is
            if not multiply(address, at, rows.stride(0), operand.address, y.data_ptr(), added, rows.shape[0]):
                raise MemoryError(f"matmul: no memory to work in for {problem}")
            return y

        return run

    def direct(self, problem: Problem, device: Device, config: Config) -> Direct | None:
        return Direct(
            function="packed", spec=spec_of(problem, device),
            x=TYPES[problem.x], w=TYPES[problem.weight.name], y=TYPES[problem.out],
        )  # fmt: skip
