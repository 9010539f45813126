"""Tens of rows of x by a dense, int8, fp8 or int4 weight (N, K): Hopper's warpgroup MMA, the weight in registers."""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from ..device import Device
from ..problem import Problem
from ._gluon import (
    PER_WORD,
    Fragments,
    fragments,
    halves,
    in_order,
    kind_of,
    lane_words,
    load_group,
    per_word,
    store_tile,
    word_layout,
)
from ._triton import gdc_launch_dependents, gdc_wait
from .base import Config


@gluon.constexpr_function
def _x_layout(KIND, LANE, UNROLL, ROWS, WARPS):
    """Layout of a tile (ROWS, 4 * LANE * UNROLL) of x, as words of two: a thread has whole 16 bytes of the MMAs' order.

    Those take values of all four lanes of a row, and of int4 words that are two apart, so a thread loads from the
    same place of each lane's LANE words: as much from each as leaves work for all threads.
    """
    lanes, warps = 5, WARPS.bit_length() - 1
    words = (4 * LANE * UNROLL * ROWS).bit_length() - 1
    spare = max(0, words - lanes - warps - 2)  # bits of a thread's words beyond those of the four lanes
    depth = LANE.bit_length() - 1
    run = [bit for bit in range(2) if (KIND == "int4" and bit == 1) or spare > bit + (KIND == "int4")]
    registers = [[0, 1 << bit] for bit in run] + [[0, LANE], [0, 2 * LANE]]
    rows = [[1 << bit, 0] for bit in range(ROWS.bit_length() - 1)]
    rest = [[0, 1 << bit] for bit in range(3) if bit < depth and bit not in run] + rows[:3]  # no two in a bank
    rest += [[0, 1 << bit] for bit in range(3, depth)]
    rest += [[0, 4 * LANE << bit] for bit in range(UNROLL.bit_length() - 1)] + rows[3:]
    rest += [[0, 0]] * max(0, lanes + warps - len(rest))  # more threads than there is work for
    return gl.DistributedLinearLayout(registers + rest[lanes + warps :], rest[:lanes], rest[lanes : lanes + warps], [],
                                      [ROWS, 4 * LANE * UNROLL])  # fmt: skip


@gluon.constexpr_function
def _w_layout(WIDTH, ROWS, WARPS):
    """Layout of the copy of two tiles (ROWS, WIDTH) of words, one below the other, that are side by side in memory.

    Neighbouring lanes take neighbouring 16 bytes of both, so that a row is asked for 128 bytes at a time.
    """
    places = [[0, 4 << bit] for bit in range((WIDTH // 4).bit_length() - 1)] + [[ROWS, 0]]
    places += [[1 << bit, 0] for bit in range(ROWS.bit_length() - 1)]
    warps = 5 + WARPS.bit_length() - 1
    return gl.DistributedLinearLayout([[0, 1], [0, 2], *places[warps:]], places[:5], places[5:warps], [],
                                      [2 * ROWS, WIDTH])  # fmt: skip


@gluon.constexpr_function
def _copy_layout(WIDTH, WARPS):
    """Layout of the copy of a tile WIDTH words wide, whole rows at a time."""
    lanes = min(32, WIDTH // 4)
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [WARPS, 1], [1, 0])


@gluon.jit
def _copy_w(slot, pointers, at, half, turn, turns, words, WIDTH: gl.constexpr, EVEN: gl.constexpr):
    """Start the copy of the weight's words for a turn and the one after it, zeros past the last turn and past K."""
    if EVEN:
        mask = turn + half < turns
    else:
        mask = (turn + half < turns) & (at + turn * WIDTH < words)
    async_copy.async_copy_global_to_shared(slot, pointers + turn * WIDTH, mask=mask)


@gluon.jit
def _copy_x(slot, pointers, at, m, M, turn, turns, words, WIDTH: gl.constexpr, EVEN: gl.constexpr):
    """Start the copy of a turn's tile of x, words of two values, zeros past the last turn and past its edges."""
    if EVEN:
        mask = (m < M) & (turn < turns)
    else:
        mask = (m < M) & (at + turn * WIDTH < words) & (turn < turns)
    async_copy.async_copy_global_to_shared(slot, pointers + turn * WIDTH, mask=mask)


@gluon.jit
def _halved(words, ROWS: gl.constexpr, LANE_WORDS: gl.constexpr):
    """A tile (ROWS, 4 * LANE_WORDS) of words as two of half the words of each lane, the first and the last."""
    first, last = gl.split(words.reshape([ROWS, 4, 2, LANE_WORDS // 2]).permute([0, 1, 3, 2]))
    return first.reshape([ROWS, 2 * LANE_WORDS]), last.reshape([ROWS, 2 * LANE_WORDS])


@gluon.jit(do_not_specialize=["M"])
def _warpgroups(x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, row_words, groups, split, M,
                KIND: gl.constexpr, BF16: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr,
                EVEN: gl.constexpr, ALIGN: gl.constexpr, PDL: gl.constexpr, FROZEN: gl.constexpr, SPLIT: gl.constexpr,
                BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, LANE_WORDS: gl.constexpr, UNROLL: gl.constexpr,
                WARPS: gl.constexpr, AHEAD: gl.constexpr):  # fmt: skip
    """y (M, N) = x (M, K) @ w (N, K).T * scale + bias; a program BLOCK_N rows of w and part ``split`` of K.

    Weight, scales and x come into rings in shared memory, AHEAD steps (an even number) before they are used. The
    weight goes on through the registers, where it is widened, into wgmma as its left operand; x, the right one, into
    shared memory again, in the fragments' order. While the tensor cores are at one step the next is widened. The
    parts of K are summed in order by the program that comes last.

    row_words: words in a row of w, ALIGN of them taken for one. Rows past N repeat the last and are not stored.
    """
    WIDTH: gl.constexpr = 4 * LANE_WORDS * UNROLL
    VALUES: gl.constexpr = per_word(KIND)  # in a word
    DEEP: gl.constexpr = WIDTH * VALUES
    X_WORDS: gl.constexpr = VALUES // 2  # of x, to a word of w
    W_TILE: gl.constexpr = word_layout(LANE_WORDS, UNROLL, 16, BLOCK_N, WARPS, 1, 1)
    X_TILE: gl.constexpr = _x_layout(KIND, LANE_WORDS * X_WORDS, UNROLL, BLOCK_M, WARPS)
    W_COPY: gl.constexpr = _w_layout(WIDTH, BLOCK_N, WARPS)
    S_COPY: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    X_COPY: gl.constexpr = _copy_layout(DEEP // 2, WARPS)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    OUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [BLOCK_N // 64, WARPS * 64 // BLOCK_N], [0, 1])
    HALVED: gl.constexpr = KIND == "int4" and LANE_WORDS == 4 and UNROLL == 1
    X_TYPE: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    if PDL:
        gdc_launch_dependents()
    tile = gl.program_id(0)
    part = gl.program_id(1)
    words = row_words * ALIGN
    steps = (words + WIDTH - 1) // WIDTH
    first = steps * part // split
    turns = steps * (part + 1) // split - first
    r = gl.expand_dims(gl.arange(0, 2 * BLOCK_N, layout=gl.SliceLayout(1, W_COPY)), 1)
    w_turn = r // BLOCK_N
    w_at = (first + w_turn) * WIDTH + gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, W_COPY)), 0)
    w_row = gl.minimum(tile * BLOCK_N + r % BLOCK_N, N - 1).to(gl.int64)
    w_pointers = w_ptr + w_row * row_words * ALIGN + w_at
    x_m = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, X_COPY)), 1)
    x_at = first * (DEEP // 2) + gl.expand_dims(gl.arange(0, DEEP // 2, layout=gl.SliceLayout(0, X_COPY)), 0)
    x_pointers = x_ptr + x_m * (row_words * X_WORDS) * ALIGN + x_at
    s_row = gl.arange(0, BLOCK_N, layout=S_COPY)
    z_row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, W_TILE))
    s_pointers = scale_ptr
    z_pointers = zero_ptr
    if GROUP > 0:
        s_pointers = scale_ptr + gl.minimum(tile * BLOCK_N + s_row, N - 1)
    if ZERO:
        z_pointers = zero_ptr + gl.minimum(tile * BLOCK_N + z_row, N - 1)
    W_RING: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 1, [1, 0])
    X_RING: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 4, [1, 0])
    w_ring = gl.allocate_shared_memory(gl.int32, [AHEAD // 2, 2 * BLOCK_N, WIDTH], W_RING)
    x_ring = gl.allocate_shared_memory(gl.int32, [AHEAD, BLOCK_M, DEEP // 2], X_RING)
    s_ring = gl.allocate_shared_memory(gl.float32, [AHEAD, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    staged = gl.allocate_shared_memory(X_TYPE, [2, BLOCK_M, DEEP], gl.NVMMASharedLayout(128, 16, 2))
    if PDL and not FROZEN:
        gdc_wait()
    for ahead in gl.static_range(0, AHEAD, 2):
        _copy_w(w_ring.index(ahead // 2), w_pointers, w_at, w_turn, ahead, turns, words, WIDTH, EVEN)
    if GROUP > 0:
        for ahead in gl.static_range(AHEAD):
            group = gl.minimum((first + ahead) * DEEP // GROUP, groups - 1)
            async_copy.async_copy_global_to_shared(s_ring.index(ahead), s_pointers + group * N, mask=s_row >= 0)
    zero = 0
    if ZERO:
        zero = load_group(z_pointers, first, groups, N, True, DEEP, GROUP)
    if PDL and FROZEN:
        gdc_wait()
    for ahead in gl.static_range(AHEAD):
        _copy_x(x_ring.index(ahead), x_pointers, x_at, x_m, M, ahead, turns, words * X_WORDS, DEEP // 2, EVEN)
        async_copy.commit_group()
    total = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    zeros = total
    product = total
    scale_before = gl.zeros([BLOCK_N], gl.float32, gl.SliceLayout(1, ACC))
    if GROUP > 0:
        product = warpgroup_mma_init(product)
    # Once at least, also for a part of no steps: where the loop may be passed by, ptxas serialises its MMAs.
    for pair in range(0, gl.maximum(turns, 1), 2):
        for turn in gl.static_range(2):
            now = pair + turn
            async_copy.wait_group(AHEAD - 2 + turn)
            tl.debug_barrier()  # what all have copied is here, and no MMA reads the buffer that is written next
            low, high = halves(x_ring.index(now % AHEAD).load(X_TILE), BF16)
            buffer = staged.index(turn)
            buffer.store(in_order(gl.join(low, high), KIND, BLOCK_M, LANE_WORDS * VALUES, UNROLL))
            w_slot = w_ring.index(pair // 2 % (AHEAD // 2))
            w = w_slot.slice(turn * BLOCK_N, BLOCK_N, dim=0).load(W_TILE)
            zero_now = zero
            if GROUP > 0:
                scale = s_ring.index(now % AHEAD).load(gl.SliceLayout(1, ACC))
                if ZERO:
                    zero = load_group(z_pointers, first + now + 1, groups, N, now + 1 < turns, DEEP, GROUP)
            if HALVED:
                w, w_rest = _halved(w, BLOCK_N, LANE_WORDS)
                if ZERO:
                    zero_now = gl.convert_layout(zero_now, gl.SliceLayout(1, w.type.layout))
                left = fragments(w, zero_now, KIND, BF16, ZERO, BLOCK_N, LANE_WORDS // 2, UNROLL)
            else:
                left = fragments(w, zero_now, KIND, BF16, ZERO, BLOCK_N, LANE_WORDS, UNROLL)
            left = gl.convert_layout(left, LEFT)
            fence_async_shared()
            tl.debug_barrier()  # x is staged, and the ring's slot has been read by all
            if turn == 1:
                _copy_w(w_slot, w_pointers, w_at, w_turn, pair + AHEAD, turns, words, WIDTH, EVEN)
            if GROUP > 0:
                group = gl.minimum((first + now + AHEAD) * DEEP // GROUP, groups - 1)
                async_copy.async_copy_global_to_shared(
                    s_ring.index(now % AHEAD), s_pointers + group * N, mask=s_row >= 0
                )
            x_slot = x_ring.index(now % AHEAD)
            _copy_x(x_slot, x_pointers, x_at, x_m, M, now + AHEAD, turns, words * X_WORDS, DEEP // 2, EVEN)
            async_copy.commit_group()
            if GROUP > 0:
                total += warpgroup_mma_wait(0, deps=[product]) * gl.expand_dims(scale_before, 1)
                scale_before = scale
                if HALVED:
                    right = buffer.slice(0, DEEP // 2, dim=1)
                    product = warpgroup_mma(left, right.permute((1, 0)), zeros, use_acc=False, is_async=True)
                    left = fragments(w_rest, zero_now, KIND, BF16, ZERO, BLOCK_N, LANE_WORDS // 2, UNROLL)
                    left = gl.convert_layout(left, LEFT)
                    right = buffer.slice(DEEP // 2, DEEP // 2, dim=1)
                    product = warpgroup_mma(left, right.permute((1, 0)), product, is_async=True)
                else:
                    product = warpgroup_mma(left, buffer.permute((1, 0)), zeros, use_acc=False, is_async=True)
            else:
                product = warpgroup_mma(left, buffer.permute((1, 0)), product, is_async=True)
                product = warpgroup_mma_wait(1, deps=[product])
    async_copy.wait_group(0)
    acc = warpgroup_mma_wait(0, deps=[product])
    tl.debug_barrier()  # no MMA of any warp reads shared memory that is used again below
    if GROUP > 0:
        acc = total + acc * gl.expand_dims(scale_before, 1)
    store_tile(acc, tile, part, split, scale_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, M,
               KIND != "dense" and GROUP == 0, BIAS, SPLIT, BLOCK_N, BLOCK_M, OUT)  # fmt: skip


# (BLOCK_N, num_warps, UNROLL, AHEAD) that won somewhere on an H100, without groups and with them.
_TILES = [(64, 4, 2, 4), (128, 8, 1, 4), (128, 8, 2, 4)]
_GROUPED_TILES = [(64, 4, 1, 4), (64, 4, 1, 6), (64, 4, 2, 4), (128, 8, 1, 4)]


def _parts(tiles: int, steps: int, programs: int) -> int:
    """In how many parts to cut K: the most that do not come to more than so many programs."""
    able = [split for split in (2, 3, 4, 6, 8, 12, 16) if tiles * split <= programs and 2 * split <= steps]
    return able[-1] if able else 1


class TritonWgmma(Fragments):
    """9 to 128 rows, layout nk, compute capability 9.0: x through shared memory, m64nMk16 on the tensor cores."""

    version = 2
    function = _warpgroups
    words = (0, 1)
    most_rows = 128

    def block_m(self, m: int) -> int:
        return max(16, 1 << (m - 1).bit_length())

    def step_words(self, config: Config) -> int:
        return int(config["LANE_WORDS"]) * int(config["UNROLL"]) * 4

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if device.kind == "cuda" and device.capability != 90:
            return f"warpgroup MMA is for compute capability 9.0; this is {device.arch}"
        if problem.m <= 8:
            return f"M={problem.m}; eight rows or fewer leave half of the instruction empty"
        group = problem.weight.group_size
        if group and group < 64:
            return f"groups of {group}; this kernel takes 64 values of a group at once"
        return super().rejects(problem, device)

    def configs(self, problem: Problem, device: Device) -> Sequence[Config]:
        found = [self.default_config(problem, device)]
        for tile in _GROUPED_TILES if problem.weight.group_size else _TILES:
            config = self._config(problem, tile)
            if not self._fits(problem, device, config):
                continue
            for each in (1, 2, 4):
                made = self._cut(problem, device, config, each)
                if made not in found:
                    found.append(made)
        return found

    def default_config(self, problem: Problem, device: Device) -> Config:
        """The tile and the programs to a multiprocessor that were best on an H100 (docs/measured.md)."""
        m, grouped = problem.m, problem.weight.group_size
        wide, large = problem.n >= 256 * device.units, problem.n * problem.k >= (1 << 25 if m > 32 else 1 << 23)
        each = 4 if m <= 16 else 2 if m <= 32 and not grouped else 1
        if grouped:
            tile = (64, 4, 1, 4) if m <= 16 else (128, 8, 1, 4) if large else (64, 4, 1, 6)
        elif wide:
            tile = (128, 8, 2, 4) if m <= 32 else (128, 8, 1, 4)
        else:
            tile = (128, 8, 2, 4) if m > 32 and large else (64, 4, 2, 4)
        for able in (tile, (128, 8, 1, 4), (64, 4, 2, 4), (64, 4, 1, 4)):
            config = self._config(problem, able)
            if self._fits(problem, device, config):
                break
        return self._cut(problem, device, config, each)

    def _cut(self, problem: Problem, device: Device, config: dict[str, int], each: int) -> Config:
        """A config with K cut so that about ``each`` programs come to a multiprocessor."""
        tiles = -(-problem.n // config["BLOCK_N"])
        return {**config, "split": _parts(tiles, self._steps(problem, config), each * device.units)}

    def _steps(self, problem: Problem, config: Config) -> int:
        return -(-problem.k // (self.step_words(config) * PER_WORD[kind_of(problem)]))

    def _fits(self, problem: Problem, device: Device, config: Config) -> bool:
        """Whether x is staged in rows of 128 bytes or more, and all fits shared memory."""
        block_m, block_n, ahead = self.block_m(problem.m), int(config["BLOCK_N"]), int(config["AHEAD"])
        words = self.step_words(config)
        deep = words * PER_WORD[kind_of(problem)]
        shared = ahead * (4 * block_n * (words + 1) + 2 * block_m * deep) + 4 * block_m * deep
        return deep >= 64 and shared + 1024 <= device.shared_bytes

    def _config(self, problem: Problem, tile: tuple[int, int, int, int]) -> dict[str, int]:
        block_n, warps, depth, ahead = tile
        lane, group = lane_words(problem), problem.weight.group_size
        unroll = min(depth, group // (4 * lane * PER_WORD[kind_of(problem)])) if group else depth
        config = {"BLOCK_N": block_n, "LANE_WORDS": lane, "UNROLL": unroll, "WARPS": warps, "AHEAD": ahead,
                  "num_warps": warps}  # fmt: skip
        # Two programs of eight warps to a multiprocessor, where that costs no spills.
        return {**config, "maxnreg": 128} if warps == 8 and not group and unroll * problem.m <= 64 else config

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        """As measured on an H100: the bytes at 0.92 of the bandwidth or, for 132 multiprocessors, what a weight takes
        to be widened and multiplied by M rows (0.18, 0.25, 0.39 ps for 16, 32, 64), and a start."""
        bytes_us = problem.bytes_moved / (0.92 * device.read_gbs) * 1e-3
        values_us = problem.n * problem.k * (0.11 + 0.0043 * problem.m) * 1e-6 * 132 / device.units
        return 4.0 + 0.06 * problem.m + max(bytes_us, values_us)

    def reduction(self, problem: Problem, config: Config) -> str:
        step = f"{config['LANE_WORDS']} x {config['UNROLL']} words of {problem.weight} a step"
        return f"fp32, warpgroup MMAs of 16, {step}, {config['split']} parts"
