"""How a kernel is chosen: for devices that are absent, under settings, and when a kernel fails at its first launch."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vecmat
from cases import DENSE, FORMATS, KERNELS, asked, computes, generator, here
from vecmat import dispatch
from vecmat.device import KNOWN, Device
from vecmat.dispatch import candidates, choose
from vecmat.kernels import registry
from vecmat.kernels.base import Kernel
from vecmat.ops import explain_problem
from vecmat.problem import Problem
from vecmat.settings import scope, settings

SIZES = ((1, 4096, 4096), (8, 4096, 14336), (16, 4095, 4097), (512, 11008, 4096), (3, 5, 7), (1, 1, 1), (4096, 64, 64))


@pytest.mark.parametrize("name", ["cpu", *KNOWN])
def test_every_problem_has_an_answer_on_every_device(name: str) -> None:
    device = Device.named(name)
    for fmt, x, (m, n, k) in product(FORMATS, DENSE, SIZES):
        for compute, grad in product(computes(fmt), (False, True)):
            if compute and grad:
                continue
            problem = asked(m, n, k, x, fmt, compute=compute, grad=grad, out="fp32" if k == 7 else x)
            answers = candidates(problem, device)
            assert {a.kernel for a in answers} == set(KERNELS) | set(registry()[1])
            able = [a for a in answers if a.reason is None]
            assert answers[: len(able)] == able, "those that can run come first"
            assert able == sorted(able, key=lambda a: a.estimate_us)
            assert "fallback" in {a.kernel for a in able}
            for answer in able:
                kernel = registry()[0][answer.kernel]
                told = f"{answer.kernel} {problem} on {name}"
                assert 0 < answer.estimate_us < float("inf"), told
                configs = [dict(config) for config in kernel.configs(problem, device)]
                assert dict(answer.config) in configs, told
                assert 1 <= len(configs) <= 40, told
                assert kernel.differentiable or not grad, told
                for config in configs:
                    assert kernel.reduction(problem, config).strip(), told
                    assert all(type(v) in (int, str, bool) for v in config.values()), told
            for answer in answers[len(able) :]:
                assert answer.reason, f"{answer.kernel} gives no reason"


@pytest.mark.parametrize("name", ["cpu", *KNOWN])
def test_the_lowest_estimate_is_chosen_and_explained_with_every_kernel(name: str) -> None:
    device = Device.named(name)
    for fmt in FORMATS:
        problem = asked(1, 4112, 4096, fmt if fmt in DENSE else "bf16", fmt)  # no shipped table has it
        plan = choose(problem, device)
        able = [a for a in candidates(problem, device) if a.reason is None]
        assert plan.kernel.name == able[0].kernel
        assert plan.decided_by == "lowest estimate"
        told = str(explain_problem(problem, device)).splitlines()
        assert told[0] == f"{problem.key()} on {device.name}"
        assert told[1].startswith(f"-> {plan.kernel.name}")
        assert told[1].endswith(", lowest estimate")
        assert told[2].strip() == f"sums K as: {plan.reduction}"
        assert told[3].split()[0] == plan.kernel.name
        assert {line.split()[0] for line in told[3:]} == set(KERNELS) | set(registry()[1])
        assert all("  about " in line or "  cannot: " in line for line in told[3:])


def test_the_caller_is_told_where_x_is_quantised() -> None:
    told = str(explain_problem(asked(1, 64, 64, "bf16", "int8", compute="int8"), here("cpu")))
    assert "compute='int8': each row of x is quantised; this changes the numbers" in told


def test_explain_multiplies_nothing_and_knows_the_arguments() -> None:
    x, weight = torch.zeros(2, 3, 64, device="meta"), vecmat.quantize(torch.zeros(8, 64, device="meta"), "int8")
    explanation = vecmat.explain(x, weight, torch.zeros(8, device="meta"), out_dtype=torch.bfloat16)
    assert explanation.plan.problem.key() == "m6 n8 k64 x=fp32 w=int8 o=bf16 nk bias"
    assert repr(explanation) == str(explanation)


def test_strict_refuses_the_fallback_and_lists_every_reason() -> None:
    x, weight = torch.zeros(2, 63), vecmat.quantize(torch.ones(5, 63), "int4:g32:zp")
    able = [a.kernel for a in vecmat.explain(x, weight).candidates if a.reason is None]
    if able != ["fallback"]:
        pytest.skip(f"{able} can run the strangest problem there is")
    assert vecmat.matmul(x, weight).shape == (2, 5)
    with vecmat.settings(strict=True):
        with pytest.raises(
            vecmat.NoKernelError, match="only the fallback can run m2 n5 k63 x=fp32 w=int4:g32:zp"
        ) as told:
            vecmat.matmul(x, weight)
        lines = str(told.value).splitlines()[1:]
        assert {line.split(":")[0].strip() for line in lines} == set(KERNELS) - {"fallback"} | set(registry()[1])
        assert all(len(line.split()) > 3 for line in lines)
        assert vecmat.matmul(x, weight, kernel="fallback").shape == (2, 5)  # asked for by name
        assert vecmat.matmul(x, torch.ones(5, 63)).shape == (2, 5)
    assert vecmat.matmul(x, weight).shape == (2, 5)


def test_settings_nest_are_restored_and_belong_to_one_thread() -> None:
    assert settings.current() == vecmat.Settings()
    with vecmat.settings(strict=True) as outer:
        assert outer.strict
        assert settings.current() == outer
        with contextlib.suppress(KeyError), vecmat.settings(strict=False):
            assert not settings.current().strict
            raise KeyError
        assert settings.current().strict
        with vecmat.settings():
            assert settings.current().strict, "what is not named stays as it was"
        with ThreadPoolExecutor(1) as pool:
            assert not pool.submit(lambda: settings.current().strict).result()
    assert not settings.current().strict
    again = vecmat.settings(strict=True)
    with again, again:
        assert settings.current().strict
    assert not settings.current().strict


def test_settings_that_do_not_exist_are_refused() -> None:
    with pytest.raises(TypeError, match=r"there is no setting 'strikt'; the settings are strict, .*overlay"):
        vecmat.settings(strikt=True)
    with pytest.raises(TypeError, match="strict is 1; expected True or False"):
        vecmat.settings(strict=1)


def test_many_settings_at_once_from_many_threads_do_not_lose_their_own() -> None:
    def enter(seed: int) -> bool:
        for step in range(60):
            overlay = vecmat.tables.Table("d", {}, f"{seed} {step}")
            with vecmat.settings(overlay=overlay):
                if settings.current().overlay is not overlay:
                    return False
        return settings.current().overlay is None

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(enter, range(16)))


class Flaky(Kernel):
    """A kernel that is the best by its own estimate and fails at its first launch."""

    launch_errors = (MemoryError,)
    error: Exception = MemoryError("no shared memory left\nsecond line")

    def rejects(self, problem: Problem, device: Device) -> str | None:
        return None if problem.weight.dense else "only dense weights here"

    def estimate_us(self, problem: Problem, device: Device, config: object) -> float:
        return 1e-6

    def reduction(self, problem: Problem, config: object) -> str:
        return "never"

    def bind(self, problem: Problem, device: Device, config: object) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            raise self.error

        return run


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    kernel = Flaky("flaky")
    kernels, missing = registry()
    monkeypatch.setattr(dispatch, "registry", lambda: ({**kernels, "flaky": kernel}, missing))
    return kernel


@pytest.mark.parametrize("message", ["no shared memory left\nsecond line", ""])
def test_a_kernel_that_fails_at_its_first_launch_is_set_aside_once(flaky: Flaky, message: str) -> None:
    flaky.error = MemoryError(message)
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.warns(vecmat.VecmatWarning) as told:
        y = vecmat.matmul(x, w)
    assert torch.equal(y, x @ w.t())
    assert len(told) == 1
    text = str(told[0].message)
    next_one = vecmat.explain(x, w).plan.kernel.name
    assert text.startswith(f"kernel flaky is set aside for m2 n4 k8 x=fp32 w=fp32 o=fp32 nk on {here('cpu').name}, its")
    assert "its first launch failed: MemoryError" in text
    assert "second line" not in text
    assert text.endswith(f"{next_one} takes its place")
    assert told[0].filename == __file__, "the warning points at the caller"
    assert torch.equal(vecmat.matmul(x, w), y)  # the warm path
    assert torch.equal(vecmat.matmul(x.clone()[None], w), y[None])  # another call of the same problem: no new warning
    assert "flaky" in str(vecmat.explain(x, w)).split("cannot: its first launch failed")[0].splitlines()[-1]
    with pytest.warns(vecmat.VecmatWarning):
        vecmat.matmul(x[:1], w)  # another problem: it may work there


def test_a_named_kernel_is_not_replaced_and_other_errors_propagate(flaky: Flaky) -> None:
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    with pytest.raises(MemoryError, match="no shared memory left"):
        vecmat.matmul(x, w, kernel="flaky")
    flaky.error = RuntimeError("the device is lost")
    with pytest.raises(RuntimeError, match="the device is lost"):
        vecmat.matmul(x, w)
    assert vecmat.explain(x, w).plan.kernel.name == "flaky", "a fault of the device demotes no kernel"


def test_a_failure_under_strict_is_an_error_where_only_the_fallback_is_left(flaky: Flaky) -> None:
    x, w = torch.ones(2, 8), torch.ones(4, 8)
    others = [a.kernel for a in vecmat.explain(x, w, out_dtype=torch.bfloat16).candidates if a.reason is None]
    if set(others) > {"flaky", "fallback"}:
        pytest.skip(f"{others} can run it")
    with vecmat.settings(strict=True), pytest.raises(vecmat.NoKernelError, match="flaky: its first launch failed"):
        vecmat.matmul(x, w, out_dtype=torch.bfloat16)


def test_plans_are_remembered_by_all_that_matters_and_never_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.ones(4, 8)
    for x in (torch.ones(1, 8), torch.ones(2, 8), torch.ones(1, 1, 8)):
        for _ in range(3):
            vecmat.matmul(x, w, kernel="torch_dense")  # the way that no call from C cuts short
    assert len(scope().plans) == 3
    stored = [vecmat.quantize(torch.full((4, 8), value), "int8") for value in (1.0, 2.0)]
    results = [vecmat.matmul(torch.ones(1, 8), weight)[0, 0].item() for weight in stored]
    assert len(scope().plans) == 4, "equal weights share a plan"
    assert results == pytest.approx([8.0, 16.0], rel=0.01)
    for m in range(1, 1 << 14, 1 << 10):
        scope().plans.update({(m, i): None for i in range(1 << 10)})
    vecmat.matmul(torch.ones(7, 8), w)
    vecmat.matmul(torch.ones(9, 8), w)
    assert len(scope().plans) <= 1 << 14


def test_gradients_change_the_plan_and_not_the_result() -> None:
    x, weight = torch.ones(2, 64), vecmat.quantize(torch.ones(8, 64), "int8")
    plain = vecmat.matmul(x, weight)
    assert not plain.requires_grad
    asks = x.clone().requires_grad_()
    y = vecmat.matmul(asks, weight)
    assert y.requires_grad
    with torch.no_grad():
        assert not vecmat.matmul(asks, weight).requires_grad
    y.sum().backward()
    torch.testing.assert_close(asks.grad, weight.dequantize().sum(0).expand(2, 64))
    torch.testing.assert_close(y.detach(), plain)


def test_a_product_without_elements_has_the_right_shape_dtype_and_bias(device: str) -> None:
    bias = torch.arange(4.0, device=device)
    for shape, k in (((0, 8), 8), ((2, 0, 8), 8), ((3, 0), 0), ((0,), 0)):
        x, w = torch.ones(shape, device=device), torch.ones(4, k, device=device)
        for b in (None, bias):
            y = vecmat.matmul(x, w, b, out_dtype=torch.bfloat16)
            assert torch.equal(y, F.linear(x, w, b).bfloat16())
    assert vecmat.matmul(torch.ones(3, 8, device=device), torch.ones(0, 8, device=device)).shape == (3, 0)


def test_eight_threads_at_once_get_equal_results(device: str) -> None:
    for fmt in ("bf16", "int8", "int4:g32"):
        weight = vecmat.quantize(torch.randn(64, 128, generator=generator("threads")), fmt).to(device)
        x = torch.randn(8, 5, 128, generator=generator("x")).to(device, torch.bfloat16)
        expected = [vecmat.matmul(part, weight) for part in x]
        fresh = weight.to(device)  # without packed copies: eight threads make them at once
        start = threading.Barrier(8)

        def work(index: int) -> bool:
            start.wait()  # noqa: B023
            return all(torch.equal(vecmat.matmul(x[index], fresh), expected[index]) for _ in range(30))  # noqa: B023

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8))), fmt
