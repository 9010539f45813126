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
    row_layout,
    row_of,
    splits,
    store_tile,
    widened_by,
    word_layout,
)
from ._triton import gdc_launch_dependents, gdc_wait
from .base import Config, Run, time_us


@gluon.jit
def _load_x(pointers, at, end, m, M, EVEN: gl.constexpr):
    """A tile of x in words of two values; rows past M are whatever they are, as no result of theirs is stored."""
    if EVEN:
        return gl.load(pointers, mask=(m < M) & (at >= 0))
    else:
        return gl.load(pointers, mask=(m < M) & (at < end), other=0)


@gluon.jit
def _add_step(acc, w, x, scale, zero, KIND: gl.constexpr, BF16: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr,
              LANE_WORDS: gl.constexpr, UNROLL: gl.constexpr):  # fmt: skip
    """The sums (DEPTH, BLOCK_N, BLOCK_M) and a step's products, of words of w, of x and each group's scale."""
    DEPTH: gl.constexpr = acc.shape[0]
    BLOCK_N: gl.constexpr = acc.shape[1]
    BLOCK_M: gl.constexpr = acc.shape[2]
    ACC: gl.constexpr = acc.type.layout
    K: gl.constexpr = 4 * LANE_WORDS * UNROLL * per_word(KIND)
    CROSSED: gl.constexpr = KIND == "fp8" and BF16
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, ACC, 2)
    left = fragments(w, zero, KIND, BF16, ZERO, DEPTH * BLOCK_N, LANE_WORDS, UNROLL, CROSSED)
    left = gl.convert_layout(left.reshape([DEPTH, BLOCK_N, K]), LEFT)
    low, high = halves(x, BF16)
    right = in_order(gl.join(low, high), KIND, DEPTH * BLOCK_M, LANE_WORDS * per_word(KIND), UNROLL, CROSSED)
    right = gl.convert_layout(right.reshape([DEPTH, BLOCK_M, K]).permute([0, 2, 1]), RIGHT)
    if GROUP > 0:
        product = mma_v2(left, right, gl.zeros([DEPTH, BLOCK_N, BLOCK_M], gl.float32, ACC))
        by_row = scale.reshape([DEPTH, 8, BLOCK_N // 8]).permute([0, 2, 1]).reshape([DEPTH, BLOCK_N])
        return acc + product * gl.expand_dims(gl.convert_layout(by_row, gl.SliceLayout(2, ACC)), 2)
    else:
        return mma_v2(left, right, acc)


@gluon.jit(do_not_specialize=["M"])
def _decode(x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, row_words, groups, split, M,
            KIND: gl.constexpr, BF16: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr,
            EVEN: gl.constexpr, ALIGN: gl.constexpr, PDL: gl.constexpr, FROZEN: gl.constexpr, SPLIT: gl.constexpr,
            BLOCK_M: gl.constexpr, RAGGED: gl.constexpr, BLOCK_N: gl.constexpr, LANE_WORDS: gl.constexpr,
            UNROLL: gl.constexpr, CHAINS: gl.constexpr, WARPS_N: gl.constexpr, WARPS_K: gl.constexpr,
            AHEAD: gl.constexpr):  # fmt: skip
    """y (M, N) = x (M, K) @ w (N, K).T * scale + bias; a program BLOCK_N rows of w and part ``split`` of K.

    Warps lie WARPS_N along N by WARPS_K along K, where each lane also keeps CHAINS sums: in a step every chain
    takes the next 4 * LANE_WORDS * UNROLL words of each row, which for grouped formats lie within one group. The
    next step's loads are under way during a step: the weight's (AHEAD >= 1), and x's (AHEAD = 2). At the end the
    chains are summed in order by a tree, the parts of K in order by the program that comes last.

    row_words: words in a row of w, ALIGN of them taken for one. split: no more than there are steps. RAGGED: the last
    program has fewer rows; those past N repeat the last and are not stored.
    """
    DEPTH: gl.constexpr = CHAINS * WARPS_K
    WIDTH: gl.constexpr = 4 * LANE_WORDS * UNROLL
    VALUES: gl.constexpr = per_word(KIND)  # in a word
    X_WORDS: gl.constexpr = VALUES // 2  # of x, to a word of w
    W_TILE: gl.constexpr = word_layout(LANE_WORDS, UNROLL, 16, BLOCK_N, WARPS_N, DEPTH, WARPS_K)
    X_TILE: gl.constexpr = word_layout(LANE_WORDS * X_WORDS, UNROLL, 8, BLOCK_M, WARPS_N, DEPTH, WARPS_K)
    ACC: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS_K, WARPS_N, 1], [1, 16, 8])
    tile = gl.program_id(0)
    part = gl.program_id(1)
    words = row_words * ALIGN
    steps = (words + WIDTH * DEPTH - 1) // (WIDTH * DEPTH)
    first = steps * part // split
    last = steps * (part + 1) // split

    r = gl.expand_dims(gl.arange(0, DEPTH * BLOCK_N, layout=gl.SliceLayout(1, W_TILE)), 1)
    w_at = first * (DEPTH * WIDTH) + r // BLOCK_N * WIDTH + gl.expand_dims(
        gl.arange(0, WIDTH, layout=gl.SliceLayout(0, W_TILE)), 0)  # fmt: skip
    w_row = gl.minimum(tile * BLOCK_N + row_of(r % BLOCK_N, BLOCK_N), N - 1).to(gl.int64)
    w_pointers = w_ptr + w_row * row_words * ALIGN + w_at
    r = gl.expand_dims(gl.arange(0, DEPTH * BLOCK_M, layout=gl.SliceLayout(1, X_TILE)), 1)
    x_at = first * (DEPTH * WIDTH * X_WORDS) + r // BLOCK_M * (WIDTH * X_WORDS) + gl.expand_dims(
        gl.arange(0, WIDTH * X_WORDS, layout=gl.SliceLayout(0, X_TILE)), 0)  # fmt: skip
    x_row = r % BLOCK_M
    x_pointers = x_ptr + x_row * (row_words * X_WORDS) * ALIGN + x_at
    if GROUP > 0:
        ROWS: gl.constexpr = row_layout(BLOCK_N, WARPS_N, DEPTH, WARPS_K)
        s_chain = gl.expand_dims(gl.arange(0, DEPTH, layout=gl.SliceLayout(1, ROWS)), 1)
        s_row = tile * BLOCK_N + gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, ROWS)), 0)
        if RAGGED:
            s_row = gl.minimum(s_row, N - 1)
        s_pointers = scale_ptr + s_row
    if ZERO:
        r = gl.arange(0, DEPTH * BLOCK_N, layout=gl.SliceLayout(1, W_TILE))
        z_chain = r // BLOCK_N
        z_pointers = zero_ptr + gl.minimum(tile * BLOCK_N + row_of(r % BLOCK_N, BLOCK_N), N - 1)

    if PDL and not FROZEN:
        gdc_wait()
    w = load_words(w_pointers, w_at, words, EVEN)
    scale = 0
    zero = 0
    if GROUP > 0:
        scale = load_group(s_pointers, first * DEPTH + s_chain, groups, N, WIDTH * VALUES, GROUP)
    if ZERO:
        zero = load_group(z_pointers, first * DEPTH + z_chain, groups, N, WIDTH * VALUES, GROUP)
    if PDL and FROZEN:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    x = _load_x(x_pointers, x_at, words * X_WORDS, x_row, M, EVEN)
    acc = gl.zeros([DEPTH, BLOCK_N, BLOCK_M], gl.float32, ACC)
    for step in range(first + 1, last):
        w_now, x_now, scale_now, zero_now = w, x, scale, zero
        w_pointers += DEPTH * WIDTH
        w_at += DEPTH * WIDTH
        x_pointers += DEPTH * WIDTH * X_WORDS
        x_at += DEPTH * WIDTH * X_WORDS
        if AHEAD == 0:
            acc = _add_step(acc, w, x, scale, zero, KIND, BF16, GROUP, ZERO, LANE_WORDS, UNROLL)
        w = load_words(w_pointers, w_at, words, EVEN)
        if GROUP > 0:
            scale = load_group(s_pointers, step * DEPTH + s_chain, groups, N, WIDTH * VALUES, GROUP)
        if ZERO:
            zero = load_group(z_pointers, step * DEPTH + z_chain, groups, N, WIDTH * VALUES, GROUP)
        if AHEAD == 2:
            x = _load_x(x_pointers, x_at, words * X_WORDS, x_row, M, EVEN)
        if AHEAD > 0:
            acc = _add_step(acc, w_now, x_now, scale_now, zero_now, KIND, BF16, GROUP, ZERO, LANE_WORDS, UNROLL)
        if AHEAD < 2:
            x = _load_x(x_pointers, x_at, words * X_WORDS, x_row, M, EVEN)
    acc = _add_step(acc, w, x, scale, zero, KIND, BF16, GROUP, ZERO, LANE_WORDS, UNROLL)
    y = gl.sum(acc, 0)
    if widened_by(KIND, BF16) != 1:
        y *= widened_by(KIND, BF16)
    store_tile(y, tile, part, split, scale_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, M,
               KIND != "dense" and GROUP == 0, BIAS, SPLIT, BLOCK_N, BLOCK_M, None, True)  # fmt: skip


# (BLOCK_N, num_warps, WARPS_N, LANE_WORDS that a lane takes a step, AHEAD, and perhaps the registers a thread may have)
# for up to 8, 16 and 64 rows of x.
_TILES: dict[int, list[tuple[int, ...]]] = {
    8: [
        (16, 4, 1, 8, 0), (16, 4, 1, 8, 2), (16, 8, 1, 8, 0), (16, 8, 1, 4, 0), (16, 4, 1, 4, 0), (16, 4, 1, 4, 1),
        (16, 4, 1, 4, 2), (16, 4, 1, 2, 0), (16, 4, 1, 2, 1), (16, 4, 1, 2, 2), (32, 4, 1, 1, 2), (32, 4, 1, 2, 1),
        (64, 4, 1, 1, 0, 128), (64, 4, 4, 4, 2),
    ],
    16: [
        (16, 4, 1, 8, 0), (16, 4, 1, 4, 2), (16, 4, 1, 4, 1), (16, 4, 1, 2, 2), (16, 4, 1, 2, 1), (32, 4, 1, 4, 0),
        (32, 4, 1, 2, 0), (32, 4, 1, 2, 2), (64, 8, 4, 4, 0), (64, 4, 1, 1, 1), (128, 8, 8, 2, 1), (128, 4, 2, 1, 1),
    ],
    64: [(128, 8, 8, 2, 1), (64, 4, 4, 2, 0), (64, 8, 2, 1, 1)],
}  # fmt: skip


def _best_tile(problem: Problem, device: Device) -> tuple[int, ...]:
    """The tile that was best on an H200 (docs/measured.md), by how many strips of 16 rows come to a multiprocessor.

    What its registers let a multiprocessor run at once decides: of the tiles that fit all strips in one wave, the one
    that asks for most bytes, and of equals one whose programs have more rows, which share x.
    """
    m, k, kind, strips = problem.m, problem.k, kind_of(problem), problem.n / 16 / device.units
    if m <= 8 and kind == "int4":
        return _best_int4(m, k, strips)
    if m <= 8 and kind == "dense":
        if strips <= 1:
            return (16, 8, 1, 8, 0)
        return (16, 4, 1, 8, 0) if strips <= 2 and k >= 2048 else (16, 4, 1, 4, 0 if strips <= 5 else 2)
    if m <= 8:
        if strips <= 3 and k <= 1024:  # all of a row in one step
            return (16, 4, 1, 4, 2)
        if strips <= 1:
            return (16, 8, 1, 8, 0)
        if strips <= 2:
            return (16, 4, 1, 8, 1) if kind == "fp8" else (16, 4, 1, 8, 2)
        if strips <= 3:
            return (16, 4, 1, 8, 0)
        if strips <= 4:
            return (16, 4, 1, 4, 1)
        if kind == "fp8":
            return (16, 4, 1, 2, 2) if strips <= 5 else (16, 4, 1, 2, 1)
        return (16, 4, 1, 2, 1) if 5 < strips <= 7 else (16, 4, 1, 4, 0)
    if m <= 16 and kind == "fp8":
        return (16, 4, 1, 4, 1)
    if m <= 16 and kind == "int8":
        if strips <= 3 and k > 1024:
            return (16, 4, 1, 8, 0)
        return (32, 4, 1, 4, 0) if strips <= 4 else (16, 4, 1, 2, 1) if strips <= 5 else (32, 4, 1, 2, 0)
    if m <= 16:
        if strips <= 3:
            return (32, 4, 1, 2, 0) if kind == "int4" and k <= 1024 else (16, 4, 1, 4, 2)
        return (64, 8, 4, 4, 0) if kind == "dense" else (128, 4, 2, 1, 1)
    return (128, 8, 8, 2, 1) if m <= 32 else (64, 4, 4, 2, 0)


def _best_int4(m: int, k: int, strips: float) -> tuple[int, ...]:
    """``_best_tile`` of int4 and up to eight rows of x, of which a row of the weight wants four times its own bytes."""
    if k <= 1024:  # all of a row in one step
        return (32, 4, 1, 2, 1) if strips <= 2 else (16, 4, 1, 2, 0)
    if strips <= 1:
        return (16, 8, 1, 4, 0)
    if strips <= 2 and k <= 8192:
        return (16, 4, 1, 4, 1)
    if 2 < strips <= 3:
        return (16, 4, 1, 4, 0)
    if 4 < strips <= 5:
        return (16, 4, 1, 2, 0) if m == 1 else (32, 4, 1, 2, 1)
    return (32, 4, 1, 1, 2) if strips <= 8 else (64, 4, 1, 1, 0, 128)


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

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        return super().bind(problem, device, {"RAGGED": problem.n % int(config["BLOCK_N"]) != 0, **config})

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
        deepest = 4 if problem.m > 8 and problem.weight.group_size else 8
        while True:
            config = self._config(problem, (block_n, warps, warps_n, depth, *rest))
            step = self.step_words(config) * values
            # No deeper than K; and masks need registers of their own.
            masked = problem.k % step != 0
            if depth == 1 or (step < 2 * problem.k and not (masked and depth >= deepest)):
                parts = splits(-(-problem.n // block_n), problem.k // step, device.units)
                many = problem.weight.name == "fp8" if problem.m > 8 else block_n == 32 and problem.k > 1024
                return {**config, "split": parts[-1 if many else 0]}
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
        if m <= 8 and int4:
            share, fixed = (0.87, 1.9) if m == 1 else (0.82, 2.3)
        elif m <= 8:
            share, fixed = (0.93 if m > 1 else 0.97, 2.1) if dense else (0.97, 1.8)
        elif m <= 16 and int4:
            share, fixed = {16: (0.42, 3.6), 32: (0.6, 2.4)}.get(int(config["BLOCK_N"]), (0.5, 5.0))
        elif m <= 16:
            share, fixed = (0.95, 4.2) if dense else (0.88, 3.0) if problem.weight.name == "int8" else (0.8, 3.4)
        else:
            share, fixed = 1 / (1.2 + (0.08 if int4 else 0.05) * m), 4.5 + 0.12 * m
        return time_us(problem.bytes_moved, share * device.read_gbs, fixed_us=fixed)

    def reduction(self, problem: Problem, config: Config) -> str:
        step = " x ".join(str(config[name]) for name in ("LANE_WORDS", "UNROLL", "CHAINS", "WARPS_K"))
        return f"fp32, MMAs of 16, {step} words of {problem.weight} a step, {config['split']} parts"
