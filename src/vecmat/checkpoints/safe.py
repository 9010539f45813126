"""What a checkpoint's files say, believed only after it was checked: names, sizes, shapes, dtypes, offsets.

A file that came from elsewhere may be truncated, may lie about its sizes, or may name files that are none of its
business. Everything here is looked at before memory is taken for it, and every error names the file.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

_JSON_BYTES = 64 << 20  # the largest index of a real model has a few MiB
INDEX = ".safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# safetensors' names of the dtypes that are read
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ``CheckpointError`` unless it is one, of a sane size, each key there once."""
    try:
        size = path.stat().st_size
        if size > _JSON_BYTES:
            raise CheckpointError(f"{path}: {size} bytes of JSON; expected {_JSON_BYTES} at most")
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds a {type(found).__name__}; expected an object")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for place, (key, _) in enumerate(pairs) if key in dict(pairs[:place]))
        raise CheckpointError(f"has the key {twice!r} twice")
    return made


def inside(folder: Path, name: object) -> Path:
    """The regular file ``name`` of a folder.

    Raises ``CheckpointError`` for a name that is none, leads out of the folder (absolute, "..", a link), or is no
    file. Links into the ``blobs`` of the same model in a Hugging Face cache, where every file is one, are followed.
    """
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"{folder}: {name!r} is no file name")
    try:
        root, target = folder.resolve(), (folder / name).resolve()
        regular = target.is_file()
    except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
        raise CheckpointError(f"{folder}: {name!r} cannot be looked at: {error}") from error
    cached = root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs"
    if not target.is_relative_to(root) and not cached:
        raise CheckpointError(f"{folder}: {name!r} leads to {target}, outside of the folder; it is not read")
    if not regular:
        raise CheckpointError(f"{folder}: there is no file {name!r}")
    return target


@contextlib.contextmanager
def faults_of(where: str) -> Iterator[None]:
    """Context in which what libraries raise at a damaged file or config becomes a ``CheckpointError`` that names it."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, OSError, RuntimeError,
            ImportError, struct.error, StrictDataclassError) as error:  # fmt: skip
        said = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise CheckpointError(f"{where}: {said}") from error


class Tensors:
    """Tensors by name, whose shapes and dtypes are known before they are read: a dict's, or ``SafeTensors``."""

    def __init__(self, where: str, held: dict[str, Tensor]) -> None:
        self.where = where
        self._held = held

    def names(self) -> Collection[str]:
        """All names."""
        return self._held.keys()

    def origin(self, name: str) -> str:
        """The file of a tensor, for people."""
        return self.where

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._held[name].shape)

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a tensor; None for one that torch or this package has no use for."""
        return self._held[name].dtype

    def get(self, name: str) -> Tensor:
        """The tensor."""
        return self._held[name]


class SafeTensors(Tensors):
    """The tensors of safetensors files. The library checks each header: lengths, offsets, overlaps, gaps, overflow.

    files: regular files. Raises ``CheckpointError`` for a file that is none of safetensors', and for a tensor that
    two files have.
    """

    def __init__(self, where: str, files: Iterable[Path]) -> None:
        from safetensors import SafetensorError, safe_open

        super().__init__(where, {})
        self._error: type[Exception] = SafetensorError
        self._files: dict[str, tuple[Path, Any]] = {}
        for file in files:
            try:
                handle = safe_open(str(file), framework="pt", device="cpu")  # type: ignore[no-untyped-call]
                keys: list[str] = handle.keys()  # type: ignore[no-untyped-call]
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(f"{file}: is no whole safetensors file: {error}") from error
            for key in keys:
                if key in self._files:
                    raise CheckpointError(f"{file}: has the tensor {key!r}, as {self._files[key][0].name} does")
                self._files[key] = file, handle

    def names(self) -> Collection[str]:
        return self._files.keys()

    def origin(self, name: str) -> str:
        return str(self._files[name][0])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        return DTYPES.get(self._slice(name).get_dtype())

    def get(self, name: str) -> Tensor:
        """The tensor, in memory of its own: it does not lean on the file."""
        file, handle = self._files[name]
        try:
            return handle.get_tensor(name).clone()  # type: ignore[no-any-return]
        except (self._error, OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read: {error}") from error

    def _slice(self, name: str) -> Any:
        file, handle = self._files[name]
        try:
            return handle.get_slice(name)
        except (self._error, OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: tensor {name!r} cannot be read: {error}") from error


def open_folder(folder: Path) -> SafeTensors:
    """The tensors of a checkpoint's folder: the files its index names, else the one safetensors file there is.

    Raises ``CheckpointError`` where there is none, or several without an index, or an index that names files outside
    of the folder, files that are missing, or tensors that their file has not.
    """
    indices = sorted(folder.glob("*" + INDEX))
    files = sorted(folder.glob("*.safetensors"))
    if len(indices) > 1:
        raise CheckpointError(f"{folder}: has several indices ({', '.join(i.name for i in indices)}); expected one")
    if indices:
        return _indexed(folder, indices[0])
    chosen = [file for file in files if file.name == "model.safetensors"] or files
    if not chosen:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        if pickles:
            raise CheckpointError(
                f"{folder}: has its weights in {pickles[0]}, a pickle, which runs code when it is read and so never "
                f"is; save them as safetensors where you trust them (model.save_pretrained does)"
            )
        raise CheckpointError(f"{folder}: has no .safetensors file")
    if len(chosen) > 1:
        names = ", ".join(file.name for file in chosen[:3])
        raise CheckpointError(f"{folder}: has {len(chosen)} safetensors files ({names}, ...) and no *{INDEX}")
    return SafeTensors(str(folder), [inside(folder, chosen[0].name)])


def _indexed(folder: Path, index: Path) -> SafeTensors:
    table = read_json(inside(folder, index.name)).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index}: weight_map is {type(table).__name__}; expected names of tensors and files")
    files: dict[object, Path] = {}
    for name in table.values():
        if not isinstance(name, str):
            raise CheckpointError(f"{index}: {name!r} is no file name")
        if name not in files:
            if not name.endswith(".safetensors"):
                raise CheckpointError(f"{index}: names {name!r}; expected a .safetensors file")
            files[name] = inside(folder, name)
    found = SafeTensors(str(folder), files.values())
    for tensor, name in table.items():
        if tensor not in found.names() or found.origin(tensor) != str(files[name]):
            raise CheckpointError(f"{index}: says that {name} has the tensor {tensor!r}, which it has not")
    return found
