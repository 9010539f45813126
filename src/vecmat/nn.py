"""convert(): a whole model's linear layers, as ``vecmat.Linear``."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable

from torch import nn

from .fusing import HOOKS
from .fusing import fuse as fuse_layers
from .linear import Linear, layout_of
from .ops import check_compute
from .weights import resolve_format

__all__ = ["Linear", "convert", "linear_layers", "skipped_layers"]


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that ``convert`` can replace, by qualified name; one with two names is there twice."""
    # On its fast path TransformerEncoderLayer reads the weights of these two itself, past any forward.
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoderLayer)]
    read = {id(layer) for encoder in encoders for layer in (encoder.linear1, encoder.linear2)}
    named = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in named if layout_of(module) is not None and id(module) not in read}


def convert(
    model: nn.Module,
    weights: str = "int8",
    *,
    group_size: int | None = None,
    symmetric: bool = True,
    compute: str | None = None,
    skip: Iterable[str] = (),
    untie: bool = False,
    fuse: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> nn.Module:
    """The model, its linear layers replaced in place by ``vecmat.Linear`` with weights in a format.

    weights, group_size, symmetric, compute: as for ``vecmat.Linear``; int4 without a group_size takes, layer by
    layer, the largest that divides K. skip: names of layers to leave to torch: a qualified name, a last component
    ("lm_head") or a pattern ("*.mlp.*").

    Hooks of a layer go over to its successor. The bias of a quantised layer is frozen: a gradient for it would keep
    all kernels but torch's own from running wherever gradients are on. A layer whose ``forward`` was replaced on the
    object itself (as ``accelerate`` does to place a model on several devices) is left to torch.

    A weight that another module shares (a tied embedding) stays one tensor: its layer keeps the dense weight and
    still computes through ``vecmat``. untie=True gives that layer its own quantised copy instead: faster, at the
    price of that copy's memory.

    fuse=True joins layers that the model's code gives the same x (q, k and v; gate and up) into one product each, with
    the same numbers and names: ``vecmat.fuse`` of the result, which tells what was joined and what was not.

    progress: called with (name, done, total) after each layer. Raises ``ValueError`` for a skip that names no
    layer, for a model without linear layers, and what ``vecmat.quantize`` raises; the layers before it stay
    converted.
    """
    layers = linear_layers(model)
    if not layers:
        raise ValueError(f"convert: {type(model).__name__} has no torch.nn.Linear to convert")
    if "" in layers:
        raise ValueError("convert: the model is itself a linear layer; use vecmat.Linear.from_linear")
    check_compute(compute, resolve_format(weights, 128, group_size, symmetric))
    skipped = {id(layers[name]) for name in skipped_layers(skip, layers)}
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    todo = [name for name, layer in layers.items() if id(layer) not in skipped]
    replaced: dict[int, Linear] = {}
    for done, name in enumerate(todo, 1):
        linear = layers[name]
        made = replaced.get(id(linear))
        if made is None:
            tied = owners[id(linear.weight)] > 1 and not untie
            made = replaced[id(linear)] = Linear.from_linear(
                linear,
                None if tied else weights,
                group_size=group_size,
                symmetric=symmetric,
                compute=None if tied else compute,
            )
            for hooks in HOOKS:
                getattr(made, hooks).update(getattr(linear, hooks))
            if not made.format.dense and made.bias is not None:
                made.bias.requires_grad_(False)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made)
        layers[name] = made  # drop the old layer's weight before the next one is quantised
        if progress is not None:
            progress(name, done, len(todo))
    if fuse:
        fuse_layers(model)
    return model


def skipped_layers(skip: Iterable[str], layers: dict[str, nn.Module]) -> set[str]:
    """The names of layers that ``convert``'s ``skip`` means; raises what it raises."""
    if isinstance(skip, str):
        raise TypeError(f"convert: skip is {skip!r}; expected a list of names, such as [{skip!r}]")
    return {name for pattern in skip for name in _matching(pattern, layers)}


def _matching(pattern: str, layers: dict[str, nn.Module]) -> list[str]:
    found = [
        name
        for name in layers
        if name == pattern or name.rpartition(".")[2] == pattern or fnmatch.fnmatchcase(name, pattern)
    ]
    if not found:
        near = difflib.get_close_matches(pattern, {*layers, *(name.rpartition(".")[2] for name in layers)}, 1)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"convert: skip names {pattern!r}, which is no linear layer of the model{hint}")
    return found
