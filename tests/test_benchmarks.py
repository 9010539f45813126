"""The benchmarks run, time nobody who is wrong, and count their ratios the right way round."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vecmat.native import native

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TORCH = "torch fp32,torch bf16,torch fp16,torch int8pack,torch int4pack,torch qlinear"
OURS = "vecmat int8,vecmat int8 compute,vecmat int4,vecmat int4 compute,vecmat bf16,vecmat fp32,vecmat fp16"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "cpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)


def test_the_cpu_benchmark_times_torch_and_ours_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "cpu.csv"
    small = ("--m", "1,3", "--rounds", "1", "--pool", "0", "--out", str(file), "--only", f"{OURS},{TORCH}")
    first = run("--shapes", "256x48", *small)
    run("--shapes", "128x32", "--append", *small)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    timed = {(row["group"], row["contender"], row["m"], row["k"]) for row in rows}
    per_cell = len(OURS.split(",")) + len(TORCH.split(",")) + 2  # F.linear in bf16 stands beside int8 and int4, too
    assert len(timed) == len(rows) == 2 * 2 * per_cell, first.stderr
    assert all(float(row["us"]) > 0 and float(row["probe_gbs"]) > 0 for row in rows)
    assert all(row["kernel"] for row in rows if row["contender"].startswith("vecmat"))
    assert all(row["torch"] == torch.__version__ for row in rows)
    told = run("--table", "--out", str(file)).stdout
    assert "geometric means over 2 shapes" in told
    assert "bf16 / F.linear" in told


def test_a_name_that_is_neither_group_nor_contender_is_refused() -> None:
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run("--only", "int5")
    assert "int5: neither group nor contender" in caught.value.stderr


def test_a_contender_with_a_wrong_copy_is_told_and_not_timed() -> None:
    import cpu
    from contender import Contender, Material
    from peers_torch import CONTENDERS

    material = Material.make(48, 64, 0, 1, {})
    right, wrong = CONTENDERS["torch fp32"](material), CONTENDERS["torch fp32"](material)
    wrong.weights[-1][0, 0] += 1.0  # type: ignore[attr-defined]
    built: dict[str, Contender] = {"right": right, "wrong": wrong}
    told: list[tuple[str, str]] = []
    turns = cpu.ready(material, built, material.activations(2), lambda *words: told.append(words))
    assert [turn.name for turn in turns] == ["right"]
    assert [name for name, _ in told] == ["wrong"]
    assert "its result is wrong" in told[0][1]


@pytest.mark.parametrize(("package", "module", "loader"), [
    ("llama_cpp", "peers_ggml", "library"), ("onnxruntime", "peers_onnx", "runtime"),
])  # fmt: skip
def test_a_peer_that_is_not_installed_is_absent_with_the_reason(
    package: str, module: str, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    from contender import Absent

    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    load = getattr(importlib.import_module(module), loader)
    load.cache_clear()
    with pytest.raises(Absent, match="is not installed"):
        load(1)
    load.cache_clear()


def cell(contender: str, us: float, m: int = 1, group: str = "bf16", **more: Any) -> dict[str, Any]:
    return {"group": group, "contender": contender, "m": m, "n": 64, "k": 64, "us": us, "share": 0.5,
            "weight_bytes": 8192, **more}  # fmt: skip


def test_the_table_counts_peer_over_ours_against_the_best_peer_and_marks_what_is_less_than_wanted() -> None:
    import cpu_table

    rows = [cell("vecmat bf16", 10.0), cell("torch bf16", 20.0), cell("ggml BF16", 5.0),
            cell("vecmat int4", 10.0, group="int4"), cell("ggml Q4_0", 40.0, group="int4"),
            cell("ggml Q4_K repacked", 30.0, group="int4"), cell("torch int4pack", 9.0, group="int4")]  # fmt: skip
    told = {line[:42].strip(): line[42:].split()[:2] for line in cpu_table.table(rows).splitlines()}
    assert told["bf16 / F.linear"] == ["2.00", "(1.80)"]
    assert told["bf16 / ggml BF16"] == ["0.50", "(1.00!)"]
    assert told["int4 / ggml's best"] == ["3.00", "(1.10)"]
    assert "slower than torch's best way by more than 5%: 1 of 2 cells" in cpu_table.table(rows)


@pytest.mark.parametrize(("package", "module", "loader"), [
    ("humming", "peers_gpu_humming", "humming"), ("gemlite", "peers_gpu_gemlite", "gemlite"),
    ("deepspeed", "peers_gpu_deepspeed", "DeepSpeedTriton"),
])  # fmt: skip
def test_a_gpu_peer_that_is_not_installed_is_absent_with_the_reason(
    package: str, module: str, loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    from contender import Absent, Material

    monkeypatch.setitem(sys.modules, package, None)  # as if it were not there
    load = getattr(importlib.import_module(module), loader)
    with pytest.raises(Absent, match="is not installed"):
        load(*([Material.make(16, 16, 0, 1, {})] if package == "deepspeed" else []))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_says_so_where_there_is_no_gpu() -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--only", "vecmat int8"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode != 0
    assert "there is no GPU" in ran.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_benchmark_times_torch_and_ours_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "gpu.csv"
    ours = "vecmat int8,vecmat int4,vecmat fp8,vecmat bf16,torch bf16"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--shapes", "512x256", "--m", "1,3", "--rounds", "1",
               "--pool", "1", "--only", ours, "--out", str(file)]  # fmt: skip
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {(row["contender"], row["m"]) for row in rows} == {(name, m) for name in ours.split(",") for m in "13"}
    assert all(float(row["us"]) > 0 and float(row["probe_gbs"]) > 0 for row in rows)
    assert "int4 / F.linear bf16" in ran.stdout


def test_the_gpu_table_counts_its_columns_marks_what_is_less_than_wanted_and_tells_lost_dense_cells() -> None:
    import gpu_table

    def of(contender: str, us: float, m: int = 1, share: float = 0.5) -> dict[str, Any]:
        return {**cell(contender, us, m, "bf16 x"), "share": share, "weight_bytes": 1e8}

    rows = [of("torch bf16", 30.0), of("vecmat int4", 10.0, share=0.69), of("vecmat int8", 16.0, share=0.86),
            of("Humming W4A16", 12.0), of("torch bf16", 30.0, 8), of("vecmat int4", 15.0, 8),
            of("vecmat bf16", 31.0, 8)]  # fmt: skip
    told = gpu_table.table(rows)
    lines = {line[:42].strip(): line[42:].split() for line in told.splitlines()}
    assert lines["int4 / F.linear bf16"][:4] == ["3.00", "(3.00)", "2.00", "(2.70!)"]
    assert lines["int4 / Humming W4A16"][:2] == ["1.20", "(1.35!)"]
    assert lines["int8 / F.linear bf16"][:2] == ["1.88", "(2.00!)"]
    assert "69%  !" in told
    assert "86%" in told
    assert "86%  !" not in told
    assert "dense cells under 0.98 of F.linear: 1 of 1" in told


@pytest.mark.skipif(not native().isa, reason="vecmat was installed without its CPU library")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_read_probe_reads_every_word(threads: int) -> None:
    words = torch.arange(1, 4097, dtype=torch.int32)
    assert native().read(words.data_ptr(), words.nbytes, threads) == int(words.sum())


@pytest.mark.skipif(not native().isa, reason="vecmat was installed without its CPU library")
def test_the_rate_probe_tells_how_much_it_did() -> None:
    for kind in range(3):
        one = native().operations(kind, 1000, 1)
        assert one > 1000
        assert native().operations(kind, 2000, 2) == 4 * one
