"""GemLite's Triton kernels, weight-only, x in bf16 (``pip install gemlite``), autotuned on first use of a shape."""

from __future__ import annotations

import functools
import time
from typing import Any, ClassVar

import torch
from torch import Tensor

from contender import Absent, Build, Calls, Material, Rate


@functools.cache
def gemlite() -> Any:
    """The package. Raises ``Absent`` where it is not installed or cannot be loaded."""
    try:
        import gemlite
        import gemlite.core
        import gemlite.helper
    except (ImportError, OSError, RuntimeError) as failure:
        raise Absent(f"GemLite is not installed or does not load: {failure}") from failure
    return gemlite


class GemLite:
    """One format, the same numbers as vecmat's own.

    budget_s: the time all autotuning may take; what is not tuned by then is left out. spent_s: what it has taken.
    """

    rate: Rate = "bf16"
    times = 1
    budget_s: ClassVar[float] = 60.0
    spent_s: ClassVar[float] = 0.0

    def __init__(self, material: Material, fmt: str, tolerance: float) -> None:
        self.tolerance = tolerance
        types, weight = gemlite().DType, material.quantised(fmt)[0]
        if weight.format.group_size and material.k % weight.format.group_size:
            raise Absent(f"K={material.k} is no multiple of its group")
        assert weight.scale is not None
        if fmt == "int8":
            layer = (
                gemlite()
                .helper.A16W8_INT8(device="cuda:0", dtype=torch.bfloat16)
                .from_weights(weight.data, scales=weight.scale.bfloat16())
            )
        else:
            layer = gemlite().GemLiteLinear(
                4, group_size=weight.format.group_size, in_features=material.k, out_features=material.n,
                input_dtype=types.BF16, output_dtype=types.BF16,
            )  # fmt: skip
            levels = torch.stack((weight.data & 15, weight.data >> 4), dim=-1).view(material.n, -1)
            layer.pack(levels, weight.scale.bfloat16(), 8, None)
        first, *rest = layer.get_tensor_args()
        self.meta = layer.get_meta_args()
        self.weight_bytes = first.nbytes + rest[0].nbytes
        self.tensors = [[first, *rest], *([first.clone(), *rest] for _ in range(material.copies(first.nbytes) - 1))]

    def rows(self, x: Tensor) -> Calls:
        if GemLite.spent_s > GemLite.budget_s:
            raise Absent(f"its autotuning has taken {GemLite.spent_s:.0f} s; the rest is left out")
        own, product = x.bfloat16(), gemlite().core.forward_functional
        calls = [functools.partial(product, own, None, tensors, self.meta) for tensors in self.tensors]
        begin = time.perf_counter()
        calls[0]()
        torch.cuda.synchronize()
        GemLite.spent_s += time.perf_counter() - begin
        return Calls(calls=calls, result=lambda i: calls[i](),
                     kernel=gemlite().core.get_matmul_type(x.shape[0], self.meta[1]))  # fmt: skip

    def close(self) -> None:
        pass


CONTENDERS: dict[str, Build] = {
    "GemLite int8": functools.partial(GemLite, fmt="int8", tolerance=0.03),
    "GemLite int4": functools.partial(GemLite, fmt="int4:g128", tolerance=0.16),
}
