"""Products that C calls: the optional module ``_call`` (csrc/python/call.cpp), which spares a call most of its Python.

Through Python and ctypes a call costs several microseconds, twice that with cold caches: as much as a small weight's
bytes. ``_call.run`` looks at x, allocates y and calls the library, with the GIL released meanwhile. A ``Call`` is made
of a plan once it has run, for its very M, and kept with the Weight beside a few others; when none of them is what is
asked for now (another x, other settings, another number of threads, a gradient), the caller goes the long way.

Without the module, or on a torch without DLPack's exchange API (before 2.10), nothing is ever ready.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from ctypes import addressof
from typing import Any

import torch
from torch import Tensor

from .kernels.base import Direct
from .native import native
from .problem import DTYPES, Problem
from .settings import scope
from .weights import Weight

_module: Any = None
with contextlib.suppress(ImportError):
    _module = importlib.import_module("._call", __package__)


def _nothing(*_: Any) -> None:
    """What stands for the module's functions where it is not: nothing is ready."""


# run(calls, x, data, bias, compute), run_plain(x, weight, bias): y, or None where they are not what was made ready.
run: Callable[..., Tensor | None] = getattr(_module, "run", _nothing)
run_plain: Callable[..., Tensor | None] = getattr(_module, "run_plain", _nothing)
# keep(twin, format, k, layout), for the function that ``direct_of`` gives; keep_plain(call), for ``run_plain``.
keep: Callable[..., None] = getattr(_module, "keep", _nothing)
keep_plain: Callable[..., None] = getattr(_module, "keep_plain", _nothing)

Ready = Callable[[Any, object], Any]
_KINDS = "multiply", "dense", "packed"  # of functions, as csrc/python/call.cpp numbers them


@functools.lru_cache(maxsize=1)
def able() -> bool:
    """Whether the module is here and this torch has what it needs; it is set up by the first question."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    empty = getattr(torch._C._dynamo.guards, "_empty_strided_cpu", None)
    if _module is None or exchange is None or empty is None:
        return False
    given = torch.Tensor, torch.nn.Parameter, empty, torch.is_grad_enabled, torch.get_num_threads, scope
    try:
        _module.setup(exchange, *given)
    except (ImportError, TypeError, ValueError):  # another version of the protocol
        return False
    return True


def direct_of(slow: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that takes what ``slow``, the operator's, takes and does the same: quickly for what ``keep`` knows."""
    if _module is None:
        return slow
    _module.set_slow(slow)
    return _module.matmul  # type: ignore[no-any-return]


def maker(direct: Direct | None, problem: Problem, threads: int) -> Ready | None:
    """What makes a Call of (operand, epoch), for a plan's problem; None if it has none.

    The operand is what the plan's ``run`` takes; a Call keeps a packed one, and of a dense tensor nothing.
    """
    if direct is None or not able():
        return None
    make, kind = _module.Call, direct.function
    function, number = native().addresses[kind], _KINDS.index(kind)
    spec = 0 if direct.spec is None else addressof(direct.spec)
    sizes = problem.m, problem.n, problem.k
    numbers = direct.x, direct.w, direct.y, direct.digits, threads, problem.bias
    out, compute = DTYPES[problem.out], problem.compute or None

    def ready(operand: Any, epoch: object) -> Any:
        packed = 0 if kind == "dense" else operand.address
        state = operand.state if kind == "packed" else (0, -1)
        keep = direct.spec, None if kind == "dense" else operand
        return make(number, function, spec, packed, *state, *sizes, *numbers, out, compute, epoch, keep)

    return ready


def as_called(
    make: Ready | None, long: Callable[..., Tensor], x: Tensor, weight: Weight, operand: Any, bias: Tensor | None,
    compute: str | None,
) -> Callable[[], Tensor]:  # fmt: skip
    """The product of a plan as a warm ``matmul`` would call it, to be timed: ``long``, or the short way if it has one.

    make: what ``maker`` gave. The rest is ``matmul``'s arguments, and the operand that ``long`` takes for the weight.
    """
    if make is None:
        return lambda: long(x, operand, bias)
    calls = (make(operand, scope().epoch),)

    def call() -> Tensor:
        y = run(calls, x, weight.data, bias, compute)
        return long(x, operand, bias) if y is None else y

    return call
