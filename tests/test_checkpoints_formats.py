"""Each quantisation format's reader against the format's own definition: exact, or as far off as it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import packing
import vecmat
from cases import generator
from vecmat.checkpoints.awq import Awq
from vecmat.checkpoints.bitsandbytes import Bitsandbytes
from vecmat.checkpoints.compressed_tensors import CompressedTensors
from vecmat.checkpoints.fp8_blocks import Fp8Blocks
from vecmat.checkpoints.gptq import Gptq
from vecmat.checkpoints.integers import unpack, weight_of, weight_of_fp8
from vecmat.checkpoints.layer import Layer, Stored
from vecmat.checkpoints.safe import Tensors


def read(reader: Any, parts: dict[str, Tensor], n: int, k: int) -> Stored:
    """What a reader makes of one layer, all of whose parts it must have looked at."""
    layer = Layer(Tensors("here", {f"a.b.{part}": tensor for part, tensor in parts.items()}), "a.b", n, k)
    assert reader.holds(layer)
    stored = reader.read(layer)
    assert layer.used >= {f"a.b.{part}" for part in parts}
    assert (stored.weight.n, stored.weight.k) == (n, k)
    return stored


def meant(stored: Stored) -> Tensor:
    """The weight (N, K) in float64, its columns in x's order."""
    dense = stored.weight.dequantize(torch.float64)
    if stored.order is None:
        return dense
    out = torch.empty_like(dense)
    out[:, stored.order.long()] = dense
    return out


def gptq(**config: Any) -> Gptq:
    return Gptq({"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, **config})


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_stream_of_bits_is_unpacked(bits: int) -> None:
    values = packing.draw(0, 1 << bits, 5, 96, seed=bits)
    assert torch.equal(unpack(packing.stream(values, bits), bits), values.to(torch.uint8))
    words = packing.stream(values[:, :7], bits)  # not all of the last word
    assert torch.equal(unpack(words, bits)[:, :7], values[:, :7].to(torch.uint8))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize(
    ("n", "k", "bits", "group", "expected"),
    [
        (64, 128, 4, 32, "int4:g32:zp"), (32, 256, 4, 128, "int4:g128:zp"), (32, 256, 4, -1, "int4:g128:zp"),
        (32, 512, 4, 256, "int4:g128:zp"), (32, 192, 4, 64, "int4:g64:zp"), (32, 128, 3, 32, "int4:g32"),
        (32, 128, 2, 64, "int4:g64"),
    ],
)  # fmt: skip
def test_gptq_is_exact(n: int, k: int, bits: int, group: int, expected: str, v2: bool, act_order: bool) -> None:
    parts, dense = packing.gptq(n, k, bits, group, v2=v2, act_order=act_order)
    reader = gptq(bits=bits, group_size=group, desc_act=act_order, checkpoint_format="gptq_v2" if v2 else "gptq")
    stored = read(reader, parts, n, k)
    assert str(stored.weight.format) == expected
    assert torch.equal(meant(stored), dense)
    assert (stored.order is not None) == (act_order and group != -1)


def test_gptq_without_zero_points_of_its_own_is_symmetric_int4_whatever_its_writer_calls_it() -> None:
    """v1 stores 7 and v2 8 for a zero point of 8; some writers store 8 and say v1."""
    for v2, said in ((False, "gptq"), (True, "gptq_v2"), (True, "gptq")):
        parts, dense = packing.gptq(32, 128, v2=v2, symmetric=True)
        stored = read(gptq(sym=True, checkpoint_format=said), parts, 32, 128)
        assert str(stored.weight.format) == "int4:g32"
        assert torch.equal(meant(stored), dense), said
    parts, dense = packing.gptq(32, 128, v2=False)  # sym, but zero points say otherwise: they decide
    assert torch.equal(meant(read(gptq(sym=True), parts, 32, 128)), dense)


def test_gptq_of_8_bits_is_int8_where_the_steps_fit_and_rounded_once_more_where_not() -> None:
    parts, dense = packing.gptq(32, 128, 8, symmetric=True, act_order=True)
    stored = read(gptq(bits=8, sym=True), parts, 32, 128)
    assert str(stored.weight.format) == "int8:g32"
    assert torch.equal(meant(stored), dense)
    parts, dense = packing.gptq(32, 128, 8)  # zero points from 1 to 255: steps from -255 to 254
    stored = read(gptq(bits=8), parts, 32, 128)
    assert str(stored.weight.format) == "int8:g32"
    step = dense.view(32, 4, 32).abs().amax(-1) / 127
    error = (meant(stored) - dense).view(32, 4, 32).abs().amax(-1)
    assert (error <= step * (0.5 + 2.0**-8 * 127)).all()
    assert error.max() > 0


def test_gptq_v1_whose_stored_zero_point_is_15_means_16() -> None:
    """Which a nibble cannot hold, so the layer becomes int8."""
    parts, dense = packing.gptq(32, 64)
    zero = torch.full((2, 32), 16)
    parts["qzeros"] = packing.stream(zero - 1, 4)
    codes = unpack(parts["qweight"].t(), 4).double()
    dense = (codes - 16) * parts["scales"].double().t().repeat_interleave(32, 1)
    stored = read(gptq(), parts, 32, 64)
    assert str(stored.weight.format) == "int8:g32"
    assert torch.equal(meant(stored), dense)


def test_gptq_layers_may_differ_where_the_config_says_so() -> None:
    for bits, group in ((8, 64), (4, 128), (3, 32)):
        parts, dense = packing.gptq(32, 128, bits, group, symmetric=True)
        stored = read(gptq(sym=True, dynamic={"+:.*": {"bits": bits}}), parts, 32, 128)
        assert torch.equal(meant(stored), dense)
    with pytest.raises(ValueError, match=r"qweight has shape \(32, 32\); expected \(16, 32\)"):
        read(gptq(), packing.gptq(32, 128, 8, 32)[0], 32, 128)


def test_what_the_config_promises_must_be_there() -> None:
    parts, _ = packing.gptq(48, 128, act_order=True)
    del parts["g_idx"]
    with pytest.raises(ValueError, match=r"a\.b\.g_idx is missing"):
        read(gptq(desc_act=True), parts, 48, 128)
    read(gptq(desc_act=False), parts, 48, 128)
    for packed, bits in ((packing.pack_quantized, 4), (packing.int_quantized, 8)):
        parts, _ = packed(24, 128, group=32, symmetric=True)
        with pytest.raises(ValueError, match=r"a\.b\.weight_zero_point is missing"):
            read(compressed(num_bits=bits, group_size=32, symmetric=False), parts, 24, 128)
        with pytest.raises(ValueError, match=r"a\.b\.weight_g_idx is missing"):
            read(compressed(num_bits=bits, group_size=32, actorder="group"), parts, 24, 128)
        read(compressed(num_bits=bits, group_size=32, actorder="weight"), parts, 24, 128)


def test_a_permuted_layer_multiplies_as_the_format_says() -> None:
    parts, dense = packing.gptq(48, 128, act_order=True)
    stored = read(gptq(desc_act=True), parts, 48, 128)
    layer = vecmat.Linear.from_weight(stored.weight, order=stored.order)
    x = torch.randn(3, 128, generator=generator("x"))
    torch.testing.assert_close(layer(x).double(), x.double() @ dense.t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g_idx": torch.full((128,), 4, dtype=torch.int32)}, r"g_idx goes from 4 to 4; expected each of 0 to 3"),
        ({"g_idx": torch.full((128,), -1, dtype=torch.int32)}, r"g_idx goes from -1 to -1"),
        ({"g_idx": torch.zeros(128, dtype=torch.int32)}, r"g_idx goes from 0 to 0; .* 32 times"),
        ({"g_idx": torch.full((128,), 1 << 40)}, r"g_idx goes from 1099511627776"),
        ({"g_idx": torch.zeros(127, dtype=torch.int32)}, r"g_idx has shape \(127,\); expected \(128,\)"),
        ({"g_idx": torch.zeros(128)}, r"g_idx is float32; expected int32 or int64"),
        ({"scales": torch.full((4, 32), torch.nan)}, "a scale is inf or NaN"),
        ({"scales": torch.full((4, 32), torch.inf).half()}, "a scale is inf or NaN"),
        ({"scales": torch.ones(8, 32)}, "there are 8 scales along K=128; group_size 32 asks for another number"),
        ({"scales": torch.ones(())}, "there are 0 scales along K=128"),
        ({"scales": torch.ones(4, 32, dtype=torch.int32)}, "scales is int32; expected float16 or"),
        ({"qweight": torch.zeros(16, 33, dtype=torch.int32)}, r"qweight has shape \(16, 33\); expected \(16, 32\)"),
        ({"qweight": torch.zeros(16, 32)}, "qweight is float32; expected int32"),
        ({"qzeros": None}, "a.b.qzeros is missing"),
        ({"scales": None}, "a.b.scales is missing"),
        ({"qzeros": torch.zeros(4, 5, dtype=torch.int32)}, r"qzeros has shape \(4, 5\); expected \(4, 4\)"),
    ],
)
def test_gptq_parts_that_are_wrong_are_named(change: dict[str, Tensor | None], message: str) -> None:
    parts = {**packing.gptq(32, 128)[0], **change}
    with pytest.raises(ValueError, match=message):
        read(gptq(), {name: part for name, part in parts.items() if part is not None}, 32, 128)


@pytest.mark.parametrize(
    ("reader", "config", "message"),
    [
        (Gptq, {"bits": 5}, "bits is 5; expected 2 or 3 or 4 or 8"),
        (Gptq, {"bits": "4"}, "bits is '4'"),
        (Gptq, {"bits": True}, "bits is True"),
        (Gptq, {"bits": 4, "group_size": None}, "group_size is None; expected an integer"),
        (Gptq, {"bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (Awq, {"bits": 3}, "bits is 3; expected 4"),
        (Awq, {"bits": 4, "version": "gemv"}, "version is 'gemv'; read is 'gemm'"),
        (CompressedTensors, {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized'"),
        (CompressedTensors, {"format": ["x"]}, "format is \\['x'\\]"),
        (CompressedTensors, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is .* not read"),
        (CompressedTensors, {"transform_config": {"config_groups": {"u": {}}}}, "transform_config is .* not read"),
        (CompressedTensors, {"config_groups": []}, None),
        (CompressedTensors, {"config_groups": [1]}, "config_groups is list"),
        (CompressedTensors, {"config_groups": {"g": {"weights": {"num_bits": 5}}}}, "num_bits is 5"),
        (CompressedTensors, {"config_groups": {"g": {"weights": {"block_structure": [128]}}}}, "block_structure is"),
        (Fp8Blocks, {"weight_block_size": [128, 0]}, "weight_block_size is .* two positive integers"),
        (Fp8Blocks, {"weight_block_size": 128}, "weight_block_size is 128"),
        (Bitsandbytes, {"load_in_4bit": True}, "of bitsandbytes only int8 is read"),
    ],
)
def test_a_config_that_is_wrong_or_not_read_is_named(reader: Any, config: dict[str, Any], message: str | None) -> None:
    if message is None:
        reader(config)
        return
    with pytest.raises(ValueError, match=message):
        reader(config)


@pytest.mark.parametrize(("k", "group"), [(128, 32), (256, 128), (192, 64), (96, 96)])
def test_awq_is_exact(k: int, group: int) -> None:
    parts, dense = packing.awq(64, k, group)
    stored = read(Awq({"bits": 4, "group_size": group, "version": "gemm", "zero_point": True}), parts, 64, k)
    assert stored.weight.format.name == "int4"
    assert not stored.weight.format.symmetric
    assert stored.order is None
    assert torch.equal(meant(stored), dense)


def test_awq_parts_that_are_wrong_are_named() -> None:
    parts, _ = packing.awq(64, 128)
    reader = Awq({"w_bit": 4, "q_group_size": 32})
    with pytest.raises(ValueError, match="N=60; AWQ packs multiples of 8"):
        read(reader, parts, 60, 128)
    with pytest.raises(ValueError, match=r"qweight has shape \(128, 8\); expected \(128, 4\)"):
        read(reader, parts, 32, 128)
    with pytest.raises(ValueError, match="asks for another number"):
        read(Awq({"bits": 4, "group_size": 64}), parts, 64, 128)


def compressed(**weights: Any) -> CompressedTensors:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, **weights}}
    return CompressedTensors({"config_groups": {"group_0": group}, "ignore": ["lm_head"]})


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "expected"),
    [(4, 32, "int4:g32"), (4, 128, "int4:g128"), (4, None, "int4:g128"), (8, 64, "int8:g64"), (8, None, "int8")],
)
def test_pack_quantized_is_exact(bits: int, group: int | None, expected: str, symmetric: bool) -> None:
    parts, dense = packing.pack_quantized(24, 256, bits, group, symmetric=symmetric)
    stored = read(compressed(num_bits=bits, group_size=group, symmetric=symmetric), parts, 24, 256)
    if bits == 4 or symmetric:
        assert str(stored.weight.format) == expected + ("" if symmetric else ":zp")
        assert torch.equal(meant(stored), dense)
    else:  # steps from -255 to 255
        assert str(stored.weight.format) == "int8:g32"
        assert (meant(stored) - dense).norm() < 0.006 * dense.norm()


def test_pack_quantized_with_an_order_or_plain_zero_points_is_exact() -> None:
    parts, dense = packing.pack_quantized(24, 128, symmetric=False, act_order=True)
    reader = compressed(num_bits=4, group_size=32, symmetric=False, actorder="group")
    stored = read(reader, parts, 24, 128)
    assert stored.order is not None
    assert torch.equal(meant(stored), dense)
    parts["weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)  # "not set"
    assert read(reader, parts, 24, 128).order is None
    parts, dense = packing.pack_quantized(24, 128, symmetric=False)
    reader = compressed(num_bits=4, group_size=32, symmetric=False)
    plain = unpack(parts["weight_zero_point"].t(), 4)[:, :24].t().to(torch.int8) - 8
    assert torch.equal(meant(read(reader, {**parts, "weight_zero_point": plain}, 24, 128)), dense)
    plain[3] = -20  # no four bits hold it, eight do
    stored = read(reader, {**parts, "weight_zero_point": plain}, 24, 128)
    assert str(stored.weight.format) == "int8:g32"
    step = (unpack(parts["weight_packed"], 4)[3].float() - 8) + 20
    assert torch.equal(meant(stored)[3], step * parts["weight_scale"][3].float().repeat_interleave(32))


@pytest.mark.parametrize("group", [None, 32, 128])
def test_int_quantized_is_exact(group: int | None) -> None:
    for symmetric in (True, False):
        parts, dense = packing.int_quantized(24, 256, group, symmetric=symmetric)
        stored = read(compressed(group_size=group), {**parts, "input_scale": torch.ones(1)}, 24, 256)
        assert str(stored.weight.format) == ("int8" if group is None else f"int8:g{group}")
        assert torch.equal(meant(stored), dense)
    for shape in ((), (1,), (24,)):  # one scale for all, or a vector
        parts["weight_scale"] = packing.scales(*shape, seed=shape)
        parts.pop("weight_zero_point", None)
        if group is None:
            wide = parts["weight_scale"].double().reshape(-1, 1)
            assert torch.equal(meant(read(compressed(), parts, 24, 256)), parts["weight"].double() * wide)


@pytest.mark.parametrize("shape", [(24, 1), (24,), (1,), (1, 1), ()])
def test_float_quantized_is_exact(shape: tuple[int, ...]) -> None:
    parts, dense = packing.fp8(24, 130, shape)
    stored = read(compressed(type="float"), {**parts, "input_scale": torch.ones(1)}, 24, 130)
    assert str(stored.weight.format) == "fp8"
    assert torch.equal(meant(stored), dense)


@pytest.mark.parametrize(("n", "k"), [(256, 384), (130, 200), (64, 100)])
def test_fp8_in_blocks_is_exact(n: int, k: int) -> None:
    parts, dense = packing.fp8_blocks(n, k)
    stored = read(Fp8Blocks({"weight_block_size": [128, 128]}), parts, n, k)
    assert str(stored.weight.format) == ("fp8:g128" if k > 128 else "fp8")
    assert torch.equal(meant(stored), dense)
    moved = {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}
    assert torch.equal(meant(read(compressed(type="float", block_structure=[128, 128]), moved, n, k)), dense)


def test_fp8_scales_may_be_powers_of_two_or_one_for_all() -> None:
    parts, _ = packing.fp8_blocks(256, 256)
    exponents = packing.draw(110, 130, 2, 2, seed="exponents")
    wide = torch.exp2(exponents.double() - 127)[torch.arange(256) // 128][:, torch.arange(256) // 128]
    for scale in (exponents.to(torch.uint8), exponents.to(torch.uint8).view(torch.float8_e8m0fnu)):
        reader = Fp8Blocks({"weight_block_size": [128, 128], "scale_fmt": "ue8m0"})
        stored = read(reader, {"weight": parts["weight"], "weight_scale_inv": scale}, 256, 256)
        assert torch.equal(meant(stored), parts["weight"].double() * wide)
    parts, dense = packing.fp8(24, 64, ())
    assert torch.equal(meant(read(Fp8Blocks({}), {**parts, "input_scale": torch.ones(())}, 24, 64)), dense)


def test_fp8_that_is_wrong_is_named() -> None:
    parts, _ = packing.fp8_blocks(256, 256)
    reader = Fp8Blocks({"weight_block_size": [128, 128]})
    nan = parts["weight"].view(torch.uint8).clone()
    nan[3, 5] = 255
    for change, message in (
        ({"weight_scale_inv": -parts["weight_scale_inv"]}, "fp8 scale is negative, inf or NaN"),
        ({"weight_scale_inv": torch.full((2, 2), torch.nan)}, "fp8 scale is negative, inf or NaN"),
        ({"weight_scale_inv": torch.ones(2, 3)}, r"weight_scale_inv has shape \(2, 3\); expected \(2, 2\)"),
        ({"weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8)}, "weight_scale_inv is uint8"),
        ({"weight": nan.view(torch.float8_e4m3fn)}, "data has NaN"),
        ({"weight": torch.zeros(256, 256, dtype=torch.float8_e5m2)}, "weight is float8_e5m2; expected float8_e4m3fn"),
    ):
        with pytest.raises(ValueError, match=message):
            read(reader, {**parts, **change}, 256, 256)


def test_bitsandbytes_is_exact_but_for_one_rounding_of_each_scale() -> None:
    parts, dense = packing.bitsandbytes(24, 100)
    stored = read(Bitsandbytes({"load_in_8bit": True}), parts, 24, 100)
    assert str(stored.weight.format) == "int8"
    assert torch.equal(stored.weight.data, parts["weight"])
    assert ((meant(stored) - dense).abs() <= dense.abs() * 2.0**-24).all()
    with pytest.raises(ValueError, match="weight_format is 2; expected 0"):
        read(Bitsandbytes({"load_in_8bit": True}), {**parts, "weight_format": torch.tensor(2).byte()}, 24, 100)
    with pytest.raises(ValueError, match="SCB is negative"):
        read(Bitsandbytes({"load_in_8bit": True}), {**parts, "SCB": -parts["SCB"]}, 24, 100)


@pytest.mark.parametrize("make", [
    lambda: weight_of(torch.full((4, 128), 3, dtype=torch.int8), torch.zeros(4, 4), 32),
    lambda: weight_of(torch.full((4, 128), 3, dtype=torch.int8), torch.zeros(4, 4), 32, narrow=False),
    lambda: weight_of(torch.full((4, 128), 9, dtype=torch.int8), torch.zeros(4, 1), None,
                      zero=torch.full((4, 1), 2, dtype=torch.int16)),
    lambda: weight_of_fp8(packing.e4m3(4, 128, "dead"), torch.zeros(4, 4), 32),
])  # fmt: skip
def test_a_scale_of_zero_means_zeros(make: Callable[[], vecmat.Weight]) -> None:
    weight = make()
    assert (weight.dequantize() == 0).all()
    assert torch.equal(weight.scale, torch.ones_like(weight.scale))


def test_a_negative_scale_is_a_scale() -> None:
    """Tools that use all sixteen levels write them."""
    parts, dense = packing.gptq(32, 64)
    parts["scales"] = -parts["scales"]
    assert torch.equal(meant(read(gptq(), parts, 32, 64)), -dense)


def test_groups_that_no_format_has_are_rounded_once_more() -> None:
    steps = packing.draw(-8, 8, 16, 160, seed="odd").to(torch.int8)
    scale = packing.scales(16, 10, seed="odd")
    weight = weight_of(steps, scale, 16)
    dense = steps.double() * scale.double().repeat_interleave(16, 1)
    assert str(weight.format) == "int8:g32"
    assert (weight.dequantize(torch.float64) - dense).norm() < 0.006 * dense.norm()
    assert (weight.dequantize(torch.float64) - dense).abs().max() > 0
