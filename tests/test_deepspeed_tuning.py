"""DeepSpeed's autotuning: layer zero measures each bucket of the lengths once, and the table that it writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Iterator

import pytest
import torch

import vecmat
from cases import ROUNDING, far
from vecmat import dispatch, table
from vecmat.deepspeed import (
    BaseOp,
    DeepSpeedInferenceConfig,
    Fp16Matmul,
    VectorMatMulOp,
    autotune_lengths,
    matmul,
)
from vecmat.device import Device
from vecmat.problem import bucket
from vecmat.settings import forget_plans

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_inference_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseOp, "inference_module", None)


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """An empty folder for tables; forget() is what a second process starts with."""

    def forget() -> None:
        table.user_table.cache_clear()
        forget_plans()
        Fp16Matmul._measured.clear()

    monkeypatch.setenv("VECMAT_CACHE_DIR", str(tmp_path))
    forget()
    yield types.SimpleNamespace(folder=tmp_path, forget=forget)
    forget()


@pytest.mark.parametrize(
    ("least", "most"), [(2, 1024), (2, 2), (2, 33), (2, 34), (2, 35), (1, 64), (2, 1), (128, 2048)]
)
def test_the_lengths_are_deepspeeds(least, most):
    stride = Fp16Matmul._cache_stride
    assert stride == 32
    assert autotune_lengths(least, most) == [least + i for i in range(0, most - least + stride + 1, stride)]


def layer(layer_id: int, **changes) -> DeepSpeedInferenceConfig:
    config = DeepSpeedInferenceConfig(hidden_size=64, max_out_tokens=70, use_triton=True, **changes)
    config.layer_id = layer_id
    return config


def rows_on_disk() -> dict[str, table.Row]:
    name = Device.of(torch.device("cuda") if torch.cuda.is_available() else CPU).name
    found = table.load(table.path(name), name)
    return {} if found is None else dict(found.rows)


def test_layer_zero_measures_each_bucket_of_the_lengths_and_writes_the_table(tables):
    VectorMatMulOp(layer(0, triton_autotune=True))
    rows = rows_on_disk()
    buckets = {bucket(m) for m in autotune_lengths(2, 70)}
    assert set(rows) == {f"m{m} n64 k64 x=fp16 w=fp16 o=fp16 kn" for m in buckets}
    for row in rows.values():
        assert row.us > 0
        assert row.tried >= 1
        assert row.failed == 0
        assert row.torch_us is None or row.us <= row.torch_us
    if not torch.cuda.is_available():
        plan = vecmat.explain(torch.ones(40, 64).half(), torch.ones(64, 64).half(), layout="kn").plan
        assert plan.decided_by.startswith("your table")
        assert plan.kernel.name == rows[plan.problem.key()].kernel


@pytest.mark.parametrize(("layer_id", "autotune"), [(0, False), (1, True), (-1, True)])
def test_only_layer_zero_tunes_and_only_when_asked(tables, layer_id, autotune):
    VectorMatMulOp(layer(layer_id, triton_autotune=autotune))
    assert not list(tables.folder.iterdir())


def test_a_second_process_finds_everything_and_writes_nothing(tables):
    VectorMatMulOp(layer(0, triton_autotune=True))
    (file,) = tables.folder.glob("*.json")
    before = file.stat()
    code = (
        "from vecmat import deepspeed as d;"
        "c = d.DeepSpeedInferenceConfig(hidden_size=64, max_out_tokens=70, use_triton=True, triton_autotune=True);"
        f"import torch; torch.set_num_threads({torch.get_num_threads()});"
        "c.layer_id = 0; d.VectorMatMulOp(c)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    after = file.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_a_row_of_another_kernel_version_is_measured_again(tables):
    VectorMatMulOp(layer(0, triton_autotune=True))
    rows = rows_on_disk()
    key, row = next(iter(rows.items()))
    name = Device.of(torch.device("cuda") if torch.cuda.is_available() else CPU).name
    old = table.Row(kernel=row.kernel, kernel_version=row.kernel_version - 1, config=row.config, us=1e-9)
    assert table.save(name, {key: old})
    VectorMatMulOp(layer(0, triton_autotune=True))
    again = rows_on_disk()
    assert again[key].us > 1e-9
    assert {k: r for k, r in again.items() if k != key} == {k: r for k, r in rows.items() if k != key}


def test_the_table_is_read_before_and_written_after(tables, monkeypatch):
    order = []
    for name in ("_read_autotune_table", "_warm_up", "_update_autotune_table"):
        real = getattr(Fp16Matmul, name)
        monkeypatch.setattr(
            Fp16Matmul, name, staticmethod(lambda *args, name=name, real=real: (order.append(name), real(*args))[1])
        )
    VectorMatMulOp._triton_autotune(2, 2, 16)
    assert order[0] == "_read_autotune_table"
    assert order[-1] == "_update_autotune_table"
    assert order[1:-1] == ["_warm_up"] * 2  # lengths 2 and 34


def test_the_row_is_the_fastest_right_kernel(tables):
    matmul(torch.randn(3, 64).half(), torch.randn(64, 64).half(), update_autotune_table=True)
    name = Device.of(CPU).name
    (row,) = table.load(table.path(name), name).rows.values()
    problem, device = vecmat.ops.bind_problem(torch.ones(3, 64).half(), torch.ones(64, 64).half(), layout="kn")
    assert row.failed == 0
    assert row.tried >= 1
    assert dict(row.config) in map(dict, dispatch.registry()[0][row.kernel].configs(problem, device))


def test_torchs_path_where_it_is_hopeless_is_timed_by_a_few_columns_only(tables, monkeypatch):
    from vecmat.kernels.torch_dense import TorchDense

    bind, columns = TorchDense.bind, set()

    def slow(self, problem, device, config):
        run = bind(self, problem, device, config)

        def wait(x, weight, bias):
            columns.add(problem.n)
            time.sleep(0.1)
            return run(x, weight, bias)

        return wait

    monkeypatch.setattr(TorchDense, "estimate_us", lambda self, problem, device, config: 1e6)
    monkeypatch.setattr(TorchDense, "bind", slow)
    VectorMatMulOp._triton_autotune(2, 2, 64)
    assert "torch_dense" not in {row.kernel for row in rows_on_disk().values()}
    assert columns
    assert max(columns) < 64


def test_a_wrong_kernel_is_counted_and_never_recorded(tables, monkeypatch):
    from vecmat.kernels.torch_dense import TorchDense

    def wrong(self, problem, device, config):
        return lambda x, weight, bias: torch.zeros(*x.shape[:-1], problem.n, dtype=x.dtype)

    monkeypatch.setattr(TorchDense, "bind", wrong)  # the fastest there could be
    matmul(torch.randn(3, 64), torch.randn(64, 64), update_autotune_table=True)
    name = Device.of(CPU).name
    (row,) = table.load(table.path(name), name).rows.values()
    assert row.kernel != "torch_dense"
    assert row.failed >= 1
    assert row.torch_us is None


def test_a_table_that_cannot_be_written_does_not_fail_the_constructor(tables):
    name = Device.of(torch.device("cuda") if torch.cuda.is_available() else CPU).name
    lock = tables.folder / f"{table.path(name).name}.lock"
    lock.mkdir()  # nobody can lock the table now, not even root
    with pytest.warns(vecmat.VecmatWarning, match="could not be written"):
        op = VectorMatMulOp(layer(0, triton_autotune=True))
    x, weight = torch.randn(3, 64).half(), torch.randn(64, 64).half()
    assert far(op(x, weight), x.double() @ weight.double()) < ROUNDING[torch.float16]
    lock.rmdir()
    Fp16Matmul._update_autotune_table()  # what was measured is not lost
    assert len(rows_on_disk()) == len({bucket(m) for m in autotune_lengths(2, 70)})


def test_tuning_leaves_the_callers_random_numbers_alone(tables):
    before = torch.get_rng_state()
    VectorMatMulOp(layer(0, triton_autotune=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_tuning_without_a_hidden_size_raises():
    config = DeepSpeedInferenceConfig(use_triton=True, triton_autotune=True)
    config.layer_id = 0
    with pytest.raises(ValueError, match="hidden_size is -1"):
        VectorMatMulOp(config)


def test_matmul_writes_the_table_only_when_asked(tables):
    a, b = torch.randn(3, 64).half(), torch.randn(64, 64).half()
    matmul(a, b)
    assert not list(tables.folder.iterdir())
    matmul(a, b, update_autotune_table=True)
    name = Device.of(CPU).name
    assert list(table.load(table.path(name), name).rows) == ["m3 n64 k64 x=fp16 w=fp16 o=fp16 kn"]


def test_the_table_is_text_and_never_a_pickle(tables):
    VectorMatMulOp(layer(0, triton_autotune=True))
    files = [name for name in os.listdir(tables.folder) if not name.endswith(".lock")]
    assert [os.path.splitext(name)[1] for name in files] == [".json"]
    json.loads((tables.folder / files[0]).read_text(encoding="utf-8"))
