"""fp8 in blocks, as DeepSeek's: e4m3 values with one scale for each block of, say, 128 by 128.

weight float8_e4m3fn (N, K), weight_scale_inv (ceil(N / rows), ceil(K / columns)), which multiplies, its name
notwithstanding. value = weight * weight_scale_inv[n // rows, k // columns]. A Weight has a scale for each row and
group of columns, so the block's scale is repeated for its rows: exact, 4 bytes for every ``columns`` weights.

Without blocks the scale is one number, or one a row (``weight_scale_inv`` or ``weight_scale``). Scales of dtype e8m0,
or uint8 exponents where the config says ``scale_fmt`` "ue8m0", are powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..weights import Weight
from .integers import weight_of_fp8
from .layer import FLOATS, Layer, Stored

SCALES = ("weight_scale_inv", "weight_scale")


class Fp8Blocks:
    """Reads quant_method "fp8" and, which has a scale a row, "fbgemm_fp8"."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.block = block_size(config.get("weight_block_size"), "weight_block_size")
        self.exponents = config.get("scale_fmt") == "ue8m0"

    def holds(self, layer: Layer) -> bool:
        return any(part in layer for part in SCALES)

    def read(self, layer: Layer) -> Stored:
        part = next(part for part in SCALES if part in layer)
        return Stored(read_fp8(layer, part, self.block, exponents=self.exponents))


def block_size(found: Any, name: str) -> tuple[int, int] | None:
    """A block's rows and columns; None for None. Raises ``ValueError`` unless they are two positive integers."""
    if found is None:
        return None
    good = isinstance(found, (list, tuple)) and len(found) == 2 and all(type(x) is int and x > 0 for x in found)
    if not good:
        raise ValueError(f"quantization_config: {name} is {found!r}; expected two positive integers")
    return found[0], found[1]


def read_fp8(layer: Layer, part: str, block: tuple[int, int] | None, *, exponents: bool = False) -> Weight:
    """The fp8 Weight of a layer whose scales are in ``part``: by blocks if there are any, by rows, or one for all."""
    n, k = layer.n, layer.k
    grid = () if block is None else ((-(-n // block[0]), -(-k // block[1])),)
    kinds = (*FLOATS, torch.float8_e8m0fnu, *((torch.uint8,) if exponents else ()))
    scale = layer.take(part, kinds, *grid, *(() if grid else ((), (1,), (1, 1), (n,), (n, 1))))
    data = layer.take("weight", torch.float8_e4m3fn, (n, k))
    for ignored in ("input_scale", "activation_scale"):
        layer.skip(ignored)
    return weight_of_fp8(data, _by_row(scale, n, block), None if block is None else block[1])


def _by_row(scale: Tensor, n: int, block: tuple[int, int] | None) -> Tensor:
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if block is None:
        return scale.reshape(-1, 1).expand(n, 1)
    return scale.repeat_interleave(block[0], dim=0)[:n]
