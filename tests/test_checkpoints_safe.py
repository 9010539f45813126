"""Files that lie: every size, name and offset is looked at before memory is taken, and the error names the file."""

from __future__ import annotations

import json
import os
import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import packing
import vecmat
from vecmat import CheckpointError
from vecmat.checkpoints.gguf import check_header
from vecmat.checkpoints.safe import inside, open_folder, read_json
from vecmat.checkpoints.source import open_source


def header(tensors: dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file. length: what it says of its header's size, if not the truth."""
    told = json.dumps(tensors).encode()
    return struct.pack("<Q", len(told) if length is None else length) + told + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 7, struct.pack("<Q", 1 << 60), struct.pack("<Q", 1 << 60) + b"{}",
        header({"a": entry([2], 0, 8)}, b"\0" * 8, length=1 << 40),
        header({"a": entry([2], 0, 8)}, b"\0" * 7),
        header({"a": entry([2], 0, 8)}, b"\0" * 9),
        header({"a": entry([1 << 40, 1 << 40], 0, 8)}, b"\0" * 8),
        header({"a": entry([1 << 62], 0, 8)}, b"\0" * 8),
        header({"a": entry([2], 0, 1 << 60)}, b"\0" * 8),
        header({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, b"\0" * 8),
        header({"a": entry([2], 4, 12)}, b"\0" * 12),
        header({"a": entry([-1], 0, 8)}, b"\0" * 8),
        header({"a": entry([2], 0, 8, "F99")}, b"\0" * 8),
        header({"a": 1}), header({}, length=3), b"\x02\0\0\0\0\0\0\0[]", b'\x05\0\0\0\0\0\0\0{"a":' * 1000,
    ],
)  # fmt: skip
def test_a_safetensors_file_that_lies_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is no whole safetensors file: \w+"):
        open_folder(tmp_path)


def sharded(folder: Path, weight_map: Any = None, **files: dict[str, torch.Tensor]) -> Path:
    """A folder with an index and its files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
    if weight_map is None:
        weight_map = {tensor: f"{name}.safetensors" for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


ONE = {"a": torch.ones(2)}


def test_an_index_names_its_shards(tmp_path: Path) -> None:
    found = open_folder(sharded(tmp_path, one={"a": torch.ones(2)}, two={"b": torch.zeros(3)}))
    assert set(found.names()) == {"a", "b"}
    assert found.origin("b").endswith("two.safetensors")
    assert torch.equal(found.get("b"), torch.zeros(3))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, r"'../outside.safetensors' leads to .*outside of the folder"),
        ({"a": "../../../../../../etc/passwd"}, r"names '.*passwd'; expected a .safetensors file"),
        ({"a": "/etc/passwd"}, "names '/etc/passwd'; expected a .safetensors file"),
        ({"a": "{outside}"}, "outside of the folder"),
        ({"a": "link.safetensors"}, "outside of the folder"),
        ({"a": "circle.safetensors"}, "circle.safetensors"),
        ({"a": "missing.safetensors"}, "there is no file 'missing.safetensors'"),
        ({"a": "deep/../../outside.safetensors"}, "outside of the folder"),
        ({"a": "folder.safetensors"}, "there is no file 'folder.safetensors'"),
        ({"a": "x" * 5000 + ".safetensors"}, "cannot be looked at|there is no file"),
        ({"a": "one\0.safetensors"}, "is no file name"),
        ({"a": 3}, "3 is no file name"),
        ({"a": ["one.safetensors"]}, "is no file name"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, "says that one.safetensors has the tensor 'b'"),
        ({"a": "two.safetensors"}, "says that two.safetensors has the tensor 'a'"),
        ({"a": "two.safetensors", "c": "one.safetensors"}, "says that two.safetensors has the tensor 'a'"),
        ({}, "weight_map is dict; expected names"),
        ([], "weight_map is list; expected names"),
        ("one.safetensors", "weight_map is str; expected names"),
    ],
)
def test_an_index_that_leads_elsewhere_or_lies_is_refused(weight_map: Any, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    outside = tmp_path / "outside.safetensors"
    save_file(ONE, outside)
    if isinstance(weight_map, dict):
        weight_map = {k: v.format(outside=outside) if isinstance(v, str) else v for k, v in weight_map.items()}
    sharded(folder, weight_map, one=ONE, two={"c": torch.ones(1)})
    (folder / "link.safetensors").symlink_to(outside)
    (folder / "circle.safetensors").symlink_to("circle.safetensors")
    (folder / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=message) as said:
        open_folder(folder)
    assert str(folder) in str(said.value)


def test_a_tensor_that_two_shards_have_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"}, one=ONE, two={**ONE, "b": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"two.safetensors: has the tensor 'a', as one.safetensors does"):
        open_folder(tmp_path)


def test_a_folder_of_hugging_faces_cache_is_all_links_and_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file(ONE, blobs / "sha")
    (snapshot / "model.safetensors").symlink_to("../../blobs/sha")
    assert torch.equal(open_folder(snapshot).get("a"), torch.ones(2))
    save_file(ONE, tmp_path / "elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../elsewhere")
    with pytest.raises(CheckpointError, match="outside of the folder"):
        open_folder(snapshot)


def test_which_files_are_a_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no .safetensors file"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"has its weights in pytorch_model.bin, a pickle, .* never is"):
        open_folder(tmp_path)
    save_file(ONE, tmp_path / "gptq_model-4bit-128g.safetensors")
    assert set(open_folder(tmp_path).names()) == {"a"}
    save_file(ONE, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"has 2 safetensors files .* and no"):
        open_folder(tmp_path)
    save_file(ONE, tmp_path / "model.safetensors")
    assert set(open_folder(tmp_path).names()) == {"a"}
    for name in ("model", "model.fp16"):
        sharded(tmp_path, one=ONE)
        (tmp_path / "model.safetensors.index.json").rename(tmp_path / f"{name}.safetensors.index.json.kept")
    for name in ("model", "model.fp16"):
        (tmp_path / f"{name}.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(CheckpointError, match="has several indices"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"), (b"{", "cannot be read as JSON"), (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "holds a list; expected an object"), (b"null", "holds a NoneType"),
        (b'{"a": 1, "a": 2}', "has the key 'a' twice"), (b'{"b": {"a": 1, "a": 2}}', "has the key 'a' twice"),
        (b'{"a":' * 100000, "cannot be read as JSON"),
    ],
)  # fmt: skip
def test_json_that_is_none_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"config.json: {message}"):
        read_json(tmp_path / "config.json")


def test_json_too_large_to_be_a_config_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    os.truncate(tmp_path / "config.json", 1 << 40)  # a hole: it takes no disk
    with pytest.raises(CheckpointError, match="1099511627776 bytes of JSON; expected 67108864 at most"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="there is no file 'x'"):
        inside(tmp_path, "x")


def test_what_is_no_checkpoint_at_all_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("model.bin", "is a pickle, which runs code"), ("model.safetensors", "is a file; expected its folder"),
        ("nowhere", "there is no such folder"), ("nowhere.gguf", "there is no such file"),
        ("empty", "there is no file 'config.json'"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            open_source(tmp_path / path)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq"}, "quant_method is 'hqq'; read are awq, bitsandbytes, compressed-tensors, f"),
        ({"quant_method": ["gptq"]}, r"quant_method is \['gptq'\]"),
        ({"bits": 4}, "quant_method is None"),
        (["gptq"], "quantization_config is list; expected an object"),
        ({"load_in_4bit": True}, "of bitsandbytes only int8 is read"),
        ({"quant_method": "vecmat", "version": 2}, "version is 2; this vecmat reads 1 to 1"),
        ({"quant_method": "vecmat", "weights": "int3"}, "format 'int3' is not known"),
        ({"quant_method": "vecmat", "weights": "bf16"}, "weights is 'bf16'; expected int8, int4 or fp8"),
        ({"quant_method": "vecmat", "weights": 8}, "weights is 8; expected str"),
        ({"quant_method": "vecmat", "group_size": 7}, "group_size is 7"),
        ({"quant_method": "vecmat", "modules_to_not_convert": [1]}, "are not all names"),
        ({"quant_method": "vecmat", "layers": {"a": "int5"}}, "format 'int5' is not known"),
    ],
)
def test_a_quantisation_that_is_not_read_is_named(quantization: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file(ONE, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 10**9}, "config says num_hidden_layers=1000000000, but there are"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "num_hidden_layers=1000000000"),
        ({"n_routed_experts": 10**9}, "n_routed_experts=1000000000"),
        ({"hidden_size": 1 << 50}, None), ({"hidden_size": -64}, None), ({"vocab_size": 1 << 62}, None),
        ({"num_attention_heads": 0}, None), ({"head_dim": 1 << 40}, None), ({"hidden_size": "64"}, None),
        ({"rope_parameters": {"rope_type": "none"}}, None), ({"hidden_act": "none"}, None),
        ({"model_type": "none"}, None), ({"model_type": "vit"}, None),
        ({"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}, None),
        ({"num_hidden_layers": 3}, "has no model.layers.2.self_attn.q_proj.weight, .* and 6 more"),
        ({"vocab_size": 97}, r"model.embed_tokens.weight is \(96, 64\); the model has \(97, 64\) \(2 such tensors\)"),
    ],
)  # fmt: skip
def test_a_config_that_lies_is_refused(config: dict[str, Any], message: str | None, tmp_path: Path) -> None:
    packing.write_folder(tmp_path, packing.llama(), packing.gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32})
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(told | config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message) as said:
        vecmat.load(tmp_path)
    assert str(tmp_path) in str(said.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # 256 MiB, in KiB


@pytest.mark.parametrize("sizes", [{"hidden_size": 8192}, {"num_hidden_layers": 300}])
def test_a_plain_file_that_holds_little_of_a_large_model_is_refused(sizes: dict[str, int], tmp_path: Path) -> None:
    """transformers would draw what is missing at random, in memory."""
    packing.llama(layers=1).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**told, "intermediate_size": 1 << 20, **sizes}))
    save_file({"model.other.weight": torch.ones(64)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"has no model.embed_tokens.weight, .* and \d+ more"):
        vecmat.load(tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 19


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def tensor(name: bytes = b"t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    dims = struct.pack("<I", len(shape)) + b"".join(struct.pack("<Q", size) for size in shape)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def gguf(tensors: list[bytes], pairs: list[bytes] = (), *, data: int = 128, version: int = 3,
         counts: tuple[int, int] | None = None) -> bytes:  # fmt: skip
    """A GGUF file. counts: what it says of its tensors and values, if not the truth."""
    head = struct.pack("<4sIQQ", b"GGUF", version, *(counts or (len(tensors), len(pairs)))) + b"".join(pairs)
    head += b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + b"\0" * data


def array(key: bytes, kind: int, count: int, content: bytes = b"") -> bytes:
    return string(key) + struct.pack("<IIQ", 9, kind, count) + content


HUGE = 1 << 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"), (b"GGML", "does not begin"), (b"GGUF", "claims 4 bytes more; it has 0"),
        (gguf([], version=1), "version is 1"), (gguf([], version=3 << 24), "version is 50331648"),
        (gguf([], counts=(1 << 40, 0)), "claims 1099511627776 tensors"),
        (gguf([], counts=(0, 1 << 63)), "claims 0 tensors and 9223372036854775808 values"),
        (gguf([tensor()], counts=(2, 0)), "a tensor has no name"),
        (gguf([tensor(shape=(1 << 40, 1 << 40))]), "ends at byte"),
        (gguf([tensor(shape=(HUGE, HUGE, HUGE, HUGE))]), "ends at byte"),
        (gguf([tensor(shape=(33,), offset=0)], data=128), "ends at byte"),
        (gguf([tensor(offset=HUGE)]), "ends at byte"), (gguf([tensor(offset=16)]), "expected a multiple of 32"),
        (gguf([tensor(shape=())]), "has 0 dimensions"), (gguf([tensor(shape=(1,) * 5)]), "has 5 dimensions"),
        (gguf([tensor(shape=(0,))]), r"has shape \[0\]"), (gguf([tensor(shape=(33,), kind=2)]), "32 divides"),
        (gguf([tensor(kind=999)]), "type 999, which is not known"), (gguf([tensor(name=b"")]), "has no name"),
        (gguf([tensor(name=b"\xff")]), "utf-8"),
        (gguf([tensor(), tensor(offset=128)], data=256), "has the tensor 't' twice"),
        (gguf([tensor(), tensor(b"u")]), "overlaps the one before it"),
        (gguf([tensor()], [array(b"a", 0, HUGE)]), "values; expected 8388608 at most"),
        (gguf([tensor()], [array(b"a", 8, 1 << 22)]), "claims"), (gguf([tensor()], [array(b"a", 5, 9999)]), "claims"),
        (gguf([tensor()], [array(b"a", 9, 1)]), "is an array of type 9"),
        (gguf([tensor()], [string(b"a") + struct.pack("<I", 77)]), "has type 77, which is none"),
        (gguf([tensor()], [string(b"a") + struct.pack("<IQ", 8, HUGE)]), "claims 1152921504606846976 bytes more"),
        (gguf([tensor()], [struct.pack("<Q", HUGE)]), "claims"),
        (gguf([tensor()], [string(b"general.alignment") + struct.pack("<II", 4, 24)]), "expected a power of two"),
        (gguf([tensor()], [string(b"general.alignment") + struct.pack("<II", 4, a) for a in (64, 32)]), "twice"),
        (gguf([tensor()], [string(b"split.count") + struct.pack("<IH", 2, 3)]), "it is one of 3 parts"),
    ],
)  # fmt: skip
def test_a_gguf_file_that_lies_is_refused_by_name(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=message) as said:
        open_source(path)
    assert str(path) in str(said.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17


@pytest.mark.parametrize("make", [
    lambda: gguf([tensor(), tensor(b"u", (32, 2), 2, 128)], data=128 + 36),
    lambda: gguf([tensor()], [array(b"a", 8, 2, string(b"x") + string(b"y")), array(b"b", 6, 3, b"\0" * 12)]),
    lambda: gguf([tensor(offset=64)], [string(b"general.alignment") + struct.pack("<II", 4, 64)], data=256),
])  # fmt: skip
def test_a_gguf_header_that_tells_the_truth_passes(make: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(make())
    assert check_header(path) in (1, 2)
