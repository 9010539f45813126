"""Weights: what is stored is what the documentation says, and it is as near to the original as the format allows."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

import vecmat
from cases import DENSE, FORMATS, generator
from oracle import round_e4m3
from vecmat.problem import DTYPES, Format
from vecmat.weights import Signature, default_group_size, quantize_rows, resolve_format

QUANTISED = tuple(fmt for fmt in FORMATS if fmt not in DENSE)
SHAPES = ((1, 1), (2, 2), (3, 31), (5, 32), (4, 33), (7, 129), (16, 256), (9, 300))


def draw(n: int, k: int, *words: object) -> Tensor:
    return torch.randn(n, k, generator=generator(n, k, *words))


def decoded(weight: vecmat.Weight) -> Tensor:
    """The (N, K) float64 matrix that the stored tensors mean, element by element, as weights.py documents them."""
    scale = weight.scale.double()
    size = weight.format.group_size or weight.k
    out = torch.empty(weight.n, weight.k, dtype=torch.float64)
    for k in range(weight.k):
        group = k // size
        if weight.format.name == "int4":
            byte = weight.data[:, k // 2]
            nibble = (byte % 16 if k % 2 == 0 else byte // 16).double()
            value = nibble - (8 if weight.zero is None else weight.zero[:, group].double())
        else:
            value = weight.data[:, k].double()
        out[:, k] = value * scale[:, group]
    return out


@pytest.mark.parametrize("fmt", QUANTISED)
def test_dequantize_gives_exactly_what_the_documented_storage_means(fmt: str) -> None:
    for n, k in SHAPES:
        for layout in ("nk", "kn"):
            w = draw(n, k, fmt)
            weight = vecmat.quantize(w.t() if layout == "kn" else w, fmt, layout=layout)
            assert (weight.n, weight.k, weight.layout) == (n, k, layout)
            assert weight.shape == ((k, n) if layout == "kn" else (n, k))
            dense = weight.dequantize(torch.float64)
            assert dense.shape == weight.shape
            assert torch.equal(dense.t() if layout == "kn" else dense, decoded(weight)), (n, k, layout)
            for dtype in DTYPES.values():
                assert weight.dequantize(dtype).dtype == dtype
                torch.testing.assert_close(
                    weight.dequantize(dtype).double(), dense, rtol=torch.finfo(dtype).eps, atol=1e-7
                )


@pytest.mark.parametrize("fmt", QUANTISED)
def test_the_round_trip_error_is_at_most_half_a_step(fmt: str) -> None:
    """Half a step of the stored scale, plus what is cut off where a value lies beyond the last level.

    The scale is rounded to bf16 (a relative 2**-9 at most), so the levels may end that much short of the largest
    value; symmetric int4 goes from -8 to +7 steps, so a value near +8 steps loses one.
    """
    for n, k in SHAPES:
        for magnitude in (1e-6, 1.0, 1e4):
            w = draw(n, k, fmt) * magnitude
            weight = vecmat.quantize(w, fmt)
            size = weight.format.group_size or k
            scale = weight.scale.double().repeat_interleave(size, 1)[:, :k]
            steps = w.double() / scale
            if weight.zero is not None:
                steps = steps + weight.zero.double().repeat_interleave(size, 1)[:, :k]
            low, high = {"int8": (-127, 127), "fp8": (-448, 448), "int4": (0, 15) if ":zp" in fmt else (-8, 7)}[
                weight.format.name
            ]
            cut = (steps - steps.clamp(low, high)).abs()
            half = torch.full_like(steps, 0.5)
            if weight.format.name == "fp8":  # e4m3 has 8 steps between powers of two, down to 2**-6
                half = torch.ldexp(half, torch.frexp(steps).exponent.clamp(min=-5) - 4)
            error = (weight.dequantize(torch.float64) - w.double()).abs() / scale.abs()
            # The division w / scale is in fp32: a relative 2**-23 of the number of steps.
            assert (error <= half + cut + steps.abs() * 2.0**-22).all(), (n, k, magnitude)
            most = (high - low) * 2.0**-8 + (1 if (low, high) == (-8, 7) else 0.5 if ":zp" in fmt else 0)
            assert cut.max() <= most, (n, k, magnitude)


@pytest.mark.parametrize("fmt", QUANTISED)
def test_scales_lie_on_the_bf16_grid_and_groups_of_zeros_are_exact(fmt: str) -> None:
    w = draw(6, 200, fmt)
    w[2] = 0
    w[4, :128] = 0
    weight = vecmat.quantize(w, fmt)
    assert torch.equal(weight.scale, weight.scale.to(torch.bfloat16).float())
    dense = weight.dequantize()
    assert (dense[2] == 0).all()
    assert (dense[4, :128] == 0).all()


@pytest.mark.parametrize("fmt", QUANTISED)
def test_numbers_too_small_for_a_scale_are_stored_as_zeros(fmt: str) -> None:
    dense = vecmat.quantize(torch.full((2, 64), 1e-44), fmt).dequantize()
    assert torch.isfinite(dense).all()
    assert dense.abs().max() <= 1e-43


@pytest.mark.parametrize("fmt", ["bf16", "fp32", "int8", "int4", "int4:g32:zp", "fp8"])
def test_the_largest_fp32_numbers_are_stored_without_overflow(fmt: str) -> None:
    w = torch.tensor([[3.3e38, -3.3e38] * 16, [1.0, -3.3e38] * 16])
    dense = vecmat.quantize(w, fmt).dequantize(torch.float64)
    assert torch.isfinite(dense).all()
    torch.testing.assert_close(dense, w.double(), rtol=0.2, atol=3e37)


def test_a_dense_format_refuses_numbers_it_would_turn_into_infinity() -> None:
    with pytest.raises(ValueError, match=r"beyond 65504, the largest of fp16 \(torch.float32 \(1, 2\)\)"):
        vecmat.quantize(torch.tensor([[1.0, 7e4]]), "fp16")
    with pytest.raises(ValueError, match="the largest of fp32"):
        vecmat.quantize(torch.tensor([[1e300]], dtype=torch.float64), "fp32")
    assert torch.isinf(vecmat.quantize(torch.tensor([[torch.inf]]), "fp16").data).all()  # as it was


def test_dense_formats_store_the_rounded_numbers() -> None:
    w = draw(5, 7)
    for fmt in DENSE:
        weight = vecmat.quantize(w, fmt)
        assert torch.equal(weight.data, w.to(DTYPES[fmt]))
        assert weight.scale is None
        assert torch.equal(vecmat.quantize(w.t(), fmt, layout="kn").dequantize(), weight.dequantize().t())


def test_every_e4m3_code_is_decoded_as_torch_decodes_it() -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)
    data = codes.view(torch.float8_e4m3fn).view(1, -1)
    weight = vecmat.Weight("fp8", data, torch.ones(1, 1))
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(weight.dequantize(dtype), data.to(torch.float32).to(dtype))
    assert torch.equal(round_e4m3(data.double()), data.double())


@pytest.mark.parametrize("fmt", FORMATS)
def test_nbytes_counts_the_stored_tensors(fmt: str) -> None:
    for n, k in SHAPES:
        weight = vecmat.quantize(draw(n, k), fmt)
        parts = [t for t in (weight.data, weight.scale, weight.zero) if t is not None]
        assert weight.nbytes == sum(t.numel() * t.element_size() for t in parts) == weight.format.nbytes(n, k)


@pytest.mark.parametrize("fmt", FORMATS)
def test_pickle_deepcopy_and_to_give_the_same_weight_without_its_packed_copies(fmt: str) -> None:
    for layout in ("nk", "kn"):
        weight = vecmat.quantize(draw(16, 128), fmt, layout=layout)
        weight.packs["something"] = object()  # would not pickle
        for twin in (pickle.loads(pickle.dumps(weight)), copy.deepcopy(weight), weight.to("cpu")):
            assert (twin.format, twin.n, twin.k, twin.layout) == (weight.format, weight.n, weight.k, layout)
            assert torch.equal(twin.dequantize(), weight.dequantize())
            assert twin.packs == {}
            assert twin.signature is weight.signature
        away = weight.to("meta")
        assert away.device.type == "meta"
        assert away.shape == weight.shape
        assert away.signature is not weight.signature


def test_a_weight_moved_to_another_device_means_the_same(device: str) -> None:
    for fmt in FORMATS:
        weight = vecmat.quantize(draw(9, 130), fmt)
        moved = weight.to(device)
        assert moved.device.type == device
        assert torch.equal(moved.dequantize(torch.float64).cpu(), weight.dequantize(torch.float64))
        there = vecmat.quantize(draw(9, 130).to(device), fmt)
        assert torch.equal(there.data.cpu().view(torch.uint8), weight.data.view(torch.uint8)), fmt


def test_quantize_in_pieces_gives_what_it_gives_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    w = draw(13, 96)
    for fmt in QUANTISED:
        whole = vecmat.quantize(w, fmt)
        with monkeypatch.context() as patch:
            patch.setattr("vecmat.weights._CHUNK", 200)  # two rows at a time
            pieces = vecmat.quantize(w, fmt)
        assert torch.equal(whole.dequantize(), pieces.dequantize())


def test_equal_weights_share_one_signature() -> None:
    first, second = vecmat.quantize(draw(4, 32, 1), "int8"), vecmat.quantize(draw(4, 32, 2), "int8")
    assert first.signature is second.signature
    assert isinstance(first.signature, Signature)
    assert vecmat.quantize(draw(4, 32), "int8:g32").signature is not first.signature


def test_int4_takes_the_largest_group_size_that_divides_k() -> None:
    sizes = {4096: 128, 192: 64, 96: 32, 100: 32, 1: 32}
    for k, size in sizes.items():
        assert default_group_size("int4", k) == size
        assert vecmat.quantize(draw(2, k), "int4").format.group_size == size
    assert default_group_size("int8", 4096) is None
    assert vecmat.quantize(draw(2, 4096), "int4:g32").format.group_size == 32
    assert vecmat.quantize(draw(2, 4096), "int4", group_size=64, symmetric=False).format == Format("int4", 64, False)
    assert resolve_format("int4:g64:zp", 4096) == Format("int4", 64, False)


def test_a_format_prints_as_it_is_parsed() -> None:
    for fmt in FORMATS:
        assert str(Format.parse(fmt)) == fmt
    assert "int4:g64, n=2, k=64" in repr(vecmat.quantize(draw(2, 64), "int4"))


@pytest.mark.parametrize("compute", ["int8", "fp8"])
def test_rows_of_x_are_quantised_as_the_definition_says(compute: str, device: str) -> None:
    x = draw(5, 64)
    x[1] = 0
    x[2, 3] = torch.inf
    x[3, 0] = torch.nan
    q, scale = quantize_rows(x.to(device), compute)
    q, scale = q.cpu().double(), scale.cpu()
    top = 127 if compute == "int8" else 448
    assert (q[0].abs().max(), q[4].abs().max()) == (top, top)
    assert (q[1] == 0).all()
    assert not torch.isfinite(scale[2:4]).any(), "a row with inf or NaN must not look finite"
    good = [0, 4]
    steps = x[good].double() / scale[good].double()
    wanted = torch.round(steps) if compute == "int8" else round_e4m3(steps)
    assert torch.equal(q[good], wanted)


def test_any_matrix_survives_any_format() -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    floats = st.floats(-(2.0**100), 2.0**100, width=32)

    @hypothesis.settings(max_examples=120, deadline=None, derandomize=True)
    @hypothesis.given(
        st.integers(1, 5), st.integers(1, 150), st.sampled_from(QUANTISED), st.lists(floats, min_size=1, max_size=9)
    )
    def check(n: int, k: int, fmt: str, seeds: list[float]) -> None:
        values = torch.tensor(seeds, dtype=torch.float32).repeat(-(-n * k // len(seeds)))[: n * k].view(n, k)
        weight = vecmat.quantize(values, fmt)
        dense = weight.dequantize(torch.float64)
        assert torch.equal(dense, decoded(weight))
        size = weight.format.group_size or k
        top = torch.stack([part.abs().amax(1) for part in values.double().split(size, 1)], 1)
        top = top.repeat_interleave(size, 1)[:, :k]
        worst = {"int8": 0.008, "int4": 0.14, "fp8": 0.04}[weight.format.name]
        assert ((dense - values.double()).abs() <= worst * top + 1e-38).all()
        again = vecmat.quantize(dense.float(), fmt)  # what the format can hold, it keeps (but for the scale's grid)
        assert ((again.dequantize(torch.float64) - dense).abs() <= worst * top + 1e-38).all()

    check()
