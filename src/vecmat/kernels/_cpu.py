"""What the CPU library's kernels share, the memory of packed weights, and copies that follow what is written."""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..native import DenseSpec, native
from ..problem import Problem
from ..weights import Weight
from .base import Kernel

TYPES = {"fp32": 0, "bf16": 1, "fp16": 2}  # as csrc/vecmat.h numbers them
_HUGE = 2 << 20  # bytes of a huge page
_CHUNK = 16 << 20  # of memory that small weights share
_SMALL = 4 << 20  # bytes of a weight that would waste too much of huge pages of its own


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


class Memory:
    """Memory for packed weights, in huge pages where the system has them: a tenth more of it is read in the same time.

    Small weights share chunks; a chunk is freed with the last of the tensors that ``take`` gave of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: weakref.ref[Tensor] | None = None
        self._left = 0

    def take(self, nbytes: int) -> tuple[Tensor, Tensor]:
        """(nbytes,) uint8 at an address of a cache line, its contents undefined, and the tensor that owns it."""
        if nbytes >= _SMALL:
            whole = _huge(nbytes)
            return whole[:nbytes], whole
        with self._lock:
            chunk = self._chunk() if self._chunk else None
            if chunk is None or self._left < nbytes:
                chunk, self._left = _huge(_CHUNK), _CHUNK
                self._chunk = weakref.ref(chunk)
            start = _CHUNK - self._left
            self._left -= min(self._left, -(-nbytes // 64) * 64)
        return chunk[start : start + nbytes], chunk


def _huge(nbytes: int) -> Tensor:
    """(nbytes,) uint8 from the start of a huge page on; the system is asked for huge pages that lie within it."""
    memory = torch.empty(nbytes + _HUGE, dtype=torch.uint8, device="cpu")  # whatever torch's default device is
    start = -memory.data_ptr() % _HUGE
    memory = memory[start : start + nbytes]
    native().advise(memory.data_ptr(), nbytes // _HUGE * _HUGE)
    return memory


class PackedDense(Kernel):
    """A kernel whose packed form has ``state``: ``state_of`` the data it was made from."""

    def operand(self, weight: Weight) -> Any:
        pack = super().operand(weight)
        if pack.state != state_of(weight.data):
            assert self.packing is not None
            del weight.packs[self.packing]
            weight.ready = None  # products that would read the old copy, and keep it
            pack = super().operand(weight)
        return pack


def state_of(tensor: Tensor) -> tuple[int, int]:
    """A tensor's address (``tensor.data = other`` is no write) and torch's count of writes to it, -1 if it has none."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version
