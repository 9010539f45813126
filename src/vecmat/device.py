"""Device: what a kernel runs on, as a value. Choosing a kernel needs this value and never the hardware."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from typing import Literal

import torch

from .native import native

Kind = Literal["cpu", "cuda", "hip", "other"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One place a product can run: its exact name, its instruction set and its rates.

    kind: "cpu", "cuda" (NVIDIA), "hip" (AMD) or "other" (torch's fallback only).
    index: torch's index of the device, None on a CPU.
    name: the exact name, the key of a tuning table.
    arch: "sm_90", "gfx942", "avx2", "avx512", "avx512_bf16", "amx", "neon" or "default".
    units: streaming multiprocessors, or CPU threads.
    shared_bytes: shared memory one block may take. l2_bytes: the last cache before memory (L3 on a CPU).
    read_gbs: GB/s of a read-only stream. tflops16, tflops32, tops8: dense matrix rates on random data in 1e12
    operations a second for 16-bit floats, fp32, and int8 (or fp8). Rates are for ranking kernels, not promises.
    native: the instruction set that vecmat's own CPU library uses here, "" without that library.
    """

    kind: Kind
    index: int | None = None
    name: str
    arch: str
    units: int
    shared_bytes: int = 0
    l2_bytes: int
    read_gbs: float
    tflops16: float
    tflops32: float
    tops8: float
    interpreted: bool = False
    native: str = ""

    @property
    def is_gpu(self) -> bool:
        """Whether Triton kernels and CUDA libraries run here."""
        return self.kind in ("cuda", "hip")

    @property
    def place(self) -> torch.device:
        """The torch device, where this one is present."""
        return torch.device("cuda", self.index or 0) if self.is_gpu else torch.device("cpu")

    @property
    def capability(self) -> int:
        """The CUDA compute capability as one number (90 for sm_90), 0 elsewhere."""
        return int(self.arch[3:].rstrip("af")) if self.kind == "cuda" else 0

    @staticmethod
    def of(device: torch.device) -> Device:
        """The Device of a torch device. Queries the hardware once per device and CPU thread count."""
        if device.type == "cpu":
            return _cpu(torch.get_num_threads(), os.environ.get("TRITON_INTERPRET") == "1")
        if device.type == "cuda":
            return _gpu(torch.cuda.current_device() if device.index is None else device.index)
        return Device(
            kind="other", index=device.index, name=device.type, arch="default", units=1,
            l2_bytes=1 << 20, read_gbs=100, tflops16=10, tflops32=10, tops8=10,
        )  # fmt: skip

    @staticmethod
    def named(name: str) -> Device:
        """A known Device that need not be present ("h200", "a100", "cpu", ...).

        Raises ``ValueError`` listing the known names.
        """
        if name == "cpu":
            return Device.of(torch.device("cpu"))
        if name not in KNOWN:
            raise ValueError(f"device: {name!r} is not known; known are cpu, {', '.join(KNOWN)}")
        return KNOWN[name]


def capturing(tensor: torch.Tensor) -> bool:
    """Whether what is done with a tensor now is captured into a CUDA graph and not done before the graph's replay."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _known(name: str, arch: str, sms: int, shared_kib: int, l2_mib: int, gbs: float, t16: float, t32: float, t8: float,
           kind: Kind = "cuda") -> Device:  # fmt: skip
    return Device(
        kind=kind, index=0, name=name, arch=arch, units=sms, shared_bytes=shared_kib << 10, l2_bytes=l2_mib << 20,
        read_gbs=gbs, tflops16=t16, tflops32=t32, tops8=t8,
    )  # fmt: skip


# The H200's rates were measured (docs/measured.md); the others are the vendors' dense figures times the share
# that the H200 reaches of its own (0.92 of the bandwidth, 0.75 of the matrix rate).
KNOWN = {
    "h200": _known("NVIDIA H200", "sm_90", 132, 227, 60, 4450, 740, 50, 1350),
    "h100": _known("NVIDIA H100 80GB HBM3", "sm_90", 132, 227, 50, 3080, 740, 50, 1350),
    "a100": _known("NVIDIA A100-SXM4-80GB", "sm_80", 108, 163, 40, 1870, 234, 15, 468),
    "l40s": _known("NVIDIA L40S", "sm_89", 142, 99, 96, 795, 270, 68, 540),
    "rtx4090": _known("NVIDIA GeForce RTX 4090", "sm_89", 128, 99, 72, 925, 124, 62, 248),
    "b200": _known("NVIDIA B200", "sm_100", 148, 227, 126, 7360, 1690, 60, 3380),
    "t4": _known("Tesla T4", "sm_75", 40, 64, 4, 294, 49, 6, 98),
    "mi300x": _known("AMD Instinct MI300X", "gfx942", 304, 64, 256, 4880, 980, 122, 1960, "hip"),
}

_ARCH_DEFAULTS = {80: "a100", 86: "l40s", 87: "l40s", 89: "l40s", 90: "h100", 100: "b200", 103: "b200", 120: "rtx4090"}


@functools.lru_cache(maxsize=64)
def _gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    arch = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    exact = [known for known in KNOWN.values() if known.name == properties.name]
    if exact:
        model = exact[0]
    elif hip:
        model = KNOWN["mi300x"]
    else:
        model = KNOWN[_ARCH_DEFAULTS.get(properties.major * 10 + properties.minor, "t4")]
    share = properties.multi_processor_count / model.units
    return dataclasses.replace(
        model,
        kind="hip" if hip else "cuda",
        index=index,
        name=properties.name,
        arch=arch,
        units=properties.multi_processor_count,
        shared_bytes=getattr(properties, "shared_memory_per_block_optin", 0) or model.shared_bytes,
        l2_bytes=properties.L2_cache_size or model.l2_bytes,
        tflops16=model.tflops16 * share,
        tflops32=model.tflops32 * share,
        tops8=model.tops8 * share,
    )


# Per thread, from docs/measured.md: fp32 GEMM on Zen 3 (avx2) and Zen 4 (avx512); bf16 through oneDNN.
_CPU_RATES = {  # arch: (tflops16, tflops32, tops8) per thread
    "default": (0.004, 0.015, 0.004),
    "avx2": (0.012, 0.060, 0.03),
    "avx512": (0.020, 0.090, 0.05),
    "avx512_bf16": (0.180, 0.055, 0.36),
    "amx": (0.900, 0.080, 1.8),
    "neon": (0.015, 0.040, 0.03),
}


@functools.lru_cache(maxsize=64)
def _cpu(threads: int, interpreted: bool) -> Device:
    flags, model, cache = _cpuinfo()
    arch = "default"
    if platform.machine() in ("aarch64", "arm64"):
        arch = "neon"
    elif torch.backends.cpu.get_cpu_capability() == "AVX512":
        arch = "amx" if "amx_bf16" in flags else "avx512_bf16" if "avx512_bf16" in flags else "avx512"
    elif torch.backends.cpu.get_cpu_capability() == "AVX2":
        arch = "avx2"
    tflops16, tflops32, tops8 = _CPU_RATES[arch]
    return Device(
        kind="cpu", name=f"{model} {arch} {threads} threads", arch=arch, units=threads, l2_bytes=cache,
        read_gbs=min(13.0 * threads, 250.0), tflops16=tflops16 * threads, tflops32=tflops32 * threads,
        tops8=tops8 * threads, interpreted=interpreted, native=native().isa,
    )  # fmt: skip


@functools.lru_cache(maxsize=1)
def _cpuinfo() -> tuple[frozenset[str], str, int]:
    """The processor's flags, model name and last-level cache in bytes, as Linux tells them; defaults elsewhere."""
    flags: frozenset[str] = frozenset()
    model, cache = platform.processor() or platform.machine(), 16 << 20
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = (part.strip() for part in line.partition(":"))
                if key in ("flags", "Features") and not flags:
                    flags = frozenset(value.split())
                elif key == "model name":
                    model = value
        with open("/sys/devices/system/cpu/cpu0/cache/index3/size", encoding="utf-8") as size:
            cache = int(size.read().strip().rstrip("K")) << 10
    except (OSError, ValueError):
        pass  # not Linux, or a container that hides them: the defaults stand
    return flags, model, cache
