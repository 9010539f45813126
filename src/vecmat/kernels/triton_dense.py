"""Dense fp16 and bf16 on tensor cores, in Triton: any M, both layouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import Device
from ..problem import DTYPES, Problem, bucket
from ._triton import (
    LAUNCH_ERRORS,
    Launch,
    arrivals,
    fitting,
    gdc_launch_dependents,
    gdc_wait,
    join_parts,
    overlaps,
    rejects_dense,
    tile_of,
)
from .base import Config, Kernel, Run, flat, time_us


@triton.jit(do_not_specialize=["M"])
def _tiles(x_ptr, w_ptr, bias_ptr, y_ptr, part_ptr, count_ptr, N, K, stride_xm, stride_xk, stride_wn, stride_wk,
           stride_ym, split, M, BIAS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, SPLIT: tl.constexpr,
           BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr):  # fmt: skip
    """y (M, N) = x (M, K) @ w (N, K).T + bias; a program a (BLOCK_M, BLOCK_N) tile of y and part ``split`` of K.

    Products and sums in fp32 on the tensor cores, the bias added in fp32, one rounding at the store. Rows and
    columns past the edge read row or column 0 and are not stored; past K's end both operands read zero.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    tile_m, tile_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.where(m < M, m, 0).to(tl.int64)
    column = tl.where(n < N, n, 0).to(tl.int64)
    first, end = 0, K
    if SPLIT:
        steps = tl.cdiv(K, BLOCK_K)
        first = steps * tl.program_id(1) // split * BLOCK_K
        end = min(steps * (tl.program_id(1) + 1) // split * BLOCK_K, K)
    x_tile = x_ptr + row[:, None] * stride_xm + (first + k[None, :]) * stride_xk
    w_tile = w_ptr + column[None, :] * stride_wn + (first + k[:, None]).to(tl.int64) * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        if EVEN:
            x = tl.load(x_tile)
            w = tl.load(w_tile)
        else:
            x = tl.load(x_tile, mask=k[None, :] < K - start, other=0.0)
            w = tl.load(w_tile, mask=k[:, None] < K - start, other=0.0)
        acc = tl.dot(x, w, acc)
        x_tile += BLOCK_K * stride_xk
        w_tile += BLOCK_K * stride_wk
    mine = (m[:, None] < M) & (n[None, :] < N)
    if SPLIT:
        place = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        acc, is_last = join_parts(
            acc, part_ptr, count_ptr, tl.program_id(0), tl.program_id(1), split, place, BLOCK_M * BLOCK_N
        )
        mine = mine & is_last
    if BIAS:
        acc += tl.load(bias_ptr + column)[None, :].to(tl.float32)
    y_tile = y_ptr + m[:, None].to(tl.int64) * stride_ym + n[None, :]
    tl.store(y_tile, acc.to(y_ptr.dtype.element_ty), mask=mine)


# (BLOCK_M, BLOCK_N, BLOCK_K, num_warps, num_stages)
_SMALL = [
    (16, 32, 64, 4, 6), (16, 32, 128, 4, 6), (16, 32, 256, 4, 4), (16, 64, 128, 4, 5), (16, 64, 256, 4, 4),
    (16, 128, 128, 4, 4), (16, 128, 64, 4, 6), (32, 32, 128, 4, 5), (32, 64, 128, 4, 4), (32, 128, 64, 4, 5),
    (64, 32, 128, 4, 4), (64, 64, 64, 4, 5), (64, 64, 128, 4, 4), (64, 128, 64, 4, 5),
]  # fmt: skip
_LARGE = [
    (64, 64, 64, 4, 5), (64, 128, 64, 4, 4), (64, 256, 64, 8, 4), (128, 64, 64, 4, 4), (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4), (128, 128, 128, 8, 3), (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3),
]  # fmt: skip


def _cut(problem: Problem, device: Device, config: Config, each: int) -> Config:
    """A config with K in as many parts as bring about ``each`` programs to a multiprocessor, a few steps in each."""
    tiles = -(-problem.m // int(config["BLOCK_M"])) * -(-problem.n // int(config["BLOCK_N"]))
    most = min(each * device.units // tiles, -(-problem.k // int(config["BLOCK_K"])) // 2, 16)
    split = max([parts for parts in (2, 3, 4, 6, 8, 12, 16) if parts <= most], default=1)
    return {**config, "split": split} if split > 1 else config


def _config(tile: tuple[int, int, int, int, int]) -> Config:
    block_m, block_n, block_k, num_warps, num_stages = tile
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8,
            "num_warps": num_warps, "num_stages": num_stages}  # fmt: skip


class TritonDense(Kernel):
    """Tiles of y on tensor cores, K in one pass or, where tiles are too few for the GPU, in parts.

    fp32 sums in BLOCK_K steps, in order; the parts are added in order by the program that comes last, so the same call
    gives the same bits.
    """

    launch_errors = LAUNCH_ERRORS

    def rejects(self, problem: Problem, device: Device) -> str | None:
        return rejects_dense(problem, device)

    def configs(self, problem: Problem, device: Device) -> Sequence[Config]:
        m = bucket(problem.m)
        deepest = max(64, triton.next_power_of_2(problem.k))
        # Accumulators a thread: before Hopper, whose tensor cores read from shared memory, operands need registers too.
        most = 128 if device.capability >= 90 else 64
        tiles = [
            tile
            for tile in (_SMALL if m <= 64 else _LARGE)
            if tile[0] <= max(16, 2 * m) and tile[2] <= deepest and tile[0] * tile[1] <= most * 32 * tile[3]
        ]
        found = fitting([_config(tile) for tile in tiles], device)
        cut = [_cut(problem, device, config, each) for config in found for each in (2, 4)] if m <= 64 else []
        return found + [config for place, config in enumerate(cut) if "split" in config and config not in cut[:place]]

    def default_config(self, problem: Problem, device: Device) -> Config:
        """The tile that was best on an H200 for this many rows (docs/measured.md), or the nearest that fits here."""
        m, n = bucket(problem.m), problem.n

        def fills(block_m: int, block_n: int) -> bool:
            return -(-m // block_m) * -(-n // block_n) >= 0.8 * device.units

        columns = -(-n // 64)
        if m <= 16 and columns > 4 * device.units:
            wanted = (16, 128, 128, 4, 4)
        elif m <= 16 and problem.k <= 1536:
            wanted = (16, 32, 128, 4, 6)
        elif m <= 16 or (m <= 32 and 2 * columns <= device.units):
            # the deepest step; a (K, N) weight is turned around in registers, which then last for half of it
            wanted = (16, 64, 256, 4, 4) if problem.layout == "nk" else (16, 64, 128, 4, 5)
        elif m <= 32:
            wanted = (32, 128, 64, 4, 5) if fills(32, 128) else (32, 64, 128, 4, 4)
        elif m <= 64:
            wanted = (64, 128, 64, 4, 5) if fills(64, 128) else (64, 32, 128, 4, 4)
        elif m <= 1024:
            wanted = (128, 128, 64, 4, 4) if fills(128, 128) else (64, 64, 64, 4, 5)
        else:
            wanted = (256, 128, 64, 8, 3)

        def distance(config: Config) -> tuple[float, float]:
            sides = zip(wanted, (config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]), strict=False)
            warps_and_stages = abs(wanted[3] - int(config["num_warps"])) + abs(wanted[4] - int(config["num_stages"]))
            return sum(abs(math.log2(int(have) / want)) for want, have in sides), warps_and_stages

        whole = [config for config in self.configs(problem, device) if "split" not in config]
        return min(whole, key=distance)

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        if device.interpreted:
            return 1e9  # for tests, never a choice
        block_m = int(config["BLOCK_M"])
        padded = 2.0 * -(-problem.m // block_m) * block_m * problem.n * problem.k
        fixed = 3.2 + 0.03 * min(problem.m, 128)
        share = 0.965 - 0.008 * max(16 - problem.m, 0)  # of the bandwidth; rows that only fill the tile cost some
        whole = time_us(problem.bytes_moved, share * device.read_gbs, padded, 0.75 * device.tflops16, fixed)
        # One program alone draws about 75 GB/s of the H200's 4450 however few there are: small N cannot fill it.
        program_bytes = 2 * problem.k * int(config["BLOCK_N"]) / int(config.get("split", 1))
        return max(whole, time_us(program_bytes, device.read_gbs / 60, fixed_us=fixed))

    def reduction(self, problem: Problem, config: Config) -> str:
        # Which MMA instruction sums a step depends on the tile and the warps, and so may the order within it.
        parts = f", {config['split']} parts" if "split" in config else ""
        return (
            f"fp32, tensor-core steps of {config['BLOCK_K']} in order, "
            f"tile {config['BLOCK_M']}x{config['BLOCK_N']}, {config['num_warps']} warps{parts}"
        )

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        n, k, out, nk = problem.n, problem.k, DTYPES[problem.out], problem.layout == "nk"
        tile = {name: int(config[name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")}
        block_m, columns, pdl = tile["BLOCK_M"], -(-n // tile["BLOCK_N"]), overlaps(device)
        split, index = int(config.get("split", 1)), device.index or 0
        constants = {"BIAS": problem.bias, "EVEN": k % tile["BLOCK_K"] == 0, "PDL": pdl, "SPLIT": split > 1, **tile}
        warps, stages = int(config["num_warps"]), int(config["num_stages"])
        launch = Launch(_tiles, device, constants, pdl=pdl, num_warps=warps, num_stages=stages)

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            rows = flat(x)
            bias = None if bias is None else bias.contiguous()
            m = rows.shape[0]
            y = torch.empty(m, n, dtype=out, device=x.device)
            strides = weight.stride() if nk else weight.stride()[::-1]
            tiles, part, count = -(-m // block_m) * columns, None, None
            if split > 1:
                part = torch.empty(tiles * split * block_m * tile["BLOCK_N"], dtype=torch.float32, device=x.device)
                count = arrivals(index, tiles) if x.is_cuda else torch.zeros(tiles, dtype=torch.int32)
            fixed = (n, k, *rows.stride(), *strides, n, split)
            launch((tiles, split), (rows, weight, bias, y, part, count), fixed, m)
            return y if x.dim() == 2 else y.view(*x.shape[:-1], n)

        return run
