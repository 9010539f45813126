"""The command line: ``vecmat run | explain | doctor``, and the commands of ``cli_*``. It parses and prints only."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from . import __version__, cli_convert, cli_tuning

if TYPE_CHECKING:
    import torch
    from rich.console import Console

    from .compare import Comparison
    from .device import Device
    from .models import Advance

FLOATS = ("bf16", "fp16", "fp32")
WEIGHTS = ("int8", "int4", "fp8", "bf16", "fp16", "fp32")
WIDTH = 100  # columns where the output is no terminal
RAN = "what ran after converting (us: the estimate for one call, and the runner-up's)"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of a command line: 0, 2 for a mistake in it, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.call(args)
    except (ValueError, TypeError) as error:
        print(f"vecmat: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vecmat: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vecmat", description="The fastest correct matmul for transformer inference, on the machine you have."
    )
    parser.add_argument("--version", action="version", version=f"vecmat {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_run(commands)
    _add_explain(commands)
    _add_doctor(commands)
    cli_convert.add_command(commands, FLOATS)
    cli_tuning.add_commands(commands, _device)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="convert a language model; compare its text, speed, size and logits before and after",
        description="Load a language model, generate a text, convert its linear layers, generate again; then show both "
        "texts, tokens a second, megabytes, how far the logits moved, and which kernel ran for which shape.",
    )
    run.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a local transformers folder or a .gguf file (default: the packaged SmolLM2-135M-Instruct)",
    )
    run.add_argument("--weights", choices=WEIGHTS, default="int8", help="format to convert to (default: int8)")
    run.add_argument("--group-size", type=int, metavar="N", help="weights along K that share a scale: 32, 64 or 128")
    run.add_argument(
        "--dtype",
        choices=FLOATS,
        help="dtype of the original model and of the activations (default: that of dense weights, else bf16)",
    )
    run.add_argument("--prompt", help="what to ask; goes through the model's chat template if it has one")
    run.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to generate (default: 64)")
    run.add_argument("--device", choices=("cpu", "cuda"), help="where to run (default: cuda if there is one, else cpu)")
    run.add_argument(
        "--untie",
        action="store_true",
        help="give a layer that shares its weight (a tied lm_head) a converted copy of its own",
    )
    run.add_argument("--fuse", action="store_true", help="join layers with the same input (q, k, v; gate, up)")
    run.add_argument("--compute", choices=("int8", "fp8"), help="quantise activations too; this changes the numbers")
    run.add_argument(
        "--compile",
        action="store_true",
        help="decode with the converted model through torch.compile (a minute or two to compile on a CPU)",
    )
    run.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    run.set_defaults(call=_run)


def _add_explain(commands: Any) -> None:
    explain = commands.add_parser(
        "explain",
        help="which kernel multiplies a shape on a device, and why",
        description="Show which kernel would run y (M, N) = x (M, K) @ weight, and every kernel's estimate or reason. "
        "The device need not be present.",
    )
    explain.add_argument("--m", type=int, required=True, help="rows of x")
    explain.add_argument("--n", type=int, required=True, help="output features")
    explain.add_argument("--k", type=int, required=True, help="input features")
    explain.add_argument(
        "--weights",
        default="int8",
        metavar="FORMAT",
        help="fp32, bf16, fp16, int8, int4 or fp8; int4:g64 and int4:g64:zp work too (default: int8)",
    )
    explain.add_argument("--group-size", type=int, metavar="N", help="weights along K that share a scale")
    explain.add_argument("--x", choices=FLOATS, help="dtype of x (default: a dense weight's own, else bf16)")
    explain.add_argument("--out", choices=FLOATS, help="dtype of y (default: x's)")
    explain.add_argument(
        "--layout", choices=("nk", "kn"), default="nk", help="how a dense weight lies: (N, K) or (K, N) (default: nk)"
    )
    explain.add_argument("--compute", choices=("int8", "fp8"), help="quantise x too")
    explain.add_argument("--bias", action="store_true", help="add a bias")
    explain.add_argument(
        "--device",
        metavar="NAME",
        help="h200, a100, rtx4090, ..., cpu, cuda or cuda:1 (default: cuda if there is one, else cpu)",
    )
    explain.set_defaults(call=_explain)


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="what this machine has, which kernels can run on it, and where tuning tables live",
        description="Show the devices, the versions, the tuning tables, and for each weight format which kernels can "
        "run here and why the others cannot.",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    doctor.set_defaults(call=_doctor)


def _torch_device(name: str | None) -> torch.device:
    """The torch device of an option: "cpu", "cuda", "cuda:1"; None is CUDA where there is any."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is not known") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: {name} is asked for, but torch finds {torch.cuda.device_count()} CUDA devices")
    return device


def _device(name: str | None) -> Device:
    """The Device of an option, which need not be present."""
    from .device import Device

    present = name is None or name.partition(":")[0] == "cuda"
    return Device.of(_torch_device(name)) if present or name is None else Device.named(name)


def _explain(args: argparse.Namespace) -> None:
    from .ops import check_compute, explain_problem
    from .problem import Problem
    from .weights import resolve_format

    for name in ("m", "n", "k"):
        if getattr(args, name) < 1:
            raise ValueError(f"explain: --{name} is {getattr(args, name)}; expected 1 or more")
    fmt = resolve_format(args.weights, args.k, args.group_size)
    check_compute(args.compute, fmt)
    x = args.x or (fmt.name if fmt.dense else "bf16")
    problem = Problem(
        m=args.m, n=args.n, k=args.k, x=x, weight=fmt, layout=args.layout if fmt.dense else "nk", out=args.out or x,
        bias=args.bias, compute=args.compute or "",
    )  # fmt: skip
    print(explain_problem(problem, _device(args.device)))


def _doctor(args: argparse.Namespace) -> None:
    from . import doctor

    found = doctor.examine()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    console = _console(sys.stdout)
    told = [f"{name} {version or 'absent'}" for name, version in found["versions"].items() if version or name != "hip"]
    _say(console, "versions", ", ".join(told))
    if found["no_gpu"]:
        _say(console, "no GPU", found["no_gpu"])
    for device in found["devices"]:
        _print_device(console, device)


def _print_device(console: Console, device: dict[str, Any]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    many = f"{device['count']} x " if device["count"] > 1 else ""
    unit = "threads" if device["kind"] == "cpu" else "SMs"
    rates = (
        f"reads {device['read_gbs']:,.0f} GB/s; TFLOPS {device['tflops16']:g} (16 bits), {device['tflops32']:g} (fp32)"
    )
    console.print()
    _say(console, device["kind"], f"{many}{device['name']}")
    console.print(f"  {device['arch']}, {device['units']} {unit}, {device['l2_bytes'] >> 20} MiB last cache")
    console.print(f"  {rates}, {device['tops8']:g} (8 bits)")
    own = device["table"]
    state = f"{own['rows']} rows{', other versions' if own['stale'] else ''}" if own["exists"] else "none yet"
    console.print(f"  tuned: {state} in {own['path']}; {own['shipped_rows']} rows shipped", soft_wrap=True)
    grid = Table(title="kernels for one row of x, N = K = 4096", title_justify="left", box=None, padding=(0, 1))
    grid.add_column("")
    notes: dict[str, int] = {}
    for name in next(iter(device["kernels"].values())):
        grid.add_column(name)
    for kernel, answers in device["kernels"].items():
        cells = []
        for name, answer in answers.items():
            if answer in ("chosen", "yes"):
                cells.append(f"[bold green]{answer}[/]" if answer == "chosen" else answer)
            else:  # one note serves every kernel and format that it is true of
                note = answer.replace(f"the weight is {name}", "the weight is of another format")
                cells.append(f"[dim]no ({notes.setdefault(note, len(notes) + 1)})[/]")
        grid.add_row(kernel, *cells)
    console.print(grid)
    for note, number in notes.items():
        console.print(Padding(Text(f"({number}) {note}", style="dim"), (0, 0, 0, 2)))


def _say(console: Console, head: str, words: str) -> None:
    """Print a bold head and words, which may hold any characters."""
    from rich.text import Text

    console.print(Text.assemble((head, "bold"), f"  {words}" if words else ""))


def _run(args: argparse.Namespace) -> None:
    from . import compare, models
    from .device import Device
    from .problem import DTYPES

    compare.check_options(args.weights, args.group_size, args.compute, args.max_new_tokens)
    source = models.find(args.model)
    device = _torch_device(args.device)
    dtype = args.dtype or compare.default_dtype(args.weights)
    prompt = compare.PROMPT if args.prompt is None else args.prompt
    screen = _Screen(silent=args.json)
    with screen.stage(f"loading {source.name}") as advance:
        model, tokenizer = models.load(source, DTYPES[dtype], device, advance)
    where = Device.of(device).name
    screen.title(f"{source.name}, {dtype}, on {where}", prompt)
    began = _processors()
    found = compare.compare(
        model, tokenizer, args.weights, group_size=args.group_size, compute=args.compute, untie=args.untie,
        fuse=args.fuse, compiled=args.compile, prompt=prompt, max_new_tokens=args.max_new_tokens, watcher=screen,
    )  # fmt: skip
    used = [end - start for start, end in zip(began, _processors(), strict=True)]
    others = max(0.0, (used[0] - used[1]) / used[2])
    if args.json:
        asked = {"model": source.name, "device": where, "dtype": dtype, "weights": args.weights, "prompt": prompt,
                 "group_size": args.group_size, "compute": args.compute, "untie": args.untie,
                 "fuse": args.fuse, "compile": args.compile, "others_share": others}  # fmt: skip
        print(json.dumps({**asked, **found.as_dict()}, indent=2))
    else:
        _print_comparison(_console(sys.stdout), found)
        if others > 0.1:
            share = f"{100 * others:.0f} %"
            print(f"\nOther programs took {share} of the processors meanwhile: the times are not to be trusted.")


def _processors() -> tuple[float, float, float]:
    """Seconds so far, over all processors: that any program ran, that this one ran, and in all (Linux; else zeros)."""
    own = time.process_time()
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, idle, iowait, *more = (int(word) / 100 for word in file.readline().split()[1:9])
    except (OSError, ValueError):
        return 0.0, own, time.monotonic()
    busy = user + nice + system + sum(more)  # time stolen by other virtual machines among them
    return busy, own, busy + idle + iowait


def _print_comparison(console: Console, found: Comparison) -> None:
    from rich.table import Table
    from rich.text import Text

    before, after = found.before, found.after
    grid = Table(box=None, padding=(0, 2), title_justify="left")
    for name in ("", "before", "after", ""):
        grid.add_column(name, justify="left" if not name else "right")
    speeds = [side.tokens_per_s for side in (before, after)]
    ratio = f"{speeds[1] / speeds[0]:.2f} x" if speeds[0] and speeds[1] else "one token tells no speed"
    grid.add_row("decode, tokens/s", *("-" if speed is None else f"{speed:.1f}" for speed in speeds), ratio)
    grid.add_row(
        f"prompt of {found.prompt_tokens} tokens, ms", f"{before.prompt_s * 1e3:,.0f}", f"{after.prompt_s * 1e3:,.0f}",
        f"{before.prompt_s / after.prompt_s:.2f} x as fast",
    )  # fmt: skip
    packed = f"+ {after.packed_megabytes:.1f} in packed copies" if after.packed_megabytes >= 0.05 else ""
    size = f"{after.megabytes / before.megabytes:.2f} x {packed}"
    grid.add_row("weights, MB", f"{before.megabytes:.1f}", f"{after.megabytes:.1f}", size)
    grid.add_row(
        "perplexity", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}",
        f"{100 * (after.perplexity / before.perplexity - 1):+.2f} %",
    )  # fmt: skip
    grid.add_row("logits moved, mean KL", "", f"{found.kl:.5f}", f"nats a token, over {found.scored_tokens} tokens")
    grid.add_row("linear layers in vecmat", "", f"{found.converted} of {found.linear}", "")
    console.print()
    console.print(grid)
    rows = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, title=RAN, title_justify="left", title_style="bold")
    for name in ("rows", "layers", "N x K", "weights", "kernel", "us", "why"):
        rows.add_column(name, justify="right" if name in ("rows", "us") else "left")
    for row in found.kernels:
        why = row.decided_by.partition(":")[0] + (f", {row.runner_up} {row.runner_up_us:,.0f}" if row.runner_up else "")
        rows.add_row(
            str(row.m), f"{row.layers} {row.names}", f"{row.n} x {row.k}", row.weights, row.kernel,
            f"{row.estimate_us:,.0f}", Text(why),
        )  # fmt: skip
    console.print()
    console.print(rows)


def _console(file: TextIO) -> Console:
    """A console for stdout or stderr: colours on a terminal only, 100 columns elsewhere."""
    from rich.console import Console

    return Console(file=file, highlight=False, width=None if file.isatty() else WIDTH)


class _Screen:
    """What the user sees while a comparison runs: texts as they come on stdout, progress bars on stderr."""

    def __init__(self, silent: bool) -> None:
        self._out = None if silent else _console(sys.stdout)
        self._bars = _console(sys.stderr)
        self._column, self._gap = 0, ""  # of the text so far: where its line ends, and blanks not yet written

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[Advance]:
        """Context of one stage, with a bar while it lasts; yields (done, total) -> None."""
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._bars, transient=True, disable=not self._bars.is_terminal) as progress:
            task = progress.add_task(title, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def title(self, title: str, prompt: str) -> None:
        """What runs, and what is asked."""
        if self._out is not None:
            _say(self._out, "model ", title)
            _say(self._out, "prompt", prompt)

    def begin(self, title: str) -> None:
        """A generated text starts."""
        if self._out is not None:
            self._out.print()
            _say(self._out, title, "")
            self._column, self._gap = 0, ""

    def text(self, piece: str) -> None:
        """The next words of it, wrapped at the width."""
        if self._out is None:
            return
        for gap, word in re.findall(r"([^\S\n]*)(\n|\S+|$)", piece):
            self._gap += gap
            if word == "\n" or (word and self._column + len(self._gap + word) > self._out.width):
                self._out.file.write("\n")
                self._column, self._gap = 0, ""
            if word.strip():
                shown = (self._gap if self._column else "  ") + word
                self._out.file.write(shown)
                self._column += len(shown)
                self._gap = ""
        self._out.file.flush()

    def end(self) -> None:
        """It is complete."""
        if self._out is not None:
            self._out.file.write("\n")
            self._out.file.flush()
