"""Linear computes what ``torch.nn.Linear`` does, through every way a module is stored, moved and changed."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vecmat
from cases import generator
from oracle import Truth

STORED = ("int8", "int8:g32", "int4:g32", "int4:g32:zp", "fp8")  # quantised: one of each kind
ALL = ("fp32", "bf16", "fp16", *STORED)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=generator(shape)).to(dtype)


def plain(n: int = 32, k: int = 64, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    """A torch.nn.Linear with known numbers, which asks for no gradients."""
    linear = nn.Linear(k, n, dtype=dtype).requires_grad_(False)
    linear.weight.copy_(torch.randn(n, k, generator=generator("weight", n, k)))
    linear.bias.copy_(torch.randn(n, generator=generator("bias", n)))
    return linear


def right(layer: vecmat.Linear, x: Tensor, weight: vecmat.Weight | Tensor, bias: Tensor | None) -> None:
    """Assert that the layer multiplies by this weight."""
    wrong = Truth.of(x, weight, bias).verdict(layer(x))
    assert wrong is None, wrong


@pytest.mark.parametrize("weights", ALL)
def test_a_converted_linear_computes_with_the_weight_it_stores(weights: str, device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        linear = plain(dtype=dtype).to(device)
        layer = vecmat.Linear.from_linear(linear, weights)
        x = draw(2, 3, 64, dtype=dtype).to(device)
        assert layer(x).shape == (2, 3, 32)
        right(layer, x, layer.stored(), linear.bias)
        torch.testing.assert_close(layer(x), linear(x), rtol=0.1, atol=8.0 if "int4" in weights else 1.5)


def test_a_dense_layer_shares_the_parameters_of_the_linear_it_comes_from() -> None:
    linear = nn.Linear(8, 4)
    layer = vecmat.Linear.from_linear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert layer.training == linear.training
    assert vecmat.Linear.from_linear(linear.eval(), "fp32").weight is linear.weight
    assert vecmat.Linear.from_linear(nn.Linear(8, 4, bias=False)).bias is None
    torch.testing.assert_close(layer(draw(3, 8)), linear(draw(3, 8)))


def test_a_transformers_conv1d_becomes_a_layer_of_layout_kn(device: str) -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    conv = utils.Conv1D(12, 32).requires_grad_(False).to(device)
    conv.weight.copy_(draw(32, 12))
    x = draw(5, 32).to(device)
    for weights in (None, "bf16", *STORED):
        layer = vecmat.Linear.from_linear(conv, weights)
        assert (layer.in_features, layer.out_features, layer.layout) == (32, 12, "kn")
        right(layer, x, layer.stored(), conv.bias)
        torch.testing.assert_close(layer(x), conv(x), rtol=0.1, atol=3.0)


@pytest.mark.parametrize("weights", [None, *ALL])
@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_a_fresh_layer_saves_and_loads(weights: str | None, layout: str) -> None:
    made = {"weights": weights, "layout": layout, "dtype": torch.float32}
    first, second = vecmat.Linear(64, 32, **made), vecmat.Linear(64, 32, **made)
    x = draw(4, 64)
    second(x)  # packs the weight that is about to be replaced
    state = first.state_dict()
    assert set(state) == {"weight", "bias"} | (
        set() if first.format.dense else {"weight_scale"} | (set() if first.format.symmetric else {"weight_zero"})
    )
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert second.load_state_dict(torch.load(buffer, weights_only=True)) == ([], [])
    assert torch.equal(second(x), first(x))
    empty = vecmat.Linear(64, 32, device="meta", **made)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), first(x))


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4:g32"])
def test_a_forward_after_load_state_dict_uses_the_new_weight(weights: str) -> None:
    """bf16 x, so that torch's packed int8 and int4 products are what runs where they can."""
    x = draw(1, 64, dtype=torch.bfloat16)
    for assign in (False, True):
        layer = vecmat.Linear.from_linear(plain(), weights)
        other = vecmat.Linear.from_linear(nn.Linear(64, 32, dtype=torch.bfloat16).requires_grad_(False), weights)
        layer(x)
        layer.load_state_dict(other.state_dict(), assign=assign)
        right(layer, x, other.stored(), other.bias)


@pytest.mark.parametrize("kernel", ["torch_int8", "torch_int4"])
def test_packed_copies_do_not_survive_a_new_weight(kernel: str) -> None:
    weights = "int8" if kernel == "torch_int8" else "int4:g32"
    layer, other = (vecmat.Linear.from_linear(plain(), weights) for _ in range(2))
    other.weight_scale *= 3
    x = draw(1, 64, dtype=torch.bfloat16)
    try:
        vecmat.matmul(x, layer.stored(), kernel=kernel)
    except ValueError as reason:
        pytest.skip(str(reason))
    assert layer.stored().packs, f"{kernel} keeps no packed copy"
    layer.load_state_dict(other.state_dict())
    assert not layer.stored().packs
    right(layer, x, other.stored(), other.bias)


def test_a_tensor_that_is_assigned_is_used_by_the_next_forward() -> None:
    x = draw(3, 64)
    layer = vecmat.Linear.from_linear(plain(dtype=torch.float32))
    layer(x)
    embedding = nn.Embedding(32, 64)
    layer.weight = embedding.weight  # how transformers ties weights
    torch.testing.assert_close(layer(x), F.linear(x, embedding.weight, layer.bias))
    with torch.no_grad():
        layer.weight.mul_(2)  # in place: a dense weight is the Parameter itself
    torch.testing.assert_close(layer(x), F.linear(x, embedding.weight, layer.bias))
    swapped = torch.func.functional_call(layer, {"weight": torch.ones(32, 64)}, (x,))
    torch.testing.assert_close(swapped, F.linear(x, torch.ones(32, 64), layer.bias))
    torch.testing.assert_close(layer(x), F.linear(x, embedding.weight, layer.bias))

    layer = vecmat.Linear.from_linear(plain(dtype=torch.float32), "int8")
    before = layer(x) - layer.bias
    layer.weight_scale = layer.weight_scale * 2
    torch.testing.assert_close(layer(x) - layer.bias, before * 2)


@pytest.mark.parametrize("weights", STORED)
@pytest.mark.parametrize("change", ["half", "to", "bfloat16", "double"])
def test_changing_the_dtype_casts_the_bias_and_keeps_the_quantised_tensors(weights: str, change: str) -> None:
    linear = plain(dtype=torch.float32)
    layer = vecmat.Linear.from_linear(linear, weights)
    layer(draw(1, 64))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    result = layer.to(torch.bfloat16) if change == "to" else getattr(layer, change)()
    assert result is layer
    wanted = {"half": torch.float16, "double": torch.float64}.get(change, torch.bfloat16)
    assert layer.bias.dtype == wanted
    for name, tensor in layer.state_dict().items():
        if name != "bias":
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    if change != "double":
        right(layer, draw(3, 64, dtype=wanted), layer.stored(), layer.bias)


def test_changing_the_dtype_of_a_dense_layer_casts_its_weight() -> None:
    layer = vecmat.Linear.from_linear(plain(dtype=torch.float32))
    layer(draw(1, 64))
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        layer.to(dtype)
        assert str(layer.format) == {torch.float16: "fp16", torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        right(layer, draw(3, 64, dtype=dtype), layer.weight, layer.bias)
    layer.load_state_dict(plain(dtype=torch.float32).state_dict(), assign=True)  # torch.nn.Linear takes it, too
    right(layer, draw(3, 64), layer.weight, layer.bias)


@pytest.mark.parametrize("weights", ALL)
def test_moving_a_layer_moves_everything(weights: str, device: str) -> None:
    layer = vecmat.Linear.from_linear(plain(dtype=torch.float32), weights)
    before = copy.deepcopy(layer)
    layer(draw(1, 64))
    layer.to(device)
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {device}
    right(layer, draw(3, 64).to(device), before.stored(), layer.bias)
    layer.to("meta")
    assert {tensor.device.type for tensor in layer.state_dict().values()} == {"meta"}
    layer.to_empty(device="cpu").load_state_dict(before.state_dict())
    right(layer, draw(3, 64), before.stored(), before.bias)


@pytest.mark.parametrize("weights", ALL)
def test_a_layer_is_copied_pickled_and_saved_whole(weights: str, tmp_path: Path) -> None:
    layer = vecmat.Linear.from_linear(plain(dtype=torch.float32), weights, compute="fp8" if weights == "fp8" else None)
    x = draw(2, 64)
    expected = layer(x)
    torch.save(layer, tmp_path / "layer.pt")
    twins = [copy.deepcopy(layer), torch.load(tmp_path / "layer.pt", weights_only=False)]
    twins += [] if weights == "fp8" else [pickle.loads(pickle.dumps(layer))]  # torch cannot pickle a float8 tensor
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert (twin.format, twin.compute, twin.layout) == (layer.format, layer.compute, layer.layout)
        twin.bias.add_(1)
        assert torch.equal(layer(x), expected), "the copy shares its bias"


def test_a_refused_state_dict_names_the_tensor_and_leaves_the_layer_as_it_was() -> None:
    x = draw(2, 64)
    for weights in ("int8", "int4:g32:zp", "fp8"):
        layer = vecmat.Linear.from_linear(plain(dtype=torch.float32), weights)
        expected, good = layer(x), {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        nan = good["weight_scale"].clone()
        nan[3, 0] = torch.nan
        bad = {
            r"weight is torch.float32; .* expect": {"weight": good["weight"].float()},
            r"weight_scale is torch.bfloat16; .* expect.*torch.float32": {"weight_scale": nan.bfloat16()},
            r"scale\[3, 0\] is nan; expected a finite number that is not zero": {"weight_scale": nan},
            r"scale\[0, 0\] is 0.0": {"weight_scale": torch.zeros_like(nan)},
            r"size mismatch for weight: .*\[7, 3\]": {"weight": torch.zeros(7, 3).to(good["weight"].dtype)},
        }
        for message, change in bad.items():
            for assign in (False, True):
                with pytest.raises(RuntimeError, match=message):
                    layer.load_state_dict({**good, **change}, assign=assign)
                assert torch.equal(layer(x), expected), f"{weights}: {message}"
        for name in good:
            with pytest.raises(RuntimeError, match=rf'Missing key.*"{name}"'):
                layer.load_state_dict({key: tensor for key, tensor in good.items() if key != name})
            assert torch.equal(layer(x), expected)
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"other"'):
            layer.load_state_dict({**good, "other": nan})


@pytest.mark.parametrize("weights", ["fp32", *STORED])
def test_gradients_are_those_of_the_product_with_the_dequantised_weight(weights: str, device: str) -> None:
    layer = vecmat.Linear.from_linear(nn.Linear(64, 32).to(device), weights)
    x = draw(5, 64).to(device).requires_grad_()
    layer(x).square().sum().backward()
    reference = x.detach().clone().requires_grad_()
    weight = layer.stored().dequantize().detach().clone().requires_grad_()
    bias = layer.bias.detach().clone().requires_grad_()
    F.linear(reference, weight, bias).square().sum().backward()
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-4, atol=1e-3)
    if weights == "fp32":
        torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-4, atol=1e-3)


def test_a_layer_prints_what_it_is() -> None:
    assert repr(vecmat.Linear(64, 8, weights="int4")) == (
        "Linear(in_features=64, out_features=8, weights=int4:g64, bias=True)"
    )
    layer = vecmat.Linear(64, 8, False, weights="int8", layout="kn", compute="int8")
    assert repr(layer).endswith("weights=int8, bias=False, layout=kn, compute=int8)")


def test_the_options_of_a_layer_are_checked_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="compute is 'int4'; expected None, 'int8' or 'fp8'"):
        vecmat.Linear(64, 8, weights="int8", compute="int4")
    with pytest.raises(ValueError, match=r"compute='int8' .* needs an int8 or int4 weight; this one is fp8"):
        vecmat.Linear(64, 8, weights="fp8", compute="int8")
    with pytest.raises(ValueError, match="layout is 'mn'"):
        vecmat.Linear(64, 8, layout="mn")
    with pytest.raises(ValueError, match="format 'int3' is not known"):
        vecmat.Linear(64, 8, weights="int3")
    with pytest.raises(TypeError, match=r"Conv2d is no torch.nn.Linear"):
        vecmat.Linear.from_linear(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"bias has shape \(3,\); expected \(8,\)"):
        vecmat.Linear.from_weight(vecmat.quantize(draw(8, 64), "int8"), torch.zeros(3))


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4:g32:zp"])
def test_a_layer_with_an_order_gathers_the_columns_of_x_and_keeps_it_wherever_it_goes(
    weights: str, device: str, tmp_path: Path
) -> None:
    linear = plain().to(device)
    order = torch.randperm(64, generator=generator("order"))
    ordered = vecmat.quantize(linear.weight[:, order], weights)
    layer = vecmat.Linear.from_weight(ordered, linear.bias, order=order)
    x = draw(2, 3, 64, dtype=torch.bfloat16).to(device)
    dense = torch.empty_like(linear.weight, dtype=torch.float32)
    dense[:, order.to(device)] = ordered.dequantize()
    right(layer, x, dense, linear.bias)
    torch.save(layer, tmp_path / "layer.pt")
    whole = torch.load(tmp_path / "layer.pt", weights_only=False)
    other = vecmat.Linear.from_weight(vecmat.quantize(torch.ones(32, 64, device=device), weights), linear.bias,
                                      order=torch.arange(64))  # fmt: skip
    other.load_state_dict(layer.state_dict())
    for again in (copy.deepcopy(layer), whole, other, copy.deepcopy(layer).half().bfloat16()):
        assert again.weight_order.dtype == torch.int32
        assert torch.equal(again(x), layer(x))
    assert "ordered=True" in repr(layer)
    assert "weight_order" not in vecmat.Linear(64, 32, weights="int8").state_dict()


def test_an_order_that_is_none_is_refused() -> None:
    weight = vecmat.quantize(torch.ones(32, 64), "int8")
    for wrong in (torch.zeros(64), torch.arange(63), torch.arange(64) + 1, torch.arange(64)[None]):
        with pytest.raises(ValueError, match="expected each of 0 to 63 once"):
            vecmat.Linear.from_weight(weight, order=wrong)
    layer = vecmat.Linear.from_weight(weight, order=torch.arange(64).flip(0))
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="expected each of 0 to 63 once"):
        layer.load_state_dict({**state, "weight_order": torch.zeros(64, dtype=torch.int32)})
    with pytest.raises(RuntimeError, match=r"weight_order is torch.int64; .* expect torch.int32"):
        layer.load_state_dict({**state, "weight_order": torch.arange(64)})
    assert torch.equal(layer.weight_order, torch.arange(64, dtype=torch.int32).flip(0))
