"""matmul(): validate, name the problem, find its plan, run it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch.compiler import is_compiling

from .device import Device
from .dispatch import Candidate, Plan, candidates, choose, first_run
from .problem import DTYPE_NAMES, Format, Layout, Problem
from .ready import keep_plain, run, run_plain
from .settings import scope
from .weights import Signature, Weight, check_layout, dense_format

COMPUTES = (None, "int8", "fp8")
_MOST_READY = 4  # products with one weight that wait to be called again


def matmul(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None = None,
    *,
    layout: Layout = "nk",
    out_dtype: torch.dtype | None = None,
    kernel: str | None = None,
    compute: str | None = None,
) -> Tensor:
    """y = x @ weight + bias, by the fastest kernel known for this problem on x's device.

    x: (..., K), one dimension or more, fp32, bf16 or fp16, any strides. weight: a ``Weight``, or a dense tensor of
    x's dtype, (N, K) with layout "nk" (as ``torch.nn.Linear`` keeps it) or (K, N) with "kn"; a ``Weight`` knows its
    own layout. bias: (N,), x's dtype. out_dtype: the result's dtype, x's by default. kernel: a kernel's name to use
    and no other. compute: None keeps x as it is; "int8" (int8 and int4 weights) or "fp8" (fp8 weights) quantises
    each row of x on the fly, which changes the numbers and is therefore never chosen for you.

    Returns y (..., N), freshly allocated. Sums are in fp32 at least and rounded once (torch's own int8 and
    int4 products round before the bias is added); the same call gives the same bits. Raises ``ValueError`` or
    ``TypeError`` naming the argument for shapes, dtypes, devices or options that do not fit, and ``ValueError`` if
    the named kernel cannot run the problem.
    """
    if is_compiling():
        return _traced(x, weight, bias, layout, out_dtype, kernel, compute)
    stored = isinstance(weight, Weight)
    common = out_dtype is None and kernel is None and layout == "nk"
    if common:
        if isinstance(weight, Weight):
            y = None if weight.ready is None else run(weight.ready, x, weight.data, bias, compute)
        else:
            y = None if compute is not None else run_plain(x, weight, bias)
        if y is not None:
            return y
    grad, here = is_grad_enabled(), scope()
    epoch = here.epoch
    try:
        if isinstance(weight, Weight):
            about: Any = weight.signature
            grad = grad and (x.requires_grad or weight.data.requires_grad or (bias is not None and bias.requires_grad))
        else:
            about = (weight.shape, weight.dtype, weight.device)
            grad = grad and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
        key = (
            x.shape, x.dtype, x.device, about, layout, grad, out_dtype, kernel, compute, get_num_threads(),
            None if bias is None else (bias.shape, bias.dtype, bias.device),
        )  # fmt: skip
        plan = here.plans.get(key)
    except (AttributeError, TypeError):  # something is no tensor, or not hashable: bind_problem says what
        plan = key = None
    if plan is not None:
        operand = plan.operand(weight) if stored else weight
        if common and plan.ready is not None:
            keep_ready(plan, weight, operand, epoch)
        return plan.run(x, operand, bias)  # type: ignore[no-any-return]
    return first(x, weight, bias, key, layout=layout, out_dtype=out_dtype, kernel=kernel, compute=compute)


def matmul_stored(x: Tensor, weight: Weight, bias: Tensor | None, compute: str | None) -> Tensor:
    """``matmul`` of a Weight with no other options: the same, by a shorter key (it is what ``nn.Linear`` calls).

    In a model every layer's weight drives Python's own data out of the cache, so each step here costs several times
    what a loop over one small layer shows (docs/measured.md).
    """
    if weight.ready is not None:
        y = run(weight.ready, x, weight.data, bias, compute)
        if y is not None:
            return y
    here = scope()
    epoch = here.epoch
    grad = is_grad_enabled() and (
        x.requires_grad or weight.data.requires_grad or (bias is not None and bias.requires_grad)
    )
    key = (
        x.shape, x.dtype, x.device, weight.signature, grad, compute, get_num_threads(),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
    )  # fmt: skip
    plan = here.plans.get(key)
    if plan is not None:
        operand = plan.operand(weight)
        if plan.ready is not None:
            keep_ready(plan, weight, operand, epoch)
        return plan.run(x, operand, bias)  # type: ignore[no-any-return]
    return first(x, weight, bias, key, compute=compute)


def keep_ready(plan: Plan, weight: Tensor | Weight, operand: Any, epoch: object) -> None:
    """Let the next call like this one go the short way. epoch: the scope's, from before the plan was looked up.

    A Weight keeps the last few, each for other arguments: rows of a prompt and of decoding, say, come in turn.
    """
    assert plan.ready is not None
    call = plan.ready(operand, epoch)
    if isinstance(weight, Weight):
        others = [known for known in weight.ready or () if not call.replaces(known)]
        weight.ready = (call, *others[: _MOST_READY - 1])
    else:
        keep_plain(call)


def first(
    x: Tensor, weight: Tensor | Weight, bias: Tensor | None, key: Any, *, layout: Layout = "nk",
    out_dtype: torch.dtype | None = None, kernel: str | None = None, compute: str | None = None,
    may_tune: bool = True,
) -> Tensor:  # fmt: skip
    """The first call of a problem: checked, chosen, run, and memoised under ``key``."""
    problem, device = bind_problem(x, weight, bias, layout=layout, out_dtype=out_dtype, compute=compute)
    if 0 in (problem.m, problem.n, problem.k):
        if kernel is not None:  # a name that is wrong is refused here, too
            some = dataclasses.replace(problem, m=max(1, problem.m), n=max(1, problem.n), k=max(1, problem.k))
            choose(some, device, kernel=kernel)
        return _empty(x, problem, bias, out_dtype)
    plan = choose(problem, device, kernel=kernel, may_tune=may_tune)
    return first_run(plan, key, x, weight, bias, named=kernel is not None)


def _empty(x: Tensor, problem: Problem, bias: Tensor | None, out_dtype: torch.dtype | None) -> Tensor:
    """The result where there is nothing to multiply: zeros, plus the bias."""
    y = x.new_zeros(*x.shape[:-1], problem.n, dtype=out_dtype or x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def _traced(
    x: Tensor, weight: Tensor | Weight, bias: Tensor | None, layout: Layout, out_dtype: torch.dtype | None,
    kernel: str | None, compute: str | None,
) -> Tensor:  # fmt: skip
    """What ``torch.compile`` and ``torch.export`` see of a call of ``matmul``."""
    if isinstance(weight, Weight):
        parts = weight.data, weight.scale, weight.zero
        return trace(x, *parts, bias, weight.format.text, weight.k, weight.layout, out_dtype, kernel, compute)
    return trace(x, weight, None, None, bias, "", x.shape[-1], layout, out_dtype, kernel, compute)


def trace(
    x: Tensor, data: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None, format: str, k: int,
    layout: Layout, out_dtype: torch.dtype | None = None, kernel: str | None = None, compute: str | None = None,
) -> Tensor:  # fmt: skip
    """A call of ``matmul`` as the operators that ``library.py`` defines, for a Weight given by its tensors.

    format: "" for a plain tensor. ``vecmat::matmul`` is opaque to the compiler and chooses a kernel when it runs. A
    dense weight is given to ``vecmat::linear``, which becomes torch's own product, or ``vecmat::matmul`` where another
    kernel would be chosen.
    """
    operators = torch.ops.vecmat
    if scale is None and kernel is None and compute is None:
        return operators.linear(x, data, bias, format, layout, out_dtype)  # type: ignore[no-any-return]
    layout = layout if scale is None else "nk"
    return operators.matmul(  # type: ignore[no-any-return]
        x, data, scale, zero, bias, format, k, layout, out_dtype, kernel, compute
    )


def bind_problem(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None = None,
    *,
    layout: Layout = "nk",
    out_dtype: torch.dtype | None = None,
    compute: str | None = None,
) -> tuple[Problem, Device]:
    """The Problem and Device of matmul's arguments, checked; raises what ``matmul`` raises."""
    for name, value, kinds in (("x", x, Tensor), ("weight", weight, (Tensor, Weight)), ("bias", bias, Tensor)):
        if not isinstance(value, kinds) and not (name == "bias" and value is None):
            wanted = "a tensor or a vecmat.Weight" if name == "weight" else "a tensor"
            raise TypeError(f"matmul: {name} is {type(value).__name__}; expected {wanted}")
    signature = _signature(weight, layout)
    about = f"{signature.format} {tuple(weight.shape)}"
    own = weight.dtype if isinstance(weight, Tensor) else None
    check_call(x, bias, out_dtype, n=signature.n, k=signature.k, device=signature.device, own=own, weight=about)
    wants_grad = is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, bias, weight.data if isinstance(weight, Weight) else weight)
    )
    check_compute(compute, signature.format)
    if compute is not None and wants_grad:
        raise ValueError(f"matmul: compute={compute!r} has no gradient; call it under torch.inference_mode()")
    problem = Problem(
        m=math.prod(x.shape[:-1]),
        n=signature.n,
        k=signature.k,
        x=DTYPE_NAMES[x.dtype],
        weight=signature.format,
        layout=signature.layout,
        out=DTYPE_NAMES[out_dtype or x.dtype],
        bias=bias is not None,
        compute=compute or "",
        grad=wants_grad,
        packable=isinstance(weight, Weight),
    )
    return problem, Device.of(x.device)


def check_call(
    x: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None, *, n: int, k: int, device: torch.device,
    own: torch.dtype | None = None, weight: str,
) -> None:  # fmt: skip
    """Raise what ``matmul`` raises where x, bias or out_dtype does not fit a weight (N, K).

    own: the dtype of a plain tensor, which must be x's; None for a ``Weight``. weight: what a message calls it.
    """
    if x.dtype not in DTYPE_NAMES:
        raise TypeError(f"matmul: x is {x.dtype}; expected {', '.join(map(str, DTYPE_NAMES))}")
    told = f"(x {_told(x)}, weight {weight})"
    if x.dim() == 0:
        raise ValueError(f"matmul: x has no dimensions; expected (..., K) {told}")
    if x.shape[-1] != k:
        raise ValueError(f"matmul: weight has K={k} but x has K={x.shape[-1]} {told}")
    if device != x.device:
        raise ValueError(f"matmul: weight is on {device} but x is on {x.device} {told}")
    if own not in (None, x.dtype):
        raise TypeError(
            f"matmul: weight is {own} but x is {x.dtype}; cast one, or make a Weight of it with "
            f"vecmat.quantize to keep its storage {told}"
        )
    if bias is not None:
        if tuple(bias.shape) != (n,):
            raise ValueError(f"matmul: bias has shape {tuple(bias.shape)}; expected ({n},) {told}")
        if bias.dtype != x.dtype:
            raise TypeError(f"matmul: bias is {bias.dtype}; expected x's {x.dtype} {told}")
        if bias.device != x.device:
            raise ValueError(f"matmul: bias is on {bias.device} but x is on {x.device} {told}")
    if out_dtype is not None and out_dtype not in DTYPE_NAMES:
        raise TypeError(f"matmul: out_dtype is {out_dtype}; expected {', '.join(map(str, DTYPE_NAMES))}")


def _signature(weight: Tensor | Weight, layout: Layout) -> Signature:
    check_layout("matmul", layout)
    if isinstance(weight, Weight):
        return weight.signature
    if weight.dim() != 2:
        raise ValueError(f"matmul: weight has shape {tuple(weight.shape)}; expected two dimensions")
    n, k = weight.shape if layout == "nk" else (weight.shape[1], weight.shape[0])
    return Signature.intern(dense_format(weight.dtype), n, k, layout, weight.device)


def check_compute(compute: str | None, fmt: Format) -> None:
    """Raise ``ValueError`` unless a weight of this format can be multiplied so."""
    if compute not in COMPUTES:
        raise ValueError(f"matmul: compute is {compute!r}; expected None, 'int8' or 'fp8'")
    if compute == "int8" and fmt.name not in ("int8", "int4"):
        raise ValueError(
            f"matmul: compute='int8' multiplies integers, so it needs an int8 or int4 weight; this one is {fmt}"
        )
    if compute == "fp8" and (fmt.name != "fp8" or fmt.group_size is not None):
        raise ValueError(
            f"matmul: compute='fp8' multiplies fp8 by fp8, so it needs an fp8 weight with one scale per channel; this "
            f"one is {fmt}"
        )


def _told(value: Tensor | Weight) -> str:
    kind = value.format if isinstance(value, Weight) else DTYPE_NAMES.get(value.dtype, value.dtype)
    return f"{kind} {tuple(value.shape)}"


class Explanation:
    """Why a kernel was chosen: ``plan``, every ``Candidate`` (chosen first), and a table when printed."""

    def __init__(self, plan: Plan, answers: list[Candidate]) -> None:
        self.plan = plan
        self.candidates = sorted(answers, key=lambda c: c.kernel != plan.kernel.name)

    def __str__(self) -> str:
        plan = self.plan
        config = " ".join(f"{name}={value}" for name, value in plan.config.items())
        lines = [
            f"{plan.problem.key()} on {plan.device.name}",
            f"-> {plan.kernel.name}{f' ({config})' if config else ''}, {plan.decided_by}",
            f"   sums K as: {plan.reduction}",
        ]
        if plan.row is not None:
            known = ("it", plan.row.us), ("torch", plan.row.torch_us), ("torch over", plan.row.torch_over_us)
            times = [f"{name} {us:,.1f} us" for name, us in known if us]
            measured = ", ".join(times) or "not timed"
            lines.append(f"   the row: {measured}; {plan.row.tried} tried, {plan.row.failed} failed")
        if plan.problem.compute:
            lines.append(f"   compute={plan.problem.compute!r}: each row of x is quantised; this changes the numbers")
        width = max(len(c.kernel) for c in self.candidates)
        for c in self.candidates:
            told = f"about {c.estimate_us:,.1f} us" if c.reason is None else f"cannot: {c.reason}"
            lines.append(f"   {c.kernel:<{width}}  {told}")
        return "\n".join(lines)

    __repr__ = __str__


def explain_problem(problem: Problem, device: Device, *, kernel: str | None = None) -> Explanation:
    """The Explanation for a Problem on a Device, neither of which need exist here."""
    return Explanation(choose(problem, device, kernel=kernel), candidates(problem, device))


def explain(
    x: Tensor,
    weight: Tensor | Weight,
    bias: Tensor | None = None,
    *,
    layout: Layout = "nk",
    out_dtype: torch.dtype | None = None,
    kernel: str | None = None,
    compute: str | None = None,
) -> Explanation:
    """The Explanation of what ``matmul`` would do with the same arguments; nothing is multiplied.

    Print it: the chosen kernel and which rung of the ladder chose it, then every kernel with its estimate or the
    reason it cannot. Raises what ``matmul`` raises.
    """
    problem, device = bind_problem(x, weight, bias, layout=layout, out_dtype=out_dtype, compute=compute)
    return explain_problem(problem, device, kernel=kernel)
