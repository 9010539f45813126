"""Benchmarks: what ``matmul`` would run, its peers and the memory's roof, timed side by side."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import table
from .bench import Sampler, copies_needed, medians, read_probe
from .device import Device
from .dispatch import Plan, candidates, choose
from .problem import DTYPES, Problem
from .ready import as_called
from .weights import Weight, quantize

ROUNDS = 15


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One problem's times in microseconds a call, medians of interleaved rounds.

    kernel, decided_by: what ``matmul`` runs and why. us: its time. peers: each peer's time, None where it cannot run.
    floor_us: the bytes that must move over the read bandwidth measured in the same rounds. roof_gbs: that bandwidth.
    """

    problem: Problem
    kernel: str
    decided_by: str
    us: float
    peers: dict[str, float | None]
    floor_us: float
    roof_gbs: float

    @property
    def share(self) -> float:
        """The share of the memory's roof that ``matmul`` reached."""
        return self.floor_us / self.us


def measure(problem: Problem, device: Device, peers: Sequence[str] = ("torch",)) -> Measured:
    """The Measured of a problem on a device that is here; weights come from memory, by rotation.

    peers: "torch" is ``F.linear`` on a dense weight of x's dtype, whatever the format; the rest are kernels' names.
    Raises ``ValueError`` for a peer that is neither.
    """
    generator = torch.Generator(device=device.place).manual_seed(0)
    x = torch.randn(problem.m, problem.k, device=device.place, generator=generator).to(DTYPES[problem.x])
    dense = torch.randn(problem.n, problem.k, device=device.place, generator=generator) / math.sqrt(problem.k)
    plan = choose(problem, device)
    weights = _copies(quantize(dense, str(problem.weight)), copies_needed(device, problem.weight_bytes))
    contenders = {"vecmat": Sampler(device, _calls(plan, x, weights))}
    for peer in peers:
        sampler = _peer(peer, problem, device, x, dense, weights)
        if sampler is not None:
            contenders[peer] = sampler
    probe, probe_bytes = read_probe(device)
    with torch.inference_mode():
        *times, probe_us = medians([*contenders.values(), probe], ROUNDS)
    us = dict(zip(contenders, times, strict=True))
    roof = probe_bytes / probe_us * 1e-3
    return Measured(
        problem=problem,
        kernel=plan.kernel.name,
        decided_by=plan.decided_by,
        us=us["vecmat"],
        peers={peer: us.get(peer) for peer in peers},
        floor_us=problem.bytes_moved / roof * 1e-3,
        roof_gbs=roof,
    )


def _calls(plan: Plan, x: Tensor, weights: Sequence[Weight]) -> list[Callable[[], Tensor]]:
    compute = plan.problem.compute or None
    return [as_called(plan.ready, plan.run, x, weight, plan.operand(weight), None, compute) for weight in weights]


def _copies(weight: Weight, count: int) -> list[Weight]:
    return [weight, *(weight.copy() for _ in range(count - 1))]


def _peer(
    name: str, problem: Problem, device: Device, x: Tensor, dense: Tensor, weights: Sequence[Weight]
) -> Sampler | None:
    if name == "torch":
        own = dense.to(x.dtype)
        count = copies_needed(device, own.nbytes)
        copies = own, *(own.clone() for _ in range(count - 1))
        return Sampler(device, [functools.partial(F.linear, x, copy) for copy in copies])
    answers = {c.kernel: c for c in candidates(problem, device)}
    if name not in answers:
        raise ValueError(f"peer {name!r} is not known; known are torch, {', '.join(sorted(answers))}")
    if answers[name].reason is not None:
        return None
    plan = choose(problem, device, kernel=name)
    return Sampler(device, _calls(plan, x, weights))


def geometric_mean(values: Iterable[float]) -> float:
    """The geometric mean of positive numbers; NaN of none."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def records(results: Sequence[Measured], device: Device) -> list[dict[str, Any]]:
    """The results as plain values, a row each, with device, versions and date beside every one."""
    stamp = {
        "date": datetime.date.today().isoformat(),
        "device": device.name,
        **{f"{name}_version": version for name, version in table.versions().items()},
    }
    return [
        {
            **stamp,
            "m": r.problem.m, "n": r.problem.n, "k": r.problem.k, "x": r.problem.x, "weights": str(r.problem.weight),
            "kernel": r.kernel, "us": round(r.us, 2),
            **{f"{peer}_us": None if us is None else round(us, 2) for peer, us in r.peers.items()},
            "floor_us": round(r.floor_us, 2), "roof_gbs": round(r.roof_gbs, 1), "share": round(r.share, 3),
        }
        for r in results
    ]  # fmt: skip


def append_csv(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Append rows to a CSV file; a new file gets a header. Raises ``ValueError`` if its header names other columns."""
    columns = list(rows[0])
    new = not file.exists() or file.stat().st_size == 0
    if not new:
        with file.open(newline="", encoding="utf-8") as have:
            header = next(csv.reader(have), [])
        if header != columns:
            raise ValueError(f"{file} has other columns than this run's; append to a new file")
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def check_plot(name: str) -> None:
    """Raise ``ValueError`` where a picture of this file name cannot be drawn: no matplotlib, or a suffix it has not."""
    kinds = _figure_class()().canvas.get_supported_filetypes()
    if Path(name).suffix[1:].lower() not in kinds:
        raise ValueError(f"bench: --plot {name} names no kind of picture; expected .png, .svg, .pdf or the like")


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("bench: --plot needs matplotlib; pip install 'vecmat[plot]'") from error
    return Figure


def figure(results: Sequence[Measured], device: Device) -> Any:
    """matplotlib's Figure of time against M, and of the share of the memory's roof, a line per shape and format.

    The first peer's times are dotted, where it can run. Needs matplotlib ('vecmat[plot]').
    """
    drawn = _figure_class()(figsize=(11, 4.5), layout="constrained")
    times, shares = drawn.subplots(1, 2)
    formats = list(dict.fromkeys(str(r.problem.weight) for r in results))
    peer = next(iter(results[0].peers), None)
    dotted = False
    for n, k, weight in dict.fromkeys((r.problem.n, r.problem.k, r.problem.weight) for r in results):
        own = [r for r in results if (r.problem.n, r.problem.k, r.problem.weight) == (n, k, weight)]
        own.sort(key=lambda r: r.problem.m)
        ms = [r.problem.m for r in own]
        label = f"{n} x {k} {weight}" if len(formats) > 1 else f"{n} x {k}"
        (line,) = times.plot(ms, [r.us for r in own], marker="o", label=label)
        if peer is not None and all(r.peers[peer] is not None for r in own):
            times.plot(ms, [r.peers[peer] for r in own], linestyle=":", color=line.get_color())
            dotted = True
        shares.plot(ms, [100 * r.share for r in own], marker="o", color=line.get_color())
    ms = sorted({r.problem.m for r in results})
    for axes in (times, shares):
        axes.set_xscale("log")
        axes.set_xticks(ms, [str(m) for m in ms])
        axes.set_xticks([], minor=True)
    times.set(yscale="log", xlabel="M", ylabel="us a call")
    times.set_title(f"vecmat, and {peer} dotted" if dotted else "vecmat", fontsize=10)
    times.legend(title="N x K", fontsize=8)
    shares.set(xlabel="M", ylabel="% of the read bandwidth of the run", ylim=(0, None))
    drawn.suptitle(f"{', '.join(formats)} weights, {results[0].problem.x} x, {device.name}", fontsize=11)
    return drawn


def plot(file: Path, results: Sequence[Measured], device: Device) -> None:
    """Draw the ``figure`` of results into a file. Raises ``OSError`` where it cannot be written."""
    figure(results, device).savefig(file, dpi=120)
