"""Checkpoints made by hand, from each format's own definition: tensors as they lie in files, and what they mean.

Every function draws a layer (N, K) and returns its parts, by the last part of their names, and the dense weight in
float64 that the format's formula gives.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from cases import generator

Parts = dict[str, Tensor]
HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 64, 128, 4, 2, 96


def stream(values: Tensor, bits: int) -> Tensor:
    """Unsigned integers (R, C) as words int32 (R, ceil(C * bits / 32)): a stream of bits, the lowest first."""
    whole = values.numpy().astype(np.uint8)
    ones = np.unpackbits(whole[..., None], axis=-1, bitorder="little")[..., :bits].reshape(len(whole), -1)
    packed = np.packbits(np.pad(ones, ((0, 0), (0, -ones.shape[1] % 32))), axis=1, bitorder="little")
    return torch.from_numpy(packed.view(np.int32).copy())


def draw(low: int, high: int, *shape: int, seed: object) -> Tensor:
    return torch.randint(low, high, shape, generator=generator("codes", low, high, shape, seed))


def scales(*shape: int, seed: object, dtype: torch.dtype = torch.float16) -> Tensor:
    """Positive scales, no power of two and not on bf16's grid if they are fp16's."""
    return (0.02 + 0.1 * torch.rand(shape, generator=generator("scales", shape, seed))).to(dtype)


def gptq(n: int, k: int, bits: int = 4, group: int = 32, *, v2: bool = False, symmetric: bool = False,
         act_order: bool = False, seed: object = 0) -> tuple[Parts, Tensor]:  # fmt: skip
    """GPTQ; group -1 is one group. v2 stores zero points as they are, v1 one less."""
    size = k if group == -1 else group
    groups = -(-k // size)
    codes = draw(0, 1 << bits, k, n, seed=seed)
    middle = 1 << bits - 1
    zero = torch.full((groups, n), middle) if symmetric else draw(1, 1 << bits, groups, n, seed=(seed, "zero"))
    scale = scales(groups, n, seed=seed)
    g_idx = torch.arange(k) // size
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=generator("order", k, seed))]
    dense = (codes - zero[g_idx]).double() * scale.double()[g_idx]
    parts = {
        "qweight": stream(codes.t(), bits).t().contiguous(), "scales": scale, "g_idx": g_idx.to(torch.int32),
        "qzeros": stream(zero if v2 else zero - 1, bits),
    }  # fmt: skip
    return parts, dense.t()


def awq(n: int, k: int, group: int = 32, *, seed: object = 0) -> tuple[Parts, Tensor]:
    """AWQ's gemm: nibble i of a word is column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight."""
    groups = -(-k // group)
    codes, zero = draw(0, 16, k, n, seed=seed), draw(0, 16, groups, n, seed=(seed, "zero"))
    scale = scales(groups, n, seed=seed)

    def packed(values: Tensor) -> Tensor:
        eights = values.view(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return stream(eights.reshape(values.shape), 4)

    g_idx = torch.arange(k) // group
    dense = (codes - zero[g_idx]).double() * scale.double()[g_idx]
    return {"qweight": packed(codes), "qzeros": packed(zero), "scales": scale}, dense.t()


def pack_quantized(n: int, k: int, bits: int = 4, group: int | None = 32, *, symmetric: bool = True,
                   act_order: bool = False, seed: object = 0) -> tuple[Parts, Tensor]:  # fmt: skip
    """compressed-tensors' pack-quantized: signed integers plus 2**(bits - 1), packed along K."""
    size = group or k
    groups, middle = -(-k // size), 1 << bits - 1
    codes = draw(-middle, middle, n, k, seed=seed)
    scale = scales(n, groups, seed=seed, dtype=torch.bfloat16)
    parts = {
        "weight_packed": stream(codes + middle, bits), "weight_scale": scale, "weight_shape": torch.tensor([n, k]),
    }  # fmt: skip
    g_idx = torch.arange(k) // size
    if act_order:
        g_idx = g_idx[torch.randperm(k, generator=generator("order", k, seed))]
        parts["weight_g_idx"] = g_idx.to(torch.int32)
    zero = torch.zeros(n, groups)
    if not symmetric:
        zero = draw(-middle, middle, n, groups, seed=(seed, "zero"))
        parts["weight_zero_point"] = stream((zero + middle).t(), bits).t().contiguous()
    return parts, (codes - zero[:, g_idx]).double() * scale.double()[:, g_idx]


def int_quantized(n: int, k: int, group: int | None = None, *, symmetric: bool = True,
                  seed: object = 0) -> tuple[Parts, Tensor]:  # fmt: skip
    """compressed-tensors' int-quantized: int8 and scales by rows or groups."""
    size = group or k
    codes = draw(-128 if symmetric else -60, 128 if symmetric else 60, n, k, seed=seed)
    scale = scales(n, -(-k // size), seed=seed)
    parts = {"weight": codes.to(torch.int8), "weight_scale": scale}
    zero = torch.zeros(scale.shape)
    if not symmetric:
        zero = draw(-60, 60, *scale.shape, seed=(seed, "zero"))
        parts["weight_zero_point"] = zero.to(torch.int8)
    g_idx = torch.arange(k) // size
    return parts, (codes - zero[:, g_idx]).double() * scale.double()[:, g_idx]


def e4m3(n: int, k: int, seed: object) -> Tensor:
    """Every finite e4m3 number, in a random order."""
    codes = draw(0, 256, n, k, seed=(seed, "e4m3")).to(torch.uint8)
    codes[(codes & 127) == 127] = 0
    return codes.view(torch.float8_e4m3fn)


def fp8(n: int, k: int, shape: tuple[int, ...], *, seed: object = 0) -> tuple[Parts, Tensor]:
    """fp8 with a scale by rows ((N, 1)) or for all ((1,) or ()); the part is ``weight_scale``."""
    data, scale = e4m3(n, k, seed), scales(*shape, seed=seed, dtype=torch.float32)
    wide = scale.double().reshape(-1, 1).expand(n, 1)
    return {"weight": data, "weight_scale": scale}, data.double() * wide


def fp8_blocks(n: int, k: int, rows: int = 128, columns: int = 128, *, seed: object = 0) -> tuple[Parts, Tensor]:
    """DeepSeek's: a scale for each block; the part is ``weight_scale_inv``."""
    data = e4m3(n, k, seed)
    scale = scales(-(-n // rows), -(-k // columns), seed=seed, dtype=torch.float32)
    wide = scale.double()[torch.arange(n) // rows][:, torch.arange(k) // columns]
    return {"weight": data, "weight_scale_inv": scale}, data.double() * wide


def bitsandbytes(n: int, k: int, *, seed: object = 0) -> tuple[Parts, Tensor]:
    """bitsandbytes' int8: CB * SCB / 127."""
    data = draw(-127, 128, n, k, seed=seed).to(torch.int8)
    largest = scales(n, seed=seed, dtype=torch.float32) * 30
    parts = {"weight": data, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, data.double() * largest.double()[:, None] / 127


def llama(tied: bool = False, layers: int = 2, seed: int = 0) -> Any:
    """A random Llama, fp32, whose logits are far from uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=VOCAB, tie_word_embeddings=tied, initializer_range=0.2,
        dtype=torch.float32,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def quantised_layers(model: Any) -> list[str]:
    """The names of a model's linear layers but for its head, which most tools leave as it is."""
    found = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return [name for name in found if name != "lm_head"]


def write_folder(folder: Path, model: Any, make: Any, quantization: dict[str, Any] | None) -> Any:
    """Write a model whose layers ``make(n, k, seed=name)`` packs; the same model, dense, with what they mean.

    quantization: the quantization_config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    layers = quantised_layers(model)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name in layers:
        linear = model.get_submodule(name)
        parts, dense = make(linear.out_features, linear.in_features, seed=name)
        factor = 0.2 / float(dense.std())  # what a model bears
        parts, dense = _times(parts, dense, factor)
        del tensors[f"{name}.weight"]
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        linear.weight.copy_(dense)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | ({} if quantization is None else {"quantization_config": quantization})
    (folder / "config.json").write_text(json.dumps(config, default=str))
    return model


def _times(parts: Parts, dense: Tensor, factor: float) -> tuple[Parts, Tensor]:
    """The same layer with scales times a power of two near ``factor``."""
    power = 2.0 ** round(float(np.log2(factor)))
    names = {"scales", "weight_scale", "weight_scale_inv", "SCB"}
    return {name: t * power if name in names else t for name, t in parts.items()}, dense * power
