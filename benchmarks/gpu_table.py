"""The GPU benchmark's file as ratios: geometric means over the shapes, what is wanted of them, shares of the roof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ratios import Comparison, Times, ratios, times_of

COLUMNS = {"1": (1,), "2..16": (2, 4, 8, 16), "2": (2,), "4": (4,), "8": (8,), "16": (16,), "32, 64": (32, 64),
           "32": (32,), "64": (64,)}  # fmt: skip
LARGE = 32e6  # bytes of a weight that must come at the memory's speed
WANTED_SHARE = {"vecmat bf16": 0.95, "vecmat int8": 0.85, "vecmat fp8": 0.85, "vecmat int4": 0.70}
LEAST_DENSE = 0.98  # of F.linear's speed, in any cell


def _wanted(*least: float) -> dict[str, float]:
    return dict(zip(("1", "2..16", "32, 64"), least, strict=True))


def _line(label: str, ours: str, peer: str, *least: float) -> Comparison:
    return Comparison(label=label, group="bf16 x", ours=ours, peers=(peer,), wanted=_wanted(*least))


COMPARISONS = [
    _line("bf16 / F.linear", "vecmat bf16", "torch bf16", 1.25, 1.15, 1.0),
    _line("int8 / F.linear bf16", "vecmat int8", "torch bf16", 2.0, 1.8, 1.4),
    _line("int8 / Humming W8A16", "vecmat int8", "Humming W8A16", 1.5, 1.35, 1.1),
    _line("fp8 / Humming W8A16 fp8", "vecmat fp8", "Humming W8A16 fp8", 1.5, 1.3, 1.1),
    _line("int4 / F.linear bf16", "vecmat int4", "torch bf16", 3.0, 2.7, 1.9),
    _line("int4 / Humming W4A16", "vecmat int4", "Humming W4A16", 1.35, 1.2, 1.05),
    _line("int8 / GemLite int8", "vecmat int8", "GemLite int8", 1.2, 1.4, 1.2),
    _line("int4 / GemLite int4", "vecmat int4", "GemLite int4", 1.2, 1.4, 1.2),
    Comparison(label="fp16 / F.linear, 4096x4096", group="fp16 x", ours="vecmat fp16", peers=("torch fp16",)),
    Comparison(label="fp16 / DeepSpeed's Triton, 4096x4096", group="fp16 x", ours="vecmat fp16",
               peers=("DeepSpeed Triton",), wanted={"1": 4.0}),
]  # fmt: skip


def line(row: Mapping[str, Any]) -> str:
    """One row of the file for the screen."""
    return (
        f"{row['k']:>6} x{row['n']:>7}  M={row['m']:<3}{row['contender']:<18}{row['us']:>9,.2f} us"
        f"  {row['share']:>5.0%} of the probe's {row['probe_gbs']:,.0f} GB/s  {row['kernel']}"
    ).rstrip()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of all ratios that the rows allow, the large weights' shares of the read probe, and lost dense cells."""
    times = times_of(rows)
    return "\n".join([*ratios(COMPARISONS, COLUMNS, times), "", *_shares(rows), "", *_losses(times)])


def _shares(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"  {row['contender']:<14}{row['k']:>6} x{row['n']:>7}  {float(row['share']):.0%}"
        f"{'' if float(row['share']) >= WANTED_SHARE[row['contender']] else '  !'}"
        for row in rows
        if row["contender"] in WANTED_SHARE and int(row["m"]) == 1 and float(row["weight_bytes"]) >= LARGE
    ]
    wanted = ", ".join(f"{name[7:]} {share:.0%}" for name, share in WANTED_SHARE.items())
    head = f"one row, weights of {LARGE / 1e6:.0f} MB and more: share of the read probe (wanted {wanted})"
    return [head, *(lines or ["  none measured"])]


def _losses(times: Times) -> list[str]:
    lines, cells = [], 0
    for (group, m, n, k), found in times.items():
        if "vecmat bf16" in found and "torch bf16" in found:
            cells += 1
            ratio = found["torch bf16"] / found["vecmat bf16"]
            if ratio < LEAST_DENSE:
                lines.append((ratio, f"{k:>6} x{n:>7}  M={m:<4}({group})"))
    head = f"dense cells under {LEAST_DENSE} of F.linear: {len(lines)} of {cells}"
    return [head, *(f"  {ratio:.2f}  {text}" for ratio, text in sorted(lines))]
