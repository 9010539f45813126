"""Products that C calls: the same bits as the long way, taken when nothing stands against it, and only then."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import vecmat
from cases import only, poisoned, stored
from oracle import Truth
from vecmat.native import native
from vecmat.problem import DTYPES
from vecmat.ready import able, as_called, run, run_plain
from vecmat.settings import forget_plans

pytestmark = pytest.mark.skipif(not native().isa, reason=native().reason or "-")

FORMATS = ("int8", "int8:g64", "int4:g32", "int4:g32:zp", "fp32", "bf16", "fp16")


def kernel_of(fmt: str) -> str:
    return "cpu_panels" if fmt.startswith("int") else "cpu_dense"


def problem(fmt: str, m: int = 3, n: int = 70, k: int = 96, x: str | None = None) -> tuple[Tensor, vecmat.Weight]:
    """x (m, k) and a Weight (n, k) of a format; x of the weight's dtype or bf16."""
    rng = torch.Generator().manual_seed(m * 1000 + n)
    weight = stored(torch.randn(n, k, generator=rng), fmt, "nk", "cpu")
    assert isinstance(weight, vecmat.Weight)
    return torch.randn(m, k, generator=rng).to(DTYPES[x or (fmt if fmt in DTYPES else "bf16")]), weight


def warm(x: Tensor, weight: vecmat.Weight, bias: Tensor | None = None, compute: str | None = None) -> Any:
    """What is ready for these arguments after some calls."""
    for _ in range(3):
        vecmat.matmul(x, weight, bias, compute=compute)
    return weight.ready


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, "cpu_panels", "cpu_dense")


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """cpu_packed is what can run a dense Weight."""
    only(monkeypatch, "cpu_packed")


def test_the_module_was_built_where_the_library_was_and_this_torch_has_what_it_needs() -> None:
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        pytest.skip("torch before 2.10")
    assert able()


needs_module = pytest.mark.skipif(not able(), reason="no module of calls was built, or torch before 2.10")


@needs_module
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("compute", [None, "int8"])
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_it_gives_the_bits_of_the_long_way_and_writes_all_of_y(fmt: str, compute: str | None, biased: bool) -> None:
    if compute and not fmt.startswith("int"):
        pytest.skip("only integers")
    for m, n, k in ((1, 1, 1), (1, 70, 96), (3, 33, 250), (17, 129, 64)):
        for kind in ("fp32", "bf16", "fp16"):
            if fmt in DTYPES and kind != fmt and m > 1:
                continue  # a dense weight and x of another dtype: once is enough
            x, weight = problem(fmt, m, n, k, kind)
            bias = torch.randn(n).to(x.dtype) if biased else None
            long = vecmat.matmul(x, weight, bias, kernel=kernel_of(fmt), compute=compute)
            call = warm(x, weight, bias, compute)
            with poisoned(m, n, x.dtype, "cpu"):
                y = run(call, x, weight.data, bias, compute)
            assert y is not None, (m, n, k, kind)
            assert torch.equal(y, long)
            assert Truth.of(x, weight, bias, compute=compute).verdict(y) is None


@needs_module
@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_a_plain_tensor_goes_the_same_way(fmt: str, biased: bool) -> None:
    x, stored_weight = problem(fmt)
    weight = stored_weight.data
    bias = torch.randn(70).to(x.dtype) if biased else None
    long = vecmat.matmul(x, weight, bias, kernel="cpu_dense")
    for _ in range(2):
        vecmat.matmul(x, weight, bias)
    y = run_plain(x, weight, bias)
    assert y is not None
    assert torch.equal(y, long)
    other = torch.randn_like(weight)  # of these sizes any will do: nothing of a tensor is kept
    y = run_plain(x, other, bias)
    assert y is not None
    assert torch.equal(y, vecmat.matmul(x, other, bias, kernel="cpu_dense"))
    assert run_plain(x, torch.randn(96, 70).to(x.dtype).t(), bias) is None, "its rows are not side by side"


@needs_module
@torch.inference_mode()
def test_more_sizes_of_plain_tensors_than_are_kept_do_not_answer_for_each_other() -> None:
    w = torch.randn(3, 5)
    for m in range(400, 0, -1):
        x = torch.randn(m, 5)
        assert run_plain(x, w, None) is None, "no call of this size was made"
        y = vecmat.matmul(x, w)
        assert y.shape == (m, 3)
        vecmat.matmul(x, w)
        again = run_plain(x, w, None)
        assert again is not None
        assert torch.equal(again, y)


def shapes(x: Tensor) -> dict[str, Tensor]:
    m, k = x.shape
    wide = torch.randn(m, 2 * k).to(x.dtype)
    return {
        "one more dimension": x[None],
        "two": x[:, None, None],
        "rows of a wider matrix": wide[:, 4 : k + 4],
        "every second column": wide[:, ::2],
        "every second row": torch.randn(2 * m, k).to(x.dtype)[::2],
        "expanded": x[:1].expand(m, k),
        "swapped": torch.randn(m, 2, k).to(x.dtype).transpose(0, 1)[:1],
        "transposed": torch.randn(k, m).to(x.dtype).t(),
        "empty": x[:0],
    }


@needs_module
@torch.inference_mode()
def test_x_of_any_shape_and_strides_gives_the_same_numbers() -> None:
    x, weight = problem("int8", m=4)
    warm(x, weight)
    for name, form in shapes(x).items():
        warm(x, weight)
        y = vecmat.matmul(form, weight)
        assert y.shape == (*form.shape[:-1], 70), name
        assert torch.equal(y, vecmat.matmul(form, weight, kernel="cpu_panels")), name


@needs_module
def test_it_answers_none_for_anything_but_what_it_was_made_for(threads: int) -> None:
    x, weight = problem("int8")
    bias = torch.randn(70).bfloat16()
    with torch.no_grad():
        call = warm(x, weight)
        assert run(call, x, weight.data, None, None) is not None
        for other in (x[:2], x.float(), x.half(), x[:, :95], x.t(), x.to("meta"), x.double(), x[0, 0], "x", None):
            assert run(call, other, weight.data, None, None) is None
        assert run(call, x, weight.data, bias, None) is None
        assert run(call, x, weight.data, None, "int8") is None
        torch.set_num_threads(1)
        assert run(call, x, weight.data, None, None) is None
        torch.set_num_threads(2)
        with vecmat.settings(strict=True):
            assert run(call, x, weight.data, None, None) is None
        assert run(call, x, weight.data, None, None) is not None
        biased = warm(x, weight, bias)[:1]
        for other in (None, bias[:69], bias.float(), torch.randn(140).bfloat16()[::2], bias.to("meta")):
            assert run(biased, x, weight.data, other, None) is None
    grad = x.clone().requires_grad_()
    assert run(biased, grad, weight.data, bias, None) is None
    assert run(biased, x, weight.data, bias, None) is not None
    with torch.no_grad():
        assert run(biased, grad, weight.data, bias, None) is not None
        forget_plans()
        assert run(biased, x, weight.data, bias, None) is None
    with pytest.raises(TypeError, match="expected a tuple of Calls"):
        run("call", x, weight.data, None, None)
    assert run(("call", None), x, weight.data, bias, None) is None


@needs_module
@pytest.mark.parametrize("fmt", ["int8", "bf16"])
@torch.inference_mode()
def test_what_is_timed_is_the_call_that_matmul_makes(fmt: str, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    only(monkeypatch, "cpu_panels" if fmt == "int8" else "cpu_packed")
    x, weight = problem(fmt)
    plan = vecmat.explain(x, weight).plan
    gone_long: list[Tensor] = []

    def long(*given: Any) -> Tensor:
        gone_long.append(plan.run(*given))
        return gone_long[-1]

    call = as_called(plan.ready, long, x, weight, plan.operand(weight), None, None)
    assert torch.equal(call(), plan.run(x, plan.operand(weight), None))
    assert not gone_long
    assert as_called(None, long, x, weight, plan.operand(weight), None, None)() is gone_long[0]
    torch.set_num_threads(1)
    assert call() is gone_long[1]


@needs_module
@torch.inference_mode()
def test_products_of_several_kinds_with_one_weight_are_all_ready_and_the_oldest_goes() -> None:
    _, weight = problem("int8")
    bias = torch.randn(70).bfloat16()
    asked = [(problem("int8", m)[0], added, compute)
             for m in (1, 4) for added, compute in ((None, None), (bias, None), (None, "int8"))]  # fmt: skip
    for x, added, compute in asked[:4]:
        warm(x, weight, added, compute)
    before = weight.ready
    assert len(before) == 4
    for x, added, compute in asked[:4]:
        y = run(before, x, weight.data, added, compute)
        assert y is not None
        assert torch.equal(y, vecmat.matmul(x, weight, added, compute=compute, kernel="cpu_panels"))
    assert weight.ready is before, "all were found, nothing was made"
    warm(*asked[4][:1], weight, *asked[4][1:])
    assert len(weight.ready) == 4
    found = [run(weight.ready, x, weight.data, added, compute) is not None for x, added, compute in asked]
    assert found == [False, True, True, True, True, False]
    forget_plans()
    warm(*asked[4][:1], weight, *asked[4][1:])
    assert len(weight.ready) == 4, "a call that is stale gives its place to the one that replaces it"
    x, added, compute = asked[4]
    assert run(weight.ready, x, weight.data, added, compute) is not None


@needs_module
def test_a_gradient_is_there_when_it_is_asked_for_after_calls_without_one() -> None:
    x, weight = problem("fp32")
    weight.data.requires_grad_()
    with torch.no_grad():
        call = warm(x, weight)
        assert run(call, x, weight.data, None, None) is not None
    assert run(call, x, weight.data, None, None) is None
    vecmat.matmul(x, weight).sum().backward()
    assert weight.data.grad is not None
    assert vecmat.matmul(x.requires_grad_(), weight.data).requires_grad


@needs_module
@torch.inference_mode()
def test_a_subclass_of_tensor_and_a_vmapped_x_go_the_long_way() -> None:
    x, weight = problem("fp32")
    call = warm(x, weight)
    assert run(call, x.as_subclass(type("Mine", (Tensor,), {})), weight.data, None, None) is None
    assert run(call, torch.nn.Parameter(x, requires_grad=False), weight.data, None, None) is not None
    seen: list[Any] = []

    def product(row: Tensor) -> Tensor:
        seen.append(run(call, row[None].expand(3, -1), weight.data, None, None))
        return vecmat.matmul(row[None], weight.data)

    y = torch.func.vmap(product)(x)
    assert seen == [None]
    torch.testing.assert_close(y[:, 0], x @ weight.data.t())


@needs_module
def test_a_dense_weight_that_was_moved_or_replaced_is_read_where_it_is_now() -> None:
    x, weight = problem("fp32")
    with torch.no_grad():
        warm(x, weight)
        weight.data.data = torch.randn(70, 96)
        assert torch.equal(vecmat.matmul(x, weight), vecmat.matmul(x, weight.data, kernel="cpu_dense"))
        layer = vecmat.Linear.from_weight(problem("int8")[1])
        other = problem("int8", n=70, k=96)[1].copy()
        for _ in range(3):
            layer(x.bfloat16())
        layer.load_state_dict({"weight": -other.data, "weight_scale": other.scale})
        negated = vecmat.Weight("int8", -other.data, other.scale)
        assert torch.equal(layer(x.bfloat16()), vecmat.matmul(x.bfloat16(), negated))


@needs_module
@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["nk", "kn"])
@torch.inference_mode()
def test_a_packed_dense_weight_is_called_with_the_bits_of_the_long_way(packs: None, fmt: str, layout: Any) -> None:
    for m, n, k, biased in ((1, 1, 1, True), (1, 70, 96, False), (3, 33, 250, True), (17, 129, 64, False)):
        for kind in ("fp32", fmt):
            x, nk = problem(fmt, m, n, k, kind)
            weight = nk if layout == "nk" else vecmat.Weight(fmt, nk.data.t().contiguous(), layout="kn")
            bias = torch.randn(n).to(x.dtype) if biased else None
            long = vecmat.matmul(x, weight, bias, kernel="cpu_packed")
            call = warm(x, weight, bias)
            with poisoned(m, n, x.dtype, "cpu"):
                y = run(call, x, weight.data, bias, None)
            assert y is not None, (m, n, k, kind)
            assert torch.equal(y, long)
            assert Truth.of(x, weight, bias).verdict(y) is None
            assert run(call, x, weight.data.clone(), bias, None) is None, "another weight"


@needs_module
def test_a_packed_dense_weight_that_was_written_to_is_packed_again(packs: None) -> None:
    x, weight = problem("bf16")
    with torch.no_grad():
        for change in (
            lambda: weight.data.neg_(),
            lambda: weight.data[3:4].fill_(2),
            lambda: setattr(weight.data, "data", torch.randn(70, 96).bfloat16()),
        ):
            call = warm(x, weight)
            before = run(call, x, weight.data, None, None)
            assert before is not None
            change()
            assert run(call, x, weight.data, None, None) is None
            after = vecmat.matmul(x, weight)
            assert Truth.of(x, weight).verdict(after) is None
            assert not torch.equal(after, before)
            assert torch.equal(vecmat.matmul(x, weight), after)
            assert vecmat.matmul(x, weight, kernel="cpu_packed").equal(after)
    layer = vecmat.Linear.from_linear(torch.nn.Linear(96, 70, dtype=torch.bfloat16)).requires_grad_(False)
    assert layer.bias is not None
    for _ in range(3):
        layer(x)
    layer.weight.data = torch.randn(70, 96).bfloat16()
    assert Truth.of(x, vecmat.Weight("bf16", layer.weight.detach()), layer.bias).verdict(layer(x)) is None
    layer.load_state_dict({"weight": torch.ones(70, 96), "bias": torch.zeros(70)})
    torch.testing.assert_close(layer(x), x.float().sum(1, keepdim=True).expand(3, 70).bfloat16())


@needs_module
def test_the_compiled_call_sees_what_became_of_a_packed_dense_weight(packs: None) -> None:
    x, weight = problem("fp32")
    parts = None, None, None, "fp32", 96, "nk", None, None, None
    with torch.no_grad():
        for _ in range(3):
            for _ in range(3):
                direct = torch.ops.vecmat.direct(x, weight.data, *parts)
            assert torch.equal(direct, vecmat.matmul(x, weight))
            assert Truth.of(x, weight).verdict(direct) is None
            weight.data.neg_()


@needs_module
@torch.inference_mode()
def test_a_packed_dense_weight_of_inference_mode_is_called_too_and_gone_with_its_copy(packs: None) -> None:
    x, weight = problem("fp32")
    call = warm(x, weight)
    assert run(call, x, weight.data, None, None) is not None
    copy = weakref.ref(next(iter(weight.packs.values())).tensors[0])
    data = weakref.ref(weight.data)
    del weight, call
    gc.collect()
    assert copy() is None
    assert data() is None


@needs_module
@torch.inference_mode()
def test_a_weight_goes_with_its_packed_copy_when_nobody_has_it() -> None:
    x, weight = problem("int4:g32")
    warm(x, weight)
    copy = weakref.ref(next(iter(weight.packs.values())).tensors[0])
    data = weakref.ref(weight.data)
    del weight
    gc.collect()
    assert copy() is None
    assert data() is None


@needs_module
@torch.inference_mode()
def test_a_default_device_is_not_where_a_cpu_product_goes() -> None:
    for fmt in ("int8", "fp32"):
        x, weight = problem(fmt)
        long = vecmat.matmul(x, weight)
        torch.set_default_device("meta")
        try:
            found = [vecmat.matmul(x, weight) for _ in range(4)]
        finally:
            torch.set_default_device(None)
        assert all(torch.equal(y, long) for y in found)


def test_without_the_module_everything_works(python: Callable[..., str]) -> None:
    code = (
        "import sys, torch\n"
        "sys.modules['vecmat._call'] = None\n"
        "import vecmat\n"
        "from vecmat.ready import able\n"
        "w = vecmat.quantize(torch.randn(64, 96), 'int8')\n"
        "x = torch.randn(2, 96)\n"
        "y = [vecmat.matmul(x, w) for _ in range(4)]\n"
        "z = torch.ops.vecmat.matmul(x, w.data, w.scale, None, None, 'int8', 96, 'nk', None, None, None)\n"
        "print(able(), w.ready, all(torch.equal(y[0], other) for other in [*y, z]))"
    )
    assert python(code).strip() == "False None True"
