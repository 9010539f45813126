"""Warps of ``triton_wgmma`` that bring the weight and x into rings in shared memory."""

from __future__ import annotations

import dataclasses

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from ._gluon import in_order, per_word, powers
from ._triton import gdc_launch_dependents, gdc_wait
from ._widen import halves


@dataclasses.dataclass(frozen=True)
class Constants:
    """The constants of a launch, which go to its warps as one."""

    KIND: str
    BF16: bool
    GROUP: int
    ZERO: bool
    BIAS: bool
    EVEN: bool
    ALIGN: int
    PDL: bool
    FROZEN: bool
    SPLIT: bool
    BLOCK_M: int
    ROWS: int
    TEAMS: int
    LANE_WORDS: int
    UNROLL: int
    SUBS: int
    W_STAGES: int
    X_STAGES: int
    BRINGERS: int


@gluon.constexpr_function
def constants_of(**fields):
    """Constants, made in a kernel."""
    return Constants(**fields)


@gluon.constexpr_function
def of(constants, name):
    """One of the constants, in a kernel."""
    return getattr(constants, name)


@gluon.constexpr_function
def x_layout(LANE, UNROLL, ROWS, WARPS):
    """Layout of a tile (ROWS, 4 * LANE * UNROLL) of x, as words of two: 16 bytes to a thread, which it stores by words.

    An MMA's 16 bytes come from all four lanes of a row, so the threads of a warp take the places of the four (and two
    of each), and four rows: whole sectors of memory, and every bank of shared memory once.
    """
    warps = WARPS.bit_length() - 1
    other = 4 if LANE >= 8 else 4 * LANE
    lanes = [[0, LANE], [0, 2 * LANE], [0, other], [1, 0], [2, 0]]
    words = [[0, bit] for bit in powers(4 * LANE * UNROLL) if bit >= 4 and [0, bit] not in lanes]
    rows = [[bit, 0] for bit in powers(ROWS) if bit >= 4]
    rest = rows[:warps] + words + rows[warps:]
    rest += [[0, 0]] * (warps - len(rest))  # more threads than there is work for
    return gl.DistributedLinearLayout([[0, 1], [0, 2], *rest[warps:]], lanes, rest[:warps], [],
                                      [ROWS, 4 * LANE * UNROLL])  # fmt: skip


@gluon.constexpr_function
def copy_layout(WIDTH, WARPS):
    """Layout of the copy of a tile WIDTH words wide, whole rows at a time."""
    lanes = min(32, WIDTH // 4)
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [WARPS, 1], [1, 0])


@gluon.jit
def later(tile, turn, steps, COUNT: gl.constexpr):
    """The tile, and the step of it, that COUNT steps later is."""
    for _ in gl.static_range(COUNT):
        last = turn + 1 == steps
        tile = gl.where(last, tile + 1, tile)
        turn = gl.where(last, 0, turn + 1)
    return tile, turn


@gluon.jit
def copy_weight(w_ptr, scale_ptr, w_ring, s_ring, ready, r, c, s_row, tile, turn, done, N, row_words, groups,
                KIND: gl.constexpr, GROUP: gl.constexpr, EVEN: gl.constexpr, ALIGN: gl.constexpr, ROWS: gl.constexpr,
                TEAMS: gl.constexpr, WIDTH: gl.constexpr, W_STAGES: gl.constexpr):  # fmt: skip
    """Start the copies of a step's weight words and scales, which arrive at the barrier of its slot.

    Zeros come past N and K.
    """
    DEEP: gl.constexpr = WIDTH * per_word(KIND)
    PARTS: gl.constexpr = max(1, DEEP // GROUP) if GROUP > 0 else 1
    slot = done % W_STAGES
    words = row_words * ALIGN
    offsets = r * words + c
    for team in gl.static_range(TEAMS):
        first = (tile * TEAMS + team) * ROWS
        pointers = w_ptr + (first.to(gl.int64) * words + turn * WIDTH) + offsets
        if EVEN:
            mask = (r < N - first) & (c >= 0)
        else:
            mask = (r < N - first) & (c < words - turn * WIDTH)
        async_copy.async_copy_global_to_shared(w_ring.index(slot * TEAMS + team), pointers, mask=mask)
        if GROUP > 0:
            for part in gl.static_range(PARTS):
                group = gl.minimum((turn * DEEP + part * GROUP) // GROUP, groups - 1)
                s_slot = s_ring.index((slot * TEAMS + team) * PARTS + part)
                s_pointers = scale_ptr + (group * N + first) + s_row
                async_copy.async_copy_global_to_shared(s_slot, s_pointers, mask=s_row < N - first)
    async_copy.mbarrier_arrive(ready.index(slot), increment_count=False)


@gluon.jit
def load_x(x_ptr, offsets, at, turn, words, WORDS: gl.constexpr, EVEN: gl.constexpr):
    """A step's tile of x in words of two values, zeros past K."""
    pointers = x_ptr + turn * WORDS + offsets
    if EVEN:
        return gl.load(pointers)
    else:
        return gl.load(pointers, mask=at < words - turn * WORDS, other=0)


@gluon.jit
def bring(sources, WHO: gl.constexpr, C: gl.constexpr):
    """Warps that bring the weight into its ring and x, put into the fragments' order on the way, into its own.

    The weight is W_STAGES - X_STAGES steps ahead of x, so that one barrier tells that a slot of either is free.
    Rows of x past M repeat the last.
    """
    (x_ptr, w_ptr, scale_ptr, x_ring, w_ring, s_ring, x_ready, w_ready, free, start, end, steps, N, row_words, groups,
     M) = sources  # fmt: skip
    KIND: gl.constexpr = of(C, "KIND")
    BF16: gl.constexpr = of(C, "BF16")
    GROUP: gl.constexpr = of(C, "GROUP")
    EVEN: gl.constexpr = of(C, "EVEN")
    ALIGN: gl.constexpr = of(C, "ALIGN")
    PDL: gl.constexpr = of(C, "PDL")
    FROZEN: gl.constexpr = of(C, "FROZEN")
    BLOCK_M: gl.constexpr = of(C, "BLOCK_M")
    ROWS: gl.constexpr = of(C, "ROWS")
    TEAMS: gl.constexpr = of(C, "TEAMS")
    LANE_WORDS: gl.constexpr = of(C, "LANE_WORDS")
    W_STAGES: gl.constexpr = of(C, "W_STAGES")
    X_STAGES: gl.constexpr = of(C, "X_STAGES")
    BRINGERS: gl.constexpr = of(C, "BRINGERS")
    WARPS: gl.constexpr = gl.num_warps()
    VALUES: gl.constexpr = per_word(KIND)
    X_WORDS: gl.constexpr = VALUES // 2
    UNROLL: gl.constexpr = of(C, "UNROLL") * of(C, "SUBS")
    WIDTH: gl.constexpr = 4 * LANE_WORDS * UNROLL
    DEEP: gl.constexpr = WIDTH * VALUES
    LEAD: gl.constexpr = W_STAGES - X_STAGES
    COPY: gl.constexpr = copy_layout(WIDTH, WARPS)
    X_TILE: gl.constexpr = x_layout(LANE_WORDS * X_WORDS, UNROLL, BLOCK_M, WARPS)
    r = gl.expand_dims(gl.arange(0, ROWS, layout=gl.SliceLayout(1, COPY)), 1)
    c = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, COPY)), 0)
    s_row = gl.arange(0, ROWS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    m = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, X_TILE)), 1)
    at = gl.expand_dims(gl.arange(0, DEEP // 2, layout=gl.SliceLayout(0, X_TILE)), 0)
    words = row_words * ALIGN * X_WORDS
    offsets = gl.minimum(m, M - 1) * words + at
    w_tile, w_turn = later(start // steps, start % steps, steps, WHO)
    turn = w_turn
    if PDL and not FROZEN:
        gdc_wait()
        gdc_launch_dependents()
    for done in range(WHO, LEAD, BRINGERS):
        if start + done < end:
            copy_weight(w_ptr, scale_ptr, w_ring, s_ring, w_ready, r, c, s_row, w_tile, w_turn, done, N, row_words,
                        groups, KIND, GROUP, EVEN, ALIGN, ROWS, TEAMS, WIDTH, W_STAGES)  # fmt: skip
        w_tile, w_turn = later(w_tile, w_turn, steps, BRINGERS)
    if PDL and FROZEN:
        gdc_wait()
        gdc_launch_dependents()
    x = load_x(x_ptr, offsets, at, turn, words, DEEP // 2, EVEN)
    w_tile, w_turn = later(start // steps, start % steps, steps, LEAD + WHO)
    for done in range(WHO, end - start, BRINGERS):
        slot = done % X_STAGES
        mbarrier.wait(free.index(slot), (done // X_STAGES & 1) ^ 1)
        if start + done + LEAD < end:
            copy_weight(w_ptr, scale_ptr, w_ring, s_ring, w_ready, r, c, s_row, w_tile, w_turn, done + LEAD, N,
                        row_words, groups, KIND, GROUP, EVEN, ALIGN, ROWS, TEAMS, WIDTH, W_STAGES)  # fmt: skip
        w_tile, w_turn = later(w_tile, w_turn, steps, BRINGERS)
        low, high = halves(x, BF16)
        x_ring.index(slot).store(in_order(gl.join(low, high), KIND, BLOCK_M, LANE_WORDS * VALUES, UNROLL))
        _, turn = later(0, turn, steps, BRINGERS)
        x = load_x(x_ptr, offsets, at, turn, words, DEEP // 2, EVEN)
        mbarrier.arrive(x_ready.index(slot), count=1)
    async_copy.wait_group(0)
