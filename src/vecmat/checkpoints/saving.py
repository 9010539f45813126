"""convert(): a checkpoint into one of vecmat's own, a shard at a time."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..nn import Linear
from ..problem import Format
from .gguf import GgufFile
from .loading import by_transformers
from .quantization import Quantization
from .reading import IncompleteError, Plan, Progress, model_config, skeleton
from .safe import faults_of, inside
from .source import Folder, from_memory, open_source

SHARD_BYTES = 2 * 10**9
# What of a folder is copied as it is: how text becomes tokens, and how it is generated.
_COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
# What of config.json is not: what the file says of its own format, and names of code.
_DROPPED = (
    "quantization_config", "compression_config", "torch_dtype", "auto_map", "attn_implementation",
    "_attn_implementation", "experts_implementation", "_experts_implementation",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What was written.

    formats: of each linear layer. ordered: those with a ``weight_order``. nbytes: of all tensors. files: the shards'.
    """

    formats: dict[str, Format]
    ordered: list[str]
    nbytes: int
    files: list[str]


def convert(source: str | Path, out: str | Path, weights: str | None = None, *, group_size: int | None = None,
            symmetric: bool = True, dtype: torch.dtype | None = None, skip: Iterable[str] = (),
            shard_bytes: int = SHARD_BYTES, progress: Progress | None = None) -> Converted:  # fmt: skip
    """What was written: the checkpoint ``source`` as a folder ``out`` that ``load`` reads without quantising again.

    source, weights, dtype: as for ``load``; weights may be None for a checkpoint that is quantised. group_size,
    symmetric, skip: as for ``vecmat.convert``. out: a folder that does not exist, or is empty; it appears when it is
    complete. shard_bytes: of tensors a file. progress: called with (name, done, total).

    The folder has safetensors in ``vecmat.Linear``'s state_dict layout, config.json with a ``quantization_config`` of
    ``quant_method`` "vecmat" (see ``checkpoints/quantization.py``), and the tokenizer. Memory: one shard and one layer
    (the whole model, once, for a mixture of experts whose experts transformers fuses).

    Raises what ``load`` raises, ``ValueError`` for an ``out`` that is there, ``OSError`` if it cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"convert: {out} is there already; expected a folder that is new or empty")
    if shard_bytes < 1:
        raise ValueError(f"convert: shard_bytes is {shard_bytes}; expected 1 or more")
    if isinstance(skip, str):
        raise TypeError(f"convert: skip is {skip!r}; expected a list of names, such as [{skip!r}]")
    options: dict[str, Any] = {"group_size": group_size, "symmetric": symmetric, "skip": tuple(skip)}
    with open_source(source) as opened, models.quiet(lambda done, total: None):
        if weights is None and not opened.quantised:
            raise ValueError(f"convert: {source} is not quantised; name a format, such as 'int8'")
        config, chosen = model_config(opened, dtype, weights)
        bare = skeleton(opened, copy.deepcopy(config), chosen, buffers=False)
        try:
            plan = Plan(opened, bare, weights, **options)
        except IncompleteError as error:
            whole = by_transformers(opened, config, bare, error)
            kept = from_memory(Path(opened.where), opened.config_dict(), whole.state_dict())
            plan = Plan(kept, bare, weights, **options)
        out.parent.mkdir(parents=True, exist_ok=True)
        made = out.parent / f".{out.name}.{secrets.token_hex(4)}"
        made.mkdir()
        try:
            written = _write(plan, made, shard_bytes, progress)
            _describe(opened, config, bare, chosen, written, made)
            _share_modes(made)
            if out.exists():
                out.rmdir()
            os.replace(made, out)
        finally:  # after an error, Ctrl-C too, nothing half-written is left; after none there is nothing of that name
            shutil.rmtree(made, ignore_errors=True)
    return written


def _write(plan: Plan, folder: Path, shard_bytes: int, progress: Progress | None) -> Converted:
    shards = _Shards(folder, shard_bytes)
    formats, ordered = {}, []
    for done, (name, value) in enumerate(plan.entries(), 1):
        if isinstance(value, Linear):
            formats[name] = value.format
            ordered += [name] if value.weight_order is not None else []
            for part, tensor in value.state_dict().items():
                shards.add(f"{name}.{part}", tensor)
        else:
            shards.add(name, value)
        if progress is not None:
            progress(name, done, plan.total)
    return Converted(formats=formats | plan.tied_formats, ordered=ordered, nbytes=shards.nbytes, files=shards.finish())


class _Shards:
    """safetensors files, each written and let go when it is full."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.nbytes = 0
        self._folder, self._limit = folder, limit
        self._held: dict[str, Tensor] = {}
        self._map: dict[str, int] = {}
        self._count = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """One tensor more."""
        held = sum(kept.nbytes for kept in self._held.values())
        if self._held and held + tensor.nbytes > self._limit:
            self._flush()
        self._held[name] = tensor.detach().contiguous()
        self.nbytes += tensor.nbytes

    def finish(self) -> list[str]:
        """The names of the files, all written, with their index if there are several."""
        self._flush()
        several = self._count > 1
        names = [f"model-{i:05}-of-{self._count:05}.safetensors" if several else "model.safetensors"
                 for i in range(1, self._count + 1)]  # fmt: skip
        for place, name in enumerate(names):
            os.replace(self._folder / _part(place), self._folder / name)
        if several:
            table = {tensor: names[place] for tensor, place in self._map.items()}
            index = {"metadata": {"total_size": self.nbytes}, "weight_map": table}
            _write_json(self._folder / "model.safetensors.index.json", index)
        return names

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(self._held, self._folder / _part(self._count), metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        self._map |= dict.fromkeys(self._held, self._count)
        self._count += 1
        self._held = {}


def _part(place: int) -> str:
    return f"part-{place}.safetensors"


def _describe(source: Folder | GgufFile, config: Any, model: Any, dtype: torch.dtype, written: Converted,
              folder: Path) -> None:  # fmt: skip
    """Write config.json, and what belongs to the tokenizer."""
    told = dict(source.config_dict()) if isinstance(source, Folder) else config.to_dict()
    told = _without(told, _DROPPED)
    told |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch.")}
    quantization = Quantization.of(written.formats, written.ordered)
    if quantization is not None:
        told["quantization_config"] = quantization.as_dict()
    _write_json(folder / "config.json", told)
    if isinstance(source, GgufFile):
        from transformers import PreTrainedTokenizerFast

        with faults_of(f"{source.where}: tokenizer"):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(source.path.parent), gguf_file=source.path.name)
            tokenizer.save_pretrained(str(folder))
        return
    for name in _COPIED:
        if (source.path / name).exists():
            shutil.copyfile(inside(source.path, name), folder / name)


def _without(value: Any, names: Iterable[str]) -> Any:
    """A config's values without some, in the configs of its parts too."""
    if isinstance(value, dict):
        return {key: _without(part, names) for key, part in value.items() if key not in names}
    return value


def _share_modes(folder: Path) -> None:
    """Let who may read config.json read the shards, which safetensors writes for their owner alone."""
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
