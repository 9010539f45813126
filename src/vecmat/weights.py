"""Weight: a matrix stored for inference, and how it is quantised, checked and turned back.

Storage, plain and the same on every device (kernels that want another packing derive it, see ``kernels/base.py``):

======  =======================================  ==========================================================
format  data                                     value of element (n, k), with g = k // group_size (0 if none)
======  =======================================  ==========================================================
dense   (N, K) or, with layout "kn", (K, N)      data[n, k]
int8    int8 (N, K)                              data[n, k] * scale[n, g]
int4    uint8 (N, ceil(K/2)), the even k in the  (nibble - 8) * scale[n, g], or
        low nibble                               (nibble - zero[n, g]) * scale[n, g] with zero points
fp8     float8_e4m3fn (N, K)                     data[n, k] * scale[n, g]
======  =======================================  ==========================================================

``scale`` is fp32 (N, groups), ``zero`` uint8 (N, groups). The scales that ``quantize`` makes lie on bf16's grid, so
that a kernel which takes bf16 scales computes with exactly the same weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .device import capturing
from .problem import DTYPE_NAMES, FP8_MAX, GROUP_SIZES, Format, Layout

_DENSE = {dtype: Format(name) for dtype, name in DTYPE_NAMES.items()}
_CHUNK = 1 << 24  # elements quantised at a time: 64 MiB of fp32 scratch


class Signature:
    """What the choice of a kernel depends on, interned: equal weights share one object, so it hashes by identity."""

    __slots__ = ("device", "format", "k", "layout", "n")
    _known: dict[tuple[Any, ...], Signature] = {}  # noqa: RUF012 - an intern table, as the docstring says

    format: Format
    n: int
    k: int
    layout: Layout
    device: torch.device

    @classmethod
    def intern(cls, fmt: Format, n: int, k: int, layout: Layout, device: torch.device) -> Signature:
        """The one Signature with these values."""
        key = (fmt, n, k, layout, device)
        known = cls._known.get(key)
        if known is None:
            known = cls()
            known.format, known.n, known.k, known.layout, known.device = key
            known = cls._known.setdefault(key, known)
        return known


class Weight:
    """A weight matrix in one of the formats, with its scales; immutable.

    format: a Format. data, scale, zero: the tensors described at the top of this module. n, k: output and input
    features. layout: "nk" or "kn", the shape that ``dequantize`` gives back; a dense weight is also stored so.

    Made by ``quantize``, or from stored tensors by the constructor, which checks them and raises ``ValueError`` or
    ``TypeError`` naming the tensor, what it is and what was expected: shapes, dtypes, one device, and scales that
    are finite and not zero.
    """

    __slots__ = ("data", "format", "k", "layout", "n", "packs", "ready", "scale", "signature", "zero")

    def __init__(self, fmt: Format | str, data: Tensor, scale: Tensor | None = None, zero: Tensor | None = None, *,
                 k: int | None = None, layout: Layout = "nk") -> None:  # fmt: skip
        fmt = Format.parse(fmt) if isinstance(fmt, str) else fmt
        check_layout("Weight", layout)
        for name, tensor in (("data", data), ("scale", scale), ("zero", zero)):
            if not isinstance(tensor, Tensor) and (tensor is not None or name == "data"):
                raise TypeError(f"Weight: {name} is {type(tensor).__name__}; expected a tensor")
        if data.dim() != 2:
            raise ValueError(f"Weight: data has shape {tuple(data.shape)}; expected two dimensions")
        if data.dtype != fmt.dtype:
            raise TypeError(f"Weight: data is {data.dtype} but format {fmt} is stored as {fmt.dtype}")
        rows, columns = data.shape
        n, width = (columns, rows) if fmt.dense and layout == "kn" else (rows, columns)
        if fmt.name == "int4":
            k = 2 * width if k is None else k
            if width != -(-k // 2):
                raise ValueError(f"Weight: int4 data has {width} bytes a row; expected {-(-k // 2)} for K={k}")
        elif k not in (None, width):
            raise ValueError(f"Weight: data has K={width}, but k={k}")
        self.format, self.data, self.scale, self.zero = fmt, data, scale, zero
        self.n, self.k, self.layout = n, width if k is None else k, layout
        self.packs: dict[str, Any] = {}
        self.ready: Any = None  # a tuple of the last products with it that C can call (ready.py)
        self._check_scales()
        self.signature = Signature.intern(fmt, self.n, self.k, layout if fmt.dense else "nk", data.device)

    def _check_scales(self) -> None:
        wanted = {
            "scale": (self.scale, not self.format.dense, torch.float32),
            "zero": (self.zero, not self.format.symmetric, torch.uint8),
        }
        shape = (self.n, self.format.groups(self.k))
        for name, (tensor, needed, dtype) in wanted.items():
            if (tensor is not None) != needed:
                raise ValueError(f"Weight: format {self.format} {'needs' if needed else 'has no'} {name}")
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"Weight: {name} has shape {tuple(tensor.shape)}; expected {shape} for {self.format}")
            if tensor.dtype != dtype:
                raise TypeError(f"Weight: {name} is {tensor.dtype}; expected {dtype}")
            if tensor.device != self.data.device:
                raise ValueError(f"Weight: {name} is on {tensor.device} but data is on {self.data.device}")
        known = self.data.device.type != "meta" and not capturing(self.data)  # the values, not only the shapes
        if self.scale is not None and known:
            good = torch.isfinite(self.scale) & (self.scale != 0)
            if not bool(good.all()):
                row, group = (~good).nonzero()[0].tolist()
                raise ValueError(
                    f"Weight: scale[{row}, {group}] is {self.scale[row, group].item()}; "
                    f"expected a finite number that is not zero"
                )
        if self.format.name == "fp8" and known:
            nan = (self.data.view(torch.uint8) & 127) == 127
            if bool(nan.any()):
                raise ValueError("Weight: data has NaN; expected finite float8_e4m3fn values")
        if self.zero is not None and known and bool((self.zero > 15).any()):
            raise ValueError(f"Weight: zero has a value of {int(self.zero.max())}; expected 0 to 15 for int4")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), or (K, N) with layout "kn"."""
        return (self.k, self.n) if self.layout == "kn" else (self.n, self.k)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors (packed copies that a kernel keeps are not counted)."""
        return sum(t.nbytes for t in (self.data, self.scale, self.zero) if t is not None)

    def to(self, device: torch.device | str) -> Weight:
        """The same weight on another device."""
        moved = [None if t is None else t.to(device) for t in (self.data, self.scale, self.zero)]
        assert moved[0] is not None
        return Weight(self.format, moved[0], moved[1], moved[2], k=self.k, layout=self.layout)

    def copy(self) -> Weight:
        """The same weight in tensors of its own."""
        parts = [None if t is None else t.clone() for t in (self.data, self.scale, self.zero)]
        assert parts[0] is not None
        return Weight(self.format, parts[0], parts[1], parts[2], k=self.k, layout=self.layout)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as an ordinary matrix of ``dtype``, shape ``self.shape``; exact before the cast to ``dtype``."""
        if self.format.dense:
            return self.data.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        out = self.rows(0, self.n, wide)
        return (out.t() if self.layout == "kn" else out).to(dtype)

    def rows(self, start: int, stop: int, dtype: torch.dtype, *, scaled: bool = True) -> Tensor:
        """Rows start to stop of the (N, K) weight as a ``dtype`` matrix; without the scales if ``scaled`` is False."""
        fmt = self.format
        if fmt.dense:
            data = self.data[:, start:stop].t() if self.layout == "kn" else self.data[start:stop]
            return data.to(dtype)
        data = self.data[start:stop]
        if fmt.name == "fp8" and data.device.type == "cpu":
            out = _fp8_to_float(data, dtype)
        elif fmt.name == "int4":
            out = torch.empty(data.shape[0], 2 * data.shape[1], dtype=dtype, device=data.device)
            out[:, 0::2] = data & 15
            out[:, 1::2] = data >> 4
            out = out[:, : self.k]
            if self.zero is None:
                out = out.sub_(8)
            else:
                _by_group(out, self.zero[start:stop].to(dtype), fmt, "sub_")
        else:
            out = data.to(dtype)
        if scaled:
            assert self.scale is not None
            _by_group(out, self.scale[start:stop], fmt, "mul_")  # in fp32: fp16 cannot hold a small scale
        return out

    def __reduce__(self) -> tuple[Any, ...]:
        data = self.data.view(torch.uint8) if self.format.name == "fp8" else self.data  # torch cannot pickle float8
        return _rebuild, (self.format, data, self.scale, self.zero, self.k, self.layout)

    def __repr__(self) -> str:
        return f"Weight({self.format}, n={self.n}, k={self.k}, layout={self.layout}, device={self.device})"


def _rebuild(fmt: Format, data: Tensor, scale: Tensor | None, zero: Tensor | None, k: int, layout: Layout) -> Weight:
    return Weight(fmt, data.view(fmt.dtype) if fmt.name == "fp8" else data, scale, zero, k=k, layout=layout)


def _by_group(out: Tensor, values: Tensor, fmt: Format, op: str) -> None:
    """Apply an in-place operation to ``out`` (rows, K) with one value a row and group (rows, groups)."""
    k = out.shape[1]
    if fmt.group_size is None:
        getattr(out, op)(values)
    elif k % fmt.group_size == 0 and out.is_contiguous():
        getattr(out.view(out.shape[0], -1, fmt.group_size), op)(values[:, :, None])
    else:
        getattr(out, op)(values.repeat_interleave(fmt.group_size, dim=1)[:, :k])


def _fp8_to_float(data: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 to float by its bits: torch's own CPU cast takes 5 times as long (docs/measured.md).

    Exponent and mantissa, moved to fp16's place, are the value divided by 256, subnormals included. NaN would not
    survive it: the constructor of Weight refuses it.
    """
    bits = data.view(torch.int8).to(torch.int16)
    bits = bits.bitwise_left_shift_(7).bitwise_and_(~(1 << 14))
    return bits.view(torch.float16).to(torch.float32).mul_(256.0).to(dtype)


def check_layout(where: str, layout: str) -> None:
    """Raise ``ValueError`` unless ``layout`` is "nk" or "kn"."""
    if layout not in ("nk", "kn"):
        raise ValueError(f"{where}: layout is {layout!r}; expected 'nk' for a weight (N, K) or 'kn' for (K, N)")


def default_group_size(name: str, k: int) -> int | None:
    """The group size used where none is given: int4 takes the largest of 128, 64, 32 that divides K, else 32."""
    if name != "int4":
        return None
    return next((size for size in reversed(GROUP_SIZES) if k % size == 0), 32)


def quantize(
    w: Tensor, format: str, *, layout: Layout = "nk", group_size: int | None = None, symmetric: bool = True
) -> Weight:
    """The Weight that stores ``w`` in ``format``.

    w: floating-point matrix, (N, K) with layout "nk" (as ``torch.nn.Linear`` keeps it) or (K, N) with "kn".
    format: "fp32", "bf16", "fp16", "int8", "int4" or "fp8"; "int4:g64" and the like name the group size too.
    group_size: 32, 64 or 128 elements along K that share a scale. int8, fp8: None is one scale per output channel.
    int4: None takes the largest that divides K. The last group is short where K is not a multiple.
    symmetric: False gives each int4 group a zero point.

    int8: round(w / scale), scale = max|w| / 127. int4: scale = w_max / -8, where w_max is the group's element of
    the largest magnitude, which uses all sixteen levels (llama.cpp's Q4_0); with zero points, 15 steps from the
    group's minimum to its maximum, zero included. fp8: e4m3 of w / scale, scale = max|w| / 448.

    Raises ``ValueError`` or ``TypeError`` for a shape, dtype, format or value (inf, NaN) that cannot be stored.
    """
    check_layout("quantize", layout)
    if not isinstance(w, Tensor) or not w.is_floating_point() or w.dtype.itemsize < 2:
        kind = w.dtype if isinstance(w, Tensor) else type(w).__name__
        raise TypeError(f"quantize: w is {kind}; expected a tensor of floating-point numbers")
    if w.dim() != 2:
        raise ValueError(f"quantize: w has shape {tuple(w.shape)}; expected two dimensions")
    fmt = resolve_format(format, w.shape[0] if layout == "kn" else w.shape[1], group_size, symmetric)
    w = w.detach()
    if fmt.dense:
        data = w.to(fmt.dtype)
        most = torch.finfo(fmt.dtype).max
        narrower = most < torch.finfo(w.dtype).max and w.device.type != "meta"
        if narrower and bool((torch.isinf(data) & torch.isfinite(w)).any()):
            raise ValueError(
                f"quantize: w has values beyond {most:g}, the largest of {fmt} ({w.dtype} {tuple(w.shape)})"
            )
        return Weight(fmt, data, layout=layout)
    w = w.t() if layout == "kn" else w
    n, k = w.shape
    data = torch.empty(n, -(-k // 2) if fmt.name == "int4" else k, dtype=fmt.dtype, device=w.device)
    scale = torch.empty(n, fmt.groups(k), dtype=torch.float32, device=w.device)
    zero = None if fmt.symmetric else torch.empty(scale.shape, dtype=torch.uint8, device=w.device)
    for rows in _chunks(n, k):
        block = w[rows].float()
        if w.device.type != "meta" and not bool(torch.isfinite(block).all()):
            raise ValueError(f"quantize: w has values that are not finite (shape {tuple(w.shape)}, {w.dtype})")
        data[rows], scale[rows], zeros = _quantize_rows(block, fmt)
        if zero is not None and zeros is not None:
            zero[rows] = zeros
    return Weight(fmt, data, scale, zero, k=k, layout=layout)


def resolve_format(name: str, k: int, group_size: int | None = None, symmetric: bool = True) -> Format:
    """The Format meant by a name and options, with int4's default group size for K = ``k``."""
    if not isinstance(name, str):
        raise TypeError(f"format is {type(name).__name__}; expected a name such as 'int8'")
    if ":" in name:
        fmt = Format.parse(name)
        if group_size not in (None, fmt.group_size):
            raise ValueError(f"group_size is {group_size!r}, but the format {name!r} names {fmt.group_size!r}")
        return Format.make(fmt.name, fmt.group_size or default_group_size(fmt.name, k), fmt.symmetric and symmetric)
    return Format.make(name, group_size if group_size is not None else default_group_size(name, k), symmetric)


def _chunks(n: int, k: int) -> Iterator[slice]:
    step = max(1, _CHUNK // max(k, 1))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _quantize_rows(w: Tensor, fmt: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    n, k = w.shape
    size = fmt.group_size or k
    groups = fmt.groups(k)
    if groups * size != k:
        w = torch.nn.functional.pad(w, (0, groups * size - k))
    w = w.reshape(n, groups, size)
    zero = None
    if k == 0:
        scale = w.new_ones(n, groups)
        quantised = w
    elif fmt.name == "int4" and not fmt.symmetric:
        low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
        scale = _on_bf16_grid(high / 15 - low / 15)  # high - low may overflow
        zero = (-low / scale).round_().clamp_(0, 15)
        quantised = (w / scale[..., None]).round_().add_(zero[..., None]).clamp_(0, 15)
    elif fmt.name == "int4":
        largest = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
        scale = _on_bf16_grid(largest / -8)
        quantised = (w / scale[..., None]).round_().add_(8).clamp_(0, 15)
    elif fmt.name == "int8":
        scale = _on_bf16_grid(w.abs().amax(-1) / 127)
        quantised = (w / scale[..., None]).round_().clamp_(-127, 127)
    else:
        scale = _on_bf16_grid(w.abs().amax(-1) / FP8_MAX)
        quantised = (w / scale[..., None]).clamp_(-FP8_MAX, FP8_MAX)
    flat = quantised.reshape(n, groups * size)[:, :k]
    if fmt.name == "int4":
        flat = torch.nn.functional.pad(flat, (0, k % 2)).to(torch.uint8)
        flat = flat[:, 0::2] | flat[:, 1::2] << 4
    return flat.to(fmt.dtype), scale, None if zero is None else zero.to(torch.uint8)


def _on_bf16_grid(scale: Tensor) -> Tensor:
    """Scales rounded to bf16 values; one for a group of zeros (or of numbers too small to have a scale)."""
    scale = scale.to(torch.bfloat16).float()
    return torch.where((scale == 0) | ~torch.isfinite(scale), torch.ones_like(scale), scale)


def quantize_rows(x: Tensor, compute: str) -> tuple[Tensor, Tensor]:
    """Each row of x (M, K) as int8 or e4m3 (M, K), and its fp32 scale (M, 1): what ``compute=`` means.

    scale = max|row| / 127 (int8) or / 448 (fp8), values rounded to nearest even. A row with inf or NaN gets a scale
    that is not finite, so that its whole result is not finite either; other rows are untouched.
    """
    x = x.float()
    top = 127.0 if compute == "int8" else FP8_MAX
    scale = x.abs().amax(-1, keepdim=True) / top if x.shape[-1] else x.new_ones(x.shape[0], 1)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (x / scale).nan_to_num_(0.0, 0.0, 0.0).clamp_(-top, top)
    scale = torch.where(torch.isfinite(scale), scale, torch.full_like(scale, torch.nan))
    q = q.round_().to(torch.int8) if compute == "int8" else q.to(torch.float8_e4m3fn)
    # torch's products want rows one after another, whatever x's strides were, and look at a single row's stride too
    return q.reshape(-1).view(x.shape), scale.reshape(-1).view(-1, 1)


def dense_format(dtype: torch.dtype) -> Format:
    """The dense Format of a torch dtype. Raises ``TypeError`` for one that is no weight format."""
    if dtype not in DTYPE_NAMES:
        raise TypeError(f"weight is {dtype}; expected {', '.join(map(str, DTYPE_NAMES))} or a vecmat.Weight")
    return _DENSE[dtype]
