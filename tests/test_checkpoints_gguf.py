"""GGUF: every type of block against the gguf package's own dequantisation, and whole files."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import packing
import vecmat
from cases import generator
from packing import HEADS, HIDDEN, INNER, KV_HEADS, VOCAB
from vecmat import CheckpointError, models
from vecmat.checkpoints.gguf import SCALE_AT, _integers, read_blocks
from vecmat.checkpoints.source import open_source

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

# The format that holds a type exactly; every other type is rounded once more.
EXACT = {
    "Q4_0": "int4:g32", "Q5_0": "int8:g32", "Q8_0": "int8:g32", "IQ4_NL": "int8:g32", "Q3_K": "int8:g128",
    "TQ1_0": "int4:g128", "TQ2_0": "int4:g128",
}  # fmt: skip
# What rounding once more costs, the error's norm by the weight's, on random blocks: at most.
ROUNDED = ("Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "MXFP4")


def kind_of(name: str) -> Any:
    return gguf.GGMLQuantizationType[name]


def blocks(name: str, n: int, k: int, seed: object = 0) -> Any:
    """Random blocks (N, bytes) of a type: any bits, but scales that are finite and of a sane size."""
    block, size = gguf.GGML_QUANT_SIZES[kind_of(name)]
    count = n * k // block
    data = packing.draw(0, 256, count, size, seed=(name, seed)).to(torch.uint8).numpy()
    halves = {
        "Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
        "IQ4_XS": (0,), "MXFP4": (),
    }.get(name) or ((SCALE_AT[name],) if name in SCALE_AT else ())  # fmt: skip
    for at in halves:
        scale = packing.scales(count, seed=(name, at, seed)) * torch.where(torch.arange(count) % 3 == 0, -1, 1)
        data[:, at : at + 2] = scale.half().numpy().view(np.uint8).reshape(count, 2)
    if name == "MXFP4":
        data[:, 0] = 120 + data[:, 0] % 8
    return data.reshape(n, -1)


def means(data: Any, name: str) -> Tensor:
    """What the gguf package makes of blocks, fp32."""
    return torch.from_numpy(gguf.dequantize(data, kind_of(name)))


@pytest.mark.parametrize("name", EXACT)
def test_blocks_of_one_scale_and_small_integers_are_exact(name: str) -> None:
    data = blocks(name, 24, 512)
    weight = read_blocks(data, kind_of(name))
    assert str(weight.format) == EXACT[name]
    assert torch.equal(weight.dequantize(), means(data, name))


def test_q3_k_is_exact_where_a_scale_times_a_weight_is_128() -> None:
    """-32 * -4, which no int8 is: the block's sign is turned."""
    data = blocks("Q3_K", 4, 512)
    data[:, :108] = 0  # scales of 0 - 32, weights of 0 - 4
    weight = read_blocks(data, kind_of("Q3_K"))
    assert str(weight.format) == "int8:g128"
    assert int(weight.data.min()) == -128
    assert torch.equal(weight.dequantize(), means(data, "Q3_K"))


@pytest.mark.parametrize("name", ROUNDED)
def test_other_blocks_are_rounded_once_more(name: str) -> None:
    data = blocks(name, 24, 512)
    weight, dense = read_blocks(data, kind_of(name)), means(data, name)
    assert str(weight.format) == "int8:g32"
    again = vecmat.quantize(dense, "int8:g32")
    assert torch.equal(weight.dequantize(), again.dequantize())
    assert 0 < (weight.dequantize() - dense).norm() < 0.007 * dense.norm()


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q5_0"])
def test_what_the_package_itself_quantised_is_exact(name: str) -> None:
    w = torch.randn(32, 256, generator=generator("gguf")).numpy()
    data = gguf.quantize(w, kind_of(name))
    assert torch.equal(read_blocks(data, kind_of(name)).dequantize(), means(data, name))
    zeros = gguf.quantize(np.zeros((4, 64), np.float32), kind_of(name))
    assert (read_blocks(zeros, kind_of(name)).dequantize() == 0).all()


def test_numbers_that_are_no_multiples_of_their_scale_are_no_integers() -> None:
    values = torch.randn(2, 64, generator=generator("values"))
    assert _integers(values, torch.full((2, 2), 0.01), 32, True) is None
    assert _integers(values.round() * 200, torch.ones(2, 2), 32, True) is None  # or too large


def test_many_rows_are_read_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vecmat.checkpoints.gguf._CHUNK", 512 * 5)
    for name in ("Q4_0", "Q6_K"):
        data = blocks(name, 24, 512)
        weight = read_blocks(data, kind_of(name))
        monkeypatch.undo()
        assert torch.equal(weight.dequantize(), read_blocks(data, kind_of(name)).dequantize())


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", "IQ4_NL"])
def test_rows_that_happen_to_be_small_leave_the_others_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = blocks(name, 24, 512)
    scale = data.reshape(24, -1, gguf.GGML_QUANT_SIZES[kind_of(name)][1])[..., :2]
    scale[10:20] = 0  # a padded vocabulary's, read apart from the rest
    monkeypatch.setattr("vecmat.checkpoints.gguf._CHUNK", 512 * 5)
    weight = read_blocks(data, kind_of(name))
    assert str(weight.format) == "int8:g32"
    assert torch.equal(weight.dequantize(), means(data, name))


def test_a_scale_that_is_nan_is_refused() -> None:
    data = blocks("Q8_0", 4, 64)
    data[2, 0:2] = 255
    with pytest.raises(ValueError, match="a block's scale is inf or NaN"):
        read_blocks(data, kind_of("Q8_0"))


def write(path: Path, types: dict[str, str] | str, *, tied: bool = False, seed: int = 0, extra: bool = False) -> Any:
    """Write a random Llama as a GGUF file, as llama.cpp lays it out; the dense model that it means.

    types: of each layer's weight, by the last part of its name, or of all.
    """
    model = packing.llama(tied=tied, seed=seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, parameter in model.named_parameters():
        stem, _, last = name.rpartition(".")
        values, kind = (
            parameter.detach(),
            types if isinstance(types, str) else types.get(stem.rpartition(".")[2], "F32"),
        )
        heads = {"q_proj": HEADS, "k_proj": KV_HEADS}.get(stem.rpartition(".")[2])
        if isinstance(model.get_submodule(stem), torch.nn.Linear) and kind not in ("F32", "F16", "BF16"):
            n, k = values.shape
            data = blocks(kind, n, k, seed=name) if kind not in ("Q4_0", "Q8_0") else gguf.quantize(
                _to_rope(values, heads).numpy(), kind_of(kind)
            )  # fmt: skip
            writer.add_tensor(f"{names.get_name(stem)}.{last}", data, raw_dtype=kind_of(kind))
            parameter.copy_(_from_rope(means(data, kind), heads))
        else:
            moved = _to_rope(values, heads).contiguous().numpy()
            writer.add_tensor(f"{names.get_name(stem)}.{last}", moved)
    if extra:
        writer.add_tensor("rope_freqs.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _to_rope(w: Tensor, heads: int | None) -> Tensor:
    """Rows in llama.cpp's order: of each head the first half's and the second half's take turns."""
    return w if heads is None else w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)


def _from_rope(w: Tensor, heads: int | None) -> Tensor:
    return w if heads is None else w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(torch.arange(24).view(2, 12)).logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_a_file_becomes_the_model_it_means(kind: str, tied: bool, tmp_path: Path) -> None:
    meant = write(tmp_path / "tiny.gguf", kind, tied=tied)
    model = vecmat.load(tmp_path / "tiny.gguf", dtype=torch.float32)
    for name, layer in model.named_modules():
        if isinstance(layer, vecmat.Linear) and not layer.format.dense:
            assert torch.equal(layer.stored().dequantize(), meant.get_submodule(name).weight), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(logits(model), logits(meant), rtol=1e-4, atol=1e-4)
    assert vecmat.load(tmp_path / "tiny.gguf").dtype == torch.bfloat16


def test_a_file_of_several_types_and_transformers_agree(tmp_path: Path) -> None:
    """Against transformers' own loading of the same file, K-quants among the types."""
    path = tmp_path / "tiny.gguf"
    write(path, {"q_proj": "Q8_0", "k_proj": "Q4_0", "v_proj": "Q4_1", "up_proj": "Q5_1", "gate_proj": "F16"})
    model = vecmat.load(path, dtype=torch.float32)
    theirs, _ = load_by_transformers(path)
    assert {str(layer.format) for layer in model.modules() if isinstance(layer, vecmat.Linear)} == {
        "int8:g32", "int4:g32", "fp32",
    }  # fmt: skip
    for name, layer in model.named_modules():
        if isinstance(layer, vecmat.Linear):
            w = theirs.get_submodule(name).weight
            limit = 0.0 if name.rpartition(".")[2] not in ("v_proj", "up_proj") else 0.007
            assert (layer.stored().dequantize() - w).norm() <= limit * w.norm(), name
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma2", "qwen3"])
def test_families_whose_tensors_llama_cpp_changes_agree_with_transformers(family: str, tmp_path: Path) -> None:
    """Rows that are moved, matrices that are turned, norms less one: transformers knows, and here it is asked."""
    path = tmp_path / "tiny.gguf"
    write_family(path, family)
    model, (theirs, _) = vecmat.load(path, dtype=torch.float32), load_by_transformers(path)
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, vecmat.Linear)}
    assert "int8:g32" in {str(layer.format) for layer in found.values()}
    rounded = {name for name in found if family == "bloom" and "query_key_value" in name}
    for name, layer in found.items():
        w = theirs.get_submodule(name).weight
        assert (layer.stored().dequantize() - w).norm() <= (0.007 if name in rounded else 0.0) * w.norm(), name
    for name, tensor in theirs.state_dict().items():
        if name.rpartition(".")[0] not in found:
            assert torch.equal(model.state_dict()[name], tensor), name


def write_family(path: Path, family: str) -> None:
    """A random file of a family, weights in Q8_0, names and shapes as llama.cpp has them, as transformers reads it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 1024},
        "bloom": {"hidden_size": 64, "n_layer": 1, "n_head": 4},
    }.get(family) or {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 128 if family == "qwen3" else 16,
    }  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=96, **sizes))
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(256 if family in ("gpt2", "bloom") else 128)
    writer.add_head_count(4)
    writer.add_layer_norm_eps(1e-5)
    if family not in ("gpt2", "bloom"):
        writer.add_head_count_kv(2)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_key_length(16)
        writer.add_value_length(16)
    writer.add_vocab_size(96)
    writer.add_token_list([f"t{i}" for i in range(96)])
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    names = gguf.get_tensor_name_map(arch, 1)
    written = set()
    for name, parameter in model.named_parameters():
        stem, _, last = name.rpartition(".")
        theirs = names.get_name(stem) or names.get_name(stem.partition(".")[2])
        values = torch.randn(parameter.shape, generator=generator(name)) * 0.1
        turned = type(model.get_submodule(stem)).__name__ == "Conv1D" and last == "weight"
        values = (values.t() if turned else values).contiguous().numpy()
        if theirs is None or f"{theirs}.{last}" in written:
            continue
        written.add(f"{theirs}.{last}")
        if values.ndim == 2 and "embd" not in theirs:
            writer.add_tensor(f"{theirs}.{last}", gguf.quantize(values, kind_of("Q8_0")), raw_dtype=kind_of("Q8_0"))
        else:
            writer.add_tensor(f"{theirs}.{last}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load_by_transformers(path: Path) -> tuple[Any, None]:
    from transformers import AutoModelForCausalLM

    with models.quiet(lambda done, total: None):
        return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval(), None


def test_a_tensor_without_a_place_is_told(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", "Q8_0", extra=True)
    with pytest.warns(vecmat.VecmatWarning, match=r"the model has no place for rope_freqs.weight; left out") as told:
        vecmat.load(tmp_path / "tiny.gguf")
    assert told[0].filename == __file__


def test_a_file_that_is_refused_leaves_no_trace(tmp_path: Path) -> None:
    """While a file is open, the collector is off and parts of libraries are exchanged."""
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "no-such-family")
    writer.add_tensor("t", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = gguf.GGUFReader
    with pytest.raises(CheckpointError, match="architecture no-such-family is not supported") as error:
        vecmat.load(tmp_path / "other.gguf")
    assert gguf.GGUFReader is reader
    assert gc.isenabled()
    assert error.value.__traceback__ is not None  # which keeps the frames: nothing was put right by their end


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "tiny.gguf", "Q8_0")
    whole = (tmp_path / "tiny.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (0, 3, 4, 11, 24, 100, 1000, 2000, len(whole) // 2, len(whole) - 64):
        cut.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            vecmat.load(cut)


@pytest.mark.model
@pytest.mark.skipif(importlib.util.find_spec(models.PACKAGED) is None, reason=models.PACKAGED_INSTALL)
def test_the_packaged_model_is_read_as_transformers_reads_it() -> None:
    source = models.find(None)
    path = source.folder / str(source.gguf)
    model = vecmat.load(path, dtype=torch.float32)
    theirs, tokenizer = models.load(source, torch.float32, torch.device("cpu"), lambda done, total: None)
    with open_source(path) as opened:
        assert opened.count == 272
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, vecmat.Linear)}
    assert {str(layer.format) for layer in layers.values()} == {"int8:g32", "fp32"}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.17.self_attn.k_proj", "model.layers.29.mlp.up_proj"):
        w = theirs.get_submodule(name).weight
        assert (layers[name].stored().dequantize() - w).norm() < 0.01 * w.norm(), name
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        ours, truth = (m(tokens).logits.log_softmax(-1) for m in (model, theirs))
    assert (truth.exp() * (truth - ours)).sum(-1).mean() < 0.02
    assert tokenizer.decode(ours[0, -1].argmax()) == tokenizer.decode(truth[0, -1].argmax())
