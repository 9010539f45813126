"""The contract of a kernel: what it answers about a problem, and how it runs one."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..device import Device
from ..packs import packed
from ..problem import Problem
from ..weights import Weight

Config = Mapping[str, int | str | bool]
Run = Callable[[Tensor, Any, Tensor | None], Tensor]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Direct:
    """A Problem's product as one call of the CPU library, for a caller in C (``ready.py``).

    function: "multiply", whose weight is at the operand's ``address``; "dense", which reads a tensor and ``spec``; or
    "packed", which reads ``spec`` and the operand's ``address`` as long as the weight has the operand's ``state``.
    x, w, y: element types as the library numbers them, w = -1 for packed ones. digits: bytes of an element of x.
    """

    function: Literal["multiply", "dense", "packed"]
    spec: Any = None
    x: int
    w: int = -1
    y: int
    digits: int = 0


class Kernel(abc.ABC):
    """One way to compute y = x @ weight + bias.

    Everything but ``prepare`` and the callable that ``bind`` returns is pure: it looks at values (Problem, Device,
    Config), never at hardware or tensors, so that an absent device can be reasoned about.

    version: raised when a change makes old table rows meaningless. differentiable: its result has a gradient for x
    (and for a dense weight and the bias) in torch's autograd. packing: the name of the packed form that ``prepare``
    makes, None where it reads the plain storage; kernels that share a packing share the copy. launch_errors: what
    its first launch may raise when this device cannot compile it or give it its resources; it is then demoted.
    """

    version: ClassVar[int] = 1
    differentiable: ClassVar[bool] = False
    packing: ClassVar[str | None] = None
    launch_errors: ClassVar[tuple[type[Exception], ...]] = ()

    def __init__(self, name: str) -> None:
        self.name = name

    @abc.abstractmethod
    def rejects(self, problem: Problem, device: Device) -> str | None:
        """None if the kernel can run the problem on the device, else why not, as a sentence without a full stop."""

    @abc.abstractmethod
    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        """About how many microseconds a call takes, weights coming from memory; for ranking."""

    @abc.abstractmethod
    def reduction(self, problem: Problem, config: Config) -> str:
        """The order in which K is summed, as a short string.

        Two configs (of any kernels) with equal strings give a row of x the same bits, whatever M is.
        """

    @abc.abstractmethod
    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        """The callable that computes y (..., N) from x (..., K), the operand and the bias (N,) or None.

        x may be strided; the operand is what ``operand(weight)`` returned, or a dense tensor in the problem's layout.
        The callable must work for every problem with the same ``key()`` and M in the same bucket.
        """

    def direct(self, problem: Problem, device: Device, config: Config) -> Direct | None:
        """The same product as a call of the CPU library, for the problem's very M; None if it is not one."""
        return None

    def default_config(self, problem: Problem, device: Device) -> Config:
        """The config to use when nothing was tuned."""
        return {}

    def configs(self, problem: Problem, device: Device) -> Sequence[Config]:
        """Every config worth trying, the default among them; 40 at most."""
        return [self.default_config(problem, device)]

    def prepare(self, weight: Weight) -> Any:
        """The packed form of a weight, made once per weight and shared by kernels of one ``packing``."""
        raise NotImplementedError(f"{self.name} has no packing")

    def operand(self, weight: Weight) -> Any:
        """What ``bind``'s callable takes as the weight: the dense tensor, the Weight itself, or its packed form."""
        if self.packing is None:
            return weight.data if weight.format.dense else weight
        pack = weight.packs.get(self.packing)
        return packed(weight, self.packing, self.prepare) if pack is None else pack


def flat(x: Tensor) -> Tensor:
    """x as (M, K): a view where its strides allow one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def aligned(tensor: Tensor) -> Tensor:
    """The tensor contiguous and at a 64-byte address: itself, or a copy.

    torch's packed CPU kernels load x with aligned instructions and take its row stride for K: an offset view
    crashes them (seen: ``_weight_int8pack_mm``, torch 2.13).
    """
    if tensor.is_contiguous() and tensor.data_ptr() % 64 == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def finish(y: Tensor, x: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None) -> Tensor:
    """The kernel's own fresh y (M, N) plus the bias, as ``dtype`` (y's if None), in x's shape (..., N)."""
    if bias is not None:
        y = y.add_(bias)
    if dtype is not None and y.dtype != dtype:
        y = y.to(dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def time_us(nbytes: float, gbs: float, operations: float = 0.0, tera: float = 1.0, fixed_us: float = 0.0) -> float:
    """The larger of bytes over GB/s and operations over 1e12/s, plus a fixed cost; all in microseconds."""
    return fixed_us + max(nbytes / gbs * 1e-3, operations / tera * 1e-6)


def cpu_gemm_flops(problem: Problem) -> float:
    """fp32 operations a CPU's GEMM is as long at: 2 to 11 rows cost it about as much as 12 (docs/measured.md)."""
    rows = problem.m if problem.m <= 1 or problem.m >= 12 else 12
    return 2.0 * rows * problem.n * problem.k if problem.m > 1 else 0.0


def torch_fp32_us(problem: Problem, device: Device) -> float:
    """About what ``F.linear`` takes on a CPU for an fp32 weight that comes from memory (docs/cpu.md).

    One row goes at half the memory's speed; with more the weight is read at a third of it before the products start.
    """
    if problem.m == 1:
        return time_us(problem.bytes_moved, 0.55 * device.read_gbs, fixed_us=3.0)
    products = time_us(0, 1, problem.flops, 1.4 * device.tflops32)
    return products + time_us(problem.bytes_moved, 0.3 * device.read_gbs, fixed_us=3.0)
