"""The command line's ``tune``, ``bench`` and ``table``: parsing and printing; the work is in the modules they call."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .device import Device
    from .problem import Problem
    from .tuner import Trial, Tuned

DEFAULT_M = "1,2,4,8,16"


def add_commands(commands: Any, device_of: Callable[[str | None], Device]) -> None:
    """Add the subcommands. device_of: the Device of a --device option."""
    tune = commands.add_parser(
        "tune",
        help="find the fastest kernel for a model's or named shapes, and keep it in the table",
        description="Check and time every kernel for each shape and M, and write the winners into the table of this "
        "device. Ctrl-C keeps what was found.",
    )
    tune.add_argument(
        "model", nargs="?", metavar="MODEL", help="a transformers folder or .gguf file: tune its layers' shapes"
    )
    _add_shapes(tune)
    tune.add_argument("--budget", type=float, default=60.0, metavar="S", help="seconds in all (default: 60)")
    tune.add_argument("--again", action="store_true", help="tune what the table has already, too")
    tune.set_defaults(call=lambda args: _tune(args, device_of(args.device)))

    bench = commands.add_parser(
        "bench",
        help="time what matmul runs against its peers and the memory's roof",
        description="Time the chosen kernel, its peers and a read-only stream side by side, weights from memory.",
    )
    _add_shapes(bench)
    bench.add_argument(
        "--peers", default="torch", help="comma-separated: torch (F.linear on the dense weight) or kernels' names"
    )
    bench.add_argument("--json", metavar="FILE", help="write the results as JSON (- for stdout, and nothing else)")
    bench.add_argument("--plot", metavar="FILE.png", help="draw time and share of the roof against M")
    bench.add_argument("--append", metavar="FILE.csv", help="append the results, with device, versions and date")
    bench.set_defaults(call=lambda args: _bench(args, device_of(args.device)), model=None)

    table = commands.add_parser(
        "table", help="show, export, import, merge or verify tuning tables", description="Work on tuning tables."
    )
    actions = table.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, told, call in (
        ("path", "print where this device's table is kept", _path),
        ("show", "print the rows that would decide on this device", _show),
        ("export", "write those rows to a file", _export),
        ("import", "merge a file's rows into this device's table; the file's win", _import),
        ("merge", "merge files of one device into one; the faster row wins", _merge),
        (
            "verify",
            "check every row against the kernels there are, and by running it where the device is here",
            _verify,
        ),
    ):
        action = actions.add_parser(name, help=told, description=told[0].upper() + told[1:] + ".")
        action.add_argument("--device", metavar="NAME", help="h200, cpu, cuda:1, ... (default: the one here)")
        if name in ("export", "import"):
            action.add_argument("file", metavar="FILE")
        elif name == "merge":
            action.add_argument("out", metavar="OUT")
            action.add_argument("files", metavar="FILE", nargs="+")
        elif name == "verify":
            action.add_argument("file", metavar="FILE", nargs="?", help="a table file (default: this device's rows)")
        action.set_defaults(call=lambda args, call=call: call(args, device_of(args.device)))


def _add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", metavar="K,N", default=(), help="input and output features")
    parser.add_argument("--workload", metavar="NAME", help="llama-3-8b, smollm2-135m, bert-base, ...")
    parser.add_argument("--m", metavar="M,M", help=f"rows of x (default: the workload's, else {DEFAULT_M})")
    parser.add_argument(
        "--weights", default="int8", metavar="FORMAT[,FORMAT]", help="bf16, int8, int4:g64, ... (default: int8)"
    )
    parser.add_argument("--x", choices=("bf16", "fp16", "fp32"), help="dtype of x (default: bf16, or a dense weight's)")
    parser.add_argument(
        "--device", metavar="NAME", help="cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)"
    )


def _problems(args: argparse.Namespace) -> list[Problem]:
    """The problems that the options name, in the order in which they matter: every shape's first M, then the next."""
    from . import workloads

    shapes = [_shape(text) for text in args.shapes]
    ms = [_whole(text, "--m") for text in args.m.split(",")] if args.m else None
    if args.workload:
        workload = workloads.named(args.workload)
        shapes += workload.shapes
        ms = ms or list(workload.m)
    if args.model:
        shapes += _model_shapes(args.model)
    if not shapes:
        raise ValueError(f"{args.command}: no shapes; give --shapes K,N or --workload NAME")
    ms = ms or [int(m) for m in DEFAULT_M.split(",")]
    formats = args.weights.split(",")
    found = [
        problem
        for m in ms
        for fmt in formats
        for problem in workloads.problems(list(dict.fromkeys(shapes)), [m], fmt, args.x)
    ]
    return list({problem.key(): problem for problem in found}.values())


def _shape(text: str) -> tuple[int, int]:
    k, comma, n = text.partition(",")
    if not comma:
        raise ValueError(f"--shapes: {text!r} is no shape; expected K,N such as 4096,14336")
    return _whole(n, "--shapes"), _whole(k, "--shapes")


def _whole(text: str, option: str) -> int:
    if not text.strip().isdigit() or int(text) < 1:
        raise ValueError(f"{option}: {text!r} is no number of 1 or more")
    return int(text)


def _model_shapes(model: str) -> list[tuple[int, int]]:
    import torch

    from . import models
    from .nn import Linear, linear_layers

    loaded, _ = models.load(models.find(model), torch.bfloat16, torch.device("cpu"), lambda done, total: None)
    converted = (Linear.from_linear(layer) for layer in linear_layers(loaded).values())
    return list(dict.fromkeys((layer.out_features, layer.in_features) for layer in converted))


def _is_here(device: Device) -> bool:
    import torch

    from .device import Device

    here = device.kind == "cpu" or torch.cuda.is_available()
    return here and Device.of(device.place).name == device.name


def _present(device: Device, command: str) -> None:
    if not _is_here(device):
        raise ValueError(f"{command}: {device.name} is not here; it can be timed only where it is")


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Callable[[int, str], None]]:
    """Context with a progress bar on stderr; yields (done, what) -> None."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(
        *columns,
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # above the bar; what goes to a file or a pipe stays out of it
    ) as progress:
        task = progress.add_task("", total=total)
        yield lambda done, what: progress.update(task, completed=done, description=what)


def _tune(args: argparse.Namespace, device: Device) -> None:
    from . import table, tuner

    if not args.budget > 0:
        raise ValueError(f"tune: --budget is {args.budget}; expected more than 0 seconds")
    _present(device, "tune")
    problems = _problems(args)
    todo = _undecided(problems, device, args.again)
    began = time.monotonic()
    saved, stopped = 0, ""
    try:
        with tuner.alone(device, args.budget if todo else 0.0) as free:
            if todo and not free:
                raise ValueError("tune: another process is tuning this device; wait for it, or give a longer --budget")
            todo = _undecided(todo, device, args.again)  # another process may have tuned them meanwhile
            with _bar(len(todo)) as advance:
                for done, problem in enumerate(todo):
                    if time.monotonic() - began > args.budget:
                        stopped = f"; the budget of {args.budget:g} s is spent, {len(todo) - done} are left"
                        break
                    advance(done, problem.key())
                    tell = _best_so_far(problem, functools.partial(advance, done))
                    tuned = tuner.tune(problem, device, deadline=began + args.budget, on_trial=tell)
                    if tuned is not None:
                        if not table.save(device.name, {problem.key(): tuned.row}):
                            raise ValueError("tune: nothing can be saved, so nothing more is tuned")
                        saved += 1
                        print(_told(tuned), flush=True)  # only what is saved is told, and at once
    except KeyboardInterrupt:
        stopped = f"; interrupted, {len(todo) - saved} are left"
    skipped = len(problems) - len(todo)
    print(
        f"\n{saved} tuned in {time.monotonic() - began:.1f} s"
        + (f", {skipped} were in a table already" if skipped else "")
        + stopped
        + f"\n{table.path(device.name)}"
    )


def _undecided(problems: Sequence[Problem], device: Device, again: bool) -> list[Problem]:
    """The problems that no row decides, as the tables are now; all of them if they are to be tuned again."""
    from . import table
    from .dispatch import choose

    table.user_table.cache_clear()
    return [problem for problem in problems if again or choose(problem, device).row is None]


def _best_so_far(problem: Problem, show: Callable[[str], None]) -> Callable[[Trial], None]:
    """A callback for ``tune`` that shows the fastest trial of the problem so far."""
    best: list[Trial] = []

    def tell(trial: Trial) -> None:
        if trial.us is not None and (not best or trial.us < (best[0].us or 0)):
            best[:] = [trial]
            show(f"{problem.key()}: {trial.kernel} {trial.us:,.1f} us")

    return tell


def _told(tuned: Tuned) -> str:
    row = tuned.row
    config = " ".join(f"{name}={value}" for name, value in row.config.items())
    torch = ""
    if row.torch_over_us is not None:
        torch = f", torch slower than {row.torch_over_us:,.1f} us, stopped at a slice"
    elif row.torch_us is not None and row.torch_us != row.us:  # equal where torch's own path has won
        torch = f", torch {row.torch_us:,.1f} us"
    failed = f", {row.failed} failed" if row.failed else ""
    return f"{tuned.problem.key():<50} {row.kernel} {config} {row.us:,.1f} us{torch} ({row.tried} tried{failed})"


def _bench(args: argparse.Namespace, device: Device) -> None:
    from . import measure

    _present(device, "bench")
    problems = _problems(args)
    peers = [peer for peer in args.peers.split(",") if peer]
    if args.plot:
        measure.check_plot(args.plot)  # before minutes of measuring
    results = []
    with _bar(len(problems)) as advance:
        for done, problem in enumerate(problems):
            advance(done, problem.key())
            results.append(measure.measure(problem, device, peers))
    rows = measure.records(results, device)
    if args.json == "-":
        print(json.dumps(rows, indent=1))
    else:
        _print_bench(results, peers, device)
    if args.json and args.json != "-":
        _write(args, args.json, lambda file: file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8"))
    if args.append:
        _write(args, args.append, lambda file: measure.append_csv(file, rows))
    if args.plot:
        _write(args, args.plot, lambda file: measure.plot(file, results, device))


def _write(args: argparse.Namespace, name: str, write: Callable[[Path], object]) -> None:
    """Write a file that the command line names; raises ``ValueError`` where that cannot be done."""
    try:
        write(Path(name))
    except OSError as error:
        raise ValueError(f"{args.command}: {name} cannot be written: {error.strerror or error}") from error


def _print_bench(results: Sequence[Any], peers: Sequence[str], device: Device) -> None:
    from rich.table import Table

    from .measure import geometric_mean

    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("N x K", "weights", "M", "kernel", "us", *(f"{peer}, us" for peer in peers), "faster", "of the roof"):
        grid.add_column(name, justify="left" if name in ("N x K", "weights", "kernel") else "right")
    for r in results:
        p = r.problem
        others = ["-" if r.peers[peer] is None else f"{r.peers[peer]:,.1f}" for peer in peers]
        first = r.peers[peers[0]] if peers else None
        faster = f"{first / r.us:.2f} x" if first else "-"
        grid.add_row(
            f"{p.n} x {p.k}",
            str(p.weight),
            str(p.m),
            r.kernel,
            f"{r.us:,.1f}",
            *others,
            faster,
            f"{100 * r.share:.0f} %",
        )
    console = _out()
    console.print(f"{device.name}; a read-only stream gave {results[-1].roof_gbs:,.0f} GB/s\n")
    console.print(grid)
    for peer in peers:
        mean = geometric_mean(r.peers[peer] / r.us for r in results if r.peers[peer])
        console.print(f"\ngeometric mean against {peer}: {mean:.2f} x")


def _out() -> Any:
    from rich.console import Console

    return Console(file=sys.stdout, highlight=False, width=None if sys.stdout.isatty() else 120)


def _rows(device: Device) -> dict[str, tuple[str, Any]]:
    """By problem key, the rung and the row that decide on a device."""
    from . import table

    found: dict[str, tuple[str, Any]] = {}
    for rung, rows in table.ladder(device.name):
        for key, row in rows.aged.items():
            found.setdefault(key, (rung, row))
    return dict(sorted(found.items()))


def _path(args: argparse.Namespace, device: Device) -> None:
    from . import table

    print(table.path(device.name))


def _show(args: argparse.Namespace, device: Device) -> None:
    from rich.table import Table

    rows = _rows(device)
    if not rows:
        print(f"no rows for {device.name}; `vecmat tune` makes some")
        return
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("problem", "kernel", "config", "us", "torch, us", "from"):
        grid.add_column(name, justify="right" if name.endswith("us") else "left")
    for key, (rung, row) in rows.items():
        config = " ".join(f"{name}={value}" for name, value in row.config.items())
        times = ["-" if us is None else f"{us:,.1f}" for us in (row.us, row.torch_us)]
        if row.torch_over_us is not None:
            times[1] = f"> {row.torch_over_us:,.1f}"
        grid.add_row(key, row.kernel, config, *times, rung)
    console = _out()
    console.print(f"{device.name}: {len(rows)} rows\n")
    console.print(grid)


def _export(args: argparse.Namespace, device: Device) -> None:
    from . import table

    rows = {key: row for key, (_, row) in _rows(device).items()}
    if not rows:
        raise ValueError(f"table export: there are no rows for {device.name}")
    _write(args, args.file, lambda file: table.write(file, device.name, rows))
    print(f"{len(rows)} rows for {device.name} in {args.file}")


def _import(args: argparse.Namespace, device: Device) -> None:
    from . import table

    given = table.read(Path(args.file))
    if args.device is not None and given.device != device.name:
        raise ValueError(f"table import: {args.file} is for {given.device!r}, not {device.name!r}")
    if not table.save(given.device, given.aged):
        raise ValueError("table import: nothing was saved")
    print(f"{len(given.rows)} rows for {given.device} merged into {table.path(given.device)}")


def _merge(args: argparse.Namespace, device: Device) -> None:
    from . import table

    given = [table.read(Path(file)) for file in args.files]
    names = sorted({one.device for one in given})
    if len(names) > 1:
        raise ValueError(f"table merge: the files are for different devices: {', '.join(names)}")
    rows: dict[str, Any] = {}
    for one in given:
        for key, row in one.aged.items():
            have = rows.get(key)
            if have is None or (row.us is not None and (have.us is None or row.us < have.us)):
                rows[key] = row
    _write(args, args.out, lambda file: table.write(file, names[0], rows))
    print(f"{len(rows)} rows for {names[0]} in {args.out}")


def _verify(args: argparse.Namespace, device: Device) -> None:
    from . import table, tuner

    if args.file:
        given = table.read(Path(args.file))
        if given.device != device.name and args.device is not None:
            raise ValueError(f"table verify: {args.file} is for {given.device!r}, not {device.name!r}")
        name, rows = given.device, dict(given.rows)
    else:
        name, rows = device.name, {key: row for key, (_, row) in _rows(device).items()}
    runs = device.name == name and _is_here(device)
    wrong = {}
    with _bar(len(rows)) as advance:
        for done, (key, row) in enumerate(rows.items()):
            advance(done, key)
            reason = tuner.verify(key, row, device if runs else None)
            if reason is not None:
                wrong[key] = reason
    for key, reason in wrong.items():
        print(f"{key}: {reason}")
    ran = "checked by running them" if runs else f"not run, since {name} is not here"
    if wrong:
        raise ValueError(f"table verify: {len(wrong)} of {len(rows)} rows are wrong ({ran})")
    print(f"{len(rows)} rows are right ({ran})")
