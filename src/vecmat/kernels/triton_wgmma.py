"""Tens of rows of x by a dense, int8, fp8 or int4 weight (N, K): Hopper's warpgroup MMA, the weight in registers."""

from __future__ import annotations

from collections.abc import Sequence

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma

from ..device import Device
from ..problem import Problem
from ._gluon import (
    PER_WORD,
    Fragments,
    fragments,
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
def _load_x(x_ptr, step, k, m, K, M, more, DEEP: gl.constexpr):
    """A tile (BLOCK_M, DEEP) of x, zero past its edges."""
    at = step * DEEP + k
    return gl.load(x_ptr + m * K + at, mask=(m < M) & (at < K) & more, other=0.0)


@gluon.jit(do_not_specialize=["M"])
def _warpgroups(x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, row_words, groups, split, M,
                KIND: gl.constexpr, BF16: gl.constexpr, GROUP: gl.constexpr, ZERO: gl.constexpr, BIAS: gl.constexpr,
                EVEN: gl.constexpr, ALIGN: gl.constexpr, PDL: gl.constexpr, FROZEN: gl.constexpr, SPLIT: gl.constexpr,
                BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, LANE_WORDS: gl.constexpr, UNROLL: gl.constexpr,
                WARPS: gl.constexpr):  # fmt: skip
    """y (M, N) = x (M, K) @ w (N, K).T * scale + bias; a program BLOCK_N rows of w and part ``split`` of K.

    The weight goes from memory through the registers, where it is widened, into wgmma as its left operand; x, the
    right one, through shared memory, put into the fragments' order on the way. The next step's loads are under way
    during a step. The parts of K are summed in order by the program that comes last.

    row_words: words in a row of w, ALIGN of them taken for one. Rows past N repeat the last and are not stored.
    """
    WIDTH: gl.constexpr = 4 * LANE_WORDS * UNROLL
    VALUES: gl.constexpr = per_word(KIND)  # in a word
    DEEP: gl.constexpr = WIDTH * VALUES
    W_TILE: gl.constexpr = word_layout(LANE_WORDS, UNROLL, 16, BLOCK_N, WARPS, 1, 1)
    X_TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // min(256, DEEP), min(32, DEEP // 8)], [WARPS, 1], [1, 0])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    X_TYPE: gl.constexpr = x_ptr.dtype.element_ty
    if PDL:
        gdc_launch_dependents()
    tile = gl.program_id(0)
    part = gl.program_id(1)
    words = row_words * ALIGN
    K = words * VALUES
    steps = (words + WIDTH - 1) // WIDTH
    first = steps * part // split
    last = steps * (part + 1) // split
    r = gl.expand_dims(gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, W_TILE)), 1)
    w_at = first * WIDTH + gl.expand_dims(gl.arange(0, WIDTH, layout=gl.SliceLayout(0, W_TILE)), 0)
    w_pointers = w_ptr + gl.minimum(tile * BLOCK_N + r, N - 1).to(gl.int64) * row_words * ALIGN + w_at
    x_m = gl.expand_dims(gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, X_TILE)), 1)
    x_k = gl.expand_dims(gl.arange(0, DEEP, layout=gl.SliceLayout(0, X_TILE)), 0)
    if GROUP > 0:
        s_row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, ACC))
        s_pointers = scale_ptr + gl.minimum(tile * BLOCK_N + s_row, N - 1)
    if ZERO:
        z_row = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, W_TILE))
        z_pointers = zero_ptr + gl.minimum(tile * BLOCK_N + z_row, N - 1)
    staged = gl.allocate_shared_memory(X_TYPE, [2, BLOCK_M, DEEP], gl.NVMMASharedLayout(128, 16, 2))
    if PDL and not FROZEN:
        gdc_wait()
    w = load_words(w_pointers, w_at, words, True, EVEN)
    if GROUP > 0:
        scale = load_group(s_pointers, first, groups, N, True, DEEP, GROUP)
        if ZERO:
            zero = load_group(z_pointers, first, groups, N, True, DEEP, GROUP)
    if PDL and FROZEN:
        gdc_wait()
    x = _load_x(x_ptr, first, x_k, x_m, K, M, True, DEEP)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC)
    for step in range(first, last):
        more = step + 1 < last
        buffer = staged.index((step - first) % 2)
        buffer.store(in_order(x, KIND, BLOCK_M, LANE_WORDS * VALUES, UNROLL))
        w_now = w
        zero_now = 0
        if GROUP > 0:
            scale_now = scale
            if ZERO:
                zero_now = zero
        w_pointers += WIDTH
        w_at += WIDTH
        w = load_words(w_pointers, w_at, words, more, EVEN)
        x = _load_x(x_ptr, step + 1, x_k, x_m, K, M, more, DEEP)
        if GROUP > 0:
            scale = load_group(s_pointers, step + 1, groups, N, more, DEEP, GROUP)
            if ZERO:
                zero = load_group(z_pointers, step + 1, groups, N, more, DEEP, GROUP)
        left = gl.convert_layout(fragments(w_now, zero_now, KIND, BF16, ZERO, BLOCK_N, LANE_WORDS, UNROLL), LEFT)
        fence_async_shared()
        right = buffer.permute((1, 0))
        if GROUP > 0:
            product = warpgroup_mma(left, right, gl.zeros([BLOCK_N, BLOCK_M], gl.float32, ACC), use_acc=False)
            acc += product * gl.expand_dims(scale_now, 1)
        else:
            acc = warpgroup_mma(left, right, acc)
    store_tile(acc, tile, part, split, scale_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, M,
               KIND != "dense" and GROUP == 0, BIAS, SPLIT, BLOCK_N, BLOCK_M)  # fmt: skip


# (BLOCK_N, num_warps, UNROLL)
_TILES = [(64, 4, 1), (64, 4, 2), (64, 4, 4), (128, 8, 1), (128, 8, 2)]


class TritonWgmma(Fragments):
    """9 to 128 rows, layout nk, compute capability 9.0: x through shared memory, m64nMk16 on the tensor cores."""

    function = _warpgroups
    words = (1,)
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
        config = self._config(problem, (block_n, warps, depth))
        step = self.step_words(config) * PER_WORD[kind_of(problem)]
        parts = splits(-(-problem.n // block_n), problem.k // step, device.units)
        return {**config, "split": parts[-1 if warps == 4 and problem.m <= 32 else 0]}

    def _config(self, problem: Problem, tile: tuple[int, int, int]) -> dict[str, int]:
        block_n, warps, depth = tile
        lane, group = lane_words(problem), problem.weight.group_size
        unroll = min(depth, group // (4 * lane * PER_WORD[kind_of(problem)])) if group else depth
        return {"BLOCK_N": block_n, "LANE_WORDS": lane, "UNROLL": unroll, "WARPS": warps, "num_warps": warps}

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        """As measured on an H200: the bytes at a share of the bandwidth that falls with the rows of x, and a start."""
        slope = 0.036 if problem.weight.name == "int4" else 0.012
        share = 1 / (1 + slope * problem.m)
        return time_us(problem.bytes_moved, share * device.read_gbs, fixed_us=4.5 + 0.1 * problem.m)

    def reduction(self, problem: Problem, config: Config) -> str:
        step = f"{config['LANE_WORDS']} x {config['UNROLL']} words of {problem.weight} a step"
        return f"fp32, warpgroup MMAs of 16, {step}, {config['split']} parts"
