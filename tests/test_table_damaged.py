"""Tables that are damaged, hostile or out of reach: one warning, nothing lost, and the product stays right."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vecmat
from cases import here
from vecmat import table, tables
from vecmat.dispatch import choose
from vecmat.kernels import registry
from vecmat.problem import Format, Problem
from vecmat.settings import forget_plans
from vecmat.table import Row

HERE = here("cpu")
PROBLEM = Problem(m=1, n=64, k=128, x="bf16", weight=Format("bf16"), out="bf16")
KEY = PROBLEM.key()
ROW = Row(kernel="fallback", kernel_version=1, config={"widen": False}, us=1.5)


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO, errno.EACCES, errno.ENOMEM])
def test_a_table_that_cannot_be_read_just_now_is_not_set_aside(error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tables.save("d", {KEY: ROW})

    def fail(*_: object, **__: object) -> bytes:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.warns(vecmat.VecmatWarning, match="could not be written") as told:
            assert not tables.save("d", {"another": ROW})
        assert len(told) == 1
    assert tables.save("d", {"another": ROW})
    assert set(tables.load(tables.path("d"), "d").rows) == {KEY, "another"}


def test_two_corrupt_tables_in_a_row_are_both_kept() -> None:
    file = tables.path("d")
    file.parent.mkdir(parents=True)
    for broken in ("{ first", "{ second"):
        file.write_text(broken)
        with pytest.warns(vecmat.VecmatWarning, match=r"d\.json could not be merged and was set aside as d\.") as told:
            assert tables.save("d", {KEY: ROW})
        assert len(told) == 1
    kept = {p.read_text() for p in file.parent.iterdir() if p.suffix == ".corrupt"}
    assert kept == {"{ first", "{ second"}


def right() -> None:
    """The product is right, by the table's choice and without one."""
    x, w = torch.randn(1, 128).bfloat16(), torch.randn(64, 128).bfloat16()
    torch.testing.assert_close(vecmat.matmul(x, w), x @ w.t(), rtol=0.02, atol=0.1)
    weight = vecmat.quantize(torch.ones(64, 128), "int8")
    torch.testing.assert_close(vecmat.matmul(torch.ones(1, 128), weight), torch.full((1, 64), 128.0), rtol=1e-3, atol=0)


def right_three_times() -> None:
    """As ``right``, with every plan chosen anew."""
    for _ in range(3):
        right()
        forget_plans()


def content(**changes: object) -> bytes:
    whole = {"schema": 1, "device": HERE.name, "versions": table.versions(), "rows": {KEY: table._plain(ROW)}}
    return json.dumps({**whole, **changes}).encode()


def with_row(**changes: object) -> bytes:
    return content(rows={KEY: {**table._plain(ROW), **changes}})


class Executed:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.system, ("touch executed",)


UNUSABLE: dict[str, bytes] = {
    "truncated": content()[:-30],
    "zeros after a power cut": bytes(4096),
    "not UTF-8": b"\xff\xfe" + content(),
    "a pickle": pickle.dumps(Executed()),
    "deep in a row": b'{"schema": 1, "device": "x", "rows": {"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}}",
    "a number of 5000 digits": content().replace(b'"schema": 1', b'"schema": ' + b"1" * 5000),
    "only a string": b'"rows"',
    "schema as text": content(schema="1"),
    "NaN us": with_row(us=float("nan")),
    "infinite us": with_row(torch_us=float("inf")),
    "negative us": with_row(us=-1.0),
    "us of 400 digits": with_row(us=10**400),
    "us as a flag": with_row(us=True),
    "a path for us": with_row(us="/etc/passwd"),
    "code for tried": with_row(tried="__import__('os').system('touch executed')"),
    "a path for the version": with_row(kernel_version="../../1"),
    "nested config": with_row(config={"widen": {"widen": True}}),
    "null in the config": with_row(config={"widen": None}),
    "stale as text": with_row(stale="yes"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_table_that_lies_costs_one_warning_in_a_process_and_no_more(
    what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tables.path(HERE.name)
    file.parent.mkdir(parents=True)
    file.write_bytes(UNUSABLE[what])
    with pytest.warns(vecmat.VecmatWarning) as told:
        right_three_times()
    assert len(told) == 1, [str(w.message) for w in told]
    assert str(file) in str(told[0].message)
    assert "delete it" in str(told[0].message)
    assert choose(PROBLEM, HERE).decided_by == "lowest estimate"
    assert not (tmp_path / "executed").exists()
    assert file.read_bytes() == UNUSABLE[what], "reading changed the file"


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "../../etc/passwd"},
        {"kernel": "os.system"},
        {"kernel": ""},
        {"kernel": "triton_dense", "config": {"BLOCK_N": 1 << 40, "BLOCK_K": -1}},
        {"kernel": "torch_dense", "config": {"widen": True}},
        {"config": {"widen": "__import__('os').system('touch executed')"}},
        {"config": {}},
        {"config": {"widen": 10**100}},
        {"kernel_version": -1},
        {"kernel_version": 10**100},
    ],
)
def test_a_row_that_could_not_run_is_passed_over_in_silence(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tables.path(HERE.name)
    file.parent.mkdir(parents=True)
    file.write_bytes(with_row(**changes))
    right()
    assert choose(PROBLEM, HERE).decided_by == "lowest estimate"
    assert not (tmp_path / "executed").exists()


def test_a_table_of_100_megabytes_is_not_read() -> None:
    file = tables.path(HERE.name)
    file.parent.mkdir(parents=True)
    with file.open("wb") as out:
        out.write(content()[:-2] + b", ")
        out.truncate(100 << 20)
    began = time.monotonic()
    with pytest.warns(vecmat.VecmatWarning, match="larger than 64 MiB and ignored; delete it") as told:
        right()
    assert len(told) == 1
    assert time.monotonic() - began < 20
    with pytest.warns(vecmat.VecmatWarning, match="set aside as"):
        assert tables.save(HERE.name, {KEY: ROW})
    assert tables.load(file, HERE.name).rows == {KEY: ROW}


def test_a_table_that_is_no_file_is_ignored() -> None:
    file = tables.path(HERE.name)
    file.parent.mkdir(parents=True)
    makers: dict[str, Callable[[], object]] = {
        "a folder": file.mkdir,
        "a pipe": lambda: os.mkfifo(file),
        "zeros without end": lambda: file.symlink_to("/dev/zero"),
        "a link to itself": lambda: file.symlink_to(file),
    }
    for what, make in makers.items():
        make()
        table.user_table.cache_clear()
        forget_plans()
        with pytest.warns(vecmat.VecmatWarning) as told:
            right()
        assert len(told) == 1, what
        assert str(file) in str(told[0].message), what
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert tables.save(HERE.name, {KEY: ROW}), what
        assert len(told) <= 1, what
        assert tables.load(file, HERE.name).rows == {KEY: ROW}, what
        file.unlink()


def test_a_link_to_nothing_is_an_absent_table(tmp_path: Path) -> None:
    file = tables.path(HERE.name)
    file.parent.mkdir(parents=True)
    file.symlink_to(tmp_path / "gone")
    right()


def test_a_folder_that_cannot_be_is_absent_for_reading_and_one_warning_for_writing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VECMAT_CACHE_DIR", str(tmp_path / "file" / "below"))
    right()  # no warning: pytest makes each an error
    with pytest.warns(vecmat.VecmatWarning, match=r"could not be written .*; set VECMAT_CACHE_DIR") as told:
        assert not tables.save(HERE.name, {KEY: ROW})
    assert len(told) == 1


@pytest.mark.parametrize("what", ["a folder", "a link to itself"])
def test_a_lock_file_that_cannot_be_opened_costs_one_warning(what: str) -> None:
    tables.save("d", {KEY: ROW})
    lock = Path(f"{tables.path('d')}.lock")
    lock.unlink()
    if what == "a folder":
        lock.mkdir()
    else:
        lock.symlink_to(lock)
    with pytest.warns(vecmat.VecmatWarning, match=r"d\.json could not be written") as told:
        assert not tables.save("d", {"another": ROW})
    assert len(told) == 1
    assert tables.load(tables.path("d"), "d").rows == {KEY: ROW}


def test_that_a_table_cannot_be_written_is_told_once_until_it_can() -> None:
    lock = tables.path("d").with_name("d.json.lock")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        lock.mkdir(parents=True)
        assert [tables.save("d", {KEY: ROW}) for _ in range(3)] == [False] * 3
        lock.rmdir()
        assert tables.save("d", {KEY: ROW})
        lock.unlink()
        lock.mkdir()
        assert [tables.save("d", {KEY: ROW}) for _ in range(3)] == [False] * 3
    assert len(told) == 2
    assert str(told[0].message) == str(told[1].message)


def test_rows_keep_their_age_when_the_table_is_written_again() -> None:
    old, new = KEY, KEY.replace("m1 ", "m2 ")
    torch_dense = Row(kernel="torch_dense", kernel_version=registry()[0]["torch_dense"].version, config={}, us=1.0)
    tables.save(HERE.name, {old: torch_dense})
    file = tables.path(HERE.name)
    file.write_text(file.read_text().replace(f'"vecmat": "{vecmat.__version__}"', '"vecmat": "0.0.1"'))
    table.user_table.cache_clear()
    tables.save(HERE.name, {new: torch_dense})
    tables.save(HERE.name, {new: torch_dense})
    assert choose(PROBLEM, HERE).decided_by == f"your table, measured with other versions: {file}"
    assert choose(dataclasses.replace(PROBLEM, m=2), HERE).decided_by == f"your table: {file}"
    tables.save(HERE.name, {old: torch_dense})
    assert choose(PROBLEM, HERE).decided_by == f"your table: {file}"


def test_a_process_that_cannot_find_a_home_still_multiplies() -> None:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("VECMAT_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME")
    }
    environment |= {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache"}
    code = "import torch, vecmat; print(vecmat.matmul(torch.ones(1, 4), torch.ones(2, 4)).tolist())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env=environment,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[[4.0, 4.0]]\n", "")
