"""Packed copies of weights: each made once for a piece of memory, shared by all who compute with it, gone with it.

A kernel may want a weight in another packing than the plain storage. Eager calls have a ``Weight`` at hand to keep
that copy; the operator in a compiled graph has bare tensors. So the copies are kept for the *memory* of the plain
data: a ``Twin`` is a Weight on the same memory, by tensor objects of its own, found by the address. It lives as long as
the tensor object it was made for (which it does not itself hold: nothing is kept alive by its own copy), and holds the
memory meanwhile, so that its address means nothing else. It is made anew once a version counter says that the data, the
scales or the zero points were changed in place.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .device import capturing
from .problem import Format, Layout
from .weights import Weight


class Twin(Weight):
    """A Weight on another's memory. versions: the tensors' version counters when it was made."""

    __slots__ = ("__weakref__", "versions")

    versions: tuple[int, int, int]

    def changed(self) -> bool:
        """Whether its tensors were written to since it was made (torch does not count it for inference tensors)."""
        return self.versions != (_version(self.data), _version(self.scale), _version(self.zero))


_TWINS: WeakValueDictionary[tuple[Any, ...], Twin] = WeakValueDictionary()  # by the data's place in memory
_KEPT = WeakTensorKeyDictionary()  # the tensor object a twin lives as long as: the twin
_CAPTURED: dict[int, list[Twin]] = {}  # by the data's address


def twin_of(fmt: Format, data: Tensor, scale: Tensor | None, zero: Tensor | None, k: int, layout: Layout) -> Twin:
    """The one Twin of the weight that these tensors are, whichever objects stand for its memory.

    Raises what the constructor of ``Weight`` raises. While a CUDA graph is captured a weight that was not seen before
    gets a Twin that is not kept: what is computed for it then is part of that graph and exists in its replays only.
    """
    place = _place(data)
    found = _TWINS.get(place)
    if (
        found is not None
        and found.data.data_ptr() == data.data_ptr()  # its memory may have been taken from under it
        and (found.format, found.k, found.layout) == (fmt, k, layout)
        and _same(found.scale, scale)
        and _same(found.zero, zero)
        and not found.changed()
    ):
        return found
    scale, zero = (None if tensor is None else tensor.detach() for tensor in (scale, zero))
    made = Twin(fmt, data.detach(), scale, zero, k=k, layout=layout)
    made.versions = _version(made.data), _version(made.scale), _version(made.zero)
    if not capturing(data):
        _TWINS[place] = _KEPT[data] = made
    return made


def packed(weight: Weight, name: str, prepare: Callable[[Weight], Any]) -> Any:
    """The form of a weight that ``prepare`` makes, kept with the weight under ``name``; made if its memory has none.

    On a GPU it is made by a thread of its own: the caller may be a compiled graph's warm-up run, whose allocations
    torch takes from the graph's memory and takes back. While a graph is captured nothing is kept.
    """
    if capturing(weight.data):
        return prepare(weight)
    twin = weight
    if not isinstance(weight, Twin):
        twin = twin_of(weight.format, weight.data, weight.scale, weight.zero, weight.k, weight.layout)
    pack = twin.packs.get(name)
    if pack is None:
        pack = twin.packs[name] = _apart(prepare, twin) if weight.data.is_cuda else prepare(twin)
    weight.packs[name] = pack
    return pack


def keep_for_replays(twin: Twin) -> None:
    """Keep a weight and its packed copies for good: a CUDA graph that reads them is being captured.

    The graph knows their addresses and is replayed as long as it finds the plain data at its own address. So neither
    may be given to anything else.
    """
    if twin.packs:
        kept = _CAPTURED.setdefault(twin.data.data_ptr(), [])
        if all(other is not twin for other in kept):
            kept.append(twin)


def is_captured(data: Tensor) -> bool:
    """Whether a CUDA graph reads packed copies of this tensor: new values then belong into new memory."""
    return data.is_cuda and data.data_ptr() in _CAPTURED


def forget_packs(data: Tensor) -> None:
    """Let nobody find the packed copies of a tensor that was just written to, where torch does not count writes."""
    if data.is_inference() and data.device.type != "meta":
        _TWINS.pop(_place(data), None)


def _place(data: Tensor) -> tuple[Any, ...]:
    return data.data_ptr(), data.dtype, data.shape, data.stride(), data.device


def _same(mine: Tensor | None, other: Tensor | None) -> bool:
    if mine is None or other is None:
        return mine is other
    return mine.data_ptr() == other.data_ptr() and mine.shape == other.shape and mine.stride() == other.stride()


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None or tensor.is_inference() else tensor._version


def _apart(prepare: Callable[[Weight], Any], weight: Weight) -> Any:
    """What ``prepare`` makes of a weight on a GPU, in a thread of its own, complete when this returns."""

    def work() -> Any:
        with torch.cuda.device(weight.device):
            pack = prepare(weight)
            torch.cuda.current_stream(weight.device).synchronize()
        return pack

    torch.cuda.current_stream(weight.device).synchronize()  # the plain storage is complete
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()
