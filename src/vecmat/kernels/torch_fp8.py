"""torch's fp8 product, ``_scaled_mm``: fp8 x by fp8 weight on tensor cores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..problem import DTYPES, Problem
from ..weights import Weight, quantize_rows
from .base import Config, Kernel, Run, aligned, finish, flat, time_us


class TorchFp8(Kernel):
    """fp8 weight with ``compute="fp8"``: x quantised by rows to e4m3, ``torch._scaled_mm`` with row-wise scales.

    The product of the fp8 values is summed by the tensor cores (their fp8 accumulator keeps fewer digits than fp32
    unless ``use_fast_accum`` is off, as here), scaled in fp32 and rounded once to the result.
    """

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if problem.weight.name != "fp8":
            return f"the weight is {problem.weight}; this kernel multiplies fp8"
        if problem.weight.group_size is not None:
            return f"the weight has scales in groups of {problem.weight.group_size}; torch takes one per channel"
        if problem.compute != "fp8":
            return "torch._scaled_mm needs fp8 x too; only compute='fp8' allows that"
        if problem.grad:
            return "a gradient is asked for; torch._scaled_mm has none"
        if device.kind == "cuda" and device.capability < 89:
            return f"{device.arch} has no fp8 tensor cores"
        if not device.is_gpu:
            return "torch._scaled_mm on a CPU widens one number at a time; this kernel leaves it to GPUs"
        if problem.k % 16 or problem.n % 16:
            return f"N={problem.n} or K={problem.k} is not a multiple of 16, as torch._scaled_mm needs"
        if problem.out != "bf16":
            return f"the result is {problem.out}; torch._scaled_mm with row-wise scales gives bf16"
        return None

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        quantising = 40.0 + 0.053 * problem.m * problem.k / device.read_gbs  # several small kernels of torch
        return time_us(problem.bytes_moved, 0.8 * device.read_gbs, problem.flops, device.tops8, quantising)

    def reduction(self, problem: Problem, config: Config) -> str:
        return f"torch, whatever it takes for m={problem.m}, fp8"

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        out = DTYPES[problem.out]

        def run(x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
            assert weight.scale is not None
            q, row_scale = quantize_rows(flat(x), "fp8")
            data, scale = aligned(weight.data), aligned(weight.scale.reshape(1, -1))
            y: Any = torch._scaled_mm(q, data.t(), row_scale, scale, out_dtype=out)
            return finish(y, x, bias)

        return run
