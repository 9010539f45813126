"""DeepSpeed-Inference's configuration of a transformer layer, with its enums, field names and defaults."""

from __future__ import annotations

import difflib
import enum
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from .errors import VecmatWarning

_DTYPES = {
    "fp16": torch.float16, "float16": torch.float16, "half": torch.float16,
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "bfloat": torch.bfloat16,
    "fp32": torch.float32, "float32": torch.float32, "float": torch.float32,
    "int8": torch.int8,
}  # fmt: skip


class ActivationFuncType(enum.IntEnum):
    """The activation of a layer's feed-forward part, by DeepSpeed's numbers."""

    UNKNOWN = 0
    GELU = 1
    ReLU = 2
    GATED_GELU = 3
    GATED_SILU = 4


class NormType(enum.IntEnum):
    """The normalisation of a layer, by DeepSpeed's numbers."""

    UNKNOWN = 0
    LayerNorm = 1
    GroupNorm = 2
    RMSNorm = 3


class TransformerConfig:
    """The sizes of a transformer layer. layer_id: the layer's place in the model, -1 until someone sets it."""

    def __init__(self, hidden_size: int, intermediate_size: int, heads: int, num_hidden_layers: int) -> None:
        self.layer_id = -1
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.heads = heads
        self.num_hidden_layers = num_hidden_layers


class DeepSpeedInferenceConfig(TransformerConfig):
    """A layer's configuration, with the arguments, order, defaults and attributes of DeepSpeed 0.19.

    What ``VectorMatMulOp`` reads: dtype (a torch dtype, or its name: "fp16", "torch.float16", "bf16", "int8", ...),
    transposed_mode (dense weights are (N, K), not (K, N)), use_triton, triton_autotune, layer_id, max_out_tokens and
    hidden_size. The rest is kept for the code that shares the config. intermediate_size is 4 * hidden_size unless it
    is given; layer_norm_eps becomes the attribute ``epsilon``.

    Raises ``ValueError`` naming the accepted names for a dtype that is none.
    """

    def __init__(self, hidden_size: int = -1, intermediate_size: int = -1, heads: int = -1,
                 num_hidden_layers: int = -1, layer_norm_eps: float = 1e-12, local_rank: int = -1, mp_size: int = 1,
                 dtype: torch.dtype | str = torch.float16, pre_layer_norm: bool = True,
                 norm_type: int = NormType.LayerNorm, stochastic_mode: bool = False, scale_attention: bool = True,
                 triangular_masking: bool = True, local_attention: bool = False, window_size: int = 256,
                 rotary_dim: int = -1, rotate_half: bool = False, rotate_every_two: bool = True,
                 return_tuple: bool = True, mlp_after_attn: bool = True,
                 mlp_act_func_type: int = ActivationFuncType.GELU, training_mp_size: int = 1,
                 bigscience_bloom: bool = False, max_out_tokens: int = 1024, min_out_tokens: int = 1,
                 enable_qkv_quantization: bool = False, use_mup: bool = False,
                 scale_attn_by_inverse_layer_idx: bool = False, return_single_tuple: bool = False,
                 set_empty_params: bool = False, transposed_mode: bool = False, use_triton: bool = False,
                 triton_autotune: bool = False, num_kv: int = -1, rope_theta: float = 10000,
                 invert_mask: bool = True) -> None:  # fmt: skip
        wide = intermediate_size if intermediate_size > 0 else 4 * hidden_size
        super().__init__(hidden_size, wide, heads, num_hidden_layers)
        self.dtype = _as_dtype(dtype)
        self.epsilon = layer_norm_eps
        self.norm_type, self.pre_layer_norm = norm_type, pre_layer_norm
        self.local_rank, self.mp_size, self.training_mp_size = local_rank, mp_size, training_mp_size
        self.stochastic_mode = stochastic_mode
        self.scale_attention, self.triangular_masking = scale_attention, triangular_masking
        self.local_attention, self.window_size = local_attention, window_size
        self.rotary_dim, self.rotate_half, self.rotate_every_two = rotary_dim, rotate_half, rotate_every_two
        self.return_tuple, self.return_single_tuple = return_tuple, return_single_tuple
        self.mlp_after_attn, self.mlp_act_func_type = mlp_after_attn, mlp_act_func_type
        self.bigscience_bloom = bigscience_bloom
        self.max_out_tokens, self.min_out_tokens = max_out_tokens, min_out_tokens
        self.enable_qkv_quantization = enable_qkv_quantization
        self.use_mup = use_mup
        self.scale_attn_by_inverse_layer_idx = scale_attn_by_inverse_layer_idx
        self.set_empty_params = set_empty_params
        self.transposed_mode = transposed_mode
        self.use_triton, self.triton_autotune = use_triton, triton_autotune
        self.num_kv, self.rope_theta, self.invert_mask = num_kv, rope_theta, invert_mask

    @classmethod
    def from_dict(cls, json_object: Mapping[str, Any]) -> DeepSpeedInferenceConfig:
        """The default config with each key set as an attribute.

        A name of the constructor works too: "layer_norm_eps" also sets ``epsilon``; a dtype may be its name; without
        an "intermediate_size" it is 4 * hidden_size. A key that is neither is set and gets a ``VecmatWarning`` with
        the nearest known one.
        """
        config = cls()
        known = {*vars(config), "layer_norm_eps"}
        for key, value in json_object.items():
            if key not in known:
                nearest = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.0)[0]
                message = f"DeepSpeedInferenceConfig: {key!r} is not known; the nearest known is {nearest!r}"
                warnings.warn(message, VecmatWarning, stacklevel=2)
            setattr(config, key, _as_dtype(value) if key == "dtype" else value)
        if "layer_norm_eps" in json_object:
            config.epsilon = json_object["layer_norm_eps"]
        if config.intermediate_size <= 0:
            config.intermediate_size = 4 * config.hidden_size
        return config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> DeepSpeedInferenceConfig:
        """The config of a UTF-8 JSON file that holds one object; see ``from_dict``."""
        with open(json_file, encoding="utf-8") as file:
            return cls.from_dict(json.load(file))


def _as_dtype(value: Any) -> torch.dtype:
    """The torch dtype of a dtype or its name. Raises ``ValueError`` naming the names."""
    if isinstance(value, torch.dtype):
        return value
    found = _DTYPES.get(value.lower().removeprefix("torch.")) if isinstance(value, str) else None
    if found is None:
        names = ", ".join(_DTYPES)
        raise ValueError(f"DeepSpeedInferenceConfig: dtype is {value!r}; expected a torch dtype or one of {names}")
    return found
