"""GGUF: llama.cpp's one file, its header walked before a library parses it, its blocks as Weights.

Exact where a block is one fp16 scale times small integers: Q4_0 (int4:g32), Q8_0, Q5_0 and IQ4_NL (int8:g32), TQ1_0
and TQ2_0 (int4:g128), and Q3_K (int8:g128: its 6-bit scales times its 3-bit weights fit 8 bits). Every other type is
dequantised by the ``gguf`` package and rounded once more, to ``integers.LEFT``: they have an offset (Q4_1, Q5_1, Q2_K,
Q4_K, Q5_K), scales for 16 columns (Q6_K) or a codebook.

The names, the config and the row orders that llama.cpp changes are ``transformers``' own tables.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..errors import CheckpointError
from ..weights import Weight, quantize
from .integers import LEFT, weight_of
from .layer import Stored
from .safe import faults_of

# Where a block keeps its one scale, an fp16, by type: the byte it begins at.
SCALE_AT = {"Q4_0": 0, "Q5_0": 0, "Q8_0": 0, "IQ4_NL": 0, "Q3_K": 108, "TQ1_0": 52, "TQ2_0": 64}
NARROW = ("Q4_0", "TQ1_0", "TQ2_0")  # whose integers are -8 to 7
PLAIN = ("F64", "F32", "F16", "BF16")
_CHUNK = 1 << 24  # elements dequantised at a time
_MOST_VALUES = 1 << 23  # in all arrays of the metadata; the package keeps about 1 kB for each
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes by type of value
_UINT16, _UINT32, _STRING, _ARRAY = 2, 4, 8, 9


class GgufFile:
    """A GGUF file as a source of a model's layers and tensors, by the model's names; a context manager.

    Raises ``CheckpointError`` for a file that is damaged or lies, before any of its sizes is believed.
    """

    quantised = True

    def __init__(self, path: Path) -> None:
        self.where = str(path)
        self.path = path
        self.count = check_header(path)
        self._tensors: dict[str, list[Any]] = {}

    def __enter__(self) -> GgufFile:
        import gguf
        from transformers import modeling_gguf_pytorch_utils as loader

        with contextlib.ExitStack() as opening:
            opening.enter_context(models.quiet(lambda done, total: None))
            opening.enter_context(models.quick_gguf(lambda done, total: None))
            with faults_of(self.where):
                self._reader = gguf.GGUFReader(str(self.path))
                self._parsed = loader.load_gguf_checkpoint(str(self.path))["config"]
            self._open = opening.pop_all()
        return self

    def __exit__(self, *stopped: object) -> None:
        self._open.close()

    def config(self) -> Any:
        """The ``transformers`` config."""
        from transformers import AutoConfig

        return AutoConfig.for_model(**self._parsed)

    def config_dict(self) -> dict[str, Any]:
        """The config's values, before a config is made of them."""
        return dict(self._parsed)

    def dtype(self) -> torch.dtype | None:
        """None: GGUF keeps in fp32 what it does not quantise, whatever the model was."""
        return None

    def bind(self, model: Any) -> None:
        """Learn which tensor of the file belongs to which name of the model."""
        from transformers import modeling_gguf_pytorch_utils as loader

        kind = loader.TENSOR_PROCESSORS.get(self._architecture(), loader.TensorProcessor)
        self._processor = kind(config=self._parsed)
        with faults_of(self.where):
            self._names = loader.get_gguf_hf_weights_map(model, self._processor)
        self._tensors, self._unread = {}, []
        for tensor in self._reader.tensors:
            name = self._names.get(tensor.name) or self._names.get(tensor.name.removesuffix(".weight"))
            if name is None:
                self._unread.append(tensor.name)
            else:
                self._tensors.setdefault(name, []).append(tensor)

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of the model."""
        return name in self._tensors

    def holds(self, layer: str, n: int, k: int) -> bool:
        """Whether a linear layer's weight is quantised, in rows of K."""
        found = self._tensors.get(f"{layer}.weight", [])
        if len(found) != 1 or found[0].tensor_type.name in PLAIN:
            return False
        return tuple(int(size) for size in found[0].shape) == (k, n)

    def misfit(self, name: str, shape: tuple[int, ...], floating: bool) -> str | None:
        """None if a tensor can have this shape, else what it has."""
        sizes = [tuple(int(size) for size in reversed(tensor.shape)) for tensor in self._tensors[name]]
        return None if sum(map(math.prod, sizes)) == math.prod(shape) else " + ".join(map(str, sizes))

    def tensor(self, name: str) -> Tensor:
        """A tensor of the model, dequantised, fp32, as ``transformers`` would load it."""
        from gguf import dequantize

        parsed: dict[str, dict[str, Tensor]] = {"tensors": {}}
        out: Any = None
        for tensor in self._tensors[name]:
            with faults_of(f"{self.where}: {tensor.name}"):
                values = dequantize(tensor.data, tensor.tensor_type)
                out = self._processor.process(
                    weights=values, name=tensor.name, tensor_key_mapping=self._names, parsed_parameters=parsed
                ).weights
        held = next(iter(parsed["tensors"].values()), None)  # of several, put together by transformers
        return torch.from_numpy(out.copy()) if held is None else held

    def read(self, layer: str, n: int, k: int) -> Stored:
        """A quantised linear layer."""
        tensor = self._tensors[f"{layer}.weight"][0]
        with faults_of(f"{self.where}: {tensor.name}"):
            rows = self._rows(tensor, n)
            if rows is None:
                dense = self.tensor(f"{layer}.weight")
                return Stored(quantize(dense if tuple(dense.shape) == (n, k) else dense.t(), LEFT))
            made = read_blocks(tensor.data, tensor.tensor_type)
            if torch.equal(rows, torch.arange(n)):
                return Stored(made)
            parts = [None if part is None else part[rows] for part in (made.data, made.scale, made.zero)]
            assert parts[0] is not None
            return Stored(Weight(made.format, parts[0], parts[1], parts[2], k=made.k))

    def unread(self) -> list[str]:
        """The names of tensors that no part of the model asked for."""
        return list(self._unread)

    def _architecture(self) -> str:
        field = self._reader.fields.get("general.architecture")
        return "" if field is None else bytes(field.parts[field.data[0]]).decode("utf-8", "replace")

    def _rows(self, tensor: Any, n: int) -> Tensor | None:
        """Which of the file's rows each row of the model's weight is; None if rows are not merely moved.

        transformers' tables know how llama.cpp moved the rows (those of q and k, for its rotary embedding) as code
        that moves them back; it is given the rows' numbers instead of the rows.
        """
        import numpy as np

        numbers = np.arange(n, dtype=np.int64)[:, None]
        try:
            moved = self._processor.process(
                weights=numbers, name=tensor.name, tensor_key_mapping=self._names, parsed_parameters={"tensors": {}}
            ).weights
        except ValueError:  # it wants all of the columns, as BLOOM's does
            return None
        flat = torch.from_numpy(np.array(moved).reshape(-1))
        same = flat.numel() == n and torch.equal(flat.sort().values, torch.arange(n))
        return flat if same and moved.shape in ((n, 1), (1, n)) else None  # (1, n): transposed, for a Conv1D


def read_blocks(data: Any, kind: Any) -> Weight:
    """The Weight (N, K) of quantised rows. data: numpy uint8 (N, bytes). kind: ``gguf.GGMLQuantizationType``."""
    import gguf
    import numpy as np

    block, size = gguf.GGML_QUANT_SIZES[kind]
    n, k = data.shape[0], data.shape[1] // size * block
    step = max(1, _CHUNK // max(k, 1))
    parts = []
    for start in range(0, n, step):
        rows = np.ascontiguousarray(data[start : start + step])
        values = torch.from_numpy(gguf.dequantize(rows, kind)).view(len(rows), k)
        found = None
        if kind.name in SCALE_AT:
            at = SCALE_AT[kind.name]
            scale = np.ascontiguousarray(rows.reshape(len(rows), -1, size)[..., at : at + 2]).view(np.float16)
            # int4 only for what is 4 bits in the file: rows that happen to be small would be another format's
            narrow = kind.name in NARROW
            found = _integers(values, torch.from_numpy(scale[..., 0].astype(np.float32)), block, narrow)
        parts.append(quantize(values, LEFT) if found is None else found)
    if len({part.format for part in parts}) > 1:  # some rows exact, others not
        parts = [quantize(part.dequantize(), LEFT) for part in parts]
    whole = [torch.cat([getattr(part, name) for part in parts]) for name in ("data", "scale")]
    return Weight(parts[0].format, whole[0], whole[1], k=k)


def _integers(values: Tensor, scale: Tensor, block: int, narrow: bool) -> Weight | None:
    """The Weight of values (N, K) that are a block's scale (N, K / block) times integers; None if they are not.

    narrow: whether it may be int4.
    """
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("a block's scale is inf or NaN; expected finite numbers")
    blocks = values.view(values.shape[0], -1, block)
    steps = torch.where(scale[..., None] == 0, torch.zeros(()), blocks / scale[..., None]).round()
    flip = steps.amax(-1, keepdim=True) > 127  # -128 is an int8, 128 is none
    steps = torch.where(flip, -steps, steps)
    scale = torch.where(flip[..., 0], -scale, scale)
    if not torch.equal(steps * scale[..., None], blocks) or float(steps.abs().max()) > 128:
        return None
    return weight_of(steps.to(torch.int16).view_as(values), scale, block, narrow=narrow)


def check_header(path: Path) -> int:
    """How many tensors a GGUF file has, its whole header walked and every size in it compared with the file's.

    Raises ``CheckpointError`` naming what is wrong: counts, lengths, types, shapes and offsets beyond the file,
    tensors that overlap, names that come twice, a version or a byte order that is not read, one part of several.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).walk()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is no whole GGUF file: {error}") from error


class _Header:
    """A GGUF file's header, read from its beginning; every method raises ``ValueError`` saying what is wrong."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.size, self.at = data, len(data), 0
        self.values = 0  # in arrays, so far
        self.keys: set[bytes] = set()
        self.align = 32

    def walk(self) -> int:
        """The number of tensors; the whole header was checked."""
        if self.next(4) != b"GGUF":
            raise ValueError("it does not begin with the letters GGUF")
        version = self.number("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}; read are 2 and 3, low bytes first")
        tensors, pairs = self.number("<Q"), self.number("<Q")
        if tensors > self.left() // 24 or pairs > self.left() // 13:
            raise ValueError(
                f"it claims {tensors} tensors and {pairs} values, more than its {self.size} bytes can name"
            )
        for _ in range(pairs):
            self.pair()
        spans, names = [], set()
        for _ in range(tensors):
            name, start, nbytes = self.tensor()
            if name in names:
                raise ValueError(f"it has the tensor {name!r} twice")
            names.add(name)
            spans.append((start, nbytes, name))
        begin = -(-self.at // self.align) * self.align
        end = begin
        for start, nbytes, name in sorted(spans):
            if begin + start < end:
                raise ValueError(f"tensor {name!r} overlaps the one before it")
            end = begin + start + nbytes
            if end > self.size:
                raise ValueError(f"tensor {name!r} ends at byte {end} of a file of {self.size} bytes")
        return tensors

    def pair(self) -> None:
        """One key with its value."""
        key, kind = self.string(), self.number("<I")
        if key in self.keys:  # which of the two counts differs between readers
            raise ValueError(f"it has the key {key!r} twice")
        self.keys.add(key)
        if key == b"general.alignment" and kind == _UINT32:
            self.align = self.number("<I")
            if self.align == 0 or self.align & (self.align - 1) or self.align > 1 << 20:
                raise ValueError(f"general.alignment is {self.align}; expected a power of two")
        elif key == b"split.count" and kind == _UINT16:
            parts = self.number("<H")
            if parts > 1:
                raise ValueError(f"it is one of {parts} parts; join them with llama.cpp's gguf-split --merge")
        elif kind in _SCALARS:
            self.next(_SCALARS[kind])
        elif kind == _STRING:
            self.string()
        elif kind == _ARRAY:
            self.array(key)
        else:
            raise ValueError(f"the value of {key!r} has type {kind}, which is none")

    def array(self, key: bytes) -> None:
        """The value of a key that is an array."""
        kind, count = self.number("<I"), self.number("<Q")
        self.values += count
        if self.values > _MOST_VALUES:
            raise ValueError(f"{key!r} has {count} values; expected {_MOST_VALUES} at most in all arrays")
        if kind in _SCALARS:
            self.next(count * _SCALARS[kind])
        elif kind == _STRING:
            for _ in range(count):
                self.string()
        else:
            raise ValueError(f"{key!r} is an array of type {kind}, which is not read")

    def tensor(self) -> tuple[str, int, int]:
        """A tensor's name, where it begins after the header, and its bytes."""
        import gguf

        name = self.string().decode("utf-8")
        if not name:
            raise ValueError("a tensor has no name, or one of more than a million letters")
        dims = self.number("<I")
        if not 1 <= dims <= 4:
            raise ValueError(f"tensor {name!r} has {dims} dimensions; expected 1 to 4")
        shape = [self.number("<Q") for _ in range(dims)]
        kind, start = self.number("<I"), self.number("<Q")
        if kind not in gguf.GGML_QUANT_SIZES:
            raise ValueError(f"tensor {name!r} has type {kind}, which is not known")
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if shape[0] % block or min(shape) < 1:
            raise ValueError(f"tensor {name!r} has shape {shape}; expected a first number that {block} divides")
        if start % self.align:
            raise ValueError(f"tensor {name!r} begins at byte {start}; expected a multiple of {self.align}")
        return name, start, math.prod(shape) // block * size

    def left(self) -> int:
        """Bytes not yet read."""
        return self.size - self.at

    def next(self, count: int) -> bytes:
        """The next bytes; those of a long array are passed over."""
        if count > self.left():
            raise ValueError(f"at byte {self.at} it claims {count} bytes more; it has {self.left()}")
        self.at += count
        return self.data[self.at - count : self.at] if count <= 1 << 20 else b""

    def string(self) -> bytes:
        """The next string."""
        return self.next(self.number("<Q"))

    def number(self, kind: str) -> int:
        """The next number, of one of ``struct``'s kinds."""
        return int(struct.unpack(kind, self.next(struct.calcsize(kind)))[0])
