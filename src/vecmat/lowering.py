"""What Inductor writes for a product that is opaque to it: a plain call, where it would go through torch's dispatcher.

A graph that Inductor compiled is Python code, in which a custom operator is called by its name, as in
``torch.ops.vecmat._matmul.default(...)``: arguments become IValues and Python objects again, 3 us and more of a call.
``torch.ops.vecmat.direct`` is the function behind it, so here the name in the code is changed and nothing else: the
operator in the graph, its fake, its constraints on strides and all that export and AOTInductor see stay torch's own.

This reaches into Inductor, whose inside may change: where anything is not as expected the dispatcher is called. It is
for a GPU, too, where these microseconds pass beside the kernels.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch

OPERATOR = "torch.ops.vecmat._matmul.default"
DIRECT = "torch.ops.vecmat.direct"


def shorten() -> None:
    """Have Inductor call ``DIRECT`` from here on, if it is loaded; costs nothing the second time."""
    inductor = sys.modules.get("torch._inductor.lowering")
    if inductor is not None:
        _shorten(inductor)


@functools.lru_cache(maxsize=1)
def _shorten(inductor: Any) -> bool:
    operator = torch.ops.vecmat._matmul.default
    try:
        if operator in inductor.lowerings:
            return False
        constraint = inductor.tag_to_layout_constraint(inductor.get_layout_constraint_tag(operator, with_default=True))
        inductor.make_fallback(operator, layout_constraint=constraint, warn=False)
        lower = inductor.lowerings[operator]
        virtualized = inductor.V

        def lowered(*args: Any, **kwargs: Any) -> Any:
            made, graph = lower(*args, **kwargs), virtualized.graph
            python = not (getattr(graph, "cpp_wrapper", True) or getattr(graph, "fx_wrapper", False))
            device = args[0].get_device() if args else None  # on a GPU a graph's replay calls nothing
            return _renamed(made) if python and device is not None and device.type == "cpu" else made

        inductor.lowerings[operator] = lowered
    except (AttributeError, KeyError, TypeError, AssertionError):
        return False
    return True


def _renamed(lowered: Any) -> Any:
    """The same, its kernel's name in Python code changed where it is the operator's."""
    node = getattr(getattr(lowered, "data", None), "data", None)
    kernels: list[Any] = [node, *(getattr(node, "inputs", None) or [])[:1]]  # the kernel itself, or its result's
    for kernel in kernels:
        if getattr(kernel, "python_kernel_name", None) == OPERATOR and not getattr(kernel, "kwargs", None):
            kernel.python_kernel_name = DIRECT
    return lowered
