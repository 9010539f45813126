"""Compile every Triton kernel for GPUs that are not here, and print a JSON line each: registers, spills, shared memory,
and what the machine code of a warpgroup's MMAs does wrong (``sass.py``).

Run as a program, without TRITON_INTERPRET: ``python tests/compile_triton.py a100 h100 ...``. What is compiled is what
``bind``'s callable would launch: it is called with tensors on the meta device, and the launch stops after compiling.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from sass import overwritten
from vecmat.device import Device
from vecmat.kernels import _gluon, registry
from vecmat.problem import DTYPES, Format, Problem
from vecmat.weights import Weight

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SIZES = ((1, 4096, 4096), (1, 100, 90), (16, 4096, 4096), (17, 100, 90), (64, 14336, 4096), (2048, 4096, 14336))


class AbsentGpu:
    """A driver for a GPU that is not here: it tells its target and no more."""

    def __init__(self, device: Device) -> None:
        nvidia = device.kind == "cuda"
        arch = device.capability if nvidia else device.arch
        self.target = GPUTarget("cuda" if nvidia else "hip", arch, 32 if nvidia else 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: object) -> int:
        return 0


def problems() -> list[Problem]:
    dense = [
        Problem(m=m, n=n, k=k, x=x, weight=Format.make(x), layout=layout, out=x, bias=bias)
        for m, n, k in SIZES
        for x in ("bf16", "fp16")
        for layout, bias in (("nk", False), ("kn", True))
    ]
    quantised = [
        Problem(m=m, n=n, k=k, x=x, weight=Format.parse(fmt), out=x, bias=True)
        for m, n, k in ((1, 4096, 4096), (16, 100, 96), (32, 4096, 4096), (64, 14336, 4096), (128, 4096, 4096))
        for fmt, x in (("int8", "bf16"), ("int4:g128:zp", "fp16"), ("int4:g64", "bf16"), ("fp8", "bf16"))
    ]
    return dense + quantised


def one_wave() -> list[Problem]:
    """Problems whose default tile is to let all programs of triton_decode run at once on 132 multiprocessors."""
    return [
        Problem(m=8, n=n, k=k, x="bf16", weight=Format.parse(fmt), out="bf16")
        for n, k in ((4096, 4096), (4096, 14336), (6144, 4096), (8192, 8192), (10240, 8192), (14336, 4096))
        for fmt in ("int8", "int4:g128", "fp8")
    ]


def stored(problem: Problem) -> Weight:
    """The problem's weight without numbers."""
    n, k, fmt = problem.n, problem.k, problem.weight
    width = -(-k // 2) if fmt.name == "int4" else k
    shape = (n, width) if problem.layout == "nk" else (width, n)
    scale = None if fmt.dense else torch.empty(n, fmt.groups(k), device="meta")
    zero = None if fmt.symmetric else torch.empty(n, fmt.groups(k), dtype=torch.uint8, device="meta")
    data = torch.empty(shape, dtype=fmt.dtype, device="meta")
    return Weight(fmt, data, scale, zero, k=k, layout=problem.layout)


def spills(compiled: triton.compiler.CompiledKernel) -> tuple[int, int]:
    """(registers a thread, bytes or registers spilled) of a compiled kernel."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        count = {name: max(map(int, re.findall(rf"\.{name}:\s+(\d+)", text))) for name in
                 ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")}  # fmt: skip
        return count["vgpr_count"], count["vgpr_spill_count"] + count["sgpr_spill_count"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        out = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    used = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", out))
    return int(used["REG"]), int(used["STACK"]) + int(used["LOCAL"])


def serial(compiled: triton.compiler.CompiledKernel) -> bool:
    """Whether ptxas says that it runs the kernel's warpgroup MMAs one by one (C7510 to C7519)."""
    with tempfile.NamedTemporaryFile(suffix=".ptx") as ptx:
        ptx.write(compiled.asm["ptx"].encode())
        ptx.flush()
        ran = subprocess.run([TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", ptx.name, "-o", os.devnull],
                             capture_output=True, text=True, check=True)  # fmt: skip
    return "(C751" in ran.stderr


def mma_hazards(compiled: triton.compiler.CompiledKernel) -> tuple[int, list[str]]:
    """``sass.overwritten`` of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        text = subprocess.run([TOOLS / "nvdisasm", "-c", cubin.name], capture_output=True, text=True, check=True).stdout
    return overwritten(text)


def main(names: list[str]) -> None:
    compile_and_launch = JITFunction.run
    compiled: list[triton.compiler.CompiledKernel] = []

    def only_compile(self, *args, grid, warmup, **kwargs):
        compiled.append(compile_and_launch(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = only_compile
    _gluon.arrivals = lambda index, count: torch.empty(count, dtype=torch.int32, device="meta")
    for device in map(Device.named, names):
        driver.set_active(AbsentGpu(device))
        for name, kernel in registry()[0].items():
            if not name.startswith("triton_"):
                continue
            more = one_wave() if name == "triton_decode" and device.units == 132 else []
            for problem in problems() + more:
                if kernel.rejects(problem, device) is not None:
                    continue
                config = kernel.default_config(problem, device)
                dtype = DTYPES[problem.x]
                x = torch.empty(problem.m, problem.k, dtype=dtype, device="meta")
                weight = kernel.operand(stored(problem))
                bias = torch.empty(problem.n, dtype=dtype, device="meta") if problem.bias else None
                kernel.bind(problem, device, config)(x, weight, bias)
                registers, spilled = spills(compiled[-1])
                shared = compiled[-1].metadata.shared
                told = {"kernel": name, "device": device.name, "problem": problem.key(), "config": dict(config),
                        "registers": registers, "spilled": spilled, "shared": shared}  # fmt: skip
                if problem in more:
                    told["programs"] = math.prod(kernel.cut(problem, config).grid)
                if name == "triton_wgmma":
                    told["loops"], told["overwritten"] = mma_hazards(compiled[-1])
                    told["serial"] = serial(compiled[-1])
                print(json.dumps({**told, "fits": shared <= device.shared_bytes}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
