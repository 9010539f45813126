"""vecmat's own contenders: ``vecmat.matmul`` on a Weight, as a user calls it, Python included."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

import vecmat
from contender import Build, Calls, Material, Rate
from vecmat.problem import DTYPES


class Vecmat:
    """One format. name: the contender's. x is bf16 for quantised weights, else of the weight's own dtype."""

    def __init__(self, material: Material, name: str, fmt: str, compute: str | None, tolerance: float) -> None:
        self.weights = material.quantised(fmt)
        self.compute, self.tolerance = compute, tolerance
        self.kernel = material.kernels.get(name)
        stored = self.weights[0].format
        self.x = torch.bfloat16 if not stored.dense else DTYPES[stored.name]
        self.weight_bytes = stored.nbytes(material.n, material.k)
        # 16 bits of x are two signed bytes, or one bf16: where both instructions exist they cost the same
        self.rate: Rate = "bf16" if stored.name == "bf16" else "fp32" if stored.dense else "int8"
        self.times = 1 if stored.dense or compute else 2

    def rows(self, x: Tensor) -> Calls:
        own = x.to(self.x)

        def call(weight: vecmat.Weight) -> Tensor:
            return vecmat.matmul(own, weight, kernel=self.kernel, compute=self.compute)

        calls = [functools.partial(call, weight) for weight in self.weights]
        for pack in calls:  # a copy is packed by its first call
            pack()
        kernel = self.kernel or vecmat.explain(own, self.weights[0], compute=self.compute).plan.kernel.name
        return Calls(calls=calls, result=lambda i: calls[i](), kernel=kernel)

    def close(self) -> None:
        pass


CONTENDERS: dict[str, Build] = {
    name: functools.partial(Vecmat, name=name, fmt=fmt, compute=compute, tolerance=tolerance)
    for name, fmt, compute, tolerance in (
        ("vecmat int8", "int8", None, 0.02),
        ("vecmat int8 compute", "int8", "int8", 0.03),
        ("vecmat int4", "int4:g128", None, 0.16),
        ("vecmat int4 compute", "int4:g128", "int8", 0.16),
        ("vecmat fp8", "fp8", None, 0.06),
        ("vecmat bf16", "bf16", None, 0.006),
        ("vecmat fp32", "fp32", None, 1e-5),
        ("vecmat fp16", "fp16", None, 0.001),
    )
}
