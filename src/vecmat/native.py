"""The CPU kernels' own library: found, opened once, and asked which instruction set it uses here. Called by ctypes.

``VECMAT_ISA`` in the environment caps the instruction set, for tests and comparisons: one of the names that
``vecmat doctor`` shows.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

CAP = "VECMAT_ISA"


class Panels(ctypes.Structure):
    """``vecmat_panels`` of csrc/vecmat.h: a quantised weight in panels."""

    _fields_ = (
        ("data", c_void_p), ("scale", c_void_p), ("zero", c_void_p),
        ("n", c_int64), ("k", c_int64), ("group", c_int64), ("bits", c_int64),
    )  # fmt: skip


class DenseSpec(ctypes.Structure):
    """``vecmat_dense_spec`` of csrc/vecmat.h: what the products of one Problem have in common."""

    _fields_ = (
        ("n", c_int64), ("k", c_int64),
        ("x_type", c_int32), ("w_type", c_int32), ("y_type", c_int32), ("threads", c_int32),
    )  # fmt: skip


class Native:
    """The library in use. isa: its instruction set. reason: why there is none, and then isa is ""."""

    def __init__(self) -> None:
        self.isa, self.reason = "", ""
        self.isas: list[str] = []
        package = importlib.util.find_spec(__package__)  # an editable install has two folders
        folders = (package and package.submodule_search_locations) or []
        found = next((file for folder in folders if (file := Path(folder) / "libvecmat.so").exists()), None)
        if found is None:
            self.reason = "vecmat was installed without its CPU library (no C++ compiler was found, or none for it)"
            return
        try:
            self._lib: Any = ctypes.CDLL(str(found))
        except OSError as error:
            self.reason = f"vecmat's CPU library cannot be loaded: {error}"
            return
        self._lib.vecmat_isa.restype, self._lib.vecmat_isa.argtypes = c_char_p, [c_int64]
        self._lib.vecmat_pack.restype = None
        self._lib.vecmat_pack.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p]
        self.pack = self._lib.vecmat_pack
        self.advise = self._lib.vecmat_advise  # huge pages for this memory, if there are any
        self.advise.restype, self.advise.argtypes = None, [c_void_p, c_int64]
        self.multiply = self._lib.vecmat_multiply
        self.multiply.restype = c_int64
        self.multiply.argtypes = [
            c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64,
        ]  # fmt: skip
        self.read, self.operations = self._lib.vecmat_read, self._lib.vecmat_operations  # benchmarks' measures
        self.read.restype, self.read.argtypes = c_int64, [c_void_p, c_int64, c_int64]
        self.operations.restype, self.operations.argtypes = c_int64, [c_int64, c_int64, c_int64]
        self.dense = self._lib.vecmat_dense
        self.dense.restype = c_int64
        self.dense.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_int64]
        self.packed = self._lib.vecmat_packed
        self.packed.restype = c_int64
        self.packed.argtypes = [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64]
        functions = {"multiply": self.multiply, "dense": self.dense, "packed": self.packed}
        self.addresses = {name: ctypes.cast(function, c_void_p).value for name, function in functions.items()}
        self.packed_bytes, self.pack_dense = self._lib.vecmat_packed_bytes, self._lib.vecmat_pack_dense
        self.packed_bytes.restype, self.packed_bytes.argtypes = c_int64, [c_void_p]
        self.pack_dense.restype, self.pack_dense.argtypes = None, [c_void_p, c_void_p, c_int64, c_void_p]
        while name := self._lib.vecmat_isa(len(self.isas)):
            self.isas.append(name.decode())
        wanted = os.environ.get(CAP) or self.isas[0]
        if not self._lib.vecmat_use(wanted.encode()):
            self.reason = f"{CAP} is {wanted!r}; this processor has {', '.join(self.isas)}"
            return
        self.isa = wanted
        self.columns: int = self._lib.vecmat_columns()


@functools.lru_cache(maxsize=1)
def native() -> Native:
    """The library in use, opened at the first call."""
    return Native()
