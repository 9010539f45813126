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
    load_words,
    per_word,
    splits,
    store_tile,
    word_layout,
)
from ._triton import gdc_launch_dependents, gdc_wait
from .base import Config, time_us


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
    rest += [[0, 1 << bit] for bit in range(3, depth)] + [[0, 4 * LANE << bit] for bit in range(UNROLL.bit_length() - 1)]
    rest += rows[3:]
    rest += [[0, 0]] * max(0, lanes + warps - len(rest))  # more threads than there is work for
    return gl.DistributedLinearLayout(registers + rest[lanes + warps :], rest[:lanes], rest[lanes : lanes + warps], [],
                                      [ROWS, 4 * LANE * UNROLL])  # fmt: skip


@gluon.jit
def _halved(words, ROWS: gl.constexpr, LANE_WORDS: gl.constexpr):
    """A tile (ROWS, 4 * LANE_WORDS) of words as two of half the words of each lane, the first and the last."""
    first, last = gl.split(words.reshape([ROWS, 4, 2, LANE_WORDS // 2]).permute([0, 1, 3, 2]))
    return first.reshape([ROWS, 2 * LANE_WORDS]), last.reshape([ROWS, 2 * LANE_WORDS])


@gluon.jit
def _place(begin, turn, turns):
    """Which step of K a turn takes: they go round from ``begin``. Past the last turn, any."""
    at = begin + turn
    return gl.where(at < turns, at, at - turns)


@gluon.jit(do_not_specialize=["M"])
def _warpgroups(x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, row_words, groups, split, M,
                KIND: gl.constexpr, BF16: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr,
                EVEN: gl.constexpr, ALIGN: gl.constexpr, PDL: gl.constexpr, FROZEN: gl.constexpr, SPLIT: gl.constexpr,
                BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, LANE_WORDS: gl.constexpr, UNROLL: gl.constexpr,
                WARPS: gl.constexpr, AHEAD: gl.constexpr, ROTATE: gl.constexpr):  # fmt: skip
    """y (M, N) = x (M, K) @ w (N, K).T * scale + bias; a program BLOCK_N rows of w and part ``split`` of K.

    The weight goes from memory through the registers, where it is widened, into wgmma as its left operand; x, the
    right one, through shared memory, put into the fragments' order on the way. While the tensor cores are at one
    step the next is widened, and the weight's loads for the two after it are under way. The parts of K are summed
    in order by the program that comes last.

    row_words: words in a row of w, ALIGN of them taken for one. Rows past N repeat the last and are not stored.
    """
    WIDTH: gl.constexpr = 4 * LANE_WORDS * UNROLL
    VALUES: gl.constexpr = per_word(KIND)  # in a word
    DEEP: gl.constexpr = WIDTH * VALUES
    X_WORDS: gl.constexpr = VALUES // 2  # of x, to a word of w
    W_TILE: gl.constexpr = word_layout(LANE_WORDS, UNROLL, 16, BLOCK_N, WARPS, 1, 1)
    X_TILE: gl.constexpr = _x_layout(KIND, LANE_WORDS * X_WORDS, UNROLL, BLOCK_M, WARPS)
    W_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WIDTH, WIDTH // 4], [WARPS, 1], [1, 0])
    S_COPY: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    X_COPY: gl.constexpr = gl.BlockedLayout([1, 4], [256 // min(DEEP, 256), min(DEEP, 256) // 8], [WARPS, 1], [1, 0])
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
    # Programs that run side by side begin at different places, so that they do not all want the same lines of x at once.
    begin = tile * ROTATE % gl.maximum(turns, 1)
    r = gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, W_COPY)), 1)
    w_at = gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, W_COPY)), 0)
    w_pointers = w_ptr + gl.minimum(tile * BLOCK_N + r, N - 1).to(gl.int64) * row_words * ALIGN + w_at
    x_m = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, X_COPY)), 1)
    x_at = gl.expand_dims(gl.arange(0, DEEP // 2, layout=gl.SliceLayout(0, X_COPY)), 0)
    x_pointers = x_ptr + x_m * (row_words * X_WORDS) * ALIGN + x_at
    s_row = gl.arange(0, BLOCK_N, layout=S_COPY)
    z_row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, W_TILE))
    s_pointers = scale_ptr
    z_pointers = zero_ptr
    if GROUP > 0:
        s_pointers = scale_ptr + gl.minimum(tile * BLOCK_N + s_row, N - 1)
    if ZERO:
        z_pointers = zero_ptr + gl.minimum(tile * BLOCK_N + z_row, N - 1)
    w_ring = gl.allocate_shared_memory(gl.int32, [AHEAD, BLOCK_N, WIDTH], gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))
    x_ring = gl.allocate_shared_memory(gl.int32, [AHEAD, BLOCK_M, DEEP // 2], gl.SwizzledSharedLayout(8, 1, 4, [1, 0]))
    s_ring = gl.allocate_shared_memory(gl.float32, [AHEAD, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    staged = gl.allocate_shared_memory(X_TYPE, [2, BLOCK_M, DEEP], gl.NVMMASharedLayout(128, 16, 2))
    if PDL and not FROZEN:
        gdc_wait()
    for ahead in gl.static_range(AHEAD):
        at = first + _place(begin, ahead, turns)
        if EVEN:
            w_mask = ahead < turns
        else:
            w_mask = (w_at + at * WIDTH < words) & (ahead < turns)
        async_copy.async_copy_global_to_shared(w_ring.index(ahead), w_pointers + at * WIDTH, mask=w_mask)
        if GROUP > 0:
            s_pointer = s_pointers + gl.minimum(at * DEEP // GROUP, groups - 1) * N
            async_copy.async_copy_global_to_shared(s_ring.index(ahead), s_pointer, mask=s_row >= 0)
    zero = 0
    if ZERO:
        zero = load_group(z_pointers, first + begin, groups, N, True, DEEP, GROUP)
    if PDL and FROZEN:
        gdc_wait()
    for ahead in gl.static_range(AHEAD):
        at = first + _place(begin, ahead, turns)
        if EVEN:
            x_mask = (x_m < M) & (ahead < turns)
        else:
            x_mask = (x_m < M) & (x_at + at * (DEEP // 2) < words * X_WORDS) & (ahead < turns)
        async_copy.async_copy_global_to_shared(x_ring.index(ahead), x_pointers + at * (DEEP // 2), mask=x_mask)
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
            slot = (pair + turn) % AHEAD
            async_copy.wait_group(AHEAD - 1)
            low, high = halves(x_ring.index(slot).load(X_TILE), BF16)
            buffer = staged.index(turn)
            buffer.store(in_order(gl.join(low, high), KIND, BLOCK_M, LANE_WORDS * VALUES, UNROLL))
            w = w_ring.index(slot).load(W_TILE)
            zero_now = zero
            if GROUP > 0:
                scale = s_ring.index(slot).load(gl.SliceLayout(1, ACC))
                if ZERO:
                    at = first + _place(begin, pair + turn + 1, turns)
                    zero = load_group(z_pointers, at, groups, N, pair + turn + 1 < turns, DEEP, GROUP)
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
            more = pair + turn + AHEAD < turns
            at = first + _place(begin, pair + turn + AHEAD, turns)
            if EVEN:
                w_mask = more
                x_mask = (x_m < M) & more
            else:
                w_mask = (w_at + at * WIDTH < words) & more
                x_mask = (x_m < M) & (x_at + at * (DEEP // 2) < words * X_WORDS) & more
            async_copy.async_copy_global_to_shared(w_ring.index(slot), w_pointers + at * WIDTH, mask=w_mask)
            async_copy.async_copy_global_to_shared(x_ring.index(slot), x_pointers + at * (DEEP // 2), mask=x_mask)
            if GROUP > 0:
                s_pointer = s_pointers + gl.minimum(at * DEEP // GROUP, groups - 1) * N
                async_copy.async_copy_global_to_shared(s_ring.index(slot), s_pointer, mask=s_row >= 0)
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
    if GROUP > 0:
        acc = total + acc * gl.expand_dims(scale_before, 1)
    store_tile(acc, tile, part, split, scale_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, M,
               KIND != "dense" and GROUP == 0, BIAS, SPLIT, BLOCK_N, BLOCK_M, OUT)  # fmt: skip


# (BLOCK_N, num_warps, UNROLL, AHEAD)
_TILES = [(64, 4, 1, 2), (64, 4, 1, 4), (64, 4, 2, 2), (128, 8, 1, 2), (128, 8, 1, 4), (128, 8, 2, 2), (256, 16, 1, 2),
          (256, 16, 1, 4)]  # fmt: skip


class TritonWgmma(Fragments):
    """9 to 128 rows, layout nk, compute capability 9.0: x through shared memory, m64nMk16 on the tensor cores."""

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
        for tile in _TILES:
            config = self._config(problem, tile)
            step = self.step_words(config) * PER_WORD[kind_of(problem)]
            if step < 64:  # x is staged in rows of 128 bytes or more
                continue
            for split in splits(-(-problem.n // tile[0]), problem.k // step, device.units):
                if {**config, "split": split} not in found:
                    found.append({**config, "split": split})
        return found

    def default_config(self, problem: Problem, device: Device) -> Config:
        """The tile that was best on an H200 (docs/measured.md)."""
        if problem.weight.group_size:
            block_n, warps, depth = (128, 8, 1) if problem.m <= 32 or problem.n > 32 * device.units else (64, 4, 1)
        else:
            block_n, warps, depth = 64, 4, 2
        config = self._config(problem, (block_n, warps, depth, 2))
        step = self.step_words(config) * PER_WORD[kind_of(problem)]
        parts = splits(-(-problem.n // block_n), problem.k // step, device.units)
        return {**config, "split": parts[-1 if warps == 4 and problem.m <= 32 else 0]}

    def _config(self, problem: Problem, tile: tuple[int, int, int, int]) -> dict[str, int]:
        block_n, warps, depth, ahead = tile
        lane, group = lane_words(problem), problem.weight.group_size
        unroll = min(depth, group // (4 * lane * PER_WORD[kind_of(problem)])) if group else depth
        return {"BLOCK_N": block_n, "LANE_WORDS": lane, "UNROLL": unroll, "WARPS": warps, "AHEAD": ahead,
                "ROTATE": 1,
                "num_warps": warps}  # fmt: skip

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        """As measured on an H200: the bytes at a share of the bandwidth that falls with the rows of x, and a start."""
        slope = 0.036 if problem.weight.name == "int4" else 0.012
        share = 1 / (1 + slope * problem.m)
        return time_us(problem.bytes_moved, share * device.read_gbs, fixed_us=4.5 + 0.1 * problem.m)

    def reduction(self, problem: Problem, config: Config) -> str:
        step = f"{config['LANE_WORDS']} x {config['UNROLL']} words of {problem.weight} a step"
        return f"fp32, warpgroup MMAs of 16, {step}, {config['split']} parts"
