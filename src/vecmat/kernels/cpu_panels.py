"""int8 and int4 weights on a CPU, by products of bytes: vecmat's own kernel (csrc/panels.h)."""

from __future__ import annotations

from ctypes import addressof
from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..native import Panels, native
from ..problem import DTYPES, Problem
from ..weights import Weight
from ._cpu import TYPES, Memory, rejects_native
from .base import Config, Direct, Kernel, Run, time_us

# 1e12 operations a second and thread on bytes, for int8 and for int4 weights: 2048x2048, 32 rows, on a Zen 4
# (docs/cpu.md). Where no instruction multiplies bytes by fours, 8-bit weights take twice the work of 4-bit ones.
_RATES = {
    "avx512_bf16": (0.40, 0.40), "avx512_vnni": (0.40, 0.40), "avx512": (0.10, 0.19), "avx2": (0.077, 0.13),
    "portable": (0.008, 0.008),
}  # fmt: skip


class Packed:
    """A weight in panels: the C structure, its address, and the tensors it points into."""

    __slots__ = ("address", "owner", "panels", "tensors")

    def __init__(self, weight: Weight, memory: Memory) -> None:
        columns = native().columns
        bits = 8 if weight.format.name == "int8" else 4
        panels, padded = -(-weight.n // columns), -(-weight.k // 8) * 8
        count = panels * weight.format.groups(weight.k) * columns
        sizes = panels * padded * columns * bits // 8, count * 4, 0 if weight.zero is None else count
        whole, owner = memory.take(sum(sizes))  # each a multiple of a cache line, as columns is
        data, scale, zero = whole[: sizes[0]], whole[sizes[0] : sizes[0] + sizes[1]], whole[sum(sizes[:2]) :]
        self.tensors, self.owner = (data, scale, zero), owner
        self.panels = Panels(
            data.data_ptr(), scale.data_ptr(), zero.data_ptr() if sizes[2] else None,
            weight.n, weight.k, weight.format.group_size or 0, bits,
        )  # fmt: skip
        self.address = addressof(self.panels)
        assert weight.scale is not None
        stored, scales = weight.data.contiguous(), weight.scale.contiguous()
        zeros = None if weight.zero is None else weight.zero.contiguous()
        native().pack(
            self.address, stored.data_ptr(), stored.stride(0), scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
        )  # fmt: skip


class CpuPanels(Kernel):
    """int8 or int4 weight, groups or not, zero points or not; x of 16 or 32 bits, or int8 by rows if that is asked for.

    The weight lies in panels, the column in the register's lanes. x is written as two signed bytes an element for a
    16-bit result (within 2**-16 of the row's largest element), as four for fp32 (exact within 2**-7 of the largest),
    as one for ``compute="int8"``; the products of bytes are summed in int32, the groups' sums scaled and added in
    fp32 in the order of k.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._memory = Memory()

    @property
    def packing(self) -> str:  # type: ignore[override]
        return f"cpu_panels_{native().isa}"

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if (reason := rejects_native(problem, device)) is not None:
            return reason
        if problem.weight.name not in ("int8", "int4"):
            return f"the weight is {problem.weight}; this kernel multiplies int8 and int4"
        return None

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        int8, int4 = _RATES.get(device.native, _RATES["portable"])
        rate = (int8 if problem.weight.name == "int8" else int4) * device.units
        return time_us(problem.bytes_moved, device.read_gbs, problem.flops * _digits(problem), rate, 3.0)

    def reduction(self, problem: Problem, config: Config) -> str:
        return f"int32 by groups of k, {_digits(problem)} digits, then fp32 in order"

    def prepare(self, weight: Weight) -> Any:
        return Packed(weight, self._memory)

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        multiply = native().multiply
        n, k, digits, threads = problem.n, problem.k, _digits(problem), device.units
        x_type, y_type, out = TYPES[problem.x], TYPES[problem.out], DTYPES[problem.out]

        def run(x: Tensor, operand: Any, bias: Tensor | None) -> Tensor:
            rows = x if x.dim() == 2 else x.reshape(-1, k)
            if rows.stride(1) != 1:
                rows = rows.contiguous()
            y = torch.empty((*x.shape[:-1], n), dtype=out, device="cpu")  # whatever torch's default device is
            start = None if bias is None else (bias if bias.stride(0) == 1 else bias.contiguous())
            done = multiply(
                operand.address, rows.data_ptr(), rows.stride(0), y.data_ptr(),
                None if start is None else start.data_ptr(), rows.shape[0], x_type, y_type, digits, threads,
            )  # fmt: skip
            if not done:
                raise MemoryError(f"matmul: no memory to work in for {problem}")
            return y

        return run

    def direct(self, problem: Problem, device: Device, config: Config) -> Direct | None:
        return Direct(function="multiply", x=TYPES[problem.x], y=TYPES[problem.out], digits=_digits(problem))


def _digits(problem: Problem) -> int:
    """Signed bytes that an element of x becomes."""
    if problem.compute:
        return 1
    return 4 if "fp32" in (problem.x, problem.out) else 2
