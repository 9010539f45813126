"""What the Gluon kernels share: weights that go from memory straight into the tensor cores' registers.

An MMA wants its operands spread over a warp in fragments: in a step of 16 k, lane ``t`` of the four that share a row
holds k = 2t, 2t + 1, 2t + 8 and 2t + 9. A product does not care which k is called which, as long as both operands
agree, so each lane loads the 16 bytes of a row that lie next to each other in memory and *calls* them the fragments
of several steps. The weight then needs no shared memory, no shuffle and no packing: one load, the conversion, the
MMA. x is put into the same order (``in_order``). The idea of fragments straight from global memory is Marlin's
(Frantar et al., 2024), which packs the weight for it instead.

Words of int32 travel, because a loop that carries bytes makes the compiler take them apart and put them together.
"""

from __future__ import annotations

import abc
import math
from typing import Any, ClassVar, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..device import Device
from ..problem import DTYPES, Problem
from ..weights import Weight
from ._triton import LAUNCH_ERRORS, Frozen, Launch, arrivals, overlaps, rejects_device
from ._widen import bytes_to_floats, e4m3_to_bf16, nibbles_to_floats
from ._widen import halves as halves  # for the kernels, which take these from here
from ._widen import widened_by as widened_by
from .base import Config, Kernel, Run, flat

# Values in a word, by the kind of weight.
PER_WORD = {"dense": 2, "int8": 4, "fp8": 4, "int4": 8}


@gluon.constexpr_function
def per_word(kind):
    """``PER_WORD`` of a kind, inside a kernel."""
    return PER_WORD[kind]


@gluon.constexpr_function
def powers(count):
    """1, 2, 4, ... below count: the bases of a layout's dimension."""
    return [1 << bit for bit in range(count.bit_length() - 1)]


@gluon.constexpr_function
def word_layout(LANE_WORDS, UNROLL, TILE, ROWS, WARPS_ROWS, DEPTH, WARPS_DEPTH):
    """Layout of a tile (DEPTH * ROWS, 4 * LANE_WORDS * UNROLL) of words: eight rows by four lanes to a load of a warp.

    TILE: the rows that a warp takes to an MMA, 16 of a weight or 8 of x. WARPS_ROWS warps lie along a weight's rows
    and take the same rows of x; WARPS_DEPTH lie along the depth; the rest of either is in registers.
    """
    words = [[0, i] for i in powers(LANE_WORDS)] + [[0, 4 * LANE_WORDS * i] for i in powers(UNROLL)]
    inner = [[8, 0]] if TILE == 16 else []
    across = 1 if TILE == 8 else WARPS_ROWS  # x is the same for the warps along the weight's rows
    rows = [[TILE * across * i, 0] for i in powers(ROWS // (TILE * across))]
    chains = [[ROWS * WARPS_DEPTH * i, 0] for i in powers(DEPTH // WARPS_DEPTH)]
    warps = [[TILE * i if TILE == 16 else 0, 0] for i in powers(WARPS_ROWS)]
    warps += [[ROWS * i, 0] for i in powers(WARPS_DEPTH)]
    lanes = [[0, LANE_WORDS], [0, 2 * LANE_WORDS], [1, 0], [2, 0], [4, 0]]
    shape = [DEPTH * ROWS, 4 * LANE_WORDS * UNROLL]
    return gl.DistributedLinearLayout(words + inner + rows + chains, lanes, warps, [], shape)


@gluon.jit
def fragments(words, zero, KIND: gl.constexpr, BF16: gl.constexpr, ZERO: gl.constexpr, ROWS: gl.constexpr,
              LANE_WORDS: gl.constexpr, UNROLL: gl.constexpr, CROSSED: gl.constexpr = False):  # fmt: skip
    """A tile of words (ROWS, 4 * LANE_WORDS * UNROLL) as 16-bit floats (ROWS, values), k in the order of the MMAs.

    zero: each row's zero point (ROWS,) if ZERO; int4 without has 8. Sums of them are to be multiplied by
    ``widened_by``. CROSSED: fp8 as bf16 in the order of ``e4m3_to_bf16``.
    """
    if KIND == "int4":
        if ZERO:
            offset, _ = gl.broadcast(gl.expand_dims(zero.to(gl.int32) * 0x10001, 1), words)
        else:
            offset = gl.full_like(words, 0x80008)
        n0, n4, n1, n5, n2, n6, n3, n7 = nibbles_to_floats(words, offset, BF16)
        evens = gl.join(gl.join(n0, n4), gl.join(n2, n6))
        odds = gl.join(gl.join(n1, n5), gl.join(n3, n7))
        # nibble = 4 * pair + 2 * half + odd; after the words come (pair, half, odd)
        tile = gl.join(evens, odds).reshape([ROWS, UNROLL, 4, LANE_WORDS, 2, 2, 2])
        tile = tile.permute([0, 1, 3, 6, 5, 2, 4])
        return tile.reshape([ROWS, 32 * LANE_WORDS * UNROLL])
    elif KIND == "dense":
        low, high = halves(words, BF16)
        tile = gl.join(low, high).reshape([ROWS, UNROLL, 4, LANE_WORDS // 2, 2, 2])
        return tile.permute([0, 1, 3, 4, 2, 5]).reshape([ROWS, 8 * LANE_WORDS * UNROLL])
    else:
        if CROSSED:
            v0, v1, v2, v3 = e4m3_to_bf16(words)
        else:
            v0, v1, v2, v3 = bytes_to_floats(words, KIND, BF16)
        tile = gl.join(gl.join(v0, v1), gl.join(v2, v3)).reshape([ROWS, UNROLL, 4, LANE_WORDS, 2, 2])
        return tile.permute([0, 1, 3, 5, 2, 4]).reshape([ROWS, 16 * LANE_WORDS * UNROLL])


@gluon.jit
def row_of(index, BLOCK_N: gl.constexpr):
    """Which row of a tile the fragments call ``index``: a lane has rows that lie next to each other."""
    return index % 8 * (BLOCK_N // 8) + index // 8


@gluon.constexpr_function
def row_layout(ROWS, WARPS_ROWS, DEPTH, WARPS_DEPTH):
    """Layout of a number a row, (DEPTH, ROWS) in the order of memory: each lane its own rows', side by side."""
    each = [[0, 1]] + [[0, 2 * WARPS_ROWS * i] for i in powers(ROWS // (16 * WARPS_ROWS))]
    chains = [[WARPS_DEPTH * i, 0] for i in powers(DEPTH // WARPS_DEPTH)]
    lanes = [[0, 0], [0, 0]] + [[0, ROWS // 8 * i] for i in (1, 2, 4)]
    warps = [[0, 2 * i] for i in powers(WARPS_ROWS)] + [[i, 0] for i in powers(WARPS_DEPTH)]
    return gl.DistributedLinearLayout(each + chains, lanes, warps, [], [DEPTH, ROWS])


@gluon.jit
def in_order(x, KIND: gl.constexpr, ROWS: gl.constexpr, LANE: gl.constexpr, UNROLL: gl.constexpr,
             CROSSED: gl.constexpr = False):  # fmt: skip
    """A tile of x (ROWS, 4 * LANE * UNROLL) in the order of ``fragments``. LANE: values that a lane has in a row."""
    if KIND == "int4":
        tile = x.reshape([ROWS, UNROLL, 4, LANE // 8, 2, 2, 2]).permute([0, 1, 3, 6, 5, 2, 4])
    elif CROSSED:
        tile = x.reshape([ROWS, UNROLL, 4, LANE // 4, 2, 2]).permute([0, 1, 3, 5, 2, 4])
    else:
        tile = x.reshape([ROWS, UNROLL, 4, LANE // 4, 2, 2]).permute([0, 1, 3, 4, 2, 5])
    return tile.reshape([ROWS, 4 * LANE * UNROLL])


@gluon.jit
def load_words(pointers, at, end, EVEN: gl.constexpr):
    """A tile of weight words, read once and evicted first; past ``end`` zeros."""
    if EVEN:
        return gl.load(pointers, eviction_policy="evict_first")
    else:
        return gl.load(pointers, mask=at < end, other=0, eviction_policy="evict_first")


@gluon.jit
def load_group(pointers, step, groups, N, PER_STEP: gl.constexpr, GROUP: gl.constexpr):
    """Scales or zero points (groups, N) of the group that a step lies in."""
    return gl.load(pointers + gl.minimum(step * PER_STEP // GROUP, groups - 1) * N)


@gluon.jit
def _part(block, part, split, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr):
    """A part of a tile's sums, zeros past the last."""
    return gl.load(block + part * (BLOCK_N * BLOCK_M), mask=part < split, other=0.0, cache_modifier=".cg")


@gluon.jit
def join_parts(y, part_ptr, count_ptr, tile, part, split, n, m, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr):
    """(the sum of a tile's parts, in order, in the program that comes last; whether this is the one)."""
    block = part_ptr + tile * split * (BLOCK_N * BLOCK_M) + n * BLOCK_M + m
    gl.store(block + part * (BLOCK_N * BLOCK_M), y)
    tl.debug_barrier()  # every thread's part is stored before this program says that it is
    is_last = gl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == split - 1
    tl.debug_barrier()
    total = y
    if is_last:
        gl.store(count_ptr + tile, 0)
        FEW: gl.constexpr = BLOCK_N * BLOCK_M <= 4096  # several loads under way at once, as registers allow
        total = gl.load(block, cache_modifier=".cg")
        for other in range(1, split, 3 if FEW else 2):
            first = gl.load(block + other * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            second = _part(block, other + 1, split, BLOCK_N, BLOCK_M)
            if FEW:
                third = _part(block, other + 2, split, BLOCK_N, BLOCK_M)
                total = total + first + second + third
            else:
                total = total + first + second
    return total, is_last


@gluon.jit
def store_tile(y, tile, part, split, scale_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, M, SCALED: gl.constexpr,
               BIAS: gl.constexpr, SPLIT: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr,
               OUT: gl.constexpr = None, BY_LANE: gl.constexpr = False):  # fmt: skip
    """A tile (BLOCK_N, BLOCK_M) of sums into y (M, N): parts of K joined, scaled, the bias added, rounded once.

    OUT: the layout to store in, if not that of the sums.
    """
    LAYOUT: gl.constexpr = y.type.layout
    n = gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, LAYOUT)), 1)
    m = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, LAYOUT)), 0)
    mine = m < M
    if SPLIT:
        y, is_last = join_parts(y, part_ptr, count_ptr, tile, part, split, n, m, BLOCK_N, BLOCK_M)
        mine = mine & is_last
    n = tile * BLOCK_N + (row_of(n, BLOCK_N) if BY_LANE else n)
    if SCALED:
        y *= gl.load(scale_ptr + gl.minimum(n, N - 1))
    if BIAS:
        y += gl.load(bias_ptr + gl.minimum(n, N - 1)).to(gl.float32)
    y = y.to(y_ptr.dtype.element_ty)
    if OUT is not None:
        y = gl.convert_layout(y, OUT)
        n = tile * BLOCK_N + gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, OUT)), 1)
        m = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, OUT)), 0)
        mine = m < M
        if SPLIT:
            mine = mine & is_last
    gl.store(y_ptr + m.to(gl.int64) * N + n, y, mask=(n < N) & mine)


def kind_of(problem: Problem) -> str:
    """The kind of a problem's weight, as the kernels call it."""
    return "dense" if problem.weight.dense else problem.weight.name


def lane_words(problem: Problem) -> int:
    """How many words of a row a lane loads at once: 16 bytes, or less where four lanes would span two groups."""
    group = problem.weight.group_size
    return min(4, group // (4 * PER_WORD[kind_of(problem)])) if group else 4


def splits(tiles: int, steps: int, units: int) -> list[int]:
    """In how many parts to cut K, so that two to six programs come to each multiprocessor; two choices at most."""
    if tiles >= 2 * units:
        return [1]
    able = [split for split in (1, 2, 4, 8, 16) if split <= max(steps, 1)]
    return [split for split in able if 1.4 * units <= tiles * split <= 7 * units][:2] or able[-1:]


class Cut(NamedTuple):
    """The programs of a launch, the floats of partial sums that they leave, and the sums that several of them share."""

    grid: tuple[int, int]
    floats: int
    sums: int


class Fragments(Kernel):
    """A kernel whose weight goes from memory into fragments: what it takes, and how it is launched.

    A config has ``split``, ``num_warps``, perhaps ``maxnreg`` (the registers a thread may have) and, in capitals, the
    last constants of ``function`` in their order. words: which of its first two arguments, x and the weight, the
    function reads as words.
    """

    function: ClassVar[Any]
    words: ClassVar[tuple[int, ...]]
    most_rows: ClassVar[int]
    packing = "by_group"
    launch_errors = LAUNCH_ERRORS

    @abc.abstractmethod
    def block_m(self, m: int) -> int:
        """Rows of x that a launch takes: M or more, or M is multiplied in several."""

    @abc.abstractmethod
    def step_words(self, config: Config) -> int:
        """Words of a row that a program takes at once."""

    def cut(self, problem: Problem, config: Config) -> Cut:
        """How a launch is cut into programs: ``split`` parts of K, each BLOCK_N of N."""
        split, block_n = int(config["split"]), int(config["BLOCK_N"])
        tiles = -(-problem.n // block_n)
        shared = split > 1
        floats = tiles * split * block_n * self.block_m(problem.m) if shared else 0
        return Cut((tiles, split), floats, tiles if shared else 0)

    def rejects(self, problem: Problem, device: Device) -> str | None:
        fmt = problem.weight
        if device.interpreted:
            return "Gluon has no interpreter"
        if device.kind != "cuda":
            return "its MMA is NVIDIA's"
        if problem.m > self.most_rows:
            return f"M={problem.m}; this kernel multiplies up to {self.most_rows} rows"
        if fmt.dense and problem.layout != "nk":
            return "the weight lies as (K, N); this kernel reads rows of K"
        if problem.x not in ("fp16", "bf16") or (fmt.dense and fmt.name != problem.x):
            return f"x is {problem.x} and the weight {fmt}; this kernel wants x in 16 bits, and a dense weight as x"
        if problem.compute:
            return f"compute={problem.compute!r} quantises x; this kernel does not"
        if problem.grad:
            return "a gradient is asked for; this kernel has none"
        if fmt.name == "fp8" and problem.x == "fp16" and device.capability < 89:
            return f"e4m3 to fp16 needs compute capability 8.9; this is {device.arch}"
        values = PER_WORD[kind_of(problem)]
        if problem.k % values:
            return f"K={problem.k} is no multiple of {values}, the values in four bytes of a row"
        return rejects_device(problem, device)

    def prepare(self, weight: Weight) -> Frozen:
        return Frozen.of(weight)

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        n, out, fmt, kind = problem.n, DTYPES[problem.out], problem.weight, kind_of(problem)
        words = problem.k // PER_WORD[kind]
        align = math.gcd(words, 4)
        block_m = self.block_m(problem.m)
        grid, floats, sums = self.cut(problem, config)
        pdl, index = overlaps(device), device.index or 0

        def launch(frozen: bool) -> Launch:
            constants = {
                "KIND": kind, "BF16": problem.x == "bf16", "GROUP": fmt.group_size or 0, "ZERO": not fmt.symmetric,
                "BIAS": problem.bias, "EVEN": words % self.step_words(config) == 0, "ALIGN": align, "PDL": pdl,
                "FROZEN": frozen, "SPLIT": sums > 0, "BLOCK_M": block_m,
                **{name: value for name, value in config.items() if name.isupper()},
            }  # fmt: skip
            return Launch(self.function, device, constants, words=self.words, pdl=pdl,
                          **{name: int(config[name]) for name in ("num_warps", "maxnreg") if name in config},
                          )  # fmt: skip

        frozen, changing = launch(True), launch(False)
        fixed = (n, words // align, fmt.groups(problem.k), grid[1])

        def run(x: Tensor, weight: Tensor | Frozen, bias: Tensor | None) -> Tensor:
            rows = flat(x).contiguous()
            m = rows.shape[0]
            y = torch.empty(m, n, dtype=out, device=x.device)
            part = count = scale = zero = None
            if sums:
                part = torch.empty(floats, dtype=torch.float32, device=x.device)
                count = arrivals(index, sums)
            if isinstance(weight, Frozen):
                start, (data, scale, zero) = frozen, weight
            else:
                start, data = changing, weight
            bias = None if bias is None else bias.contiguous()
            data = data.contiguous()
            for first in range(0, m, block_m):
                some, to = (rows, y) if m <= block_m else (rows[first : first + block_m], y[first:])
                start(grid, (some, data, scale, zero, bias, to, part, count), fixed, some.shape[0])
            return y if x.dim() == 2 else y.view(*x.shape[:-1], n)

        return run
