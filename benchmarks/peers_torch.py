"""torch's own ways: ``F.linear``, the packed int8 and int4 products, and oneDNN's int8 product, which are private."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from contender import Absent, Build, Calls, Material, Rate
from vecmat.problem import DTYPES


class Linear:
    """``F.linear`` on the dense weight in ``dtype``, x of the same."""

    times = 1

    def __init__(self, material: Material, dtype: str, tolerance: float) -> None:
        self.dtype, self.tolerance = DTYPES[dtype], tolerance
        dense = material.w.to(self.dtype)
        self.weight_bytes = dense.nbytes
        self.weights = [dense.clone() for _ in range(material.copies(dense.nbytes))]
        self.rate: Rate = "bf16" if dtype == "bf16" else "fp32"

    def rows(self, x: Tensor) -> Calls:
        own = x.to(self.dtype)
        calls = [functools.partial(F.linear, own, weight) for weight in self.weights]
        return Calls(calls=calls, result=lambda i: calls[i]())

    def close(self) -> None:
        pass


class Int8Pack:
    """``_weight_int8pack_mm``: int8 weight, a bf16 scale a row, bf16 x."""

    rate: Rate = "bf16"
    times = 1
    tolerance = 0.02

    def __init__(self, material: Material) -> None:
        weight = material.quantised("int8")[0]
        assert weight.scale is not None
        self.weights = [weight.data.clone() for _ in range(material.copies(weight.data.nbytes))]
        self.scale = weight.scale.view(-1).bfloat16()
        self.weight_bytes = weight.data.nbytes + self.scale.nbytes

    def rows(self, x: Tensor) -> Calls:
        own = x.bfloat16()
        calls = [functools.partial(torch._weight_int8pack_mm, own, weight, self.scale) for weight in self.weights]
        return Calls(calls=calls, result=lambda i: calls[i]())

    def close(self) -> None:
        pass


class Int4Pack:
    """``_weight_int4pack_mm_for_cpu``: int4 weight in groups of 128, bf16 scales and offsets, bf16 x."""

    rate: Rate = "bf16"
    times = 1
    tolerance = 0.16

    def __init__(self, material: Material) -> None:
        if material.k % 128 or material.n % 16:
            raise Absent(f"N={material.n} and K={material.k} are not multiples of 16 and 128")
        weight = material.quantised("int4:g128")[0]
        assert weight.scale is not None
        levels = torch.stack((weight.data & 15, weight.data >> 4), dim=-1).view(material.n, -1).to(torch.int32)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
        self.weights = [packed.clone() for _ in range(material.copies(packed.nbytes))]
        scale = weight.scale.bfloat16().t()
        self.scales = torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()
        self.weight_bytes = packed.nbytes + self.scales.nbytes

    def rows(self, x: Tensor) -> Calls:
        own, product = x.bfloat16(), torch.ops.aten._weight_int4pack_mm_for_cpu
        calls = [functools.partial(product, own, weight, 128, self.scales) for weight in self.weights]
        return Calls(calls=calls, result=lambda i: calls[i]())

    def close(self) -> None:
        pass


class Qlinear:
    """``onednn.qlinear_pointwise``: int8 weight packed by oneDNN, x as bytes already, with one scale for all of it.

    Quantising x is not in the time, and one scale for all rows must be known beforehand: less than ``compute="int8"``.
    """

    rate: Rate = "int8"
    times = 1
    tolerance = 0.04

    def __init__(self, material: Material) -> None:
        weight = material.quantised("int8")[0]
        assert weight.scale is not None
        self.data, self.scale = weight.data, weight.scale.view(-1).clone()
        self.zeros = torch.zeros(material.n, dtype=torch.int32)
        self.weight_bytes = weight.data.nbytes + self.scale.nbytes
        self.count = material.copies(weight.data.nbytes)
        self.packed: dict[int, list[Tensor]] = {}

    def rows(self, x: Tensor) -> Calls:
        step = float(x.abs().amax() / 127)
        own = (torch.round(x / step) + 128).to(torch.uint8)
        self.packed.clear()  # oneDNN's layout may depend on the number of rows
        weights = [torch.ops.onednn.qlinear_prepack(self.data, list(x.shape)) for _ in range(self.count)]
        product = torch.ops.onednn.qlinear_pointwise
        calls = [
            functools.partial(product, own, step, 128, weight, self.scale, self.zeros, None, 1.0, 0, torch.bfloat16,
                              "none", [], "")
            for weight in weights
        ]  # fmt: skip
        return Calls(calls=calls, result=lambda i: calls[i]())

    def close(self) -> None:
        pass


CONTENDERS: dict[str, Build] = {
    "torch fp32": functools.partial(Linear, dtype="fp32", tolerance=1e-5),
    "torch bf16": functools.partial(Linear, dtype="bf16", tolerance=0.006),
    "torch fp16": functools.partial(Linear, dtype="fp16", tolerance=0.001),
    "torch int8pack": Int8Pack,
    "torch int4pack": Int4Pack,
    "torch qlinear": Qlinear,
}
