"""Tuning: which kernel and config is fastest for one Problem, found by checking and timing, and bounded in time.

Every candidate is compared with a float64 oracle before it is timed, so a wrong config is never recorded, whatever its
speed; torch's own path is a candidate of every search; the finalists are timed again side by side; and the choice that
would be made without tuning is only replaced by one that beats it by more than 3 %.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import filelock
import torch
from torch import Tensor
from torch.nn import functional as F

from . import table
from .bench import Sampler, copies_needed, medians
from .device import Device
from .kernels import registry
from .kernels.base import Config, Kernel
from .problem import DTYPES, Problem
from .ready import as_called, maker
from .settings import settings
from .table import Row
from .weights import Weight, quantize, quantize_rows

MARGIN = 0.03  # a tuned choice must beat the untuned one by this share, or noise would decide
_PRUNE = 3.0  # candidates estimated this many times slower than the best are not tried, torch's own path excepted
_LOSER = 1.5  # one sample this many times slower than the best so far ends a candidate
_FIRST_SLICE = 16  # columns of the first slice of torch's own path: a number that each kernel of torch takes
_SLICE_US = 10_000.0  # a slice no slower than this ends nothing: on a busy machine any call may take some milliseconds
_FINALISTS = 3
_COLUMNS = 1024  # columns of y compared with the oracle, the first and last among them
_COMPILERS = 8
_LONGEST_WAIT_S = 60.0
_MOST_ELEMENTS = 4 << 30  # of x, the weight or y, when a row is verified: more cannot be a real layer


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One candidate's outcome: its time in microseconds, or why it has none.

    over_us: what a slice of its columns took, where that was too much to go on (torch's own path only).
    """

    kernel: str
    config: Config
    us: float | None = None
    failure: str | None = None
    over_us: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What tuning one problem found. row: for the table. trials: every candidate tried, fastest first."""

    problem: Problem
    row: Row
    trials: Sequence[Trial]
    seconds: float


@dataclasses.dataclass(slots=True, eq=False)
class _Candidate:
    kernel: Kernel
    config: Config
    estimate_us: float
    is_torch: bool = False
    sampler: Sampler | None = None
    us: float = float("inf")
    failure: str | None = None
    over_us: float | None = None


def tune(problem: Problem, device: Device, *, deadline: float = float("inf"),
         on_trial: Callable[[Trial], None] | None = None) -> Tuned | None:  # fmt: skip
    """The fastest correct candidate for a problem on a device that is here; None if none is correct.

    deadline: a ``time.monotonic()`` value after which no further candidate is begun; what was timed by then counts.
    What would be chosen without tuning and torch's own path are tried however late it is.
    on_trial: called after each candidate.
    """
    # What the caller has switched on around matmul is not for the tuner's own products.
    with torch.no_grad(), torch.autocast(device.place.type, enabled=False):
        return _tune(problem, device, deadline, on_trial)


def _tune(problem: Problem, device: Device, deadline: float, on_trial: Callable[[Trial], None] | None) -> Tuned | None:
    began = time.monotonic()
    candidates, hopeless = _candidates(problem, device)
    default = candidates[0]
    inputs = _Inputs(problem, device)
    _compile(candidates, inputs)
    best = float("inf")
    for index, candidate in enumerate(candidates + hopeless):
        late = time.monotonic() > deadline and not candidate.is_torch
        if best < float("inf") and (late or index >= len(candidates)):
            continue
        _try(candidate, inputs, best)
        best = min(best, candidate.us)
        if on_trial is not None:
            on_trial(_trial(candidate))
    candidates += hopeless
    timed = sorted((c for c in candidates if c.sampler is not None), key=lambda c: c.us)
    if not timed:
        return None
    finalists = timed[:_FINALISTS]
    torch_path = next((c for c in timed if c.is_torch), None)
    finalists += [c for c in (default, torch_path) if c is not None and c.sampler and c not in finalists]
    for candidate, us in zip(finalists, medians([c.sampler for c in finalists if c.sampler], 7), strict=True):
        candidate.us = us
    winner = min(finalists, key=lambda c: c.us)
    if default.sampler is not None and winner.us > default.us * (1 - MARGIN):
        winner = default
    if winner.is_torch:
        torch_path = winner
    tried = [c for c in candidates if c.sampler or c.failure or c.over_us]
    over = [c.over_us for c in tried if c.over_us is not None and torch_path is None]
    row = Row(
        kernel=winner.kernel.name,
        kernel_version=winner.kernel.version,
        config=dict(winner.config),
        us=round(winner.us, 2),
        torch_us=round(torch_path.us, 2) if torch_path is not None else None,
        torch_over_us=round(min(over), 2) if over else None,
        tried=len(tried),
        failed=sum(c.failure is not None for c in tried),
    )
    trials = sorted((_trial(c) for c in tried), key=lambda t: t.us if t.us is not None else float("inf"))
    return Tuned(problem=problem, row=row, trials=trials, seconds=time.monotonic() - began)


def tune_into_table(problem: Problem, device: Device, *, deadline: float = float("inf")) -> Row | None:
    """The Row of a problem, tuned by this process or, meanwhile, by another; it is in the user's table if that works.

    One process of a machine tunes a device at a time, so that they do not disturb each other and none tunes what
    another just did; the others wait until the deadline (a minute if there is none) and then get None. Where the
    table's folder cannot be written the row is kept for this process.
    """
    with alone(device, max(deadline - time.monotonic(), 0.0)) as free:
        if not free:
            return None
        file = table.path(device.name)
        known = table.load(file, device.name, quiet=True)  # another process may have added the row
        row = known.find(device.name, problem.key()) if known is not None else None
        if row is not None and not _is_of_another_kernel(row):
            table.user_table.cache_clear()
            return row
        tuned = tune(problem, device, deadline=deadline)
        if tuned is None:
            return None
        if not table.save(device.name, {problem.key(): tuned.row}):
            table.remember(device.name, {problem.key(): tuned.row})
        return tuned.row


def _is_of_another_kernel(row: Row) -> bool:
    """Whether a row names a kernel, or a version of it, that is not here: it decides nothing."""
    kernel = registry()[0].get(row.kernel)
    return kernel is None or kernel.version != row.kernel_version


@contextlib.contextmanager
def alone(device: Device, wait_s: float) -> Iterator[bool]:
    """Context in which no other process of this machine tunes the device; yields False if one still does.

    Waits for ``wait_s``, a minute at most. A folder that cannot be written has no lock and needs none.
    """
    wait = min(wait_s, _LONGEST_WAIT_S)
    file = table.path(device.name)
    lock: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    free = wait > 0
    try:
        if free:
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(f"{file}.tuning.lock").acquire(timeout=wait)
    except filelock.Timeout:
        free = False
    except (OSError, NotImplementedError):  # the latter: an old filelock on a file system without locks
        pass
    with lock:
        yield free


def verify(key: str, row: Row, device: Device | None) -> str | None:
    """What is wrong with a table's row, None if nothing is.

    The problem must parse, the kernel exist in the row's version and have its config; with a device, which must be
    here, the kernel must also take the problem there and its result stand the check against the oracle.
    """
    try:
        problem = Problem.parse(key)
    except ValueError as error:
        return str(error)
    if problem.key() != key or 0 in (problem.m, problem.n, problem.k):
        return f"no call has this key; M={problem.m} is looked up as in {problem.key()!r}"
    kernel = registry()[0].get(row.kernel)
    if kernel is None:
        return f"there is no kernel {row.kernel!r} here"
    if kernel.version != row.kernel_version:
        return f"it is for version {row.kernel_version} of {row.kernel}, which is at {kernel.version}"
    if device is None:
        return None
    if max(problem.m * problem.k, problem.n * problem.k, problem.m * problem.n) > _MOST_ELEMENTS:
        return f"it has more than {_MOST_ELEMENTS >> 30} Gi elements and is too large to be checked"
    reason = kernel.rejects(problem, device)
    if reason is not None:
        return f"{row.kernel} cannot: {reason}"
    if dict(row.config) not in map(dict, kernel.configs(problem, device)):
        return f"{row.kernel} has no config {dict(row.config)}"
    candidate = _Candidate(kernel, row.config, 0.0)
    inputs = _Inputs(problem, device, copies=1)
    failure = _failure_of(
        candidate, lambda: setattr(candidate, "failure", inputs.wrong(_calls(candidate, inputs)[0]()))
    )
    return failure or candidate.failure


@contextlib.contextmanager
def tuning(budget_s: float = 60.0) -> Iterator[None]:
    """Context in which every problem that ``matmul`` meets and no table has is tuned, for ``budget_s`` seconds in all.

    >>> with vecmat.tuning(budget_s=30):
    ...     model.generate(**inputs, max_new_tokens=4)

    What was found is in the user's table, and used, from then on; what the budget did not reach is chosen by estimate.
    """
    if not budget_s > 0:
        raise ValueError(f"tuning: budget_s is {budget_s!r}; expected more than 0 seconds")
    with settings(tune="on_miss", deadline=time.monotonic() + budget_s):
        yield


def _trial(candidate: _Candidate) -> Trial:
    us = candidate.us if candidate.us < float("inf") else None
    return Trial(
        kernel=candidate.kernel.name,
        config=candidate.config,
        us=us,
        failure=candidate.failure,
        over_us=candidate.over_us,
    )


def _candidates(problem: Problem, device: Device) -> tuple[list[_Candidate], list[_Candidate]]:
    """Every kernel's configs worth trying, by estimate, and those to try only if none of these works.

    The first is what would be chosen without tuning. torch's own path is among them: its kernels for the weight's
    format or, where it has none, the fallback, which goes through torch too.
    """
    able = [kernel for kernel in registry()[0].values() if kernel.rejects(problem, device) is None]
    torchs = [kernel for kernel in able if kernel.name.startswith("torch_")]
    torchs = torchs or [kernel for kernel in able if kernel.name == "fallback"]
    found: list[_Candidate] = []
    untuned: list[_Candidate] = []
    for kernel in able:
        default = dict(kernel.default_config(problem, device))
        configs = [default, *(c for c in map(dict, kernel.configs(problem, device)) if c != default)]
        own = [_Candidate(kernel, c, kernel.estimate_us(problem, device, c), kernel in torchs) for c in configs]
        untuned.append(own[0])
        found += own
    first = min(untuned, key=lambda c: (c.estimate_us, c.kernel.name))  # as dispatch chooses
    found.sort(key=lambda c: (c is not first, c.estimate_us, c not in untuned))
    best = min(c.estimate_us for c in found)
    near = [c for c in found if c is first or c.is_torch or c.estimate_us <= best * _PRUNE]
    return near, [c for c in found if c not in near]


class _Inputs:
    """Random x, copies of a random weight, and the oracle of some columns."""

    def __init__(self, problem: Problem, device: Device, copies: int | None = None) -> None:
        place = device.place
        generator = torch.Generator(device=place).manual_seed(problem.m * 31 + problem.n * 7 + problem.k)
        self.problem, self.device = problem, device
        dtype = DTYPES[problem.x]
        self.x = torch.randn(problem.m, problem.k, device=place, generator=generator, dtype=torch.float32).to(dtype)
        shape = (problem.n, problem.k) if problem.layout == "nk" else (problem.k, problem.n)
        dense = torch.randn(shape, device=place, generator=generator, dtype=torch.float32) / max(problem.k, 1) ** 0.5
        self.bias = torch.randn(problem.n, device=place, generator=generator).to(dtype) if problem.bias else None
        first = quantize(dense, str(problem.weight), layout=problem.layout)
        del dense
        count = copies or copies_needed(device, problem.weight_bytes)
        self.weights = [first, *(first.copy() for _ in range(count - 1))]
        self._oracle(first, generator)

    def narrow(self, columns: int) -> _Inputs:
        """The first columns of the same problem: x, and views of one copy of the weight and of the bias."""
        part = copy.copy(self)
        part.problem = dataclasses.replace(self.problem, n=columns)
        whole = self.weights[0]
        data = whole.data[:, :columns] if whole.format.dense and whole.layout == "kn" else whole.data[:columns]
        scale, zero = (None if t is None else t[:columns] for t in (whole.scale, whole.zero))
        part.weights = [Weight(whole.format, data, scale, zero, k=whole.k, layout=whole.layout)]
        part.bias = None if self.bias is None else self.bias[:columns]
        return part

    def _oracle(self, weight: Weight, generator: torch.Generator) -> None:
        """float64 results of some columns, and the largest and RMS error of torch's own product of them."""
        problem = self.problem
        n = problem.n
        edge = min(n, _COLUMNS // 4)
        middle = torch.randint(n, (_COLUMNS // 2,), device=self.x.device, generator=generator)
        ends = torch.arange(n, device=self.x.device)
        self.columns: Tensor = torch.unique(torch.cat((ends[:edge], middle, ends[n - edge :])))
        dense = weight.dequantize(torch.float32)
        rows = (dense.t() if problem.layout == "kn" else dense)[self.columns]
        x = self.x.double()
        if problem.compute:
            q, scale = quantize_rows(self.x, problem.compute)
            x = q.double() * scale.double()
        bias = None if self.bias is None else self.bias[self.columns]
        self.oracle = F.linear(x, rows.double(), None if bias is None else bias.double())
        own = F.linear(self.x, rows.to(self.x.dtype), bias).to(DTYPES[problem.out])
        self.torch_error = self._error(own) if not problem.compute else (0.0, 0.0)

    def _error(self, y: Tensor) -> tuple[float, float]:
        difference = (y.double() - self.oracle).abs()
        return difference.max().item(), difference.square().mean().sqrt().item()

    def wrong(self, y: Tensor) -> str | None:
        """What is wrong with a result, None if its error is at most twice torch's own (and a rounding of it)."""
        if tuple(y.shape) != (self.problem.m, self.problem.n):
            return f"its result has shape {tuple(y.shape)}"
        worst, rms = self._error(y[:, self.columns])
        ulp = self.oracle.abs().max().item() * torch.finfo(y.dtype).eps
        # not (a <= b), so that NaN is wrong too
        if not (worst <= 2 * self.torch_error[0] + ulp and rms <= 2 * self.torch_error[1] + ulp / 2):
            return f"its error is {worst:.2g} (RMS {rms:.2g}); torch's own is {self.torch_error[0]:.2g}"
        return None


def _compile(candidates: Iterable[_Candidate], inputs: _Inputs) -> None:
    """Call each candidate that compiles once, several at a time; a failure is kept with it."""
    slow = [c for c in candidates if c.kernel.launch_errors]

    def first_call(candidate: _Candidate) -> None:
        candidate.failure = _failure_of(candidate, lambda: _calls(candidate, inputs)[0]())

    if len(slow) > 1 and inputs.device.is_gpu:
        with ThreadPoolExecutor(_COMPILERS) as pool:
            list(pool.map(first_call, slow))


def _failure_of(candidate: _Candidate, act: Callable[[], Any]) -> str | None:
    """None, or what a launch of the candidate raised that its kernel declares; anything else propagates."""
    try:
        act()
    except candidate.kernel.launch_errors as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _calls(candidate: _Candidate, inputs: _Inputs) -> list[Callable[[], Tensor]]:
    kernel, about = candidate.kernel, (inputs.problem, inputs.device, candidate.config)
    run, make = kernel.bind(*about), maker(kernel.direct(*about), inputs.problem, inputs.device.units)
    operands = [kernel.operand(weight) for weight in inputs.weights]
    compute = inputs.problem.compute or None
    return [
        as_called(make, run, inputs.x, weight, operand, inputs.bias, compute)
        for weight, operand in zip(inputs.weights, operands, strict=True)
    ]


def _try(candidate: _Candidate, inputs: _Inputs, best: float) -> None:
    """Check a candidate against the oracle, then time it; sets its sampler and us, its failure or its over_us.

    Where something else works, torch's own path is first tried by slices.
    """
    if candidate.failure is not None:
        return

    def measure() -> None:
        if candidate.is_torch and best < float("inf"):
            candidate.over_us = _slow_slice(candidate, inputs, max(_LOSER * best, _SLICE_US))
            if candidate.over_us is not None:
                return
        calls = _calls(candidate, inputs)
        candidate.failure = inputs.wrong(calls[0]())
        if candidate.failure is None:
            sampler = Sampler(inputs.device, calls)
            us = sampler.once()
            if us <= _LOSER * best:
                us = medians([sampler], 3)[0]
            candidate.us, candidate.sampler = us, sampler

    failure = _failure_of(candidate, measure)
    candidate.failure = failure or candidate.failure


def _slow_slice(candidate: _Candidate, inputs: _Inputs, limit_us: float) -> float | None:
    """Microseconds of the first slice of the problem's columns that alone takes longer than the limit; None if none is.

    Each slice has twice the columns of the one before, so that nothing much longer than the limit is begun, however
    long the whole may take: on some CPUs torch walks down a 16-bit weight (K, N) one number at a time.
    """
    columns = _FIRST_SLICE
    while columns < inputs.problem.n:
        call = _calls(candidate, inputs.narrow(columns))[0]
        us = float("inf")
        for _ in range(3):  # the first call may have something to set up, and any may meet a slow moment
            begin = time.perf_counter()
            call()
            if inputs.device.is_gpu:
                torch.cuda.synchronize(inputs.device.place)
            us = min(us, (time.perf_counter() - begin) * 1e6)
            if us <= limit_us:
                break
        else:
            return us
        columns *= 2
    return None
