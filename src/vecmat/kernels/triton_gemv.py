"""One row of x by a dense weight, in Triton without tensor cores: the weight read once, at the memory's speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import Device
from ..problem import DTYPES, Problem
from ..weights import Weight
from ._triton import LAUNCH_ERRORS, Frozen, Launch, gdc_launch_dependents, gdc_wait, overlaps, rejects_dense
from .base import Config, Kernel, Run, flat, time_us


@triton.jit
def _load(pointers, k, K, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, mask=k < K, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=k < K, other=0.0, eviction_policy="evict_first")


@triton.jit
def _rows(x_ptr, w_ptr, bias_ptr, y_ptr, N, K, stride_xk, stride_wn, stride_wk,
          BIAS: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, FROZEN: tl.constexpr,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """y (N,) = w (N, K) @ x (K,) + bias; one program BLOCK_N rows of w, BLOCK_K of K a step.

    Products in fp32 are added to BLOCK_K running sums a row, which one tree sum joins at the end; the bias is added
    in fp32; one rounding at the store. The weight is read once and evicted first, a step ahead; x stays in cache.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.where(n < N, n, 0).to(tl.int64)
    w_tile = w_ptr + row[:, None] * stride_wn + k[None, :].to(tl.int64) * stride_wk
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    if PDL and not FROZEN:
        gdc_wait()
    w = _load(w_tile, k[None, :], K, EVEN)
    if PDL and FROZEN:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    for start in range(0, K, BLOCK_K):
        x = tl.load(x_ptr + (start + k) * stride_xk, mask=start + k < K, other=0.0)
        now = w
        w_tile += BLOCK_K * stride_wk
        w = _load(w_tile, start + BLOCK_K + k[None, :], K, EVEN)
        acc += now.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


class TritonGemv(Kernel):
    """M = 1, layout nk, fp16, bf16 or fp32: one pass over the weight, sums in fp32."""

    version = 2
    packing = "by_group"
    launch_errors = LAUNCH_ERRORS

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if problem.m != 1:
            return f"M={problem.m}; this kernel multiplies one row"
        if problem.layout != "nk":
            return "the weight lies as (K, N); this kernel reads rows of K"
        return rejects_dense(problem, device, ("fp16", "bf16", "fp32"))

    def prepare(self, weight: Weight) -> Frozen:
        return Frozen.of(weight)

    def configs(self, problem: Problem, device: Device) -> Sequence[Config]:
        return [
            {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps}
            for block_n in (1, 2, 4, 8)
            for block_k in (512, 1024, 2048)
            for num_warps in (2, 4, 8)
            if block_n * block_k in (1024 * num_warps, 512 * num_warps, 256 * num_warps)
        ]

    def default_config(self, problem: Problem, device: Device) -> Config:
        # The best on an H200 (docs/measured.md).
        if problem.k <= 1024:
            return {"BLOCK_N": 4, "BLOCK_K": 512, "num_warps": 4}
        if problem.n <= 8 * device.units and problem.k >= 2048:
            return {"BLOCK_N": 2, "BLOCK_K": 2048, "num_warps": 8}
        return {"BLOCK_N": 4, "BLOCK_K": 1024, "num_warps": 4}

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        if device.interpreted:
            return 1e9  # for tests, never a choice
        return time_us(problem.bytes_moved, 0.985 * device.read_gbs, fixed_us=1.7)

    def reduction(self, problem: Problem, config: Config) -> str:
        tile = f"{config['BLOCK_N']} x {config['BLOCK_K']}"
        return f"fp32, {config['BLOCK_K']} running sums joined by a tree, tiles of {tile}, {config['num_warps']} warps"

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        n, k, out, pdl = problem.n, problem.k, DTYPES[problem.out], overlaps(device)
        grid = (-(-n // int(config["BLOCK_N"])), 1)
        constants = {"BIAS": problem.bias, "EVEN": k % int(config["BLOCK_K"]) == 0, "PDL": pdl}
        tile = {"BLOCK_N": config["BLOCK_N"], "BLOCK_K": config["BLOCK_K"]}
        warps = int(config["num_warps"])
        frozen = Launch(_rows, device, {**constants, "FROZEN": True, **tile}, pdl=pdl, num_warps=warps)
        changing = Launch(_rows, device, {**constants, "FROZEN": False, **tile}, pdl=pdl, num_warps=warps)

        def run(x: Tensor, weight: Tensor | Frozen, bias: Tensor | None) -> Tensor:
            y = torch.empty(n, dtype=out, device=x.device)
            row = flat(x)
            bias = None if bias is None else bias.contiguous()
            launch, data = (frozen, weight.data) if isinstance(weight, Frozen) else (changing, weight)
            launch(grid, (row, data, bias, y), (n, k, row.stride(1), *data.stride()))
            return y.view(*x.shape[:-1], n)

        return run
