"""Code that Inductor makes calls a product itself: the bits of the eager call, whatever became of the weight."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vecmat
from cases import only
from vecmat.native import native
from vecmat.ready import able

pytestmark = pytest.mark.skipif(
    not (native().isa and able()), reason=native().reason or "no module of calls was built, or torch before 2.10"
)


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "cpu_panels", "cpu_dense")


class Pair(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 128, bias=False), torch.nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


@pytest.mark.parametrize("weights", ["int8", "int4", "bf16"])
def test_code_of_inductor_calls_the_product_itself(weights: str) -> None:
    from torch._inductor.utils import run_and_get_code

    model = vecmat.convert(Pair().bfloat16().requires_grad_(False), weights)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        _, codes = run_and_get_code(compiled, x)
        assert sum(code.count("= torch.ops.vecmat.direct(") for code in codes) == 2
        assert not any("= torch.ops.vecmat._matmul" in code for code in codes)
        for _ in range(3):
            torch.testing.assert_close(compiled(x), model(x))
        twin_calls = [torch.ops.vecmat.direct, torch.ops.vecmat._matmul.default]
        data = model.up.weight
        parts = (data, getattr(model.up, "weight_scale", None), getattr(model.up, "weight_zero", None), None)
        said = model.up.format.text, 64, "nk", None, None, None
        first, second = (call(x, *parts, *said) for call in twin_calls)
        assert torch.equal(first, second)
        assert torch.equal(first, model.up(x))


def test_inductor_of_another_make_is_left_alone(python: Callable[..., str]) -> None:
    code = (
        "import torch, vecmat\n"
        "import torch._inductor.compile_fx, torch._inductor.lowering as inductor\n"
        "del inductor.tag_to_layout_constraint\n"  # as if a later version had none
        "layer = vecmat.Linear(64, 64, weights='int8').requires_grad_(False)\n"
        "with torch.no_grad():\n"
        "    x = torch.randn(2, 64)\n"
        "    print(torch.equal(torch.compile(layer)(x), layer(x)))\n"
        "    print(torch.ops.vecmat._matmul.default in inductor.lowerings)"
    )
    assert python(code).split()[0] == "True"


def test_the_compiled_call_sees_what_became_of_a_weight() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, generator=rng).bfloat16()
    said = "int8", 64, "nk", None, None, None

    def direct(weight: vecmat.Weight) -> Tensor:
        y: Tensor = torch.ops.vecmat.direct(x, weight.data, weight.scale, None, None, *said)
        return y

    with torch.no_grad():
        weight = vecmat.quantize(torch.randn(70, 64, generator=rng), "int8")
        for _ in range(4):
            assert torch.equal(direct(weight), vecmat.matmul(x, weight))
        weight.data.neg_()
        assert torch.equal(direct(weight), vecmat.matmul(x, weight.copy()))
        assert weight.scale is not None
        weight.scale.mul_(2)
        assert torch.equal(direct(weight), vecmat.matmul(x, weight.copy()))
        weight.data.data = torch.ones_like(weight.data)  # other memory, the same object
        assert torch.equal(direct(weight), vecmat.matmul(x, weight.copy()))
        for _ in range(50):  # memory that comes back for another weight
            weight = vecmat.quantize(torch.randn(70, 64, generator=rng), "int8")
            for _ in range(3):
                assert torch.equal(direct(weight), vecmat.matmul(x, weight))


def test_more_weights_than_the_table_begins_with_are_all_found() -> None:
    x = torch.randn(1, 16)
    with torch.no_grad():
        weights = [vecmat.quantize(torch.randn(8, 16), "int8") for _ in range(700)]
        want = [vecmat.matmul(x, weight) for weight in weights]
        for _ in range(3):
            for weight, y in zip(weights, want, strict=True):
                found = torch.ops.vecmat.direct(x, weight.data, weight.scale, None, None, "int8", 16, "nk", *[None] * 3)
                assert torch.equal(found, y)
        gone = weights.pop()
        kept = weakref.ref(gone.data)
        del gone, weight, found
        gc.collect()
        assert kept() is None, "the table keeps nothing alive"


def test_a_graph_that_becomes_cpp_keeps_the_operator() -> None:
    model = vecmat.convert(Pair().bfloat16().requires_grad_(False), "int8")
    x = torch.randn(1, 64).bfloat16()
    with torch.no_grad():
        y = torch.compile(model, fullgraph=True, options={"cpp_wrapper": True})(x)
        torch.testing.assert_close(y, model(x))
