"""A benchmark's file as ratios: one line for ours against the best of some peers, a column for each number of rows."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vecmat.measure import geometric_mean

Cell = tuple[str, int, int, int]  # group, m, n, k
Times = Mapping[Cell, Mapping[str, float]]
Columns = Mapping[str, Sequence[int]]  # what stands above a column, and which M are in it


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One line: ours against the best of some peers. wanted: the least ratio, by column."""

    label: str
    group: str
    ours: str
    peers: Sequence[str]
    wanted: Mapping[str, float] = dataclasses.field(default_factory=dict)


def read(file: Path) -> list[dict[str, str]]:
    """The file's rows, the last of each cell and contender."""
    with file.open(newline="", encoding="utf-8") as lines:
        rows = {(r["group"], r["contender"], r["m"], r["n"], r["k"]): r for r in csv.DictReader(lines)}
    return list(rows.values())


def times_of(rows: Sequence[Mapping[str, Any]]) -> dict[Cell, dict[str, float]]:
    """Each cell's times in us, by contender."""
    times: dict[Cell, dict[str, float]] = {}
    for row in rows:
        cell = (row["group"], int(row["m"]), int(row["n"]), int(row["k"]))
        times.setdefault(cell, {})[row["contender"]] = float(row["us"])
    return times


def ratios(comparisons: Sequence[Comparison], columns: Columns, times: Times) -> list[str]:
    """The lines of all comparisons: above 1, vecmat is faster. The wanted ratio stands in brackets."""
    shapes = {(n, k) for _, _, n, k in times}
    lines = [f"\ngeometric means over {len(shapes)} shapes: peer's time / vecmat's (wanted; ! where it is less)\n"]
    lines += [f"{'M =':<42}" + "".join(f"{column:>16}" for column in columns)]
    for comparison in comparisons:
        entries = (_entry(comparison, column, columns[column], times) for column in columns)
        lines.append(f"{comparison.label:<42}" + "".join(entries))
    return lines


def _entry(comparison: Comparison, column: str, ms: Sequence[int], times: Times) -> str:
    found = []
    for (group, m, _, _), by_name in times.items():
        peers = [by_name[peer] for peer in comparison.peers if peer in by_name]
        if group == comparison.group and m in ms and comparison.ours in by_name and peers:
            found.append(min(peers) / by_name[comparison.ours])
    if not found:
        return f"{'-':>16}"
    ratio, target = geometric_mean(found), comparison.wanted.get(column)
    wanted = "" if target is None else f" ({target:.2f}{'!' if ratio < target else ''})"
    return f"{ratio:.2f}{wanted}".rjust(16)
