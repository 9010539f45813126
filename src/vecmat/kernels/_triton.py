"""What the Triton kernels share: who may run them, and how they are launched."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from ..device import Device
from ..problem import Problem
from .base import Config

LAUNCH_ERRORS: tuple[type[Exception], ...] = (CompilationError, OutOfResources, PTXASError)


@triton.jit
def tile_of(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The (row, column) of a program's tile, GROUP_M rows of tiles at a time, so that neighbours share them in L2."""
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % height, within // height


def rejects_dense16(problem: Problem, device: Device) -> str | None:
    """Why a Triton kernel for dense 16-bit weights cannot run a problem on a device, None if nothing stands against."""
    if not problem.weight.dense:
        return f"the weight is {problem.weight}; this kernel multiplies dense weights"
    if problem.x not in ("fp16", "bf16") or problem.weight.name != problem.x:
        return f"x is {problem.x} and the weight {problem.weight}; this kernel multiplies fp16 by fp16, bf16 by bf16"
    if problem.compute:
        return f"compute={problem.compute!r} quantises x; this kernel does not"
    if problem.grad:
        return "a gradient is asked for; this kernel has none"
    return rejects_device(problem, device)


def rejects_device(problem: Problem, device: Device) -> str | None:
    """Why no Triton kernel runs on a device, None if they do."""
    if device.interpreted:
        return "Triton's interpreter computes bf16 wrongly" if problem.x == "bf16" else None
    if not device.is_gpu:
        return "Triton needs a GPU (or TRITON_INTERPRET=1, to test without one)"
    if device.kind == "cuda" and device.capability < 80:
        return f"Triton needs compute capability 8.0 or later; this is {device.arch}"
    return None


def fitting(configs: Sequence[Config], device: Device) -> list[Config]:
    """The tile configs whose pipeline fits the device's shared memory; AMD's compiler wants two stages at most."""
    fit: list[Config] = []
    for config in configs:
        block_k, stages = int(config["BLOCK_K"]), int(config["num_stages"])
        stages = min(stages, 2) if device.kind == "hip" else stages
        stage_bytes = 2 * block_k * (int(config["BLOCK_M"]) + int(config["BLOCK_N"]))
        while stages > 1 and stage_bytes * stages > device.shared_bytes and not device.interpreted:
            stages -= 1
        made = {**config, "num_stages": stages}
        if (stage_bytes * stages <= device.shared_bytes or device.interpreted) and made not in fit:
            fit.append(made)
    return fit


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which Triton launches on x's device, whichever is current."""
    if x.device.type != "cuda" or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)
