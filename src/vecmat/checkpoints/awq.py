"""AWQ, version "gemm": 4 bits packed along N in an order of its own, zero points as they are.

qweight int32 (K, N / 8), qzeros int32 (groups, N / 8), scales (groups, N). Nibble i of a word, the lowest first,
belongs to column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight. value = (q - zero) * scale[k // group_size, n].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .integers import group_of, unpack, weight_of
from .layer import FLOATS, Layer, Stored, number

_NIBBLE_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq:
    """Reads AWQ's gemm layout."""

    def __init__(self, config: dict[str, Any]) -> None:
        number(config, "bits" if "bits" in config else "w_bit", 4, (4,))
        self.group = number(config, "group_size" if "group_size" in config else "q_group_size", 128)
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise ValueError(f"quantization_config: AWQ's version is {version!r}; read is 'gemm'")

    def holds(self, layer: Layer) -> bool:
        return "qweight" in layer

    def read(self, layer: Layer) -> Stored:
        n, k = layer.n, layer.k
        if n % 8:
            raise ValueError(f"{layer.name} has N={n}; AWQ packs multiples of 8")
        codes = _columns(layer.take("qweight", torch.int32, (k, n // 8)))
        groups = layer.rows("scales")
        group = group_of(k, groups, (self.group,))
        zero = _columns(layer.take("qzeros", torch.int32, (groups, n // 8)))
        scale = layer.take("scales", FLOATS, (groups, n)).t()
        steps = codes.to(torch.int8)
        steps -= zero.to(torch.int8).repeat_interleave(group or k, dim=1)[:, :k]
        return Stored(weight_of(steps, scale, group, zero=zero))


def _columns(packed: Tensor) -> Tensor:
    """Words (R, N / 8) as integers (N, R), uint8."""
    nibbles = unpack(packed, 4).view(packed.shape[0], -1, 8)
    return nibbles[..., list(_NIBBLE_OF_COLUMN)].reshape(packed.shape[0], -1).t().contiguous()
