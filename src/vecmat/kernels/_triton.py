"""What the Triton kernels share: who may run them, how they are launched, and how programs that share a sum meet."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ..device import Device
from ..problem import Problem
from ..weights import Weight
from .base import Config

LAUNCH_ERRORS: tuple[type[Exception], ...] = (CompilationError, OutOfResources, PTXASError)

try:
    # Programmatic dependent launch: let the next kernel start while this one runs, and wait for the one before.
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton built without NVIDIA's parts; the kernels then compile with PDL=False

    @triton.jit
    def gdc_launch_dependents():
        pass

    gdc_wait = gdc_launch_dependents

__all__ = ["LAUNCH_ERRORS", "Frozen", "Launch", "arrivals", "fitting", "gdc_launch_dependents", "gdc_wait",
           "join_parts", "overlaps", "rejects_dense", "rejects_device", "tile_of"]  # fmt: skip


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The (row, column) of a program's tile, GROUP_M rows of tiles at a time, so that neighbours share them in L2."""
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def join_parts(acc, part_ptr, count_ptr, tile, part, split, place, SIZE: tl.constexpr):
    """(the sum of a tile's parts of K, in order, in the program that comes last; whether this is the one).

    place: where in a block of SIZE each element of the tile lies.
    """
    block = part_ptr + tile.to(tl.int64) * split * SIZE + place
    tl.store(block + part * SIZE, acc)
    tl.debug_barrier()  # every thread's part is stored before this program says that it is
    is_last = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == split - 1
    tl.debug_barrier()
    if is_last:
        tl.store(count_ptr + tile, 0)
        acc = tl.load(block, cache_modifier=".cg")
        for other in range(1, split):
            acc += tl.load(block + other * SIZE, cache_modifier=".cg")
    return acc, is_last


def rejects_dense(problem: Problem, device: Device, dtypes: Sequence[str] = ("fp16", "bf16")) -> str | None:
    """Why a Triton kernel for dense weights cannot run a problem on a device, None if nothing stands against."""
    if not problem.weight.dense:
        return f"the weight is {problem.weight}; this kernel multiplies dense weights"
    if problem.x not in dtypes or problem.weight.name != problem.x:
        wanted = ", ".join(f"{name} by {name}" for name in dtypes)
        return f"x is {problem.x} and the weight {problem.weight}; this kernel multiplies {wanted}"
    if problem.compute:
        return f"compute={problem.compute!r} quantises x; this kernel does not"
    if problem.grad:
        return "a gradient is asked for; this kernel has none"
    return rejects_device(problem, device)


def rejects_device(problem: Problem, device: Device) -> str | None:
    """Why no Triton kernel runs on a device, None if they do."""
    if device.interpreted:
        return "Triton's interpreter computes bf16 wrongly" if problem.x == "bf16" else None
    if not device.is_gpu:
        return "Triton needs a GPU (or TRITON_INTERPRET=1, to test without one)"
    if device.kind == "cuda" and device.capability < 80:
        return f"Triton needs compute capability 8.0 or later; this is {device.arch}"
    return None


def fitting(configs: Sequence[Config], device: Device) -> list[Config]:
    """The tile configs whose pipeline fits the device's shared memory; AMD's compiler wants two stages at most."""
    fit: list[Config] = []
    for config in configs:
        block_k, stages = int(config["BLOCK_K"]), int(config["num_stages"])
        stages = min(stages, 2) if device.kind == "hip" else stages
        stage_bytes = 2 * block_k * (int(config["BLOCK_M"]) + int(config["BLOCK_N"]))
        while stages > 1 and stage_bytes * stages > device.shared_bytes and not device.interpreted:
            stages -= 1
        made = {**config, "num_stages": stages}
        if (stage_bytes * stages <= device.shared_bytes or device.interpreted) and made not in fit:
            fit.append(made)
    return fit


def overlaps(device: Device) -> bool:
    """Whether a device can start a kernel before the one in front of it has ended (programmatic dependent launch).

    A kernel launched so touches nothing but a frozen weight before ``gdc_wait()``: x, y and every scratch buffer may
    still be in use by the kernel in front. Only then it says ``gdc_launch_dependents()``, because Inductor's kernels
    (``torch._inductor.config.triton.enable_pdl``) do not wait for a kernel that they take nothing from: whatever
    starts after this one may trust that all before this one is done.
    """
    return device.kind == "cuda" and device.capability >= 90 and not device.interpreted


class Frozen(NamedTuple):
    """A Weight as the Triton kernels take it: data that does not change, and scales and zero points as (groups, N)."""

    data: Tensor
    scale: Tensor | None
    zero: Tensor | None

    @staticmethod
    def of(weight: Weight) -> Frozen:
        """What ``Kernel.prepare`` returns: no copy but of the scales, which lie as (N, groups) in the Weight."""
        first = [None if t is None else t.t().contiguous() for t in (weight.scale, weight.zero)]
        return Frozen(weight.data, *first)


class Launch:
    """A Triton kernel with its constants, launched without the JIT's binder once it is compiled.

    The JIT looks every argument over at each call (about 7 us); here the first launch goes through it, and later ones
    hand the compiled kernel plain addresses. That is right as long as what the compiler assumed holds: that addresses
    are multiples of 16 (others take the JIT's way), and the values of ``fixed``, by which the compiled kernels are
    kept. Profilers' launch hooks do not see the short way.
    """

    __slots__ = ("_compiled", "_constants", "_index", "_kernel", "_options", "_short", "_words")

    def __init__(self, kernel: Any, device: Device, constants: Mapping[str, Any], *, words: Sequence[int] = (),
                 pdl: bool = False, **options: int) -> None:  # fmt: skip
        """constants: the kernel's constexprs, in order. words: the positions of tensors it reads as int32 words."""
        self._kernel, self._index, self._words = kernel, device.index or 0, frozenset(words)
        self._constants = dict(constants)
        self._options = {**options, "launch_pdl": True} if pdl else options
        self._compiled: dict[tuple[int, ...], Any] = {}
        self._short = True

    def __call__(self, grid: tuple[int, int], tensors: Sequence[Tensor | None], fixed: tuple[int, ...],
                 *loose: int) -> None:  # fmt: skip
        """Launch with the kernel's arguments in their order: tensors, integers it may specialise on, others."""
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        bits = 0
        for address in addresses:
            bits |= address or 0
        compiled = None if bits & 15 else self._compiled.get(fixed)
        with _on(self._index):
            if compiled is not None:
                stream = torch._C._cuda_getCurrentRawStream(self._index)
                try:
                    compiled.run(
                        grid[0], grid[1], 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                        *addresses, *fixed, *loose, *self._constants.values(),
                    )  # fmt: skip
                    return
                except TypeError:  # a Triton whose launcher takes other arguments: the JIT knows them
                    self._short = False
            given = list(tensors)
            for place in self._words:
                words = given[place]
                assert words is not None
                given[place] = (words.clone() if words.data_ptr() % 4 else words).reshape(-1).view(torch.int32)
            compiled = self._kernel[grid](*given, *fixed, *loose, **self._constants, **self._options)
        if compiled is not None and not bits & 15 and self._short:  # the interpreter compiles nothing
            self._compiled[fixed] = compiled
        elif not self._short:
            self._compiled.clear()


def _on(index: int) -> contextlib.AbstractContextManager[object]:
    """A context in which CUDA launches on the device of that index, whichever is current."""
    if not _present() or index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(index)


@functools.lru_cache(maxsize=1)
def _present() -> bool:
    return torch.cuda.is_available()


_HERE = contextlib.nullcontext()

# Counters by which the programs that share one sum find out who comes last.
_COUNTERS: dict[tuple[int, int, int], Tensor] = {}  # (device, stream, the capture it is in or 0)
_SLABS: dict[int, Tensor] = {}  # device: the zeros they are cut from
_SLAB_USED: dict[int, int] = {}
_SLAB_LOCK = threading.Lock()
_SLAB_WORDS = 1 << 20
_LEAST = 1 << 11


def arrivals(index: int, count: int) -> Tensor:
    """``count`` int32 zeros that no launch running at the same time uses; the kernel must leave them zero.

    Launches on one stream run one after the other and share theirs; so do those captured on one stream into one CUDA
    graph, which may be replayed on any stream beside other graphs and therefore has its own for good. They are cut
    from 4 MiB a device, which suffice for 500 streams and graphs; after that a memset goes before each launch.
    """
    stream = torch._C._cuda_getCurrentRawStream(index)
    with _on(index):
        capture = _capture(stream) if torch.cuda.is_current_stream_capturing() else 0
    mine = _COUNTERS.get((index, stream, capture))
    if mine is not None and mine.numel() >= count:
        return mine
    size = max(count, _LEAST)
    with _SLAB_LOCK:
        if not capture and index not in _SLABS:
            _SLABS[index] = _slab(index)
        start = _SLAB_USED.get(index, 0)
        if capture >= 0 and index in _SLABS and start + size <= _SLAB_WORDS:
            _SLAB_USED[index] = start + size
            _COUNTERS[index, stream, capture] = _SLABS[index][start : start + size]
            return _COUNTERS[index, stream, capture]
    return torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", index))


def _slab(index: int) -> Tensor:
    """Zeros that are complete for every stream, allocated by a thread of its own.

    This one may be in a compiled graph's warm-up run, whose allocations torch takes from the graph's memory, and back.
    """

    def work() -> Tensor:
        with torch.cuda.device(index):
            slab = torch.zeros(_SLAB_WORDS, dtype=torch.int32, device=torch.device("cuda", index))
            torch.cuda.current_stream(index).synchronize()
        return slab

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _capture(stream: int) -> int:
    """The number that CUDA gives the capture a stream is in; -1 if it cannot be asked."""
    status, number = ctypes.c_int(), ctypes.c_uint64()
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuStreamGetCaptureInfo_v2
    except (OSError, AttributeError):
        return -1
    failed = ask(ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None)
    return -1 if failed or status.value != 1 else int(number.value)
