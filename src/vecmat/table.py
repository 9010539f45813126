"""Tables: which kernel and config won for a problem on a device, as text that can be read, merged and trusted.

One JSON file per device, under the device's exact name, a row a line:

    {"schema": 1, "device": "NVIDIA H200", "versions": {"vecmat": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"},
     "rows": {
      "m1 n4096 k4096 x=bf16 w=bf16 o=bf16 nk": {"kernel": "triton_dense", "kernel_version": 1, "config": {...}, ...},
     }}

Reading never executes anything and never raises: what cannot be used is ignored with one warning that names the file
and the cure. Writing merges under a lock and replaces the file in one step; a file that is corrupt is set aside, one
that cannot be read just now is left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import re
import stat
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import filelock
import platformdirs
import torch

from ._version import VERSION
from .errors import VecmatWarning
from .settings import forget_plans, settings

SCHEMA = 1
_LOCK_TIMEOUT_S = 10.0
_LOCK_POLL_S = 0.01  # at filelock's own 0.05 s, one of eight busy writers can find the lock taken for seconds on end
_MOST_BYTES = 64 << 20
_LONGEST_NAME = 100  # of a file, without what is added to it; file systems take 255
_PLAIN_NAME = re.compile(r"[A-Za-z0-9.-]+( [A-Za-z0-9.-]+)*")  # never gives two _ in a row: those come before a digest
_REMEMBERED: dict[str, dict[str, Row]] = {}
_UNWRITTEN: dict[Path, str] = {}  # why a table could not be written when it was last tried


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One decision. us, torch_us: median microseconds of the winner and of torch's own path, None if not timed.

    torch_over_us: where torch's own path was stopped, what a part of the problem took it. tried, failed: how many
    candidates were tried, and how many of them could not run or were wrong. stale: measured with other versions than
    those of the table it is in, which was written again since.
    """

    kernel: str
    kernel_version: int
    config: Mapping[str, int | str | bool]
    us: float | None = None
    torch_us: float | None = None
    torch_over_us: float | None = None
    tried: int = 0
    failed: int = 0
    stale: bool = False

    @staticmethod
    def read(value: Any) -> Row | None:
        """The Row of a parsed JSON value, None if it is not one."""
        if not isinstance(value, dict):
            return None
        config = value.get("config")
        good = (
            isinstance(value.get("kernel"), str)
            and type(value.get("kernel_version")) is int
            and isinstance(config, dict)
            and all(isinstance(v, (int, str, bool)) for v in config.values())
            and all(_is_time(value.get(name)) for name in ("us", "torch_us", "torch_over_us"))
            and all(type(value.get(name, 0)) is int for name in ("tried", "failed"))
            and type(value.get("stale", False)) is bool
        )
        names = {field.name for field in dataclasses.fields(Row)}
        return Row(**{name: v for name, v in value.items() if name in names}) if good else None


def _is_time(value: Any) -> bool:
    """Whether a parsed JSON value is microseconds or None; NaN and infinity, which Python's JSON knows, are neither."""
    return (
        value is None
        or (type(value) is int and 0 <= value < 1 << 53)
        or (type(value) is float and 0 <= value < math.inf)
    )


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Rows by problem key for one device. source: where they came from, for ``explain``. stale: other versions.

    unusable: how many rows of the file had wrong types.
    """

    device: str
    rows: Mapping[str, Row]
    source: str
    stale: bool = False
    unusable: int = 0

    def find(self, device: str, key: str) -> Row | None:
        """The row of a problem, None if there is none or the table is another device's."""
        return self.rows.get(key) if device == self.device else None

    @property
    def aged(self) -> Mapping[str, Row]:
        """The rows as another file of these versions must keep them: each says itself whether it is stale."""
        if not self.stale:
            return self.rows
        return {key: dataclasses.replace(row, stale=True) for key, row in self.rows.items()}


def folder() -> Path:
    """Where the user's tables are kept.

    ``VECMAT_CACHE_DIR``, else DeepSpeed's names for its own (``TRITON_CACHE_DIR``, ``TRITON_HOME``/autotune), each
    with ``vecmat`` below it, else the system's cache folder.
    """
    if own := os.environ.get("VECMAT_CACHE_DIR"):
        return Path(own)
    if cache := os.environ.get("TRITON_CACHE_DIR"):
        return Path(cache) / "vecmat"
    if home := os.environ.get("TRITON_HOME"):
        return Path(home) / "autotune" / "vecmat"
    return Path(platformdirs.user_cache_dir("vecmat"))


def path(device_name: str) -> Path:
    """The user's table file for a device."""
    return folder() / f"{_file_name(device_name)}.json"


def _file_name(device_name: str) -> str:
    """Another file for every device: its name with _ for each space, where that can be undone, else with a digest."""
    if len(device_name) <= _LONGEST_NAME and _PLAIN_NAME.fullmatch(device_name):
        return device_name.replace(" ", "_")
    digest = hashlib.sha256(device_name.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '_', device_name)[:_LONGEST_NAME]}__{digest}"


def versions() -> dict[str, str]:
    """The versions a row depends on."""
    from importlib import metadata

    found = {"vecmat": VERSION, "torch": torch.__version__.split("+")[0]}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def load(file: Path, device_name: str, *, quiet: bool = False) -> Table | None:
    """The table in ``file``, or None if it cannot be used: with a warning, unless it is simply absent or quiet."""
    try:
        found = _read(file, device_name)
    except OSError as error:
        found = f"cannot be read and is ignored ({_why(error)}); delete it or fix its permissions"
    if isinstance(found, str) and not quiet:
        _warn(f"table {file} {found}")
    if not isinstance(found, Table):
        return None
    if found.unusable and not quiet:
        _warn(f"table {file}: {found.unusable} rows have wrong types and are ignored; delete it, or tune them again")
    return found


def _read(file: Path, device_name: str) -> Table | str | None:
    """The Table in ``file``, None if the file is absent, or what is wrong with its content, and the cure.

    Raises ``OSError`` where the file cannot be read, which says nothing about its content.
    """
    try:
        about = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(about.st_mode):  # a pipe or a device would be read without end
        return "is no regular file and ignored; delete it, or set VECMAT_CACHE_DIR to another folder"
    if about.st_size > _MOST_BYTES:
        return f"is larger than {_MOST_BYTES >> 20} MiB and ignored; delete it or export what you need"
    try:
        table = _parse(file.read_bytes().decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        table = f"it cannot be read as text ({error})"
    if isinstance(table, str):
        return f"is ignored: {table}; delete it, or restore it from a backup"
    if table.device != device_name:
        return f"is for {table.device!r}, not {device_name!r}, and is ignored; delete or rename it"
    return table


def _why(error: Exception) -> str:
    """What an error says without the name of the file, which may be a temporary one and differ each time."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def _parse(text: str, source: str) -> Table | str:
    """The Table that ``text`` holds, or what is wrong with it."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({error})"
    if not isinstance(content, dict) or not isinstance(content.get("rows"), dict):
        return "it has no rows"
    if content.get("schema") != SCHEMA:
        return f"its schema is {content.get('schema')!r} and this version reads {SCHEMA}"
    if not isinstance(content.get("device"), str):
        return "it names no device"
    rows = {key: row for key, value in content["rows"].items() if (row := Row.read(value)) is not None}
    unusable = len(content["rows"]) - len(rows)
    return Table(content["device"], rows, source, stale=content.get("versions") != versions(), unusable=unusable)


def save(device_name: str, rows: Mapping[str, Row], file: Path | None = None) -> bool:
    """Whether ``rows`` are now in the user's table, merged with what was there.

    Under a lock: read again, merge, write a file beside it, replace. A read-only home, a full disk or a lock that
    cannot be had gives False, and one warning until it works again; the rows that were there stay. What writers that
    were killed left beside the table is removed. A symbolic link stays one: the table that it leads to is written.
    """
    file = path(device_name) if file is None else file
    try:
        target = _behind(file)
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock", timeout=_LOCK_TIMEOUT_S, poll_interval=_LOCK_POLL_S):
            _remove_leftovers(target)
            merged = {**_rows_on_disk(file, device_name), **rows}
            if _behind(file) != target:  # a link was set aside: the table is another file now, with another lock
                return save(device_name, rows, file)
            _replace(target, _text(device_name, merged), ".tmp")
    except (OSError, NotImplementedError) as error:  # the latter: an old filelock on a file system without locks
        if _UNWRITTEN.get(file) != _why(error):  # Python's own filter forgets what it showed when filters change
            _warn(f"table {file} could not be written ({_why(error)}); set VECMAT_CACHE_DIR to a folder that can")
        _UNWRITTEN[file] = _why(error)
        return False
    _UNWRITTEN.pop(file, None)
    user_table.cache_clear()
    forget_plans()
    return True


def write(file: Path, device_name: str, rows: Mapping[str, Row]) -> None:
    """Write a table file of these rows alone, in one step. Raises ``OSError`` where it cannot.

    What is there but no regular file, such as /dev/stdout, is written to and not replaced.
    """
    if file.exists() and not file.is_file():
        file.write_text(_text(device_name, rows), encoding="utf-8")
    else:
        _replace(_behind(file), _text(device_name, rows), ".new")


def read(file: Path) -> Table:
    """The table in a file, whichever device it is for. Raises ``ValueError`` saying why it is none."""
    try:
        table = _parse(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"table {file} cannot be read: {error}") from error
    if isinstance(table, str):
        raise ValueError(f"table {file} cannot be used: {table}")
    return table


def _rows_on_disk(file: Path, device_name: str) -> Mapping[str, Row]:
    """The rows to merge with; a file whose content cannot be used is set aside. Raises ``OSError`` if it is unread."""
    table = _read(file, device_name) if not _is_loop(file) else None
    if isinstance(table, str):
        handle, aside = tempfile.mkstemp(dir=file.parent, prefix=f"{file.stem}.", suffix=".corrupt")
        os.close(handle)
        if file.is_dir():
            os.unlink(aside)  # a folder replaces no file
        os.replace(file, aside)
        reason = table.partition(";")[0].removeprefix("is ignored: ")
        _warn(f"table {file} could not be merged and was set aside as {Path(aside).name}: {reason}")
    if not isinstance(table, Table):
        return {}
    if table.unusable:
        _warn(f"table {file}: {table.unusable} rows have wrong types and are left out of what is written now")
    return table.aged


def _is_loop(file: Path) -> bool:
    """Whether a path is a symbolic link that leads nowhere but to itself; such a file holds no rows."""
    try:
        file.stat()
    except OSError as error:
        return error.errno == errno.ELOOP
    return False


def _behind(file: Path) -> Path:
    """The file itself, or the regular (or absent) file that a symbolic link leads to."""
    if not file.is_symlink() or _is_loop(file) or (file.exists() and not file.is_file()):
        return file
    return file.resolve()


def _remove_leftovers(file: Path) -> None:
    """Delete the temporary files of writers that were killed; under the lock, as no other writer is at work then."""
    ours = re.compile(re.escape(file.name) + r"\.[a-z0-9_]{8}\.tmp")
    for left in os.scandir(file.parent):
        if ours.fullmatch(left.name):
            with contextlib.suppress(OSError):
                os.unlink(left.path)


def _text(device_name: str, rows: Mapping[str, Row]) -> str:
    head = {"schema": SCHEMA, "device": device_name, "versions": versions()}
    lines = [f"  {json.dumps(key)}: {json.dumps(_plain(row))}" for key, row in sorted(rows.items())]
    return json.dumps(head)[:-1] + ', "rows": {\n' + ",\n".join(lines) + "\n}}\n"


def _plain(row: Row) -> dict[str, Any]:
    value = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    for name, usual in (("torch_over_us", None), ("stale", False)):
        if value[name] is usual:
            del value[name]
    return {**value, "config": dict(row.config)}


def _replace(file: Path, text: str, suffix: str) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.", suffix=suffix)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            with contextlib.suppress(OSError):  # a table that others may read stays so
                os.fchmod(handle, stat.S_IMODE(file.stat().st_mode))
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, file)
    finally:  # after an error, Ctrl-C too, the unfinished file goes; after none there is nothing of that name
        with contextlib.suppress(OSError):
            os.unlink(name)


def remember(device_name: str, rows: Mapping[str, Row]) -> None:
    """Keep rows for this process alone: what was tuned where no table can be written."""
    _REMEMBERED[device_name] = {**_REMEMBERED.get(device_name, {}), **rows}
    forget_plans()


@functools.lru_cache(maxsize=64)
def user_table(device_name: str, file: Path) -> Table | None:
    """The user's table for a device, read once per process until ``save`` changes it."""
    return load(file, device_name)


@functools.lru_cache(maxsize=64)
def shipped_table(device_name: str) -> Table | None:
    """The table that the package ships for a device, None if it ships none."""
    resource = resources.files(__package__) / "tables" / f"{_file_name(device_name)}.json"
    if not resource.is_file():
        return None
    table = _parse(resource.read_text(encoding="utf-8"), resource.name)
    if isinstance(table, str):
        raise RuntimeError(f"{resource.name}, shipped with vecmat: {table}")
    return table if table.device == device_name else None


def ladder(device_name: str) -> Iterator[tuple[str, Table]]:
    """The tables to ask for a device, first one first: (rung, table)."""
    overlay = settings.current().overlay
    if overlay is not None:
        yield "overlay", overlay
    user = user_table(device_name, path(device_name))
    if user is not None:
        yield from (("your table", part) for part in _by_age(user))
    if device_name in _REMEMBERED:
        yield "tuned by this process", Table(device_name, _REMEMBERED[device_name], "not saved")
    shipped = shipped_table(device_name)
    if shipped is not None:
        yield "shipped table", shipped


@functools.lru_cache(maxsize=64)
def _by_age(table: Table) -> tuple[Table, ...]:
    """The table's rows of its own versions, and those that it kept from other ones."""
    old = {key: row for key, row in table.rows.items() if row.stale}
    if table.stale or not old:
        return (table,)
    fresh = {key: row for key, row in table.rows.items() if not row.stale}
    return dataclasses.replace(table, rows=fresh), dataclasses.replace(table, rows=old, stale=True)


def use(source: str | os.PathLike[str] | Mapping[str, Row], *, device: str | None = None) -> settings:
    """Context manager under which a table is asked before the user's and the shipped one.

    source: a table file, or rows by problem key (then ``device`` names the device they are for).
    Raises ``ValueError`` if the file cannot be used, and ``TypeError`` for rows that are none.
    """
    if isinstance(source, Mapping):
        if device is None:
            raise ValueError("tables.use: rows without a device; pass device='its exact name'")
        for key, row in source.items():
            if not isinstance(key, str) or not isinstance(row, Row):
                raise TypeError(f"tables.use: source[{key!r}] is {type(row).__name__}; expected a Row by problem key")
        return settings(overlay=Table(device, dict(source), "tables.use"))
    return settings(overlay=read(Path(source)))


def _warn(message: str) -> None:
    warnings.warn(message, VecmatWarning, stacklevel=3)
