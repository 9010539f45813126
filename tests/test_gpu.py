"""What only a GPU can show: graphs, streams, threads and devices at once, overlapping launches, weights past 2**31."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import vecmat
from oracle import Truth
from vecmat.kernels import registry
from vecmat.ops import bind_problem
from vecmat.weights import Weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="needs an NVIDIA GPU"),
]

SHAPE = (16, 1024, 4096)  # m, n, k: too few columns for the GPU, so that K is split among programs


def problem(fmt: str = "int8", seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[Tensor, Weight]:
    """x (m, k) in bf16 and a weight (n, k) on the current device."""
    m, n, k = shape
    rng = torch.Generator(device="cuda").manual_seed(seed)
    x = torch.randn(m, k, generator=rng, device="cuda").bfloat16()
    w = torch.randn(n, k, generator=rng, device="cuda") / k**0.5
    return x, vecmat.quantize(w.bfloat16() if fmt == "bf16" else w, fmt)


def right(y: Tensor, x: Tensor, weight: Weight | Tensor) -> None:
    """Assert that a result is as right as every kernel's must be."""
    wrong = Truth.of(x, weight, None).verdict(y)
    assert wrong is None, wrong


def shared_sums(x: Tensor, weight: Weight, kernel: str) -> int:
    """How many sums of this problem several programs of the kernel share."""
    from vecmat.kernels._gluon import Fragments  # where Triton is

    asked, device = bind_problem(x, weight, None)
    own = registry()[0][kernel]
    assert isinstance(own, Fragments)
    return own.cut(asked, own.default_config(asked, device)).sums


def captured(x: Tensor, weights: list[Weight], kernel: str) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of one product with each weight, and its results."""
    for weight in weights:
        vecmat.matmul(x, weight, kernel=kernel)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [vecmat.matmul(x, weight, kernel=kernel) for weight in weights]
    return graph, results


@pytest.mark.parametrize("kernel", ["triton_decode", "triton_wgmma"])
@torch.inference_mode()
def test_graphs_replayed_on_two_streams_at_once_do_not_meet(kernel: str) -> None:
    x, first = problem()
    if registry()[0][kernel].rejects(*bind_problem(x, first, None)):
        pytest.skip(f"{kernel} does not run here")
    assert shared_sums(x, first, kernel)
    weights = [first, *(problem(seed=seed)[1] for seed in range(1, 4))]
    expected = [vecmat.matmul(x, weight, kernel=kernel) for weight in weights]
    graphs = [captured(x, weights, kernel) for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in graphs]
    torch.cuda.synchronize()
    for _ in range(50):
        for (graph, results), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                for y in results:
                    y.fill_(float("nan"))
                graph.replay()
        torch.cuda.synchronize()
        for _, results in graphs:
            assert all(torch.equal(y, e) for y, e in zip(results, expected, strict=True))


@pytest.mark.parametrize("kernel", ["triton_decode", "triton_wgmma"])
@torch.inference_mode()
def test_streams_and_threads_at_once_give_the_bits_of_one_call(kernel: str) -> None:
    x, weight = problem()
    if registry()[0][kernel].rejects(*bind_problem(x, weight, None)):
        pytest.skip(f"{kernel} does not run here")
    expected = vecmat.matmul(x, weight, kernel=kernel)
    right(expected, x, weight)
    torch.cuda.synchronize()

    def work(_: int) -> list[Tensor]:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            results = [vecmat.matmul(x, weight, kernel=kernel) for _ in range(100)]
            torch.cuda.current_stream().synchronize()
            return results

    with ThreadPoolExecutor(8) as pool:
        for results in pool.map(work, range(8)):
            assert all(torch.equal(y, expected) for y in results)


@torch.inference_mode()
def test_a_weight_that_a_product_has_just_made_is_waited_for() -> None:
    # A plain tensor may come from the kernel in front; launches that overlap must not read it early.
    rng = torch.Generator(device="cuda").manual_seed(1)
    a, b = (torch.randn(512, 512, generator=rng, device="cuda").bfloat16() for _ in range(2))
    x = torch.randn(1, 512, generator=rng, device="cuda").bfloat16()
    expected = vecmat.matmul(x, vecmat.matmul(a, b, kernel="triton_dense").clone(), kernel="torch_dense")
    for kernel in ("triton_gemv", "triton_decode"):
        for _ in range(50):
            w = torch.full_like(a, float("nan"))
            del w  # its memory is where the next product goes
            y = vecmat.matmul(x, vecmat.matmul(a, b, kernel="triton_dense"), kernel=kernel)
            torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("fmt", ["int8", "int4:g128", "bf16"])
@torch.inference_mode()
def test_a_chain_of_overlapping_launches_reads_what_the_one_in_front_wrote(fmt: str) -> None:
    x, weight = problem(fmt, shape=(1, 1024, 1024))
    kernel = "triton_decode"
    expected = [x]
    for _ in range(20):
        expected.append(vecmat.matmul(expected[-1], weight, kernel=kernel))
        torch.cuda.synchronize()
    for _ in range(20):
        y = x
        for _ in expected[1:]:
            y = vecmat.matmul(y, weight, kernel=kernel)
        assert torch.equal(y, expected[-1])


@torch.inference_mode()
def test_a_weight_of_more_than_two_gigabytes_is_read_to_its_end() -> None:
    n, k = 66_048, 32_768
    if torch.cuda.mem_get_info()[0] < 8 * n * k:
        pytest.skip("needs 17 GB of GPU memory")
    data = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    scale = torch.rand(n, 1, device="cuda") + 0.5
    weight = Weight("int8", data, scale)
    x = torch.randn(2, k, device="cuda").bfloat16()
    for kernel in ("triton_decode", "triton_wgmma"):
        if registry()[0][kernel].rejects(*bind_problem(x, weight, None)):
            continue
        y = vecmat.matmul(x, weight, kernel=kernel)
        right(y[:, -64:].contiguous(), x, Weight("int8", data[-64:].clone(), scale[-64:].clone()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@torch.inference_mode()
def test_a_tensor_on_another_device_than_the_current_one_is_multiplied_there() -> None:
    x, weight = problem()
    expected = vecmat.matmul(x, weight)
    x, weight = x.to("cuda:1"), weight.to("cuda:1")
    assert torch.cuda.current_device() == 0
    for kernel in ("triton_decode", "triton_wgmma", None):
        for _ in range(3):
            y = vecmat.matmul(x, weight, kernel=kernel)
            assert y.device == x.device
            right(y, x, weight)
    torch.testing.assert_close(y.cpu(), expected.cpu(), rtol=2e-2, atol=2e-2)
