"""torch.compile, torch.export and autograd see one opaque operator, which computes what the eager call computes."""

from __future__ import annotations

import copy
import gc
import io
import re
import shutil
import weakref
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounter
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import vecmat
from cases import DENSE, FORMATS, computes, generator
from oracle import Truth, exact
from vecmat import library, packs, tuner
from vecmat.kernels import registry
from vecmat.problem import DTYPES

N, K = 48, 128
STORED = ("int8", "int8:g32", "int4:g32", "int4:g32:zp", "fp8")  # quantised: one of each kind
OP = torch.ops.vecmat.matmul.default
INDUCTOR = pytest.param(
    "inductor",
    marks=pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None, reason="Inductor needs a C++ compiler"
    ),
)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled, nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator("compile", shape)).to(dtype)


def quantised(fmt: str, layout: str = "nk", *, n: int = N, k: int = K, seed: str = "") -> vecmat.Weight:
    w = torch.randn(n, k, generator=generator("weight", n, k, seed)) * 0.1
    return vecmat.quantize(w if layout == "nk" else w.t().contiguous(), fmt, layout=layout)


def asked(x: Tensor, weight: vecmat.Weight | Tensor, bias: Tensor | None = None, *, layout: str = "nk",
          out_dtype: torch.dtype | None = None, kernel: str | None = None,
          compute: str | None = None) -> tuple[Any, ...]:  # fmt: skip
    """The operator's arguments for a product."""
    if isinstance(weight, Tensor):
        stored, about = (weight, None, None), ("", x.shape[-1], layout)
    else:
        layout = weight.layout if weight.format.dense else layout
        stored, about = (weight.data, weight.scale, weight.zero), (str(weight.format), weight.k, layout)
    return x, *stored, bias, *about, out_dtype, kernel, compute


def xs(fmt: str) -> list[torch.dtype]:
    """The dtypes of x worth trying: fp32 and bf16, or a dense weight's own."""
    return [DTYPES[fmt]] if fmt in DENSE else [torch.float32, torch.bfloat16]


def packing_kernel(fmt: str, x: torch.dtype = torch.bfloat16) -> str:
    """A kernel of this machine that packs weights of a format."""
    for name, kernel in registry()[0].items():
        if kernel.packing is None:
            continue
        try:
            vecmat.explain(draw(1, K, dtype=x), quantised(fmt), kernel=name)
        except ValueError:
            continue
        return name
    pytest.skip(f"no kernel packs {fmt} here")


class Tiny(nn.Module):
    """An embedding, blocks with an MLP and a norm, a head that is tied to the embedding."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.up = nn.Linear(64, 96)
            self.down = nn.Linear(96, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(self.norm(x))))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(self.Block() for _ in range(3))
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tiny(weights: str) -> nn.Module:
    torch.manual_seed(0)
    return vecmat.convert(Tiny().requires_grad_(False), weights)


def tokens(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=generator("tokens", shape))


class Adapter(nn.Module):
    """A frozen layer with a trainable update of low rank beside it (LoRA)."""

    def __init__(self, base: nn.Module, rank: int = 4) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(draw(rank, base.in_features) * 0.1)
        self.b = nn.Parameter(draw(base.out_features, rank) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.a.t()) @ self.b.t()


# The operator itself.


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_operator_passes_torchs_own_checks(fmt: str) -> None:
    """Schema, gradient, fake, and tracing with dynamic shapes, for x of one to four dimensions."""
    for layout in ("nk", "kn") if fmt in DENSE else ("nk",):
        weight = quantised(fmt, layout)
        for shape, biased in (((K,), True), ((3, K), False), ((2, 3, K), True), ((2, 1, 3, K), False)):
            dtype = xs(fmt)[-1]
            x, bias = draw(*shape, dtype=dtype), draw(N, dtype=dtype) if biased else None
            # torch's schema check compares the arguments before and after, which it cannot for float8: see below.
            checks = ["test_schema"] if not fmt.startswith("fp8") else []
            checks += ["test_autograd_registration", "test_faketensor"]
            checks += ["test_aot_dispatch_dynamic"] if len(shape) in (1, 4) else []  # it takes a second
            torch.library.opcheck(OP, asked(x.requires_grad_(), weight, bias), test_utils=checks)
            before = weight.data.clone().view(torch.uint8)
            OP(*asked(x.detach(), weight, bias))
            assert torch.equal(weight.data.view(torch.uint8), before)


@pytest.mark.parametrize("fmt", ["fp32", *STORED])
def test_the_result_has_the_strides_that_were_promised_whatever_x_is(fmt: str) -> None:
    weight = quantised(fmt)
    forms = draw(5, 2, K).transpose(0, 1), draw(K, 6).t(), draw(3, K, 2).permute(2, 0, 1), draw(1, K).expand(4, K)
    for x in (*forms, draw(0, K), draw(2, 0, K), draw(3, 2 * K)[:, ::2]):
        for out_dtype in (None, torch.bfloat16):
            torch.library.opcheck(OP, asked(x, weight, out_dtype=out_dtype), test_utils="test_faketensor")
            assert torch.equal(
                OP(*asked(x, weight, out_dtype=out_dtype)), vecmat.matmul(x, weight, out_dtype=out_dtype)
            )


def test_a_fake_call_makes_the_complaints_of_a_real_one() -> None:
    weight, x = quantised("int8"), draw(2, K)
    wrong: list[tuple[str, dict[str, Any]]] = [
        ("K=128 but x has K=127", {"x": x[:, 1:]}),
        ("x has no dimensions", {"x": x[0, 0]}),
        ("x is torch.float64", {"x": x.double()}),
        ("bias has shape", {"bias": torch.zeros(3)}),
        ("bias is torch.float64", {"bias": torch.zeros(N, dtype=torch.float64)}),
        ("out_dtype is torch.float64", {"out_dtype": torch.float64}),
        ("compute='fp8' multiplies", {"compute": "fp8"}),
        ("compute is 'int3'", {"compute": "int3"}),
        ("expected 'nk' for a weight", {"layout": "mk"}),
        ("weight is torch.float32 but x is torch.bfloat16", {"x": x.bfloat16(), "weight": draw(N, K)}),
    ]
    for message, options in wrong:
        given = {"x": x, "weight": weight, **options}
        for call in (vecmat.matmul, lambda **given: OP(*asked(**given))):
            with pytest.raises((ValueError, TypeError), match=message):
                call(**given)
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises((ValueError, TypeError), match=message):
            OP(*asked(**given))
    with pytest.raises(ValueError, match="weight has shape"):
        torch.ops.vecmat.linear(x, draw(1, N, K), None, "", "nk", None)


def test_eager_calls_do_not_go_through_the_operator() -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    layer = vecmat.Linear(K, N, weights="int8")
    with Seen(), torch.no_grad():
        for _ in range(2):
            vecmat.matmul(draw(2, K), quantised("fp8"))
            layer(draw(2, K))
    assert names
    assert not [name for name in names if name.startswith("vecmat")]


# torch.compile.


@pytest.mark.parametrize("fmt", [*DENSE, *STORED])
def test_a_compiled_product_is_the_eager_one_bit_for_bit(fmt: str) -> None:
    weight, other = quantised(fmt), quantised(fmt, seed="other")
    for dtype, compute in product(xs(fmt), computes(fmt)):
        torch._dynamo.reset()
        bias = draw(N, dtype=dtype) if dtype == torch.bfloat16 else None
        held = {"weight": weight}
        compiled = torch.compile(
            lambda x, b, held=held, compute=compute: vecmat.matmul(x, held["weight"], b, compute=compute),
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        with torch.no_grad():
            for m in (1, 3, 8, 40):
                x = draw(m, K, dtype=dtype)
                assert torch.equal(compiled(x, bias), vecmat.matmul(x, weight, bias, compute=compute)), (m, dtype)
            held["weight"] = other  # nothing of the first weight may have stayed in the graph
            assert torch.equal(compiled(x, bias), vecmat.matmul(x, other, bias, compute=compute)), dtype


@pytest.mark.parametrize("fmt", ["fp32", "int4:g32"])
@pytest.mark.parametrize("backend", [INDUCTOR])
def test_inductor_keeps_the_bits_of_an_opaque_product(fmt: str, backend: str) -> None:
    weight, bias = quantised(fmt), draw(N)
    kernel = "fallback"  # of a dense weight torch's own product would not be opaque
    compiled = torch.compile(
        lambda x: vecmat.matmul(x, weight, bias, kernel=kernel) * 2, backend=backend, fullgraph=True, dynamic=True
    )
    for shape in ((3, K), (5, K), (7, K)):
        assert torch.equal(compiled(draw(*shape)), vecmat.matmul(draw(*shape), weight, bias, kernel=kernel) * 2)


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4", "fp8"])
def test_a_converted_model_compiles_whole_and_recompiles_once(weights: str) -> None:
    model = tiny(weights)
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        compiled(tokens(2, 5))
        compiled(tokens(2, 6))  # torch makes the length dynamic when it changes first
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (7, 8, 9, 17, 40):
                assert torch.equal(compiled(tokens(2, length)), model(tokens(2, length)))
        assert graphs.frame_count == 2
        compiled(tokens(2, 1))  # one row: torch's own 0/1 specialisation
        assert graphs.frame_count <= 3
    assert not counters["graph_break"]


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_a_length_that_is_marked_dynamic_never_recompiles(weights: str) -> None:
    model = tiny(weights)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        first = tokens(2, 5)
        torch._dynamo.mark_dynamic(first, 1, min=2, max=64)
        compiled(first)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for length in (2, 3, 8, 64):
                assert torch.equal(compiled(tokens(2, length)), model(tokens(2, length)))


@pytest.mark.parametrize("backend", [INDUCTOR])
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_inductor_agrees_on_a_model(weights: str, backend: str) -> None:
    model = tiny(weights)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        for shape in ((2, 5), (2, 9)):
            torch.testing.assert_close(compiled(tokens(*shape)), model(tokens(*shape)), rtol=1e-4, atol=1e-4)


def test_one_compiled_block_serves_all_blocks_each_with_its_own_weights() -> None:
    model = tiny("int8")
    expected = model(tokens(2, 5))
    graphs = CompileCounter()
    for block in model.blocks:
        block.compile(backend=graphs, fullgraph=True)
    assert torch.equal(model(tokens(2, 5)), expected)
    assert graphs.frame_count == 1


def test_a_hook_on_a_layer_is_called_in_the_compiled_model() -> None:
    model = tiny("int8")
    plain = model(tokens(2, 5))
    model.head.register_forward_hook(lambda module, args, y: y * 2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(tokens(2, 5)), plain * 2)


def test_a_layer_that_gathers_the_columns_of_x_does_so_in_the_compiled_model() -> None:
    order = torch.randperm(K, generator=generator("order"))
    layer = vecmat.Linear.from_weight(quantised("int4:g32"), order=order)
    x = draw(3, K)
    expected = layer(x)
    torch.testing.assert_close(expected, x[:, order] @ layer.stored().dequantize().t())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(compiled, expected)


def test_kernel_out_dtype_and_layout_are_what_they_are_in_eager() -> None:
    x, dense = draw(4, K, dtype=torch.bfloat16), draw(K, N, dtype=torch.bfloat16)
    weight = quantised("int8")
    cases: list[tuple[Any, dict[str, Any]]] = [
        (weight, {"kernel": "fallback"}),
        (weight, {"out_dtype": torch.float32}),
        (weight, {"compute": "int8", "out_dtype": torch.float16}),
        (dense, {"layout": "kn"}),
        (dense, {"layout": "kn", "kernel": "fallback"}),
        (dense, {"layout": "kn", "out_dtype": torch.float32}),
        (vecmat.quantize(draw(N, K), "fp16"), {}),
    ]
    for stored, options in cases:
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda x, stored=stored, options=options: vecmat.matmul(x, stored, **options),
            backend="aot_eager", fullgraph=True,
        )  # fmt: skip
        expected = vecmat.matmul(x, stored, **options)
        assert torch.equal(compiled(x), expected), options
        assert compiled(x).dtype == expected.dtype
    compiled = torch.compile(lambda x: vecmat.matmul(x, weight, kernel="torch_dense"), backend="aot_eager")
    with pytest.raises(ValueError, match="'torch_dense' cannot run"):
        compiled(x)


def test_a_dense_product_is_torchs_to_fuse_exactly_where_torch_would_be_chosen() -> None:
    seen = set()
    cases = [*product(("fp32", "bf16"), ("nk", "kn"), (1, 64), (None,)), ("bf16", "nk", 1, torch.float32)]
    for fmt, layout, m, out_dtype in cases:
        torch._dynamo.reset()
        x, w = draw(m, 256, dtype=DTYPES[fmt]), draw(*((512, 256) if layout == "nk" else (256, 512)), dtype=DTYPES[fmt])
        options: Any = {"layout": layout, "out_dtype": out_dtype}
        recorded = AotEagerAndRecordGraphs()
        compiled = torch.compile(
            lambda x, w, options=options: vecmat.matmul(x, w, **options), backend=recorded, fullgraph=True
        )
        assert torch.equal(compiled(x, w), vecmat.matmul(x, w, **options))
        opaque = any("vecmat" in str(node.target) for node in recorded.fw_graphs[0].graph.nodes)
        assert opaque == (vecmat.explain(x, w, **options).plan.kernel.name != "torch_dense"), (fmt, layout, m)
        seen.add(opaque)
    assert True in seen  # torch's own kernel gives no fp32 from bf16


def test_a_dense_product_of_any_length_is_opaque_if_another_kernel_would_win_for_some() -> None:
    w = draw(512, 256, dtype=torch.bfloat16)
    names = {m: vecmat.explain(draw(m, 256, dtype=torch.bfloat16), w).plan.kernel.name for m in (2, 512)}
    recorded = AotEagerAndRecordGraphs()
    compiled = torch.compile(lambda x: vecmat.matmul(x, w), backend=recorded, fullgraph=True, dynamic=True)
    for m in (2, 512):
        x = draw(m, 256, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), vecmat.matmul(x, w))
    if set(names.values()) != {"torch_dense"}:
        assert all("vecmat" in str(graph.graph) for graph in recorded.fw_graphs)
    assert len(recorded.fw_graphs) == 1


@pytest.mark.parametrize("backend", ["aot_eager", INDUCTOR])
def test_a_dense_weight_may_be_computed_in_the_graph(backend: str) -> None:
    """A compiler lets what it computes follow each other in one piece of memory."""
    layer, x = vecmat.Linear.from_linear(nn.Linear(K, K).requires_grad_(False)), draw(4, K)

    def layers(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        for factor in (1, 2, 3):
            x = vecmat.matmul(x, a * factor, kernel="fallback") / K
            x = vecmat.matmul(x, b + factor, layout="kn") / K
            x = torch.func.functional_call(layer, {"weight": a - factor}, (x,)) / K
        return x

    compiled = torch.compile(layers, backend=backend, fullgraph=True)
    with torch.no_grad():
        for seed in ("first", "second"):
            a, b = (quantised("fp32", n=K, seed=seed + side).data for side in "ab")
            torch.testing.assert_close(compiled(x, a, b), layers(x, a, b))


def test_settings_hold_where_the_compiled_product_runs() -> None:
    weight, x = quantised("int8:g32"), draw(2, K)
    compiled = torch.compile(lambda x: vecmat.matmul(x, weight), backend="aot_eager", fullgraph=True)
    compiled(x)
    if {c.kernel for c in vecmat.explain(x, weight).candidates if c.reason is None} != {"fallback"}:
        pytest.skip("more than the fallback runs int8 in groups here")
    with vecmat.settings(strict=True), pytest.raises(vecmat.NoKernelError):
        compiled(x)
    compiled(x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_modes_and_autocast_do_what_they_do_in_eager(weights: str, mode: Callable[[], Any]) -> None:
    layer = vecmat.Linear.from_linear(nn.Linear(K, N).requires_grad_(False), weights)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = draw(2, K)
    with mode():
        assert torch.equal(compiled(x), layer(x))
        assert compiled(x).is_inference() == layer(x).is_inference()
        with torch.autocast("cpu", torch.bfloat16):
            eager = layer(x)
            assert compiled(x).dtype == eager.dtype
            assert torch.equal(compiled(x), eager)


def test_a_vmapped_product_is_right_or_refused() -> None:
    rows = draw(5, 3, K)
    for fmt, dtype in (("bf16", torch.bfloat16), ("int8", torch.bfloat16), ("fp8", torch.float32)):
        torch._dynamo.reset()
        weight, x = quantised(fmt), rows.to(dtype)
        expected = vecmat.matmul(x, weight)

        def one(x: Tensor, weight: vecmat.Weight = weight) -> Tensor:
            return vecmat.matmul(x, weight)

        for dim in (0, 1):
            compiled = torch.compile(torch.vmap(one, dim, dim), backend="aot_eager", fullgraph=True)
            y = compiled(x.transpose(0, dim)).transpose(0, dim)
            torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
        try:
            eager = torch.vmap(one)(x)
        except RuntimeError as error:  # a kernel that needs x's memory
            assert "data pointer" in str(error)  # noqa: PT017 - either way is right
        else:
            torch.testing.assert_close(eager, expected, rtol=2e-2, atol=2e-2)
    with pytest.raises(NotImplementedError, match="vmap over anything but the rows"):
        torch.vmap(lambda b: OP(*asked(rows[0], weight, b)))(draw(4, N))
    weights = draw(5, N, K)
    compiled = torch.compile(torch.vmap(vecmat.matmul), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(rows, weights), torch.vmap(vecmat.matmul)(rows, weights))


# Packed copies.


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[torch.Size]]:
    """A kernel that packs int8 weights, and the shapes of what it has packed since (the weights themselves may go)."""
    kernel = packing_kernel("int8")
    packed: list[torch.Size] = []
    prepare = registry()[0][kernel].prepare
    monkeypatch.setattr(
        registry()[0][kernel], "prepare", lambda weight: packed.append(weight.data.shape) or prepare(weight)
    )
    return kernel, packed


def test_a_weight_is_packed_once_for_eager_and_compiled_calls_of_all_lengths(packing: Any) -> None:
    kernel, packed = packing
    weight = quantised("int8")
    compiled = torch.compile(lambda x: vecmat.matmul(x, weight, kernel=kernel), backend="aot_eager", fullgraph=True)
    for m in (1, 2, 5, 9):
        x = draw(m, K, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), vecmat.matmul(x, weight, kernel=kernel))
    again = vecmat.Weight("int8", weight.data.view(N, K), weight.scale)  # other objects, the same memory
    vecmat.matmul(x, again, kernel=kernel)
    assert torch.equal(OP(*asked(x, again, kernel=kernel)), compiled(x))
    assert len(packed) == 1


def test_a_module_that_only_ever_runs_compiled_packs_once_and_so_does_its_copy(packing: Any) -> None:
    kernel, packed = packing
    layer = vecmat.Linear.from_linear(nn.Linear(K, N, dtype=torch.bfloat16).requires_grad_(False), "int8")
    x = draw(2, K, dtype=torch.bfloat16)
    if vecmat.explain(x, layer.stored(), layer.bias).plan.kernel.name != kernel:
        pytest.skip(f"{kernel} is not what is chosen here")
    twin = copy.deepcopy(layer)
    for each in (layer, twin):
        each.to("cpu")
        compiled = torch.compile(each, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            y = compiled(x)
            each.to("cpu")  # changes nothing
            assert torch.equal(compiled(x), y)
            assert torch.equal(each(x), y)
    assert len(packed) == 2


CHANGES: dict[str, Callable[[vecmat.Linear, vecmat.Linear], object]] = {
    "load_state_dict": lambda layer, other: layer.load_state_dict(other.state_dict()),
    "load_state_dict with assign": lambda layer, other: layer.load_state_dict(other.state_dict(), assign=True),
    "new buffers": lambda layer, other: (
        setattr(layer, "weight", other.weight), setattr(layer, "weight_scale", other.weight_scale)
    ),
    "values in place": lambda layer, other: (
        layer.weight.copy_(other.weight), layer.weight_scale.copy_(other.weight_scale)
    ),
    "scales in place": lambda layer, other: (layer.weight_scale.mul_(3), other.weight_scale.copy_(layer.weight_scale),
                                              other.weight.copy_(layer.weight)),
    "new scales": lambda layer, other: (
        other.weight.copy_(layer.weight), other.weight_scale.copy_(layer.weight_scale * 3),
        setattr(layer, "weight_scale", other.weight_scale),
    ),
    "new memory in the old tensor": lambda layer, other: (
        layer.weight.set_(other.weight), layer.weight_scale.set_(other.weight_scale)
    ),
    "the old layer's tensors": lambda layer, other: layer.__dict__.update(copy.deepcopy(other).__dict__),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inference", [False, True])
def test_a_compiled_layer_computes_with_its_present_weight(change: str, inference: bool) -> None:
    """Wherever torch counts writes; inference tensors, which it does not count, must be loaded or replaced."""
    if inference and "in place" in change:
        pytest.skip("torch does not count writes to inference tensors")
    kernel = packing_kernel("int8")
    x = draw(2, K, dtype=torch.bfloat16)
    with torch.inference_mode(inference), torch.no_grad():
        layer, other = (
            vecmat.Linear.from_weight(quantised("int8", seed=seed), draw(N, dtype=torch.bfloat16)) for seed in "ab"
        )
        before = vecmat.matmul(x, layer.stored(), layer.bias, kernel=kernel)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert torch.equal(OP(*asked(x, layer.stored(), layer.bias, kernel=kernel)), before)
        compiled(x)
        CHANGES[change](layer, other)
        layer.to("cpu")
        stored = vecmat.Weight("int8", layer.weight, layer.weight_scale)
        y = OP(*asked(x, stored, layer.bias, kernel=kernel))
        assert not torch.equal(y, before)
        for result in (y, compiled(x)):
            wrong = Truth.of(x, other.stored().copy(), other.bias).verdict(result)
            assert wrong is None, wrong


def test_memory_that_is_given_to_another_weight_is_another_weight() -> None:
    kernel = packing_kernel("int8")
    x = draw(2, K, dtype=torch.bfloat16)
    places = []
    for attempt in range(20):
        weight = quantised("int8", seed=str(attempt))
        places.append(weight.data.data_ptr())
        wrong = Truth.of(x, weight).verdict(OP(*asked(x, weight, kernel=kernel)))
        assert wrong is None, wrong
        del weight
    assert len(set(places)) < len(places), "no address came twice; the test shows nothing"


def test_memory_that_was_taken_from_under_a_tensor_is_another_weight() -> None:
    """As sharded training takes it, and gives it to the next."""
    kernel = packing_kernel("int8")
    x = draw(2, K, dtype=torch.bfloat16)
    scale, emptied, places = quantised("int8").scale, [], []
    for attempt in range(20):
        weight = vecmat.Weight("int8", quantised("int8", seed=str(attempt)).data, scale)
        places.append(weight.data.data_ptr())
        wrong = Truth.of(x, weight).verdict(OP(*asked(x, weight, kernel=kernel)))
        assert wrong is None, wrong
        weight.data.untyped_storage().resize_(0)
        emptied.append(weight)  # still there, without its memory
    assert len(set(places)) < len(places), "no address came twice; the test shows nothing"


def test_one_memory_may_be_two_weights() -> None:
    square, even = quantised("fp32", n=K), quantised("int4:g32")
    other = vecmat.Weight("fp32", square.data, layout="kn")
    odd = vecmat.Weight("int4:g32", even.data, even.scale, k=K - 1)
    for weight in (square, other, square, even, odd, even):
        x = draw(2, weight.k)
        wrong = Truth.of(x, weight).verdict(OP(*asked(x, weight, kernel="fallback")))
        assert wrong is None, wrong


def test_packed_copies_go_with_the_tensor_they_were_made_of() -> None:
    kernel = packing_kernel("int8")
    x, weight = draw(2, K, dtype=torch.bfloat16), quantised("int8")
    OP(*asked(x, weight, kernel=kernel))
    twin = packs.twin_of(weight.format, weight.data, weight.scale, weight.zero, K, "nk")
    assert twin.packs
    gone = [weakref.ref(twin), weakref.ref(weight.data)]
    del twin
    gc.disable()  # it must not take a collection
    try:
        assert gone[0]() is not None
        del weight
        assert [ref() for ref in gone] == [None, None]
    finally:
        gc.enable()


def test_a_bad_weight_is_refused_by_the_operator_too() -> None:
    weight = quantised("int8")
    arguments = asked(draw(2, K), weight)
    weight.scale[3] = torch.nan
    with pytest.raises(ValueError, match=r"scale\[3, 0\] is nan"):
        OP(*arguments)


def test_a_compiled_product_is_never_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("tuned")

    monkeypatch.setattr(tuner, "tune", never)
    weight, x = quantised("int8"), draw(2, K, dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: vecmat.matmul(x, weight), backend="aot_eager", fullgraph=True)
    with vecmat.tuning(budget_s=60):
        compiled(x)
        with pytest.raises(AssertionError, match="tuned"):
            vecmat.matmul(draw(3, K, dtype=torch.bfloat16), weight)


# Gradients.


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_are_right(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for layout, dtype, block in product(("nk", "kn") if fmt in DENSE else ("nk",), xs(fmt), (library._BLOCK, 16 * K)):
        monkeypatch.setattr(library, "_BLOCK", block)
        weight = quantised(fmt, layout)
        x, bias = draw(2, 3, K, dtype=dtype).requires_grad_(), draw(N, dtype=dtype).requires_grad_()
        if weight.format.dense:
            weight.data.requires_grad_()
        dy = draw(2, 3, N, dtype=dtype)
        OP(*asked(x, weight, bias)).backward(dy)
        assert x.grad.dtype == dtype
        wrong = Truth.of(dy, exact(weight).t()).verdict(x.grad)
        assert wrong is None, (layout, dtype, wrong)
        torch.testing.assert_close(bias.grad, dy.double().sum((0, 1)).to(dtype))
        if weight.format.dense:
            flat = dy.view(6, N).t(), x.detach().view(6, K)
            wrong = Truth.of(*(side.contiguous() for side in (flat[0], flat[1].t()))).verdict(
                weight.data.grad if layout == "nk" else weight.data.grad.t()
            )
            assert wrong is None, (layout, dtype, wrong)


def test_a_gradient_can_be_differentiated_again_and_is_refused_where_there_is_none() -> None:
    weight, x = quantised("int8"), draw(2, K).requires_grad_()
    v, u = draw(2, N).requires_grad_(), draw(2, K)
    (dx,) = torch.autograd.grad(OP(*asked(x, weight)), x, v, create_graph=True)
    (dv,) = torch.autograd.grad(dx, v, u)
    torch.testing.assert_close(dv, u @ weight.dequantize().t())
    with pytest.raises(ValueError, match="compute='int8' has no gradient"):
        OP(*asked(x, weight, compute="int8"))
    layer = vecmat.Linear.from_weight(weight, compute="int8")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="compute='int8' has no gradient"):
        compiled(x)


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4", "fp8"])
def test_adapters_on_a_frozen_model_get_the_gradients_of_the_eager_model(weights: str) -> None:
    model = tiny(weights)
    for block in model.blocks:
        block.up, block.down = Adapter(block.up), Adapter(block.down)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 12

    def gradients(model: nn.Module) -> list[Tensor]:
        return torch.autograd.grad(model(tokens(2, 5)).square().mean(), trained)

    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mine, eager in zip(gradients(compiled), gradients(model), strict=True):
        assert eager.norm() > 0
        torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4 * float(eager.abs().max()))


# torch.export.


@pytest.mark.parametrize("weights", ["bf16", "int4:g32:zp", "fp8", "int8"])
def test_an_exported_model_agrees_saved_and_loaded_too(weights: str) -> None:
    model, strict = tiny(weights).eval(), weights == "int8"  # strict: through Dynamo
    length = {"tokens": {1: torch.export.Dim("length", min=2, max=64)}}
    program = torch.export.export(model, (tokens(2, 5),), dynamic_shapes=length, strict=strict)
    calls = [str(node.target) for node in program.graph.nodes if str(node.target).startswith("vecmat.")]
    assert len(calls) == 7
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file), program.run_decompositions()):
        for shape in ((2, 2), (2, 5), (2, 33)):
            with torch.no_grad():  # with gradients an eager call has fewer kernels to choose from than a program
                assert torch.equal(each.module()(tokens(*shape)), model(tokens(*shape)))
            torch.testing.assert_close(each.module()(tokens(*shape)), model(tokens(*shape)), rtol=1e-4, atol=1e-4)


def test_a_program_that_was_lowered_for_inference_refuses_to_train() -> None:
    layer, x = vecmat.Linear.from_weight(quantised("int8")), draw(2, K)
    program = torch.export.export(layer, (x,))
    expected = draw(2, N) @ layer.stored().dequantize()
    x.requires_grad_()
    program.module()(x).backward(draw(2, N))
    torch.testing.assert_close(x.grad, expected)
    with pytest.raises(RuntimeError, match="no gradient, and x requires one"):
        program.run_decompositions().module()(x)


def test_an_exported_layer_packs_once(packing: Any) -> None:
    kernel, packed = packing
    weight, x = quantised("int8"), draw(2, K, dtype=torch.bfloat16)

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("data", weight.data)
            self.register_buffer("scale", weight.scale)

        def forward(self, x: Tensor) -> Tensor:
            return OP(x, self.data, self.scale, None, None, "int8", K, "nk", None, kernel, None)

    program = torch.export.export(Product(), (x,)).module()
    for _ in range(3):
        assert Truth.of(x, weight).verdict(program(x)) is None
    assert len(packed) == 1


# CUDA graphs.


def decoder(weights: str) -> nn.Sequential:
    """Two layers on the GPU with nothing between them that a compiler could fuse."""
    layers = [vecmat.quantize(draw(n, k, dtype=torch.bfloat16) * 0.1, weights) for n, k in ((256, 128), (64, 256))]
    return nn.Sequential(*(vecmat.Linear.from_weight(layer) for layer in layers)).requires_grad_(False).cuda()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the operator runs in Python, which a replayed CUDA graph does not."""
    counted: list[int] = []
    find = packs.twin_of
    monkeypatch.setattr(library, "twin_of", lambda *arguments: counted.append(1) or find(*arguments))
    return counted


def replayed(compiled: Callable[[Tensor], Tensor], x: Tensor, runs: list[int]) -> Tensor:
    """The result of a CUDA graph's replay: warm-up and recording come first."""
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        compiled(x)
    before = len(runs)
    torch.compiler.cudagraph_mark_step_begin()
    y = compiled(x).clone()
    assert len(runs) == before, "the graph was not replayed"
    assert not counters["inductor"]["cudagraph_skips"]
    return y


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["bf16", *STORED])
def test_a_replayed_cuda_graph_agrees_with_eager(weights: str, runs: list[int]) -> None:
    model = decoder(weights)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for m in (1, 8):
            x = draw(m, 128, dtype=torch.bfloat16).cuda()
            torch.testing.assert_close(replayed(compiled, x, runs), model(x))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("weights", STORED)
def test_a_cuda_graph_never_replays_an_old_weight(weights: str, runs: list[int]) -> None:
    model, x = decoder(weights), draw(1, 128, dtype=torch.bfloat16).cuda()
    other = copy.deepcopy(model)
    for layer in other:
        layer.weight_scale.mul_(2)
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        first = replayed(compiled, x, runs)
        torch.testing.assert_close(first, model(x))
        model.load_state_dict(other.state_dict())
        torch.testing.assert_close(replayed(compiled, x, runs), other(x))
        assert (other(x) - first).abs().max() > first.abs().max()
        for _ in range(3):  # the memory of the old weights is free, and comes back as the new ones'
            model.cpu()
            model.cuda()
            torch.testing.assert_close(replayed(compiled, x, runs), other(x))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["int8", "int4:g128", "fp8"])
def test_a_cuda_graph_of_a_function_that_holds_a_weight_is_right(weights: str, runs: list[int]) -> None:
    """torch copies the weight into the graph's memory, so that it is another weight than in the warm-up run."""
    weight = quantised(weights, n=64).to("cuda")
    x = draw(1, K, dtype=torch.bfloat16).cuda()
    compiled = torch.compile(lambda x: vecmat.matmul(x, weight), mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(replayed(compiled, x, runs), vecmat.matmul(x, weight))


@gpu
@pytest.mark.gpu
def test_a_copy_that_is_packed_during_a_capture_is_not_kept() -> None:
    weight, x = quantised("int4:g128", n=64).to("cuda"), draw(1, K, dtype=torch.bfloat16).cuda()
    vecmat.matmul(x, weight.copy(), kernel="torch_int4")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = vecmat.matmul(x, weight, kernel="torch_int4")
    assert not weight.packs  # what a capture makes exists in replays only
    graph.replay()
    torch.testing.assert_close(y, vecmat.matmul(x, weight, kernel="torch_int4"))


# The page for users.


@pytest.mark.parametrize("backend", [INDUCTOR])
def test_the_examples_of_the_page_on_compiling_run(backend: str) -> None:
    page = Path(__file__).parent.parent / "docs" / "compile.md"
    examples = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert len(examples) >= 3
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for example in examples:
        exec(compile(example, str(page), "exec"), names)
