"""A whole model's decoding speed on a GPU: ``python benchmarks/model.py --shapes llama-3-8b --weights bf16,int8,int4``.

A Llama of the given shapes with random weights, made on the device, in bf16. Each kind of weights is decoded greedily
through ``transformers`` with a static cache, the whole step compiled by ``torch.compile(mode="reduce-overhead",
fullgraph=True)``: a prompt, then 60 steps, in rounds; the median round counts. Kinds: bf16, int8, int4, fp8 and the
like are ``vecmat.convert`` of every linear layer, the head included; "torch" is the model as it is, also without
compiling; "torchao-int8" its weight-only quantisation. Where a step's time goes is read from torch's
profiler: the union of the kernels' times by kind, and the gaps between kernels.

Each kind has a process of its own; they build and compile at the same time, and are timed one after the other once all
are ready. Before that the first step's logits are compared with those of the same weights in fp32. Tune first what the
tables may lack: ``vecmat tune --shapes 4096,6144 4096,28672 --m 1,16 --weights bf16,int8,int4`` are the fused shapes.
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
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import vecmat

SHAPES = {
    "llama-3-8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                       num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "llama-3.2-1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=128256, rope_theta=500000.0),
    "tiny": dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=512),
}  # fmt: skip
CACHE, PROMPT, STEPS, ROUNDS = 256, 64, 60, 5
READY = "ready"
HEAD = """                                          us of a step in                  far from fp32
weights       batch  tokens/s  ms/step |  linear attention    rest    gaps | kernels compiled  eager    GB  ready"""
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


def build(shapes: str, device: torch.device) -> Any:
    config = LlamaConfig(**SHAPES[shapes], max_position_embeddings=8192, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


class Decoder:
    """A model with its cache. One step is a forward of a token (B, 1), compiled if asked for, and the next token."""

    def __init__(self, model: Any, batch: int, compiled: bool) -> None:
        self.model, self.device, self.compiled = model, model.device, compiled
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        names = inspect.signature(type(model).forward).parameters
        self.kwargs = {"cache" if "cache" in names else "past_key_values": self.cache, "use_cache": True}
        self.prompt = torch.arange(batch * PROMPT, device=self.device).view(batch, PROMPT) % model.config.vocab_size
        mode: Any = {"mode": "reduce-overhead"} if self.device.type == "cuda" else {}
        self.run = torch.compile(self.logits, fullgraph=True, dynamic=False, **mode) if compiled else self.logits

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        return self.model(input_ids=token, position_ids=position, **self.kwargs).logits[:, -1]

    def fill(self) -> tuple[Tensor, Tensor]:
        """The cache holds the prompt anew, computed in eager mode: a token after it, and its position."""
        self.cache.reset()
        position = torch.arange(PROMPT, device=self.device)[None].expand(self.prompt.shape[0], -1)
        self.logits(self.prompt, position)
        return self.prompt[:, :1].clone(), position[:, -1:] + 1

    def steps(self, count: int, token: Tensor, position: Tensor) -> Tensor:
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            token = self.run(token, position).argmax(-1, keepdim=True)
            position = position + 1
        return token

    def seconds(self) -> list[float]:
        """Of each round of STEPS."""
        times = []
        for _ in range(ROUNDS):
            start = self.fill()
            synchronize(self.device)
            begun = time.perf_counter()
            self.steps(STEPS, *start)
            synchronize(self.device)
            times.append(time.perf_counter() - begun)
        return times

    def profile(self, log: Path | None) -> Step:
        """Where the time of ten steps goes, a step."""
        count, start = 10, self.fill()
        self.steps(2, *start)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
            self.steps(count, *start)
            synchronize(self.device)
        spans = [
            (event.time_range.start, event.time_range.end, event.name)
            for event in prof.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and "Memset" not in event.name
        ]
        if log is not None:
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


def prepared(kind: str, shapes: str, device: torch.device, fuse: bool) -> Any:
    """The model with a kind of weights."""
    model = build(shapes, device)
    if kind == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    elif not kind.startswith("torch"):
        vecmat.convert(model, kind, fuse=fuse)
    return model


def checked(decoder: Decoder, wide: Tensor | None) -> tuple[float, float]:
    """How far the first step's logits are from fp32's, relative to their norm: compiled, and in eager mode.

    Both compute in bf16, with the same weights, and round at other places; compiling may cost half as much again.
    """
    eager = decoder.logits(*decoder.fill()).float()
    compiled = decoder.run(*decoder.fill()).float()
    if wide is None:  # torchao's weights have no fp32 twin here
        return float((compiled - eager).norm() / eager.norm()), 0.0
    far = [float((got - wide).norm() / wide.norm()) for got in (compiled, eager)]
    if not far[0] <= 1.5 * far[1] + 0.01:
        sys.exit(f"compiled logits are {far[0]:.4f} of their norm from fp32's, eager ones {far[1]:.4f}")
    return far[0], far[1]


@torch.no_grad()
def run(args: argparse.Namespace, device: torch.device, device_name: str) -> None:
    """One kind of weights: everything compiled and warm, then timed when it is this process's turn."""
    kind, begun = args.weights, time.perf_counter()
    model = prepared(kind, args.shapes, device, args.fuse)
    batches = [int(batch) for batch in args.batch.split(",")]
    wides: list[Tensor | None] = [None] * len(batches)
    if not kind.startswith("torchao"):
        with FileLock(args.out.with_suffix(".lock")):  # one fp32 model at a time
            wide = copy.deepcopy(model).float()
            wides = [(each := Decoder(wide, batch, compiled=False)).logits(*each.fill()) for batch in batches]
            del wide, each
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    decoders = [Decoder(model, batch, compiled=True) for batch in batches]
    if kind == "torch":
        decoders += [Decoder(model, batch, compiled=False) for batch in batches]
        wides *= 2
    fars = [checked(decoder, wide) for decoder, wide in zip(decoders, wides, strict=True)]
    for decoder in decoders:
        decoder.steps(4, *decoder.fill())
    ready_s = time.perf_counter() - begun
    print(READY, flush=True)
    sys.stdin.readline()
    for decoder, far in zip(decoders, fars, strict=True):
        kind = args.weights if decoder.compiled else f"{args.weights}-eager"
        row = {"date": datetime.date.today().isoformat(), "device": device_name, "vecmat": vecmat.__version__,
               "torch": torch.__version__, "shapes": args.shapes, "weights": kind, "fused": args.fuse}  # fmt: skip
        row |= measure(
            decoder, far, args.out.parent / f"profile-{kind.replace(':', '_')}-{decoder.prompt.shape[0]}.txt"
        )
        with args.out.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, row)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        print(
            f"{kind:<13} {row['batch']:5} {row['tokens_per_s']:9} {row['step_ms']:8.3f} | {row['linear_us']:7} "
            f"{row['attention_us']:9} {row['rest_us']:7} {row['gaps_us']:7} | {row['kernels']:7} {far[0]:8.4f} "
            f"{far[1]:6.4f} {row['memory_gb']:5} {ready_s:6.1f}",
            flush=True,
        )


def measure(decoder: Decoder, far: tuple[float, float], log: Path) -> dict[str, Any]:
    """What is measured of a decoder that is warm. log: where its kernels are listed."""
    times = decoder.seconds()
    step_s, batch = statistics.median(times) / STEPS, decoder.prompt.shape[0]
    step = Step(linear=0, attention=0, rest=0, gaps=0, kernels=0)
    if decoder.device.type == "cuda":
        step = decoder.profile(log)
    memory = sum(t.nbytes for t in (*decoder.model.parameters(), *decoder.model.buffers()))
    return {
        "batch": batch, "tokens_per_s": round(batch / step_s, 1), "step_ms": round(step_s * 1e3, 4),
        "fastest_ms": round(min(times) / STEPS * 1e3, 4), "slowest_ms": round(max(times) / STEPS * 1e3, 4),
        "linear_us": round(step.linear), "attention_us": round(step.attention), "rest_us": round(step.rest),
        "gaps_us": round(step.gaps), "kernels": step.kernels, "far": round(far[0], 5), "eager_far": round(far[1], 5),
        "memory_gb": round(memory / 1e9, 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--weights", default="torch,bf16,int8,int4")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/models.csv"))
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if args.child:
        run(args, device, name)
        return
    print(f"{args.shapes} on {name}, torch {torch.__version__}, fuse={args.fuse}; prompt {PROMPT}, cache {CACHE}")
    print(HEAD)
    options = ["--child", "--shapes", args.shapes, "--batch", args.batch, "--out", str(args.out)]
    options += ["--fuse" if args.fuse else "--no-fuse"]
    children = [
        subprocess.Popen([sys.executable, __file__, *options, "--weights", kind], text=True, bufsize=1,
                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for kind in args.weights.split(",")
    ]  # fmt: skip
    for child in children:  # nothing is timed while another compiles
        while (line := child.stdout.readline()) not in ("", f"{READY}\n"):
            print(line, end="", flush=True)
    for child in children:
        if child.poll() is None:
            child.stdin.write("\n")
            child.stdin.close()
            for line in child.stdout:
                print(line, end="", flush=True)
        child.wait()
    sys.exit(max(child.returncode for child in children))


if __name__ == "__main__":
    main()
