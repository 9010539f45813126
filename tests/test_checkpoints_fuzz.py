"""Damaged files: whatever bytes change or are cut off, load says clearly what is wrong, or the model is right."""

from __future__ import annotations

import resource
import struct
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import packing
import vecmat
from test_checkpoints_gguf import write as write_gguf
from vecmat import CheckpointError, VecmatWarning

pytest.importorskip("transformers")

EXAMPLES = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MOST_KIB = 400 << 10  # that a file of a few kilobytes may make the process grow, all examples together


@st.composite
def damage(draw: Any, head: int, size: int) -> tuple[str, int, bytes]:
    """(what, where, bytes): mostly in the header, which is where lies are; ``head`` bytes of ``size``."""
    what = draw(st.sampled_from(["set", "set", "set", "insert", "delete", "cut"]))
    place = draw(st.integers(0, head - 1) | st.integers(0, size - 1))
    wide = st.sampled_from([0, 1, 255, 1 << 31, 1 << 40, 1 << 60, (1 << 64) - 1]).map(lambda x: struct.pack("<Q", x))
    return what, place, draw(st.binary(min_size=1, max_size=3) | wide)


def damaged(whole: bytes, how: tuple[str, int, bytes]) -> bytes:
    what, place, new = how
    if what == "cut":
        return whole[:place]
    if what == "delete":
        return whole[:place] + whole[place + len(new) :]
    return whole[:place] + new + whole[place + (len(new) if what == "set" else 0) :]


def attempt(path: Path) -> Any:
    """The model, or None where load says, or warns, what is wrong and where."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", VecmatWarning)
        try:
            model = vecmat.load(path)
            told = [str(found.message) for found in warned if found.category is VecmatWarning]
            if not told:
                return model
            said = told[0]  # of tensors without a place: a name that was damaged, or fewer layers than there are
        except CheckpointError as error:
            said = str(error)
    assert str(path) in said
    assert len(said) > len(str(path)) + 8
    return None


def grown(start: int) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fuzz")
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": True}

    def make(n: int, k: int, seed: object) -> Any:
        return packing.gptq(n, k, act_order=True, seed=seed)

    packing.write_folder(made, packing.llama(layers=1), make, quantization)
    vecmat.load(made)
    return made


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "tiny.gguf"
    write_gguf(path, {"q_proj": "Q8_0", "k_proj": "Q4_0", "v_proj": "Q4_1"})
    vecmat.load(path)
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_folder_is_refused_or_right(name: str, folder: Path, tmp_path: Path) -> None:
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}
    head = 8 + struct.unpack("<Q", whole[name][:8])[0] if name.endswith("safetensors") else len(whole[name])
    right = vecmat.load(folder).state_dict()
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = {True: 0, False: 0}

    @EXAMPLES
    @given(damage(head, len(whole[name])))
    def run(how: tuple[str, int, bytes]) -> None:
        for other, content in whole.items():
            (tmp_path / other).write_bytes(content)
        (tmp_path / name).write_bytes(damaged(whole[name], how))
        model = attempt(tmp_path)
        seen[model is None] += 1
        if model is None:
            return
        state = model.state_dict()
        assert state.keys() == right.keys()
        if name == "config.json" or how[1] + len(how[2]) <= head:  # what was changed says nothing about the weights
            assert all(torch.equal(tensor.float(), right[key].float()) for key, tensor in state.items())

    run()
    assert seen[True] > 10
    assert grown(start) < MOST_KIB


def test_a_damaged_gguf_file_is_refused_or_right(gguf_file: Path, tmp_path: Path) -> None:
    whole = gguf_file.read_bytes()
    head = whole.index(b"output_norm.weight") + 50
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = {True: 0, False: 0}
    right = vecmat.load(gguf_file).state_dict()

    @EXAMPLES
    @given(damage(head, len(whole)))
    def run(how: tuple[str, int, bytes]) -> None:
        (tmp_path / "tiny.gguf").write_bytes(damaged(whole, how))
        model = attempt(tmp_path / "tiny.gguf")
        seen[model is None] += 1
        if model is not None:
            assert {name: tuple(t.shape) for name, t in model.state_dict().items()}.keys() == right.keys()

    run()
    assert seen[True] > 10
    assert grown(start) < MOST_KIB


def test_a_file_of_random_bytes_is_refused(folder: Path, tmp_path: Path) -> None:
    @EXAMPLES
    @given(st.binary(max_size=200), st.booleans(), st.sampled_from([b"", b"GGUF\x03\0\0\0", b"GGUF\x02\0\0\0"]))
    def run(content: bytes, prefixed: bool, magic: bytes) -> None:
        (tmp_path / "x.gguf").write_bytes(magic + content if prefixed else content)
        assert attempt(tmp_path / "x.gguf") is None
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        (tmp_path / "model.safetensors").write_bytes(content)
        assert attempt(tmp_path) is None

    run()
