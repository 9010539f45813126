"""VecmatConfig in transformers' own from_pretrained and save_pretrained, with small random models of several kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import packing
import vecmat
from vecmat import CheckpointError, checkpoints

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

Python = Callable[..., str]
VecmatConfig = vecmat.VecmatConfig
SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
         "num_attention_heads": 4, "initializer_range": 0.2}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
# The model, the layers that stay dense by default.
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama": (lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)), ["lm_head"]),
    "tied llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, tie_word_embeddings=True)),
        ["lm_head"]),
    "qwen2": (lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)), ["lm_head"]),
    "gemma": (lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GROUPED, head_dim=16)), ["lm_head"]),
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2)),
        ["lm_head"]),
    "bert": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)), ["cls.predictions.decoder"]),
    "mixtral": (
        lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**GROUPED, num_local_experts=4)),
        ["lm_head"]),
    "qwen2-moe": (
        lambda: transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(
            **GROUPED, num_experts=4, moe_intermediate_size=64, shared_expert_intermediate_size=64)),
        ["lm_head"]),
}  # fmt: skip


def all_vecmat(model: Any) -> Any:
    """The model, its torch layers made vecmat's, their weights as they are: what ``vecmat.load`` makes of a file."""
    return vecmat.convert(model, "fp32")


@pytest.fixture
def dense(tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Makes one of MODELS, and the folder it is saved in."""

    def make(name: str = "llama", **options: Any) -> tuple[Any, Path]:
        torch.manual_seed(0)
        model = MODELS[name][0]().eval().requires_grad_(False)
        model.save_pretrained(tmp_path / "dense", **options)
        return model, tmp_path / "dense"

    return make


def load(folder: Path, *arguments: Any, like: Any = transformers.AutoModelForCausalLM, **options: Any) -> Any:
    """from_pretrained with VecmatConfig(*arguments), or without one."""
    config = {"quantization_config": VecmatConfig(*arguments)} if arguments else {}
    return like.from_pretrained(folder, **config, **options)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(torch.arange(24).view(2, 12)).logits


def linears(model: torch.nn.Module) -> dict[str, vecmat.Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, vecmat.Linear)}


def described(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "config.json").read_text())["quantization_config"])


@pytest.mark.parametrize(
    ("name", "weights"),
    [*((name, weights) for name in MODELS for weights in ("int8", "int4:g32:zp")), ("llama", "int4"), ("gpt2", "fp8")],
)
def test_a_model_is_quantised_as_it_is_read_saved_and_read_again(
    name: str, weights: str, dense: Callable[..., Any], tmp_path: Path
) -> None:
    model, folder = dense(name)
    kind = type(model)
    found = load(folder, weights, like=kind)
    assert not found.training
    for layer_name, layer in linears(found).items():
        plain = model.get_submodule(layer_name)
        expected = vecmat.quantize(plain.weight, weights, layout=layer.layout)
        assert layer.format == expected.format
        assert torch.equal(layer.weight, expected.data)
        plain.weight.copy_(expected.dequantize())
    assert linears(found)
    left = [n for n, m in found.named_modules() if isinstance(m, (torch.nn.Linear, transformers.pytorch_utils.Conv1D))]
    assert left == MODELS[name][1]
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)

    found.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", like=kind)
    assert {n: layer.format for n, layer in linears(again).items()} == {
        n: layer.format for n, layer in linears(found).items()
    }
    assert torch.equal(logits(again), logits(found))
    if name != "bert":  # vecmat.load makes causal language models
        assert torch.equal(logits(vecmat.load(tmp_path / "saved")), logits(all_vecmat(found)))
    dequantised = again.dequantize()
    assert not linears(dequantised)
    torch.testing.assert_close(logits(dequantised), logits(model), rtol=1e-4, atol=1e-4)


def test_the_folder_is_what_vecmat_convert_writes(dense: Callable[..., Any], tmp_path: Path) -> None:
    _, folder = dense()
    load(folder, "int4").save_pretrained(tmp_path / "saved")
    checkpoints.convert(folder, tmp_path / "converted", "int4", skip=["lm_head"])
    saved, converted = (load_file(tmp_path / name / "model.safetensors") for name in ("saved", "converted"))
    assert saved.keys() == converted.keys()
    assert all(torch.equal(saved[name], converted[name]) for name in saved)
    assert described(tmp_path / "saved") == described(tmp_path / "converted")
    assert described(tmp_path / "saved")["modules_to_not_convert"] == ["lm_head"]
    assert torch.equal(logits(load(tmp_path / "converted")), logits(load(tmp_path / "saved")))


def test_columns_in_an_order_of_their_own_are_loaded_too(tmp_path: Path) -> None:
    packing.write_folder(
        tmp_path / "gptq", packing.llama(),
        lambda n, k, seed: packing.gptq(n, k, act_order=True, symmetric=True, seed=seed),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": True},
    )  # fmt: skip
    model = vecmat.load(tmp_path / "gptq")
    model.save_pretrained(tmp_path / "saved")
    found = load(tmp_path / "saved")
    assert found.model.layers[0].mlp.up_proj.weight_order is not None
    torch.testing.assert_close(logits(found), logits(model), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(all_vecmat(found)), logits(model))
    torch.testing.assert_close(logits(found.dequantize()), logits(model), rtol=1e-4, atol=1e-4)


def test_a_saved_model_is_loaded_without_its_head_and_with_another(dense: Callable[..., Any], tmp_path: Path) -> None:
    _, folder = dense()
    found = load(folder, "int4")
    found.save_pretrained(tmp_path / "saved")
    assert described(tmp_path / "saved")["layers"]
    ids = torch.arange(12).view(1, 12)
    with torch.inference_mode():
        expected = found.model(ids).last_hidden_state
        headless = load(tmp_path / "saved", like=transformers.AutoModel)
        assert torch.equal(headless(ids).last_hidden_state, expected)
        headless.save_pretrained(tmp_path / "headless")
        for name in ("saved", "headless"):
            whole = load(tmp_path / name, like=transformers.AutoModelForSequenceClassification)
            assert torch.equal(whole.model(ids).last_hidden_state, expected)
            assert type(whole.score) is torch.nn.Linear
            assert whole.score.weight.isfinite().all()


@pytest.mark.parametrize("tied", ["tied llama", "bert"])
@pytest.mark.parametrize("skip", [None, []])
def test_a_tied_head_stays_one_dense_tensor_with_the_embedding(
    tied: str, skip: list[str] | None, dense: Callable[..., Any], tmp_path: Path
) -> None:
    model, folder = dense(tied)
    found = type(model).from_pretrained(folder, quantization_config=VecmatConfig("int8", skip=skip))
    found.save_pretrained(tmp_path / "saved")
    for one in (found, type(model).from_pretrained(tmp_path / "saved")):
        assert one.get_output_embeddings().weight is one.get_input_embeddings().weight
        assert type(one.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize(("skip", "left"), [
    (None, ["lm_head"]),
    ([], []),
    (["lm_head", "o_proj"], ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj", "lm_head"]),
    (["*.1.mlp.*_proj"], [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]),
    (["model.layers.1.mlp"], [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]),
])  # fmt: skip
@pytest.mark.parametrize("option", ["skip", "modules_to_not_convert"])
def test_what_is_skipped_is_left_to_torch(
    option: str, skip: list[str] | None, left: list[str], dense: Callable[..., Any], tmp_path: Path
) -> None:
    model, folder = dense()
    config = VecmatConfig("int8", **{option: skip})
    found = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    plain = {name: module for name, module in found.named_modules() if isinstance(module, torch.nn.Linear)}
    assert list(plain) == left
    assert all(torch.equal(layer.weight, model.get_submodule(name).weight) for name, layer in plain.items())
    found.save_pretrained(tmp_path / "saved")
    assert described(tmp_path / "saved")["modules_to_not_convert"] == left
    assert torch.equal(logits(load(tmp_path / "saved")), logits(found))
    assert config.skip == skip, "the caller's config serves for other models too"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_that_of_everything_but_what_is_quantised(
    dtype: torch.dtype, dense: Callable[..., Any], tmp_path: Path
) -> None:
    _, folder = dense("qwen2")
    found = load(folder, "int8", dtype=dtype)
    found.save_pretrained(tmp_path / "saved")
    for one in (found, load(tmp_path / "saved"), load(tmp_path / "saved", dtype=dtype)):
        layer = linears(one)["model.layers.0.self_attn.q_proj"]
        assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (torch.int8, torch.float32, dtype)
        assert one.dtype == one.lm_head.weight.dtype == dtype
        assert not layer.bias.requires_grad
        assert torch.equal(logits(one), logits(found))
    assert load(tmp_path / "saved", dtype=torch.float32).lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("place", [
    "cpu", "auto", {"": "cpu"},
    {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "disk",
     "model.rotary_emb": "cpu", "lm_head": "cpu"},
])  # fmt: skip
def test_a_device_map_places_quantised_layers(place: Any, dense: Callable[..., Any], tmp_path: Path) -> None:
    _, folder = dense()
    expected = load(folder, "int4")
    expected.save_pretrained(tmp_path / "saved")
    for found in (load(folder, "int4", device_map=place), load(tmp_path / "saved", device_map=place)):
        assert linears(found).keys() == linears(expected).keys()
        assert torch.equal(logits(found), logits(expected))


def test_checkpoints_in_shards_are_read_and_written(dense: Callable[..., Any], tmp_path: Path) -> None:
    _, folder = dense(max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = load(folder, "int4")
    found.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 1
    assert torch.equal(logits(load(tmp_path / "saved")), logits(found))
    assert torch.equal(logits(vecmat.load(tmp_path / "saved")), logits(all_vecmat(found)))


def test_a_model_that_was_changed_is_saved_as_it_is(dense: Callable[..., Any], tmp_path: Path) -> None:
    _, folder = dense()
    found = load(folder, "int4")
    vecmat.convert(found, "int8")  # the head, which was left
    found.save_pretrained(tmp_path / "saved")
    assert described(tmp_path / "saved")["layers"]["lm_head"] == "int8"
    assert torch.equal(logits(load(tmp_path / "saved")), logits(found))


def test_a_quantised_model_generates_and_grows_its_vocabulary(dense: Callable[..., Any]) -> None:
    _, folder = dense()
    found = load(folder, "int8")
    assert found.generate(torch.arange(4).view(1, 4), max_new_tokens=5, min_new_tokens=5, do_sample=False).shape == (
        1,
        9,
    )
    found.resize_token_embeddings(100)
    assert logits(found).shape == (2, 12, 100)


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAYER = "model.layers.1.mlp.up_proj"


def test_a_layer_that_a_checkpoint_lacks_is_an_error_that_names_it(dense: Callable[..., Any], tmp_path: Path) -> None:
    _, folder = dense()
    load(folder, "int4").save_pretrained(tmp_path / "saved")
    for part in ("weight", "weight_scale"):
        load(folder, "int4").save_pretrained(tmp_path / "saved")
        change(tmp_path / "saved", lambda tensors, part=part: tensors.pop(f"{LAYER}.{part}"))
        with pytest.raises(CheckpointError, match=re.escape(f"has no {LAYER}.{part} that fits")):
            load(tmp_path / "saved")
    change(folder, lambda tensors: tensors.pop(f"{LAYER}.weight"))
    with pytest.raises(CheckpointError, match=re.escape(f"skip=['{LAYER}']")):
        load(folder, "int4")


def test_weights_of_another_shape_dtype_or_value_are_errors(dense: Callable[..., Any], tmp_path: Path) -> None:
    _, folder = dense()
    saved = tmp_path / "saved"
    load(folder, "int8").save_pretrained(saved)
    change(saved, lambda tensors: tensors.update({f"{LAYER}.weight": tensors[f"{LAYER}.weight"].float()}))
    with pytest.raises(CheckpointError, match=rf"{LAYER}.weight is F32; expected I8"):
        load(saved)
    load(folder, "int8").save_pretrained(saved)
    change(saved, lambda tensors: tensors[f"{LAYER}.weight_scale"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=LAYER):
        load(saved)
    good = load_file(folder / "model.safetensors")[f"{LAYER}.weight"]
    for bad in (torch.full_like(good, torch.inf), torch.randn(good.shape[0], good.shape[1] + 1)):
        change(folder, lambda tensors, bad=bad: tensors.update({f"{LAYER}.weight": bad}))
        with pytest.raises((RuntimeError, CheckpointError), match=r"conversion|has no"):
            load(folder, "int8")


@pytest.mark.parametrize(("arguments", "told"), [
    ({"weights": "int3"}, "int3"),
    ({"weights": "bf16"}, "weights is 'bf16'; expected int8, int4 or fp8"),
    ({"weights": "int8", "symmetric": False}, "zero points"),
    ({"weights": "int4", "group_size": 48}, "group_size is 48"),
    ({"weights": "int4:g64", "group_size": 32}, "group_size is 32"),
    ({"skip": [], "modules_to_not_convert": []}, "two names of one option"),
])  # fmt: skip
def test_a_config_that_means_nothing_is_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        VecmatConfig(**arguments)


def test_a_skip_that_is_no_list_or_names_nothing_is_refused(dense: Callable[..., Any]) -> None:
    _, folder = dense()
    with pytest.raises(TypeError, match="skip is 'lm_head'"):
        VecmatConfig("int8", skip="lm_head")
    with pytest.raises(ValueError, match=r"'lm_haed'.*nearest is 'lm_head'"):
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=VecmatConfig("int8", skip=["lm_haed"])
        )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no linear layer to quantise \(15 are skipped\)"):
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=VecmatConfig("int8", skip=["model", "lm_head"])
        )


def test_a_config_is_its_dict(dense: Callable[..., Any]) -> None:
    for config in (VecmatConfig("int4:g64:zp", skip=["a"]), VecmatConfig("int8"), VecmatConfig("fp8", group_size=128)):
        told = config.to_dict()
        again = VecmatConfig.from_dict(json.loads(config.to_json_string()))
        assert (again.to_dict(), again.skip, dict(again)) == (told, config.skip, told)
    _, folder = dense()
    as_dict = transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=VecmatConfig("int4:g32:zp").to_dict()
    )
    assert torch.equal(logits(as_dict), logits(load(folder, "int4:g32:zp")))


def test_the_full_model_is_never_in_memory(python: Python, dense: Callable[..., Any], tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
             "num_attention_heads": 4}  # fmt: skip
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(tmp_path / "large")
    code = """
import re, sys, threading, torch, transformers, vecmat
torch.set_num_threads(1)

def private():  # bytes without pages of the mapped file; bf16, because a tensor that needs no cast stays such a page
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def load(folder):
    config = vecmat.VecmatConfig("int4")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)

load(sys.argv[1])  # what is imported and allocated once
before, most, done = private(), 0, threading.Event()

def watch():
    global most
    while not done.wait(0.0005):
        most = max(most, private())

watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[2])
done.set()
watcher.join()
print(most - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from /proc")
    grown = int(python(code, str(dense()[1]), str(tmp_path / "large")).split()[-1])
    nbytes = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert nbytes > 80e6
    assert grown < 0.5 * nbytes, f"{grown} bytes more, where bf16 weights alone take {nbytes // 2}"


def test_importing_vecmat_imports_no_transformers_and_asking_for_the_config_registers_it(python: Python) -> None:
    code = """
import sys, vecmat
assert "transformers" not in sys.modules and "vecmat.transformers" not in sys.modules
vecmat.VecmatConfig("int4")
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert "vecmat" in AUTO_QUANTIZATION_CONFIG_MAPPING and "vecmat" in AUTO_QUANTIZER_MAPPING
import vecmat.transformers
assert vecmat.transformers.VecmatConfig is vecmat.VecmatConfig
"""
    python(code)


def test_the_page_about_transformers_runs(
    dense: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense()[1].rename(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    page = Path(__file__).parents[1] / "docs" / "transformers.md"
    snippets = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(snippets) >= 3
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(snippet, names)
    assert torch.equal(logits(names["again"]), logits(names["model"]))
