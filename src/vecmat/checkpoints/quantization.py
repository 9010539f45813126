"""What ``config.json`` says of a vecmat checkpoint: its ``quantization_config``, as a value and as JSON.

    {"quant_method": "vecmat", "version": 1, "weights": "int4", "group_size": 128, "zero_points": false,
     "modules_to_not_convert": ["lm_head"], "layers": {"model.layers.0.mlp.down_proj": "int8:g32"}, "ordered": []}

weights: "int8", "int4" or "fp8", for every linear layer but those of ``modules_to_not_convert``, which are dense, and
those of ``layers``, which have another format. group_size: null is one scale a row for int8 and fp8, and for int4,
layer by layer, the largest of 128, 64, 32 that divides K. zero_points: int4 only. ordered: the layers that have a
``weight_order``. Names are qualified, without patterns.

The tensors are ``vecmat.Linear``'s state_dict: NAME.weight in the plain storage of ``vecmat.Weight`` (dense layers as
they are everywhere), NAME.weight_scale fp32, NAME.weight_zero uint8 and NAME.weight_order int32 where there are any.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ..problem import Format
from ..weights import Weight, resolve_format
from .layer import Layer, Stored

METHOD = "vecmat"
VERSION = 1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """The formats of a model's linear layers; the fields are the module's top."""

    weights: str = "int8"
    group_size: int | None = None
    zero_points: bool = False
    modules_to_not_convert: tuple[str, ...] = ()
    layers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ordered: tuple[str, ...] = ()

    @staticmethod
    def of(formats: Mapping[str, Format], ordered: Iterable[str] = ()) -> Quantization | None:
        """What describes layers of these formats; None where all are dense."""
        stored = Counter(fmt for fmt in formats.values() if not fmt.dense)
        if not stored:
            return None
        most = max(stored, key=lambda fmt: (stored[fmt], str(fmt)))
        return Quantization(
            weights=most.name, group_size=most.group_size, zero_points=not most.symmetric,
            modules_to_not_convert=tuple(name for name, fmt in formats.items() if fmt.dense),
            layers={name: str(fmt) for name, fmt in formats.items() if not fmt.dense and fmt != most},
            ordered=tuple(ordered),
        )  # fmt: skip

    @staticmethod
    def from_dict(config: Mapping[str, Any]) -> Quantization:
        """The Quantization of a ``quantization_config``. Raises ``ValueError`` naming a field that is none."""
        version = config.get("version", VERSION)
        if type(version) is not int or not 1 <= version <= VERSION:
            raise ValueError(f"quantization_config: version is {version!r}; this vecmat reads 1 to {VERSION}")
        made = Quantization(
            weights=_field(config, "weights", str, "int8"),
            group_size=_field(config, "group_size", int, None),
            zero_points=_field(config, "zero_points", bool, False),
            modules_to_not_convert=tuple(_names(_field(config, "modules_to_not_convert", list, []))),
            layers=_field(config, "layers", dict, {}),
            ordered=tuple(_names(_field(config, "ordered", list, []))),
        )
        _names(made.layers.keys())
        _names(made.layers.values())
        for text in made.layers.values():
            Format.parse(text)
        if resolve_format(made.weights, 128, made.group_size, not made.zero_points).dense:
            raise ValueError(f"quantization_config: weights is {made.weights!r}; expected int8, int4 or fp8")
        return made

    def as_dict(self) -> dict[str, Any]:
        """The ``quantization_config``, ready for JSON."""
        told = {name: list(value) if isinstance(value, tuple) else value for name, value in self._fields()}
        return {"quant_method": METHOD, "version": VERSION, **told}

    def _fields(self) -> list[tuple[str, Any]]:
        return [(field.name, getattr(self, field.name)) for field in dataclasses.fields(self)]

    def format(self, layer: str, k: int) -> Format | None:
        """The Format of a linear layer with K = ``k``; None for one that is dense."""
        if layer in self.modules_to_not_convert:
            return None
        if layer in self.layers:
            return Format.parse(self.layers[layer])
        return resolve_format(self.weights, k, self.group_size, not self.zero_points)


class Vecmat:
    """Reads what ``vecmat convert`` wrote; nothing is quantised again."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.quantization = Quantization.from_dict(config)

    def holds(self, layer: Layer) -> bool:
        return "weight_scale" in layer

    def read(self, layer: Layer) -> Stored:
        n, k = layer.n, layer.k
        fmt = self.quantization.format(layer.name, k)
        if fmt is None:
            raise ValueError(f"{layer.name} has scales, but modules_to_not_convert names it")
        grid = (n, fmt.groups(k))
        zero = None if fmt.symmetric else layer.take("weight_zero", torch.uint8, grid)
        order = layer.take("weight_order", torch.int32, (k,)) if layer.name in self.quantization.ordered else None
        data = layer.take("weight", fmt.dtype, (n, -(-k // 2) if fmt.name == "int4" else k))
        return Stored(Weight(fmt, data, layer.take("weight_scale", torch.float32, grid), zero, k=k), order)


def _field(config: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = config.get(name, default)
    if value is not default and type(value) is not kind:
        raise ValueError(f"quantization_config: {name} is {value!r}; expected {kind.__name__}")
    return value


def _names(found: Iterable[Any]) -> list[str]:
    names = list(found)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"quantization_config: {names!r} are not all names")
    return names
