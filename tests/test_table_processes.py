"""Tables under attack: killed writers, full disks, files that lie; no row is lost and the product stays right."""

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
from functools import partial
from pathlib import Path

import filelock
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
