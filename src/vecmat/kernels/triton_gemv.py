"""One row of x by a dense fp16 or bf16 weight (N, K), in Triton: the weight read once, at the memory's speed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..device import Device
from ..problem import DTYPES, Problem
from ._triton import LAUNCH_ERRORS, on_device, rejects_dense16
from .base import Config, Kernel, Run, flat, time_us


@triton.jit
def _rows(x_ptr, w_ptr, bias_ptr, y_ptr, N, K, stride_xk, stride_wn, stride_wk,
          BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
          HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr):  # fmt: skip
    """y (N,) = w (N, K) @ x (K,) + bias; one program BLOCK_N rows of w, BLOCK_K of K a step.

    Products in fp32 are added to BLOCK_K running sums a row, which one tree sum joins at the end; the bias is added
    in fp32; one rounding at the store. The weight is read once and evicted first, x stays in cache.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.where(n < N, n, 0).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.range(0, K, BLOCK_K, loop_unroll_factor=UNROLL):
        w_tile = w_ptr + row[:, None] * stride_wn + (start + k[None, :]).to(tl.int64) * stride_wk
        if EVEN_K:
            w = tl.load(w_tile, eviction_policy="evict_first")
            x = tl.load(x_ptr + (start + k) * stride_xk)
        else:
            w = tl.load(w_tile, mask=start + k[None, :] < K, other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + (start + k) * stride_xk, mask=start + k < K, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + row).to(tl.float32)
    tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=n < N)


class TritonGemv(Kernel):
    """M = 1, layout nk: no tensor cores, one pass over the weight in fp32."""

    launch_errors = LAUNCH_ERRORS

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if problem.m != 1:
            return f"M={problem.m}; this kernel multiplies one row"
        if problem.layout != "nk":
            return "the weight lies as (K, N); this kernel reads rows of K"
        return rejects_dense16(problem, device)

    def configs(self, problem: Problem, device: Device) -> Sequence[Config]:
        return [
            {"BLOCK_N": block_n, "BLOCK_K": block_k, "UNROLL": unroll, "num_warps": num_warps}
            for block_n in (1, 2, 4, 8)
            for block_k in (512, 1024, 2048)
            for unroll in (1, 4)
            for num_warps in (2, 4, 8)
            if block_n * block_k in (1024 * num_warps, 512 * num_warps)
        ]

    def default_config(self, problem: Problem, device: Device) -> Config:
        # The best on an H200 (docs/measured.md); masks, where K is no multiple, need registers of their own.
        block_k = 2048 if problem.k >= 2048 else 1024 if problem.k > 512 else 512
        return {"BLOCK_N": 2048 // block_k, "BLOCK_K": block_k, "UNROLL": 1, "num_warps": 4}

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        if device.interpreted:
            return 1e9  # for tests, never a choice
        return time_us(problem.bytes_moved, 0.985 * device.read_gbs, fixed_us=2.2)

    def reduction(self, problem: Problem, config: Config) -> str:
        return f"fp32, {config['BLOCK_K']} running sums joined by a tree of {config['num_warps']} warps"

    def bind(self, problem: Problem, device: Device, config: Config) -> Run:
        n, k, out = problem.n, problem.k, DTYPES[problem.out]
        grid = (-(-n // int(config["BLOCK_N"])),)
        even_k = k % int(config["BLOCK_K"]) == 0

        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            row = flat(x)
            bias = None if bias is None else bias.contiguous()
            y = torch.empty(n, dtype=out, device=x.device)
            with on_device(x):
                _rows[grid](
                    row, weight, bias, y, n, k, row.stride(1), *weight.stride(),
                    HAS_BIAS=bias is not None, EVEN_K=even_k, **config,
                )  # fmt: skip
            return y.view(*x.shape[:-1], n)

        return run
