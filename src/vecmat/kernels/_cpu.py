"""What the CPU library's kernels share, and packed copies of dense weights: made anew once those were written to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..device import Device
from ..native import DenseSpec, native
from ..problem import Problem
from ..weights import Weight
from .base import Kernel

TYPES = {"fp32": 0, "bf16": 1, "fp16": 2}  # as csrc/vecmat.h numbers them


def rejects_native(problem: Problem, device: Device) -> str | None:
    """Why a kernel of the CPU library cannot run a problem here, None if nothing that they all ask for is missing."""
    if device.kind != "cpu":
        return "this kernel is for CPUs"
    if problem.grad:
        return "a gradient is asked for; this kernel has none"
    return None if device.native else native().reason


def spec_of(problem: Problem, device: Device) -> DenseSpec:
    """A dense problem as the library takes it."""
    types = TYPES[problem.x], TYPES[problem.weight.name], TYPES[problem.out]
    return DenseSpec(problem.n, problem.k, *types, device.units)


def pairs(problem: Problem, isa: str) -> bool:
    """Whether an instruction set multiplies the problem's bf16 by pairs."""
    return problem.x == problem.weight.name == "bf16" and isa == "avx512_bf16"


class PackedDense(Kernel):
    """A kernel whose packed form has ``version``: ``writes`` of the data it was made from."""

    def operand(self, weight: Weight) -> Any:
        pack = super().operand(weight)
        if pack.version != writes(weight.data):
            assert self.packing is not None
            del weight.packs[self.packing]
            pack = super().operand(weight)
        return pack


def writes(tensor: Tensor) -> int:
    """torch's count of writes to a tensor; -1 for inference tensors, which it does not count for."""
    return -1 if tensor.is_inference() else tensor._version
