"""Tables and processes: killed writers and tuners, locks, full disks; no row that was told is lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import filelock
import pytest

import vecmat
from cases import here
from vecmat import table, tables
from vecmat.problem import Format, Problem
from vecmat.table import Row

HERE = here("cpu")
PROBLEM = Problem(m=1, n=64, k=128, x="bf16", weight=Format("bf16"), out="bf16")
KEY = PROBLEM.key()
ROW = Row(kernel="fallback", kernel_version=1, config={"widen": False}, us=1.5)

# Forked, so that a writer is at work at once: an interpreter that imports torch needs seconds.
ROUNDS = """
import os, random, signal, sys, time, warnings
from pathlib import Path
from vecmat import table, tables

warnings.simplefilter("error")
file, rounds, parent = tables.path("d"), int(sys.argv[1]), os.getpid()
row = tables.Row(kernel="fallback", kernel_version=1, config={"widen": True}, us=1.0)

def child(act, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            act(*arguments)
        except BaseException as error:
            os.write(1, f"broken {act.__name__}: {error!r}\\n".encode())
        os._exit(1)
    return pid

def write(name):
    for i in range(100_000):
        if os.getppid() != parent:
            return
        if tables.save("d", {f"{name} row {i}": row}):
            os.write(1, f"saved {name} row {i}\\n".encode())

def read():
    most = 0
    while os.getppid() == parent:
        loaded = tables.load(file, "d")
        assert loaded is not None, "the table is gone"
        assert len(loaded.rows) >= most, f"{most} rows became {len(loaded.rows)}"
        most = len(loaded.rows)

assert tables.save("d", {"first": row})
reader = child(read)
chance = random.Random(3)
for turn in range(rounds):
    writers = [child(write, f"{turn}.{i}") for i in range(8)]
    time.sleep(0.4)
    for pid in chance.sample(writers, 8):
        time.sleep(chance.uniform(0.0, 0.15))
        os.kill(pid, signal.SIGKILL)
    assert [os.waitpid(pid, 0)[1] for pid in writers] == [signal.SIGKILL] * 8
    left = [p.name for p in file.parent.iterdir() if p.suffix == ".tmp"]
    assert len(left) <= 1, left
    began = time.monotonic()
    assert tables.save("d", {f"after {turn}": row})
    assert time.monotonic() - began < 3, "a dead writer's lock is still in the way"
    print(f"saved after {turn}", flush=True)
    assert not [p.name for p in file.parent.iterdir() if p.suffix == ".tmp"]
os.kill(reader, signal.SIGKILL)
os.waitpid(reader, 0)
"""


def test_no_row_that_was_reported_as_saved_is_lost_when_eight_writers_are_killed(python: Callable[..., str]) -> None:
    said = python(ROUNDS, "5").splitlines()
    saved = {line.removeprefix("saved ") for line in said if line.startswith("saved ")}
    assert [line for line in said if not line.startswith("saved ")] == []
    assert len(saved) > 60, "the writers hardly wrote"
    loaded = tables.load(tables.path("d"), "d")
    assert loaded is not None
    assert saved - set(loaded.rows) == set()
    # a writer that was killed between replacing the file and saying so may have one row more
    assert len(set(loaded.rows) - saved - {"first"}) <= 5 * 8


TUNERS = """
import contextlib, io, os, random, signal, sys, time, warnings
from pathlib import Path
import torch
from vecmat import cli, tables
from vecmat.device import Device

warnings.simplefilter("error")
torch.set_num_threads(1)
folder, rounds, parent = Path(sys.argv[1]), int(sys.argv[2]), os.getpid()
device = Device.of(torch.device("cpu")).name
file = tables.path(device)

def child(name, act, *arguments):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(os.open(folder / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        try:
            os._exit(act(*arguments))
        except BaseException as error:
            os.write(2, f"{name}: {error!r}\\n".encode())
        os._exit(3)
    return pid

def tune(k, count):
    shapes = [f"{k},{n}" for n in range(8, 8 + count)]
    argv = ["tune", "--shapes", *shapes, "--m", "1,2,3,4,5,6,7,8", "--weights", "fp32", "--device", "cpu"]
    return cli.main([*argv, "--budget", "60"])

def read():
    most = 0
    while os.getppid() == parent:
        loaded = tables.load(file, device)
        assert loaded is not None, "the table is gone"
        assert len(loaded.rows) >= most, f"{most} rows became {len(loaded.rows)}"
        most = len(loaded.rows)

def told(name):
    return (folder / name).read_text().count(" tried)\\n") if (folder / name).exists() else 0

def wait_for(name):
    began = time.monotonic()
    while not told(name):
        assert time.monotonic() - began < 60, f"{name} has told nothing"
        time.sleep(0.01)
    return time.monotonic() - began

with contextlib.redirect_stdout(io.StringIO()):
    assert tune(5, 1) == 0  # so that nothing is left to import in the forked ones
reader = child("reader", read)

first = child("tuner 1", tune, 1, 30)
wait_for("tuner 1")
second = child("tuner 2", tune, 2, 30)
before = told("tuner 1")
time.sleep(0.7)
assert told("tuner 1") > before
assert not told("tuner 2"), "two tune at once"
os.kill(first, signal.SIGKILL)
assert wait_for("tuner 2") < 3, "a killed tuner's turn does not end"
os.kill(second, signal.SIGKILL)
assert [os.waitpid(pid, 0)[1] for pid in (first, second)] == [signal.SIGKILL] * 2

chance = random.Random(5)
for turn in range(1, rounds + 1):
    tuners = {f"tuner {k}": child(f"tuner {k}", tune, k, 30) for k in range(10 * turn, 10 * turn + 8)}
    while tuners:
        time.sleep(chance.uniform(0.0, 0.4))
        busy = [name for name in tuners if told(name)]
        pid = tuners.pop(chance.choice(busy if busy and chance.random() < 0.8 else list(tuners)))
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    began = time.monotonic()
    last = child(f"tuner {10 * turn + 9}", tune, 10 * turn + 9, 1)
    assert os.waitstatus_to_exitcode(os.waitpid(last, 0)[1]) == 0
    assert time.monotonic() - began < 5, "a dead tuner is still in the way"
os.kill(reader, signal.SIGKILL)
os.waitpid(reader, 0)
print(file)
"""


def test_no_row_that_a_tuner_told_is_lost_when_eight_tuners_are_killed(
    python: Callable[..., str], tmp_path: Path
) -> None:
    rounds = 4
    file = Path(python(TUNERS, str(tmp_path), str(rounds)).strip())
    assert (tmp_path / "errors").read_text() == ""
    told = {
        out.name: [line.split("  ")[0] for line in out.read_text().splitlines() if line.endswith(" tried)")]
        for out in tmp_path.glob("tuner *")
    }
    finished = {name for name in told if name.endswith("9")}
    assert [len(told[name]) for name in sorted(finished)] == [8] * rounds
    killed = [name for name in told if name not in finished and told[name]]
    assert len(killed) > 2 * rounds, "hardly a tuner had its turn"
    saved = set(tables.load(file, HERE.name).rows)
    assert {key for keys in told.values() for key in keys} - saved == set()
    # a tuner that was killed between saving a row and telling it may have one more
    assert len(saved) - 8 - sum(map(len, told.values())) <= len(killed)


WAITERS = """
import os, sys, time
from vecmat import tables
row = tables.Row(kernel="fallback", kernel_version=1, config={"widen": True}, us=1.0)
pids = []
for name in range(8):
    pids.append(os.fork())
    if pids[-1] == 0:
        try:
            os._exit(not all([tables.save("d", {f"{name} row {i}": row}) for i in range(25)]))
        finally:
            os._exit(2)
print([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids])
"""


def test_eight_writers_at_once_all_get_the_lock_in_time(python: Callable[..., str]) -> None:
    assert python(WAITERS) == f"{[0] * 8}\n"
    assert len(tables.load(tables.path("d"), "d").rows) == 8 * 25


def test_a_lock_that_is_held_costs_one_warning_and_not_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table._LOCK_TIMEOUT_S <= 10
    tables.save("d", {KEY: ROW})
    monkeypatch.setattr(table, "_LOCK_TIMEOUT_S", 0.2)
    with (
        filelock.FileLock(f"{tables.path('d')}.lock"),
        pytest.warns(vecmat.VecmatWarning, match=r"d\.json could not be written .*; set VECMAT_CACHE_DIR") as told,
    ):
        assert not tables.save("d", {"another": ROW})
    assert len(told) == 1
    assert tables.save("d", {"another": ROW})
    assert set(tables.load(tables.path("d"), "d").rows) == {KEY, "another"}


def test_only_a_dead_writers_files_are_removed() -> None:
    file = tables.path("d")
    file.parent.mkdir(parents=True)
    dead = file.with_name("d.json.a1_b2c3d.tmp")
    others = [
        file.with_name(name)
        for name in (
            "e.json.a1_b2c3d.tmp",
            "d.json.a1_b2c3d.new",
            "d.json.mine.tmp",
            "d.json.bak",
            "d.json.x.json.a1_b2c3d.tmp",
        )
    ]
    for one in (dead, *others):
        one.write_text("half a ta")
    assert tables.save("d", {KEY: ROW})
    assert not dead.exists()
    assert all(one.exists() for one in others)


FULL = """
import resource, sys, warnings
from vecmat import tables
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
row = tables.Row(kernel="fallback", kernel_version=1, config={"widen": True}, us=1.0)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    print(tables.save("d", {f"new {i}": row for i in range(100)}))
print([f"{w.category.__name__}: {w.message}" for w in told])
"""


def test_a_full_disk_leaves_the_rows_that_were_there(python: Callable[..., str]) -> None:
    tables.save("d", {KEY: ROW})
    before = tables.path("d").read_bytes()
    saved, told = python(FULL).splitlines()
    assert saved == "False"
    assert told == str([f"VecmatWarning: table {tables.path('d')} could not be written ({os.strerror(errno.EFBIG)}); "
                        "set VECMAT_CACHE_DIR to a folder that can"])  # fmt: skip
    assert tables.path("d").read_bytes() == before
    assert sorted(p.name for p in tables.path("d").parent.iterdir()) == ["d.json", "d.json.lock"]


FULL_DISK = """
import errno, os, subprocess, sys, torch, vecmat
from pathlib import Path
from vecmat import tables
from vecmat.device import Device

torch.set_num_threads(1)
device = Device.of(torch.device("cpu")).name
row = tables.Row(kernel="fallback", kernel_version=1, config={"widen": True}, us=1.0)

def fill(disk, size):
    for i in range(1000):
        try:
            (disk / f"filler {i}").write_bytes(bytes(size))
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return
    raise AssertionError("the disk has no end")

for n, (what, options) in enumerate({"bytes": "size=16k", "a name": "nr_inodes=8", "a folder": "nr_inodes=8"}.items()):
    disk = Path(sys.argv[1]) / what
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
    os.environ["VECMAT_CACHE_DIR"] = str(disk / "below" / "it")
    file = tables.path(device)
    if what != "a folder":
        assert tables.save(device, {"first": row})
    before = file.read_bytes() if file.exists() else None
    size = 4096 if what == "bytes" else 0
    fill(disk, size)
    if size:  # what is to be written has room in part
        (disk / "filler 0").unlink()
        assert not tables.save(device, {f"{'long ' * 20}{i}": row for i in range(100)})
        fill(disk, size)
    x, w = torch.randn(3, 40), torch.randn(24 + n, 40)
    with vecmat.tuning(budget_s=60):
        for m in (1, 2, 3):
            torch.testing.assert_close(vecmat.matmul(x[:m], w), x[:m] @ w.t())
    decided = vecmat.explain(x, w).plan.decided_by
    assert (file.read_bytes() if file.exists() else None) == before
    assert not list(disk.rglob("*.tmp"))
    for filler in disk.glob("filler *"):
        filler.unlink()
    assert tables.save(device, {"second": row})
    print(file, decided, *tables.load(file, device).rows, sep=", ")
"""


def test_on_a_disk_that_is_full_the_operator_works_and_the_table_stays_whole(tmp_path: Path) -> None:
    own = [
        "unshare",
        "--mount",
        *([] if os.geteuid() == 0 else ["--map-root-user"]),
    ]  # mounts that end with the process
    run = partial(subprocess.run, capture_output=True, text=True, check=False, timeout=100)
    try:
        may = run([*own, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)])
    except FileNotFoundError as error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    if may.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {may.stderr.strip()}")
    done = run([*own, sys.executable, "-c", FULL_DISK, str(tmp_path)])
    assert done.returncode == 0, done.stderr
    files = [tmp_path / what / "below" / "it" / tables.path(HERE.name).name for what in ("bytes", "a name", "a folder")]
    decided = "tuned by this process: not saved"
    assert done.stdout.splitlines() == [
        f"{files[0]}, {decided}, first, second",
        f"{files[1]}, {decided}, first, second",
        f"{files[2]}, {decided}, second",
    ]
    told = [line.partition("VecmatWarning: ")[2] for line in done.stderr.splitlines() if "VecmatWarning" in line]
    assert told == [
        f"table {file} could not be written ({os.strerror(errno.ENOSPC)}); set VECMAT_CACHE_DIR to a folder that can"
        for file in files
    ]
