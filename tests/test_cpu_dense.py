"""Dense weights on a CPU: the same bits in any company, packed copies that follow their weight and go with it."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch

import vecmat
from cases import generator, guarded
from oracle import Truth
from vecmat.kernels import registry
from vecmat.ops import bind_problem
from vecmat.problem import DTYPES

DENSE = registry()[0]["cpu_dense"]
ONEDNN = registry()[0]["torch_onednn"]
OWN = ("cpu_dense", "cpu_packed")


def draw(*shape: int, dtype: str) -> torch.Tensor:
    return torch.randn(shape, generator=generator(shape, dtype)).to(DTYPES[dtype])


def operand(kernel: str, data: torch.Tensor, layout: str = "nk") -> torch.Tensor | vecmat.Weight:
    """A dense weight as a kernel takes it: a plain tensor, or a Weight, which may be packed."""
    if kernel == "cpu_dense":
        return data
    name = next(name for name, dtype in DTYPES.items() if dtype == data.dtype)
    return vecmat.Weight(name, data, layout=layout)


def needs(kernel: str, x: torch.Tensor, weight: torch.Tensor | vecmat.Weight) -> None:
    """Skip where the kernel cannot run."""
    reason = registry()[0][kernel].rejects(*bind_problem(x, weight))
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", OWN)
@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_m_and_however_many_threads(kernel: str, dtype: str) -> None:
    n, k = 1003, 1337
    x, w, bias = draw(200, k, dtype=dtype), operand(kernel, draw(n, k, dtype=dtype)), draw(n, dtype=dtype)
    needs(kernel, x, w)
    before, first = torch.get_num_threads(), vecmat.matmul(x[:1], w, bias, kernel=kernel)
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for m in (1, 2, 3, 4, 5, 6, 7, 12, 13, 31, 64, 200):
                y = vecmat.matmul(x[:m], w, bias, kernel=kernel)
                assert torch.equal(y[:1], first), f"m={m}, {threads} threads"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kernel", OWN)
@torch.inference_mode()
def test_small_sizes_and_every_tail_of_k_and_n_are_right(kernel: str, dtype: str) -> None:
    sizes = (1, 2, 15, 16, 17, 31, 33, 63, 65)
    needs(kernel, draw(1, 4, dtype=dtype), operand(kernel, draw(4, 4, dtype=dtype)))
    wrong = []
    for n in sizes:
        for k in sizes:
            x, w, bias = draw(19, k, dtype=dtype), guarded(draw(n, k, dtype=dtype), 1), draw(n, dtype=dtype)
            truth, weight = Truth.of(x, w, bias), operand(kernel, w)
            for m in (1, 2, 4, 5, 19):
                said = truth.verdict(vecmat.matmul(guarded(x[:m], 3), weight, bias, kernel=kernel), slice(0, m))
                wrong += [f"m={m} n={n} k={k}: {said}"] if said else []
    assert not wrong, wrong[:5]


@pytest.mark.parametrize("kernel", OWN)
@torch.inference_mode()
def test_a_weight_is_read_by_its_row_stride(kernel: str) -> None:
    wide = draw(64, 300, dtype="fp32")
    w, x = wide[:, 20:220], draw(3, 200, dtype="fp32")
    needs(kernel, x, operand(kernel, w))
    assert Truth.of(x, w).verdict(vecmat.matmul(x, operand(kernel, w), kernel=kernel)) is None


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@torch.inference_mode()
def test_a_weight_of_k_rows_is_packed_too(dtype: str) -> None:
    x, w = draw(33, 70, dtype=dtype), draw(70, 45, dtype=dtype)
    weight = operand("cpu_packed", w, layout="kn")
    needs("cpu_packed", x, weight)
    said = Truth.of(x, w, layout="kn").verdict(vecmat.matmul(x, weight, kernel="cpu_packed"))
    assert said is None, said


@pytest.mark.parametrize("kernel", OWN)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@torch.inference_mode()
def test_x_and_weight_of_different_dtypes_are_widened_not_rounded(kernel: str, dtype: str) -> None:
    x, w = draw(5, 97, dtype="fp32"), vecmat.Weight(dtype, draw(40, 97, dtype=dtype))
    needs(kernel, x, w)
    y = vecmat.matmul(x, w, kernel=kernel)
    assert Truth.of(x, w).verdict(y) is None
    assert torch.allclose(y.double(), x.double() @ w.data.double().t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["torch_onednn", "cpu_packed"])
@torch.inference_mode()
def test_a_plain_tensor_is_never_packed(kernel: str) -> None:
    x, w = draw(128, 256, dtype="bf16"), draw(512, 256, dtype="bf16")
    needs(kernel, x, vecmat.Weight("bf16", w))
    answers = {c.kernel: c.reason for c in vecmat.explain(x, w).candidates}
    assert "plain tensor" in (answers[kernel] or "")
    with pytest.raises(ValueError, match="plain tensor"):
        vecmat.matmul(x, w, kernel=kernel)


@pytest.mark.parametrize("kernel", ["torch_onednn", "cpu_packed"])
def test_a_packed_dense_weight_follows_what_is_written_to_it(kernel: str) -> None:
    x, data = draw(4, 64, dtype="bf16"), draw(32, 64, dtype="bf16")
    weight = vecmat.Weight("bf16", data)
    needs(kernel, x, weight)
    with torch.no_grad():
        first = vecmat.matmul(x, weight, kernel=kernel)
        data.mul_(2)
        assert torch.equal(vecmat.matmul(x, weight, kernel=kernel), 2 * first)


def test_a_packed_copy_goes_with_its_layer_and_the_state_stays_plain() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Linear(96, 32)).bfloat16()
    before = copy.deepcopy(model.state_dict())
    x = draw(7, 64, dtype="bf16")
    needs("torch_onednn", x, vecmat.Weight("bf16", model[0].weight.detach()))
    vecmat.convert(model, "bf16")
    with torch.inference_mode(), vecmat.settings():
        weight = model[0].stored()
        pack = weakref.ref(ONEDNN.operand(weight).tensors[0])
        assert ONEDNN.operand(weight).tensors[0] is pack(), "packed twice"
        model(x)
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    del weight, state
    model[0] = vecmat.Linear.from_weight(vecmat.quantize(model[0].weight, "int8"), model[0].bias)
    gc.collect()
    assert pack() is None, "the packed copy outlives its layer"


@pytest.mark.parametrize("kernel", OWN)
def test_rows_of_x_that_are_taken_in_parts_have_the_bits_of_rows_taken_at_once(kernel: str, threads: int) -> None:
    x, w = torch.randn(400, 15000), operand(kernel, torch.randn(9, 15000))  # 24 MB of x in fp32
    needs(kernel, x, w)
    y = vecmat.matmul(x, w, kernel=kernel)
    for first in (0, 95, 96, 104, 300, 399):
        assert torch.equal(vecmat.matmul(x[first : first + 1], w, kernel=kernel), y[first : first + 1]), first


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@torch.inference_mode()
def test_many_rows_meet_a_packed_weight_in_passes_and_its_panels_in_groups(dtype: str, threads: int) -> None:
    x, w, bias = draw(1100, 1100, dtype=dtype), draw(700, 1100, dtype=dtype), draw(700, dtype=dtype)
    weight = operand("cpu_packed", w)
    needs("cpu_packed", x, weight)
    y = vecmat.matmul(x, weight, bias, kernel="cpu_packed")
    said = Truth.of(x, w, bias).verdict(y)
    assert said is None, said
    for first in (0, 365, 366, 367, 733, 734, 1099):
        row = vecmat.matmul(x[first : first + 1], weight, bias, kernel="cpu_packed")
        assert torch.equal(row, y[first : first + 1]), first


@pytest.mark.parametrize("layout", ["nk", "kn"])
def test_rows_under_torch_func_have_no_memory_and_are_multiplied_all_the_same(layout: str) -> None:
    x, w = draw(3, 5, 96, dtype="fp32"), draw(*((40, 96) if layout == "nk" else (96, 40)), dtype="fp32")
    weight = operand("cpu_packed", w, layout=layout)
    needs("cpu_packed", x, weight)
    with torch.no_grad():
        y = torch.func.vmap(lambda rows: vecmat.matmul(rows, weight, kernel="cpu_packed"))(x)
    torch.testing.assert_close(y, x @ (w.t() if layout == "nk" else w))
