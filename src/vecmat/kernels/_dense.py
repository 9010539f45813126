"""Packed copies of dense weights: made anew once the weight was written to."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..weights import Weight
from .base import Kernel


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
