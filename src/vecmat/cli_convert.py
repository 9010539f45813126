"""The command line's ``convert``: parsing and printing; the work is ``vecmat.checkpoints.convert``."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GIGA = 10**9


def add_command(commands: Any, floats: tuple[str, ...]) -> None:
    """Add the subcommand. floats: the names of the dtypes."""
    convert = commands.add_parser(
        "convert",
        help="write a checkpoint (plain, GPTQ, AWQ, compressed-tensors, fp8, bitsandbytes, GGUF) in vecmat's layout",
        description="Read a checkpoint, quantise its linear layers to a format or keep the one they have, and write "
        "a folder that vecmat.load reads as it is: safetensors, config.json and the tokenizer. A shard at a time.",
    )
    convert.add_argument("source", metavar="IN", help="a local transformers folder or a .gguf file")
    convert.add_argument("out", metavar="OUT", help="the folder to write; it must be new or empty")
    convert.add_argument(
        "--weights",
        metavar="FORMAT",
        help="int8, int4, fp8, bf16, fp16 or fp32; int4:g64:zp and the like, too (default: what a quantised IN has)",
    )
    convert.add_argument("--group-size", type=int, metavar="N", help="weights along K that share a scale: 32, 64, 128")
    convert.add_argument("--zero-points", action="store_true", help="give each group of int4 a zero point")
    convert.add_argument("--dtype", choices=floats, help="dtype of activations and dense weights (default: IN's)")
    convert.add_argument(
        "--skip", nargs="+", default=(), metavar="NAME", help="layers to leave as they are: lm_head, '*.mlp.*', ..."
    )
    convert.add_argument("--shard-gb", type=float, default=2.0, metavar="GB", help="size of a file (default: 2)")
    convert.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    convert.set_defaults(call=_convert)


def _convert(args: argparse.Namespace) -> None:
    from . import checkpoints
    from .problem import DTYPES

    if args.weights is None and (args.group_size is not None or args.zero_points):
        raise ValueError("convert: --group-size and --zero-points say how to quantise; name a format with --weights")
    try:
        with _bar(f"converting {Path(args.source).name}") as progress:
            made = checkpoints.convert(
                args.source, args.out, args.weights, group_size=args.group_size, symmetric=not args.zero_points,
                dtype=None if args.dtype is None else DTYPES[args.dtype], skip=args.skip,
                shard_bytes=int(args.shard_gb * GIGA), progress=progress,
            )  # fmt: skip
    except OSError as error:  # a disk that is full, a folder that cannot be written
        raise ValueError(f"convert: {args.out} cannot be written: {error}") from error
    counts = Counter(str(fmt) for fmt in made.formats.values())
    if args.json:
        told = {"out": args.out, "layers": dict(counts), "bytes": made.nbytes, "files": made.files}
        print(json.dumps(told, indent=2))
        return
    layers = ", ".join(f"{count} {fmt}" for fmt, count in counts.most_common())
    files = f"{len(made.files)} files" if len(made.files) > 1 else "1 file"
    print(f"{args.out}: {made.nbytes / 1e6:,.1f} MB in {files}; linear layers: {layers}")


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Context with a progress bar on stderr; yields (name, done, total) -> None."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr, highlight=False)
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, name="")
        yield lambda name, done, total: progress.update(task, completed=done, total=total, name=name)
