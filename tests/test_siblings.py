"""siblings(): what the code of a forward proves about which layers are given the same x, and what it does not."""

from __future__ import annotations

import functools
import linecache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vecmat.siblings import siblings


class Cases(nn.Module):
    """Code that is, or is not, a proof. Each method is a forward."""

    def same_name(self, x: Tensor) -> Any:
        return self.a(x), self.b(x)

    def with_reads(self, x: Tensor) -> Any:
        shape = (*x.shape[:-1], -1)
        a = self.a(x).view(shape)
        if a.dtype != x.dtype:
            a = a.to(x.dtype)
        return a, self.b(x)

    def last_binds(self, x: Tensor) -> Any:
        a = self.a(x)
        x = self.b(x)
        return a + x

    def in_a_block(self, x: Tensor, flag: bool) -> Any:
        if flag:
            a = self.a(x)
            b = self.b(x)
        return a, b

    def other_names(self, x: Tensor, y: Tensor) -> Any:
        return self.a(x), self.b(y)

    def bound_between(self, x: Tensor) -> Any:
        a = self.a(x)
        x = a
        return self.b(x)

    def first_binds(self, x: Tensor) -> Any:
        x = self.a(x)
        return self.b(x)

    def changed_between(self, x: Tensor) -> Any:
        a = self.a(x)
        x.add_(1)
        return a, self.b(x)

    def given_away_between(self, x: Tensor) -> Any:
        a = self.a(x)
        torch.relu_(x)
        return a, self.b(x)

    def changed_in_a_block(self, x: Tensor) -> Any:
        a = self.a(x)
        for _ in range(2):
            x += 1
        return a, self.b(x)

    def conditional(self, x: Tensor, flag: bool) -> Any:
        return self.a(x), self.b(x) if flag else None

    def short_circuit(self, x: Tensor, flag: bool) -> Any:
        return self.a(x), flag and self.b(x)

    def other_block(self, x: Tensor, flag: bool) -> Any:
        a = self.a(x)
        if flag:
            return self.b(x)
        return a

    def twice(self, x: Tensor) -> Any:
        return self.a(x), self.b(x), self.b(x)

    def loop(self, x: Tensor) -> Any:
        return [self.b(x) for _ in range(2)], self.a(x)

    def later(self, x: Tensor) -> Any:
        return self.a(x), lambda: self.b(x)

    def an_expression(self, x: Tensor) -> Any:
        return self.a(x + 1), self.b(x + 1)

    def by_keyword(self, x: Tensor) -> Any:
        return self.a(input=x), self.b(input=x)

    def not_called(self, x: Tensor) -> Any:
        return self.a(x), F.linear(x, self.b.weight)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("same_name", None), ("last_binds", None), ("in_a_block", None), ("with_reads", None),
        ("other_names", "nothing else is given the same"), ("bound_between", "for something else"),
        ("first_binds", "for something else"), ("changed_between", "for something else"),
        ("given_away_between", "for something else"), ("changed_in_a_block", "for something else"),
        ("conditional", "under a condition"), ("short_circuit", "under a condition"),
        ("other_block", "nothing else is given the same"), ("twice", "in 2 places"), ("loop", "several times"),
        ("later", "several times"), ("an_expression", "has no name"), ("by_keyword", "has no name"),
        ("not_called", "does not call it"),
    ],
)  # fmt: skip
def test_only_code_that_is_a_proof_is_believed(name: str, why: str | None) -> None:
    kind = type(name, (nn.Module,), {"forward": getattr(Cases, name)})
    found = siblings(kind, {"a", "b"})
    if why is None:
        assert (found.groups, found.apart) == ((("a", "b"),), {})
    else:
        assert not found.groups
        assert why in found.apart["b"] or why in found.apart["a"], found.apart


def test_code_that_cannot_be_read_is_not_believed() -> None:
    names: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.a(x), self.b(x)", names)
    found = siblings(type("Made", (nn.Module,), {"forward": names["forward"]}), {"a", "b"})
    assert not found.groups
    assert "cannot be read" in found.apart["a"]


def test_source_that_is_not_that_of_the_code_is_not_believed(tmp_path: Path) -> None:
    """As after a file was changed that is imported already."""
    text = "import torch\nclass Changed(torch.nn.Module):\n    def forward(self, x):\n        return {}\n"
    file = tmp_path / "changed.py"
    file.write_text(text.format("self.a(x), self.b(x)"))
    for code, groups in (("self.a(x), self.b(x)", (("a", "b"),)), ("self.a(x), self.b(x.relu_())", ())):
        names: dict[str, Any] = {"__name__": "changed"}
        exec(compile(text.format(code), str(file), "exec", dont_inherit=True), names)
        found = siblings(names["Changed"], {"a", "b"})
        assert found.groups == groups
        assert groups or "cannot be read" in found.apart["a"]
    file.write_text('"""' + text)
    linecache.checkcache(str(file))
    assert not siblings(names["Changed"], {"a", "b"}).groups


def test_a_forward_with_closures_and_decorators_is_read() -> None:
    def decorated(function: Any) -> Any:
        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            return function(*arguments)

        return call

    scale = 2.0

    class Closed(nn.Module):
        @decorated
        def forward(self, x: Tensor, wide: bool = False) -> Any:
            super().train(False)
            return self.a(x) * scale, self.b(x)

    assert siblings(Closed, {"a", "b"}).groups == (("a", "b"),)
