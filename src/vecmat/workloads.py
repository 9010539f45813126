"""Named workloads: shapes of models' linear layers and the M they meet, shared by tune, bench and tests."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Iterator
from importlib import resources

from .problem import DTYPES, Problem
from .weights import resolve_format


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Shapes (N, K) and the numbers of rows of x."""

    shapes: tuple[tuple[int, int], ...]
    m: tuple[int, ...]


@functools.lru_cache(maxsize=1)
def known() -> dict[str, Workload]:
    """Every named workload of the package."""
    text = (resources.files(__package__) / "tables" / "workloads.json").read_text(encoding="utf-8")
    return {
        name: Workload(tuple((n, k) for n, k in value["shapes"]), tuple(value["m"]))
        for name, value in json.loads(text).items()
    }


def named(name: str) -> Workload:
    """The workload of a name. Raises ``ValueError`` listing the names."""
    if name not in known():
        raise ValueError(f"workload {name!r} is not known; known are {', '.join(known())}")
    return known()[name]


def problems(
    shapes: Iterable[tuple[int, int]], ms: Iterable[int], weights: str, x: str | None = None
) -> Iterator[Problem]:
    """The Problem of every shape (N, K) and M, weights in a format; int4 without a group size takes each K's own.

    x: its dtype's name; a dense format's own, else bf16, if None.
    """
    ms = tuple(ms)
    for n, k in shapes:
        fmt = resolve_format(weights, k)
        dtype = x or (fmt.name if fmt.name in DTYPES else "bf16")
        for m in ms:
            yield Problem(m=m, n=n, k=k, x=dtype, weight=fmt, out=dtype)
