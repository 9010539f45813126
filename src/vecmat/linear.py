"""Linear: a linear layer whose product goes through ``matmul``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .ops import check_compute, matmul_stored, trace
from .packs import forget_packs, is_captured
from .problem import DTYPE_NAMES, Format, Layout
from .weights import Weight, check_layout, quantize

PARTS = {"data": "weight", "scale": "weight_scale", "zero": "weight_zero"}  # of a Weight, and a layer's names of them
ORDER = "weight_order"


class Product(nn.Module):
    """What ``Linear`` is made of: a weight in any format as parameters or buffers, and the product with it."""

    in_features: int
    out_features: int
    format: Format
    layout: Layout
    compute: str | None

    def _set(self, weight: Weight, bias: Tensor | None, compute: str | None, order: Tensor | None = None) -> None:
        check_compute(compute, weight.format)
        parts = {name: getattr(weight, part) for part, name in PARTS.items()}
        self._hold(weight.format, (weight.n, weight.k), weight.layout, compute, parts, bias, order)

    def _hold(self, fmt: Format, sizes: tuple[int, int], layout: Layout, compute: str | None,
              parts: dict[str, Any], bias: Tensor | None, order: Tensor | None) -> None:  # fmt: skip
        """Become the layer with these tensors, unchecked. sizes: N and K. parts: by the layer's names of them."""
        super().__init__()
        self.out_features, self.in_features = sizes
        self.format, self.layout, self.compute = fmt, layout, compute
        if fmt.dense:
            data = parts["weight"]
            self.weight = data if isinstance(data, nn.Parameter) else nn.Parameter(data)
        else:
            for name in PARTS.values():
                self.register_buffer(name, parts[name])
        self.register_buffer(ORDER, order)
        if bias is None or isinstance(bias, nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = nn.Parameter(bias, requires_grad=False)
        self._weight: Weight | None = None

    def stored(self) -> Weight:
        """The layer's Weight, columns in its own order; it shares the layer's tensors."""
        weight = self._weight
        if weight is not None and self._holds(weight):
            return weight
        parts: dict[str, Any] = {part: getattr(self, name, None) for part, name in PARTS.items()}
        self._follow_dtype()
        self._weight = Weight(self.format, **parts, k=self.in_features, layout=self.layout)
        return self._weight

    def _holds(self, weight: Weight) -> bool:
        """Whether a Weight's tensors are still the layer's: they may be tied, loaded or swapped by torch.func."""
        if weight.scale is None:
            return weight.data is self._parameters.get("weight")
        held: dict[str, Any] = self._buffers
        return (
            weight.data is held.get("weight")
            and weight.scale is held.get("weight_scale")
            and weight.zero is held.get("weight_zero")
        )

    def forward(self, x: Tensor) -> Tensor:
        """y (..., N) for x (..., K)."""
        order = self._buffers.get(ORDER)
        if order is not None:
            x = x.index_select(-1, order)
        if is_compiling():
            return self._traced(x)
        weight = self._weight
        if weight is None or not self._holds(weight):
            weight = self.stored()
        return matmul_stored(x, weight, self._parameters["bias"], self.compute)

    def _traced(self, x: Tensor) -> Tensor:
        """``forward`` as ``torch.compile`` and ``torch.export`` trace it: nothing but the layer's tensors and sizes."""
        data, scale = self.weight, self._buffers.get("weight_scale")
        if scale is not None:
            format, zero = self.format.text, self._buffers["weight_zero"]
        else:  # what torch.func puts in a parameter's place may be computed anew in each call: a plain tensor
            stored = isinstance(data, nn.Parameter) or data.dtype != x.dtype
            format, zero = DTYPE_NAMES[data.dtype] if stored else "", None
        return trace(x, data, scale, zero, self.bias, format, self.in_features, self.layout, compute=self.compute)

    def _follow_dtype(self) -> None:
        """A dense layer's format is its weight's dtype, which ``.to(dtype)`` and loading may change."""
        if self.format.dense and self.weight.dtype in DTYPE_NAMES:
            self.format = Format(DTYPE_NAMES[self.weight.dtype])

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows between its brackets."""
        told = [f"in_features={self.in_features}, out_features={self.out_features}", f"weights={self.format}"]
        told += [f"bias={self.bias is not None}"] + ([f"layout={self.layout}"] if self.layout == "kn" else [])
        told += ["ordered=True"] if self._buffers.get(ORDER) is not None else []
        return ", ".join(told + ([f"compute={self.compute}"] if self.compute else []))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Product:
        kept = {} if self.format.dense else {name: self._buffers.pop(name, None) for name in PARTS.values()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in kept.items():
            if tensor is not None:
                moved = fn(tensor)
                tensor = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
            self._buffers[name] = tensor
        self._weight = None
        self._follow_dtype()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str],
                              error_msgs: list[str]) -> None:  # fmt: skip
        miscast = []
        for name in (ORDER,) if self.format.dense else (*PARTS.values(), ORDER):
            own, new = getattr(self, name), state_dict.get(prefix + name)
            if own is not None and new is not None and new.dtype != own.dtype:  # copy_ would cast it silently
                miscast.append(f"{prefix}{name} is {new.dtype}; {self.format} weights expect {own.dtype}")
        error_msgs.extend(miscast)
        if miscast:
            return
        before = {} if self.format.dense else {name: getattr(self, name) for name in PARTS.values()}
        before[ORDER] = getattr(self, ORDER)
        saved = {name: tensor.clone() for name, tensor in before.items() if tensor is not None}
        if is_captured(self.weight):  # a graph that finds the data where it was replays the old packed copy
            self.weight.data = self.weight.data.clone()
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        forget_packs(self.weight)
        self._weight = None
        try:
            self.stored()
            if before[ORDER] is not None:
                _check_order(getattr(self, ORDER), self.in_features)
        except (TypeError, ValueError) as error:
            error_msgs.append(f"{prefix}weight: {error}")
            for name, tensor in saved.items():  # a refused weight leaves the layer as it was
                setattr(self, name, before[name].copy_(tensor))
            self._weight = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_weight": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Product:
        import copy

        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return made


class Linear(Product):
    """y = x @ weight + bias with the weight in any format; a drop-in for ``torch.nn.Linear``.

    in_features, out_features: K and N. weights: "fp32", "bf16", "fp16", "int8", "int4" or "fp8", None for a dense
    weight of ``dtype``. group_size, symmetric: as for ``vecmat.quantize``. layout: how a dense weight lies.
    compute: as for ``vecmat.matmul``. dtype: of the bias, and of x.

    state_dict: a dense ``weight`` is a Parameter, as in ``torch.nn.Linear``; a quantised one is the buffers
    ``weight``, ``weight_scale`` and, with zero points, ``weight_zero``, in the plain storage of ``vecmat.Weight``.
    Their dtypes never change: ``.to(dtype)``, ``.half()`` and the like move them and cast only the bias. Loading a
    state_dict checks shapes, dtypes and scales. Change a quantised weight by ``load_state_dict`` or by assigning the
    buffers, not in place: kernels keep packed copies of it, which only a new tensor replaces.

    A layer may hold ``weight_order`` too, int32 (K,): its weight's column j belongs to x's column weight_order[j], as
    for a GPTQ checkpoint whose groups follow the activations. Each call then gathers x's columns first.

    A fresh layer's weight is drawn as ``torch.nn.Linear`` draws it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, weights: str | None = None,
                 group_size: int | None = None, symmetric: bool = True, layout: Layout = "nk",
                 compute: str | None = None, device: Any = None, dtype: torch.dtype | None = None) -> None:  # fmt: skip
        check_layout("Linear", layout)
        made = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        name = weights or DTYPE_NAMES[made.weight.dtype]
        dense = made.weight.detach()
        dense = dense.t().contiguous() if layout == "kn" else dense
        self._set(quantize(dense, name, layout=layout, group_size=group_size, symmetric=symmetric), made.bias, compute)

    @classmethod
    def from_linear(cls, linear: nn.Module, weights: str | None = None, *, group_size: int | None = None,
                    symmetric: bool = True, compute: str | None = None) -> Linear:  # fmt: skip
        """The Linear that computes what ``linear`` does, its weight stored as ``weights``.

        linear: a ``torch.nn.Linear``, or a ``transformers`` Conv1D, whose weight is (K, N). weights: None keeps the
        weight's own dtype, and the very Parameter, so that what is tied to it stays tied; the bias is shared too.
        Raises ``TypeError`` for another kind of module, and what ``vecmat.quantize`` raises.
        """
        layout = layout_of(linear)
        if layout is None:
            raise TypeError(f"from_linear: {type(linear).__name__} is no torch.nn.Linear (or transformers Conv1D)")
        parameter, bias = linear.weight, linear.bias
        assert isinstance(parameter, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        own = DTYPE_NAMES.get(parameter.dtype, str(parameter.dtype))
        made = cls.__new__(cls)
        if weights in (None, own):
            made._set(Weight(own, parameter, layout=layout), bias, compute)
        else:
            assert weights is not None
            stored = quantize(parameter, weights, layout=layout, group_size=group_size, symmetric=symmetric)
            made._set(stored, bias, compute)
        made.train(linear.training)
        return made

    @classmethod
    def from_weight(cls, weight: Weight, bias: Tensor | None = None, *, compute: str | None = None,
                    order: Tensor | None = None) -> Linear:  # fmt: skip
        """The Linear around a Weight, a bias (N,) or None, and the order (K,) of x's columns that the weight expects.

        Raises ``ValueError`` for a bias or an order that does not fit.
        """
        if bias is not None and tuple(bias.shape) != (weight.n,):
            raise ValueError(f"from_weight: bias has shape {tuple(bias.shape)}; expected ({weight.n},)")
        if order is not None:
            _check_order(order, weight.k)
            order = order.to(device=weight.device, dtype=torch.int32)
        made = cls.__new__(cls)
        made._set(weight, bias, compute, order)
        return made


def _check_order(order: Tensor, k: int) -> None:
    """Raise ``ValueError`` unless ``order`` holds each of 0 to K - 1 once."""
    if order.device.type == "meta":
        return
    if tuple(order.shape) != (k,) or not torch.equal(order.long().sort().values, torch.arange(k, device=order.device)):
        raise ValueError(
            f"weight_order (shape {tuple(order.shape)}) is no order of {k} columns; expected each of 0 to {k - 1} once"
        )


def layout_of(module: nn.Module) -> Layout | None:
    """How a linear module's weight lies; None for a module that is not one, or that computes something else."""
    if isinstance(module, nn.Linear):
        plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
        # MultiheadAttention reads its out_proj's weight itself, past any forward.
        return "nk" if plain and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) else None
    if type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers."):
        return "kn"
    return None
