"""Products that C calls: the optional module ``_call`` (csrc/python/call.cpp), which spares a call most of its Python.

Through Python and ctypes a call costs several microseconds, more with cold caches: as much as a small weight's bytes.
``_call.run`` looks at x, allocates y and calls the library, with the GIL released meanwhile. A ``Call`` is made of a plan
once it has run, for its very M, and kept with the Weight; it answers None whenever it is not what is asked for now
(another x, other settings, another number of threads, a gradient), and the caller goes the long way.

Without the module, or on a torch without DLPack's exchange API (before 2.10), nothing is ever ready.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import addressof
from typing import Any

import torch
from torch import Tensor

from .kernels.base import Direct
from .native import native
from .problem import DTYPES, Problem
from .settings import scope

try:
    from ._call import Call, keep, keep_plain, matmul, run, run_plain, set_slow, setup
except ImportError:

    def setup(*given: Any) -> None:
        """What stands for the module where it is not: nothing is ready."""
        raise ImportError("vecmat was installed without its module of calls")

    matmul: Any = None

    def run(call: Any, x: Tensor, data: Tensor, bias: Tensor | None, compute: str | None) -> Tensor | None:
        """y, or None where the arguments are not what the call was made for."""
        return None

    def run_plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """y for a dense tensor, or None where nothing is ready for these sizes."""
        return None


Ready = Callable[[Any, object], Any]


@functools.lru_cache(maxsize=1)
def able() -> bool:
    """Whether the module is here and this torch has what it needs; it is set up by the first question."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    empty = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
    if exchange is None or empty is None:
        return False
    try:
        setup(
            exchange, torch.Tensor, torch.nn.Parameter, empty, torch.is_grad_enabled, torch.get_num_threads, scope
        )  # fmt: skip
    except (ImportError, TypeError, ValueError):  # no module, or another version of the protocol
        return False
    return True


def direct_of(slow: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function with the arguments of ``slow``, the operator's, that does the same; quickly for what ``keep`` knows."""
    if matmul is None:
        return slow
    set_slow(slow)
    return matmul  # type: ignore[no-any-return]


def maker(direct: Direct | None, problem: Problem, threads: int) -> Ready | None:
    """What makes a Call of (operand, epoch), for a plan's problem; None if it has none.

    The operand is what the plan's ``run`` takes; a Call keeps a packed one, and of a dense tensor nothing.
    """
    if direct is None or not able():
        return None
    function = native().addresses[direct.function]
    dense, out, compute = direct.function == "dense", DTYPES[problem.out], problem.compute or None
    sizes = problem.m, problem.n, problem.k
    numbers = direct.x, direct.w, direct.y, direct.digits, threads, problem.bias

    def ready(operand: Any, epoch: object) -> Any:
        first, keep = (addressof(direct.spec), direct.spec) if dense else (operand.address, operand)
        return Call(function, first, dense, *sizes, *numbers, out, compute, epoch, keep)

    return ready
