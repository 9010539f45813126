"""A whole model's decoding speed on a GPU: ``python benchmarks/model.py --shapes llama-3-8b --weights bf16,int8,int4``.

A Llama of the given shapes with random weights, made on the device, in bf16. Each kind of weights is decoded greedily
through ``transformers`` with a static cache, the whole step compiled by ``torch.compile(mode="reduce-overhead",
fullgraph=True)``: a prompt, then 60 steps, in rounds; the median round counts. Kinds: bf16, int8, int4, fp8 and the
like are ``vecmat.convert`` of every linear layer, the head included; "torch" is the model as it is, "torch-eager"
the same without compiling, "torchao-int8" its weight-only quantisation. Where a step's time goes is read from torch's
profiler: the union of the kernels' times by kind, and the gaps between kernels.

Before a kind is timed its first logits are compared with those of the same model in eager mode.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import datetime
import gc
import inspect
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
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
    """A model with its cache. step(token (B, 1)) is one forward and the next token, compiled if asked for."""

    def __init__(self, model: Any, batch: int, compiled: bool) -> None:
        self.model, self.device = model, model.device
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        names = inspect.signature(type(model).forward).parameters
        self.kwargs = {"cache" if "cache" in names else "past_key_values": self.cache, "use_cache": True}
        self.prompt = torch.arange(batch * PROMPT, device=self.device).view(batch, PROMPT) % model.config.vocab_size
        mode: Any = {"mode": "reduce-overhead"} if self.device.type == "cuda" else {}
        self.run = torch.compile(self.logits, fullgraph=True, dynamic=False, **mode) if compiled else self.logits

    def logits(self, token: Tensor, position: Tensor) -> Tensor:
        return self.model(input_ids=token, position_ids=position, **self.kwargs).logits[:, -1]

    def fill(self) -> tuple[Tensor, Tensor]:
        """The cache holds the prompt anew: the token after it, and its position."""
        self.cache.reset()
        position = torch.arange(PROMPT, device=self.device)[None].expand(self.prompt.shape[0], -1)
        token = self.logits(self.prompt, position).argmax(-1, keepdim=True)
        return token, position[:, -1:] + 1

    def steps(self, count: int, token: Tensor, position: Tensor) -> Tensor:
        for _ in range(count):
            torch.compiler.cudagraph_mark_step_begin()
            token = self.run(token, position).argmax(-1, keepdim=True)
            position = position + 1
        return token

    def disagreement(self) -> float:
        """How far the first step's logits are from an eager call's, relative to their norm."""
        expected = self.logits(*self.fill()).float()
        got = self.run(*self.fill()).float()
        return float((got - expected).norm() / expected.norm())

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--weights", default="torch-eager,torch,bf16,int8,int4")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--tune", type=float, default=0.0, help="seconds to tune what the tables lack, for each row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/models.csv"))
    parser.add_argument("--budget", type=float, default=0.0, help="seconds after which no row is begun")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{args.shapes} on {name}, torch {torch.__version__}, fuse={args.fuse}; prompt {PROMPT}, cache {CACHE}")
    print(f"{'us of a step in':>57}")
    print(
        "weights       batch  tokens/s  ms/step |  linear attention    rest    gaps | kernels  differs    GB  ready s"
    )
    begun = time.perf_counter()
    for kind in args.weights.split(","):
        model = None
        for batch in map(int, args.batch.split(",")):
            if args.budget and time.perf_counter() - begun > args.budget:
                print(f"{kind:<13} {batch:5}  not begun: out of time")
                continue
            if model is None:
                model = prepared(kind, args.shapes, device, args.fuse)
            row = measure(model, kind, batch, args, name)
            with args.out.open("a", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, row)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
        del model
        gc.collect()
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


@torch.no_grad()
def measure(model: Any, kind: str, batch: int, args: argparse.Namespace, device_name: str) -> dict[str, Any]:
    """One row of the table, printed."""
    begun = time.perf_counter()
    decoder = Decoder(model, batch, compiled=kind != "torch-eager")
    if args.tune and not kind.startswith("torch"):
        start = decoder.fill()
        with vecmat.tuning(budget_s=args.tune):
            decoder.logits(*start)
    differs = decoder.disagreement()
    if not differs < 0.05:
        sys.exit(f"{kind}, batch {batch}: compiled and eager logits differ by {differs:.3f} of their norm")
    decoder.steps(4, *decoder.fill())
    ready = time.perf_counter() - begun
    times = decoder.seconds()
    step_s = statistics.median(times) / STEPS
    log = args.out.parent / f"profile-{kind.replace(':', '_')}-{batch}.txt"
    step = Step(linear=0, attention=0, rest=0, gaps=0, kernels=0)
    if decoder.device.type == "cuda":
        step = decoder.profile(log)
    memory = torch.cuda.memory_allocated() / 1e9 if decoder.device.type == "cuda" else 0.0
    print(
        f"{kind:<13} {batch:5} {batch / step_s:9.1f} {step_s * 1e3:8.3f} | {step.linear:7.0f} {step.attention:9.0f} "
        f"{step.rest:7.0f} {step.gaps:7.0f} | {step.kernels:7} {differs:8.4f} {memory:5.1f} {ready:6.1f}",
        flush=True,
    )
    return {
        "date": datetime.date.today().isoformat(), "device": device_name, "vecmat": vecmat.__version__,
        "torch": torch.__version__, "shapes": args.shapes, "weights": kind, "fused": args.fuse, "batch": batch,
        "tokens_per_s": round(batch / step_s, 1), "step_ms": round(step_s * 1e3, 4),
        "fastest_ms": round(min(times) / STEPS * 1e3, 4), "slowest_ms": round(max(times) / STEPS * 1e3, 4),
        "linear_us": round(step.linear), "attention_us": round(step.attention), "rest_us": round(step.rest),
        "gaps_us": round(step.gaps), "kernels": step.kernels, "logits_differ": round(differs, 5),
        "memory_gb": round(memory, 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
