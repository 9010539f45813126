"""Where a model's tensors come from: a folder of safetensors in any of the formats that are read, or a GGUF file."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from .awq import Awq
from .bitsandbytes import Bitsandbytes
from .compressed_tensors import CompressedTensors
from .fp8_blocks import Fp8Blocks
from .gguf import GgufFile
from .gptq import Gptq
from .layer import FLOATS, Layer, Reader, Stored
from .quantization import Vecmat
from .safe import PICKLES, Tensors, inside, open_folder, read_json

READERS: dict[str, Callable[[dict[str, Any]], Reader]] = {
    "awq": Awq, "bitsandbytes": Bitsandbytes, "compressed-tensors": CompressedTensors, "fbgemm_fp8": Fp8Blocks,
    "fp8": Fp8Blocks, "gptq": Gptq, "vecmat": Vecmat,
}  # fmt: skip
# Ends of names that say nothing about weights: the scales of activations and of a quantised cache, old buffers.
_IGNORED = (
    ".input_scale", ".input_scale_ub", ".activation_scale", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
    ".inv_freq", ".attn.bias", ".attn.masked_bias",
)  # fmt: skip


class Source(Protocol):
    """A checkpoint. where: its path. count: its tensors. quantised: whether it may hold quantised layers.

    ``bind`` comes first; then everything is asked by the model's names.
    """

    where: str
    count: int
    quantised: bool

    def config(self) -> Any:
        """The ``transformers`` config, made of ``config_dict``."""

    def config_dict(self) -> dict[str, Any]:
        """The config's values, as the file has them."""

    def dtype(self) -> torch.dtype | None:
        """The dtype of what is not quantised; None where that says nothing."""

    def bind(self, model: Any) -> None:
        """Learn the model's names."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""

    def holds(self, layer: str, n: int, k: int) -> bool:
        """Whether there is a quantised weight of a linear layer (N, K)."""

    def misfit(self, name: str, shape: tuple[int, ...], floating: bool) -> str | None:
        """None if a tensor can be read as one of a shape, of floating-point numbers if so asked, else what it is."""

    def tensor(self, name: str) -> Tensor:
        """A tensor that is not quantised, or no longer."""

    def read(self, layer: str, n: int, k: int) -> Stored:
        """A quantised layer."""

    def unread(self) -> list[str]:
        """Tensors that were neither asked for nor are known to mean nothing here."""


class Folder:
    """A ``transformers`` folder: its config, its tensors, and the reader of its quantised layers, if it has any."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: Tensors, reader: Reader | None) -> None:
        self.where, self.path = str(path), path
        self.quantised = reader is not None
        self.count = len(tensors.names())
        self.elements = sum(math.prod(tensors.shape(name)) for name in tensors.names())
        self._config, self._tensors, self._reader = config, tensors, reader
        self._used: set[str] = set()

    def config(self) -> Any:
        """The ``transformers`` config, which no longer says that the weights are quantised.

        Nor which attention to use: a name with a slash there would have transformers fetch code, and run it.
        """
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(self.where, local_files_only=True, trust_remote_code=False)
        if hasattr(found, "quantization_config"):
            del found.quantization_config
        for one in (found, *(getattr(found, name, None) for name in found.sub_configs)):
            if one is not None:
                one._attn_implementation = one._experts_implementation = None
        return found

    def config_dict(self) -> dict[str, Any]:
        """The values in config.json."""
        return self._config

    def dtype(self) -> torch.dtype | None:
        """The dtype of the largest floating-point tensor, the embedding's as a rule."""
        sizes = {name: math.prod(self._tensors.shape(name)) for name in self._tensors.names()}
        floats = [name for name in sizes if self._tensors.dtype(name) in FLOATS]
        return self._tensors.dtype(max(floats, key=sizes.__getitem__)) if floats else None

    def bind(self, model: Any) -> None:
        """Nothing to learn: the names are the model's."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name."""
        return name in self._tensors.names()

    def holds(self, layer: str, n: int, k: int) -> bool:
        """Whether the reader finds the layer quantised."""
        return self._reader is not None and self._reader.holds(Layer(self._tensors, layer, n, k))

    def misfit(self, name: str, shape: tuple[int, ...], floating: bool) -> str | None:
        """None if a tensor has this shape and, if so asked, is floating-point, else what it is."""
        found, dtype = self._tensors.shape(name), self._tensors.dtype(name)
        if floating and dtype not in (*FLOATS, torch.float64):
            return f"of {str(dtype).removeprefix('torch.')} without the scales of a format that is read"
        return None if found == shape else str(found)

    def tensor(self, name: str) -> Tensor:
        """A tensor."""
        self._used.add(name)
        return self._tensors.get(name)

    def read(self, layer: str, n: int, k: int) -> Stored:
        """A quantised layer. Raises ``CheckpointError`` naming the file."""
        assert self._reader is not None
        view = Layer(self._tensors, layer, n, k)
        try:
            return self._reader.read(view)
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{self.where}: layer {layer}: {error}") from error
        finally:
            self._used |= view.used

    def unread(self) -> list[str]:
        """Tensors that nothing asked for."""
        return [name for name in self._tensors.names() if name not in self._used and not name.endswith(_IGNORED)]

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *stopped: object) -> None:
        pass


def open_source(path: str | Path) -> contextlib.AbstractContextManager[Folder | GgufFile]:
    """The checkpoint at a path, opened, its headers checked, nothing read yet.

    path: a folder with config.json and safetensors, or a .gguf file. Raises ``CheckpointError`` for anything else, for
    a quantisation that is not read, and for damaged or lying files; ``ValueError`` for a package that is missing.
    """
    for package in ("transformers", "accelerate", "safetensors"):
        _needs(package)
    path = Path(path)
    if path.suffix == ".gguf" and not path.is_dir():
        _needs("gguf")
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no such file")
        return GgufFile(path)
    if path.suffix in PICKLES and not path.is_dir():
        raise CheckpointError(f"{path}: is a pickle, which runs code when it is read; expected safetensors or .gguf")
    if not path.is_dir():
        kind = "is a file; expected its folder, or a .gguf file" if path.is_file() else "there is no such folder"
        raise CheckpointError(f"{path}: {kind}")
    config = read_json(inside(path, "config.json"))
    method = _quantization(path, config)
    try:
        reader = None if method is None else _reader(method)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return Folder(path, config, open_folder(path), reader)


def from_memory(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Folder:
    """A checkpoint whose tensors are in memory already, none of them quantised."""
    return Folder(path, config, Tensors(str(path), tensors), None)


def _quantization(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of a folder: config.json's, else AutoGPTQ's own file."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found and (path / "quantize_config.json").exists():
        found = {"quant_method": "gptq", **read_json(inside(path, "quantize_config.json"))}
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{path}: quantization_config is {type(found).__name__}; expected an object")
    return found or None


def _reader(config: dict[str, Any]) -> Reader:
    method = config.get("quant_method")
    if method is None and (config.get("load_in_8bit") or config.get("load_in_4bit")):
        method = "bitsandbytes"  # as its older versions wrote it
    if not isinstance(method, str) or method not in READERS:
        raise ValueError(f"quantization_config: quant_method is {method!r}; read are {', '.join(sorted(READERS))}")
    return READERS[method](config)


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"reading a checkpoint needs {package}, which is not installed; pip install 'vecmat[hf]'")
