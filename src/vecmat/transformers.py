"""VecmatConfig: vecmat as a quantization method of ``transformers``; importing this file registers it there.

    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=vecmat.VecmatConfig("int4"))
    model.save_pretrained(folder)

The folder is what ``vecmat convert`` writes too: ``checkpoints/quantization.py`` has the layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoints.quantization import METHOD, Quantization
from .errors import CheckpointError
from .nn import Linear, linear_layers, skipped_layers
from .problem import DTYPE_NAMES, Format
from .weights import quantize, resolve_format

# The dtypes of quantised weights' parts, and their names in safetensors.
_CODES: dict[Any, str] = {
    torch.int8: "I8", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.int32: "I32",
}  # fmt: skip
# What the parts of a layer are; None for what depends on its format.
_PART_CODES = {"weight": None, "weight_scale": "F32", "weight_zero": "U8", "weight_order": "I32"}


@register_quantization_config(METHOD)
class VecmatConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The formats of a model's linear layers, for ``from_pretrained(..., quantization_config=...)``.

    weights: "int8", "int4" or "fp8"; "int4:g64:zp" and the like name the options too. group_size, symmetric: as for
    ``vecmat.quantize``. skip: names of modules whose linear layers torch computes as they are: qualified, a last
    component ("lm_head") or a pattern ("*.mlp.*"). None skips the output head and a model's last layer, as other
    methods of transformers do; [] skips none. modules_to_not_convert: another name of skip. Layers whose weight is
    tied and those that the model wants in fp32 are skipped always.

    Raises ``ValueError`` or ``TypeError`` for a format or a skip that is none.
    """

    def __init__(self, weights: str = "int8", *, group_size: int | None = None, symmetric: bool = True,
                 skip: Iterable[str] | None = None,
                 modules_to_not_convert: Iterable[str] | None = None) -> None:  # fmt: skip
        if skip is not None and modules_to_not_convert is not None:
            raise ValueError("VecmatConfig: skip and modules_to_not_convert are two names of one option; give one")
        skip = modules_to_not_convert if skip is None else skip
        skipped_layers(skip if isinstance(skip, str) else (), {})  # raises for a name in place of a list
        fmt = resolve_format(weights, 128, group_size, symmetric)
        if fmt.dense:
            raise ValueError(f"VecmatConfig: weights is {weights!r}; expected int8, int4 or fp8")
        size = fmt.group_size if ":" in weights else group_size
        self.quant_method = METHOD
        self.quantization = Quantization(weights=fmt.name, group_size=size, zero_points=not fmt.symmetric)
        self.skip = None if skip is None else list(skip)

    @classmethod
    def of(cls, quantization: Quantization) -> VecmatConfig:
        """The config that says what a Quantization does."""
        made = cls.__new__(cls)
        made.quant_method, made.quantization = METHOD, quantization
        made.skip = list(quantization.modules_to_not_convert)
        return made

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The VecmatConfig of a ``quantization_config``. Raises ``ValueError`` naming a field that is none."""
        made = cls.of(Quantization.from_dict(config_dict))
        if "modules_to_not_convert" not in config_dict:
            made.skip = None
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` has as ``quantization_config``."""
        told = self.quantization.as_dict()
        told["modules_to_not_convert"] = self.skip
        if self.skip is None:
            del told["modules_to_not_convert"]
        return told

    def __iter__(self) -> Any:
        yield from self.to_dict().items()


@register_quantizer(METHOD)
class VecmatQuantizer(HfQuantizer):  # type: ignore[misc]
    """What ``from_pretrained`` asks: the model's linear layers are ``vecmat.Linear`` before anything is loaded.

    A dense checkpoint is then quantised a tensor at a time as transformers reads it, through ``get_quantize_ops``; one
    of vecmat's own is loaded like any other, because a quantised layer's parts are plain buffers.
    """

    quantization_config: VecmatConfig

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        layers = linear_layers(model)
        files = [file for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")]
        formats = self._formats(model, layers, files)
        if not formats:
            raise ValueError(
                f"VecmatConfig: {type(model).__name__} has no linear layer to quantise ({len(layers)} are skipped)"
            )
        self._dense = tuple(name for name in layers if name not in formats)
        made: dict[int, Linear] = {}
        for name, fmt in formats.items():
            linear = layers[name]
            if id(linear) not in made:
                made[id(linear)] = self._empty(name, linear, fmt)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made[id(linear)])
            model.all_tied_weights_keys.pop(f"{name}.weight", None)
        _refuse_gaps(model)

    def _formats(self, model: Any, layers: Mapping[str, nn.Module], files: list[str]) -> dict[str, Format]:
        """The formats of the layers to quantise. files: the checkpoint's safetensors, if it has any."""
        asked = self.quantization_config.quantization
        ks: dict[str, Any] = {
            name: layer.in_features if isinstance(layer, nn.Linear) else layer.nx for name, layer in layers.items()
        }
        if self.pre_quantized:
            saved = _saved_names(model, asked, files)
            found = {
                name: asked.format(saved.get(name, name), k) for name, k in ks.items() if not files or name in saved
            }
            self._ordered = {name for name in layers if saved.get(name) in asked.ordered}
            chosen = {name: fmt for name, fmt in found.items() if fmt is not None}
            _refuse_miscast({saved.get(name, name): fmt for name, fmt in chosen.items()}, files)
            return chosen
        self._ordered = set()
        skip = self.quantization_config.skip
        tied = {key for pair in model.all_tied_weights_keys.items() for key in pair}
        kept = {key.removesuffix(".weight") for key in tied}
        if skip is None:
            last = list(model.named_parameters())[-1][0].rpartition(".")[0]
            kept |= {key for key in get_keys_to_not_convert(model)} | {last}
        else:
            kept |= skipped_layers(skip, dict(model.named_modules(remove_duplicate=False)))
        wide = list(model._keep_in_fp32_modules or ()) + list(model._keep_in_fp32_modules_strict or ())
        chosen = {}
        for name, k in ks.items():
            parents = {name[:at] for at, character in enumerate(name) if character == "."} | {name}
            fmt = None if parents & kept or not should_convert_module(name, wide) else asked.format(name, k)
            if fmt is not None:
                chosen[name] = fmt
        return chosen

    def _empty(self, name: str, linear: nn.Module, fmt: Format) -> Linear:
        made = Linear.from_linear(linear, str(fmt))
        if not self.pre_quantized:  # older transformers cast what they read to the dtype that they find here
            made._buffers["weight"] = linear.weight.detach()  # type: ignore[operator]
        if name in self._ordered:
            order = torch.empty(made.in_features, dtype=torch.int32, device=made.weight.device)
            made = Linear.from_weight(made.stored(), made.bias, order=order)
        return made

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a tensor of a dense checkpoint is the weight of a layer to quantise."""
        name, _, last = param_name.rpartition(".")
        return not self.pre_quantized and last == "weight" and isinstance(model.get_submodule(name), Linear)

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers passes each such tensor through."""
        return _Quantize()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> Any:
        """The dtype to cast a saved tensor to. Raises ``CheckpointError`` for a quantised part that has another."""
        wanted = _CODES.get(dtype)
        found = param.get_dtype() if hasattr(param, "get_dtype") else _CODES.get(param.dtype, str(param.dtype))
        if wanted is not None and found != wanted:
            raise CheckpointError(f"{', '.join(converter.target_patterns)} is {found}; expected {wanted}")
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        del model._move_missing_keys_from_meta_to_device  # the class has its own
        for name, layer in _quantised(model).items():
            if layer.bias is not None:
                layer.bias.requires_grad_(False)
            if not layer.weight.is_meta:  # else it is on a disk
                order: Any = layer.weight_order
                try:
                    Linear.from_weight(layer.stored(), order=order)
                except (TypeError, ValueError) as error:
                    raise CheckpointError(f"{model.config.name_or_path}: layer {name}: {error}") from error
        self._describe(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """Nothing but the model's own state_dict; the config follows what became of the layers since.

        Tensors keep the names that they have in the model, which are those of the config: a mixture's fused experts
        are not taken apart into what their first checkpoint had.
        """
        self._describe(model)
        model._weight_conversions = []
        return None, {}

    def _describe(self, model: Any) -> None:
        layers = _quantised(model)
        dense = Format(DTYPE_NAMES.get(model.dtype, "fp32"))
        described = Quantization.of(
            dict.fromkeys(self._dense, dense) | {name: layer.format for name, layer in layers.items()},
            [name for name, layer in layers.items() if layer.weight_order is not None],
        )
        if described is not None:
            self.quantization_config = model.config.quantization_config = VecmatConfig.of(described)

    def _dequantize(self, model: Any, dtype: torch.dtype | str) -> Any:
        for name, layer in _quantised(model).items():
            weight = layer.stored().dequantize()
            order: Any = layer.weight_order
            if order is not None:
                weight = weight.index_select(0 if layer.layout == "kn" else 1, order.argsort())
            sizes = (layer.in_features, layer.out_features)
            with torch.device("meta"):
                plain: Any = Conv1D(*sizes[::-1]) if layer.layout == "kn" else nn.Linear(*sizes)
            weight = weight.contiguous().to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            bias: Any = layer.bias
            plain.bias = bias if bias is None else nn.Parameter(bias, requires_grad=False)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain.train(layer.training))
        return model

    def is_serializable(self) -> bool:
        """Yes: ``save_pretrained`` writes safetensors."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: a quantised weight has no gradient."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes: see docs/compile.md."""
        return True


class _Quantize(ConversionOps):  # type: ignore[misc]
    """One weight of a dense checkpoint as the parts of a quantised layer."""

    def convert(self, input_dict: Mapping[str, Any], *, model: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The named tensors that take the place of the given ones. Raises what ``vecmat.quantize`` raises."""
        out: dict[str, Tensor] = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            path, _, last = name.rpartition(".")
            layer = model.get_submodule(path)
            if last != "weight" or not isinstance(layer, Linear):
                out[name] = tensor
                continue
            n, k = layer.out_features, layer.in_features
            expected = (k, n) if layer.layout == "kn" else (n, k)
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; the model has {expected}")
            stored = quantize(tensor, str(layer.format), layout=layer.layout)
            assert stored.scale is not None
            out |= {name: stored.data, f"{name}_scale": stored.scale}
            out |= {} if stored.zero is None else {f"{name}_zero": stored.zero}
        return out


def _refuse_gaps(model: Any) -> None:
    """Have a model that is being loaded raise where transformers would fill a part that it did not find with noise."""
    fill = model._move_missing_keys_from_meta_to_device
    parts = {f"{name}.{part}": name for name, layer in _quantised(model).items() for part in layer.state_dict()}

    def refuse(missing: Iterable[str], *arguments: Any, **options: Any) -> None:
        lacking = sorted(name for name in missing if name in parts and not name.endswith(".bias"))
        if lacking:
            raise CheckpointError(
                f"{model.config.name_or_path}: has no {lacking[0]} that fits ({len(lacking)} such tensors); a layer "
                f"that a dense checkpoint lacks can be left to torch: VecmatConfig(..., skip=[{parts[lacking[0]]!r}])"
            )
        fill(missing, *arguments, **options)

    model._move_missing_keys_from_meta_to_device = refuse


def _quantised(model: nn.Module) -> dict[str, Linear]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    return {name: layer for name, layer in found.items() if not layer.format.dense}


def _refuse_miscast(formats: Mapping[str, Format], files: list[str]) -> None:
    """Raise ``CheckpointError`` for a quantised part of another dtype, which older transformers cast silently.

    formats: of the layers, by the checkpoint's names.
    """
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                name, _, part = key.rpartition(".")
                if name in formats and part in _PART_CODES:
                    wanted = _PART_CODES[part] or _CODES[formats[name].dtype]
                    found = opened.get_slice(key).get_dtype()
                    if found != wanted:
                        raise CheckpointError(f"{file}: {key} is {found}; expected {wanted}")


def _saved_names(model: Any, quantization: Quantization, files: list[str]) -> dict[str, str]:
    """A model's names of layers, and a checkpoint's; they differ by a prefix where one has a head and the other none.

    files: the checkpoint's safetensors; without any, its config has the only names that are known.
    """
    known = {*quantization.modules_to_not_convert, *quantization.layers, *quantization.ordered}
    for file in files:
        with safe_open(file, "pt") as opened:
            known |= {key.rpartition(".")[0] for key in opened.keys()}  # noqa: SIM118 - it is no dict
    prefix = f"{model.base_model_prefix}."
    found = {name.removeprefix(prefix): name for name in known} | {prefix + name: name for name in known}
    return found | {name: name for name in known}
