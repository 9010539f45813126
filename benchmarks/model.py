"""A whole model's decoding speed on a GPU: ``python benchmarks/model.py --shapes llama-3-8b --weights bf16,int8,int4``.

A Llama of the given shapes with random weights, made on the device, in bf16. Each kind of weights is decoded greedily
through ``transformers`` with a static cache, the whole step, the choice of the token included, compiled by
``torch.compile(mode="reduce-overhead", fullgraph=True)``: rounds of 60 steps from an almost empty cache, all of which
attention reads all the same; the median round counts. Kinds: bf16, int8, int4, fp8 and the like are ``vecmat.convert``
of every linear layer, the head included; "torch" is the model as it is, also without compiling; "torchao-int8" its
weight-only quantisation.

--attention packed makes rows of the queries that share a head of keys and values, as ``transformers`` does in eager
mode; compiled, it repeats keys and values in memory first, four times for these shapes.

--inductor fast sets two of Inductor's options, for every kind: its kernels may start while the one in front ends, as
vecmat's do (``triton.enable_pdl``, compute capability 9.0), and small ones that do not depend on each other become one
(``combo_kernels``).

Each kind has a process of its own; they build and compile at the same time, and are timed one after the other once all
are ready. Then torch's profiler says where a step's time goes: in kernels of a kind (of two at once the first counts),
and in gaps between them. The first compiled logits are compared with eager ones; with --check both with those of the
same weights in fp32.

Tune first what the tables may lack: ``vecmat tune --workload llama-3-8b-fused --m 1,16 --weights bf16,int8,int4:g128``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import dataclasses
import datetime
import gc
import inspect
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config as inductor
import transformers
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import vecmat

SHAPES = {
    "llama-3-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "llama-3.2-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512),
}  # fmt: skip
CACHE, STEPS, ROUNDS, PROFILED = 256, 60, 5, 5
READY, DONE = "ready", "done"  # a child's words to the parent; any line is the parent's word to go on
# Words in the names of kernels, ours and torch's.
KINDS = {
    "linear": ("_decode", "_rows", "_warpgroups", "_tiles", "gemm", "gemv", "nvjet", "cutlass", "cublas", "splitk"),
    "attention": ("fmha", "flash", "attention", "attn", "sdpa", "softmax"),
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Microseconds of one decoding step: in kernels of a kind, and in none."""

    linear: float
    attention: float
    rest: float
    gaps: float
    kernels: int


def packed_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
                     scaling: float | None = None, **kwargs: Any) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of one token: the queries (B, heads, 1, D) that share a head of keys are its rows."""
    batch, heads, length, depth = query.shape
    if length > 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows = query.reshape(batch, key.shape[1], heads // key.shape[1], depth)
    y = scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, scale=scaling)
    return y.reshape(batch, 1, heads, depth), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def build(shapes: str, device: torch.device, attention: str) -> Any:
    config = LlamaConfig(**SHAPES[shapes], max_position_embeddings=8192, tie_word_embeddings=False)
    config._attn_implementation = attention
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


class Decoder:
    """A model with its cache. One step is a forward of a token (B, 1), compiled if asked for, and the next token."""

    def __init__(self, model: Any, batch: int, compiled: bool) -> None:
        self.model, self.device, self.batch, self.compiled = model, model.device, batch, compiled
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        names = inspect.signature(type(model).forward).parameters
        self.kwargs = {"cache" if "cache" in names else "past_key_values": self.cache, "use_cache": True}
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self.position = torch.zeros_like(self.token)
        for tensor in (self.token, self.position):  # a CUDA graph then writes them where they are
            torch._dynamo.mark_static_address(tensor)
        mode: Any = {"mode": "reduce-overhead"} if self.device.type == "cuda" else {}
        self.run = torch.compile(self.step, fullgraph=True, dynamic=False, **mode) if compiled else self.step

    def step(self, token: Tensor, position: Tensor) -> Tensor:
        """The logits; token and position become the next ones."""
        logits = self.model(input_ids=token, position_ids=position, **self.kwargs).logits[:, -1]
        token.copy_(logits.argmax(-1, keepdim=True))
        position.add_(1)
        return logits

    def start(self) -> None:
        """The cache holds one token, computed in eager mode; token and position are another's to go on with."""
        self.cache.reset()
        self.token.copy_(torch.arange(self.batch, device=self.device)[:, None])
        self.position.zero_()
        self.step(self.token, self.position)
        self.token.copy_(torch.arange(1, self.batch + 1, device=self.device)[:, None])

    def steps(self, count: int) -> None:
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            self.run(self.token, self.position)

    def first(self, run: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The logits of the first step after ``start``, in fp32. run: ``step``, or what was compiled of it."""
        self.start()
        return run(self.token, self.position).float()

    def differ(self) -> float:
        """How far the first step's logits are from eager ones, relative to their norm."""
        eager = self.first(self.step)
        return float((self.first(self.run) - eager).norm() / eager.norm())

    def seconds(self) -> list[float]:
        """Of each round of STEPS."""
        times = []
        for _ in range(ROUNDS):
            self.start()
            synchronize(self.device)
            begun = time.perf_counter()
            self.steps(STEPS)
            synchronize(self.device)
            times.append(time.perf_counter() - begun)
        return times

    def profile(self, log: Path) -> Step:
        """Where the time of some steps goes, a step. log: a file for the list of kernels."""
        count = PROFILED
        self.start()
        self.steps(2)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            self.steps(count)
            synchronize(self.device)
        spans = [
            (event.time_range.start, event.time_range.end, event.name)
            for event in prof.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and "Memset" not in event.name
        ]
        names: dict[str, list[float]] = {}
        for begin, end, name in spans:
            names.setdefault(name, []).append(end - begin)
        told = sorted(names.items(), key=lambda item: -sum(item[1]))
        lines = [f"{sum(t) / count:10.1f} us/step {len(t) / count:7.1f} x  {n[:150]}" for n, t in told[:40]]
        log.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return dissect(spans, count)


def dissect(spans: list[tuple[float, float, str]], count: int) -> Step:
    """The Step of kernels (start, end, name) in us, which may overlap: what began first has the time."""
    parts = {"linear": 0.0, "attention": 0.0, "rest": 0.0}
    gaps, reached = 0.0, None
    for begin, end, name in sorted(spans):
        lower = name.lower()
        kind = next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "rest")
        if name.startswith("triton_"):  # Inductor's own, named after what they fuse
            kind = "rest"
        reached = begin if reached is None else reached
        gaps += max(0.0, begin - reached)
        parts[kind] += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    each = {kind: us / count for kind, us in parts.items()}
    return Step(**each, gaps=gaps / count, kernels=len(spans) // count)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def prepared(kind: str, shapes: str, device: torch.device, attention: str, fuse: bool) -> Any:
    """The model with a kind of weights."""
    model = build(shapes, device, attention)
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    elif not kind.startswith("torch"):
        vecmat.convert(model, kind, fuse=fuse)
    return model


def check(model: Any, decoder: Decoder, folder: Path) -> None:
    """Compare a first step's logits with those of the same weights in fp32; end where compiling made them worse.

    bf16 rounds at other places in compiled code; that may cost half as much again as in eager mode.
    """
    with FileLock(folder / "check.lock"):  # one fp32 model at a time
        wide = Decoder(copy.deepcopy(model).float(), decoder.batch, compiled=False)
        truth = wide.first(wide.step)
        del wide
        gc.collect()
        if decoder.device.type == "cuda":
            torch.cuda.empty_cache()
    eager, compiled = (float((decoder.first(run) - truth).norm() / truth.norm()) for run in (decoder.step, decoder.run))
    print(f"batch {decoder.batch}: of the norm from fp32's logits: compiled {compiled:.4f}, eager {eager:.4f}")
    if not compiled <= 1.5 * eager + 0.01:
        sys.exit("compiling made them worse")


def turn() -> None:
    """Wait until it is this process's turn."""
    print(READY, flush=True)
    sys.stdin.readline()


@torch.no_grad()
def run(args: argparse.Namespace, device: torch.device) -> None:
    """One kind of weights, the child's part: per batch size compiled and warm, then timed in turn; profiled at last."""
    begun = time.perf_counter()
    if args.inductor == "fast":
        inductor.combo_kernels = True
        inductor.triton.enable_pdl = True
    model = prepared(args.weights, args.shapes, device, args.attention, args.fuse)
    rows: list[tuple[Decoder, dict[str, Any]]] = []
    for batch in map(int, args.batch.split(",")):
        decoders = [Decoder(model, batch, compiled=True)]
        decoders += [Decoder(model, batch, compiled=False)] if args.weights == "torch" and args.eager else []
        differs = [decoder.differ() for decoder in decoders]
        if args.check:
            check(model, decoders[0], args.out.parent)
        for decoder in decoders:
            decoder.start()
            decoder.steps(4)
        ready = time.perf_counter() - begun
        turn()
        for decoder, far in zip(decoders, differs, strict=True):
            row = measure(args, decoder, far)
            rows.append((decoder, row))
            told = [f"{row[name]:8.3f}" for name in ("step_ms", "fastest_ms", "slowest_ms")]
            print(f"{row['weights']:<13} {batch:5} {row['tokens_per_s']:9}", *told, f"{far:8.4f} {row['memory_gb']:6}",
                  f"{ready:8.1f}")  # fmt: skip
        print(DONE, flush=True)
    turn()
    for decoder, row in rows:
        step = Step(linear=0, attention=0, rest=0, gaps=0, kernels=0)
        if device.type == "cuda":
            step = decoder.profile(args.out.parent / f"profile-{row['weights'].replace(':', '_')}-{decoder.batch}.txt")
        found = {f"{name}_us": round(getattr(step, name)) for name in ("linear", "attention", "rest", "gaps")}
        print(f"{row['weights']:<13} {decoder.batch:5}", *(f"{us:9}" for us in found.values()), f"{step.kernels:9}")
        with args.out.open("a", newline="", encoding="utf-8") as file:
            row |= found | {"kernels": step.kernels}
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
    print(DONE, flush=True)


def measure(args: argparse.Namespace, decoder: Decoder, differs: float) -> dict[str, Any]:
    """What is measured of a decoder that is warm."""
    times = decoder.seconds()
    step_s = statistics.median(times) / STEPS
    memory = sum(t.nbytes for t in (*decoder.model.parameters(), *decoder.model.buffers()))
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if decoder.device.type == "cuda" else "CPU",
        "vecmat": vecmat.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "shapes": args.shapes, "weights": args.weights if decoder.compiled else f"{args.weights}-eager",
        "fused": args.fuse and not args.weights.startswith("torch"), "attention": args.attention,
        "inductor": args.inductor, "batch": decoder.batch,
        "tokens_per_s": round(decoder.batch / step_s, 1), "step_ms": round(step_s * 1e3, 4),
        "fastest_ms": round(min(times) / STEPS * 1e3, 4), "slowest_ms": round(max(times) / STEPS * 1e3, 4),
        "differs": round(differs, 5), "memory_gb": round(memory / 1e9, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--weights", default="torch,bf16,int8,int4")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--attention", choices=("sdpa", "packed"), default="sdpa")
    parser.add_argument("--inductor", choices=("default", "fast"), default="default")
    parser.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True, help="torch without compiling")
    parser.add_argument("--check", action="store_true", help="compare with fp32, too (minutes)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/models.csv"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.child:
        run(args, device)
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{args.shapes} on {name}, torch {torch.__version__}, fuse={args.fuse}, {args.attention}, "
        f"Inductor's options: {args.inductor}, cache {CACHE}"
    )
    options = ["--child", "--shapes", args.shapes, "--batch", args.batch, "--out", str(args.out)]
    options += ["--attention", args.attention, "--inductor", args.inductor]
    options += ["--fuse" if args.fuse else "--no-fuse", "--eager" if args.eager else "--no-eager"]
    options += ["--check"] if args.check else []
    children = [
        subprocess.Popen([sys.executable, __file__, *options, "--weights", kind], text=True, bufsize=1,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for kind in args.weights.split(",")
    ]  # fmt: skip
    print("\nweights       batch  tokens/s  ms/step  fastest  slowest  differs     GB  ready s")
    for batch in args.batch.split(","):
        together(children, f"batch {batch}")
    print("\nus of a step: batch    linear attention      rest      gaps   kernels")
    together(children, "profile")
    sys.exit(max(child.wait() for child in children))


def together(children: list[Any], what: str) -> None:
    """Let every child get ready, then each do its part while the others wait; what they print is printed."""
    for child, go in [(child, False) for child in children] + [(child, True) for child in children]:
        if go and child.poll() is None:
            child.stdin.write(f"{what}\n")
            child.stdin.flush()
        while (line := child.stdout.readline()) not in ("", f"{DONE if go else READY}\n"):
            print(line, end="", flush=True)


if __name__ == "__main__":
    main()
