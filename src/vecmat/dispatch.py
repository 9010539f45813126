"""Choosing: every kernel's answer about a problem, one ladder of decision, and the plan that comes of it."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import table, tuner
from .device import Device
from .errors import NoKernelError, TableMissError, VecmatWarning
from .kernels import registry
from .kernels.base import Config, Kernel, Run
from .problem import Problem
from .ready import Ready, maker
from .settings import scope, settings
from .weights import Weight

FALLBACK = "fallback"
_DEMOTED: dict[tuple[str, str, str], str] = {}  # (kernel, problem key, device name): why its first launch failed


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One kernel's answer. reason: why it cannot run, None if it can; then config and estimate_us are set."""

    kernel: str
    reason: str | None = None
    config: Config = dataclasses.field(default_factory=dict)
    estimate_us: float = float("inf")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What will run. decided_by: which rung of the ladder, in words. row: the table's row that decided, if one did.

    run: (x, operand, bias) -> y. operand: what ``run`` takes of a Weight (a dense tensor is its own operand).
    ready: (operand, epoch) -> a Call that does the same for x of the problem's very M; None where there is none.
    """

    problem: Problem
    device: Device
    kernel: Kernel
    config: Config
    decided_by: str
    operand: Callable[[Weight], Any]
    run: Run
    ready: Ready | None = None
    row: table.Row | None = None

    @property
    def reduction(self) -> str:
        """The order in which K is summed; see ``Kernel.reduction``."""
        return self.kernel.reduction(self.problem, self.config)


def candidates(problem: Problem, device: Device) -> list[Candidate]:
    """Every kernel's answer: those that can run first, by estimate, then the others with their reasons."""
    kernels, missing = registry()
    answers = [Candidate(kernel=name, reason=reason) for name, reason in missing.items()]
    for name, kernel in kernels.items():
        reason = _DEMOTED.get((name, problem.key(), device.name)) or kernel.rejects(problem, device)
        if reason is not None:
            answers.append(Candidate(kernel=name, reason=reason))
            continue
        config = kernel.default_config(problem, device)
        estimate = kernel.estimate_us(problem, device, config)
        answers.append(Candidate(kernel=name, config=config, estimate_us=estimate))
    return sorted(answers, key=lambda c: (c.reason is not None, c.estimate_us, c.kernel))


def choose(problem: Problem, device: Device, *, kernel: str | None = None, may_tune: bool = False) -> Plan:
    """The Plan for a problem: the caller's kernel, else overlay, user's table, shipped table, lowest estimate.

    may_tune: whether a problem that no table has may be tuned now, if the settings ask for it.

    Raises ``ValueError`` if the named kernel does not exist or cannot run the problem (with its reason), and
    ``NoKernelError`` under ``settings(strict=True)`` if only the fallback is left.
    """
    answers = candidates(problem, device)
    if kernel is not None:
        found = next((c for c in answers if c.kernel == kernel), None)
        if found is None:
            known = ", ".join(sorted(c.kernel for c in answers))
            raise ValueError(f"kernel {kernel!r} is not known; known are {known}")
        if found.reason is not None:
            raise ValueError(f"kernel {kernel!r} cannot run {problem.key()} on {device.name}: {found.reason}")
        return _plan(problem, device, found, "asked for by name")
    able = [c for c in answers if c.reason is None]
    if settings.current().strict and all(c.kernel == FALLBACK for c in able):
        reasons = "\n".join(f"  {c.kernel}: {c.reason}" for c in answers if c.reason is not None)
        raise NoKernelError(f"only the fallback can run {problem.key()} on {device.name}:\n{reasons}")
    for rung, rows in table.ladder(device.name):
        row = rows.find(device.name, problem.key())
        chosen = row and _from_row(row, problem, device, able)
        if row and chosen:
            stale = ", measured with other versions" if rows.stale else ""
            return _plan(problem, device, chosen, f"{rung}{stale}: {rows.source}", row)
    if may_tune and settings.current().tune == "on_miss" and _tunable(problem, device):
        tuned = tuner.tune_into_table(problem, device, deadline=settings.current().deadline)
        chosen = tuned and _from_row(tuned, problem, device, able)
        if chosen:
            return _plan(problem, device, chosen, "tuned just now", tuned)
    if settings.current().on_miss == "error":
        raise TableMissError(f"no table has {problem.key()} on {device.name}{_nearest(problem, device)}")
    return _plan(problem, device, able[0], "lowest estimate")


def _tunable(problem: Problem, device: Device) -> bool:
    """Whether a problem may be timed now: not one that wants gradients, and not while a CUDA graph is captured."""
    return not problem.grad and not (device.is_gpu and torch.cuda.is_current_stream_capturing())


def _nearest(problem: Problem, device: Device) -> str:
    """The rows most like a problem's, and in which words they differ, for a message."""
    words = problem.key().split()
    told = []
    for rung, rows in table.ladder(device.name):
        for key in rows.rows:
            differ = [(have, want) for have, want in zip(key.split(), words, strict=False) if have != want]
            told.append((len(differ), rung, key, ", ".join(f"{have} for {want}" for have, want in differ)))
    lines = [f"  {key} ({rung}): has {differ or 'more words'}" for _, rung, key, differ in sorted(told)[:3]]
    return "; the nearest rows:\n" + "\n".join(lines) if lines else "; the tables are empty"


def _from_row(row: table.Row, problem: Problem, device: Device, able: list[Candidate]) -> Candidate | None:
    """The candidate that a table's row names, None if it cannot run or the row is another kernel version's."""
    found = next((c for c in able if c.kernel == row.kernel), None)
    kernel = registry()[0].get(row.kernel)
    if found is None or kernel is None or kernel.version != row.kernel_version:
        return None
    known = [dict(config) for config in kernel.configs(problem, device)]
    return dataclasses.replace(found, config=row.config) if dict(row.config) in known else None


def _plan(
    problem: Problem, device: Device, candidate: Candidate, decided_by: str, row: table.Row | None = None
) -> Plan:
    kernel = registry()[0][candidate.kernel]
    plain = problem.weight.dense and kernel.packing is None
    return Plan(
        problem=problem,
        device=device,
        kernel=kernel,
        config=candidate.config,
        decided_by=decided_by,
        operand=operator.attrgetter("data") if plain else kernel.operand,
        run=kernel.bind(problem, device, candidate.config),
        ready=maker(kernel.direct(problem, device, candidate.config), problem, device.units),
        row=row,
    )


def first_run(plan: Plan, key: Any, x: Tensor, weight: Any, bias: Tensor | None, named: bool) -> Tensor:
    """The result of a plan's first call; the plan is memoised under ``key`` when it worked.

    A kernel that does not compile here or cannot get its resources is demoted for this problem, with one warning
    that names the next one. One that the caller named is not replaced: its error is raised.
    """
    while True:
        operand = plan.operand(weight) if isinstance(weight, Weight) else weight
        try:
            y = plan.run(x, operand, bias)
        except plan.kernel.launch_errors as error:
            if named:
                raise
            why = f"its first launch failed: {': '.join([type(error).__name__, *str(error).splitlines()[:1]])}"
            _DEMOTED[plan.kernel.name, plan.problem.key(), plan.device.name] = why
            failed, plan = plan, choose(plan.problem, plan.device)
            warnings.warn(
                f"kernel {failed.kernel.name} is set aside for {plan.problem.key()} on {plan.device.name}, {why}; "
                f"{plan.kernel.name} takes its place",
                VecmatWarning,
                stacklevel=4,  # matmul's caller
            )
            continue
        remember(key, plan)
        return y


def remember(key: Any, plan: Plan) -> None:
    """Memoise a plan in the settings in force."""
    memo = scope().plans
    if len(memo) >= 1 << 14:  # a server that meets ever new M: start over rather than grow without end
        memo.clear()
    memo[key] = plan
