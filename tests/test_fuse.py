"""fuse(): layers with the same x are one product, which computes what they did, and is never given to another x."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vecmat
from cases import generator
from oracle import Truth
from vecmat.fusing import Joined, Part

FORMATS = ("fp32", "int8", "int8:g32", "int4:g32", "int4:g32:zp", "fp8")
SIZES = {"q": 96, "k": 32, "v": 48}
K = 64


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(shape))


class Attention(nn.Module):
    """Three layers with the same x; a bias each, or none."""

    def __init__(self, bias: tuple[bool, bool, bool] = (True, True, True)) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(K, n, b) for n, b in zip(SIZES.values(), bias, strict=True))
        self.o = nn.Linear(sum(SIZES.values()), K, bias=False)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:-1], -1)
        k = self.k(x)
        v = self.v(x)
        return self.o(torch.cat([q, k, v], -1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(K, 128, bias=False), nn.Linear(K, 128, bias=False)
        self.down = nn.Linear(128, K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(Attention(), Gated()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def pair(weights: str, model: nn.Module, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The same model with a format, apart and fused; no gradients are asked for."""
    model = model.eval().requires_grad_(False).to(device, dtype)
    name = weights if weights != "fp32" or dtype == torch.float32 else "bf16"
    apart = vecmat.convert(copy.deepcopy(model), name)
    fused = vecmat.convert(model, name, fuse=True)
    return apart, fused


def same_state(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor.view(torch.uint8), second[name].contiguous().view(torch.uint8)), name


class Products:
    """Counts what joined layers compute."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        for module in model.modules():
            if isinstance(module, Joined):
                module.register_forward_pre_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


# What it computes


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("bias", [(True, True, True), (False, False, False), (True, False, True)])
def test_each_part_computes_with_the_weight_it_had(weights: str, bias: tuple[bool, bool, bool], device: str) -> None:
    apart, fused = pair(weights, Attention(bias), device)
    products = Products(fused)
    with torch.no_grad():
        for shape in ((K,), (1, K), (2, 3, K), (17, K), (0, K)):
            x = draw(*shape).to(device)
            for name, y in zip(SIZES, fused.parts(x), strict=True):
                layer = apart.get_submodule(name)
                assert y.shape == (*shape[:-1], SIZES[name])
                wrong = Truth.of(x, layer.stored(), layer.bias).verdict(y)
                assert wrong is None, f"{name}: {wrong}"
    assert products.count == 5


@pytest.mark.parametrize("weights", FORMATS)
def test_a_model_gives_what_it_gave_apart(weights: str, device: str) -> None:
    apart, fused = pair(weights, Model(), device)
    x = draw(3, 5, K).to(device)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), apart(x))
        torch.testing.assert_close(fused(x[:, ::2, :]), apart(x[:, ::2, :]))  # rows that are not side by side


def test_the_others_results_are_columns_of_the_first_ones_product() -> None:
    _, fused = pair("int8", Attention())
    with torch.no_grad():
        q, k, v = fused.parts(draw(4, K))
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
    assert fused.q._handover.held is None  # nothing is kept once the last has its part


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_x_that_changed_between_the_calls_is_multiplied_anew(mode: Any) -> None:
    apart, fused = pair("int8", Attention())
    with mode():
        x = draw(4, K) + 0
        fused.q(x)
        x.mul_(-3)
        torch.testing.assert_close(fused.k(x), apart.k(x))
        fused.q(x)
        torch.testing.assert_close(fused.k(x), apart.k(x))
        torch.testing.assert_close(fused.v(x.clone()), apart.v(x))
        torch.testing.assert_close(fused.v(2 * x), apart.v(2 * x))


def test_a_part_that_is_called_alone_or_first_or_twice_is_right() -> None:
    apart, fused = pair("int4:g32", Attention())
    x, other = draw(2, K), draw(3, K)
    with torch.no_grad():
        torch.testing.assert_close(fused.v(x), apart.v(x))
        torch.testing.assert_close(fused.q(other), apart.q(other))
        for _ in range(2):
            torch.testing.assert_close(fused.k(x), apart.k(x))
            torch.testing.assert_close(fused.k(other), apart.k(other))
        torch.testing.assert_close(fused.q(x), apart.q(x))
        torch.testing.assert_close(fused.v(x), apart.v(x))
        torch.testing.assert_close(fused.k(x), apart.k(x))


def test_gradients_for_x_are_those_of_the_layers_apart() -> None:
    apart, fused = pair("int8", Model())
    products = Products(fused)
    grads = []
    for model in (apart, fused):
        x = draw(2, K).requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)
    assert products.count == 0


def test_threads_that_use_one_model_do_not_get_each_others_results() -> None:
    apart, fused = pair("int8", Attention())
    wrong: list[float] = []

    def work(seed: int) -> None:
        for i in range(200):
            x = torch.randn(1 + seed, K, generator=torch.Generator().manual_seed(1000 * seed + i))
            with torch.no_grad():
                far = (fused(x) - apart(x)).abs().max()
            if far > 1e-4:
                wrong.append(float(far))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# How it is stored


@pytest.mark.parametrize("weights", FORMATS)
def test_the_state_dict_is_that_of_the_layers_apart_and_loads_both_ways(weights: str) -> None:
    apart, fused = pair(weights, Model())
    same_state(apart, fused)
    torch.manual_seed(1)
    other, other_fused = pair(weights, Model())
    x = draw(3, K)
    with torch.no_grad():
        assert not torch.allclose(fused(x), other(x))
        fused.load_state_dict(other.state_dict())
        torch.testing.assert_close(fused(x), other(x))
        same_state(fused, other)
        apart.load_state_dict(other_fused.state_dict())
        torch.testing.assert_close(apart(x), other(x))
        fused.load_state_dict(other.state_dict(), assign=True)
        torch.testing.assert_close(fused(x), other(x))


def test_a_state_dict_that_lacks_a_part_or_holds_a_wrong_one_is_refused_and_changes_nothing() -> None:
    _, fused = pair("int8", Attention())
    kept, x = fused.state_dict(), draw(2, K)
    kept = {name: tensor.clone() for name, tensor in kept.items()}
    with torch.no_grad():
        before = fused(x)
    with pytest.raises(RuntimeError, match=r'Missing key.*"k.weight"'):
        fused.load_state_dict({name: tensor for name, tensor in kept.items() if name != "k.weight"})
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"v.more"'):
        fused.load_state_dict({**kept, "v.more": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"k.weight is torch.float32; int8 weights expect torch.int8"):
        fused.load_state_dict({**kept, "k.weight": kept["k.weight"].float()})
    with pytest.raises(RuntimeError, match="size mismatch"):
        fused.load_state_dict({**kept, "v.weight": kept["v.weight"][:-1]})
    scale = kept["v.weight_scale"].clone()
    scale[2] = torch.nan
    with pytest.raises(RuntimeError, match=r"v.weight: Weight: scale\[2, 0\] is nan"):
        fused.load_state_dict({**kept, "v.weight_scale": scale})
    with torch.no_grad():
        torch.testing.assert_close(fused(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("weights", FORMATS)
def test_a_copy_is_fused_and_independent(weights: str) -> None:
    _, fused = pair(weights, Model())
    x = draw(3, K)
    with torch.no_grad():
        fused.blocks[0][0].q(x)  # something is held while it is copied
        before = fused(x)
        stored = io.BytesIO()
        torch.save(fused, stored)
        stored.seek(0)
        copies = [copy.deepcopy(fused), torch.load(stored, weights_only=False)]
        copies += [] if weights == "fp8" else [pickle.loads(pickle.dumps(fused))]  # torch cannot pickle float8
        for made in copies:
            same_state(made, fused)
            products = Products(made)
            torch.testing.assert_close(made(x), before, rtol=0, atol=0)
            assert products.count == 4
            part = made.blocks[0][0].k
            assert part._product is made.blocks[0][0].q.joined
            state = part.state_dict()
            name = "weight" if weights == "fp32" else "weight_scale"
            part.load_state_dict({**state, name: 2 * state[name]})
            assert not torch.allclose(made(x), before)
        torch.testing.assert_close(fused(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("weights", FORMATS)
def test_moving_and_casting_a_model_does_what_it_does_apart(weights: str, device: str) -> None:
    apart, fused = pair(weights, Model())
    for change in (lambda m: m.to(device), lambda m: m.bfloat16(), lambda m: m.half().to("cpu"), lambda m: m.float()):
        change(apart), change(fused)
        same_state(apart, fused)
        layer = fused.blocks[0][0].q
        x = draw(3, K).to(layer.weight.device, layer.bias.dtype)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), apart(x), rtol=0.02, atol=0.02)
        assert str(layer.format) == str(apart.blocks[0][0].q.format)


def test_a_model_without_data_takes_it_only_before_it_is_fused() -> None:
    with torch.device("meta"):
        model = vecmat.convert(Attention().requires_grad_(False), "int8", fuse=True)
    _, other = pair("int8", Attention())
    with pytest.raises(RuntimeError, match="load first, then fuse"):
        model.load_state_dict(other.state_dict(), assign=True)


def test_what_would_put_another_tensor_in_a_parts_place_fails_loudly() -> None:
    _, fused = pair("fp32", Attention())
    x, other = draw(2, K), draw(SIZES["k"], K)
    with pytest.raises((AttributeError, KeyError, TypeError)):
        torch.func.functional_call(fused, {"k.weight": other}, (x,))
    with pytest.raises((AttributeError, KeyError)):
        fused.k.weight = nn.Parameter(other)
    with pytest.raises((AttributeError, KeyError)):
        fused.k.bias = None


def test_hooks_and_the_training_flag_go_over() -> None:
    model, seen = Attention().eval().requires_grad_(False), []
    model.k.register_forward_hook(lambda *_: seen.append("k"))
    vecmat.convert(model, "int8", fuse=True)
    with torch.no_grad():
        model(draw(2, K))
    assert isinstance(model.k, Part)
    assert seen == ["k"]
    assert not model.k.training
    assert not model.q.joined.training


# Compiled


def compiled(model: nn.Module, **options: Any) -> tuple[Any, list[int]]:
    """The compiled model, and a list that gets each graph's number of products."""
    counts: list[int] = []
    torch._dynamo.reset()

    def backend(graph: Any, example: Any) -> Any:
        targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        counts.append(sum("vecmat" in target and ("matmul" in target or "linear" in target) for target in targets))
        return graph.forward

    return torch.compile(model, backend=backend, fullgraph=True, **options), counts


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4:g32:zp"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_compiled_graph_has_one_product_for_all_parts(weights: str, mode: Any) -> None:
    apart, fused = pair(weights, Model())
    run, counts = compiled(fused)
    with mode():
        for rows in (1, 4, 9, 17):
            torch.testing.assert_close(run(draw(rows, K)), apart(draw(rows, K)))
    assert set(counts) == {2 * 4}  # of 7 layers a block
    assert len(counts) <= 3  # one row, a length, and all lengths
    assert fused.blocks[0][0].q._handover.held is None


def test_a_compiled_call_sees_what_was_loaded_and_what_was_changed() -> None:
    apart, fused = pair("int8", Model())
    torch.manual_seed(1)
    other, _ = pair("int8", Model())
    run, counts = compiled(fused)
    x = draw(3, K)
    with torch.no_grad():
        torch.testing.assert_close(run(x), apart(x))
        fused.load_state_dict(other.state_dict())
        torch.testing.assert_close(run(x), other(x))
        fused.blocks[1][1].up.weight_scale.mul_(3)  # torch counts it
        other.load_state_dict(fused.state_dict())
        torch.testing.assert_close(run(x), other(x))
    assert len(counts) == 1


def test_a_compiled_call_whose_x_asks_for_a_gradient_is_differentiable() -> None:
    apart, fused = pair("int8", Attention())
    run, _ = compiled(fused)
    grads = []
    for model in (apart, run):
        x = draw(2, K).requires_grad_()
        model(x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_an_exported_model_computes_the_same() -> None:
    apart, fused = pair("int8", Model())
    x = draw(3, K)
    with torch.no_grad():
        program = torch.export.export(fused, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},))
        for rows in (3, 8):
            torch.testing.assert_close(program.module()(draw(rows, K)), apart(draw(rows, K)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4:g32:zp", "fp8"])
def test_a_replayed_cuda_graph_agrees_and_never_replays_an_old_weight(weights: str) -> None:
    apart, fused = pair(weights, Model(), "cuda", torch.bfloat16)
    torch.manual_seed(1)
    other, _ = pair(weights, Model(), "cuda", torch.bfloat16)
    torch._dynamo.reset()
    run = torch.compile(fused, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for expected in (apart, other, apart):
            fused.load_state_dict(expected.state_dict())
            for rows in (1, 8):
                x = draw(rows, K).cuda().bfloat16()
                for _ in range(4):
                    torch.compiler.cudagraph_mark_step_begin()
                    y = run(x).clone()
                torch.testing.assert_close(y, expected(x), rtol=0.02, atol=0.05)


# What is joined, and what is not


def fused(model: nn.Module, weights: str = "int8", **options: Any) -> vecmat.Fusions:
    return vecmat.fuse(vecmat.convert(model.eval().requires_grad_(False), weights, **options))


def test_the_result_tells_what_was_joined_and_why_the_rest_was_not() -> None:
    found = fused(Model())
    assert ("blocks.0.0.q", "blocks.0.0.k", "blocks.0.0.v") in found.joined
    assert ("blocks.1.1.gate", "blocks.1.1.up") in found.joined
    assert len(found.joined) == 4
    assert found.apart["blocks.0.1.down"] == "what it is given has no name"
    assert "blocks.0.0.q + blocks.0.0.k + blocks.0.0.v" in str(found)
    assert fused(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))).joined == ()


def test_fusing_again_changes_nothing() -> None:
    model = vecmat.convert(Model().eval().requires_grad_(False), "int8", fuse=True)
    assert vecmat.fuse(model).joined == ()


def test_layers_that_are_skipped_stay_and_the_others_are_joined() -> None:
    model = Attention()
    assert fused(model, skip=["k"]).joined == (("q", "v"),)
    assert type(model.k) is nn.Linear
    assert not fused(Gated(), skip=["up"]).joined


def test_layers_that_differ_or_are_shared_or_replaced_are_left() -> None:
    model = vecmat.convert(Attention().requires_grad_(False), "int8", skip=["k"])
    vecmat.convert(model, "fp8")
    assert "differ" in vecmat.fuse(model).apart["k"]

    tied = Gated()
    tied.up.weight = tied.gate.weight
    assert "shared" in fused(tied, "fp32").apart["up"]

    twice = Gated()
    twice.other = nn.Sequential(twice.gate)
    assert "shared" in fused(twice).apart["up"]

    replaced = vecmat.convert(Gated().requires_grad_(False), "int8")
    replaced.gate.forward = lambda x: x
    assert "replaced" in vecmat.fuse(replaced).apart["up"]

    replaced = vecmat.convert(Gated().requires_grad_(False), "int8")
    replaced.forward = lambda x: x
    assert "replaced" in vecmat.fuse(replaced).apart["up"]

    order = torch.arange(K).flip(0)
    ordered = vecmat.convert(Gated().requires_grad_(False), "int8")
    ordered.gate = vecmat.Linear.from_weight(ordered.gate.stored(), order=order)
    assert "orders" in vecmat.fuse(ordered).apart["up"]


def test_layers_with_the_same_order_of_columns_are_joined_and_keep_it() -> None:
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    apart = vecmat.convert(Gated().requires_grad_(False), "int8")
    for name in ("gate", "up"):
        setattr(apart, name, vecmat.Linear.from_weight(apart.get_submodule(name).stored(), order=order))
    fused = copy.deepcopy(apart)
    assert vecmat.fuse(fused).joined == (("gate", "up"),)
    same_state(apart, fused)
    x = draw(2, K)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), apart(x))
        torch.testing.assert_close(fused.up(x), apart.up(x))
    state = fused.state_dict()
    with pytest.raises(RuntimeError, match="is not that of the layers"):
        fused.load_state_dict({**state, "up.weight_order": state["up.weight_order"].flip(0)})
