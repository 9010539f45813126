"""oneDNN's product with a dense weight in oneDNN's own packing, through torch's private operators for it."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..device import Device
from ..problem import Problem
from ..weights import Weight
from ._cpu import PackedDense, state_of
from .base import Config, Run, finish, flat, time_us

# Not fp32: oneDNN adds up all of k in one go, and where numbers cancel its error is several times that of F.linear
# (seen: 1.8 roundings of the sum of the products' magnitudes, where torch's MKL is off by 0.1).
_ARCHS = {"bf16": ("avx512_bf16", "amx")}


class Packed:
    """A weight as oneDNN wants it, its one tensor. state: of the data it was made from."""

    __slots__ = ("state", "tensors")

    def __init__(self, weight: Weight) -> None:
        rows = weight.data.t() if weight.layout == "kn" else weight.data
        self.state = state_of(weight.data)
        self.tensors = (torch.ops.mkldnn._reorder_linear_weight(rows.detach().contiguous()),)


class TorchOnednn(PackedDense):
    """``mkldnn::_linear_pointwise`` on a packed copy of a dense weight of x's dtype; the numbers are oneDNN's own.

    The copy takes as much memory as the weight. It is made anew once the weight was written to, as torch counts that
    (not for inference tensors, nor writes through ``.data``).
    """

    packing = "torch_onednn"

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if device.kind != "cpu":
            return "this kernel is for CPUs"
        if problem.weight.name not in _ARCHS:
            return f"the weight is {problem.weight}; this kernel multiplies dense bf16"
        if problem.weight.name != problem.x or problem.out != problem.x:
            return f"x is {problem.x}, the weight {problem.weight}, the result {problem.out}; oneDNN wants equal dtypes"
        if not problem.packable:
            return "the weight is a plain tensor; only a Weight may have a packed copy"
        if problem.grad:
            return "a gradient is asked for; this kernel has none"
        if device.arch not in _ARCHS[problem.x]:
            return f"oneDNN has no {problem.x} instructions on {device.arch}"
        if not _available():
            return "this build of torch has no oneDNN with packed weights (mkldnn::_linear_pointwise)"
        return None

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        later = 2.0 * (problem.m - 1) * problem.n * problem.k / (1.15 * device.tflops16) * 1e-6
        return later + time_us(problem.bytes_moved, 0.95 * device.read_gbs, fixed_us=12.0)

    def reduction(self, problem: Problem, config: Config) -> str:
        return f"oneDNN, whatever it takes for m={problem.m}, {problem.x}"

    def prepare(self, weight: Weight) -> Packed:
        return Packed(weight)

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        multiply = torch.ops.mkldnn._linear_pointwise.default

        def run(x: Tensor, operand: Packed, bias: Tensor | None) -> Tensor:
            y = multiply(flat(x).contiguous(), operand.tensors[0], bias, "none", [], "")
            return finish(y, x, None)

        return run


@functools.lru_cache(maxsize=1)
def _available() -> bool:
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
