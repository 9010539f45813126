"""A language model before and after ``convert``: its text, its speed, its size and how far its logits moved."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from importlib import resources
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .decoding import Compiled, Eager
from .fusing import Part
from .linear import Product
from .models import Advance
from .nn import Linear, convert, linear_layers
from .ops import explain
from .problem import DTYPES, Format

PROMPT = "Please explain to a curious child why the sky is blue during the day and red in the evening."
MOST_SCORED = 512
MOST_KEPT_MB = 4000.0  # a model up to this size keeps its original layers too, to be timed in turns with the others
TURNS, TURN_TOKENS = 6, 12


Decode = Callable[[Tensor, int, Any], None]  # (prompt's ids, most new tokens, streamer or None)


class Watcher(Protocol):
    """What ``compare`` tells while it works."""

    def stage(self, title: str) -> AbstractContextManager[Advance]:
        """Context of one stage of work; yields a callable (done, total) for its progress."""

    def begin(self, title: str) -> None:
        """A generated text starts."""

    def text(self, piece: str) -> None:
        """The next words of it."""

    def end(self) -> None:
        """It is complete."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One model measured. prompt_s: seconds until the first token. step_s: median seconds of each token after it.

    step_s is None where there was one token only; a median, because another program's burst is not the model's time.
    megabytes: its parameters and buffers, 1e6 bytes, each tensor once. packed_megabytes: copies that kernels keep in
    an order of their own. perplexity: over the passage.
    """

    text: str
    tokens: int
    prompt_s: float
    step_s: float | None
    megabytes: float
    packed_megabytes: float
    perplexity: float

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens a second, the first token (the prompt's) apart; None if there was no other."""
        return 1 / self.step_s if self.step_s else None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """What ran for one kind of layer and m rows of x.

    layers: their count. names: their last components; of joined layers the first's, with a plus. decided_by: the rung
    of the ladder. runner_up: the kernel with the next lowest estimate, None if there is no other.
    """

    layers: int
    names: str
    n: int
    k: int
    weights: str
    m: int
    kernel: str
    estimate_us: float
    decided_by: str
    runner_up: str | None
    runner_up_us: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both sides, and what lies between them.

    kl: mean over the passage's tokens of KL(before || after), in nats. converted, linear: layers that go through
    vecmat, and linear layers in all.
    """

    before: Side
    after: Side
    kl: float
    scored_tokens: int
    prompt_tokens: int
    converted: int
    linear: int
    kernels: list[KernelRow]

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        value = dataclasses.asdict(self)
        for name, side in (("before", self.before), ("after", self.after)):
            value[name]["tokens_per_s"] = side.tokens_per_s
        return value


def check_options(weights: str, group_size: int | None, compute: str | None, max_new_tokens: int) -> None:
    """Raise ``ValueError`` for options that cannot work, before a model is loaded for them."""
    Format.make(weights, 32 if weights == "int4" and group_size is None else group_size)
    if compute == "fp8" and (weights != "fp8" or group_size is not None):
        raise ValueError("run: --compute fp8 needs --weights fp8 without a group size")
    if compute == "int8" and weights not in ("int8", "int4"):
        raise ValueError("run: --compute int8 needs --weights int8 or int4")
    if max_new_tokens < 1:
        raise ValueError(f"run: --max-new-tokens is {max_new_tokens}; expected 1 or more")


def default_dtype(weights: str) -> str:
    """The dtype of both models where none is asked for: the weights' own if they are dense, else bf16."""
    return weights if weights in DTYPES else "bf16"


def compare(
    model: Any,
    tokenizer: Any,
    weights: str = "int8",
    *,
    group_size: int | None = None,
    compute: str | None = None,
    untie: bool = False,
    fuse: bool = False,
    compiled: bool = False,
    prompt: str = PROMPT,
    max_new_tokens: int = 64,
    watcher: Watcher,
) -> Comparison:
    """The Comparison of a ``transformers`` causal language model with itself after ``convert``, which it goes through.

    weights, group_size, compute, untie, fuse: as for ``vecmat.convert``. compiled: the converted model's steps go
    through ``torch.compile`` (``decoding.Compiled``); the original's do not. prompt: goes through the tokenizer's chat
    template if it has one. Decoding is greedy; a short run before each timed one takes the costs of a first call
    (packed weights, compiled kernels) out of its figures. A model of up to ``MOST_KEPT_MB`` is then timed with its
    original and its converted layers in turns, and these times are the ones reported.
    """
    device = next(model.parameters()).device
    ids = _prompt_ids(tokenizer, prompt).to(device)
    passage = _passage_ids(tokenizer, model).to(device)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] + max_new_tokens > longest:
        raise ValueError(
            f"run: {ids.shape[1]} prompt tokens and {max_new_tokens} new ones are more than the model's {longest}"
        )
    linear = sum(_is_linear(module) for module in model.modules())
    originals = linear_layers(model) if megabytes(model) <= MOST_KEPT_MB else {}
    eager = Eager(model)
    before, logits = _measure(model, eager, tokenizer, ids, max_new_tokens, passage, "before", watcher)
    with watcher.stage(f"converting to {weights}") as advance:
        convert(
            model, weights, group_size=group_size, compute=compute, untie=untie, fuse=fuse,
            progress=lambda name, done, total: advance(done, total),
        )  # fmt: skip
    with watcher.stage("packing weights"), _recorded(model) as shapes:
        _warm_up(eager, ids)
    decode = Compiled(model, ids.shape[1] + max(3, max_new_tokens)) if compiled else eager
    title = f"after converting to {weights}{', compiled' if compiled else ''}"
    after, moved = _measure(model, decode, tokenizer, ids, max_new_tokens, passage, title, watcher)
    if originals and max_new_tokens > 1:
        with watcher.stage("timing both in turns") as advance:
            spans = _in_turns(model, originals, (eager, decode), ids, min(max_new_tokens, TURN_TOKENS), advance)
        before, after = (
            dataclasses.replace(side, prompt_s=statistics.median(own[0]), step_s=statistics.median(own[1]))
            for side, own in zip((before, after), spans, strict=True)
        )
    return Comparison(
        before=before,
        after=after,
        kl=mean_kl(logits, moved),
        scored_tokens=passage.shape[1],
        prompt_tokens=ids.shape[1],
        converted=sum(isinstance(module, Linear) for module in model.modules()),
        linear=linear,
        kernels=kernel_rows(model, shapes),
    )


def _measure(
    model: Any, decode: Decode, tokenizer: Any, ids: Tensor, max_new_tokens: int, passage: Tensor, title: str,
    watcher: Watcher,
) -> tuple[Side, Tensor]:  # fmt: skip
    """The Side of a model, and its logits (tokens, vocabulary) for the passage."""
    with watcher.stage("compiling" if isinstance(decode, Compiled) else "warming up"):
        _warm_up(decode, ids)
    watcher.begin(title)
    text, spans = generate(decode, tokenizer, ids, max_new_tokens, watcher.text)
    watcher.end()
    with watcher.stage("scoring the passage"), torch.inference_mode():
        logits = model(input_ids=passage, use_cache=False).logits[0]
    side = Side(
        text=text, tokens=len(spans), prompt_s=spans[0], step_s=statistics.median(spans[1:]) if spans[1:] else None,
        megabytes=megabytes(model), packed_megabytes=packed_megabytes(model),
        perplexity=perplexity(logits, passage[0]),
    )  # fmt: skip
    return side, logits


def _in_turns(
    model: Any, originals: dict[str, nn.Module], decoders: Sequence[Decode], ids: Tensor, tokens: int, advance: Advance
) -> list[tuple[list[float], list[float]]]:
    """For the model with its original layers, then with the converted ones: seconds of each prompt and of each step.

    decoders: what each of the two decodes with.
    The two take turns, so that a slow moment of the machine falls on both. The model is left converted.
    """
    converted = {name: model.get_submodule(name) for name in originals}
    spans: list[tuple[list[float], list[float]]] = [([], []), ([], [])]
    for turn in range(TURNS):
        for layers, decode, (prompts, steps) in zip((originals, converted), decoders, spans, strict=True):
            for name, layer in layers.items():
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, layer)
            clock = _Clock(None, lambda piece: None)
            decode(ids, tokens, clock)
            prompts.append(clock.spans[0])
            steps += clock.spans[1:] or clock.spans  # a model that stops at once has no other step
        advance(turn + 1, TURNS)
    return spans


def _prompt_ids(tokenizer: Any, prompt: str) -> Tensor:
    if not prompt.strip():
        raise ValueError("run: --prompt is empty; expected some text")
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        ids = tokenizer(prompt, return_tensors="pt")
    found: Tensor = ids["input_ids"]
    return found


def _passage_ids(tokenizer: Any, model: Any) -> Tensor:
    text = resources.files(__package__).joinpath("data").joinpath("passage.txt").read_text(encoding="utf-8")
    most = min(MOST_SCORED, getattr(model.config, "max_position_embeddings", None) or MOST_SCORED)
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][:, :most]
    return ids


class _Clock:
    """A streamer that passes tokens on as text and keeps the times, its own work left out."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        from transformers import TextStreamer

        self._words: Any = None  # without a tokenizer only the times are kept
        if tokenizer is not None:
            self._words = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self._words.on_finalized_text = lambda text, stream_end=False: say(text) if text else None
        self._since = 0.0
        self.spans: list[float] = []  # seconds before each token; the first is the prompt's

    def put(self, value: Tensor) -> None:
        if self._since:
            self.spans.append(time.perf_counter() - self._since)
        if self._words is not None:
            self._words.put(value)
        self._since = time.perf_counter()

    def end(self) -> None:
        if self._words is not None:
            self._words.end()


def generate(
    decode: Decode, tokenizer: Any, ids: Tensor, max_new_tokens: int, say: Callable[[str], None]
) -> tuple[str, list[float]]:
    """The text, decoded greedily, and the seconds that each of its tokens took; the first one's are the prompt's.

    ids: the prompt, (1, tokens). say: called with the text as it comes, a few words at a time.
    """
    pieces: list[str] = []

    def tell(piece: str) -> None:
        pieces.append(piece)
        say(piece)

    clock = _Clock(tokenizer, tell)
    decode(ids, max_new_tokens, clock)
    return "".join(pieces).strip(), clock.spans


def _warm_up(decode: Decode, ids: Tensor) -> None:
    decode(ids, 3, None)


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[dict[str, set[tuple[int, torch.dtype]]]]:
    """Context that yields, by layer name, the (rows of x, dtype) that each product of vecmat is called with."""
    shapes: dict[str, set[tuple[int, torch.dtype]]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, Product) and not isinstance(module, Part):

            def record(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                shapes.setdefault(name, set()).add((args[0].numel() // args[0].shape[-1], args[0].dtype))

            hooks.append(module.register_forward_pre_hook(record))
    try:
        yield shapes
    finally:
        for hook in hooks:
            hook.remove()


def kernel_rows(model: nn.Module, shapes: dict[str, set[tuple[int, torch.dtype]]]) -> list[KernelRow]:
    """What runs for the shapes that layers were called with: one row per kind of layer and M, single rows first."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, seen in shapes.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, Product)
        about = (layer.out_features, layer.in_features, str(layer.format), layer.bias is not None, layer.compute)
        for m, dtype in seen:
            alike.setdefault((m, *about, dtype), []).append(name)
    rows = []
    for (m, n, k, weights, _, compute, dtype), names in alike.items():
        layer = model.get_submodule(names[0])
        assert isinstance(layer, Product)
        weight = layer.stored()
        with torch.inference_mode():
            told = explain(torch.empty(m, k, dtype=dtype, device=weight.device), weight, layer.bias, compute=compute)
        chosen, *others = [c for c in told.candidates if c.reason is None]
        rows.append(
            KernelRow(
                layers=len(names),
                names=", ".join(dict.fromkeys(_short(name) for name in names)),
                n=n,
                k=k,
                weights=weights,
                m=m,
                kernel=chosen.kernel,
                estimate_us=chosen.estimate_us,
                decided_by=told.plan.decided_by,
                runner_up=others[0].kernel if others else None,
                runner_up_us=others[0].estimate_us if others else None,
            )
        )
    return sorted(rows, key=lambda row: (row.m, -row.layers * row.n * row.k))


def _short(name: str) -> str:
    """The last component of a layer's name; "q_proj+" for the product that q_proj and its neighbours became."""
    last = name.removesuffix(".joined").rpartition(".")[2]
    return f"{last}+" if name.endswith(".joined") else last


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def megabytes(model: nn.Module) -> float:
    """The model's parameters and buffers in 1e6 bytes, each tensor once."""
    return _distinct([*model.parameters(), *model.buffers()]) / 1e6


def packed_megabytes(model: nn.Module) -> float:
    """What kernels keep beside the weights, in 1e6 bytes: copies in an order of their own."""
    own = [*model.parameters(), *model.buffers()]
    packs = [
        tensor for layer in model.modules() if isinstance(layer, Product) for tensor in _tensors(layer.stored().packs)
    ]
    return (_distinct([*own, *packs]) - _distinct(own)) / 1e6


def _distinct(tensors: list[Tensor]) -> int:
    """Bytes of the tensors, one that shares another's memory counted once."""
    places = {id(t) if t.is_mkldnn else (t.device, t.data_ptr()): t.nbytes for t in tensors}  # oneDNN's have no address
    return sum(places.values())


def _tensors(pack: Any) -> Iterator[Tensor]:
    """The tensors inside a pack: a tensor, plain containers of them, or an object that lists its ``tensors``."""
    pack = getattr(pack, "tensors", pack)
    if isinstance(pack, Tensor):
        yield pack
    elif isinstance(pack, dict | list | tuple):
        for part in pack.values() if isinstance(pack, dict) else pack:
            yield from _tensors(part)


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of ids[1:] under logits (tokens, vocabulary)."""
    total = 0.0
    for rows, following in zip(torch.split(logits[:-1], 64), torch.split(ids[1:], 64), strict=True):
        total += float(nn.functional.cross_entropy(rows.float(), following, reduction="sum"))
    return math.exp(total / max(1, len(ids) - 1))


def mean_kl(before: Tensor, after: Tensor) -> float:
    """Mean over rows of KL(softmax(before) || softmax(after)) in nats, for logits (tokens, vocabulary)."""
    total = 0.0
    for p, q in zip(torch.split(before, 64), torch.split(after, 64), strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(before)
