"""A few rows of x by a dense, int8, fp8 or int4 weight (N, K): from memory straight into tensor cores' fragments."""

from __future__ import annotations

import math
from collections.abc import Sequence

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

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


@gluon.jit
def _load_x(pointers, at, end, m, M, more, EVEN: gl.constexpr):
    """A tile of x in words of two values; rows past M are whatever they are, as no result of theirs is stored."""
    if EVEN:
        return gl.load(pointers, mask=(m < M) & (at >= 0) & more)
    else:
        return gl.load(pointers, mask=(m < M) & (at < end) & more, other=0)


@gluon.jit(do_not_specialize=["M"])
def _decode(x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, row_words, groups, split, M,
            KIND: gl.constexpr, BF16: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr,
            EVEN: gl.constexpr, ALIGN: gl.constexpr, PDL: gl.constexpr, FROZEN: gl.constexpr, SPLIT: gl.constexpr,
            BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, LANE_WORDS: gl.constexpr, UNROLL: gl.constexpr,
            CHAINS: gl.constexpr, WARPS_N: gl.constexpr, WARPS_K: gl.constexpr, AHEAD: gl.constexpr):  # fmt: skip
    """y (M, N) = x (M, K) @ w (N, K).T * scale + bias; a program BLOCK_N rows of w and part ``split`` of K.

    Warps lie WARPS_N along N by WARPS_K along K, where each lane also keeps CHAINS sums: in a step every chain
    takes the next 4 * LANE_WORDS * UNROLL words of each row, which for grouped formats lie within one group. The
    next step's loads are under way during a step: the weight's (AHEAD >= 1), and x's (AHEAD = 2). At the end the
    chains are summed in order by a tree, the parts of K in order by the program that comes last.

    row_words: words in a row of w, ALIGN of them taken for one. Rows past N repeat the last and are not stored.
    """
    DEPTH: gl.constexpr = CHAINS * WARPS_K
    WIDTH: gl.constexpr = 4 * LANE_WORDS * UNROLL
    VALUES: gl.constexpr = per_word(KIND)  # in a word
    X_WORDS: gl.constexpr = VALUES // 2  # of x, to a word of w
    W_TILE: gl.constexpr = word_layout(LANE_WORDS, UNROLL, 16, BLOCK_N, WARPS_N, DEPTH, WARPS_K)
    X_TILE: gl.constexpr = word_layout(LANE_WORDS * X_WORDS, UNROLL, 8, BLOCK_M, WARPS_N, DEPTH, WARPS_K)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_K, WARPS_N, 1], [1, 16, 8])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    if PDL:
        gdc_launch_dependents()
    tile = gl.program_id(0)
    part = gl.program_id(1)
    words = row_words * ALIGN
    steps = (words + WIDTH * DEPTH - 1) // (WIDTH * DEPTH)
    first = steps * part // split
    last = steps * (part + 1) // split

    r = gl.expand_dims(gl.arange(0, DEPTH * BLOCK_N, layout=gl.SliceLayout(1, W_TILE)), 1)
    w_at = first * (DEPTH * WIDTH) + r // BLOCK_N * WIDTH + gl.expand_dims(
        gl.arange(0, WIDTH, layout=gl.SliceLayout(0, W_TILE)), 0)  # fmt: skip
    w_row = gl.minimum(tile * BLOCK_N + r % BLOCK_N, N - 1).to(gl.int64)
    w_pointers = w_ptr + w_row * row_words * ALIGN + w_at
    r = gl.expand_dims(gl.arange(0, DEPTH * BLOCK_M, layout=gl.SliceLayout(1, X_TILE)), 1)
    x_at = first * (DEPTH * WIDTH * X_WORDS) + r // BLOCK_M * (WIDTH * X_WORDS) + gl.expand_dims(
        gl.arange(0, WIDTH * X_WORDS, layout=gl.SliceLayout(0, X_TILE)), 0)  # fmt: skip
    x_row = r % BLOCK_M
    x_pointers = x_ptr + x_row * (row_words * X_WORDS) * ALIGN + x_at
    if GROUP > 0:
        BY_ROW: gl.constexpr = gl.SliceLayout(2, ACC)
        s_chain = gl.expand_dims(gl.arange(0, DEPTH, layout=gl.SliceLayout(1, BY_ROW)), 1)
        s_row = gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, BY_ROW)), 0)
        s_pointers = scale_ptr + gl.minimum(tile * BLOCK_N + s_row, N - 1)
    if ZERO:
        r = gl.arange(0, DEPTH * BLOCK_N, layout=gl.SliceLayout(1, W_TILE))
        z_chain = r // BLOCK_N
        z_pointers = zero_ptr + gl.minimum(tile * BLOCK_N + r % BLOCK_N, N - 1)

    if PDL and not FROZEN:
        gdc_wait()
    w = load_words(w_pointers, w_at, words, True, EVEN)
    if GROUP > 0:
        scale = load_group(s_pointers, first * DEPTH + s_chain, groups, N, True, WIDTH * VALUES, GROUP)
        if ZERO:
            zero = load_group(z_pointers, first * DEPTH + z_chain, groups, N, True, WIDTH * VALUES, GROUP)
    if PDL and FROZEN:
        gdc_wait()
    x = _load_x(x_pointers, x_at, words * X_WORDS, x_row, M, True, EVEN)
    acc = gl.zeros([DEPTH, BLOCK_N, BLOCK_M], gl.float32, ACC)
    for step in range(first, last):
        more = step + 1 < last
        w_now, x_now = w, x
        zero_now = 0
        if GROUP > 0:
            scale_now = scale
            if ZERO:
                zero_now = zero
        w_pointers += DEPTH * WIDTH
        w_at += DEPTH * WIDTH
        x_pointers += DEPTH * WIDTH * X_WORDS
        x_at += DEPTH * WIDTH * X_WORDS
        chain = (step + 1) * DEPTH
        if AHEAD > 0:
            w = load_words(w_pointers, w_at, words, more, EVEN)
            if GROUP > 0:
                scale = load_group(s_pointers, chain + s_chain, groups, N, more, WIDTH * VALUES, GROUP)
                if ZERO:
                    zero = load_group(z_pointers, chain + z_chain, groups, N, more, WIDTH * VALUES, GROUP)
        if AHEAD > 1:
            x = _load_x(x_pointers, x_at, words * X_WORDS, x_row, M, more, EVEN)
        left = fragments(w_now, zero_now, KIND, BF16, ZERO, DEPTH * BLOCK_N, LANE_WORDS, UNROLL)
        left = gl.convert_layout(left.reshape([DEPTH, BLOCK_N, WIDTH * VALUES]), LEFT)
        low, high = halves(x_now, BF16)
        right = in_order(gl.join(low, high), KIND, DEPTH * BLOCK_M, LANE_WORDS * VALUES, UNROLL)
        right = right.reshape([DEPTH, BLOCK_M, WIDTH * VALUES]).permute([0, 2, 1])
        right = gl.convert_layout(right, RIGHT)
        if GROUP > 0:
            product = mma_v2(left, right, gl.zeros([DEPTH, BLOCK_N, BLOCK_M], gl.float32, ACC))
            acc += product * gl.expand_dims(scale_now, 2)
        else:
            acc = mma_v2(left, right, acc)
        if AHEAD == 0:
            w = load_words(w_pointers, w_at, words, more, EVEN)
            if GROUP > 0:
                scale = load_group(s_pointers, chain + s_chain, groups, N, more, WIDTH * VALUES, GROUP)
                if ZERO:
                    zero = load_group(z_pointers, chain + z_chain, groups, N, more, WIDTH * VALUES, GROUP)
        if AHEAD < 2:
            x = _load_x(x_pointers, x_at, words * X_WORDS, x_row, M, more, EVEN)
    store_tile(gl.sum(acc, 0), tile, part, split, scale_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, M,
               KIND != "dense" and GROUP == 0, BIAS, SPLIT, BLOCK_N, BLOCK_M)  # fmt: skip


# (BLOCK_N, num_warps, WARPS_N, LANE_WORDS that a lane takes a step, AHEAD, and perhaps the registers a thread may have)
# for up to 8, 16 and 64 rows of x.
_TILES: dict[int, list[tuple[int, ...]]] = {
    8: [
        (16, 4, 1, 4, 2), (16, 4, 1, 4, 0), (16, 8, 1, 4, 0), (16, 4, 1, 8, 0), (16, 8, 1, 8, 0), (16, 4, 1, 2, 2),
        (16, 4, 1, 2, 0, 96), (32, 4, 1, 2, 2), (32, 4, 1, 1, 2), (64, 4, 4, 4, 2),
    ],
    16: [
        (16, 4, 1, 4, 2), (16, 4, 1, 4, 1), (16, 4, 1, 2, 2), (32, 4, 1, 2, 2), (64, 8, 4, 4, 0), (64, 4, 1, 1, 1),
        (128, 8, 8, 2, 1), (128, 4, 2, 1, 1),
    ],
    64: [(128, 8, 8, 2, 1), (64, 4, 4, 2, 0), (64, 8, 2, 1, 1)],
}  # fmt: skip


def _best_tile(problem: Problem, device: Device) -> tuple[int, ...]:
    """The tile that was best on an H200 (docs/measured.md), by how many strips of 16 rows come to a multiprocessor.

    What its registers let a multiprocessor run at once decides: of the tiles that fit all strips in one wave, the one
    that asks for most bytes. Here the waves end at 2, 3, 4, 5 and 7 programs of 16 rows, or 4 of 32.
    """
    m, kind, strips = problem.m, kind_of(problem), problem.n / 16 / device.units
    if m <= 8:
        if strips <= 1:
            return (16, 8, 1, 8, 0)
        if strips <= 2 and problem.k >= 2048:
            return (16, 4, 1, 4, 2) if kind == "int4" else (16, 8, 1, 4, 0) if kind == "fp8" else (16, 4, 1, 8, 0)
        if kind == "int4":
            if problem.k < 2048:
                return (16, 4, 1, 2, 2)
            if strips <= 3:
                return (16, 4, 1, 4, 0)
            return (32, 4, 1, 2, 2) if strips <= 4 else (16, 4, 1, 2, 0, 96) if strips <= 5 else (32, 4, 1, 1, 2)
        if kind == "int8" and strips > 6:
            return (16, 4, 1, 2, 2)
        if kind == "fp8" and 2 < strips <= 4:
            return (16, 4, 1, 4, 2)
        return (16, 4, 1, 4, 0) if strips <= 5 else (16, 4, 1, 4, 2)
    if m <= 16 and kind == "fp8":
        return (16, 4, 1, 4, 1)
    if m <= 16:
        if strips <= 3:
            return (16, 4, 1, 2, 2) if kind == "int4" and problem.k < 2048 else (16, 4, 1, 4, 2)
        return {"dense": (64, 8, 4, 4, 0), "int8": (128, 8, 8, 2, 1)}.get(kind, (128, 4, 2, 1, 1))
    return (128, 8, 8, 2, 1) if m <= 32 else (64, 4, 4, 2, 0)


class TritonDecode(Fragments):
    """Up to 64 rows, layout nk: bytes of the weight once through the registers, m16n8k16 on the tensor cores.

    With x as the right operand the eight columns of an MMA are rows of x, so one to eight rows cost the same.
    """

    function = _decode
    words = (0, 1)
    most_rows = 64

    def block_m(self, m: int) -> int:
        return max(8, 1 << (m - 1).bit_length())

    def step_words(self, config: Config) -> int:
        return math.prod(int(config[name]) for name in ("LANE_WORDS", "UNROLL", "CHAINS", "WARPS_K")) * 4

    def configs(self, problem: Problem, device: Device) -> Sequence[Config]:
        found: list[Config] = []
        for tile in _TILES[min(rows for rows in _TILES if rows >= problem.m)]:
            config = self._config(problem, tile)
            step = self.step_words(config) * PER_WORD[kind_of(problem)]
            for split in splits(-(-problem.n // tile[0]), problem.k // step, device.units):
                if step < 2 * problem.k or tile[3] == 1:
                    found.append({**config, "split": split})
        default = self.default_config(problem, device)
        return [default, *(config for place, config in enumerate(found) if config not in [default, *found[:place]])]

    def default_config(self, problem: Problem, device: Device) -> Config:
        block_n, warps, warps_n, depth, *rest = _best_tile(problem, device)
        values = PER_WORD[kind_of(problem)]
        if not problem.weight.symmetric:  # zero points need registers of their own
            depth, rest = min(depth, 2), rest[:1]
        while True:
            config = self._config(problem, (block_n, warps, warps_n, depth, *rest))
            step = self.step_words(config) * values
            # No deeper than K; and masks need registers of their own.
            if depth == 1 or (step < 2 * problem.k and (depth < 8 or problem.k % step == 0)):
                parts = splits(-(-problem.n // block_n), problem.k // step, device.units)
                return {**config, "split": parts[-1 if problem.m > 8 and problem.weight.name == "fp8" else 0]}
            depth //= 2

    def _config(self, problem: Problem, tile: tuple[int, ...]) -> dict[str, int]:
        block_n, warps, warps_n, depth, ahead, *registers = tile
        lane, group = lane_words(problem), problem.weight.group_size
        unroll = min(depth, group // (4 * lane * PER_WORD[kind_of(problem)])) if group else depth
        chains = min(depth // unroll, {8: 4, 16: 2}.get(self.block_m(problem.m), 1))
        return {
            "BLOCK_N": block_n, "LANE_WORDS": lane, "UNROLL": unroll, "CHAINS": chains, "WARPS_N": warps_n,
            "WARPS_K": warps // warps_n, "AHEAD": ahead, "num_warps": warps,
            **({"maxnreg": registers[0]} if registers else {}),
        }  # fmt: skip

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        """As measured on an H200: the bytes at a share of the bandwidth that falls with the rows of x, and a start."""
        m, dense, int4 = problem.m, problem.weight.dense, problem.weight.name == "int4"
        if m <= 8:
            share, fixed = 0.74 if int4 else 0.93 if dense and m > 1 else 0.97, 2.1
        elif m <= 16 and int4:
            share, fixed = (0.42, 4.4) if config["BLOCK_N"] == 16 else (0.58, 3.4)
        elif m <= 16:
            share, fixed = (0.95, 4.2) if dense else (0.8, 3.4)
        else:
            share, fixed = 1 / (1.2 + (0.08 if int4 else 0.05) * m), 4.5 + 0.12 * m
        return time_us(problem.bytes_moved, share * device.read_gbs, fixed_us=fixed)

    def reduction(self, problem: Problem, config: Config) -> str:
        step = " x ".join(str(config[name]) for name in ("LANE_WORDS", "UNROLL", "CHAINS", "WARPS_K"))
        return f"fp32, MMAs of 16, {step} words of {problem.weight} a step, {config['split']} parts"
