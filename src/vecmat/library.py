"""The operators that ``torch.compile`` and ``torch.export`` trace: ``torch.ops.vecmat``. Eager calls go past them.

``vecmat::matmul``  the product with a Weight given by its tensors: opaque, with a fake, a gradient and a vmap rule
``vecmat::linear``  the same for a dense weight; traced through: torch's own product, or ``vecmat::matmul``
``vecmat::grad_x``  the gradient of ``vecmat::matmul`` for x, dy @ weight

``torch.ops.vecmat.direct`` is no operator but the function behind ``vecmat::_matmul``, for code that Inductor has
written (``lowering.py``).

``format`` is a Format's text, and "" for a plain dense tensor, which may be anything of x's dtype, computed in the
same graph too. What is called a Weight is stored: written to only as torch counts writes.

A graph holds ``matmul``'s arguments and not the kernel: it is chosen when the operator runs, as in an eager call, and
for the same plan. Which Weight the tensors are, and where its packed copies are, ``packs.py`` knows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, get_num_threads
from torch.nn import functional as F

from .device import Device, capturing
from .dispatch import choose, remember
from .errors import NoKernelError, TableMissError
from .lowering import shorten
from .ops import check_call, check_compute, first, keep_ready
from .packs import Twin, keep_for_replays, twin_of
from .problem import DTYPE_NAMES, Format, Layout, Problem
from .ready import direct_of, keep
from .settings import scope
from .weights import Weight, check_layout, dense_format

_STORED = "Tensor data, Tensor? scale, Tensor? zero"
_SCHEMAS = {
    "matmul": f"(Tensor x, {_STORED}, Tensor? bias, str format, SymInt k, str layout, ScalarType? out_dtype, "
    "str? kernel, str? compute) -> Tensor",
    "grad_x": f"(Tensor dy, {_STORED}, str format, SymInt k, str layout, ScalarType dtype) -> Tensor",
    "linear": "(Tensor x, Tensor weight, Tensor? bias, str format, str layout, ScalarType? out_dtype) -> Tensor",
}
_SCHEMAS["_matmul"] = _SCHEMAS["matmul"]  # without a gradient: what ``matmul`` is below autograd, and cheaper to call

# What torch would run is asked for these M where M is not known: one row, few rows, a prompt.
_ANY_M = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048)
_BLOCK = 1 << 26  # elements of the weight that a backward pass has dequantised at a time


def _matmul(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, format: str, k: int,
    layout: Layout, out_dtype: torch.dtype | None, kernel: str | None, compute: str | None,
) -> Tensor:  # fmt: skip
    """``vecmat.matmul`` of the Weight that the tensors are; the plans and packed copies are those of eager calls."""
    if x.requires_grad and torch.is_grad_enabled():  # no autograd above: ``_matmul`` was called, not ``matmul``
        raise RuntimeError("vecmat::_matmul has no gradient, and x requires one; this graph was made for inference")
    weight: Twin | None = None
    here = scope()
    epoch = here.epoch
    if format:
        weight = twin_of(Format.parse(format), data, scale, zero, k, layout)
        about: Any = weight.signature
    else:
        about = data.shape, data.dtype, data.device
    key = (
        x.shape, x.dtype, x.device, about, layout, False, out_dtype, kernel, compute, get_num_threads(),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
    )  # fmt: skip
    plan = here.plans.get(key)
    if plan is not None:
        operand = data if weight is None else plan.operand(weight)
        if plan.ready is not None and out_dtype is None and kernel is None:
            keep_ready(plan, data if weight is None else weight, operand, epoch)
            if weight is not None:
                keep(weight, format, k, layout)
        y = plan.run(x, operand, bias)
    else:
        stored = data.detach() if weight is None else weight
        asked: Any = {"layout": layout, "out_dtype": out_dtype, "kernel": kernel, "compute": compute}
        with torch.no_grad():
            y = first(x, stored, bias, key, **asked, may_tune=False)
    if weight is not None and capturing(data):
        keep_for_replays(weight)
    return y  # type: ignore[no-any-return]


def _fake_matmul(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, format: str, k: int,
    layout: Layout, out_dtype: torch.dtype | None, kernel: str | None, compute: str | None,
) -> Tensor:  # fmt: skip
    shorten()  # the compiler is at work: before it gets to this operator
    fmt, n, _ = _asked(x, data, bias, format, layout, out_dtype, k)
    check_compute(compute, fmt)
    return x.new_empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype)


def _asked(
    x: Tensor, data: Tensor, bias: Tensor | None, format: str, layout: Layout, out_dtype: torch.dtype | None,
    k: int | None = None,
) -> tuple[Format, int, int]:  # fmt: skip
    """(format, N, K) of a weight and what is to be done with it; raises what ``matmul`` raises, by sizes alone."""
    check_layout("matmul", layout)
    fmt = Format.parse(format) if format else dense_format(data.dtype)
    if data.dim() != 2:
        raise ValueError(f"matmul: weight has shape {tuple(data.shape)}; expected two dimensions")
    n, width = data.shape[::-1] if layout == "kn" else data.shape
    k = k if k is not None and fmt.name == "int4" else width
    own = None if format else data.dtype
    shape = (k, n) if layout == "kn" else (n, k)
    check_call(x, bias, out_dtype, n=n, k=k, device=data.device, own=own, weight=f"{fmt} {shape}")
    return fmt, n, k


def _grad_x(
    dy: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, format: str, k: int, layout: Layout,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """dy (..., N) @ weight (N, K) as ``dtype``: in fp32 on a CPU, else in dy's dtype; blocks are summed in fp32."""
    weight: Weight
    if format:
        weight = twin_of(Format.parse(format), data, scale, zero, k, layout)
    else:
        weight = Weight(dense_format(data.dtype), data, layout=layout)
    wide = torch.float32 if dy.device.type == "cpu" else dy.dtype
    rows = dy.reshape(-1, weight.n).to(wide)
    step = max(1, _BLOCK // max(1, weight.k))
    if weight.n <= step:
        dx = rows @ weight.rows(0, weight.n, wide)
    else:
        dx = torch.zeros(rows.shape[0], weight.k, device=dy.device)
        for start in range(0, weight.n, step):
            stop = min(start + step, weight.n)
            dx += rows[:, start:stop] @ weight.rows(start, stop, wide)
    return dx.to(dtype).view(*dy.shape[:-1], weight.k)


def _fake_grad_x(
    dy: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, format: str, k: int, layout: Layout,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return dy.new_empty((*dy.shape[:-1], k), dtype=dtype)


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, format: str, layout: Layout, out_dtype: torch.dtype | None
) -> Tensor:
    fmt, n, k = _asked(x, weight, bias, format, layout, out_dtype)
    # Under torch.vmap over the weight too there are several weights: torch can batch them.
    several = torch._C._functorch.is_batchedtensor(weight) and not format
    if several or _is_torchs(x, weight, bias, fmt, n, k, layout, out_dtype, packable=bool(format)):
        return F.linear(x, weight if layout == "nk" else weight.t(), bias)
    return _OP.matmul(x, weight, None, None, bias, format, k, layout, out_dtype, None, None)  # type: ignore[no-any-return]


def _hint(size: int | torch.SymInt) -> int | None:
    """A size, or where it is dynamic the one that it has in the call that is traced; None if that is not known."""
    known = size if isinstance(size, int) else size.node.hint
    return known if isinstance(known, int) else None


def _is_torchs(
    x: Tensor, weight: Tensor, bias: Tensor | None, fmt: Format, n: int, k: int, layout: Layout,
    out_dtype: torch.dtype | None, packable: bool,
) -> bool:  # fmt: skip
    """Whether torch's own product is what would be chosen for a dense weight: for x's M, or for any if M is dynamic.

    A compiler may fuse that product with what is around it, and tune it; it has a gradient for the weight too.
    """
    m, like = math.prod(x.shape[:-1]), (_hint(n), _hint(k))
    if like[0] is None or like[1] is None:
        return True  # nothing is known of the weight; torch can multiply it
    tensors = [x, weight] if bias is None else [x, weight, bias]
    grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    device = Device.of(x.device)
    for rows in (m,) if isinstance(m, int) else _ANY_M:
        problem = Problem(
            m=max(1, rows), n=like[0], k=like[1], x=DTYPE_NAMES[x.dtype], weight=fmt, layout=layout,
            out=DTYPE_NAMES[out_dtype or x.dtype], bias=bias is not None, grad=grad, packable=packable,
        )  # fmt: skip
        plan = scope().plans.get((problem, device))
        if plan is None:
            try:
                plan = choose(problem, device)
            except (NoKernelError, TableMissError):
                return False  # raised again where it is run, if it is
            remember((problem, device), plan)
        if plan.kernel.name != "torch_dense":
            return False
    return True


class _Matmul(torch.autograd.Function):
    """``vecmat::_matmul`` with gradients for x, for a dense weight and for the bias."""

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        return _OP._matmul(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, data, scale, zero, bias, format, k, layout, _, _, compute = inputs
        if compute is not None:
            raise ValueError(f"matmul: compute={compute!r} has no gradient; call it under torch.inference_mode()")
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, data, scale, zero)
        ctx.stored, ctx.dtypes = (format, k, layout), (x.dtype, None if bias is None else bias.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, data, scale, zero = ctx.saved_tensors
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dx = _OP.grad_x(dy, data, scale, zero, *ctx.stored, ctx.dtypes[0])
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            dw = rows.t() @ x.reshape(-1, x.shape[-1]).to(dy.dtype)
            dw = (dw.t() if ctx.stored[2] == "kn" else dw).to(data.dtype)
        if ctx.needs_input_grad[4]:
            db = rows.sum(0).to(ctx.dtypes[1])
        return dx, dw, None, None, db, *[None] * 6


def _differentiable(*arguments: Any) -> Tensor:
    tensors = arguments[0], arguments[1], arguments[4]
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return _Matmul.apply(*arguments)  # type: ignore[no-any-return,no-untyped-call]
    return _OP._matmul(*arguments)  # type: ignore[no-any-return]


def _setup_grad_x(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    dy, data, scale, zero, *stored, _ = inputs
    if ctx.needs_input_grad[1]:
        raise NotImplementedError("vecmat::grad_x has no gradient for the weight")
    ctx.save_for_backward(data, scale, zero)
    ctx.stored, ctx.dtype = stored, dy.dtype


def _backward_grad_x(ctx: Any, ddx: Tensor) -> tuple[Tensor | None, ...]:
    return _OP.matmul(ddx, *ctx.saved_tensors, None, *ctx.stored, ctx.dtype, None, None), *[None] * 7


def _vmap(op: Any) -> Any:
    """The batching rule of an operator whose first argument has rows in front: one more dimension of rows."""

    def rule(info: Any, in_dims: tuple[int | None, ...], rows: Tensor, *rest: Any) -> tuple[Tensor, int]:
        if in_dims[0] is None or any(dim is not None for dim in in_dims[1:]):
            raise NotImplementedError(f"{op}: vmap over anything but the rows of x is not supported")
        return op(rows.movedim(in_dims[0], 0), *rest), 0

    return rule


_OP: Any = torch.ops.vecmat
_LIBRARY: Any = torch.library.Library("vecmat", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema in _SCHEMAS.items():
    _LIBRARY.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
_OP.direct = direct_of(_matmul)
for _name in ("matmul", "_matmul"):
    _LIBRARY.impl(_name, _OP.direct, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vecmat::{_name}", _fake_matmul, lib=_LIBRARY)
    torch.library.register_vmap(f"vecmat::{_name}", _vmap(getattr(_OP, _name)), lib=_LIBRARY)
_LIBRARY.impl("matmul", _differentiable, "Autograd")
_LIBRARY.impl("linear", _linear, "CompositeImplicitAutograd")
_LIBRARY.impl("linear", _linear, "FuncTorchBatchedDecomposition")  # traced through under torch.vmap, too
_LIBRARY.impl("grad_x", _grad_x, "CompositeExplicitAutograd")
torch.library.register_fake("vecmat::grad_x", _fake_grad_x, lib=_LIBRARY)
torch.library.register_autograd("vecmat::grad_x", _backward_grad_x, setup_context=_setup_grad_x, lib=_LIBRARY)
torch.library.register_vmap("vecmat::grad_x", _vmap(_OP.grad_x), lib=_LIBRARY)
