"""Problem, Format and Device are values: they print, compare and count as the documentation says."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from cases import here
from vecmat.device import KNOWN, Device
from vecmat.problem import Format, Problem, bucket

PROBLEM = Problem(m=12, n=4096, k=11008, x="bf16", weight=Format.parse("int4:g128"), out="fp16", bias=True)


def test_m_is_exact_up_to_8_and_then_rounded_up_to_few_steps() -> None:
    assert [bucket(m) for m in range(9)] == list(range(9))
    steps = [(9, 16), (16, 16), (17, 32), (33, 48), (49, 64), (65, 96), (97, 128), (129, 256), (257, 512), (5000, 8192)]
    assert [bucket(m) for m, _ in steps] == [wanted for _, wanted in steps]
    for m in range(1, 5000):
        assert m <= bucket(m) <= max(16, 2 * m)
        assert bucket(bucket(m)) == bucket(m)


def test_the_key_is_one_readable_line_that_names_all_that_matters() -> None:
    assert PROBLEM.key() == str(PROBLEM) == "m16 n4096 k11008 x=bf16 w=int4:g128 o=fp16 nk bias"
    changes = [{"n": 4097}, {"k": 11009}, {"x": "fp16"}, {"weight": Format.parse("int4:g128:zp")}, {"out": "bf16"},
               {"layout": "kn"}, {"bias": False}, {"m": 17}, {"compute": "int8"}]  # fmt: skip
    keys = {dataclasses.replace(PROBLEM, **change).key() for change in changes}
    assert len(keys) == len(changes)
    assert PROBLEM.key() not in keys
    assert dataclasses.replace(PROBLEM, m=13).key() == PROBLEM.key()
    assert "c=int8" in dataclasses.replace(PROBLEM, compute="int8").key()


def test_bytes_and_operations_are_counted() -> None:
    assert PROBLEM.flops == 2 * 12 * 4096 * 11008
    assert PROBLEM.weight_bytes == 4096 * 11008 // 2 + 4096 * 86 * 4
    assert PROBLEM.bytes_moved == PROBLEM.weight_bytes + 12 * 11008 * 2 + 12 * 4096 * 2


def test_formats_print_parse_and_count() -> None:
    assert str(Format.parse("int4:g64:zp")) == "int4:g64:zp"
    assert Format.parse("int8") == Format("int8")
    assert Format("int4", 32).groups(33) == 2
    assert Format("int8").groups(33) == 1
    assert Format("int4", 32).nbytes(3, 33) == 3 * 17 + 3 * 2 * 4
    assert Format("int4", 32, False).nbytes(3, 33) == 3 * 17 + 3 * 2 * 5
    assert [Format(name).dense for name in ("fp32", "bf16", "fp16", "int8", "fp8")] == [True, True, True, False, False]
    for text in ("int4", "int2", "int8:g16", "int4:g32:x", "fp8:g16", "bf16:g32", "bf16:zp", "", "int8:g", "int8:zp"):
        with pytest.raises(ValueError, match=r"format|group_size"):
            Format.parse(text)


def test_values_are_frozen_and_hashable() -> None:
    for value, field in ((PROBLEM, "m"), (PROBLEM.weight, "name"), (here("cpu"), "name")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 3)
        assert hash(value) == hash(pickle.loads(pickle.dumps(value)))


def test_known_devices_need_not_be_here() -> None:
    for name in KNOWN:
        device = Device.named(name)
        assert device.is_gpu
        assert (device.capability > 0) == (device.kind == "cuda")
        assert min(device.units, device.shared_bytes, device.l2_bytes) > 0
        assert min(device.read_gbs, device.tflops16, device.tflops32, device.tops8) > 0
    assert Device.named("h200").capability == 90
    assert Device.named("h200").name == "NVIDIA H200"
    assert not Device.named("cpu").is_gpu


def test_the_device_of_this_machine_is_asked_once_per_thread_count(device: str) -> None:
    first = here(device)
    assert first is here(device)
    assert first.kind in ("cpu", "cuda", "hip")
    assert first.name
    if device == "cpu":
        try:
            torch.set_num_threads(2)
            assert here("cpu").units == 2
            assert "2 threads" in here("cpu").name
        finally:
            torch.set_num_threads(1)
        assert here("cpu").units == 1
    else:
        assert first.name == torch.cuda.get_device_name(0)
        assert first.units == torch.cuda.get_device_properties(0).multi_processor_count
    assert Device.of(torch.device("meta")).kind == "other"
