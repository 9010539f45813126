"""The kernels, one file each. ``registry()`` finds them; adding a kernel is adding its file."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import sys

from .base import Kernel


@functools.lru_cache(maxsize=1)
def registry() -> tuple[dict[str, Kernel], dict[str, str]]:
    """Every kernel by name, and the reason of each file that could not be imported here.

    A kernel's name is its module's. Modules named ``triton_*`` need a Triton that can be imported; without it they
    are listed with the reason, not absent.
    """
    kernels: dict[str, Kernel] = {}
    missing: dict[str, str] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        if module.startswith("_") or module == "base":
            continue
        try:
            content = vars(importlib.import_module(f"{__name__}.{module}"))
        except ImportError as error:
            if not module.startswith("triton_"):
                raise
            absent = (error.name or "").partition(".")[0] == "triton" and sys.modules.get("triton") is None
            why = "Triton is not installed (pip install 'vecmat[gpu]')"
            missing[module] = why if absent else f"the Triton that is installed cannot be used: {error}"
            continue
        made = [
            value
            for value in content.values()
            if isinstance(value, type) and issubclass(value, Kernel) and value.__module__ == f"{__name__}.{module}"
        ]
        if len(made) != 1:
            raise TypeError(f"kernels/{module}.py: defines {len(made)} Kernel classes; expected one")
        kernels[module] = made[0](module)
    return kernels, missing
