"""torch's int4 product, ``_weight_int4pack_mm``: groups along K, 16-bit x."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..device import Device
from ..problem import Problem
from ..weights import Weight
from .base import Config, Kernel, Run, aligned, finish, flat, time_us


class TorchInt4(Kernel):
    """int4 weight in groups, bf16 x, through torch: "tinygemm" on CUDA, its AVX twin on a CPU; fp32 sums.

    torch takes scale and offset of each group in bf16 and computes (q - 8) * scale + offset. A zero point's offset,
    (8 - zero) * scale, may need more digits than bf16 has, so weights with zero points are not for this kernel.
    """

    packing = "torch_int4"

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if problem.weight.name != "int4":
            return f"the weight is {problem.weight}; this kernel multiplies int4"
        if problem.grad:
            return "a gradient is asked for; torch's int4 product has none"
        if problem.compute:
            return f"compute={problem.compute!r} quantises x; torch._weight_int4pack_mm would not"
        if not problem.weight.symmetric:
            return "the weight has zero points, whose offsets torch would round to bf16"
        if device.kind not in ("cpu", "cuda"):
            return f"torch has no int4 product for {device.kind}"
        if problem.x != "bf16" or problem.out != "bf16":
            return f"x is {problem.x} and the result {problem.out}; torch._weight_int4pack_mm is for bf16"
        assert problem.weight.group_size is not None
        if problem.k % problem.weight.group_size:
            return f"K={problem.k} is not a multiple of the group size {problem.weight.group_size}"
        if device.kind == "cpu":
            if device.arch not in ("avx2", "avx512", "avx512_bf16", "amx"):
                return "torch's int4 product is vectorised for AVX2 and AVX-512 only"
            if problem.n % 16:
                return f"N={problem.n} is not a multiple of 16"
        else:
            if device.capability < 80:
                return f"{device.arch} has no bf16 tensor cores"
            if problem.n % 8 or problem.k % 128:
                return f"N={problem.n} is not a multiple of 8 or K={problem.k} not one of 128"
        if problem.n * problem.k >= 1 << 31:
            return "N*K reaches 2**31; torch._weight_int4pack_mm counts in 32 bits"
        return None

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        if device.is_gpu:  # the weight is unpacked again for every 16 rows
            per_row = 1.8e-3 if problem.m == 1 else 6.4e-3 * -(-problem.m // 16)
            return 2.0 + per_row * problem.n * problem.k / device.read_gbs
        unpack = problem.n * problem.k / (6e3 * device.units)  # 12e9 weights a second on two AVX2 cores
        flops = problem.flops if problem.m > 1 else 0.0
        rate = min(0.88 * device.tops8, 0.08 * device.units)  # it widens to fp32, whatever else the processor has
        compute = flops / rate * 1e-6
        return 6.0 + max(time_us(problem.bytes_moved, device.read_gbs), unpack, compute)

    def reduction(self, problem: Problem, config: Config) -> str:
        return f"torch int4, whatever it takes for m={problem.m}"

    def prepare(self, weight: Weight) -> Any:
        """torch's packed weight and its (K / group, N, 2) table of bf16 scales and zero offsets."""
        assert weight.scale is not None
        nibbles = torch.stack((weight.data & 15, weight.data >> 4), -1).view(weight.n, -1)[:, : weight.k]
        scale = weight.scale.t()
        table = torch.stack((scale, torch.zeros_like(scale)), -1).to(torch.bfloat16).contiguous()
        if weight.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.to(torch.int32), 1)
            return aligned(packed), table
        pairs = nibbles[:, 0::2] << 4 | nibbles[:, 1::2]  # CUDA's packer wants the even k in the high nibble
        return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), 8), table

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        aten, group = torch.ops.aten, problem.weight.group_size
        product = aten._weight_int4pack_mm_for_cpu if device.kind == "cpu" else aten._weight_int4pack_mm

        def run(x: Tensor, operand: Any, bias: Tensor | None) -> Tensor:
            y = product(aligned(flat(x)), operand[0], group, operand[1])
            return finish(y, x, bias)

        return run
