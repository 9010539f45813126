"""One quantised layer of a checkpoint: its parts, checked before they are read, and what they are read into."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..weights import Weight
from .safe import Tensors

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Stored(NamedTuple):
    """A layer's Weight (N, K), and the order of x's columns that it expects (int32 (K,), see ``Linear``) or None."""

    weight: Weight
    order: Tensor | None = None


class Layer:
    """The tensors of one linear layer in a checkpoint, by the last part of their names.

    name: the layer's name in the checkpoint. n, k: its output and input features in the model. used: the tensors
    that were asked for.
    """

    def __init__(self, tensors: Tensors, name: str, n: int, k: int) -> None:
        self.name, self.n, self.k = name, n, k
        self.used: set[str] = set()
        self._tensors = tensors

    def __contains__(self, part: str) -> bool:
        return self._full(part) in self._tensors.names()

    def dtype(self, part: str) -> torch.dtype | None:
        """The dtype of a part; None where it is missing or of no use."""
        return self._tensors.dtype(self._full(part)) if part in self else None

    def shape(self, part: str) -> tuple[int, ...]:
        """The shape of a part. Raises ``ValueError`` if it is missing."""
        if part not in self:
            raise ValueError(f"{self.name}.{part} is missing")
        return self._tensors.shape(self._full(part))

    def rows(self, part: str) -> int:
        """The first number of a part's shape, 0 if it has none. Raises ``ValueError`` if it is missing."""
        return next(iter(self.shape(part)), 0)

    def take(self, part: str, dtypes: torch.dtype | tuple[torch.dtype, ...], *shapes: tuple[int, ...]) -> Tensor:
        """A part of one of the dtypes and shapes. Raises ``ValueError`` before it is read if it is none of them."""
        found, dtype = self.shape(part), self.dtype(part)
        allowed = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        if dtype not in allowed:
            names = " or ".join(str(one).removeprefix("torch.") for one in allowed)
            raise ValueError(f"{self.name}.{part} is {str(dtype).removeprefix('torch.')}; expected {names}")
        if found not in shapes:
            wanted = " or ".join(map(str, shapes))
            raise ValueError(f"{self.name}.{part} has shape {found}; expected {wanted} for N={self.n}, K={self.k}")
        self.used.add(self._full(part))
        return self._tensors.get(self._full(part))

    def skip(self, part: str) -> None:
        """Count a part as used, which says nothing about the weight."""
        self.used.add(self._full(part))

    def _full(self, part: str) -> str:
        return f"{self.name}.{part}"


class Reader(Protocol):
    """What reads the layers of one quantisation method. It is made of the checkpoint's ``quantization_config``."""

    def holds(self, layer: Layer) -> bool:
        """Whether the layer is quantised in the file."""

    def read(self, layer: Layer) -> Stored:
        """The layer. Raises ``ValueError`` for parts that are missing or wrong."""


def number(config: dict[str, Any], name: str, default: Any, allowed: tuple[int, ...] | None = None) -> int:
    """An integer of a quantization_config. Raises ``ValueError`` for another type or a value that is not allowed."""
    value = config.get(name, default)
    if type(value) is not int or (allowed is not None and value not in allowed):
        wanted = "an integer" if allowed is None else " or ".join(map(str, allowed))
        raise ValueError(f"quantization_config: {name} is {value!r}; expected {wanted}")
    return value
