"""bitsandbytes' int8: rows of int8 and the largest magnitude of each.

weight int8 (N, K), SCB fp32 (N,), weight_format uint8 scalar, 0 for rows one after another.
value = weight * SCB / 127. SCB / 127 is rounded to fp32 once (bitsandbytes multiplies by SCB, then by 1 / 127).
Outlier columns of x, which bitsandbytes multiplies apart, are multiplied like all others: x is not quantised here.
"""

from __future__ import annotations

from typing import Any

import torch

from .integers import weight_of
from .layer import Layer, Stored


class Bitsandbytes:
    """Reads what ``load_in_8bit`` saved."""

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("load_in_8bit") is not True:
            raise ValueError("quantization_config: load_in_8bit is not true; of bitsandbytes only int8 is read")

    def holds(self, layer: Layer) -> bool:
        return "SCB" in layer

    def read(self, layer: Layer) -> Stored:
        if "weight_format" in layer:
            kind = layer.take("weight_format", torch.uint8, (), (1,))
            if int(kind) != 0:
                raise ValueError(f"{layer.name}.weight_format is {int(kind)}; expected 0, rows one after another")
        largest = layer.take("SCB", torch.float32, (layer.n,))
        if bool((largest < 0).any()):
            raise ValueError(f"{layer.name}.SCB is negative; expected the largest magnitude of each row")
        weight = layer.take("weight", torch.int8, (layer.n, layer.k))
        return Stored(weight_of(weight, (largest / 127)[:, None], None, narrow=False))
