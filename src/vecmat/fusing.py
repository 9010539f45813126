"""fuse(): layers that are given the same x (q, k and v; gate and up) become one product.

Their weights are joined along N, row for row as they were, so each row of the result is what it was. The layers stay
where the model's code finds them: the first to be called computes the product and hands their columns to the others,
which take them if they are given the very same tensor, and compute their own rows of the weight if not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .linear import ORDER, PARTS, Linear, Product, layout_of
from .ops import matmul_stored, trace
from .packs import forget_packs, is_captured
from .problem import Format, Layout
from .siblings import Siblings, siblings
from .weights import Weight

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Fusions:
    """What ``fuse`` made of a model. joined: names of layers that are one product now, a group each.

    apart: by name, why a layer is not joined with another, where its module has several.
    """

    joined: tuple[tuple[str, ...], ...]
    apart: dict[str, str]

    def __str__(self) -> str:
        lines = [" + ".join(names) for names in self.joined]
        return "\n".join([*lines, *(f"{name} apart: {why}" for name, why in self.apart.items())])


class Joined(Product):
    """The product of several layers, a child of the first. Its tensors are in the state_dict by their parts' names."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Nothing: each Part saves its rows."""

    def _load_from_state_dict(self, *arguments: Any) -> None:
        """Nothing: each Part loads its rows."""


class Handover:
    """What the first of several layers has computed for the others; never copied or saved.

    held: the tensor that it was given, its version, and each one's columns of the result.
    """

    __slots__ = ("held",)

    held: tuple[Tensor, int, Sequence[Tensor]] | None

    def __init__(self) -> None:
        self.held = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Handover, ()


class Part(Linear):
    """One of several layers with the same x; ``weight``, ``bias`` and so on are its rows of what they share.

    Moving the first of them (``.to``) moves all. A Part's tensors are views: write to them in place, or by
    ``load_state_dict``.
    """

    joined: Joined  # a child of the first part

    def __init__(self, product: Joined, place: int, sizes: tuple[int, ...], handover: Handover, bias: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.compute = product.in_features, sizes[place], product.compute
        self.layout: Layout = "nk"
        if place == 0:
            self.joined = product
        self.__dict__["_product"] = product  # no child of its own: it would be there as often as there are parts
        self._place, self._sizes, self._handover, self._biased = place, sizes, handover, bias
        self._mine: tuple[Weight, Weight] | None = None

    def _rows(self, name: str) -> Any:
        tensor = getattr(self.__dict__["_product"], name, None)
        start = sum(self._sizes[: self._place])
        return None if tensor is None else tensor[start : start + self.out_features]

    @property
    def format(self) -> Format:  # type: ignore[override]
        """The weight's Format."""
        return self.__dict__["_product"].format  # type: ignore[no-any-return]

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """Its rows of the joined weight: (N, K), for int4 (N, ceil(K / 2))."""
        return self._rows("weight")

    @property
    def weight_scale(self) -> Any:
        """Its rows of the scales, None for a dense weight."""
        return self._rows("weight_scale")

    @property
    def weight_zero(self) -> Any:
        """Its rows of the zero points, None where there are none."""
        return self._rows("weight_zero")

    @property
    def weight_order(self) -> Any:
        """The order of x's columns, which all parts share, or None."""
        return self.__dict__["_product"].weight_order

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """Its part of the joined bias (N,), or None."""
        return self._rows("bias") if self._biased else None

    def stored(self) -> Weight:
        """The part's own Weight, by views of the joined one."""
        whole: Weight = self.__dict__["_product"].stored()
        if self._mine is None or self._mine[0] is not whole:
            rows: dict[str, Any] = {part: self._rows(name) for part, name in PARTS.items()}
            self._mine = whole, Weight(whole.format, **rows, k=whole.k)
        return self._mine[1]

    def forward(self, x: Tensor) -> Tensor:
        """y (..., N) for x (..., K); for all parts but where N is all there is, a view of rows that lie further apart.

        The first computes for all, unless someone wants gradients. In eager calls it does so too only if x has a
        version counter, which tensors of ``torch.inference_mode`` lack: a change of x between the calls is seen by it.
        """
        handover: Handover = self._handover
        if self._place == 0:
            if not self._may_join(x):
                handover.held = None
                return self._apart(x)
            columns = self.joined(x).split(self._sizes, -1)
            handover.held = x, _version(x), columns
            return columns[0]  # type: ignore[no-any-return]
        held = handover.held
        if held is None or held[0] is not x or held[1] != _version(x):
            return self._apart(x)
        if self._place == len(self._sizes) - 1:
            handover.held = None
        return held[2][self._place]

    def _may_join(self, x: Tensor) -> bool:
        if not is_compiling() and x.is_inference():
            return False
        joined = self.joined
        bias = joined.bias
        return not torch.is_grad_enabled() or not (
            x.requires_grad or joined.weight.requires_grad or (bias is not None and bias.requires_grad)
        )

    def _apart(self, x: Tensor) -> Tensor:
        order = self.weight_order
        if order is not None:
            x = x.index_select(-1, order)
        if not is_compiling():
            return matmul_stored(x, self.stored(), self.bias, self.compute)
        weight, scale = self.weight, self.weight_scale
        name = "" if scale is None and weight.dtype == x.dtype else self.format.text
        parts = weight, scale, self.weight_zero
        return trace(x, *parts, self.bias, name, self.in_features, "nk", compute=self.compute)

    def _apply(self, fn: Any, recurse: bool = True) -> Part:
        nn.Module._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        self._mine, self._handover.held = None, None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        parameters = ("weight", "bias") if self.format.dense else ("bias",)  # torch's order: parameters, then buffers
        for name in dict.fromkeys((*parameters, *PARTS.values(), ORDER)):
            tensor = getattr(self, name)
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool,
                              missing_keys: list[str], unexpected_keys: list[str],
                              error_msgs: list[str]) -> None:  # fmt: skip
        product: Joined = self.__dict__["_product"]
        order: Any = product.weight_order
        new = state_dict.get(prefix + ORDER)
        if order is not None and new is not None and not torch.equal(order, new.to(order.device, order.dtype)):
            error_msgs.append(f"{prefix}{ORDER} is not that of the layers that it is joined with")
            return
        if product.weight.is_meta:
            error_msgs.append(f"{prefix}weight is part of a joined weight without data; load first, then fuse")
            return
        if is_captured(product.weight):  # a graph that finds the data where it was replays the old packed copy
            product.weight.data = product.weight.data.clone()
        rows = Linear.__new__(Linear)
        parts = {name: _alias(getattr(self, name)) for name in PARTS.values()}
        rows._hold(self.format, (self.out_features, self.in_features), "nk", None, parts, _alias(self.bias), order)
        about = {**local_metadata, "assign_to_params_buffers": False}  # values go to where the others' are
        rows._load_from_state_dict(state_dict, prefix, about, strict, missing_keys, unexpected_keys, error_msgs)
        forget_packs(product.weight)
        product._weight = self._mine = self._handover.held = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mine": None}

    def extra_repr(self) -> str:
        """What ``print(layer)`` shows between its brackets."""
        return f"{super().extra_repr()}, part {self._place + 1} of {len(self._sizes)}"


def _alias(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _version(x: Tensor) -> int:
    return -1 if is_compiling() or x.is_inference() else x._version


def fuse(model: nn.Module) -> Fusions:
    """What was joined: ``vecmat.Linear`` layers of a model that its code gives the same tensor, in place.

    model: converted already. Layers are joined where the code of their module's ``forward`` shows that they are always
    called one after the other with the same local name (see ``siblings.py``), and where their weights have the same
    format, K and device. The rest stays as it is, with the reason in the result. Outputs are those of before, up to
    the order in which another kernel sums; weights, names and the state_dict do not change.

    What a joined layer returns is a view: its rows are as far apart as the joined product's. Layers that share a
    weight, that are in the model twice, or whose ``forward`` was replaced are left. The memory taken is one group's.
    """
    uses: dict[int, int] = {}
    owners: dict[int, int] = {}
    for _, module in model.named_modules(remove_duplicate=False):
        uses[id(module)] = uses.get(id(module), 0) + 1
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    known: dict[tuple[type, frozenset[str]], Siblings] = {}
    joined: list[tuple[str, ...]] = []
    apart: dict[str, str] = {}
    for path, parent in list(model.named_modules()):
        layers = {name: child for name, child in parent.named_children() if type(child) is Linear}
        if len(layers) < 2:
            continue
        names = frozenset(layers)
        if "forward" in vars(parent):
            told = Siblings(groups=(), apart=dict.fromkeys(layers, "the forward of its module was replaced"))
        else:
            if (type(parent), names) not in known:
                linear = {name for name, child in parent.named_children() if layout_of(child) is not None}
                known[type(parent), names] = siblings(type(parent), set(names), linear)
            told = known[type(parent), names]
        prefix = f"{path}." if path else ""
        apart |= {prefix + name: why for name, why in told.apart.items()}
        for group in told.groups:
            members = [layers[name] for name in group]
            why = _differ(members, uses, owners)
            if why is None:
                _join(parent, group, members)
                joined.append(tuple(prefix + name for name in group))
            else:
                apart |= dict.fromkeys((prefix + name for name in group), why)
            del members
    return Fusions(joined=tuple(joined), apart=apart)


def _differ(members: list[Linear], uses: dict[int, int], owners: dict[int, int]) -> str | None:
    """Why layers that are given the same x cannot be one product; None if they can."""
    for member in members:
        if "forward" in vars(member):
            return "the forward of one of them was replaced"
        if uses[id(member)] > 1 or any(owners[id(parameter)] > 1 for parameter in member.parameters()):
            return "one of them is shared with another part of the model"
        if member.layout != "nk":
            return "a weight is (K, N)"
    about = [(layer.in_features, str(layer.format), layer.compute, str(layer.weight.device)) for layer in members]
    if len(set(about)) > 1:
        told = "; ".join(dict.fromkeys(f"K={k} {fmt} {compute or ''} on {place}" for k, fmt, compute, place in about))
        return f"their weights differ: {told}"
    grads = {layer.weight.requires_grad for layer in members}
    biases = {(b.dtype, b.requires_grad) for b in (layer.bias for layer in members) if b is not None}
    if len(grads) > 1 or len(biases) > 1:
        return "their dtypes differ, or which of them are trained"
    orders: list[Any] = [layer.weight_order for layer in members]
    same = all(order is None for order in orders) or all(
        order is not None and orders[0] is not None and torch.equal(order, orders[0]) for order in orders
    )
    return None if same else "their weights expect x's columns in different orders"


def _join(parent: nn.Module, names: tuple[str, ...], members: list[Linear]) -> None:
    """Put one product in the place of a parent's layers."""
    sizes = tuple(layer.out_features for layer in members)
    first = members[0]
    biased = [layer.bias for layer in members if layer.bias is not None]
    with torch.no_grad(), torch.inference_mode(False):
        parts: dict[str, Any] = {name: _stack([getattr(layer, name, None) for layer in members])
                                 for name in PARTS.values()}  # fmt: skip
        bias = None
        if biased:
            like = biased[0]
            each: list[Any] = [like.new_zeros(m.out_features) if m.bias is None else m.bias for m in members]
            bias = nn.Parameter(torch.cat(each), requires_grad=like.requires_grad)
        if first.format.dense:
            parts["weight"] = nn.Parameter(parts["weight"], requires_grad=first.weight.requires_grad)
        product = Joined()
        order: Any = first.weight_order
        product._hold(first.format, (sum(sizes), first.in_features), "nk", first.compute, parts, bias, order)
    product.train(first.training)
    handover = Handover()
    for place, (name, layer) in enumerate(zip(names, members, strict=True)):
        part = Part(product, place, sizes, handover, layer.bias is not None)
        part.training = layer.training
        for hooks in HOOKS:
            getattr(part, hooks).update(getattr(layer, hooks))
        setattr(parent, name, part)


def _stack(parts: list[Any]) -> Tensor | None:
    """Rows under rows; None for nothing."""
    if parts[0] is None:
        return None
    if parts[0].dtype == torch.float8_e4m3fn:  # torch has no cat of it on every device
        return torch.cat([part.view(torch.uint8) for part in parts]).view(torch.float8_e4m3fn)
    return torch.cat(parts)
