"""torch's own product of x and a dense weight: cuBLAS, hipBLASLt, MKL or oneDNN."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ..device import Device
from ..problem import Problem
from .base import Config, Kernel, Run, time_us, torch_fp32_us


class TorchDense(Kernel):
    """``F.linear`` on a dense weight of x's dtype; the numbers are torch's own."""

    differentiable = True

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if not problem.weight.dense:
            return f"the weight is {problem.weight}; this kernel multiplies dense weights"
        if problem.weight.name != problem.x:
            return f"x is {problem.x} and the weight {problem.weight}; torch multiplies equal dtypes only"
        if problem.out != problem.x:
            return f"the result is {problem.out} and x {problem.x}; torch gives back x's dtype"
        if problem.compute:
            return f"compute={problem.compute!r} quantises x; torch would not"
        return None

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        if device.is_gpu:
            rate = device.tflops32 if problem.x == "fp32" else device.tflops16
            padded = 2 * max(problem.m, 64) * problem.n * problem.k  # cuBLAS computes whole tiles of rows
            return time_us(problem.bytes_moved, 0.985 * device.read_gbs, padded, rate, 5.0)
        if problem.x == "fp32":
            return torch_fp32_us(problem, device)
        native = problem.x == "bf16" and device.arch in ("avx512_bf16", "amx")
        if problem.layout == "kn" and not native:  # torch walks down the columns, one number at a time
            return time_us(problem.bytes_moved, device.read_gbs, problem.flops, 2e-4 * device.units, 5.0)
        if native:
            done = 2.0 * (problem.m - 1) * problem.n * problem.k / (1.15 * device.tflops16) * 1e-6
            return done + time_us(problem.bytes_moved, 0.6 * device.read_gbs, fixed_us=5.0)
        flops = problem.flops if problem.m > 1 else 0.0
        rate = device.tflops16 if problem.x == "bf16" else min(device.tflops16, 0.018 * device.units)
        return time_us(problem.bytes_moved, 0.6 * device.read_gbs, flops, rate, 5.0)

    def reduction(self, problem: Problem, config: Config) -> str:
        return f"torch, whatever it takes for m={problem.m}, {problem.x}"

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        if problem.layout == "nk":
            return F.linear

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x, weight.t(), bias)  # the bias is added before the one rounding

        return run
