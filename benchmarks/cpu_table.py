"""The CPU benchmark's file as ratios: geometric means over the shapes, what is wanted of them, and where torch wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ratios import Comparison, Times, ratios, times_of
from vecmat.measure import geometric_mean

COLUMNS = {"1": (1,), "2": (2,), "4": (4,), "8": (8,), "16": (16,), "32": (32,), "128, 512": (128, 512)}
GGML4 = ("ggml Q4_0", "ggml Q4_0 repacked", "ggml Q4_K", "ggml Q4_K repacked")
GGML8 = ("ggml Q8_0", "ggml Q8_0 repacked")
TOLERATED = 1.05  # slower than torch's best way by more is told
LARGE = 16e6  # bytes of a weight that must come at the memory's speed
WANTED_SHARE = 0.93


def _wanted(*least: float) -> dict[str, float]:
    return dict(zip(("1", "4", "16", "128, 512"), least, strict=True))


COMPARISONS = [
    Comparison(label="int8 / ggml Q8_0", group="int8", ours="vecmat int8", peers=GGML8,
               wanted=_wanted(1.25, 2.1, 2.4, 2.6)),
    Comparison(label="int8 / torch int8pack", group="int8", ours="vecmat int8", peers=("torch int8pack",)),
    Comparison(label="int8 compute / ggml Q8_0", group="int8", ours="vecmat int8 compute", peers=GGML8,
               wanted=_wanted(1.25, 2.8, 3.9, 5.0)),
    Comparison(label="int8 compute / oneDNN qlinear", group="int8", ours="vecmat int8 compute",
               peers=("torch qlinear",), wanted=_wanted(1.7, 1.5, 1.2, 1.0)),
    Comparison(label="int4 / ggml's best", group="int4", ours="vecmat int4", peers=GGML4,
               wanted=_wanted(1.1, 1.6, 1.45, 1.1)),
    Comparison(label="int4 / torch int4pack", group="int4", ours="vecmat int4", peers=("torch int4pack",)),
    Comparison(label="int4 compute / best of ggml, onnxruntime", group="int4", ours="vecmat int4 compute",
               peers=(*GGML4, "onnxruntime MatMulNBits"), wanted=_wanted(1.15, 1.5, 1.6, 1.5)),
    Comparison(label="bf16 / F.linear", group="bf16", ours="vecmat bf16", peers=("torch bf16",),
               wanted=_wanted(1.8, 1.5, 1.25, 1.1)),
    Comparison(label="bf16 / ggml BF16", group="bf16", ours="vecmat bf16", peers=("ggml BF16",),
               wanted=_wanted(1.0, 1.0, 1.05, 1.0)),
    Comparison(label="fp32 / F.linear", group="fp32", ours="vecmat fp32", peers=("torch fp32",),
               wanted=_wanted(1.9, 3.0, 2.4, 1.4)),
    Comparison(label="fp32 / ggml F32", group="fp32", ours="vecmat fp32", peers=("ggml F32",),
               wanted=_wanted(1.0, 1.0, 1.0, 1.0)),
    Comparison(label="fp16 / F.linear", group="fp16", ours="vecmat fp16", peers=("torch fp16",),
               wanted=_wanted(1.0, 4.0, 6.0, 8.0)),
    Comparison(label="fp16 / ggml F16", group="fp16", ours="vecmat fp16", peers=("ggml F16",)),
]  # fmt: skip

# torch's ways to the same result: what nobody should lose to. qlinear is given x as bytes, with one scale for all rows.
TORCH = {
    "vecmat int8": ("torch int8pack", "torch bf16"),
    "vecmat int8 compute": ("torch int8pack", "torch bf16", "torch qlinear"),
    "vecmat int4": ("torch int4pack", "torch bf16"),
    "vecmat int4 compute": ("torch int4pack", "torch bf16"),
    "vecmat bf16": ("torch bf16",),
    "vecmat fp32": ("torch fp32",),
    "vecmat fp16": ("torch fp16",),
}


def line(row: Mapping[str, Any]) -> str:
    """One row of the file for the screen."""
    return (
        f"{row['group']:<5}{row['k']:>6} x{row['n']:>6}  M={row['m']:<4}{row['contender']:<25}{row['us']:>11,.1f} us"
        f"  {row['share']:>6.0%} of its floor ({row['floor_is']}, {row['floor_us']:,.1f})"
        f"  probe {row['probe_gbs']:.1f} GB/s  {row['kernel']}"
    ).rstrip()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of all ratios that the rows allow: above 1, vecmat is faster. The wanted ratio stands in brackets."""
    times = times_of(rows)
    lines = ratios(COMPARISONS, COLUMNS, times)
    return "\n".join([*lines, "", *_floors(rows), *_shares(rows), *_losses(times)])


def _floors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = []
    for name in TORCH:
        found = [row for row in rows if row["contender"] == name]
        entries = []
        for ms in COLUMNS.values():
            shares = [float(row["share"]) for row in found if int(row["m"]) in ms]
            entries.append(f"{geometric_mean(shares):.0%} ({min(shares):.0%})" if shares else "-")
        lines.append(f"{name:<42}" + "".join(f"{entry:>16}" for entry in entries))
    return ["the floor's share of vecmat's time: geometric mean (least)", *lines, ""]


def _shares(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"  {row['contender']:<22}{row['k']:>6} x{row['n']:>6}  {float(row['share']):.0%} of the read probe"
        f"{'' if float(row['share']) >= WANTED_SHARE else '  !'}"
        for row in rows
        if row["group"] in ("int8", "int4") and row["contender"].startswith("vecmat") and int(row["m"]) == 1
        and float(row["weight_bytes"]) >= LARGE
    ]  # fmt: skip
    head = f"one row, weights of {LARGE / 1e6:.0f} MB and more (wanted {WANTED_SHARE:.0%})"
    return [head, *(lines or ["  none measured"]), ""]


def _losses(times: Times) -> list[str]:
    lines, cells = [], 0
    for (group, m, n, k), found in times.items():
        for ours, torchs in TORCH.items():
            ways = {peer: found[peer] for peer in torchs if peer in found}
            if ours not in found or not ways:
                continue
            cells += 1
            best = min(ways, key=lambda peer: ways[peer])
            if found[ours] > TOLERATED * ways[best]:
                lines.append((found[ours] / ways[best], f"{ours:<22}{k:>6} x{n:>6}  M={m:<4} {best} ({group})"))
    head = f"slower than torch's best way by more than {TOLERATED - 1:.0%}: {len(lines)} of {cells} cells"
    return [head, *(f"  {ratio:5.2f} x its time  {text}" for ratio, text in sorted(lines, reverse=True))]
