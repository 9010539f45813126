"""Integers and scales of any group size into the Weight that holds them exactly, or else into the nearest one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import GROUP_SIZES, Format
from ..weights import Weight, quantize

LEFT = "int8:g32"  # what a weight becomes that no format holds exactly: the finest that there is


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The integers (R, C * 32 / bits or a few more), uint8, in words (R, C), int32: a stream of bits, lowest first.

    bits: 2, 3, 4 or 8. Integers may lie across two words (3 bits).
    """
    stream = packed.contiguous().view(torch.uint8).view(packed.shape[0], -1)
    if bits == 8:
        return stream
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % bits))
    eight = stream.view(packed.shape[0], -1, bits).to(torch.int32)  # each `bits` bytes hold eight integers
    word = sum((eight[..., place] << 8 * place for place in range(1, bits)), eight[..., 0])
    mask = (1 << bits) - 1
    out = torch.stack([(word >> bits * place & mask).to(torch.uint8) for place in range(8)], -1)
    return out.view(packed.shape[0], -1)


def weight_of(steps: Tensor, scale: Tensor, group: int | None, *, zero: Tensor | None = None,
              narrow: bool = True) -> Weight:  # fmt: skip
    """The Weight (N, K) whose element (n, k) is steps[n, k] * scale[n, k // group].

    steps: integers (N, K), int8 or int16, zero points subtracted. scale: (N, groups), any floating-point dtype.
    group: columns that share a scale; None for one scale a row. zero: the zero points (N, groups) that were
    subtracted, which lets int4 hold steps that do not fit -8 to 7. narrow: whether int4 may be used.

    Exact: int4 where -8 <= steps <= 7 or steps + zero fits 0 to 15, else int8 where -128 <= steps <= 127; fp16 and
    bf16 scales fit the Weight's fp32. A scale of zero, which a Weight has not, becomes one and its steps zero. Steps
    that fit neither, and groups that are no multiple of 32 columns, are rounded once more, to ``LEFT``.

    Raises ``ValueError`` for a scale that is not finite.
    """
    k = steps.shape[1]
    scale = scale.float()
    if not bool(torch.isfinite(scale).all()):
        raise ValueError("a scale is inf or NaN; expected finite numbers")
    group = None if group is None or group >= k else group
    dead = scale == 0
    if bool(dead.any()):
        scale = torch.where(dead, torch.ones_like(scale), scale)
        steps = steps.masked_fill(_spread(dead, group, k), 0)
    low, high = (int(edge) for edge in torch.aminmax(steps)) if steps.numel() else (0, 0)
    size = _size(group)
    if size == 0 or low < -128 or high > 127:
        return quantize(steps.float() * _spread(scale, group, k), LEFT)
    small = size or GROUP_SIZES[-1]  # int4 has groups always; one scale a row is repeated for them
    if narrow and low >= -8 and high <= 7:
        return Weight(Format.make("int4", small), _nibbles(steps + 8), _regroup(scale, group, small, k), k=k)
    if narrow and zero is not None and bool(((zero >= 0) & (zero <= 15)).all()):
        codes = steps + _spread(zero, group, k).to(steps.dtype)
        if not bool(((codes < 0) | (codes > 15)).any()):
            parts = (_regroup(values, group, small, k) for values in (scale, zero.to(torch.uint8)))
            return Weight(Format.make("int4", small, False), _nibbles(codes), *parts, k=k)
    return Weight(Format.make("int8", size), steps.to(torch.int8), _regroup(scale, group, size, k))


def weight_of_fp8(data: Tensor, scale: Tensor, group: int | None) -> Weight:
    """The fp8 Weight (N, K) of float8_e4m3fn data (N, K) and scales (N, groups); exact, groups as in ``weight_of``.

    Raises ``ValueError`` for NaN, and for a scale that is negative or not finite.
    """
    k = data.shape[1]
    scale = scale.float()
    if not bool(((scale >= 0) & torch.isfinite(scale)).all()):
        raise ValueError("an fp8 scale is negative, inf or NaN; expected finite numbers of 0 or more")
    group = None if group is None or group >= k else group
    dead = scale == 0
    if bool(dead.any()):
        scale = torch.where(dead, torch.ones_like(scale), scale)
        data = data.view(torch.uint8).masked_fill(_spread(dead, group, k), 0).view(torch.float8_e4m3fn)
    size = _size(group)
    if size == 0:
        return quantize(data.float() * _spread(scale, group, k), LEFT)
    return Weight(Format.make("fp8", size), data, _regroup(scale, group, size, k))


def group_of(k: int, groups: int, sizes: tuple[int, ...] = ()) -> int | None:
    """The columns that share a scale where a row of K has ``groups`` scales; None if that is one.

    sizes: what the checkpoint's config says, -1 for all columns; K / groups if it says nothing. Raises ``ValueError``
    if none fits.
    """
    if groups == 1 and (not sizes or any(size < 0 or size >= k for size in sizes)):
        return None
    for size in sizes or ((k // groups,) if groups > 0 and k % groups == 0 else ()):
        if size > 0 and -(-k // size) == groups:
            return size
    said = f"group_size {' or '.join(map(str, sizes))} asks for another number" if sizes else "they do not divide it"
    raise ValueError(f"there are {groups} scales along K={k}; {said}")


def order_of(g_idx: Tensor, group: int | None) -> Tensor | None:
    """The order of columns (int32) that puts groups side by side, g_idx (K,) saying each column's; None if they are.

    Raises ``ValueError`` if a column's group is out of range, or groups have other sizes than the config says.
    """
    k = g_idx.shape[0]
    g_idx = g_idx.long()
    plain = torch.zeros(k, dtype=torch.long) if group is None else torch.arange(k) // group
    if torch.equal(g_idx, plain):
        return None
    order = torch.argsort(g_idx, stable=True)
    if not torch.equal(g_idx[order], plain):
        low, high = int(g_idx.min()), int(g_idx.max())
        raise ValueError(f"g_idx goes from {low} to {high}; expected each of 0 to {int(plain[-1])} {group or k} times")
    return order.to(torch.int32)


def _size(group: int | None) -> int | None:
    """The largest group size of ours that divides ``group``; 0 if none does, None for None."""
    return None if group is None else next((size for size in reversed(GROUP_SIZES) if group % size == 0), 0)


def _spread(values: Tensor, group: int | None, k: int) -> Tensor:
    """(N, groups) as (N, K), or as (N, 1) where there is one group."""
    return values if group is None else values.repeat_interleave(group, dim=1)[:, :k]


def _regroup(values: Tensor, group: int | None, size: int | None, k: int) -> Tensor:
    """(N, groups) of ``group`` columns as (N, groups) of ``size`` columns."""
    if size is None:
        return values.contiguous()
    groups = -(-k // size)
    if group is None:
        return values.expand(values.shape[0], groups).contiguous()
    return values.repeat_interleave(group // size, dim=1)[:, :groups].contiguous()


def _nibbles(codes: Tensor) -> Tensor:
    """Integers 0 to 15 (N, K) two to a byte, the even k in the low nibble."""
    flat = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8)
    return flat[:, 0::2] | flat[:, 1::2] << 4
