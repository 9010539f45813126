"""What this machine has for vecmat: devices, versions, tables, and which kernels can run what."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
from importlib import metadata
from typing import Any

import torch

from . import table
from ._version import VERSION
from .device import Device
from .dispatch import candidates, choose
from .problem import Format, Problem

# One problem per weight format: a decode step on a square layer, as wide as an 8B model's.
FORMATS = ("fp32", "bf16", "fp16", "int8", "int4:g128", "fp8")
SIZE = 4096


def problems() -> dict[str, Problem]:
    """The representative Problem of each weight format: one row, bf16 x (or the dense weight's own dtype)."""
    found = {}
    for name in FORMATS:
        fmt = Format.parse(name)
        x = fmt.name if fmt.dense else "bf16"
        found[name] = Problem(m=1, n=SIZE, k=SIZE, x=x, weight=fmt, out=x)
    return found


def devices() -> list[Device]:
    """The CPU and each CUDA (or HIP) device of this machine."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [Device.of(torch.device("cpu")), *(Device.of(torch.device("cuda", index)) for index in range(count))]


def no_gpu() -> str | None:
    """Why torch sees no GPU here, None if it does."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA and ROCm"
    return f"torch {torch.__version__} is built for GPUs but finds none; is the driver loaded?"


def versions() -> dict[str, str | None]:
    """The version of each package that matters, None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "vecmat": VERSION}
    for package in ("torch", "triton", "transformers"):
        found[package] = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return {**found, "cuda": torch.version.cuda, "hip": torch.version.hip}


def kernels(device: Device) -> dict[str, dict[str, str]]:
    """By kernel, then weight format: "chosen", "yes", or the reason why it cannot."""
    found: dict[str, dict[str, str]] = {}
    for name, problem in problems().items():
        chosen = choose(problem, device).kernel.name
        for candidate in candidates(problem, device):
            answer = candidate.reason or ("chosen" if candidate.kernel == chosen else "yes")
            found.setdefault(candidate.kernel, {})[name] = answer
    return dict(sorted(found.items()))


def user_table(device: Device) -> dict[str, Any]:
    """The user's table of a device: its path, whether it exists, how many rows it has."""
    file = table.path(device.name)
    content = table.load(file, device.name)
    shipped = table.shipped_table(device.name)
    return {
        "path": str(file),
        "exists": file.exists(),
        "rows": 0 if content is None else len(content.rows),
        "stale": content is not None and content.stale,
        "shipped_rows": 0 if shipped is None else len(shipped.rows),
    }


def examine() -> dict[str, Any]:
    """Everything, as plain values: versions, and for each device its rates, table and kernels.

    Devices with equal names are alike and told once, with their number.
    """
    found: dict[str, dict[str, Any]] = {}
    for device in devices():
        if device.name in found:
            found[device.name]["count"] += 1
            continue
        found[device.name] = {
            **dataclasses.asdict(device),
            "count": 1,
            "table": user_table(device),
            "kernels": kernels(device),
        }
    return {"versions": versions(), "no_gpu": no_gpu(), "devices": list(found.values())}
