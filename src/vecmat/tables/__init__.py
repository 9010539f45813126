"""Tuning tables: the public names, and the tables that ship with the package (the JSON files beside this one)."""

from __future__ import annotations

from ..table import Row, Table, load, path, save, use

__all__ = ["Row", "Table", "load", "path", "save", "use"]
