"""compressed-tensors, as llm-compressor writes them: packed or plain integers, fp8, with scales of several shapes.

pack-quantized: weight_packed int32 (N, ceil(K * bits / 32)), a stream of bits along K of q + 2**(bits - 1);
weight_zero_point, where there is one, packed so along N (or plain int8), weight_g_idx (K,), weight_shape.
int-quantized, naive-quantized: weight int8 (N, K), weight_zero_point int8 like the scale. float-quantized: weight
float8_e4m3fn (N, K). weight_scale: (1,) for all, (N, 1) by rows, (N, groups), or one for each block.
value = (q - zero) * scale.

What a layer is follows from its tensors; sizes of groups and blocks must be those of one of the config's groups.
Schemes that quantise activations too (W8A8) are read for their weights: x stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..weights import Weight
from .fp8_blocks import block_size, read_fp8
from .integers import group_of, order_of, unpack, weight_of
from .layer import FLOATS, Layer, Stored, number

FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision", "dense")
_ORDERED = ("group", "dynamic", True)


class CompressedTensors:
    """Reads the formats named in ``FORMATS``."""

    def __init__(self, config: dict[str, Any]) -> None:
        kind = config.get("format") or "dense"
        if kind not in FORMATS:
            raise ValueError(f"quantization_config: format is {kind!r}; read are {', '.join(FORMATS)}")
        for name, key, allowed in (("transform_config", "config_groups", {}), ("sparsity_config", "format", "dense")):
            part = config.get(name) or {}
            if not isinstance(part, dict) or part.get(key, allowed) != allowed:
                raise ValueError(f"quantization_config: {name} is {part!r}; layers changed in this way are not read")
        found = config.get("config_groups") or {}
        if not isinstance(found, dict):
            raise ValueError(f"quantization_config: config_groups is {type(found).__name__}; expected an object")
        told = [scheme.get("weights") for scheme in found.values() if isinstance(scheme, dict)]
        schemes = [weights for weights in told if isinstance(weights, dict)]
        # What every scheme says that a layer has is missed where it is not; of some layers only the file can say it.
        self.zeros = bool(schemes) and all(scheme.get("symmetric") is False for scheme in schemes)
        self.ordered = bool(schemes) and all(scheme.get("actorder") in _ORDERED for scheme in schemes)
        self.bits: set[int] = set()
        self.groups: set[int] = set()
        self.blocks: set[tuple[int, int]] = set()
        for scheme in schemes:
            self.bits.add(number(scheme, "num_bits", 8, (2, 3, 4, 8)))
            if scheme.get("group_size") is not None:
                self.groups.add(number(scheme, "group_size", -1))
            block = block_size(scheme.get("block_structure"), "block_structure")
            self.blocks |= set() if block is None else {block}

    def holds(self, layer: Layer) -> bool:
        return "weight_packed" in layer or "weight_scale" in layer

    def read(self, layer: Layer) -> Stored:
        if "weight_packed" in layer:
            return self._packed(layer)
        if layer.dtype("weight") == torch.float8_e4m3fn:
            found = layer.shape("weight_scale")
            blocks = (block for block in self.blocks if found == (-(-layer.n // block[0]), -(-layer.k // block[1])))
            return Stored(read_fp8(layer, "weight_scale", next(blocks, None)))
        layer.skip("input_scale")
        layer.skip("input_zero_point")
        weight = layer.take("weight", torch.int8, (layer.n, layer.k))
        scale, group, order = self._scale(layer)
        zero = None
        if "weight_zero_point" in layer or self.zeros:
            zero = _like(layer.take("weight_zero_point", torch.int8, *_shapes(scale, layer.n)), layer.n)
        return Stored(_weight(weight, scale, group, zero, order, 8), order)

    def _packed(self, layer: Layer) -> Stored:
        n, k = layer.n, layer.k
        shapes: dict[tuple[int, ...], int] = {(n, -(-k * bits // 32)): bits for bits in self.bits or {4}}
        packed = layer.take("weight_packed", torch.int32, *shapes)
        bits = shapes[tuple(packed.shape)]
        if "weight_shape" in layer:
            told = layer.take("weight_shape", (torch.int64, torch.int32), (2,)).tolist()
            if told != [n, k]:
                raise ValueError(f"{layer.name}.weight_shape says {told}; expected [{n}, {k}]")
        scale, group, order = self._scale(layer)
        middle = 1 << bits - 1
        zero = None
        if "weight_zero_point" in layer or self.zeros:
            groups = scale.shape[1]
            found = layer.take(
                "weight_zero_point", (torch.int32, torch.int8), (-(-n * bits // 32), groups), (n, groups)
            )
            plain = found.dtype == torch.int8
            zero = found.to(torch.int16) if plain else unpack(found.t(), bits)[:, :n].t().to(torch.int16) - middle
        codes = unpack(packed, bits)[:, :k].to(torch.int16) - middle
        return Stored(_weight(codes, scale, group, zero, order, bits), order)

    def _scale(self, layer: Layer) -> tuple[Tensor, int | None, Tensor | None]:
        """Scales (N, groups), the columns that share one, and the order of the columns."""
        n, k = layer.n, layer.k
        shape = layer.shape("weight_scale")
        groups = shape[1] if len(shape) == 2 else 1
        scale = _like(layer.take("weight_scale", FLOATS, (), (1,), (n,), (n, groups)), n)
        group = group_of(k, groups, tuple(size for size in self.groups if size > 0) if groups > 1 else ())
        order = None
        if "weight_g_idx" in layer or (self.ordered and group is not None):
            g_idx = layer.take("weight_g_idx", (torch.int32, torch.int64), (k,))
            order = None if bool((g_idx == -1).all()) else order_of(g_idx, group)
        return scale, group, order


def _like(values: Tensor, n: int) -> Tensor:
    """Values for all, by rows, or (N, groups) as (N, groups)."""
    return values if values.dim() == 2 else values.reshape(-1, 1).expand(n, 1)


def _shapes(scale: Tensor, n: int) -> tuple[tuple[int, ...], ...]:
    return ((n, scale.shape[1]), (n,), (1,), ()) if scale.shape[1] == 1 else ((n, scale.shape[1]),)


def _weight(codes: Tensor, scale: Tensor, group: int | None, zero: Tensor | None, order: Tensor | None,
            bits: int) -> Weight:  # fmt: skip
    """The Weight of signed integers; int4 counts its zero points from 0 to 15, they from -8 to 7."""
    steps = codes if order is None else codes[:, order.long()]
    if zero is not None:
        zero = zero.to(torch.int16)
        steps = steps.to(torch.int16) - zero.repeat_interleave(group or codes.shape[1], dim=1)[:, : codes.shape[1]]
        zero = zero + (1 << bits - 1)
    return weight_of(steps, scale, group, zero=zero, narrow=bits < 8)
