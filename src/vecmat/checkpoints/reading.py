"""A checkpoint's tensors as a model's: what every linear layer becomes, checked as a whole before any of it is read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, VecmatWarning
from ..nn import Linear, linear_layers, skipped_layers
from ..problem import DTYPE_NAMES, DTYPES, Format, Layout
from ..weights import Weight, quantize, resolve_format
from .layer import Stored
from .safe import faults_of
from .source import Source

Progress = Callable[[str, int, int], None]
_MOST = 1024  # layers or experts that a config may claim without having as many tensors
_COUNT = re.compile("^(?!.*(size|dim|width)).*(layer|expert)")  # not shared_expert_intermediate_size, say
_BUFFERS = 1 << 30  # bytes of tables that a model may compute for itself


class IncompleteError(CheckpointError):
    """A checkpoint lacks tensors of the model, or has them under other names."""


def model_config(source: Source, dtype: torch.dtype | None, weights: str | None) -> tuple[Any, torch.dtype]:
    """The ``transformers`` config of a checkpoint, and the dtype of its activations.

    That is ``dtype``, else that of dense ``weights``, else what the config says, else the largest floating-point
    tensor's, else bf16. Raises ``CheckpointError`` for a config that claims more layers than the file can have, or is
    none.
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise TypeError(f"dtype is {dtype!r}; expected {', '.join(map(str, DTYPE_NAMES))} or None")
    if weights is not None:
        dense = DTYPES.get(resolve_format(weights, 128).name)
        if dense is not None and dtype not in (None, dense):
            raise ValueError(f"weights is {weights!r} but dtype is {dtype}; a dense weight's dtype is that of x")
        dtype = dtype or dense
    _check_counts(source, source.config_dict())
    with faults_of(f"{source.where}: config"):
        config = source.config()
        said = getattr(config, "dtype", None) or source.dtype()
        said = getattr(torch, said) if isinstance(said, str) else said
    return config, dtype or (said if said in DTYPE_NAMES else torch.bfloat16)


def _check_counts(source: Source, config: Any) -> None:
    """Raise ``CheckpointError`` for a number of layers or experts that would take for ever to build."""
    for key, value in config.items() if isinstance(config, dict) else ():
        _check_counts(source, value)
        if type(value) is int and value > max(_MOST, source.count) and _COUNT.search(str(key)):
            raise CheckpointError(f"{source.where}: config says {key}={value}, but there are {source.count} tensors")


def skeleton(source: Source, config: Any, dtype: torch.dtype, *, buffers: bool) -> Any:
    """The model without its weights: parameters on "meta". buffers: whether its buffers are real."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    place: Any = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
    with faults_of(f"{source.where}: config"), place:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.eval()


class Plan:
    """What of a checkpoint goes where in a model, decided by names and shapes alone.

    source: a checkpoint. model: its skeleton. weights: a format for every linear layer, as for ``vecmat.quantize``;
    None keeps what the file has. group_size, symmetric, skip: as for ``vecmat.convert``; layers that are skipped
    keep what the file has. A layer whose weight is tied stays dense.

    Raises ``IncompleteError`` for tensors that are missing, ``CheckpointError`` for those of other shapes.
    """

    def __init__(self, source: Source, model: Any, weights: str | None = None, *, group_size: int | None = None,
                 symmetric: bool = True, skip: tuple[str, ...] = ()) -> None:  # fmt: skip
        source.bind(model)
        self._source, self._model = source, model
        self._weights, self._group_size, self._symmetric = weights, group_size, symmetric
        self._layers = linear_layers(model)
        self._kept = skipped_layers(skip, self._layers)
        self._state: dict[str, Tensor] = model.state_dict()
        self.quantised = [name for name, layer in self._layers.items() if source.holds(name, *_sizes(layer))]
        self.tied: dict[str, str] = {}  # names that are not read, and those whose parameters they share
        self._check(set(self.quantised))

    def _check(self, quantised: set[str]) -> None:
        source, parameters = self._source, {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        self._tie(quantised)
        lacking, wrong = [], []
        self._plain = []
        for name, tensor in self._state.items():
            layer, _, last = name.rpartition(".")
            if name in self.tied or (last == "weight" and layer in quantised):
                continue
            if not source.has(name):
                lacking += [name] if name in parameters else []  # buffers are computed
                continue
            misfit = source.misfit(name, tuple(tensor.shape), tensor.is_floating_point())
            wrong += [f"{name} is {misfit}; the model has {tuple(tensor.shape)}"] if misfit else []
            self._plain.append(name)
        if lacking:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise IncompleteError(f"{source.where}: has no {', '.join(lacking[:3])}{more}, which the model needs")
        if wrong:
            raise CheckpointError(f"{source.where}: {wrong[0]} ({len(wrong)} such tensors)")

    def _tie(self, quantised: set[str]) -> None:
        source = self._source
        for target, origin in dict(getattr(self._model, "all_tied_weights_keys", None) or {}).items():
            if target.rpartition(".")[0] in quantised:
                continue
            if not source.has(target) or (
                source.has(origin)
                and source.misfit(target, tuple(self._state[target].shape), True) is None
                and torch.equal(source.tensor(target), source.tensor(origin))
            ):
                self.tied[target] = origin

    @property
    def tied_formats(self) -> dict[str, Format]:
        """The formats of linear layers whose weight is another's."""
        tied = {name: f"{name}.weight" for name in self._layers if f"{name}.weight" in self.tied}
        return {name: Format(DTYPE_NAMES[self._state[weight].dtype]) for name, weight in tied.items()}

    @property
    def total(self) -> int:
        """How many entries there will be."""
        layers = {name for name in self._layers if f"{name}.weight" not in self.tied}
        return len(layers) + sum(1 for name in self._plain if name.rpartition(".")[0] not in layers)

    def entries(self) -> Iterator[tuple[str, Linear | Tensor]]:
        """(layer, Linear) and (parameter or buffer, tensor), one after another, none kept here.

        Warns of tensors of the file that the model has no place for. Raises ``CheckpointError``.
        """
        shared = set(self.tied.values())
        layers = [name for name in self._layers if f"{name}.weight" not in self.tied]
        for name in layers:
            yield name, self._layer(name, shared)
        inside = set(layers)
        for name in self._plain:
            if name.rpartition(".")[0] not in inside:
                yield name, self._tensor(name)
        self._warn()

    def _layer(self, name: str, shared: set[str]) -> Linear:
        source, module = self._source, self._layers[name]
        n, k = _sizes(module)
        layout: Layout = "nk" if isinstance(module, nn.Linear) else "kn"
        weight_name, bias_name = f"{name}.weight", f"{name}.bias"
        target = None if name in self._kept or weight_name in shared else self._target(k)
        order = None
        try:
            if name in self.quantised:
                stored = source.read(name, n, k)
                weight = _laid(stored.weight, layout)
                order = stored.order
                if target is not None:
                    dense = _in_order(stored)
                    weight, order = quantize(dense.t() if layout == "kn" else dense, str(target), layout=layout), None
            elif target is None or target.dense:
                tensor = self._tensor(weight_name)
                weight = Weight(DTYPE_NAMES[tensor.dtype], tensor, layout=layout)
            else:
                weight = quantize(source.tensor(weight_name), str(target), layout=layout)
            bias = None
            if bias_name in self._state:
                bias = self._tensor(bias_name)
            elif name in self.quantised and source.has(bias_name):  # AutoGPTQ wrote one, of zeros, for every layer
                extra = source.tensor(bias_name).to(self._state[weight_name].dtype)
                bias = extra if bool(extra.any()) else None
            made = Linear.from_weight(weight, bias, order=order)
        except CheckpointError:
            raise
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{source.where}: layer {name}: {error}") from error
        return made.eval().requires_grad_(False)

    def _target(self, k: int) -> Format | None:
        if self._weights is None:
            return None
        return resolve_format(self._weights, k, self._group_size, self._symmetric)

    def _tensor(self, name: str) -> Tensor:
        own = self._state[name]
        found = self._source.tensor(name)
        if tuple(found.shape) != tuple(own.shape):
            raise CheckpointError(f"{self._source.where}: {name} is {tuple(found.shape)}; expected {tuple(own.shape)}")
        return found.to(torch.float32 if own.is_floating_point() and self._wide(name, own.dtype) else own.dtype)

    def _wide(self, name: str, dtype: torch.dtype) -> bool:
        """Whether transformers keeps a parameter in fp32 whatever the model's dtype is."""
        keys = set(getattr(self._model, "_keep_in_fp32_modules_strict", None) or ())
        if dtype == torch.float16:
            keys |= set(getattr(self._model, "_keep_in_fp32_modules", None) or ())
        return any(re.search(rf"(^|\.){key}(\.|$)", name) for key in keys)

    def _warn(self) -> None:
        known = getattr(self._model, "_keys_to_ignore_on_load_unexpected", None) or ()
        extra = [name for name in self._source.unread() if not any(re.search(pattern, name) for pattern in known)]
        scaled = [name for name in extra if name.endswith(".act.scales")]
        if scaled:
            raise CheckpointError(f"{self._source.where}: {scaled[0]} scales an activation, as AWQ may; it is not read")
        if extra:
            more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
            told = f"{self._source.where}: the model has no place for {', '.join(extra[:3])}{more}; left out"
            warnings.warn(told, VecmatWarning, stacklevel=5)  # who called load or convert


def check_buffers(source: Source, model: Any) -> None:
    """Raise ``CheckpointError`` if a model on "meta" would compute more than a sane number of bytes of buffers."""
    nbytes = sum(buffer.nbytes for buffer in model.buffers())
    if nbytes > _BUFFERS:
        raise CheckpointError(
            f"{source.where}: the config asks for {nbytes} bytes of tables; expected {_BUFFERS} at most"
        )


def _sizes(module: nn.Module) -> tuple[int, int]:
    """N and K of a linear layer or a Conv1D."""
    weight: Any = module.weight
    rows, columns = weight.shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _laid(weight: Weight, layout: Layout) -> Weight:
    if layout == "nk":
        return weight
    if weight.format.dense:
        return Weight(weight.format, weight.data.t().contiguous(), layout=layout)
    return Weight(weight.format, weight.data, weight.scale, weight.zero, k=weight.k, layout=layout)


def _in_order(stored: Stored) -> Tensor:
    """The weight (N, K), fp32, its columns in the order of x's."""
    dense = stored.weight.dequantize()
    if stored.order is None:
        return dense
    out = torch.empty_like(dense)
    out[:, stored.order.long()] = dense
    return out
