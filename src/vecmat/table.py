"""Tables: which kernel and config won for a problem on a device, as text that can be read, merged and trusted.

One JSON file per device, under the device's exact name, a row a line:

    {"schema": 1, "device": "NVIDIA H200", "versions": {"vecmat": "0.1.0", "torch": "2.11.0", "triton": "3.6.0"},
     "rows": {
      "m1 n4096 k4096 x=bf16 w=bf16 o=bf16 nk": {"kernel": "triton_dense", "kernel_version": 1, "config": {...}, ...},
     }}

Reading never executes anything and never raises: what cannot be used is ignored with one warning that names the file
and the cure. Writing merges under a lock and replaces the file in one step; a file that is corrupt is set aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import re
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
_LOCK_TIMEOUT_S = 5.0
_MOST_BYTES = 64 << 20
_REMEMBERED: dict[str, dict[str, Row]] = {}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One decision. us, torch_us: median microseconds of the winner and of torch's own path, None if not timed.

    tried, failed: how many candidates were tried, and how many of them could not run or were wrong.
    """

    kernel: str
    kernel_version: int
    config: Mapping[str, int | str | bool]
    us: float | None = None
    torch_us: float | None = None
    tried: int = 0
    failed: int = 0

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
            and all(isinstance(value.get(name), (int, float, type(None))) for name in ("us", "torch_us"))
            and all(type(value.get(name, 0)) is int for name in ("tried", "failed"))
        )
        names = {field.name for field in dataclasses.fields(Row)}
        return Row(**{name: v for name, v in value.items() if name in names}) if good else None


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Rows by problem key for one device. source: where they came from, for ``explain``. stale: other versions."""

    device: str
    rows: Mapping[str, Row]
    source: str
    stale: bool = False

    def find(self, device: str, key: str) -> Row | None:
        """The row of a problem, None if there is none or the table is another device's."""
        return self.rows.get(key) if device == self.device else None


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
    return re.sub(r"[^A-Za-z0-9._-]+", "_", device_name) or "unnamed"


def versions() -> dict[str, str]:
    """The versions a row depends on."""
    from importlib import metadata

    found = {"vecmat": VERSION, "torch": torch.__version__.split("+")[0]}
    with contextlib.suppress(metadata.PackageNotFoundError):
        found["triton"] = metadata.version("triton")
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def load(file: Path, device_name: str) -> Table | None:
    """The table in ``file``, or None (with a warning unless the file is simply absent) if it cannot be used."""
    try:
        if file.stat().st_size > _MOST_BYTES:
            _warn(f"table {file} is larger than {_MOST_BYTES >> 20} MiB and ignored; delete it or export what you need")
            return None
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        _warn(f"table {file} cannot be read and is ignored ({error}); delete it or fix its permissions")
        return None
    table = _parse(text, str(file))
    if isinstance(table, str):
        _warn(f"table {file} is ignored: {table}; delete it, or restore it from a backup")
        return None
    if table.device != device_name:
        _warn(f"table {file} is for {table.device!r}, not {device_name!r}, and is ignored; delete or rename it")
        return None
    return table


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
    if len(rows) < len(content["rows"]):
        _warn(f"table {source}: {len(content['rows']) - len(rows)} rows have wrong types and are ignored")
    return Table(content["device"], rows, source, stale=content.get("versions") != versions())


def save(device_name: str, rows: Mapping[str, Row], file: Path | None = None) -> bool:
    """Whether ``rows`` are now in the user's table, merged with what was there.

    Under a lock: read again, merge, write a file beside it, replace. A read-only home, a full disk or a lock that
    cannot be had gives one warning and False; the rows that were there stay.
    """
    file = path(device_name) if file is None else file
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{file}.lock", timeout=_LOCK_TIMEOUT_S):
            merged = {**_rows_on_disk(file, device_name), **rows}
            _replace(file, _text(device_name, merged))
    except (OSError, filelock.Timeout) as error:
        _warn(f"table {file} could not be written ({error}); set VECMAT_CACHE_DIR to a folder that can")
        return False
    user_table.cache_clear()
    forget_plans()
    return True


def write(file: Path, device_name: str, rows: Mapping[str, Row]) -> None:
    """Write a table file of these rows alone, in one step. Raises ``OSError`` where it cannot."""
    _replace(file, _text(device_name, rows))


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
    if not file.exists():
        return {}
    table = load(file, device_name)
    if table is None:
        aside = file.with_suffix(f".{os.getpid()}.corrupt")
        os.replace(file, aside)
        _warn(f"table {file} could not be merged and was set aside as {aside.name}")
        return {}
    return table.rows


def _text(device_name: str, rows: Mapping[str, Row]) -> str:
    head = {"schema": SCHEMA, "device": device_name, "versions": versions()}
    lines = [f"  {json.dumps(key)}: {json.dumps(_plain(row))}" for key, row in sorted(rows.items())]
    return json.dumps(head)[:-1] + ', "rows": {\n' + ",\n".join(lines) + "\n}}\n"


def _plain(row: Row) -> dict[str, Any]:
    value = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    return {**value, "config": dict(row.config)}


def _replace(file: Path, text: str) -> None:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(name, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


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
    table = _parse(resource.read_text(encoding="utf-8"), f"shipped with vecmat: {resource.name}")
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
        yield "your table", user
    if device_name in _REMEMBERED:
        yield "tuned by this process", Table(device_name, _REMEMBERED[device_name], "not saved")
    shipped = shipped_table(device_name)
    if shipped is not None:
        yield "shipped table", shipped


def use(source: str | os.PathLike[str] | Mapping[str, Row], *, device: str | None = None) -> settings:
    """Context manager under which a table is asked before the user's and the shipped one.

    source: a table file, or rows by problem key (then ``device`` names the device they are for).
    Raises ``ValueError`` if the file cannot be used.
    """
    if isinstance(source, Mapping):
        if device is None:
            raise ValueError("tables.use: rows without a device; pass device='its exact name'")
        return settings(overlay=Table(device, source, "tables.use"))
    return settings(overlay=read(Path(source)))


def _warn(message: str) -> None:
    warnings.warn(message, VecmatWarning, stacklevel=3)
