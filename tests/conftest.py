"""Fixtures of the whole suite. Without a GPU the Triton kernels run in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for in its deterministic mode

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is first imported
torch.set_num_threads(1)  # the problems are small, and so as not to fight with pytest -n 2; see `threads`

from vecmat import dispatch, table  # noqa: E402 - after the interpreter is asked for
from vecmat.settings import forget_plans  # noqa: E402

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if CUDA else [])]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--problems", type=int, default=80, help="how many problems test_random_problems.py draws")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """A device of this machine: the CPU, and the GPU where there is one."""
    return str(request.param)


@pytest.fixture(autouse=True)
def own_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for the user's tables, and no plan or demotion of another test."""
    folder = tmp_path / "tables"
    monkeypatch.setenv("VECMAT_CACHE_DIR", str(folder))
    forget_plans()
    yield folder
    forget_plans()
    dispatch._DEMOTED.clear()
    table._REMEMBERED.clear()
    table.user_table.cache_clear()


@pytest.fixture
def threads() -> Iterator[int]:
    """Two threads for torch, whatever the machine has; the other tests use one."""
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(1)


@pytest.fixture
def python() -> Callable[..., str]:
    """Runs code in a fresh interpreter and returns what it printed."""

    def run(code: str, *arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True, text=True, timeout=240, env={**os.environ, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
