"""vecmat's GPU kernels beside their peers: ``python benchmarks/gpu.py``.

vecmat as it is installed, its shipped tables and no tuning, beside ``F.linear``, Humming, GemLite and DeepSpeed's own
Triton path, in one process. A contender's calls are one CUDA graph over copies of its weight, which rotate so that
they come from memory; contenders take turns, a read probe with them. Each result is compared with float64 before it is
timed.

    python benchmarks/gpu.py --shapes 4096x4096 --m 1,16                # one shape
    python benchmarks/gpu.py --only 'vecmat int4,torch bf16'            # some contenders
    python benchmarks/gpu.py --shapes 14336x4096 --append               # a whole run in pieces, into one file
    python benchmarks/gpu.py --table                                    # the ratios of the file, nothing is run

Shapes are K x N, as in x (M, K) @ weight (K, N). Rows go to ``benchmarks/results/gpu.csv``: a contender's median time
(us a call), its floor (the bytes it must move over the probe), and what was measured with which versions.

The peers beside torch are optional, and those that cannot run are listed with the reason: ``pip install
humming-kernels gemlite deepspeed``. What Humming compiles is compiled first, on all cores. GemLite tunes each new
shape and M for seconds (``--gemlite max`` for longer) until ``--gemlite-s`` are spent; DeepSpeed's path is run at
4096x4096 and one row.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import gpu_table
import peers_gpu_deepspeed
import peers_gpu_gemlite
import peers_gpu_humming
import peers_torch
import peers_vecmat
import ratios
import vecmat
from contender import FAILURES, Absent, Build, Calls, Contender, Material, checked, chosen, reason
from vecmat.bench import Sampler, medians, read_probe
from vecmat.device import Device
from vecmat.measure import append_csv

SHAPES = ("4096x4096,4096x6144,4096x28672,14336x4096,8192x8192,8192x10240,8192x57344,28672x8192,1024x4096,4096x1024,"
          "768x3072,896x4864,4096x128256")  # fmt: skip
ROWS = "1,2,4,8,16,32,64"
FILE = Path(__file__).parent / "results" / "gpu.csv"

CONTENDERS: dict[str, Build] = {
    **{name: peers_vecmat.CONTENDERS[name] for name in ("vecmat int8", "vecmat fp8", "vecmat int4", "vecmat bf16",
                                                        "vecmat fp16")},
    **{name: peers_torch.CONTENDERS[name] for name in ("torch bf16", "torch fp16")},
    **peers_gpu_humming.CONTENDERS,
    **peers_gpu_gemlite.CONTENDERS,
    **peers_gpu_deepspeed.CONTENDERS,
}  # fmt: skip
# Those that take turns with each other, and where else than everywhere.
GROUPS = {
    "bf16 x": ["torch bf16", "vecmat bf16", "vecmat int8", "vecmat fp8", "vecmat int4", *peers_gpu_humming.CONTENDERS,
               *peers_gpu_gemlite.CONTENDERS],
    "fp16 x": ["torch fp16", "vecmat fp16", "DeepSpeed Triton"],
}  # fmt: skip
HEADLINE = (4096, 4096), 1  # (K, N) and M of the second group


def measure(
    n: int, k: int, groups: dict[str, list[str]], ms: Sequence[int], options: argparse.Namespace, device: Device,
    probe: tuple[Sampler, int], say: Callable[[str, str], None],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each group, M and contender of one shape; ``say`` is told who cannot take part, and why."""
    for group, names in groups.items():
        shape, only_m = HEADLINE
        if group == "fp16 x" and (k, n) != shape:
            continue
        material = Material.make(n, k, options.pool << 20, 0, {}, "cuda")
        built: dict[str, Contender] = {}
        for name in names:
            try:
                built[name] = CONTENDERS[name](material)
            except FAILURES as failure:
                say(name, reason(failure))
        for m in [m for m in ms if group != "fp16 x" or m == only_m]:
            x = material.activations(m)
            ready: dict[str, tuple[Calls, Sampler]] = {}
            for name, contender in built.items():
                try:
                    calls = checked(contender, material, x)
                    ready[name] = calls, Sampler(device, calls.calls)
                except FAILURES as failure:
                    say(name, f"{k}x{n} M={m}: {reason(failure)}")
            if not ready:
                continue
            *times, probe_us = medians([*(sampler for _, sampler in ready.values()), probe[0]], options.rounds)
            gbs = probe[1] / probe_us * 1e-3
            for (name, (calls, _)), us in zip(ready.items(), times, strict=True):
                moved = built[name].weight_bytes + m * (k + n) * 2
                floor = moved / gbs * 1e-3
                yield {
                    "group": group, "contender": name, "kernel": calls.kernel, "m": m, "n": n, "k": k,
                    "us": round(us, 2), "weight_bytes": built[name].weight_bytes, "floor_us": round(floor, 2),
                    "floor_is": "memory", "share": round(floor / us, 3), "probe_gbs": round(gbs, 1),
                }  # fmt: skip
        del built, material
        torch.cuda.empty_cache()


def stamp() -> dict[str, Any]:
    """What every row is stamped with."""
    versions = {}
    for package in ("torch", "triton", "humming-kernels", "gemlite", "deepspeed"):
        try:
            versions[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package.replace("-", "_")] = ""
    return {"date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(),
            "vecmat": vecmat.__version__, **versions}  # fmt: skip


def prepare(options: argparse.Namespace, say: Callable[[str, str], None]) -> None:
    """What peers want before they are timed: Humming's kernels compiled, GemLite's way of tuning chosen."""
    wanted = [name for names in options.groups.values() for name in names]
    humming = [name for name in peers_gpu_humming.FORMATS if name in wanted]
    peers_gpu_gemlite.GemLite.budget_s = options.gemlite_s
    begin = time.perf_counter()
    try:
        if humming:
            count = peers_gpu_humming.compile_all(humming, options.shapes, options.m)
            print(f"Humming: {count} kernels in {time.perf_counter() - begin:.0f} s")
    except FAILURES as failure:
        say("Humming", f"compiling: {reason(failure)}")
    try:
        if any(name in wanted for name in peers_gpu_gemlite.CONTENDERS):
            peers_gpu_gemlite.gemlite().set_autotune(options.gemlite)
    except Absent:
        pass  # told by each of its contenders


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="vecmat's GPU kernels beside their peers", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shapes", default=SHAPES, help=f"KxN,...; {SHAPES} if not given")
    parser.add_argument("--m", default=ROWS, help=f"rows of x; {ROWS} if not given")
    parser.add_argument("--only", default="", help="groups or contenders, with commas: 'bf16 x', 'GemLite int8'")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pool", type=int, default=448, help="MB of copies of each weight")
    parser.add_argument(
        "--gemlite", choices=("default", "fast", "max"), default="fast", help="how GemLite tunes itself"
    )
    parser.add_argument("--gemlite-s", type=float, default=60.0, help="seconds that GemLite's tuning may take in all")
    parser.add_argument("--append", action="store_true", help="keep the file's rows; a cell's last row counts")
    parser.add_argument("--table", action="store_true", help="print the file's ratios and run nothing")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    options.m = [int(m) for m in options.m.split(",")]
    options.shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    options.groups = chosen(parser, options.only, GROUPS)
    if not options.table and not torch.cuda.is_available():
        parser.error("there is no GPU; --table prints a file's ratios")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not options.table:
        told: set[tuple[str, str]] = set()

        def say(name: str, why: str) -> None:
            if (name, why) not in told:
                print(f"  {name} left out: {why}", file=sys.stderr, flush=True)
            told.add((name, why))

        if not options.append:
            options.out.unlink(missing_ok=True)
        device, about = Device.of(torch.device("cuda:0")), stamp()
        with torch.inference_mode():
            prepare(options, say)
            probe = read_probe(device)
            for k, n in options.shapes:
                for found in measure(n, k, options.groups, options.m, options, device, probe, say):
                    append_csv(options.out, [{**about, **found}])
                    print(gpu_table.line(found), flush=True)
    print(gpu_table.table(ratios.read(options.out)))


if __name__ == "__main__":
    main()
