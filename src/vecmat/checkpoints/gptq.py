"""GPTQ: integers of 2, 3, 4 or 8 bits packed along K, zero points, and the order that the activations asked for.

qweight int32 (K * bits / 32, N): column n is a stream of bits, row 0 of the weight first. qzeros int32
(groups, N * bits / 32), the same along N. scales (groups, N). g_idx int32 (K,): the group of each row.
value = (q - zero) * scale[g_idx[k], n], where format "gptq" stores zero - 1 and "gptq_v2" zero itself.

Some writers say "gptq" and store what "gptq_v2" does. Where the config says ``sym`` and every stored zero point is
already the middle, 2**(bits - 1), it is taken for what it is.
"""

from __future__ import annotations

from typing import Any

import torch

from .integers import group_of, order_of, unpack, weight_of
from .layer import FLOATS, Layer, Stored, number

BITS = (2, 3, 4, 8)


class Gptq:
    """Reads GPTQ, v1 and v2, with and without desc_act."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.bits = number(config, "bits", 4, BITS)
        self.group = number(config, "group_size", 128)
        self.symmetric = config.get("sym", True) is True
        self.ordered = config.get("desc_act") is True
        self.mixed = bool(config.get("dynamic"))  # other bits and groups for some layers (GPTQModel)
        kind = config.get("checkpoint_format") or config.get("format") or "gptq"
        if kind not in ("gptq", "gptq_v2"):
            raise ValueError(f"quantization_config: checkpoint_format is {kind!r}; read are 'gptq' and 'gptq_v2'")
        self.below = 0 if kind == "gptq_v2" else 1

    def holds(self, layer: Layer) -> bool:
        return "qweight" in layer

    def read(self, layer: Layer) -> Stored:
        n, k = layer.n, layer.k
        shapes: dict[tuple[int, ...], int] = {
            (k * bits // 32, n): bits for bits in (BITS if self.mixed else (self.bits,)) if k * bits % 32 == 0
        }
        qweight = layer.take("qweight", torch.int32, *shapes)
        bits = shapes[tuple(qweight.shape)]
        groups = layer.rows("scales")
        group = group_of(k, groups, () if self.mixed else (self.group,))
        scale = layer.take("scales", FLOATS, (groups, n)).t()
        middle = 1 << bits - 1
        zero = unpack(layer.take("qzeros", torch.int32, (groups, -(-n * bits // 32))), bits)[:, :n].t().to(torch.int16)
        if not (self.symmetric and bool((zero == middle).all())):
            zero = zero + self.below
        order = None
        if "g_idx" in layer or (self.ordered and group is not None):
            order = order_of(layer.take("g_idx", (torch.int32, torch.int64), (k,)), group)
        codes = unpack(qweight.t(), bits)
        steps = (codes if order is None else codes[:, order.long()]).to(torch.int16 if bits == 8 else torch.int8)
        steps -= zero.to(steps.dtype).repeat_interleave(group or k, dim=1)[:, :k]
        return Stored(weight_of(steps, scale, group, zero=zero, narrow=bits < 8), order)
