"""DeepSpeed-Inference's own ``VectorMatMulOp`` on its Triton path: fp16, the weight as (K, N)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from contender import Absent, Build, Calls, Material, Rate


class DeepSpeedTriton:
    """What ``VectorMatMulOp`` calls with ``use_triton``, after its own autotuning."""

    rate: Rate = "fp32"
    times = 1
    tolerance = 0.002

    def __init__(self, material: Material) -> None:
        try:
            from deepspeed.ops.transformer.inference.triton.ops import vector_matmul_func
        except (ImportError, AttributeError, RuntimeError) as failure:
            raise Absent(f"DeepSpeed is not installed or its Triton kernels do not load: {failure}") from failure
        self.product = vector_matmul_func
        dense = material.w.half().t().contiguous()
        self.weight_bytes = dense.nbytes
        self.weights = [dense, *(dense.clone() for _ in range(material.copies(dense.nbytes) - 1))]

    def rows(self, x: Tensor) -> Calls:
        own = x.half()
        calls = [
            functools.partial(self.product, own, weight, False, torch.empty(1), False, False) for weight in self.weights
        ]
        return Calls(calls=calls, result=lambda i: calls[i]())

    def close(self) -> None:
        pass


CONTENDERS: dict[str, Build] = {"DeepSpeed Triton": DeepSpeedTriton}
