"""What the benchmarks time: a weight as each contender stores it, copies of it, and calls that multiply by them."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

import vecmat

Call = Callable[[], object]
Rate = Literal["fp32", "bf16", "int8"]


class Absent(Exception):
    """Why a contender cannot take part: a package that is not installed, a shape it does not have, a wrong result."""


# What a peer may raise where it cannot take part: the reason is told, and the others go on.
FAILURES = (Absent, AssertionError, AttributeError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)


def reason(failure: BaseException) -> str:
    """The first line of what was raised, with its kind where a peer did not mean it as an answer."""
    line = (str(failure).splitlines() or [""])[0]
    return line if isinstance(failure, Absent) else f"{type(failure).__name__}: {line}"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calls:
    """A contender ready for some rows of x: a call for each copy of its weight, and what the first and last gave.

    result: copy's index -> that call's y, (M, N), any float dtype. kernel: what runs, where there is a choice. spins_s:
    how long its threads go on spinning after a call, which would take a core from whoever is next.
    """

    calls: Sequence[Call]
    result: Callable[[int], Tensor]
    kernel: str = ""
    spins_s: float = 0.03


class Contender(Protocol):
    """A way to multiply by a weight that it has stored in its own format.

    weight_bytes: of one copy, as it must be read. rate, times: what its multiplications are made of, and how many of
    those one product takes, for the floor. tolerance: the RMS error against the weight in float64, over the RMS of y,
    that its format may have: coarse, to catch a peer that is driven wrongly.
    """

    weight_bytes: int
    rate: Rate
    times: int
    tolerance: float

    def rows(self, x: Tensor) -> Calls:
        """Calls for x (M, K), fp32 whose values are bf16's."""

    def close(self) -> None:
        """Free what Python does not."""


@dataclasses.dataclass(slots=True)
class Material:
    """What every contender is made of. w: (N, K), fp32. pool_bytes: copies rotate until they are this large."""

    w: Tensor
    pool_bytes: int
    threads: int
    kernels: dict[str, str]  # vecmat's contender: the kernel to force
    weights: dict[str, list[vecmat.Weight]] = dataclasses.field(default_factory=dict)
    truths: dict[tuple[int, int], Tensor] = dataclasses.field(
        default_factory=dict
    )  # by rows of x, and how many of them

    @staticmethod
    def make(n: int, k: int, pool_bytes: int, threads: int, kernels: dict[str, str], device: str = "cpu") -> Material:
        """A random weight (n, k) whose products with normal numbers are about 1."""
        generator = torch.Generator(device).manual_seed(n * 31 + k)
        w = torch.randn(n, k, generator=generator, device=device) / math.sqrt(k)
        return Material(w, pool_bytes, threads, kernels)

    @property
    def n(self) -> int:
        return self.w.shape[0]

    @property
    def k(self) -> int:
        return self.w.shape[1]

    def copies(self, nbytes: int) -> int:
        """How many copies of so many bytes fill the pool; two at least."""
        return max(2, -(-self.pool_bytes // nbytes))

    def quantised(self, fmt: str) -> list[vecmat.Weight]:
        """Copies of the weight as a vecmat.Weight: made once for all contenders that use the format."""
        if fmt not in self.weights:
            weight = vecmat.quantize(self.w, fmt)
            count = self.copies(weight.format.nbytes(self.n, self.k))
            self.weights[fmt] = [weight, *(weight.copy() for _ in range(count - 1))]
        return self.weights[fmt]

    def activations(self, m: int) -> Tensor:
        """x (m, K), fp32 with values of bf16, so that contenders of either type are given the same numbers."""
        generator = torch.Generator(self.w.device).manual_seed(m)
        return torch.randn(m, self.k, generator=generator, device=self.w.device).bfloat16().float()

    def truth(self, x: Tensor, some: Sequence[int]) -> Tensor:
        """Some rows of ``activations``' product with the weight, in float64."""
        key = (x.shape[0], len(some))
        if key not in self.truths:
            self.truths[key] = x[list(some)].double() @ self.w.double().t()
        return self.truths[key]


Build = Callable[[Material], Contender]


def error(material: Material, x: Tensor, y: Tensor, rows: int = 8) -> float:
    """The RMS of y minus the float64 truth over the truth's own, of the first and last ``rows`` rows.

    x: ``material.activations`` of as many rows. Raises ``Absent`` for a y of another shape.
    """
    if y.shape != (x.shape[0], material.n):
        raise Absent(f"its result has shape {tuple(y.shape)}; expected {(x.shape[0], material.n)}")
    some = sorted({*range(min(rows, x.shape[0])), *range(max(0, x.shape[0] - rows), x.shape[0])})
    truth = material.truth(x, some)
    return float((y[some].double() - truth).square().mean().sqrt() / truth.square().mean().sqrt())


def checked(contender: Contender, material: Material, x: Tensor) -> Calls:
    """The contender's calls for x, after its first and its last copy gave the right result; ``Absent`` if not."""
    calls = contender.rows(x)
    for index in (0, len(calls.calls) - 1):
        found = error(material, x, calls.result(index).float())
        if not found <= contender.tolerance:
            raise Absent(f"its result is wrong: RMS error {found:.3g}; expected {contender.tolerance:g} at most")
    return calls


def chosen(parser: argparse.ArgumentParser, only: str, groups: Mapping[str, Iterable[str]],
           others: Iterable[str] = ()) -> dict[str, list[str]]:  # fmt: skip
    """The groups, and in them the contenders, that ``only`` names, with commas; all if it is empty.

    others: more names that must be known. An unknown one ends the program.
    """
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    contenders = [name for names in groups.values() for name in names]
    unknown = [name for name in (*wanted, *others) if name not in groups and name not in contenders]
    if unknown:
        known = ", ".join((*groups, *dict.fromkeys(contenders)))
        parser.error(f"{', '.join(unknown)}: neither group nor contender; known are {known}")
    kept = {
        group: [name for name in names if not wanted or group in wanted or name in wanted]
        for group, names in groups.items()
    }
    return {group: names for group, names in kept.items() if names}
