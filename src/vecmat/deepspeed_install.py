"""Puts a class in the place of DeepSpeed's ``VectorMatMulOp`` in every module that has bound it, and takes it back.

DeepSpeed's inference modules take the class from the package ``op_binding`` when they are first imported
(``from .op_binding import VectorMatMulOp``) and make their ops from that binding. So the class is replaced in the
package, for modules imported later, and in every module imported already. Knows nothing of what it installs.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

NAME = "VectorMatMulOp"
PACKAGE = "deepspeed.ops.transformer.inference.op_binding"
HOMES = (PACKAGE, f"{PACKAGE}.vector_matmul")  # where the name is bound first; every other binding comes from these


class Replacement:
    """One class, in DeepSpeed's place or not. All methods take the same lock; the class never calls back.

    operator: what is bound to the name instead of DeepSpeed's class.
    """

    def __init__(self, operator: type) -> None:
        self._operator = operator
        self._lock = threading.Lock()
        self._replaced: list[tuple[dict[str, Any], Any]] = []  # a module's names, and the class it had bound

    def install(self) -> bool:
        """Whether DeepSpeed's own class was still in its place in one module at least, and now is in none.

        Imports DeepSpeed. Raises ``ImportError`` if it is not installed or has no such class, and whatever
        importing it raises.
        """
        with self._lock:
            homes = _homes()
            theirs = [names[NAME] for names in homes] + [previous for _, previous in self._replaced]
            before = len(self._replaced)
            for names in _namespaces():
                previous = names.get(NAME)
                if previous is not self._operator and any(previous is known for known in theirs):
                    self._replaced.append((names, previous))
                    names[NAME] = self._operator
            return len(self._replaced) > before

    def uninstall(self) -> None:
        """None; every module that has the operator bound has what it had, or, if imported since, what the rest had.

        A binding that somebody else has changed in between stays as it is.
        """
        with self._lock:
            if not self._replaced:
                return
            package = vars(sys.modules[PACKAGE]) if PACKAGE in sys.modules else None
            own = [previous for names, previous in self._replaced if names is package]
            later = own[-1] if own else self._replaced[-1][1]
            for names, previous in reversed(self._replaced):
                if names.get(NAME) is self._operator:
                    names[NAME] = previous
            self._replaced.clear()
            for names in _namespaces():
                if names.get(NAME) is self._operator:
                    names[NAME] = later


def _namespaces() -> Iterator[dict[str, Any]]:
    """The names of every imported module, read so that one that loads itself when it is asked stays asleep."""
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType):
            yield object.__getattribute__(module, "__dict__")


def _homes() -> list[dict[str, Any]]:
    """The names of the two modules of DeepSpeed that bind the class first; raises what ``Replacement.install`` says."""
    try:
        importlib.import_module("deepspeed")
    except ModuleNotFoundError as error:
        if error.name != "deepspeed":
            raise  # something that DeepSpeed needs
        raise ImportError(
            "vecmat.deepspeed.install puts vecmat's operator into the package deepspeed, which is not installed: "
            "pip install deepspeed",
            name="deepspeed",
        ) from error
    found = []
    for home in HOMES:
        try:
            names = vars(importlib.import_module(home))
        except ModuleNotFoundError as error:
            if error.name is None or not home.startswith(error.name):
                raise
            raise _unknown_layout(home) from error
        if not isinstance(names.get(NAME), type):
            raise _unknown_layout(home)
        found.append(names)
    return found


def _unknown_layout(home: str) -> ImportError:
    version = getattr(sys.modules["deepspeed"], "__version__", "of unknown version")
    return ImportError(
        f"vecmat.deepspeed.install: deepspeed {version} has no class {NAME} in {home}, where releases 0.16 to 0.19 "
        "have it; nothing was replaced",
        name=home,
    )
