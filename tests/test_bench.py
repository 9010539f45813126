"""Timing: weights rotate, rounds interleave, results carry their stamp; nothing depends on how fast a machine is."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vecmat
from cases import here
from vecmat import bench, measure, workloads
from vecmat.bench import Sampler, copies_needed, medians
from vecmat.device import KNOWN
from vecmat.measure import Measured
from vecmat.problem import Format, Problem

CPU = here("cpu")
PROBLEM = Problem(m=2, n=24, k=40, x="fp32", weight=Format("fp32"), out="fp32")


def test_copies_exceed_the_cache_or_are_as_many_as_it_keeps() -> None:
    for device in (CPU, *KNOWN.values()):
        for nbytes in (0, 1, 1 << 10, 1 << 20, 16 << 20, 1 << 28, 1 << 33):
            copies = copies_needed(device, nbytes)
            assert 2 <= copies <= bench._MOST_COPIES
            assert copies * nbytes > 2 * device.l2_bytes or copies == bench._MOST_COPIES
    assert copies_needed(dataclasses.replace(CPU, l2_bytes=1 << 20), 1 << 20) == 6


def counted(calls: int, seconds: float = 0.0) -> tuple[list[Callable[[], None]], list[int]]:
    """Calls, and the list in which each leaves its number."""
    order: list[int] = []

    def call(index: int) -> None:
        order.append(index)
        time.sleep(seconds)

    return [lambda index=index: call(index) for index in range(calls)], order  # type: ignore[misc]


def test_a_sampler_calls_every_copy_in_turn_and_goes_on_where_it_stopped() -> None:
    calls, order = counted(5)
    sampler = Sampler(CPU, calls)
    sampler._count = 3  # no whole turn
    order.clear()
    for _ in range(4):
        assert sampler.once() > 0
    assert len(order) == 12
    assert order == [i % 5 for i in range(len(order))]
    counts = Counter(order)
    assert max(counts.values()) - min(counts[i] for i in range(5)) <= 1


def test_a_sample_is_the_time_of_one_call() -> None:
    calls, order = counted(2, 2e-3)
    sampler = Sampler(CPU, calls)
    order.clear()
    us = sampler.once()
    assert us >= 2000  # a sleep is never shorter; how much longer is the machine's affair
    assert len(order) <= 2


def test_a_sampler_raises_what_a_call_raises() -> None:
    def fails() -> None:
        raise MemoryError("none left")

    with pytest.raises(MemoryError, match="none left"):
        Sampler(CPU, [fails])


class Told:
    """A sampler with given samples; every one notes its turn."""

    def __init__(self, name: str, samples: list[float], order: list[str]) -> None:
        self.name, self.samples, self.order = name, iter(samples), order

    def once(self) -> float:
        self.order.append(self.name)
        return next(self.samples)


def test_medians_interleave_the_contenders() -> None:
    order: list[str] = []
    found = medians([Told("a", [9, 1, 2, 3, 100], order), Told("b", [5] * 5, order)], 5)  # type: ignore[list-item]
    assert found == [3, 5]
    assert order == ["a", "b"] * 5


def test_medians_end_early_after_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_ENOUGH_S", -1.0)
    order: list[str] = []
    assert medians([Told("a", [3, 1, 2, 9, 9], order)], 5) == [2]  # type: ignore[list-item]
    assert len(order) == 3


def test_the_read_probe_reads_more_than_the_cache_and_leaves_the_random_numbers_alone() -> None:
    small = dataclasses.replace(CPU, l2_bytes=1 << 20)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    _, nbytes = bench.read_probe(small)
    assert nbytes >= 8 * small.l2_bytes
    assert torch.equal(torch.rand(2), expected)
    assert 0 < bench.measure_roof(small, rounds=1).read_gbs < math.inf


@pytest.fixture
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few copies and a short stream, so that a measurement is quick."""
    monkeypatch.setattr(measure, "copies_needed", lambda device, nbytes: 2)
    monkeypatch.setattr(measure, "read_probe", lambda device: (Sampler(CPU, [lambda: time.sleep(1e-3)]), 1 << 20))
    monkeypatch.setattr(measure, "ROUNDS", 3)


def test_records_have_the_stamp_the_problem_and_the_times(small_cache: None) -> None:
    result = measure.measure(PROBLEM, CPU, ["torch", "fallback", "torch_int8"])
    assert result.peers["torch"] > 0
    assert result.peers["fallback"] > 0
    assert result.peers["torch_int8"] is None  # it cannot run fp32 weights
    assert result.floor_us == pytest.approx(PROBLEM.bytes_moved / result.roof_gbs * 1e-3)
    assert result.share == pytest.approx(result.floor_us / result.us)
    (row,) = measure.records([result], CPU)
    versions = [name for name in row if name.endswith("_version")]
    assert {"vecmat_version", "torch_version"} <= set(versions)
    assert list(row) == ["date", "device", *versions, "m", "n", "k", "x", "weights", "kernel", "us", "torch_us",
                         "fallback_us", "torch_int8_us", "floor_us", "roof_gbs", "share"]  # fmt: skip
    assert row["date"] == datetime.date.today().isoformat()
    assert row["device"] == CPU.name
    assert (row["m"], row["n"], row["k"], row["x"], row["weights"]) == (2, 24, 40, "fp32", "fp32")
    assert row["vecmat_version"] == vecmat.__version__
    assert row["torch_int8_us"] is None


def test_what_is_measured_is_what_matmul_would_run(small_cache: None) -> None:
    row = vecmat.tables.Row(kernel="fallback", kernel_version=1, config={"widen": True})
    with vecmat.tables.use({PROBLEM.key(): row}, device=CPU.name):
        result = measure.measure(PROBLEM, CPU, [])
    assert (result.kernel, result.decided_by, result.peers) == ("fallback", "overlay: tables.use", {})


def test_a_peer_that_is_not_known_is_refused(small_cache: None) -> None:
    with pytest.raises(ValueError, match=r"peer 'gemlite' is not known; known are torch, .*fallback"):
        measure.measure(PROBLEM, CPU, ["gemlite"])


def test_the_geometric_mean() -> None:
    assert measure.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert measure.geometric_mean(iter([3.0])) == pytest.approx(3.0)
    assert math.isnan(measure.geometric_mean([]))


def test_appending_writes_one_header_and_refuses_other_columns(tmp_path: Path) -> None:
    file = tmp_path / "below" / "all.csv"
    for us in (1.5, 2.5):
        measure.append_csv(file, [{"m": 1, "us": us, "torch_us": None}])
    with file.open(newline="") as text:
        assert list(csv.reader(text)) == [["m", "us", "torch_us"], ["1", "1.5", ""], ["1", "2.5", ""]]
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"all\.csv has other columns than this run's; append to a new file"):
        measure.append_csv(file, [{"m": 1, "us": 3.0}])
    assert file.read_bytes() == before
    file.write_text("")
    measure.append_csv(file, [{"m": 1}])
    assert file.read_text().split() == ["m", "1"]


def results() -> list[Measured]:
    return [
        Measured(problem=dataclasses.replace(PROBLEM, m=m), kernel="fallback", decided_by="", us=10.0 * m,
                 peers={"torch": 12.0 * m}, floor_us=5.0, roof_gbs=20.0)
        for m in (1, 4)
    ]  # fmt: skip


def test_a_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    measure.plot(tmp_path / "it.png", results(), CPU)
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


NAMES = ["llama-3-8b", "llama-3-8b-fused", "llama-3-70b", "qwen2.5-0.5b", "smollm2-135m", "bert-base", "bert-large"]


@pytest.mark.parametrize("name", NAMES)
def test_a_named_workload_is_a_models_shapes(name: str) -> None:
    workload = workloads.named(name)
    assert workload.shapes
    assert len(set(workload.shapes)) == len(workload.shapes)
    assert all(type(size) is int and size > 0 for shape in workload.shapes for size in shape)
    assert list(workload.m) == sorted(set(workload.m))
    assert workload.m[0] >= 1
    for fmt in ("int8", "int4", "bf16"):
        problems = list(workloads.problems(workload.shapes, workload.m, fmt))
        assert len(problems) == len(workload.shapes) * len(workload.m)
        assert {Problem.parse(p.key()).key() for p in problems} == {p.key() for p in problems}


def test_the_names_are_these_and_another_is_refused() -> None:
    assert list(workloads.known()) == NAMES
    with pytest.raises(ValueError, match=r"workload 'gpt-5' is not known; known are llama-3-8b, .*bert-large"):
        workloads.named("gpt-5")
