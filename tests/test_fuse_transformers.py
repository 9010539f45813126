"""fuse() in models of transformers: what of each family is joined, with the same outputs, saved as if nothing were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vecmat
from vecmat.fusing import Joined

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
         "num_attention_heads": 4, "initializer_range": 0.2}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2, "head_dim": 16}
QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def lm(name: str, **sizes: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{name}Config")(**sizes)
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


# The model, what is joined in each of its two layers.
MODELS: dict[str, tuple[Callable[[], Any], set[tuple[str, ...]]]] = {
    "llama": (lm("Llama", **GROUPED), {QKV, GATED}),
    "mistral": (lm("Mistral", **GROUPED), {QKV, GATED}),
    "qwen2": (lm("Qwen2", **SIZES, num_key_value_heads=2), {QKV, GATED}),
    "qwen3": (lm("Qwen3", **GROUPED), {QKV, GATED}),
    "gemma": (lm("Gemma", **GROUPED), {QKV, GATED}),
    "gemma2": (lm("Gemma2", **GROUPED), {QKV, GATED}),
    "phi3": (lm("Phi3", **SIZES, num_key_value_heads=2, pad_token_id=0), set()),  # joined in the checkpoint
    "mixtral": (lm("Mixtral", **GROUPED, num_local_experts=4), {QKV}),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)),
        set()),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), {("query", "key", "value")}),
}  # fmt: skip


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().eval().requires_grad_(False)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("weights", ["int8", "int4:g32:zp", "fp32"])
def test_what_a_family_gives_the_same_x_is_joined_and_computes_the_same(name: str, weights: str) -> None:
    apart = vecmat.convert(model_of(name), weights)
    fused = copy.deepcopy(apart)
    found = vecmat.fuse(fused)
    names = [
        {tuple(n.rpartition(".")[2] for n in group) for group in found.joined if f".{i}." in group[0]} for i in (0, 1)
    ]
    assert names == [MODELS[name][1]] * 2, str(found)
    torch.testing.assert_close(logits(fused), logits(apart), rtol=1e-4, atol=1e-4)
    assert list(fused.state_dict()) == list(apart.state_dict())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_fused_model_is_saved_as_one_that_is_not_and_loads_as_either(weights: str, tmp_path: Path) -> None:
    model = model_of("llama")
    model.save_pretrained(tmp_path / "dense")
    config = vecmat.VecmatConfig(weights)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    before = logits(quantised)
    assert len(vecmat.fuse(quantised).joined) == 4
    torch.testing.assert_close(logits(quantised), before, rtol=1e-4, atol=1e-4)
    quantised.save_pretrained(tmp_path / "saved")
    for again in (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved"),
        vecmat.load(tmp_path / "saved"),
        vecmat.load(tmp_path / "saved", fuse=True),
    ):
        torch.testing.assert_close(logits(again), before, rtol=1e-4, atol=1e-4)
        assert again.config.quantization_config is not None
    assert sum(isinstance(module, Joined) for module in again.modules()) == 4
    dense = quantised.dequantize()
    assert not any(isinstance(module, (vecmat.Linear, Joined)) for module in dense.modules())
    torch.testing.assert_close(logits(dense), before, rtol=1e-4, atol=1e-4)


def test_generating_with_a_static_cache_compiled_gives_the_same_tokens() -> None:
    apart = vecmat.convert(model_of("llama"), "int8")
    fused = copy.deepcopy(apart)
    vecmat.fuse(fused)
    prompt = torch.arange(6)[None]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = apart.generate(prompt, **options)
    assert torch.equal(fused.generate(prompt, **options), expected)
    torch._dynamo.reset()
    fused.forward = torch.compile(fused.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(fused.generate(prompt, cache_implementation="static", **options), expected)
