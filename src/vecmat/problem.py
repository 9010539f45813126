"""Problem: what is asked, as a value; and Format, how a weight is stored."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Literal

import torch

Layout = Literal["nk", "kn"]

DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
GROUP_SIZES = (32, 64, 128)
FP8_MAX = 448.0  # the largest finite value of float8_e4m3fn


@dataclasses.dataclass(frozen=True, slots=True)
class Format:
    """How a weight is stored.

    name: "fp32", "bf16", "fp16", "int8", "int4" or "fp8" (e4m3).
    group_size: elements along K that share a scale; None for one scale per output channel (and for dense formats).
    symmetric: False where each group has a zero point too (int4 only).
    text: what ``parse`` reads, such as "int4:g32:zp"; kept, because a tracing compiler can read it but not make it.
    """

    name: str
    group_size: int | None = None
    symmetric: bool = True
    text: str = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        group = f":g{self.group_size}" if self.group_size else ""
        object.__setattr__(self, "text", self.name + group + ("" if self.symmetric else ":zp"))

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def parse(text: str) -> Format:
        """The Format of a name such as "bf16", "int8", "int8:g64", "int4:g128" or "int4:g32:zp".

        Raises ``ValueError`` naming what is wrong and the formats there are.
        """
        name, *options = text.split(":")
        group_size, symmetric = None, True
        for option in options:
            if option == "zp":
                symmetric = False
            elif option.startswith("g") and option[1:].isdigit():
                group_size = int(option[1:])
            else:
                raise ValueError(f"weight format {text!r}: {option!r} is no option; expected gSIZE or zp")
        return Format.make(name, group_size, symmetric)

    @staticmethod
    def make(name: str, group_size: int | None = None, symmetric: bool = True) -> Format:
        """A checked Format. Raises ``ValueError`` for an unknown name or an option that the format does not have."""
        if name not in ("fp32", "bf16", "fp16", "int8", "int4", "fp8"):
            raise ValueError(f"weight format {name!r} is not known; known are fp32, bf16, fp16, int8, int4, fp8")
        if group_size is not None and name in DTYPES:
            raise ValueError(f"weight format {name!r} has no groups, but group_size is {group_size!r}")
        if group_size is not None and group_size not in GROUP_SIZES:
            raise ValueError(f"group_size is {group_size!r}; expected one of {', '.join(map(str, GROUP_SIZES))}")
        if name == "int4" and group_size is None:
            raise ValueError("weight format 'int4' needs a group_size: 32, 64 or 128")
        if not symmetric and name != "int4":
            raise ValueError(f"weight format {name!r} has no zero points (symmetric=False); int4 has")
        return Format(name, group_size, symmetric)

    @property
    def dense(self) -> bool:
        """Whether it is an ordinary floating-point matrix without scales."""
        return self.name in DTYPES

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of the stored data (int4 lies two to a uint8)."""
        if self.dense:
            return DTYPES[self.name]
        return {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}[self.name]

    def groups(self, k: int) -> int:
        """How many scales one output channel has along K = ``k`` (the last group may be short)."""
        return -(-k // self.group_size) if self.group_size else 1

    def nbytes(self, n: int, k: int) -> int:
        """Bytes of a stored (n, k) weight, its scales (fp32) and zero points (uint8) included."""
        if self.dense:
            return n * k * self.dtype.itemsize
        data = n * (-(-k // 2)) if self.name == "int4" else n * k
        return data + n * self.groups(k) * (4 if self.symmetric else 5)

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One product y (m, n) = x (m, k) @ weight + bias: sizes, dtypes, format, layout, epilogue.

    x, out: "fp32", "bf16" or "fp16". layout: "nk" for a weight (n, k), "kn" for (k, n); a quantised weight is "nk".
    compute: "" keeps x as it is; "int8" or "fp8" quantises each row of x first (the caller's word, never a choice).
    grad: whether the result must be differentiable in torch's autograd. packable: whether kernels may keep a packed
    copy of the weight: not of a plain dense tensor. Neither is in the key.
    """

    m: int
    n: int
    k: int
    x: str
    weight: Format
    layout: Layout = "nk"
    out: str
    bias: bool = False
    compute: str = ""
    grad: bool = False
    packable: bool = True

    def key(self) -> str:
        """One readable line that names the problem in a table; M is bucketed, N and K are exact."""
        words = [f"m{bucket(self.m)} n{self.n} k{self.k} x={self.x} w={self.weight} o={self.out} {self.layout}"]
        words += ["bias"] if self.bias else []
        words += [f"c={self.compute}"] if self.compute else []
        return " ".join(words)

    @staticmethod
    def parse(key: str) -> Problem:
        """The Problem of a key, M as bucketed. Raises ``ValueError`` for a text that is no key."""
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"{key!r} is no problem key; expected one like 'm1 n4096 k4096 x=bf16 w=int8 o=bf16 nk'")
        m, n, k, x, weight, out, layout, bias, compute = found.groups()
        return Problem(
            m=int(m), n=int(n), k=int(k), x=x, weight=Format.parse(weight), out=out,
            layout="nk" if layout == "nk" else "kn", bias=bias is not None, compute=compute or "",
        )  # fmt: skip

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    @property
    def weight_bytes(self) -> int:
        """Bytes of the stored weight with its scales."""
        return self.weight.nbytes(self.n, self.k)

    @property
    def bytes_moved(self) -> int:
        """The fewest bytes that must cross the memory bus: weight and x in, y out."""
        size_x, size_y = DTYPES[self.x].itemsize, DTYPES[self.out].itemsize
        return self.weight_bytes + self.m * self.k * size_x + self.m * self.n * size_y

    def __str__(self) -> str:
        return self.key()


_KEY = re.compile(
    r"m(\d{1,12}) n(\d{1,12}) k(\d{1,12}) x=(fp32|bf16|fp16) w=(\S+) o=(fp32|bf16|fp16) (nk|kn)"
    r"( bias)?(?: c=(int8|fp8))?"
)


def bucket(m: int) -> int:
    """M as a table knows it: exact up to 8, then 16, 32, 48, 64, 96, 128, then powers of two, rounded up."""
    if m <= 8:
        return m
    for step in (16, 32, 48, 64, 96, 128):
        if m <= step:
            return step
    return 1 << (m - 1).bit_length()
