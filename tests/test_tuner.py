"""The tuner: wrong kernels never win, noise never decides, time is bounded, processes do not disturb each other."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import filelock
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vecmat
from cases import DENSE, FORMATS, asked, here
from vecmat import dispatch, table, tables, tuner
from vecmat.device import Device
from vecmat.dispatch import choose
from vecmat.kernels import registry
from vecmat.kernels.base import Config, Kernel
from vecmat.problem import DTYPES, Format, Problem
from vecmat.table import Row

PROBLEM = Problem(m=2, n=24, k=40, x="fp32", weight=Format("fp32"), out="fp32")
KEY = PROBLEM.key()
ROW = Row(kernel="fallback", kernel_version=1, config={"widen": True}, us=1.0)


class Fake(Kernel):
    """A kernel of fp32 weights with a given estimate, and a time by config; ``ran`` is the time of the last run."""

    ran = 0.0
    runs: int

    def __init__(self, name: str, estimate: float, us: Mapping[str, float], **about: object) -> None:
        super().__init__(name)
        self.estimate, self.us, self.runs = estimate, us, 0
        self.estimates: Mapping[str, float] = about.get("estimates", {})  # type: ignore[assignment]
        self.result: Callable[[Tensor], Tensor] = about.get("result", lambda y: y)  # type: ignore[assignment]
        self.launch_errors = (MemoryError,)  # type: ignore[misc]

    def rejects(self, problem: Problem, device: Device) -> str | None:
        return None if problem.weight.name == "fp32" and not problem.grad else "only fp32 weights here"

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        return self.estimates.get(str(config["c"]), self.estimate)

    def default_config(self, problem: Problem, device: Device) -> Config:
        return {"c": next(iter(self.us))}

    def configs(self, problem: Problem, device: Device) -> list[Config]:
        return [{"c": name} for name in self.us]

    def reduction(self, problem: Problem, config: Config) -> str:
        return "torch"

    def bind(self, problem: Problem, device: Device, config: Config) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            self.runs += 1
            Fake.ran = self.us[str(config["c"])]
            return self.result(F.linear(x, weight, bias))

        return run


class FakeSampler:
    """Tells the time that the kernel claims."""

    def __init__(self, device: Device, calls: list[Callable[[], Tensor]]) -> None:
        calls[0]()
        self.us = Fake.ran

    def once(self) -> float:
        return self.us


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes these kernels, and torch's own if asked for, all there are."""

    def only(*kernels: Kernel, torch_too: bool = False) -> None:
        found: dict[str, Kernel] = {kernel.name: kernel for kernel in kernels}
        if torch_too:
            found["torch_dense"] = registry()[0]["torch_dense"]
        for module in (tuner, dispatch):
            monkeypatch.setattr(module, "registry", lambda: (found, {}))

    return only


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are what the fake kernels claim."""
    monkeypatch.setattr(tuner, "Sampler", FakeSampler)


def tuned(problem: Problem = PROBLEM, **options: float) -> tuner.Tuned:
    found = tuner.tune(problem, here("cpu"), **options)
    assert found is not None
    return found


WRONG = {
    "zeros": torch.zeros_like,
    "NaN": lambda y: torch.full_like(y, torch.nan),
    "one wrong number": lambda y: y.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(9.0)),
    "the last column": lambda y: torch.cat((y[:, :-1], torch.zeros(y.shape[0], 1)), 1),
    "too few bits": lambda y: y.bfloat16().float(),
    "another shape": lambda y: y[:, :-1],
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_kernel_is_never_recorded_whatever_its_speed(what: str, install: Install) -> None:
    wrong = Fake("wrong", 1e-6, {"": 0.0}, result=WRONG[what])
    install(wrong, torch_too=True)
    found = tuned()
    assert found.row.kernel == "torch_dense"
    assert (found.row.tried, found.row.failed) == (2, 1)
    failed = next(t for t in found.trials if t.kernel == "wrong")
    assert failed.us is None
    assert "its error is" in str(failed.failure) or "its result has shape" in str(failed.failure)
    install(wrong)
    assert tuner.tune(PROBLEM, here("cpu")) is None, "a wrong kernel is recorded where there is no other"


def test_a_kernel_that_raises_a_launch_error_has_failed_and_other_errors_propagate(install: Install) -> None:
    def fails(error: Exception) -> Callable[[Tensor], Tensor]:
        def result(y: Tensor) -> Tensor:
            raise error

        return result

    install(Fake("big", 1e-6, {"": 0.0}, result=fails(MemoryError("too much\nmore"))), torch_too=True)
    found = tuned()
    assert (found.row.kernel, found.row.failed) == ("torch_dense", 1)
    assert next(t for t in found.trials if t.kernel == "big").failure == "MemoryError: too much"
    install(Fake("broken", 1e-6, {"": 0.0}, result=fails(RuntimeError("the device is lost"))), torch_too=True)
    with pytest.raises(RuntimeError, match="the device is lost"):
        tuned()


def test_torchs_own_path_is_a_candidate_and_its_time_is_recorded() -> None:
    problem = Problem(m=1, n=64, k=64, x="fp32", weight=Format("fp32"), out="fp32")
    row = tuned(problem).row
    assert row.torch_us is not None
    assert row.us <= row.torch_us / (1 - tuner.MARGIN)


def test_where_torch_has_no_kernel_for_the_format_its_own_path_is_the_fallback() -> None:
    row = tuned(Problem(m=2, n=24, k=40, x="fp32", weight=Format("fp8"), out="fp32")).row
    assert row.kernel == "fallback"
    assert row.torch_us == row.us


def test_torchs_own_path_is_tried_however_it_is_estimated_and_whatever_the_time(install: Install, told: None) -> None:
    kernels = [Fake(f"other {i}", 1.0, {"": 100.0}) for i in range(30)]
    torchs = Fake("torch_it", 1e9, {"": 10.0})
    install(*kernels, torchs)
    for deadline in (float("inf"), time.monotonic() - 1):
        row = tuned(deadline=deadline).row
        assert (row.kernel, row.us, row.torch_us) == ("torch_it", 10.0, 10.0)
    assert row.tried == 2
    torchs.us = {"": 1e6}
    row = tuned().row
    assert (row.kernel, row.torch_us) == ("other 0", 1e6)


def test_torchs_own_path_is_stopped_at_a_slice_where_that_alone_is_slower_than_another_kernel(install: Install) -> None:
    widths: list[int] = []

    def a_millisecond_a_column(y: Tensor) -> Tensor:
        widths.append(y.shape[1])
        time.sleep(1e-3 * y.shape[1])
        return y

    wrong = Fake("wrong", 0.5, {"": 0}, result=torch.zeros_like)
    install(wrong, Fake("usual", 1.0, {"": 0}), Fake("torch_it", 1e9, {"": 0}, result=a_millisecond_a_column))
    problem = dataclasses.replace(PROBLEM, n=4096)
    seen: list[tuner.Trial] = []
    found = tuner.tune(problem, here("cpu"), on_trial=seen.append)
    assert found is not None
    assert (found.row.kernel, found.row.torch_us, found.row.tried, found.row.failed) == ("usual", None, 3, 1)
    stopped = next(trial for trial in seen if trial.kernel == "torch_it")
    assert (stopped.us, stopped.failure) == (None, None)
    assert stopped in found.trials
    assert widths[:3] == [16] * 3, "one slow call is a slow moment"
    assert max(widths) < 128
    assert stopped.over_us is not None
    assert stopped.over_us >= 16e3
    assert found.row.torch_over_us == round(stopped.over_us, 2)


@pytest.mark.parametrize("x", ["bf16", "fp16"])
def test_torchs_real_path_where_it_is_slow_is_bounded_and_what_is_told_of_it_true(x: str) -> None:
    """A 16-bit weight (K, N): on a CPU that has no instructions for it torch takes a hundred times the best."""
    problem = Problem(m=64, n=4096, k=1024, x=x, weight=Format(x), out=x, layout="kn")
    row = tuned(problem).row
    if row.torch_over_us is None:
        assert row.torch_us is not None
        assert row.us <= row.torch_us / (1 - tuner.MARGIN)
        return
    assert row.torch_us is None
    assert row.us is not None
    rows, weight = torch.ones(64, 1024, dtype=DTYPES[x]), torch.ones(1024, 4096, dtype=DTYPES[x])
    begin = time.perf_counter()
    F.linear(rows, weight.t())
    assert (time.perf_counter() - begin) * 1e6 > max(row.torch_over_us, row.us)  # it has truly lost


@pytest.mark.parametrize(("fmt", "layout"), [*((fmt, "nk") for fmt in FORMATS), *((fmt, "kn") for fmt in DENSE)])
def test_a_slice_is_of_the_real_problem(fmt: str, layout: str) -> None:
    x = fmt if fmt in DENSE else "bf16"
    inputs = tuner._Inputs(asked(3, 48, 160, x, fmt, layout=layout, bias=True), here("cpu"), copies=1)
    for kernel in registry()[0].values():
        if kernel.rejects(inputs.problem, inputs.device) is None:
            for config in kernel.configs(inputs.problem, inputs.device):
                candidate = tuner._Candidate(kernel, config, 1.0)
                whole, part = (tuner._calls(candidate, i)[0]() for i in (inputs, inputs.narrow(16)))
                torch.testing.assert_close(part, whole[:, :16], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("faster", "wins"), [(0.99, False), (0.971, False), (0.969, True), (0.7, True)])
def test_the_untuned_choice_is_kept_unless_beaten_by_more_than_3_percent(
    faster: float, wins: bool, install: Install, told: None
) -> None:
    install(Fake("usual", 1.0, {"": 100.0}), Fake("other", 2.0, {"": 100.0 * faster}))
    assert choose(PROBLEM, here("cpu")).kernel.name == "usual"
    row = tuned().row
    assert row.kernel == ("other" if wins else "usual")
    assert row.us == pytest.approx(100 * faster if wins else 100)


def test_the_untuned_choice_is_the_default_config_though_another_is_estimated_lower(
    install: Install, told: None
) -> None:
    install(Fake("usual", 2.0, {"a": 100.0, "b": 99.0}, estimates={"a": 2.0, "b": 0.5}), Fake("z", 3.0, {"": 100.0}))
    assert dict(choose(PROBLEM, here("cpu")).config) == {"c": "a"}
    assert dict(tuned().row.config) == {"c": "a"}, "1 % decided"


def test_of_equal_estimates_the_untuned_choice_is_dispatchs(install: Install, told: None) -> None:
    install(Fake("b", 1.0, {"": 99.0}), Fake("a", 1.0, {"": 100.0}))
    assert choose(PROBLEM, here("cpu")).kernel.name == "a"
    assert tuned().row.kernel == "a"


def test_real_clocks_find_the_fast_kernel(install: Install) -> None:
    def sleeps(seconds: float) -> Callable[[Tensor], Tensor]:
        return lambda y: (time.sleep(seconds), y)[1]

    install(Fake("slow", 1.0, {"": 0}, result=sleeps(4e-3)), Fake("fast", 2.0, {"": 0}, result=sleeps(5e-4)))
    found = tuned()
    assert found.row.kernel == "fast"
    assert 500 <= found.row.us < 4000
    assert [trial.kernel for trial in found.trials] == ["fast", "slow"]


def test_what_is_estimated_hopeless_is_tried_only_where_nothing_else_works(install: Install, told: None) -> None:
    hopeless = Fake("hopeless", 1000.0, {"": 1.0})
    install(Fake("usual", 1.0, {"": 100.0}), hopeless)
    assert (tuned().row.kernel, hopeless.runs) == ("usual", 0)
    install(Fake("usual", 1.0, {"": 100.0}, result=torch.zeros_like), hopeless)
    assert tuned().row.kernel == "hopeless"


def test_a_deadline_that_has_passed_ends_the_search_with_what_was_timed(install: Install, told: None) -> None:
    many = Fake("many", 1.0, {str(i): 100.0 - i for i in range(30)})
    install(many)
    seen: list[str] = []
    found = tuner.tune(PROBLEM, here("cpu"), deadline=time.monotonic() - 1, on_trial=lambda t: seen.append(t.kernel))
    assert found is not None
    assert (found.row.tried, seen) == (1, ["many"])
    assert tuned().row.tried == 30


def test_the_callers_random_numbers_autocast_and_default_dtype_stay_out_of_it(install: Install) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    dtypes = set()
    install(Fake("watch", 1e-6, {"": 0.0}, result=lambda y: (dtypes.add(y.dtype), y)[1]), torch_too=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert tuned().row.failed == 0
    finally:
        torch.set_default_dtype(torch.float32)
    assert dtypes == {torch.float32}
    with vecmat.tuning(budget_s=20):
        vecmat.matmul(torch.ones(1, 8), torch.ones(4, 8))
    assert torch.equal(torch.rand(3), expected)


def rows() -> set[str]:
    found = tables.load(tables.path(here("cpu").name), here("cpu").name)
    return set(found.rows) if found is not None else set()


def test_what_is_met_inside_tuning_is_tuned_and_outside_nothing_is() -> None:
    w = torch.randn(24, 40)
    vecmat.matmul(torch.ones(1, 40), w)
    assert rows() == set()
    with vecmat.tuning(budget_s=60):
        torch.testing.assert_close(vecmat.matmul(torch.ones(2, 40), w), torch.ones(2, 40) @ w.t())
        assert rows() == {KEY}
        vecmat.matmul(torch.ones(1, 40), w)  # met before, and chosen by estimate then
    assert rows() == {KEY, KEY.replace("m2 ", "m1 ")}
    vecmat.matmul(torch.ones(3, 40), w)
    assert len(rows()) == 2
    assert vecmat.explain(torch.ones(2, 40), w).plan.decided_by.startswith("your table")


def test_explain_gradients_and_tracing_never_tune(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("tuned")

    monkeypatch.setattr(tuner, "tune", never)
    x, w = torch.ones(2, 40), torch.randn(24, 40)
    with vecmat.tuning(budget_s=60):
        assert vecmat.explain(x, w).plan.decided_by == "lowest estimate"
        y = vecmat.matmul(x.clone().requires_grad_(), w)
        assert y.requires_grad
        with pytest.raises(AssertionError, match="tuned"):
            vecmat.matmul(x, w)
        compiled = torch.compile(lambda x, w: vecmat.matmul(x, w), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, w), x @ w.t())
    vecmat.matmul(x, w)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_is_tuned_while_a_cuda_graph_is_captured() -> None:
    x = torch.ones(2, 64, device="cuda", dtype=torch.bfloat16)
    w = torch.ones(128, 64, device="cuda", dtype=torch.bfloat16)
    vecmat.matmul(x, w, kernel="torch_dense")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with vecmat.tuning(budget_s=60), torch.cuda.graph(graph):
        y = vecmat.matmul(x, w)
    graph.replay()
    assert y.eq(64).all()
    assert not tables.path(here("cuda").name).exists()


@pytest.mark.parametrize("budget", [0, -1, float("nan")])
def test_a_budget_of_nothing_is_refused(budget: float) -> None:
    with (
        pytest.raises(ValueError, match=r"tuning: budget_s is .*; expected more than 0 seconds"),
        vecmat.tuning(budget),
    ):
        pass


def test_a_budget_that_is_spent_leaves_the_rest_to_the_estimate() -> None:
    w = torch.randn(24, 40)
    with vecmat.tuning(budget_s=1e-9):
        time.sleep(0.01)
        assert vecmat.matmul(torch.ones(2, 40), w).shape == (2, 24)
    assert rows() == set()


def test_a_strict_table_shows_the_nearest_rows_and_the_word_that_differs() -> None:
    x, w = torch.ones(2, 40), torch.randn(24, 40)
    with vecmat.settings(on_miss="error"), pytest.raises(vecmat.TableMissError, match="the tables are empty"):
        vecmat.matmul(x, w)
    name = here("cpu").name
    tables.save(name, {KEY.replace("m2 ", "m8 "): ROW, "m4 n9 k9 x=bf16 w=bf16 o=bf16 kn": ROW})
    with vecmat.settings(on_miss="error"):
        with pytest.raises(vecmat.TableMissError) as error:
            vecmat.matmul(x, w)
        assert f"no table has {KEY} on {name}" in str(error.value)
        assert "m8 n24 k40 x=fp32 w=fp32 o=fp32 nk (your table): has m8 for m2" in str(error.value).splitlines()[1]
        tables.save(name, {KEY: ROW})
        torch.testing.assert_close(vecmat.matmul(x, w), x @ w.t())


CHOICES = """
import sys, torch, vecmat
order = [int(m) for m in sys.argv[1].split(",")]
torch.set_num_threads(1)
found = {}
for m in order:
    for fmt in ("fp32", "int8"):
        weight = vecmat.quantize(torch.ones(24, 40), fmt)
        plan = vecmat.explain(torch.ones(m, 40), weight).plan
        found[plan.problem.key()] = (plan.kernel.name, dict(plan.config), plan.decided_by.partition(":")[0])
print(sorted(found.items()))
"""


def test_a_second_process_chooses_the_same_kernels_in_any_order(python: Callable[..., str]) -> None:
    with vecmat.tuning(budget_s=100):
        for m in (1, 2, 8):
            for fmt in ("fp32", "int8"):
                vecmat.matmul(torch.ones(m, 40), vecmat.quantize(torch.ones(24, 40), fmt))
    own = {key: (row.kernel, dict(row.config), "your table") for key, row in
           tables.load(tables.path(here("cpu").name), here("cpu").name).rows.items()}  # fmt: skip
    assert len(own) == 6
    assert python(CHOICES, "1,2,8") == python(CHOICES, "8,2,1") == f"{sorted(own.items())}\n"


HOLDER = """
import sys, time, filelock
with filelock.FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Another process that is tuning this CPU."""
    file = tables.path(here("cpu").name)
    file.parent.mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", HOLDER, f"{file}.tuning.lock"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_while_another_process_tunes_this_one_waits_its_budget_and_goes_on(holder: subprocess.Popen[str]) -> None:
    x, w = torch.ones(2, 40), torch.randn(24, 40)
    began = time.monotonic()
    with vecmat.tuning(budget_s=0.5):
        for m in (1, 2, 3):
            assert vecmat.matmul(x[:1].expand(m, 40), w).shape == (m, 24)
    assert 0.4 < time.monotonic() - began < 10
    assert rows() == set()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with vecmat.tuning(budget_s=30):
        vecmat.matmul(x, w)
    assert rows() == {KEY}, "a killed process still holds the lock"


def test_what_another_process_tuned_meanwhile_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("tuned twice")

    name = here("cpu").name
    choose(PROBLEM, here("cpu"))  # the table, empty, has been read
    with monkeypatch.context() as other:
        other.setattr(table, "forget_plans", lambda: None)
        other.setattr(table.user_table, "cache_clear", lambda: None, raising=False)
        tables.save(name, {KEY: ROW})
    monkeypatch.setattr(tuner, "tune", never)
    with vecmat.tuning(budget_s=30):
        vecmat.matmul(torch.ones(2, 40), torch.randn(24, 40))
    assert choose(PROBLEM, here("cpu")).decided_by.startswith("your table")


def test_a_row_of_an_older_kernel_is_tuned_again() -> None:
    tables.save(here("cpu").name, {KEY: Row(kernel="gone", kernel_version=1, config={})})
    with vecmat.tuning(budget_s=30):
        vecmat.matmul(torch.ones(2, 40), torch.randn(24, 40))
    assert tables.load(tables.path(here("cpu").name), here("cpu").name).rows[KEY].kernel in registry()[0]


def test_where_no_table_can_be_written_rows_are_kept_for_the_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("VECMAT_CACHE_DIR", str(tmp_path / "file" / "below"))
    x, w = torch.ones(2, 40), torch.randn(24, 40)
    with vecmat.tuning(budget_s=60), pytest.warns(vecmat.VecmatWarning, match="could not be written"):
        vecmat.matmul(x, w)
    assert vecmat.explain(x, w).plan.decided_by == "tuned by this process: not saved"
    monkeypatch.setattr(tuner, "tune", lambda *_, **__: pytest.fail("tuned again"))
    with vecmat.tuning(budget_s=60):
        vecmat.matmul(x, w)


def test_a_corrupt_table_costs_two_warnings_while_tuning_one_for_reading_and_one_for_setting_it_aside() -> None:
    file = tables.path(here("cpu").name)
    file.parent.mkdir(parents=True)
    file.write_text("{ broken")
    with vecmat.tuning(budget_s=60), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for m in (1, 2):
            vecmat.matmul(torch.ones(m, 40), torch.randn(24, 40))
    assert ["set aside" in str(w.message) for w in said] == [False, True], [str(w.message) for w in said]
    assert len(rows()) == 2


GOOD = Problem(m=2, n=24, k=40, x="bf16", weight=Format("int8"), out="bf16").key()


@pytest.mark.parametrize(
    ("key", "changes", "words"),
    [
        (GOOD, {}, None),
        ("nonsense", {}, "is no problem key"),
        (GOOD.replace("int8", "int5"), {}, "'int5' is not known"),
        (GOOD.replace("m2 ", "m9 "), {}, "no call has this key"),
        (GOOD.replace("n24 ", "n0 "), {}, "no call has this key"),
        (GOOD.replace("n24 ", "n999999999 ").replace("k40", "k999999999"), {}, "too large to be checked"),
        (GOOD, {"kernel": "gone"}, "there is no kernel 'gone'"),
        (GOOD, {"kernel_version": 99}, "it is for version 99 of fallback"),
        (GOOD, {"config": {"widen": 7}}, "fallback has no config {'widen': 7}"),
        (GOOD, {"kernel": "torch_dense", "config": {}}, "torch_dense cannot: the weight is int8"),
    ],
)
def test_verify_says_what_is_wrong_with_a_row(key: str, changes: dict[str, object], words: str | None) -> None:
    row = Row(**{"kernel": "fallback", "kernel_version": 1, "config": {"widen": True}, **changes})  # type: ignore[arg-type]
    reason = tuner.verify(key, row, here("cpu"))
    assert reason is None if words is None else words in str(reason)


def test_verify_runs_the_row(install: Install) -> None:
    install(Fake("wrong", 1.0, {"a": 0.0}, result=torch.zeros_like))
    reason = tuner.verify(KEY, Row(kernel="wrong", kernel_version=1, config={"c": "a"}), here("cpu"))
    assert reason is not None
    assert reason.startswith("its error is")
    assert tuner.verify(KEY, Row(kernel="wrong", kernel_version=1, config={"c": "a"}), None) is None


def test_two_processes_that_tune_at_once_both_keep_their_rows(python: Callable[..., str]) -> None:
    code = (
        "import sys, torch, vecmat; torch.set_num_threads(1); w = torch.ones(24, 40)\n"
        "with vecmat.tuning(60):\n"
        "    for m in map(int, sys.argv[1].split(',')): vecmat.matmul(torch.ones(m, 40), w)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, ms], env=os.environ) for ms in ("1,2,3", "3,4,5")]
    assert [process.wait(timeout=100) for process in running] == [0, 0]
    assert {key.split()[0] for key in rows()} == {f"m{m}" for m in range(1, 6)}


def test_a_lock_of_this_process_is_not_waited_for_twice() -> None:
    device = here("cpu")
    with tuner.alone(device, 1.0) as first, tuner.alone(device, 0.1) as second:
        assert (first, second) == (True, False)
    with tuner.alone(device, 1.0) as again, tuner.alone(device, 0.0) as nothing:
        assert (again, nothing) == (True, False)
    with filelock.FileLock(f"{tables.path(device.name)}.tuning.lock", timeout=0):
        pass
