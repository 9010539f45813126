"""The problems that the suite puts to every kernel: formats, shapes, numbers that are hard, memory that is hostile."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import vecmat
from vecmat.device import Device
from vecmat.kernels import registry
from vecmat.ops import bind_problem
from vecmat.problem import DTYPES, Format, Problem
from vecmat.settings import forget_plans

if TYPE_CHECKING:
    import pytest

DENSE = ("fp32", "bf16", "fp16")
FORMATS = (
    *DENSE, "int8", "int8:g32", "int8:g64", "int8:g128", "int4:g32", "int4:g64", "int4:g128",
    "int4:g32:zp", "int4:g64:zp", "int4:g128:zp", "fp8", "fp8:g128",
)  # fmt: skip
ROWS = (0, 1, 2, 3, 7, 8, 16, 17, 64, 129)
# (N, K): ones, odd numbers, what each torch kernel asks for (multiples of 16, of 128), more than one block of each.
SHAPES = ((1, 1), (3, 5), (16, 32), (17, 33), (64, 128), (33, 250), (80, 160), (129, 257), (256, 384))
WIDE = (1077, 1001)  # more weight than the fallback widens at a time on a CPU
# In Triton's interpreter a launch takes milliseconds: fewer problems, small ones.
FEW_ROWS = (0, 1, 3, 8, 17, 64)
FEW_SHAPES = ((3, 5), (17, 33), (64, 128), (129, 257))

KERNELS = sorted(registry()[0])


def here(device: str) -> Device:
    """The Device value of a torch device."""
    return Device.of(torch.device(device))


def interpreted(kernel: str, device: str) -> bool:
    """Whether a kernel runs in Triton's interpreter."""
    return kernel.startswith("triton_") and here(device).interpreted


def only(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Only these kernels and the fallback can run anything, so that the sizes here, which are small, choose them."""
    for name, kernel in registry()[0].items():
        own = name in (*names, "fallback")
        rejects = type(kernel).rejects.__get__(kernel) if own else lambda problem, device: "this test wants another"
        monkeypatch.setattr(kernel, "rejects", rejects)
    forget_plans()


def generator(*words: object) -> torch.Generator:
    """A random generator that depends on the words only."""
    return torch.Generator().manual_seed(zlib.crc32(repr(words).encode()))


HARD = ("large", "cancelling", "tiny x", "tiny w", "outlier", "zero")
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # of one rounding of the result


def numbers(kind: str, m: int, n: int, k: int, x: str, seed: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """x (m, k), w (n, k) and bias (n,) in fp32, of a kind that fits x's dtype once it is cast to it."""
    rng = generator(kind, m, n, k, seed)
    a, w = torch.randn(m, k, generator=rng), torch.randn(n, k, generator=rng) * 0.1
    bias = torch.randn(n, generator=rng)
    far = 10 if x == "fp16" else 60  # powers of two that still fit x's dtype
    if kind == "large":
        a, w = a * 2.0**far, w * (2.0 ** -(far - 4))
    elif kind == "cancelling":
        half = k // 2
        a[:, half : 2 * half] = a[:, :half]
        w[:, half : 2 * half] = -w[:, :half]
        bias *= 1e-3
    elif kind == "tiny x":  # subnormal in x's dtype; the result is not
        a, w, bias = a * (2.0**-19 if x == "fp16" else 2.0**-128), w * 2.0**8, torch.zeros(n)
    elif kind == "tiny w":
        a, w, bias = a * 2.0**8, w * (2.0**-15 if x == "fp16" else 2.0**-124), torch.zeros(n)
    elif kind == "outlier":
        a[:, k // 2] *= 500
        w[n // 2, k // 3] *= 100
    elif kind == "zero":
        a[: m // 2] = 0
        w[: n // 2] = 0
    else:
        assert kind == "plain", kind
    return a, w, bias


def far(y: Tensor, exact: Tensor) -> float:
    """The relative error of y against a float64 product."""
    assert y.shape == exact.shape
    return float((y.double().cpu() - exact).norm() / exact.norm())


def guarded(tensor: Tensor, offset: int = 0) -> Tensor:
    """The same values in memory with poison (NaN, or the largest integer) on both sides; ``offset`` elements in."""
    pad = 512 // tensor.dtype.itemsize
    size = tensor.numel()
    buffer = torch.empty(size + 2 * pad + offset, dtype=tensor.dtype, device=tensor.device)
    if tensor.dtype == torch.float8_e4m3fn:
        buffer.view(torch.uint8).fill_(127)
    elif tensor.is_floating_point():
        buffer.fill_(torch.nan)
    else:
        buffer.fill_(torch.iinfo(tensor.dtype).max)
    inside = buffer[pad + offset : pad + offset + size].view(tensor.shape)
    inside.copy_(tensor)
    return inside


def stored(w: Tensor, fmt: str, layout: str, device: str, *, as_weight: bool = True) -> Tensor | vecmat.Weight:
    """w (n, k) as a Weight in a format (or as the dense tensor itself), its tensors guarded, on the device."""
    w = (w.t() if layout == "kn" else w).contiguous().to(device)
    if not as_weight:
        return guarded(w.to(DTYPES[fmt]))
    weight = vecmat.quantize(w, fmt, layout=layout)
    parts = [None if part is None else guarded(part) for part in (weight.data, weight.scale, weight.zero)]
    return vecmat.Weight(weight.format, *parts, k=weight.k, layout=layout)


@contextlib.contextmanager
def poisoned(m: int, n: int, dtype: torch.dtype, device: str) -> Iterator[None]:
    """Memory that torch hands out in here, and the block that y (m, n) would be given, is full of NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then fills (fill_uninitialized_memory)
    try:
        for size in ((m, n), (n, m)):  # and what does not come through torch.empty: freed memory of the same size
            del_me = torch.full(size, torch.nan, dtype=dtype, device=device)
            del del_me
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def computes(fmt: str) -> tuple[str | None, ...]:
    """The values of ``compute`` that a format allows."""
    if fmt.startswith(("int8", "int4")):
        return None, "int8"
    return (None, "fp8") if fmt == "fp8" else (None,)


def asked(m: int, n: int, k: int, x: str, fmt: str, **options: object) -> Problem:
    """The Problem of these sizes; the result in x's dtype unless ``out`` says otherwise."""
    weight = Format.parse(fmt)
    layout = options.pop("layout", "nk") if weight.dense else "nk"  # a quantised weight is stored one way
    options.pop("layout", None)
    compute = options.pop("compute", None) or ""
    return Problem(m=m, n=n, k=k, x=x, weight=weight, layout=layout, compute=compute, **{"out": x, **options})  # type: ignore[arg-type]


def refusal(kernel: str, problem: Problem, device: str) -> str | None:
    """None if the kernel can run the problem here, else its reason, which must be a sentence."""
    reason = registry()[0][kernel].rejects(problem, here(device))
    if reason is not None:
        assert isinstance(reason, str), reason
        assert len(reason.split()) >= 3, f"{kernel} gives {reason!r}; expected a sentence"
        assert not reason.endswith("."), f"{kernel} gives {reason!r}; expected no full stop"
    return reason


def refuses(kernel: str, x: Tensor, weight: Tensor | vecmat.Weight, bias: Tensor | None, **options: object) -> bool:
    """Whether the kernel cannot run these arguments of ``matmul``."""
    problem, _ = bind_problem(x, weight, bias, **options)  # type: ignore[arg-type]
    return refusal(kernel, problem, x.device.type) is not None
