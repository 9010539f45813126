"""Anything, anywhere: the weight is widened a few rows at a time and multiplied by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..device import Device
from ..problem import DTYPES, Problem
from ..weights import Weight, dense_format, quantize_rows
from .base import Config, Kernel, Run, cpu_gemm_flops, finish, flat, time_us, torch_fp32_us

# Widened weight per step: 1 Mi elements (4 MiB of fp32) stay in a CPU's cache between widening and product; 3.1 ms
# for 4096x4096 int8 and one row of fp32 x, where F.linear on the fp32 weight takes 3.5 (docs/measured.md).
_CPU_BLOCK = 1 << 20
_GPU_BLOCK = 1 << 26


class Fallback(Kernel):
    """Every problem on every device, through ``torch``: blocks of weight rows are dequantised and multiplied.

    config ``widen``: True computes in fp32 (exact widening of 16-bit operands, one rounding at the end); False in
    x's dtype, the dequantised weight rounded to it. A per-channel scale is applied to the result in fp32 when
    widening. ``compute="int8"``/``"fp8"`` quantises x by rows first (``weights.quantize_rows``) and always widens.
    """

    differentiable = True

    def rejects(self, problem: Problem, device: Device) -> str | None:
        return None

    def default_config(self, problem: Problem, device: Device) -> Config:
        native16 = device.is_gpu or (problem.x == "bf16" and device.arch in ("avx512_bf16", "amx"))
        narrow = native16 and problem.m > 1 and problem.out == problem.x and problem.weight.name != problem.x
        return {"widen": problem.x == "fp32" or not narrow or bool(problem.compute)}

    def configs(self, problem: Problem, device: Device) -> Sequence[Config]:
        if problem.x in ("fp32", problem.weight.name) or problem.compute or problem.out != problem.x:
            return [self.default_config(problem, device)]
        return [{"widen": True}, {"widen": False}]

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        elements = problem.n * problem.k
        same = problem.weight.name == ("fp32" if config["widen"] else problem.x)  # nothing to convert
        if device.is_gpu:  # passes over the widened weight, as measured in bytes an element
            if same:
                return time_us(problem.bytes_moved, device.read_gbs, problem.flops, device.tflops16, 20.0)
            passes = {True: 46.0, False: 29.0} if problem.weight.name == "int4" else {True: 18.0, False: 25.0}
            rate = device.tflops32 if config["widen"] else device.tflops16
            return time_us(passes[bool(config["widen"])] * elements, device.read_gbs, problem.flops, rate, 20.0)
        if same and problem.x == "fp32":
            return 12.0 + torch_fp32_us(problem, device)
        per_element = 0.0 if same else 0.52e-3 if problem.weight.name in ("int4", "fp8") else 0.32e-3
        widening = problem.n * problem.k * per_element * (2 if problem.layout == "kn" else 1) / device.units
        return widening + time_us(problem.bytes_moved, device.read_gbs, cpu_gemm_flops(problem), device.tflops32, 15.0)

    def reduction(self, problem: Problem, config: Config) -> str:
        return f"torch by blocks, whatever it takes for m={problem.m}, {'fp32' if config['widen'] else problem.x}"

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        wide = torch.float32 if config["widen"] else DTYPES[problem.x]
        out_dtype = DTYPES[problem.out]
        step = max(16, (_GPU_BLOCK if device.is_gpu else _CPU_BLOCK) // max(problem.k, 1))
        scale_last = config["widen"] and problem.weight.group_size is None and not problem.weight.dense

        def run(x: Tensor, operand: Any, bias: Tensor | None) -> Tensor:
            weight = operand if isinstance(operand, Weight) else _dense(operand, problem)
            rows, row_scale = (flat(x), None) if not problem.compute else quantize_rows(flat(x), problem.compute)
            rows = rows.to(wide)
            n = weight.n
            early, late = (None, bias) if config["widen"] else (bias, None)  # before the one rounding, in 16 bits
            if problem.grad or n <= step:
                y = _linear(rows, weight.rows(0, n, wide, scaled=not scale_last), early)
            else:
                y = torch.empty(rows.shape[0], n, dtype=wide, device=x.device)
                for start in range(0, n, step):
                    stop = min(start + step, n)
                    block = weight.rows(start, stop, wide, scaled=not scale_last)
                    if early is None:
                        torch.mm(rows, block.t(), out=y[:, start:stop])
                    else:
                        torch.addmm(early[start:stop], rows, block.t(), out=y[:, start:stop])
            if scale_last:
                assert weight.scale is not None
                y = y.mul_(weight.scale.view(-1))
            if row_scale is not None:
                y = y.mul_(row_scale)
            return finish(y, x, late, out_dtype)

        return run


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` in its arguments' dtype: autocast would narrow what was widened."""
    if torch.is_autocast_enabled(rows.device.type):
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows, weight, bias)
    return F.linear(rows, weight, bias)


def _dense(data: Tensor, problem: Problem) -> Weight:
    return Weight(dense_format(data.dtype), data, layout=problem.layout)
