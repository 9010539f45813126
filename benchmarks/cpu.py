"""vecmat's CPU kernels beside their peers: ``python benchmarks/cpu.py``.

Contenders that multiply by the same weight, each in its own format, take turns in one process, in a new random order
every round, with a read probe between any two samples. Weights come from memory: copies of them rotate. Each result is
compared with float64 before it is timed. Two threads, whatever the machine has (``--threads``).

    python benchmarks/cpu.py --quick                                    # minutes: three shapes, M = 1, 4, 16, 128
    python benchmarks/cpu.py --shapes 4096x4096 --only int8             # one shape's int8 contenders
    python benchmarks/cpu.py --shapes 4096x14336 --append               # a whole run in pieces, into one file
    python benchmarks/cpu.py --table                                    # the ratios of the file, nothing is run

Shapes are K x N, as in x (M, K) @ weight (K, N). Rows go to ``benchmarks/results/cpu.csv``: a contender's median time
(us a call, Python included), its floor (the bytes it must move over the probe, or its operations over the processor's
measured rate, whichever is longer), and what was measured with which versions.

The peers beside torch are optional; those that cannot run are listed with the reason: llama.cpp's ggml
(``CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-deps llama-cpp-python==0.3.36``, built from source) and onnxruntime
(``pip install 'vecmat[bench]'``). ``--kernel 'vecmat int8=cpu_panels'`` forces a kernel on one of vecmat's contenders.
"""

from __future__ import annotations

import argparse
import datetime
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import cpu_table
import peers_ggml
import peers_onnx
import peers_torch
import peers_vecmat
import ratios
import vecmat
from contender import Absent, Build, Calls, Contender, Material, checked, chosen
from vecmat.device import Device
from vecmat.measure import append_csv
from vecmat.native import native

SHAPES = "4096x4096,4096x14336,14336x4096,2048x8192,576x1536,640x2048,896x4864"
QUICK = "4096x4096,2048x8192,576x1536"
ROWS, QUICK_ROWS = "1,2,4,8,16,32,128,512", "1,4,16,128"
FILE = Path(__file__).parent / "results" / "cpu.csv"

CONTENDERS: dict[str, Build] = {
    **peers_vecmat.CONTENDERS,
    **peers_torch.CONTENDERS,
    **peers_ggml.CONTENDERS,
    **peers_onnx.CONTENDERS,
}
# Those that are compared with each other, and therefore timed in the same rounds.
GROUPS = {
    "int8": ["vecmat int8", "vecmat int8 compute", "torch int8pack", "torch qlinear", "torch bf16", "ggml Q8_0",
             "ggml Q8_0 repacked"],
    "int4": ["vecmat int4", "vecmat int4 compute", "torch int4pack", "torch bf16", "ggml Q4_0", "ggml Q4_0 repacked",
             "ggml Q4_K", "ggml Q4_K repacked", "onnxruntime MatMulNBits"],
    "bf16": ["vecmat bf16", "torch bf16", "ggml BF16"],
    "fp32": ["vecmat fp32", "torch fp32", "ggml F32"],
    "fp16": ["vecmat fp16", "torch fp16", "ggml F16"],
}  # fmt: skip

SLICE_S = 0.010  # a sample's length: calls are repeated until it is filled
ENOUGH_S = 1.0  # a contender whose samples have taken this long has had its rounds, LEAST of them given
LEAST = 3
APART_S = 60.0  # the longest that a run waits, in all, for threads to get a core each
PROBE_BYTES, PROBE_STEP = 256 << 20, 64 << 20


class Probe:
    """The memory's read rate now: ``gbs()`` reads the next part of a large buffer, in ``threads`` threads."""

    def __init__(self, threads: int) -> None:
        self.buffer = torch.ones(PROBE_BYTES, dtype=torch.uint8)
        self.at = 0
        if native().isa:
            self.read: Callable[[int], object] = lambda at: native().read(
                self.buffer.data_ptr() + at, PROBE_STEP, threads
            )
            self.name = f"vecmat_read ({native().isa})"
        else:  # slower than memory
            words = self.buffer.view(torch.int64)
            self.read = lambda at: torch.sum(words[at // 8 : (at + PROBE_STEP) // 8])
            self.name = f"torch.sum, as {native().reason}"

    def gbs(self) -> float:
        """GB/s of one reading of ``PROBE_STEP`` bytes."""
        begin = time.perf_counter()
        self.read(self.at)
        took = time.perf_counter() - begin
        self.at = (self.at + PROBE_STEP) % PROBE_BYTES
        return PROBE_STEP / took * 1e-9


def take_rates(rate: dict[str, float], threads: int) -> None:
    """Raise ``rate`` to what is found now: 1e9 operations a second of each kind of multiplication, in registers.

    The best of one thread and of all: two threads may be halves of one core. Nothing without vecmat's library.
    """
    for number, kind in enumerate(("fp32", "bf16", "int8") if native().isa else ()):
        for count in (1, threads) * 5:
            begin = time.perf_counter()
            done = native().operations(number, 100_000, count)
            rate[kind] = max(rate.get(kind, 0.0), done / (time.perf_counter() - begin) * 1e-9)


class Cores:
    """Sees that the threads run side by side: for seconds on end a scheduler may keep two of them on one core."""

    def __init__(self, threads: int) -> None:
        self.threads, self.left_s, self.shared = threads, APART_S, 0

    def _apart(self) -> bool:
        took = []
        for count in (1, self.threads):
            begin = time.perf_counter()
            native().operations(2, 50_000, count)
            took.append(time.perf_counter() - begin)
        return took[1] < 1.5 * took[0]

    def wait(self) -> None:
        """Return when the threads have a core each, or waiting has taken too long; ``shared`` counts those."""
        if not native().isa or self.threads == 1:
            return
        begin = time.perf_counter()
        while not any(self._apart() for _ in range(3)):
            if time.perf_counter() - begin > self.left_s:
                self.shared += 1
                break
            time.sleep(0.02)
        self.left_s = max(0.0, self.left_s - (time.perf_counter() - begin))


class Turn:
    """One contender's samples for one M. us: its samples. probe: GB/s around each of them."""

    def __init__(self, name: str, contender: Contender, ready: Calls) -> None:
        self.name, self.contender, self.ready = name, contender, ready
        self.us: list[float] = []
        self.probe: list[float] = []
        self.at, self.spent = 0, 0.0
        self.count, estimate = 1, self._run(1)
        for _ in range(2 if estimate < SLICE_S else 0):
            self.count = max(1, min(round(SLICE_S / estimate), 1 << 14))
            estimate = self._run(self.count) / self.count

    def _run(self, count: int) -> float:
        calls, at = self.ready.calls, self.at
        copies = len(calls)
        begin = time.perf_counter()
        for _ in range(count):
            calls[at]()
            at += 1
            if at == copies:
                at = 0
        took = time.perf_counter() - begin
        self.at = at
        return max(took, 1e-9)

    def sample(self) -> None:
        """Time ``count`` calls, after one that is not timed where calls are short: it wakes the threads."""
        if self.count > 1:
            self._run(1)
        took = self._run(self.count)
        self.spent += took
        self.us.append(took / self.count * 1e6)

    @property
    def done(self) -> bool:
        return self.spent > ENOUGH_S and len(self.us) >= LEAST


def interleave(turns: Sequence[Turn], probe: Probe, cores: Cores, rounds: int, order: random.Random) -> None:
    """Sample all contenders ``rounds`` times in turn, a probe before and after each sample."""
    for _ in range(rounds):
        cores.wait()
        going = [turn for turn in turns if not turn.done]
        order.shuffle(going)
        before = probe.gbs()
        for turn in going:
            turn.sample()
            time.sleep(turn.ready.spins_s)
            after = probe.gbs()
            turn.probe.append((before + after) / 2)
            before = after


def ready(material: Material, built: dict[str, Contender], x: torch.Tensor, say: Callable[..., None]) -> list[Turn]:
    """A Turn for each contender whose first and last copy give the right result."""
    turns = []
    for name, contender in built.items():
        try:
            calls = checked(contender, material, x)
        except (Absent, ValueError, RuntimeError) as reason:
            say(name, f"M={x.shape[0]}: {str(reason).splitlines()[0]}")
            continue
        turns.append(Turn(name, contender, calls))
    return turns


def measure(
    n: int, k: int, groups: dict[str, list[str]], ms: Sequence[int], options: argparse.Namespace, probe: Probe,
    cores: Cores, rate: dict[str, float],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """A row for each group, M and contender of one shape; contenders that cannot run are told on stderr."""
    told: set[tuple[str, str]] = set()

    def say(name: str, reason: str) -> None:
        if (name, reason) not in told:
            print(f"  {name} left out: {reason}", file=sys.stderr)
        told.add((name, reason))

    for group, names in groups.items():
        material = Material.make(n, k, options.pool << 20, options.threads, options.kernels)
        built: dict[str, Contender] = {}
        for name in names:
            try:
                built[name] = CONTENDERS[name](material)
            except (Absent, RuntimeError) as reason:
                say(name, str(reason).splitlines()[0])
        for m in ms:
            take_rates(rate, options.threads)
            turns = ready(material, built, material.activations(m), say)
            interleave(turns, probe, cores, options.rounds, random.Random(m))
            for turn in turns:
                yield row(turn, group, m, n, k, rate)
        for contender in built.values():
            contender.close()


def row(turn: Turn, group: str, m: int, n: int, k: int, rate: dict[str, float]) -> dict[str, Any]:
    """One contender's line in the file."""
    contender, us = turn.contender, statistics.median(turn.us)
    probe = statistics.median(turn.probe)
    element = 4 if contender.rate == "fp32" else 2
    moved = contender.weight_bytes + m * (k + n) * element
    memory_us = moved / probe * 1e-3
    work = 2 * m * n * k * contender.times
    work_us = work / rate[contender.rate] * 1e-3 if rate else 0.0
    floor = max(memory_us, work_us)
    return {
        "group": group, "contender": turn.name, "kernel": turn.ready.kernel, "m": m, "n": n, "k": k,
        "us": round(us, 2), "low_us": round(sorted(turn.us)[len(turn.us) // 10], 2), "samples": len(turn.us),
        "weight_bytes": contender.weight_bytes, "floor_us": round(floor, 2),
        "floor_is": "memory" if memory_us >= work_us else "operations", "share": round(floor / us, 3),
        "probe_gbs": round(probe, 1),
    }  # fmt: skip


def stamp(threads: int) -> dict[str, Any]:
    """What every row is stamped with."""
    versions = {}
    for package in ("torch", "llama-cpp-python", "onnxruntime"):
        try:
            versions[package.replace("-", "_")] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package.replace("-", "_")] = ""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": Device.of(torch.device("cpu")).name,
        "isa": native().isa,
        "threads": threads,
        "vecmat": vecmat.__version__,
        **versions,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="vecmat's CPU kernels beside their peers", epilog=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--shapes", help=f"KxN,...; {SHAPES} if not given")
    parser.add_argument("--m", help=f"rows of x; {ROWS} if not given")
    parser.add_argument("--only", default="", help="groups or contenders, with commas: int8, 'ggml Q8_0'")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--pool", type=int, default=256, help="MB of copies of each weight")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kernel", action="append", default=[], metavar="CONTENDER=KERNEL")
    parser.add_argument("--quick", action="store_true", help=f"shapes {QUICK}, M {QUICK_ROWS}, 7 rounds")
    parser.add_argument("--append", action="store_true", help="keep the file's rows; a cell's last row counts")
    parser.add_argument("--table", action="store_true", help="print the file's ratios and run nothing")
    parser.add_argument("--out", type=Path, default=FILE)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds = min(options.rounds, 7)
    options.shapes = options.shapes or (QUICK if options.quick else SHAPES)
    options.m = [int(m) for m in (options.m or (QUICK_ROWS if options.quick else ROWS)).split(",")]
    options.shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    options.kernels = dict(pair.split("=", 1) for pair in options.kernel)
    options.groups = chosen(parser, options.only, GROUPS, options.kernels)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not options.table:
        torch.set_num_threads(options.threads)
        if not options.append:
            options.out.unlink(missing_ok=True)
        rate: dict[str, float] = {}
        probe, cores, about = Probe(options.threads), Cores(options.threads), stamp(options.threads)
        cores.wait()
        take_rates(rate, options.threads)
        told = ", ".join(f"{kind} {gops:.0f}" for kind, gops in rate.items())
        print(f"{about['processor']}; probe {probe.name} {probe.gbs():.1f} GB/s; 1e9 operations/s: {told or 'unknown'}")
        with torch.inference_mode():
            for k, n in options.shapes:
                for found in measure(n, k, options.groups, options.m, options, probe, cores, rate):
                    append_csv(options.out, [{**about, **found}])
                    print(cpu_table.line(found), flush=True)
        if cores.shared:
            print(f"threads had to share a core in {cores.shared} rounds: something else is running", file=sys.stderr)
    print(cpu_table.table(ratios.read(options.out)))


if __name__ == "__main__":
    main()
