"""convert(): which layers of a model are replaced, which are left, and what stays tied."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch import Tensor, nn

import vecmat
from cases import generator
from oracle import Truth


class Tiny(nn.Module):
    """An embedding, two blocks with an attention and an MLP, a head that may be tied to the embedding."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 96), "down": nn.Linear(96, 64, bias=False)}) for _ in range(2)
        )
        self.head = nn.Linear(64, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(x)


def tokens(device: str = "cpu") -> Tensor:
    return torch.arange(12, device=device).view(2, 6)


def names(model: nn.Module) -> dict[str, str]:
    """The layers that are vecmat's, with their formats."""
    return {name: str(m.format) for name, m in model.named_modules() if isinstance(m, vecmat.Linear)}


UPS = {f"blocks.{i}.up" for i in range(2)}
DOWNS = {f"blocks.{i}.down" for i in range(2)}


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8", "int4", "fp8"])
def test_every_linear_layer_is_replaced_and_the_model_still_agrees(weights: str, device: str) -> None:
    model = Tiny().to(device).eval()
    with torch.inference_mode():
        before = model(tokens(device))
        assert vecmat.convert(model, weights) is model
        after = model(tokens(device))
    assert set(names(model)) == {*UPS, *DOWNS, "head"}
    bound = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.03, "int4": 0.3, "fp8": 0.1}[weights]
    assert (after - before).norm() <= bound * before.norm()


def test_int4_takes_its_group_size_layer_by_layer() -> None:
    formats = names(vecmat.convert(Tiny(), "int4"))
    assert formats["blocks.0.up"] == "int4:g64"  # K = 64
    assert formats["blocks.0.down"] == "int4:g32"  # K = 96
    assert set(names(vecmat.convert(Tiny(), "int4", group_size=32, symmetric=False)).values()) == {"int4:g32:zp"}
    assert set(names(vecmat.convert(Tiny(), "int4:g32")).values()) == {"int4:g32"}


def test_skip_takes_names_last_components_and_patterns() -> None:
    for skip, kept in (
        (["head"], {"head"}),
        (["up"], UPS),
        (["blocks.1.down"], {"blocks.1.down"}),
        (["blocks.0.*", "head"], {"blocks.0.up", "blocks.0.down", "head"}),
        (("*",), {*UPS, *DOWNS, "head"}),
    ):
        model = vecmat.convert(Tiny(), "int8", skip=skip)
        assert set(names(model)) == {*UPS, *DOWNS, "head"} - kept
        assert all(type(model.get_submodule(name)) is nn.Linear for name in kept)


def test_a_skip_that_names_no_layer_is_an_error_with_the_nearest_name() -> None:
    model = Tiny()
    with pytest.raises(ValueError, match=r"skip names 'haed', .* no linear layer .*; the nearest is 'head'"):
        vecmat.convert(model, "int8", skip=["haed"])
    assert names(model) == {}
    with pytest.raises(ValueError, match=r"skip names 'embed'"):  # there, but not linear
        vecmat.convert(model, "int8", skip=["embed"])
    with pytest.raises(TypeError, match=r"skip is 'head'; expected a list of names"):
        vecmat.convert(model, "int8", skip="head")


def test_a_model_without_linear_layers_or_a_bad_format_is_an_error_before_anything_is_replaced() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no torch.nn.Linear to convert"):
        vecmat.convert(nn.Sequential(nn.ReLU()), "int8")
    with pytest.raises(ValueError, match=r"itself a linear layer; use vecmat.Linear.from_linear"):
        vecmat.convert(nn.Linear(4, 4), "int8")
    model = Tiny()
    for message, options in {
        "format 'int5' is not known": {"weights": "int5"},
        "group_size is 48; expected one of 32, 64, 128": {"weights": "int4", "group_size": 48},
        "'bf16' has no groups": {"weights": "bf16", "group_size": 32},
        r"'int8' has no zero points": {"weights": "int8", "symmetric": False},
        r"compute='fp8' .* needs an fp8 weight": {"weights": "int8", "compute": "fp8"},
        "compute is 'int4'": {"weights": "int8", "compute": "int4"},
    }.items():
        with pytest.raises(ValueError, match=message):
            vecmat.convert(model, **options)
        assert names(model) == {}, message


def test_converting_twice_is_a_clear_error_and_converting_the_rest_is_not() -> None:
    model = vecmat.convert(Tiny(), "int8", skip=["head"])
    expected = model(tokens())
    layer = model.blocks[0]["up"]
    vecmat.convert(model, "int4")
    assert names(model)["head"].startswith("int4")
    assert model.blocks[0]["up"] is layer
    with pytest.raises(ValueError, match=r"Tiny has no torch.nn.Linear to convert"):
        vecmat.convert(model, "int8")
    assert model(tokens()).shape == expected.shape


def test_a_tied_embedding_stays_tied_and_its_layer_still_goes_through_vecmat() -> None:
    model = vecmat.convert(Tiny(tied=True), "int8", compute="int8")
    assert isinstance(model.head, vecmat.Linear)
    assert model.head.weight is model.embed.weight
    assert names(model)["head"] == "fp32"
    assert model.head.compute is None
    with torch.no_grad():
        model.embed.weight.mul_(0.5)
    x = torch.randn(3, 64, generator=generator("x"))
    torch.testing.assert_close(model.head(x), x @ model.embed.weight.t())
    assert [name for name, _ in model.named_parameters() if "weight" in name] == ["embed.weight"]


def test_untie_gives_the_head_a_quantised_copy_of_its_own() -> None:
    model = Tiny(tied=True)
    before = model.embed.weight.detach().clone()
    vecmat.convert(model, "int8", untie=True)
    assert names(model)["head"] == "int8"
    assert torch.equal(model.embed.weight, before)


def test_one_module_used_under_two_names_is_replaced_under_both() -> None:
    model = nn.ModuleDict({"first": nn.Linear(32, 32), "other": nn.Linear(32, 32)})
    model["second"] = model["first"]
    vecmat.convert(model, "int8")
    assert isinstance(model["first"], vecmat.Linear)
    assert model["second"] is model["first"]
    model = nn.ModuleDict({"first": nn.Linear(32, 32), "other": nn.Linear(32, 32)})
    model["second"] = model["first"]
    vecmat.convert(model, "int8", skip=["second"])
    assert type(model["first"]) is nn.Linear
    assert model["second"] is model["first"]


def test_progress_is_told_after_each_layer() -> None:
    told: list[tuple[str, int, int]] = []
    model = vecmat.convert(Tiny(), "int8", skip=["head"], progress=lambda *step: told.append(step))
    assert [step[1:] for step in told] == [(i, 4) for i in range(1, 5)]
    assert {step[0] for step in told} == set(names(model))


@pytest.mark.parametrize("batch_first", [True, False])
def test_modules_that_read_the_weights_of_their_layers_themselves_go_on_working(batch_first: bool) -> None:
    """MultiheadAttention's out_proj, and linear1 and linear2 on TransformerEncoderLayer's fast path."""
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=batch_first)
    model = nn.Sequential(encoder, nn.Linear(64, 64)).eval().requires_grad_(False)
    x = torch.randn(2, 5, 64, generator=generator("encoder"))
    before = model(x)
    vecmat.convert(model, "int8")
    assert type(encoder.self_attn.out_proj).__module__.startswith("torch.")
    assert isinstance(model[1], vecmat.Linear)
    with torch.inference_mode():
        after = model(x)
    assert (after - before).norm() <= 0.03 * before.norm()
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(64, 4), "out": nn.Linear(64, 64)}).eval()
    before = attention["attention"](x, x, x)[0]
    vecmat.convert(attention, "int4")
    torch.testing.assert_close(attention["attention"](x, x, x)[0], before)


def test_training_mode_devices_and_dtypes_are_kept(device: str) -> None:
    for training in (True, False):
        model = vecmat.convert(Tiny().to(device, torch.bfloat16).train(training), "int8")
        assert model.head.training == training
        assert model.head.weight.device.type == device
        assert model.blocks[0]["up"].bias.dtype == torch.bfloat16
        assert model(tokens(device)).dtype == torch.bfloat16


def test_a_converted_model_saves_and_loads_as_a_whole() -> None:
    first = vecmat.convert(Tiny(tied=True), "int4")
    second = vecmat.convert(Tiny(tied=True), "int4")
    second(tokens())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(tokens()), second(tokens()))
    whole = first.half()
    x = torch.randn(2, 64, generator=generator("half")).half()
    up = whole.blocks[0]["up"]
    assert Truth.of(x, up.stored(), up.bias).verdict(up(x)) is None


@pytest.mark.parametrize("weights", ["fp32", "int8", "int4"])
def test_a_compiled_model_agrees_with_the_eager_one(weights: str) -> None:
    model = vecmat.convert(Tiny(tied=True).requires_grad_(False), weights)
    expected = model(tokens())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), expected, rtol=1e-3, atol=1e-3)
    fresh = vecmat.convert(Tiny(tied=True).requires_grad_(False), weights)  # no forward has run
    fresh.load_state_dict(model.state_dict())
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(fresh, backend="eager")(tokens()), expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():  # what is compiled must not have frozen the weight
        compiled.head.weight.mul_(2)
        model.embed.weight.mul_(0.5)
    torch.testing.assert_close(compiled(tokens()), model(tokens()), rtol=1e-3, atol=1e-3)


def test_inductor_agrees_with_eager() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("Inductor needs a C++ compiler")
    model = vecmat.convert(nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8)), "int8").requires_grad_(False)
    x = torch.randn(3, 64, generator=generator("inductor"))
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model)(x), model(x), rtol=1e-3, atol=1e-3)


def test_hooks_go_over_and_a_forward_of_the_objects_own_is_left_to_torch() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    seen: list[str] = []
    model[0].register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    model[1].forward = functools.partial(torch.nn.Linear.forward, model[1])
    vecmat.convert(model, "int8")
    assert isinstance(model[0], vecmat.Linear)
    assert type(model[1]) is torch.nn.Linear
    model(torch.zeros(1, 64))
    assert seen == ["Linear"]


def test_a_quantised_layers_bias_is_frozen_so_that_every_kernel_may_run_with_gradients_on() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    vecmat.convert(model, "int8")
    assert not model(torch.zeros(1, 64)).requires_grad
