"""torch's int8 products: ``_weight_int8pack_mm`` keeps x, ``_int_mm`` multiplies int8 by int8 exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..problem import DTYPES, Problem
from ..weights import Weight, quantize_rows
from .base import Config, Kernel, Run, aligned, finish, flat, time_us


class TorchInt8(Kernel):
    """int8 weight, one scale per channel, through torch.

    Weight-only on a CPU: ``torch._weight_int8pack_mm``, bf16 x and scales, fp32 sums. Where the scales are not
    bf16 numbers the rest of each is applied to the result. ``compute="int8"`` on a GPU: x quantised by rows,
    ``torch._int_mm`` (exact in int32), both scales applied in fp32.
    """

    packing = "torch_int8"

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if problem.weight.name != "int8":
            return f"the weight is {problem.weight}; this kernel multiplies int8"
        if problem.weight.group_size is not None:
            return f"the weight has scales in groups of {problem.weight.group_size}; torch takes one per channel"
        if problem.grad:
            return "a gradient is asked for; torch's int8 products have none"
        if problem.compute == "int8":
            return self._rejects_int_mm(problem, device)
        if problem.compute:
            return f"compute={problem.compute!r} needs an {problem.compute} weight"
        if device.kind != "cpu":
            return "torch._weight_int8pack_mm is slower than the dense product on a GPU; this kernel is for CPUs"
        if problem.x != "bf16":
            return f"x is {problem.x}; torch._weight_int8pack_mm is vectorised for bf16 only"
        if device.arch == "default":
            return "this processor has neither AVX2 nor NEON; torch would multiply one number at a time"
        if problem.out != "bf16":
            return f"the result is {problem.out}; torch._weight_int8pack_mm gives bf16"
        if problem.k % 16:
            return f"K={problem.k} is not a multiple of 16; torch._weight_int8pack_mm would read past the rows"
        if problem.n * problem.k >= 1 << 31:
            return "N*K reaches 2**31; torch._weight_int8pack_mm counts in 32 bits"
        return None

    def _rejects_int_mm(self, problem: Problem, device: Device) -> str | None:
        if not device.is_gpu:
            return "torch._int_mm on a CPU without VNNI multiplies one number at a time; this kernel leaves it to GPUs"
        if device.kind == "cuda" and device.capability < 80:
            return f"{device.arch} has no int8 tensor cores that torch._int_mm uses"
        if problem.k % 8 or problem.n % 8:
            return f"N={problem.n} or K={problem.k} is not a multiple of 8, as torch._int_mm needs"
        return None

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        if device.is_gpu:
            passes = 45.0 + 0.053 * problem.m * (problem.k + problem.n) / device.read_gbs  # several kernels of torch
            return time_us(problem.bytes_moved, 0.8 * device.read_gbs, problem.flops, 0.8 * device.tops8, passes)
        flops = problem.flops if problem.m > 1 else 0.0
        rate = min(device.tops8, 0.075 * device.units)  # it widens to fp32, whatever else the processor has
        return time_us(problem.bytes_moved, 0.85 * device.read_gbs, flops, rate, 6.0)

    def reduction(self, problem: Problem, config: Config) -> str:
        if problem.compute:
            return "int32, exact"
        return "fp32, vector lanes strided over K then summed, scale first"

    def prepare(self, weight: Weight) -> Any:
        """The int8 data at an aligned address, its scales in bf16, and what bf16 lost of them (None if nothing)."""
        assert weight.scale is not None
        scale = weight.scale.view(-1)
        rounded = scale.to(torch.bfloat16)
        rest = scale / rounded.float()
        exact = bool((rest == 1).all())
        return aligned(weight.data), rounded, (None if exact else rest), scale

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        if problem.compute:
            out = DTYPES[problem.out]

            def run_int_mm(x: Tensor, operand: Any, bias: Tensor | None) -> Tensor:
                data, _, _, scale = operand
                q, row_scale = quantize_rows(flat(x), "int8")
                m = q.shape[0]
                if m <= 16:  # _int_mm refuses 16 rows and fewer on CUDA
                    q = torch.nn.functional.pad(q, (0, 0, 0, 32 - m))
                y = torch._int_mm(q, data.t())[:m].float().mul_(scale).mul_(row_scale)
                return finish(y, x, bias, out)

            return run_int_mm

        k = problem.k

        def run(x: Tensor, operand: Any, bias: Tensor | None) -> Tensor:
            data, scale, rest, _ = operand
            rows = x if x.dim() == 2 else x.reshape(-1, k)
            y = torch._weight_int8pack_mm(aligned(rows), data, scale)
            if rest is not None:
                y = y.mul_(rest)
            return finish(y, x, bias)

        return run
