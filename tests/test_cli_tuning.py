"""``vecmat tune``, ``bench`` and ``table``: what they write, what they print, and how they say no."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cases import here
from vecmat import bench, measure, table, tables, tuner
from vecmat.bench import Sampler
from vecmat.cli import main
from vecmat.device import KNOWN
from vecmat.problem import Format, Problem
from vecmat.table import Row

NAME = here("cpu").name
KEY = "m1 n24 k40 x=bf16 w=int8 o=bf16 nk"
ROW = Row(kernel="fallback", kernel_version=1, config={"widen": True}, us=5.0, torch_us=6.0, tried=2)
CPU = ["--device", "cpu"]


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    code = main([*argv, *CPU])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("vecmat: error: ")
    assert err.count("\n") == 1, err
    return err


def rows() -> set[str]:
    found = tables.load(tables.path(NAME), NAME)
    return set(found.rows) if found is not None else set()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("tune", ["MODEL", "--budget", "--again", "--shapes", "--workload", "--m", "--weights", "--x", "--device"]),
        ("bench", ["--peers", "--json", "--plot", "--append", "--shapes", "--workload", "--m", "--weights", "--x"]),
        ("table", ["path", "show", "export", "import", "merge", "verify"]),
        ("table path", ["--device"]),
        ("table show", ["--device"]),
        ("table export", ["FILE", "--device"]),
        ("table import", ["FILE", "--device"]),
        ("table merge", ["OUT", "FILE"]),
        ("table verify", ["FILE", "--device"]),
    ],
)
def test_help_mentions_every_option(command: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in words if word not in text] == []


def test_tune_writes_rows_and_a_second_run_tunes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["tune", "--shapes", "40,24", "--m", "1,2", "--weights", "int8,bf16", "--budget", "60"]
    out = said(capsys, *argv)
    keys = {f"m{m} n24 k40 x=bf16 w={fmt} o=bf16 nk" for m in (1, 2) for fmt in ("int8", "bf16")}
    assert rows() == keys
    assert all(key in out for key in keys)
    assert "4 tuned in " in out
    assert out.splitlines()[-1] == str(tables.path(NAME))
    before = tables.path(NAME).read_bytes()
    again = said(capsys, *argv)
    assert "0 tuned in " in again
    assert "4 were in a table already" in again
    assert tables.path(NAME).read_bytes() == before
    tables.save(NAME, {KEY: Row(kernel="fallback", kernel_version=1, config={"widen": True}, us=123456.0)})
    assert "4 tuned in " in said(capsys, *argv, "--again")
    assert tables.load(tables.path(NAME), NAME).rows[KEY].us < 123456


def test_tune_tunes_what_has_a_row_that_decides_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tables.save(NAME, {KEY: dataclasses.replace(ROW, kernel_version=99), KEY.replace("m1 ", "m2 "): ROW})
    out = said(capsys, "tune", "--shapes", "40,24", "--m", "1,2")
    assert "1 tuned in " in out
    assert "1 were in a table already" in out


def test_tune_leaves_what_another_process_tuned_while_it_waited(capsys: pytest.CaptureFixture[str]) -> None:
    table.user_table(NAME, tables.path(NAME))  # read: there is none

    def other(held: threading.Event) -> None:
        with tuner.alone(here("cpu"), 1.0):
            held.set()
            time.sleep(0.5)
            table.write(tables.path(NAME), NAME, {KEY: ROW})  # unlike save, says nothing to this process

    held = threading.Event()
    thread = threading.Thread(target=other, args=(held,))
    thread.start()
    held.wait()
    out = said(capsys, "tune", "--shapes", "40,24", "--m", "1,2")
    thread.join()
    assert "1 tuned in " in out
    assert "1 were in a table already" in out
    assert tables.load(tables.path(NAME), NAME).rows[KEY] == ROW


def test_tune_tells_torchs_time_or_where_it_was_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {1: {"torch_us": 1234.5}, 2: {"torch_us": None, "torch_over_us": 1234.5}, 3: {"torch_us": ROW.us}}

    def known(problem: Problem, *_: object, **__: object) -> tuner.Tuned:
        row = dataclasses.replace(ROW, **times[problem.m])  # type: ignore[arg-type]
        return tuner.Tuned(problem=problem, row=row, trials=[], seconds=0.0)

    monkeypatch.setattr(tuner, "tune", known)
    out = said(capsys, "tune", "--shapes", "40,24", "--m", "1,2,3").splitlines()
    assert [line.partition("  ")[2].strip() for line in out[:3]] == [
        "fallback widen=True 5.0 us, torch 1,234.5 us (2 tried)",
        "fallback widen=True 5.0 us, torch slower than 1,234.5 us, stopped at a slice (2 tried)",
        "fallback widen=True 5.0 us (2 tried)",
    ]
    shown = said(capsys, "table", "show").splitlines()[-3:]
    assert [" ".join(line.split()[8:]) for line in shown] == [
        "widen=True 5.0 1,234.5 your table",
        "widen=True 5.0 > 1,234.5 your table",
        "widen=True 5.0 5.0 your table",
    ]


def test_what_tune_tells_goes_to_stdout_though_a_bar_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # to rich, stderr is a terminal then
    assert main(["tune", "--shapes", "40,24", "--m", "1,2", *CPU]) == 0
    out, err = capsys.readouterr()
    assert [line.split("  ")[0] for line in out.splitlines()[:2]] == [KEY, KEY.replace("m1 ", "m2 ")]
    assert "tried" not in err
    assert "0/2" in err


def test_tune_takes_a_named_workload_and_stops_at_its_budget(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tuner.Tuned(problem=None, row=ROW, trials=[], seconds=0.0)  # type: ignore[arg-type]

    def slow(problem: object, *_: object, **__: object) -> tuner.Tuned:
        time.sleep(0.3)
        return tuner.Tuned(problem=problem, row=tuned.row, trials=[], seconds=0.3)  # type: ignore[arg-type]

    monkeypatch.setattr(tuner, "tune", slow)
    out = said(capsys, "tune", "--workload", "bert-base", "--weights", "int8", "--budget", "0.5")
    assert "2 tuned in " in out
    assert "the budget of 0.5 s is spent, 10 are left" in out
    assert rows() == {f"m16 n{n} k768 x=bf16 w=int8 o=bf16 nk" for n in (768, 3072)}


def test_tune_waits_its_turn(capsys: pytest.CaptureFixture[str]) -> None:
    with tuner.alone(here("cpu"), 1.0):
        told = refused(capsys, "tune", "--shapes", "40,24", "--m", "1", "--budget", "0.2", *CPU)
    assert "another process is tuning this device" in told


@pytest.mark.parametrize("during", ["tuning", "saving"])
def test_tune_keeps_what_was_found_when_interrupted_and_tells_only_that(
    during: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = (tuner, "tune") if during == "tuning" else (table, "save")
    real, calls = getattr(module, name), []

    def interrupted(*args: object, **options: object) -> object:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, name, interrupted)
    out = said(capsys, "tune", "--shapes", "40,24", "--m", "1,2,4")
    assert "1 tuned in " in out
    assert "; interrupted, 2 are left" in out
    assert rows() == {KEY}
    assert "m2 " not in out


def test_ctrl_c_ends_a_real_process_cleanly() -> None:
    ms = ",".join(map(str, range(1, 4000)))
    shapes = [f"256,{n}" for n in range(256, 1024, 16)]  # a minute's work, whatever else the machine does
    process = subprocess.Popen(
        [sys.executable, "-m", "vecmat", "tune", "--shapes", *shapes, "--m", ms, "--budget", "600", *CPU],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ,
    )  # fmt: skip
    folder = tables.path(NAME).parent
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, err) == (0, "")
    assert "; interrupted, " in out
    (file,) = folder.glob("*.json")
    saved = set(tables.load(file, json.loads(file.read_text())["device"]).rows)
    told = {line[:50].strip() for line in (first + out).splitlines() if line.startswith("m")}
    assert told
    assert told <= saved
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("command", ["tune", "bench"])
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no shapes; give --shapes K,N or --workload NAME"),
        (["--workload", "gpt-5"], "workload 'gpt-5' is not known; known are llama-3-8b"),
        (["--shapes", "40"], "'40' is no shape; expected K,N"),
        (["--shapes", "40,x"], "--shapes: 'x' is no number of 1 or more"),
        (["--shapes", "0,8"], "--shapes: '0' is no number of 1 or more"),
        (["--shapes", "40,24", "--m", "1,-2"], "--m: '-2' is no number of 1 or more"),
        (["--shapes", "40,24", "--m", "1,,2"], "--m: '' is no number of 1 or more"),
        (["--shapes", "40,24", "--m", "two"], "--m: 'two' is no number of 1 or more"),
        (["--shapes", "40,24", "--weights", "int5"], "'int5' is not known"),
        (["--shapes", "40,24", "--device", "abacus"], "'abacus' is not known"),
        (["--shapes", "40,24", "--device", "h100"], "NVIDIA H100 80GB HBM3 is not here"),
    ],
)
def test_tune_and_bench_say_what_is_wrong(
    command: str, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(capsys, command, *argv)


@pytest.mark.parametrize("budget", ["0", "-1", "nan"])
def test_tune_refuses_a_budget_of_nothing(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected more than 0 seconds" in refused(capsys, "tune", "--shapes", "40,24", "--budget", budget)


def test_tune_stops_where_nothing_can_be_saved(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VECMAT_CACHE_DIR", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="could not be written"):
        assert "nothing can be saved" in refused(capsys, "tune", "--shapes", "40,24", *CPU)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measurements without large copies."""
    monkeypatch.setattr(measure, "copies_needed", lambda device, nbytes: 2)
    monkeypatch.setattr(measure, "read_probe", lambda device: (Sampler(device, [lambda: time.sleep(1e-3)]), 1 << 20))
    monkeypatch.setattr(measure, "ROUNDS", 3)
    monkeypatch.setattr(bench, "_SAMPLE_US", 200.0)


SMALL = ["bench", "--shapes", "40,24", "--m", "1,2"]


def test_bench_prints_a_table_and_the_mean(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, *SMALL, "--peers", "torch,torch_dense")
    assert out.startswith(f"{NAME}; a read-only stream gave ")
    assert out.count("24 x 40") == 2
    assert "geometric mean against torch: " in out
    assert "geometric mean against torch_dense: nan" in out  # it cannot run int8 weights


def test_bench_json_to_stdout_is_json_and_nothing_else(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capsys, *SMALL, "--json", "-", "--peers", "torch,torch_dense"))
    assert [row["m"] for row in found] == [1, 2]
    assert found[0]["device"] == NAME
    assert found[0]["torch_dense_us"] is None


def test_bench_writes_json_and_appends_to_csv(quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    as_json, as_csv = tmp_path / "it.json", tmp_path / "it.csv"
    for _ in range(2):
        said(capsys, *SMALL, "--json", str(as_json), "--append", str(as_csv))
    assert len(json.loads(as_json.read_text())) == 2
    lines = as_csv.read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("date,device,")
    told = refused(capsys, *SMALL, *CPU, "--append", str(as_csv), "--peers", "fallback")
    assert "it.csv has other columns" in told
    assert as_csv.read_text().splitlines() == lines


@pytest.mark.parametrize("option", ["--json", "--append"])
def test_bench_says_which_file_it_cannot_write(
    option: str, quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    target = str(tmp_path / "file" / "it")
    assert f"bench: {target} cannot be written" in refused(capsys, *SMALL, *CPU, option, target)


def test_bench_refuses_an_unknown_peer(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert "peer 'gemlite' is not known; known are torch, " in refused(capsys, *SMALL, *CPU, "--peers", "gemlite")


def test_bench_plots(quick: None, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    said(capsys, *SMALL, "--plot", str(tmp_path / "it.png"))
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")
    said(capsys, *SMALL, "--peers", "", "--plot", str(tmp_path / "it.svg"))
    assert b"<svg" in (tmp_path / "it.svg").read_bytes()


def test_a_plot_has_a_line_for_each_shape_and_format_and_a_dotted_one_for_each_that_the_peer_runs() -> None:
    pytest.importorskip("matplotlib")
    results = [
        measure.Measured(
            problem=Problem(m=m, n=24, k=40, x="bf16", weight=Format(fmt), out="bf16"), kernel="it", decided_by="",
            us=10.0 * m, peers={"torch_dense": 20.0 * m if fmt == "bf16" else None}, floor_us=5.0, roof_gbs=1.0,
        )
        for m in (8, 1, 3)
        for fmt in ("int8", "bf16")
    ]  # fmt: skip
    times, shares = measure.figure(results, here("cpu")).axes
    drawn = {line.get_label(): line for line in times.lines if line.get_marker() == "o"}
    assert set(drawn) == {"24 x 40 int8", "24 x 40 bf16"}
    for line in drawn.values():
        assert list(line.get_xdata()) == [1, 3, 8]
        assert list(line.get_ydata()) == [10, 30, 80]
    (dotted,) = (line for line in times.lines if line.get_linestyle() == ":")
    assert list(dotted.get_ydata()) == [20, 60, 160]
    assert dotted.get_color() == drawn["24 x 40 bf16"].get_color()
    assert times.get_title() == "vecmat, and torch_dense dotted"
    assert [[label.get_text() for label in axes.get_xticklabels()] for axes in (times, shares)] == [["1", "3", "8"]] * 2
    for line in shares.lines:
        assert list(line.get_ydata()) == pytest.approx([50.0, 100 * 5 / 30, 6.25])
    alone = measure.figure([r for r in results if r.problem.weight.name == "int8"], here("cpu"))
    assert alone.axes[0].get_title() == "vecmat"
    assert [line.get_label() for line in alone.axes[0].lines] == ["24 x 40"]
    assert alone.get_suptitle() == f"int8 weights, bf16 x, {NAME}"


@pytest.mark.parametrize("name", ["it.xyz", "it"])
def test_bench_refuses_a_plot_that_it_cannot_draw_before_it_measures(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured"))
    told = refused(capsys, *SMALL, *CPU, "--plot", name)
    assert f"bench: --plot {name} names no kind of picture; expected .png, " in told


def test_bench_without_matplotlib_says_so_before_it_measures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(measure, "measure", lambda *_: pytest.fail("measured"))
    told = refused(capsys, *SMALL, *CPU, "--plot", "it.png")
    assert "--plot needs matplotlib; pip install 'vecmat[plot]'" in told


def test_table_path_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "table", "path") == f"{tables.path(NAME)}\n"
    assert said(capsys, "table", "show") == f"no rows for {NAME}; `vecmat tune` makes some\n"
    tables.save(NAME, {KEY: ROW})
    out = said(capsys, "table", "show")
    assert f"{NAME}: 1 rows" in out
    assert " ".join(out.splitlines()[-1].split()) == f"{KEY} fallback widen=True 5.0 6.0 your table"
    assert main(["table", "path", "--device", "l40s"]) == 0
    assert capsys.readouterr().out == f"{tables.path('NVIDIA L40S')}\n"


def test_rows_travel_by_export_and_import(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = str(tmp_path / "mine.json")
    assert "there are no rows for" in refused(capsys, "table", "export", file, *CPU)
    tables.save(NAME, {KEY: ROW})
    assert said(capsys, "table", "export", file) == f"1 rows for {NAME} in {file}\n"
    monkeypatch.setenv("VECMAT_CACHE_DIR", str(tmp_path / "another machine"))
    tables.save(NAME, {KEY: Row(kernel="gone", kernel_version=1, config={}), "kept": ROW})
    assert said(capsys, "table", "import", file) == f"1 rows for {NAME} merged into {tables.path(NAME)}\n"
    assert tables.load(tables.path(NAME), NAME).rows == {KEY: ROW, "kept": ROW}
    below = tmp_path / "mine.json" / "below"
    assert f"table: {below} cannot be written" in refused(capsys, "table", "export", str(below), *CPU)


@pytest.mark.parametrize("way", ["export", "merge", "import"])
def test_rows_keep_their_age_when_they_travel(
    way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old, out = tables.path(NAME) if way == "export" else tmp_path / "old.json", tmp_path / "out.json"
    old.parent.mkdir(parents=True, exist_ok=True)
    with monkeypatch.context() as before:
        before.setattr(table, "versions", lambda: {"vecmat": "0.0.1"})
        table.write(old, NAME, {KEY: ROW})
    argv = {"export": [str(out)], "merge": [str(out), str(old)], "import": [str(old)]}[way]
    said(capsys, "table", way, *argv)
    found = table.read(tables.path(NAME) if way == "import" else out)
    assert not found.stale
    assert found.rows[KEY].stale


def test_import_of_another_devices_table_goes_to_that_device(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "h200.json"
    table.write(file, "NVIDIA H200", {KEY: ROW})
    told = refused(capsys, "table", "import", str(file), *CPU)
    assert f"is for 'NVIDIA H200', not '{NAME}'" in told
    assert main(["table", "import", str(file)]) == 0
    assert tables.load(tables.path("NVIDIA H200"), "NVIDIA H200").rows == {KEY: ROW}


@pytest.mark.parametrize("action", ["import", "verify", "merge"])
@pytest.mark.parametrize(
    ("content", "words"), [("{", "it is not JSON"), ("[]", "it has no rows"), (None, "No such file")]
)
def test_a_file_that_is_no_table_is_refused(
    action: str, content: str | None, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "it.json"
    if content is not None:
        file.write_text(content)
    argv = ["out.json", str(file)] if action == "merge" else [str(file)]
    told = refused(capsys, "table", action, *argv)
    assert words in told
    assert str(file) in told


def test_merge_keeps_the_faster_row_and_refuses_different_devices(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    a, b, c, out = (str(tmp_path / name) for name in ("a.json", "b.json", "c.json", "out.json"))
    fast = Row(kernel="torch_dense", kernel_version=1, config={}, us=4.0)
    untimed = Row(kernel="fallback", kernel_version=1, config={"widen": True})
    table.write(Path(a), "d", {"x": ROW, "y": fast, "z": untimed})
    table.write(Path(b), "d", {"x": fast, "y": ROW, "z": ROW, "w": ROW})
    table.write(Path(c), "e", {"x": ROW})
    for order in ([a, b], [b, a]):
        assert said(capsys, "table", "merge", out, *order) == f"4 rows for d in {out}\n"
        assert table.read(Path(out)).rows == {"w": ROW, "x": fast, "y": fast, "z": ROW}
    assert "the files are for different devices: d, e" in refused(capsys, "table", "merge", out, a, c, *CPU)
    below = f"{a}/below"
    assert f"{below} cannot be written" in refused(capsys, "table", "merge", below, a, b, *CPU)


def test_verify_runs_every_row_and_names_the_wrong_ones(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tables.save(NAME, {KEY: ROW})
    assert said(capsys, "table", "verify") == "1 rows are right (checked by running them)\n"
    other = KEY.replace("m1 ", "m2 ")
    tables.save(NAME, {other: Row(kernel="gone", kernel_version=1, config={})})
    assert main(["table", "verify", *CPU]) == 2
    out, err = capsys.readouterr()
    assert out == f"{other}: there is no kernel 'gone' here\n"
    assert err == "vecmat: error: table verify: 1 of 2 rows are wrong (checked by running them)\n"
    file = tmp_path / "e.json"
    table.write(file, "e", {KEY: ROW})
    assert main(["table", "verify", str(file)]) == 0
    assert capsys.readouterr().out == "1 rows are right (not run, since e is not here)\n"
    assert f"is for 'e', not '{NAME}'" in refused(capsys, "table", "verify", str(file), *CPU)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without the device")
def test_verify_of_an_absent_device_by_name_runs_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "l40s.json"
    table.write(file, KNOWN["l40s"].name, {KEY: ROW})
    assert main(["table", "verify", str(file), "--device", "l40s"]) == 0
    assert capsys.readouterr().out == "1 rows are right (not run, since NVIDIA L40S is not here)\n"


def test_json_output_of_a_real_process_is_json_though_it_warns(python: Callable[..., str]) -> None:
    file = tables.path(here("cpu").name)
    file.parent.mkdir(parents=True)
    file.write_text("{ broken")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from vecmat import measure, cli; measure.ROUNDS = 3\n"
        "sys.exit(cli.main(['bench', '--shapes', '40,24', '--m', '1', '--device', 'cpu', '--json', '-']))"
    )
    assert json.loads(python(code))[0]["n"] == 24
