"""Tables: text that is read, merged and trusted only as far as it can be used."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import vecmat
from cases import here
from vecmat import table, tables
from vecmat.device import Device
from vecmat.dispatch import choose
from vecmat.kernels import registry
from vecmat.ops import bind_problem, explain_problem
from vecmat.problem import Format, Problem
from vecmat.settings import scope
from vecmat.table import Row

HERE = here("cpu")
KEY = "m1 n64 k128 x=bf16 w=bf16 o=bf16 nk"
PROBLEM = Problem(m=1, n=64, k=128, x="bf16", weight=Format("bf16"), out="bf16")
ROW = Row(kernel="fallback", kernel_version=1, config={"widen": False}, us=1.5, torch_us=2.0, tried=3, failed=1)


def row_of(kernel: str, **changes: object) -> Row:
    """A row that names a kernel and a config it has here."""
    found = registry()[0][kernel]
    config = dict(list(found.configs(PROBLEM, HERE))[-1])
    return Row(**{"kernel": kernel, "kernel_version": found.version, "config": config, **changes})


def test_rows_come_back_as_they_were_saved() -> None:
    rows = {
        KEY: ROW,
        "m2 n64 k128 x=fp16 w=int4:g32:zp o=fp32 nk bias": row_of("fallback", config={}),
        "m3 n64 k128 x=fp16 w=fp16 o=fp16 kn": row_of("fallback", torch_over_us=99.5),
    }
    assert tables.save("A device (R), 2.5 GHz", rows)
    file = tables.path("A device (R), 2.5 GHz")
    assert file.parent == Path(os.environ["VECMAT_CACHE_DIR"])
    loaded = tables.load(file, "A device (R), 2.5 GHz")
    assert loaded is not None
    assert loaded.rows == rows
    assert file.read_text().count("torch_over_us") == 1
    assert not loaded.stale
    assert loaded.find("A device (R), 2.5 GHz", KEY) == ROW
    assert loaded.find("another device", KEY) is None


def test_saving_merges_sorts_and_writes_a_row_a_line() -> None:
    keys = [f"m{m} n64 k128 x=bf16 w=bf16 o=bf16 nk" for m in (8, 1, 5)]
    tables.save("d", {keys[0]: ROW})
    tables.save("d", {keys[1]: ROW, keys[2]: ROW})
    tables.save("d", {keys[0]: row_of("fallback", us=9.0)})
    text = tables.path("d").read_text()
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert [line.split('"')[1] for line in lines] == sorted(keys)
    assert json.loads(text)["rows"][keys[0]]["us"] == 9.0
    assert json.loads(text)["versions"]["torch"] == torch.__version__.split("+")[0]
    assert sorted(p.name for p in tables.path("d").parent.iterdir() if p.suffix != ".lock") == ["d.json"]


def whole(**changes: object) -> str:
    content = {"schema": 1, "device": "d", "versions": table.versions(), "rows": {KEY: table._plain(ROW)}}
    return json.dumps({**content, **changes})


def bad_row(**changes: object) -> dict[str, object]:
    return {KEY: {**table._plain(ROW), **changes}}


UNUSABLE = {
    "truncated": (whole()[:-20].encode(), "it is not JSON"),
    "empty": (b"", "it is not JSON"),
    "binary": (bytes(range(256)), "cannot be read"),
    "nested": (b"[" * 100_000, "it is not JSON"),
    "a list": (b"[]", "it has no rows"),
    "rows as a list": (whole(rows=[]).encode(), "it has no rows"),
    "another schema": (whole(schema=2).encode(), "its schema is 2 and this version reads 1"),
    "no schema": (whole(schema=None).encode(), "its schema is None"),
    "no device": (whole(device=None).encode(), "it names no device"),
    "another device": (whole(device="e").encode(), "is for 'e', not 'd'"),
    "kernel of a wrong type": (whole(rows=bad_row(kernel=7)).encode(), "1 rows have wrong types"),
    "version of a wrong type": (whole(rows=bad_row(kernel_version="1")).encode(), "1 rows have wrong types"),
    "config of a wrong type": (whole(rows=bad_row(config=[1])).encode(), "1 rows have wrong types"),
    "config with a float": (whole(rows=bad_row(config={"widen": 0.5})).encode(), "1 rows have wrong types"),
    "time of a wrong type": (whole(rows=bad_row(us="fast")).encode(), "1 rows have wrong types"),
    "a row that is no object": (whole(rows={KEY: 3}).encode(), "1 rows have wrong types"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_what_cannot_be_used_is_ignored_with_one_warning_that_names_the_file(what: str) -> None:
    content, message = UNUSABLE[what]
    file = tables.path("d")
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.warns(vecmat.VecmatWarning) as told:
        plans = [choose(PROBLEM, device_named("d")) for _ in range(3)]
    assert len(told) == 1, [str(w.message) for w in told]
    assert message in str(told[0].message)
    assert str(file) in str(told[0].message)
    assert plans[0].decided_by == "lowest estimate"


def device_named(name: str) -> Device:
    """This CPU under another name."""
    return dataclasses.replace(HERE, name=name)


def test_a_file_that_is_too_large_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.save("d", {KEY: ROW})
    monkeypatch.setattr(table, "_MOST_BYTES", 100)
    with pytest.warns(vecmat.VecmatWarning, match=r"d.json is larger than 0 MiB and ignored; delete it"):
        assert tables.load(tables.path("d"), "d") is None


def test_saving_over_a_corrupt_file_sets_it_aside_and_says_so() -> None:
    file = tables.path("d")
    file.parent.mkdir(parents=True)
    file.write_text("{ broken")
    with pytest.warns(vecmat.VecmatWarning) as told:
        assert tables.save("d", {KEY: ROW})
    assert any("set aside as d." in str(w.message) for w in told)
    assert tables.load(file, "d").rows == {KEY: ROW}
    aside = [p for p in file.parent.iterdir() if p.suffix == ".corrupt"]
    assert [p.read_text() for p in aside] == ["{ broken"]


def test_a_folder_that_cannot_be_written_gives_one_warning_and_the_product_still_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "below", Path("/proc/none")):
        monkeypatch.setenv("VECMAT_CACHE_DIR", str(folder))
        with pytest.warns(vecmat.VecmatWarning, match=r"could not be written .*; set VECMAT_CACHE_DIR") as told:
            assert not tables.save(HERE.name, {KEY: ROW})
        assert len(told) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", vecmat.VecmatWarning)  # that the table cannot be read may be said, too
            assert vecmat.matmul(torch.ones(1, 4), torch.ones(2, 4)).tolist() == [[4, 4]]


def test_a_write_that_fails_half_way_leaves_the_old_table(monkeypatch: pytest.MonkeyPatch) -> None:
    tables.save("d", {KEY: ROW})
    before = tables.path("d").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(vecmat.VecmatWarning, match="No space left on device"):
        assert not tables.save("d", {"another": ROW})
    assert tables.path("d").read_bytes() == before
    assert not [p for p in tables.path("d").parent.iterdir() if p.suffix == ".tmp"]


def test_the_ladder_is_overlay_then_your_table_then_the_shipped_one_then_the_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decided() -> str:
        return choose(PROBLEM, HERE).decided_by

    def shipped_or_none(name: str) -> table.Table | None:
        return table.Table(name, {KEY: row_of("fallback")}, "shipped with vecmat: it.json")

    assert decided() == "lowest estimate"
    monkeypatch.setattr(table, "shipped_table", shipped_or_none)
    assert decided() == "shipped table: shipped with vecmat: it.json"
    tables.save(HERE.name, {KEY: row_of("torch_dense")})
    assert decided() == f"your table: {tables.path(HERE.name)}"
    assert choose(PROBLEM, HERE).kernel.name == "torch_dense"
    with tables.use({KEY: row_of("fallback")}, device=HERE.name):
        plan = choose(PROBLEM, HERE)
        assert (plan.kernel.name, dict(plan.config)) == ("fallback", dict(row_of("fallback").config))
        assert plan.decided_by == "overlay: tables.use"
        assert choose(PROBLEM, HERE, kernel="torch_dense").decided_by == "asked for by name"
        with tables.use({}, device=HERE.name):
            assert decided().startswith("your table")  # an overlay replaces the one around it
    with tables.use({KEY: row_of("fallback")}, device="another device"):
        assert decided().startswith("your table")
    assert decided().startswith("your table")
    assert "your table" in str(explain_problem(PROBLEM, HERE))


def test_matmul_follows_the_table_at_once() -> None:
    x, w = torch.ones(1, 128, dtype=torch.bfloat16), torch.ones(64, 128, dtype=torch.bfloat16)
    assert bind_problem(x, w)[0].key() == KEY
    vecmat.matmul(x, w)  # a plan is remembered by now
    for kernel in ("fallback", "torch_dense"):
        tables.save(HERE.name, {KEY: row_of(kernel)})
        assert vecmat.explain(x, w).plan.kernel.name == kernel
        vecmat.matmul(x, w)
        assert {plan.kernel.name for plan in scope().plans.values()} == {kernel}


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel_version": 99},
        {"config": {"widen": 3}},
        {"config": {}},
        {"config": {"BLOCK": 16}},
        {"kernel": "no_such_kernel"},
        {"kernel": "torch_int4"},
    ],
)
def test_a_row_that_names_what_is_not_there_or_cannot_run_is_passed_over(changes: dict[str, object]) -> None:
    tables.save(HERE.name, {KEY: dataclasses.replace(row_of("fallback"), **changes)})
    assert choose(PROBLEM, HERE).decided_by == "lowest estimate"


def test_a_row_of_other_versions_is_used_and_marked() -> None:
    tables.save(HERE.name, {KEY: row_of("fallback")})
    file = tables.path(HERE.name)
    file.write_text(file.read_text().replace(f'"torch": "{torch.__version__.split("+")[0]}"', '"torch": "2.0.0"'))
    table.user_table.cache_clear()
    assert choose(PROBLEM, HERE).decided_by == f"your table, measured with other versions: {file}"


def test_a_table_file_can_be_used_for_a_block_of_code(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    tables.save(HERE.name, {KEY: row_of("fallback")}, file)
    with tables.use(file):
        assert choose(PROBLEM, HERE).decided_by == f"overlay: {file}"
    file.write_text("nothing")
    with pytest.raises(ValueError, match=r"table .*mine.json cannot be used: it is not JSON"):
        tables.use(file)
    with pytest.raises(ValueError, match=r"none.json cannot be read"):
        tables.use(tmp_path / "none.json")


@pytest.mark.parametrize("wrong", [{"kernel": "fallback"}, None, "fallback", [ROW]])
def test_rows_of_an_overlay_must_be_rows(wrong: object) -> None:
    with pytest.raises(TypeError, match=rf"tables.use: source\['{KEY}'\] is {type(wrong).__name__}; expected a Row"):
        tables.use({"m2 n1 k1": ROW, KEY: wrong}, device="d")  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"tables.use: source\[7\] is Row; expected a Row by problem key"):
        tables.use({7: ROW}, device="d")  # type: ignore[dict-item]


def linked(target: Path) -> Path:
    """The user's table of a device "d", a link to the target."""
    file = tables.path("d")
    file.parent.mkdir(parents=True)
    file.symlink_to(target)
    return file


def test_a_table_behind_a_link_is_written_and_the_link_stays(tmp_path: Path) -> None:
    target = tmp_path / "shared" / "ours.json"
    tables.save("d", {"theirs": ROW}, target)
    target.chmod(0o664)
    between = tmp_path / "between.json"
    between.symlink_to(target)
    file = linked(between)
    for key in (KEY, "another"):
        assert tables.save("d", {key: ROW})
    assert file.is_symlink()
    assert between.is_symlink()
    assert not target.is_symlink()
    assert set(json.loads(target.read_text())["rows"]) == {"theirs", KEY, "another"}
    assert target.stat().st_mode & 0o777 == 0o664, "others cannot read it any more"
    assert set(tables.load(file, "d").rows) == {"theirs", KEY, "another"}
    assert [p.name for p in file.parent.iterdir()] == ["d.json"]
    assert sorted(p.name for p in target.parent.iterdir()) == ["ours.json", "ours.json.lock"]


def test_a_table_behind_a_link_that_leads_nowhere_yet_is_made(tmp_path: Path) -> None:
    file = linked(tmp_path / "not" / "yet.json")
    assert tables.save("d", {KEY: ROW})
    assert file.is_symlink()
    assert tables.load(tmp_path / "not" / "yet.json", "d").rows == {KEY: ROW}


@pytest.mark.parametrize("content", ["important, and no table", whole(device="another")])
def test_what_a_link_leads_to_is_left_alone_where_it_is_no_table_of_the_device(content: str, tmp_path: Path) -> None:
    (tmp_path / "it").write_text(content)
    file = linked(tmp_path / "it")
    with pytest.warns(vecmat.VecmatWarning, match=r"d\.json could not be merged and was set aside as d\.") as told:
        assert tables.save("d", {KEY: ROW})
    assert len(told) == 1
    assert (tmp_path / "it").read_text() == content
    assert not file.is_symlink()
    assert tables.load(file, "d").rows == {KEY: ROW}


def test_a_table_is_written_to_a_pipe_that_is_there_and_does_not_replace_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        table.write(pipe, "d", {KEY: ROW})
        assert json.loads(os.read(reader, 1 << 16))["device"] == "d"
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_the_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VECMAT_CACHE_DIR", "TRITON_CACHE_DIR", "TRITON_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert table.folder().name == "vecmat"
    monkeypatch.setenv("TRITON_HOME", "/home/t")
    assert table.folder() == Path("/home/t/autotune/vecmat")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/cache")
    assert table.folder() == Path("/cache/vecmat")
    monkeypatch.setenv("VECMAT_CACHE_DIR", "/own")
    assert table.folder() == Path("/own")
    assert table.path("NVIDIA H200").name == "NVIDIA_H200.json"
    assert table.path("../../etc/passwd").parent == Path("/own")


def test_every_device_has_a_file_of_its_own() -> None:
    names = [
        "NVIDIA H200", "NVIDIA_H200", "NVIDIA  H200", "NVIDIA H200 ", " NVIDIA H200", "NVIDIA/H200", "NVIDIA-H200",
        "NVIDIA__H200", "", " ", "_", "..", "unnamed", "Größe", "Grösse", "x" * 100, "x" * 101, "x" * 300,
        "x" * 299 + "y", "a\ud800", "Intel(R) Xeon(R) CPU @ 2.20GHz avx512 4 threads",
        "Intel R Xeon R CPU 2.20GHz avx512 4 threads",
    ]  # fmt: skip
    names.append(tables.path("NVIDIA/H200").stem)  # a device that is called as another one's file
    names.append(tables.path("NVIDIA/H200").stem.replace("_", " "))
    files = [tables.path(name) for name in names]
    assert len(set(files)) == len(names)
    assert {file.parent for file in files} == {table.folder()}
    assert max(len(file.name) for file in files) < 200
    assert tables.path("NVIDIA H200").name == "NVIDIA_H200.json"
    assert tables.path("AMD EPYC avx2 2 threads").name == "AMD_EPYC_avx2_2_threads.json"
    for name in names:
        assert tables.save(name, {KEY: ROW})
    assert [tables.load(file, name).device for file, name in zip(files, names, strict=True)] == names


def test_shipped_tables_are_well_formed() -> None:
    folder = Path(table.__file__).parent / "tables"
    for file in folder.glob("*.json"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if "rows" not in content:
            continue  # workloads.json
        parsed = table._parse(file.read_text(encoding="utf-8"), file.name)
        assert isinstance(parsed, table.Table), parsed
        assert table._file_name(parsed.device) == file.stem
        assert list(content["rows"]) == sorted(content["rows"])


SAVER = """
import sys
from vecmat import tables
name, count = sys.argv[1], int(sys.argv[2])
row = tables.Row(kernel="fallback", kernel_version=1, config={"widen": True}, us=1.0)
for i in range(count):
    assert tables.save("d", {f"{name} row {i}": row})
"""


def test_processes_that_save_at_once_lose_no_row() -> None:
    tables.save("d", {KEY: ROW})
    running = [subprocess.Popen([sys.executable, "-c", SAVER, name, "15"]) for name in ("one", "two", "three")]
    assert [process.wait(timeout=200) for process in running] == [0, 0, 0]
    loaded = tables.load(tables.path("d"), "d")
    assert loaded is not None
    assert len(loaded.rows) == 46


def test_a_process_killed_while_it_writes_leaves_a_whole_table() -> None:
    tables.save("d", {KEY: ROW})
    chance = random.Random(5)
    process = subprocess.Popen([sys.executable, "-c", SAVER, "killed", "100000"])
    for _ in range(400):
        if process.poll() is not None or "killed" in tables.path("d").read_text():
            break
        time.sleep(0.05)
    time.sleep(chance.uniform(0.01, 0.1))
    process.kill()
    process.wait(timeout=60)
    loaded = tables.load(tables.path("d"), "d")
    assert loaded is not None
    assert KEY in loaded.rows
    assert tables.save("d", {"after": ROW}), "the lock of a dead process was not freed"


def test_explain_shows_the_row_that_decided() -> None:
    row = Row(kernel="fallback", kernel_version=1, config=row_of("fallback").config, us=12.5, torch_us=20.0, tried=3)
    with tables.use({KEY: row}, device=HERE.name):
        told = str(explain_problem(PROBLEM, HERE))
    assert "the row: it 12.5 us, torch 20.0 us; 3 tried, 0 failed" in told
    stopped = dataclasses.replace(row, torch_us=None, torch_over_us=50.0)
    with tables.use({KEY: stopped}, device=HERE.name):
        assert "the row: it 12.5 us, torch over 50.0 us; 3 tried" in str(explain_problem(PROBLEM, HERE))
    assert "the row" not in str(explain_problem(PROBLEM, HERE))
