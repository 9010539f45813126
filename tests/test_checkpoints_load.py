"""load() and convert(): whole checkpoints in, models and vecmat's own checkpoints out, and the command line."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import packing
import vecmat
from vecmat import CheckpointError, checkpoints
from vecmat.checkpoints import Quantization
from vecmat.checkpoints.source import READERS
from vecmat.cli import main
from vecmat.problem import Format

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

BLOCKS = {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 64]}}
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "gptq": (packing.gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}, "int4:g32:zp"),
    "gptq act-order": (
        lambda n, k, seed: packing.gptq(n, k, act_order=True, symmetric=True, seed=seed),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True}, "int4:g32"),
    "awq": (packing.awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, "int4:g32:zp"),
    "pack-quantized": (
        packing.pack_quantized,
        {"quant_method": "compressed-tensors", "format": "pack-quantized",
         "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 32}}}}, "int4:g32"),
    "int-quantized": (
        packing.int_quantized,
        {"quant_method": "compressed-tensors", "format": "int-quantized",
         "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}, "int8"),
    "float-quantized": (
        lambda n, k, seed: packing.fp8(n, k, (n, 1), seed=seed),
        {"quant_method": "compressed-tensors", "format": "float-quantized",
         "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8"),
    "fp8 blocks": (
        lambda n, k, seed: packing.fp8_blocks(n, k, 32, 32, seed=seed),
        {"quant_method": "fp8", "weight_block_size": [32, 32]}, "fp8:g32"),
    "fbgemm_fp8": (
        lambda n, k, seed: packing.fp8(n, k, (n, 1), seed=seed),
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, "fp8"),
    "bitsandbytes": (packing.bitsandbytes, {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
}  # fmt: skip


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(torch.arange(24).view(2, 12)).logits


def formats(model: torch.nn.Module) -> dict[str, str]:
    return {name: str(m.format) for name, m in model.named_modules() if isinstance(m, vecmat.Linear)}


def plain(folder: Path, tied: bool = False, **options: Any) -> Any:
    """A random Llama saved by transformers into a folder."""
    model = packing.llama(tied=tied)
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("name", CASES)
def test_a_quantised_checkpoint_becomes_the_model_it_means(name: str, tmp_path: Path) -> None:
    make, quantization, expected = CASES[name]
    meant = packing.write_folder(tmp_path / "in", packing.llama(tied=name == "awq"), make, quantization)
    model = vecmat.load(tmp_path / "in")
    found = formats(model)
    assert {found[layer] for layer in packing.quantised_layers(meant)} == {expected}
    assert found["lm_head"] == "fp32"
    torch.testing.assert_close(logits(model), logits(meant), rtol=1e-4, atol=1e-4)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    told = model.config.quantization_config
    assert (told["quant_method"], told["modules_to_not_convert"]) == ("vecmat", ["lm_head"])
    assert len(told["ordered"]) == (len(packing.quantised_layers(meant)) if "act-order" in name else 0)
    # vecmat's own layout: written by convert, and by transformers itself, it reads back bit for bit
    made = checkpoints.convert(tmp_path / "in", tmp_path / "out")
    assert {str(fmt) for layer, fmt in made.formats.items() if layer != "lm_head"} == {expected}
    model.save_pretrained(tmp_path / "saved")
    for folder in ("out", "saved"):
        again = vecmat.load(tmp_path / folder)
        assert formats(again) == found
        assert torch.equal(logits(again), logits(model)), folder
    # and any of them can be quantised to something else
    other = vecmat.load(tmp_path / "out", weights="fp32")
    assert set(formats(other).values()) == {"fp32"}
    torch.testing.assert_close(logits(other), logits(meant), rtol=1e-4, atol=1e-4)
    assert formats(vecmat.load(tmp_path / "in", weights="int8"))["model.layers.0.mlp.up_proj"] == "int8"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("weights", [None, "int8", "int4:g32:zp", "fp8", "bf16"])
def test_a_plain_checkpoint_is_what_convert_makes_of_the_model(weights: str | None, tied: bool, tmp_path: Path) -> None:
    model = plain(tmp_path, tied=tied)
    loaded = vecmat.load(tmp_path, weights=weights)
    if weights == "bf16":
        assert loaded.dtype == torch.bfloat16
        model = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    vecmat.convert(model, weights or "fp32")
    assert formats(loaded) == formats(model)
    assert torch.equal(logits(loaded), logits(model))
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    out = loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 6)


def test_device_and_dtype_are_the_callers(tmp_path: Path, device: str) -> None:
    plain(tmp_path)
    model = vecmat.load(tmp_path, device=device, dtype=torch.float16, weights="int8")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {device}
    assert model.lm_head.weight_scale.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.float16
    assert model.config.dtype == torch.float16


def test_a_checkpoint_that_does_not_say_its_dtype_has_that_of_its_tensors(tmp_path: Path) -> None:
    packing.llama().half().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("dtype") == "float16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert vecmat.load(tmp_path).dtype == torch.float16
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "float17"}))
    with pytest.raises(CheckpointError, match="float17"):
        vecmat.load(tmp_path)


def test_no_code_that_a_config_names_is_fetched_or_run(tmp_path: Path) -> None:
    """transformers takes a name with a slash for a repository of kernels, downloads it and imports it."""
    plain(tmp_path / "in")
    path = tmp_path / "in" / "config.json"
    config = json.loads(path.read_text())
    (tmp_path / "in" / "evil.py").write_text("raise SystemExit('evil')")
    for key in ("attn_implementation", "_attn_implementation"):
        bad = {key: "evil/kernel", "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
        path.write_text(json.dumps({**config, **bad, "of_a_part": dict(bad)}))
        model = vecmat.load(tmp_path / "in")
        assert model.config._attn_implementation in ("sdpa", "eager")
    checkpoints.convert(tmp_path / "in", tmp_path / "out", "int8")
    assert "evil" not in (tmp_path / "out" / "config.json").read_text()


def test_a_generation_config_is_read_and_a_damaged_one_refused(tmp_path: Path) -> None:
    plain(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"max_length": 77}))
    assert vecmat.load(tmp_path).generation_config.max_length == 77
    path.write_text("{")
    with pytest.raises(CheckpointError, match="generation_config"):
        vecmat.load(tmp_path)


def test_a_config_may_have_large_numbers_that_count_nothing(tmp_path: Path) -> None:
    plain(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    told = {**config, "shared_expert_intermediate_size": 10**6, "layer_dim": 10**6, "bos_token_id": 10**6}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert vecmat.load(tmp_path) is not None


def test_arguments_that_are_wrong_are_named(tmp_path: Path) -> None:
    plain(tmp_path)
    for error, message, options in (
        (TypeError, "dtype is 'bf16'; expected torch.float32", {"dtype": "bf16"}),
        (TypeError, "dtype is torch.int8; expected", {"dtype": torch.int8}),
        (ValueError, "format 'int3' is not known", {"weights": "int3"}),
        (ValueError, "weights is 'bf16' but dtype is torch.float32", {"weights": "bf16", "dtype": torch.float32}),
    ):
        with pytest.raises(error, match=message):
            vecmat.load(tmp_path, **options)


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    model = plain(tmp_path / "in", max_shard_size="100KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    told: list[tuple[str, int, int]] = []
    made = checkpoints.convert(
        tmp_path / "in", tmp_path / "out", "int8", shard_bytes=40_000, progress=lambda *step: told.append(step)
    )
    assert [step[1:] for step in told] == [(i, len(told)) for i in range(1, len(told) + 1)]
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert files == made.files
    assert len(files) > 1
    assert all(name.endswith(f"-of-{len(files):05}.safetensors") for name in files)
    held = [tensor for file in files for tensor in load_file(tmp_path / "out" / file).values()]
    assert sum(tensor.nbytes for tensor in held) == made.nbytes
    assert all(os.stat(tmp_path / "out" / file).st_mode & 0o044 for file in files)
    vecmat.convert(model, "int8")
    assert torch.equal(logits(vecmat.load(tmp_path / "out")), logits(model))


def test_options_of_convert(tmp_path: Path) -> None:
    plain(tmp_path / "in")
    made = checkpoints.convert(
        tmp_path / "in", tmp_path / "out", "int4", group_size=32, symmetric=False, dtype=torch.bfloat16,
        skip=["lm_head", "*.self_attn.*"],
    )  # fmt: skip
    assert {str(fmt) for layer, fmt in made.formats.items() if ".mlp." in layer} == {"int4:g32:zp"}
    assert {str(fmt) for layer, fmt in made.formats.items() if ".mlp." not in layer} == {"bf16"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    told = config["quantization_config"]
    assert (told["weights"], told["group_size"], told["zero_points"], told["layers"]) == ("int4", 32, True, {})
    assert "lm_head" in told["modules_to_not_convert"]
    assert formats(vecmat.load(tmp_path / "out")) == {layer: str(fmt) for layer, fmt in made.formats.items()}
    checkpoints.convert(tmp_path / "out", tmp_path / "dense", "fp16")  # a plain checkpoint again, for everyone
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert "quantization_config" not in config
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert theirs.dtype == torch.float16


def test_int4_without_a_group_size_is_described_layer_by_layer(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=96
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "in")
    checkpoints.convert(tmp_path / "in", tmp_path / "out", "int4")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert told["layers"] == {"model.layers.0.mlp.down_proj": "int4:g32"}  # K = 96
    assert told["group_size"] == 64
    assert formats(vecmat.load(tmp_path / "out"))["model.layers.0.mlp.down_proj"] == "int4:g32"


def test_the_description_survives_json_and_means_what_it_says() -> None:
    found = {"a": Format("int8"), "b": Format("int8"), "c": Format("int4", 64, False), "d": Format("bf16")}
    made = Quantization.of(found)
    assert made is not None
    again = Quantization.from_dict(json.loads(json.dumps(made.as_dict())))
    assert again.as_dict() == made.as_dict()
    assert {name: again.format(name, 128) for name in found} == {**found, "d": None}
    assert Quantization.of({"d": Format("fp16")}) is None
    assert Quantization.from_dict({"quant_method": "vecmat", "weights": "int4"}).format("x", 192) == Format("int4", 64)


def test_an_out_that_is_there_is_left_alone_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    plain(tmp_path / "in")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="out is there already; expected a folder that is new or empty"):
        checkpoints.convert(tmp_path / "in", tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="is not quantised; name a format"):
        checkpoints.convert(tmp_path / "in", tmp_path / "new")
    with pytest.raises(TypeError, match=r"skip is 'lm_head'; expected a list"):
        checkpoints.convert(tmp_path / "in", tmp_path / "new", "int8", skip="lm_head")
    with pytest.raises(ValueError, match="skip names 'head'"):
        checkpoints.convert(tmp_path / "in", tmp_path / "new", "int8", skip=["head"])

    def stop(name: str, done: int, total: int) -> None:
        if done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoints.convert(tmp_path / "in", tmp_path / "new", "int8", shard_bytes=1000, progress=stop)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    (tmp_path / "empty").mkdir()
    checkpoints.convert(tmp_path / "in", tmp_path / "empty", "int8")
    assert vecmat.load(tmp_path / "empty") is not None


def test_the_tokenizer_goes_along_but_nothing_from_outside_of_the_folder(tmp_path: Path) -> None:
    plain(tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    (tmp_path / "in" / "evil.py").write_text("raise SystemExit")
    checkpoints.convert(tmp_path / "in", tmp_path / "out", "int8")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "evil.py").exists()
    assert (tmp_path / "out" / "generation_config.json").exists()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "in" / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match=r"'vocab.json' leads to .* outside of the folder"):
        checkpoints.convert(tmp_path / "in", tmp_path / "other", "int8")
    assert not (tmp_path / "other").exists()


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder's one file."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


Q = "model.layers.1.self_attn.q_proj"


def test_what_is_missing_or_too_much_is_told(tmp_path: Path) -> None:
    packing.write_folder(tmp_path, packing.llama(), *CASES["gptq"][:2])
    edited(tmp_path, lambda tensors: tensors.update({"model.layers.9.mtp": torch.ones(2), "x.k_scale": torch.ones(1)}))
    with pytest.warns(vecmat.VecmatWarning, match=r"has no place for model.layers.9.mtp; left out") as told:
        vecmat.load(tmp_path)
    assert told[0].filename == __file__
    edited(tmp_path, lambda tensors: tensors.pop("model.layers.9.mtp"))
    edited(tmp_path, lambda tensors: tensors.update({"model.layers.0.mlp.act.scales": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"act.scales scales an activation, as AWQ may; it is not read"):
        vecmat.load(tmp_path)
    edited(tmp_path, lambda tensors: tensors.pop("model.layers.0.mlp.act.scales"))
    edited(tmp_path, lambda tensors: tensors.update({f"{Q}.scales": tensors[f"{Q}.scales"][:1]}))
    with pytest.raises(CheckpointError, match=rf"layer {Q}: there are 1 scales along K=64"):
        vecmat.load(tmp_path)
    edited(tmp_path, lambda tensors: tensors.update({f"{Q}.qweight": torch.zeros(8, 65, dtype=torch.int32)}))
    with pytest.raises(CheckpointError, match=rf"{Q}.qweight has shape \(8, 65\); expected \(8, 64\) for N=64, K=64"):
        vecmat.load(tmp_path)
    edited(tmp_path, lambda tensors: tensors.pop(f"{Q}.qweight"))
    with pytest.raises(CheckpointError, match=rf"has no {Q}.weight, which the model needs"):
        vecmat.load(tmp_path)


def test_a_quantised_layer_without_a_reader_is_refused(tmp_path: Path) -> None:
    """int8 numbers taken for weights would be silently wrong."""
    packing.write_folder(tmp_path, packing.llama(), CASES["int-quantized"][0], None)
    with pytest.raises(CheckpointError, match=r"weight is of int8 without the scales of a format that is read"):
        vecmat.load(tmp_path)


def test_a_bias_that_only_the_checkpoint_has_is_used_unless_it_is_zero(tmp_path: Path) -> None:
    """AutoGPTQ wrote one for every layer."""
    packing.write_folder(tmp_path, packing.llama(), *CASES["gptq"][:2])
    edited(tmp_path, lambda tensors: tensors.update({f"{Q}.bias": torch.zeros(64)}))
    assert vecmat.load(tmp_path).get_submodule(Q).bias is None
    edited(tmp_path, lambda tensors: tensors.update({f"{Q}.bias": torch.ones(64)}))
    assert torch.equal(vecmat.load(tmp_path).get_submodule(Q).bias, torch.ones(64))


def test_autogptqs_own_config_file_is_read(tmp_path: Path) -> None:
    meant = packing.write_folder(tmp_path, packing.llama(), packing.gptq, None)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "sym": False}))
    torch.testing.assert_close(logits(vecmat.load(tmp_path)), logits(meant), rtol=1e-4, atol=1e-4)


def test_a_quantised_head_is_no_longer_tied(tmp_path: Path) -> None:
    meant = packing.write_folder(tmp_path, packing.llama(tied=True), *CASES["gptq"][:2])
    parts, dense = packing.gptq(packing.VOCAB, packing.HIDDEN, seed="head")
    edited(tmp_path, lambda tensors: tensors.update({f"lm_head.{part}": t for part, t in parts.items()}))
    model = vecmat.load(tmp_path)
    assert formats(model)["lm_head"] == "int4:g32:zp"
    meant.lm_head.weight = torch.nn.Parameter(dense.float(), requires_grad=False)
    torch.testing.assert_close(logits(model), logits(meant), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(vecmat.load(tmp_path / "saved")), logits(model))


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both", "both, unequal"])
def test_a_tied_weight_may_be_stored_under_either_name_or_both(kept: str, tmp_path: Path) -> None:
    model = plain(tmp_path, tied=True)
    weight = model.lm_head.weight.detach().clone()
    names = ["model.embed_tokens.weight", "lm_head.weight"] if "both" in kept else [kept]
    stored = {name: weight * (2 if place and kept.endswith("unequal") else 1) for place, name in enumerate(names)}

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.embed_tokens.weight"]
        tensors |= stored

    edited(tmp_path, edit)
    loaded = vecmat.load(tmp_path, weights="int8")
    shared = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert shared == (not kept.endswith("unequal"))
    assert torch.equal(loaded.model.embed_tokens.weight, weight)
    assert formats(loaded)["lm_head"] == ("fp32" if shared else "int8")
    checkpoints.convert(tmp_path, tmp_path / "out", "int8")
    assert torch.equal(logits(vecmat.load(tmp_path / "out")), logits(loaded))


def test_a_gpt2_whose_weights_lie_the_other_way_is_read(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "whole")
    GPT2Model.save_pretrained(model.transformer, tmp_path / "body")  # names without "transformer."
    expected = logits(vecmat.convert(copy.deepcopy(model), "fp32"))  # the same kernels, the weights as they are
    for folder in ("whole", "body"):
        assert torch.equal(logits(vecmat.load(tmp_path / folder)), expected), folder
    vecmat.convert(model, "int4")
    checkpoints.convert(tmp_path / "whole", tmp_path / "out", "int4")
    for found in (vecmat.load(tmp_path / "whole", weights="int4"), vecmat.load(tmp_path / "out")):
        assert found.transformer.h[0].attn.c_attn.layout == "kn"
        assert torch.equal(logits(found), logits(model))
    made = vecmat.load(tmp_path / "out", weights="fp32")
    torch.testing.assert_close(logits(made), logits(model), rtol=1e-4, atol=1e-4)


def test_a_mixture_of_experts_is_loaded_by_transformers_and_keeps_its_fused_experts_dense(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=96, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval().requires_grad_(False)
    model.save_pretrained(tmp_path / "in")
    with safe_open(tmp_path / "in" / "model.safetensors", "pt") as file:
        assert any("experts.3.w1" in name for name in file.keys())  # noqa: SIM118 - no dict
    loaded = vecmat.load(tmp_path / "in", weights="int8")
    checkpoints.convert(tmp_path / "in", tmp_path / "out", "int8")
    vecmat.convert(model, "int8")
    assert formats(loaded) == formats(model)
    for found in (loaded, vecmat.load(tmp_path / "out")):
        assert torch.equal(logits(found), logits(model))
    edited(tmp_path / "in", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"has no .*model.norm.weight"):
        vecmat.load(tmp_path / "in")


MEMORY = """
import json, pathlib, re, sys, torch, transformers, accelerate, safetensors.torch
import vecmat
from vecmat import checkpoints

def held():  # this process's own memory, files that are mapped left out
    return int(re.search(r"RssAnon:\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024

source, out, what = sys.argv[1:]
checkpoints.convert(pathlib.Path(source) / "tiny", out + "-tiny", "int8")  # imports and pools
start, most = held(), 0

def watch(name, done, total):
    global most
    most = max(most, held() - start)

if what == "convert":
    checkpoints.convert(source, out, "int8", shard_bytes=4 << 20, progress=watch)
else:
    model = checkpoints.load(source, weights="int8", progress=watch)
print(most)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize(("what", "limit"), [("load", 50), ("convert", 20)])
def test_the_whole_model_is_never_in_memory(what: str, limit: int, tmp_path: Path, python: Callable[..., str]) -> None:
    """A plain model of 129 MiB, a layer 4 MiB: int8 is 33 MiB whole, and a shard of 4 MiB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=8, vocab_size=64,
        tie_word_embeddings=True, dtype=torch.float32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "in", max_shard_size="50MB")
    plain(tmp_path / "in" / "tiny")
    size = sum(file.stat().st_size for file in (tmp_path / "in").glob("*.safetensors")) / 2**20
    assert size > 125
    at_once = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back, not kept for later
    assert float(python(MEMORY, str(tmp_path / "in"), str(tmp_path / "out"), what, **at_once)) < limit


def test_the_command_line_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = plain(tmp_path / "in")
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "in"), str(tmp_path / "out"), "--weights", "int8"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}: 0.1 MB in 1 file; linear layers: 15 int8\n"
    vecmat.convert(model, "int8")
    assert torch.equal(logits(vecmat.load(tmp_path / "out")), logits(model))
    argv = ["convert", str(tmp_path / "in"), str(tmp_path / "four"), "--weights", "int4", "--group-size", "32"]
    more = ["--zero-points", "--dtype", "bf16", "--skip", "lm_head", "--shard-gb", "0.00005", "--json"]
    assert main([*argv, *more]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layers"] == {"int4:g32:zp": 14, "bf16": 1}
    assert len(told["files"]) > 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{in}", "{out}"], "is not quantised; name a format"),
        (["{in}", "{in}", "--weights", "int8"], "is there already"),
        (["{in}/nowhere", "{out}", "--weights", "int8"], "there is no such folder"),
        (["{in}", "{out}", "--weights", "int3"], "'int3' is not known"),
        (["{in}", "{out}", "--group-size", "32"], "name a format with --weights"),
        (["{in}", "{out}", "--weights", "int8", "--zero-points"], "'int8' has no zero points"),
        (["{in}", "{out}", "--weights", "int8", "--skip", "lm_haed"], "the nearest is 'lm_head'"),
        (["{in}", "{out}", "--weights", "int8", "--shard-gb", "0"], "shard_bytes is 0"),
        (["{in}", "{in}/config.json/out", "--weights", "int8"], "cannot be written"),
    ],
)
def test_the_command_line_says_no(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain(tmp_path / "in")
    capsys.readouterr()
    argv = [word.replace("{in}", str(tmp_path / "in")).replace("{out}", str(tmp_path / "out")) for word in argv]
    assert main(["convert", *argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["safetensors", "accelerate"])
def test_a_package_that_is_missing_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))
    with pytest.raises(ValueError, match=rf"needs {package}, which is not installed; pip install 'vecmat\[hf\]'"):
        vecmat.load(tmp_path)


def test_the_documentations_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    snippet, shell = text.split("```python\n")[1].split("```")[0], text.split("```bash\n")[1].split("```")[0]
    exec(compile(snippet, "checkpoints.md", "exec"), {})
    said = capsys.readouterr().out.splitlines()
    assert said == [line.split("# ")[1] for line in snippet.splitlines() if line.startswith("print")]
    for line in shell.splitlines():
        assert main(line.partition("#")[0].split()[1:]) == 0
    for method in READERS:
        assert method == "vecmat" or method.lower() in text.lower(), method
