"""vecmat: the fastest correct product of activations and a weight, on the machine you have.

y = vecmat.matmul(x, weight)                 # dense or quantised, any layout, CPU or GPU
model = vecmat.convert(model, "int8")        # a model's linear layers, in place
print(vecmat.explain(x, weight))             # which kernel, and why
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from . import library, tables  # noqa: F401 - library defines the operators that torch.compile traces
from ._version import VERSION
from .errors import CheckpointError, NoKernelError, TableMissError, VecmatWarning
from .fusing import Fusions, fuse
from .linear import Linear
from .nn import convert
from .ops import explain, matmul
from .settings import Settings, settings
from .tuner import tuning
from .weights import Weight, quantize

if TYPE_CHECKING:
    from . import checkpoints
    from .checkpoints import load
    from .deepspeed import BaseOp, DeepSpeedInferenceConfig, VectorMatMulOp
    from .transformers import VecmatConfig

    HAS_TRITON: bool

__version__ = VERSION
__all__ = [
    "HAS_TRITON",
    "BaseOp",
    "CheckpointError",
    "DeepSpeedInferenceConfig",
    "Fusions",
    "Linear",
    "NoKernelError",
    "Settings",
    "TableMissError",
    "VecmatConfig",
    "VecmatWarning",
    "VectorMatMulOp",
    "Weight",
    "checkpoints",
    "convert",
    "explain",
    "fuse",
    "load",
    "matmul",
    "quantize",
    "settings",
    "tables",
    "tuning",
]


def __getattr__(name: str) -> Any:
    if name == "HAS_TRITON":  # looked up when asked for, so that the import itself touches no file
        try:
            return importlib.util.find_spec("triton") is not None
        except ImportError:  # a finder that refuses it
            return False
    if name in ("BaseOp", "DeepSpeedInferenceConfig", "VectorMatMulOp"):
        return getattr(importlib.import_module(".deepspeed", __name__), name)
    if name in ("checkpoints", "load"):
        found = importlib.import_module(".checkpoints", __name__)
        return found if name == "checkpoints" else found.load
    if name == "VecmatConfig":
        return importlib.import_module(".transformers", __name__).VecmatConfig
    raise AttributeError(f"module 'vecmat' has no attribute {name!r}")
