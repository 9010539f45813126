"""The kernels, one file each. ``registry()`` finds them; adding a kernel is adding its file."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil

from .base import Kernel


@functools.lru_cache(maxsize=1)
def registry() -> tuple[dict[str, Kernel], dict[str, str]]:
    """Every kernel by name, and the reason of each file that could not be imported here.

    A kernel's name is its module's. Modules named ``triton_*`` are imported only where Triton is installed; without
    it they are listed with that reason, not absent.
    """
    kernels: dict[str, Kernel] = {}
    missing: dict[str, str] = {}
    triton = importlib.util.find_spec("triton") is not None
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        if module.startswith("_") or module == "base":
            continue
        if module.startswith("triton_") and not triton:
            missing[module] = "Triton is not installed (pip install 'vecmat[gpu]')"
            continue
        content = vars(importlib.import_module(f"{__name__}.{module}"))
        made = [
            value
            for value in content.values()
            if isinstance(value, type) and issubclass(value, Kernel) and value.__module__ == f"{__name__}.{module}"
        ]
        if len(made) != 1:
            raise TypeError(f"kernels/{module}.py: defines {len(made)} Kernel classes; expected one")
        kernels[module] = made[0](module)
    return kernels, missing
