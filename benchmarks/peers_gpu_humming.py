"""Humming's kernels, vLLM's backend for quantised weights: weight-only, x in bf16 (``pip install humming-kernels``)."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from contender import FAILURES, Absent, Build, Calls, Material, Rate


@functools.cache
def humming() -> Any:
    """The package. Raises ``Absent`` where it is not installed or cannot be loaded."""
    try:
        import humming.config
        import humming.forward
        import humming.kernel.humming
        import humming.layer
        import humming.tune
    except (ImportError, OSError, RuntimeError) as failure:
        raise Absent(f"Humming is not installed or does not load: {failure}") from failure
    return humming


@functools.cache
def tuning(config: Any, m: int) -> str:
    """The kernel's parameters that Humming's rules choose for M rows, as JSON."""
    return json.dumps(humming().tune.get_heuristics_config(layer_config=config, shape_m=m))


class Humming:
    """One format. weights: Humming's description of it."""

    rate: Rate = "bf16"
    times = 1

    def __init__(self, material: Material, weights: dict[str, Any], tolerance: float) -> None:
        self.tolerance = tolerance
        layer = humming().layer.HummingLayer(shape_n=material.n, shape_k=material.k, weight_config=dict(weights),
                                             torch_dtype=torch.bfloat16).cuda()  # fmt: skip
        layer.load_from_unquantized(material.w)
        layer.transform()
        self.config = layer.humming_config
        self.scale = layer.weight_scale.data
        self.weight_bytes = layer.weight.nbytes + self.scale.nbytes
        count = material.copies(self.weight_bytes)
        self.weights = [layer.weight.data, *(layer.weight.data.clone() for _ in range(count - 1))]
        self.locks = [torch.zeros_like(layer.locks) for _ in self.weights]  # as each layer of a model has its own

    def rows(self, x: Tensor) -> Calls:
        own, chosen = x.bfloat16(), tuning(self.config, x.shape[0])
        product = humming().forward.humming_forward
        calls = [
            functools.partial(product, self.config, own, weight, self.scale, locks=locks, tuning_config=chosen)
            for weight, locks in zip(self.weights, self.locks, strict=True)
        ]
        block = json.loads(chosen).get("block_shape")
        return Calls(calls=calls, result=lambda i: calls[i](), kernel=f"block {block}")

    def close(self) -> None:
        pass


FORMATS: dict[str, tuple[dict[str, Any], float]] = {
    "Humming W8A16": ({"dtype": "int8"}, 0.02),
    "Humming W8A16 fp8": ({"dtype": "float8e4m3"}, 0.06),
    "Humming W4A16": ({"dtype": "int4", "group_size": 128}, 0.16),
}
CONTENDERS: dict[str, Build] = {
    name: functools.partial(Humming, weights=weights, tolerance=tolerance)
    for name, (weights, tolerance) in FORMATS.items()
}


def _kernels(name: str, k: int, n: int, ms: Sequence[int]) -> list[dict[str, Any]]:
    """The descriptions of the kernels that a contender will need for a shape."""
    layer = (
        humming()
        .layer.HummingLayer(shape_n=n, shape_k=k, weight_config=dict(FORMATS[name][0]), torch_dtype=torch.bfloat16)
        .cuda()
    )
    layer.load_from_unquantized(torch.randn(n, k, device="cuda"))
    layer.transform()
    found = []
    for m in ms:
        parts = humming().kernel.humming.HummingKernel._resolve_configs(
            layer.humming_config.to_str(), None, tuning(layer.humming_config, m)
        )
        spec = {key: value for part in parts for key, value in part.items() if key != "num_sms"}
        if spec not in found:
            found.append(spec)
    return found


def compile_all(names: Sequence[str], shapes: Sequence[tuple[int, int]], ms: Sequence[int]) -> int:
    """Compile what these contenders will need for shapes (K, N), as many at a time as there are cores; how many.

    A shape that a contender cannot take is passed over here: ``rows`` will tell.
    """
    kernel = humming().kernel.humming.HummingKernel
    specs = []
    for name in names:
        for k, n in shapes:
            with contextlib.suppress(*FAILURES):
                specs += [(kernel, spec) for spec in _kernels(name, k, n, ms)]
    kernel.compile_many(specs)
    return len(specs)
