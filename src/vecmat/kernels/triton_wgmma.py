"""Tens of rows of x by a dense, int8, fp8 or int4 weight (N, K): Hopper's warpgroup MMA, the weight in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton

from ..device import Device
from ..problem import Problem
from ._gluon import PER_WORD, Cut, Fragments, kind_of, lane_words
from ._wgmma import warpgroups
from .base import Config

_ROWS = 64  # of the weight, to a team: those of the instruction


class Form(NamedTuple):
    """A shape of programs: teams that multiply, values of K a step, groups of warps that bring and the warps of each,
    registers of a thread of either, and how many programs share a multiprocessor."""

    teams: int
    deep: int
    bringers: int
    warps: int
    regs: int
    bring_regs: int
    each: int


def _values_ps(m: int) -> float:
    """What a value of a weight takes 132 multiprocessors to be widened and multiplied by M rows, in picoseconds."""
    return 0.105 + 0.0034 * m  # int4, 8192 x 57344 on an H200: 0.166, 0.206, 0.32 at 16, 32, 64


class TritonWgmma(Fragments):
    """9 to 128 rows, layout nk, compute capability 9.0: x through shared memory, m64nMk16 on the tensor cores.

    More than 64 rows are multiplied in two launches.
    """

    version = 3
    function = warpgroups
    words = (0, 1)
    most_rows = 128

    def block_m(self, m: int) -> int:
        return min(64, max(16, 1 << (m - 1).bit_length()))

    def step_words(self, config: Config) -> int:
        return 4 * int(config["LANE_WORDS"]) * int(config["UNROLL"]) * int(config["SUBS"])

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if device.kind == "cuda" and device.capability != 90:
            return f"warpgroup MMA is for compute capability 9.0; this is {device.arch}"
        if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
            return f"its warps have different work, for which it needs Triton 3.6; this is {triton.__version__}"
        if problem.m <= 8:
            return f"M={problem.m}; eight rows or fewer leave half of the instruction empty"
        group = problem.weight.group_size
        if group and group < 64:
            return f"groups of {group}; this kernel takes 64 values of a group at once"
        if problem.weight.dense and problem.k % 128:
            return f"K={problem.k} is no multiple of 128, as this kernel wants of a dense weight's"
        return super().rejects(problem, device)

    def cut(self, problem: Problem, config: Config) -> Cut:
        """Programs that take equal shares of all steps of all tiles, one after the other."""
        teams, programs = int(config["TEAMS"]), int(config["programs"])
        tiles = -(-problem.n // (_ROWS * teams))
        if tiles % programs == 0:  # each has whole tiles
            return Cut((programs, 1), 0, 0)
        return Cut((programs, 1), 2 * programs * _ROWS * teams * self.block_m(problem.m), tiles * teams)

    def configs(self, problem: Problem, device: Device) -> Sequence[Config]:
        found: list[Config] = []
        for form in self._forms(problem):
            config = self._config(problem, device, form)
            if config is not None:
                found += [{**config, "programs": each} for each in self._programs(problem, device, form, config)[:3]]
        return found

    def default_config(self, problem: Problem, device: Device) -> Config:
        """The first form that fits, its work cut as estimated best."""
        return self.configs(problem, device)[0]

    def _forms(self, problem: Problem) -> list[Form]:
        """The forms that won somewhere on an H200 (docs/measured.md), the best guess first; the last fits always."""
        m, kind, grouped = self.block_m(problem.m), kind_of(problem), bool(problem.weight.group_size)
        many = grouped and (kind != "int4" or not problem.weight.symmetric)  # registers
        if m == 32 and many:
            return [Form(2, 128, 2, 2, 184, 144, 1)]
        if m <= 32:
            one = kind == "int4" and m == 32
            return [
                Form(2, 256, 1, 4, 168, 168, 1) if one else Form(2, 256, 2, 2, 168, 168, 1),
                Form(1, 128, 2, 2, 128, 128, 2),
                Form(2, 128, 2, 2, 168, 168, 1),
            ]
        if grouped:
            return [Form(2, 64, 2, 2, 200, 104, 1) if many else Form(2, 128, 2, 2, 168, 168, 1)]
        return [Form(2, 128, 2, 4, 160, 96, 1), Form(2, 128, 2, 2, 168, 168, 1), Form(1, 128, 2, 2, 128, 128, 2)]

    def _config(self, problem: Problem, device: Device, form: Form) -> dict[str, int] | None:
        """A form with as many stages as fit, None if too few do."""
        kind = kind_of(problem)
        lane, unroll = lane_words(problem), 2 if kind == "dense" else 1
        if kind == "int4" and self.block_m(problem.m) > 32:
            lane = min(lane, 2)  # shorter MMAs, fewer registers
        sub = 4 * lane * unroll * PER_WORD[kind]
        deep = max(sub, form.deep // 2 if kind == "dense" else form.deep)
        config = {"TEAMS": form.teams, "LANE_WORDS": lane, "UNROLL": unroll, "SUBS": deep // sub, "W_STAGES": 8,
                  "X_STAGES": 3, "BRINGERS": form.bringers, "BRING_WARPS": form.warps, "REGS": form.regs,
                  "BRING_REGS": form.bring_regs, "programs": 0, "num_warps": 4}  # fmt: skip
        if form.each > 1:
            config["maxnreg"] = form.regs
        limit = (device.shared_bytes + 1024) // form.each - 1024
        for stages in range(8, 2, -1):
            config.update(W_STAGES=stages, X_STAGES=min(3, stages - 1))
            if self._shared_bytes(problem, config) <= limit:
                return config
        return None

    def _shared_bytes(self, problem: Problem, config: Config) -> int:
        """Bytes of shared memory that a program takes, barriers and the last turning of y included."""
        teams, block_m, words = int(config["TEAMS"]), self.block_m(problem.m), self.step_words(config)
        deep, group = words * PER_WORD[kind_of(problem)], problem.weight.group_size
        scales = max(1, deep // group) if group else 1
        weight = int(config["W_STAGES"]) * teams * 4 * _ROWS * (words + scales)
        return weight + int(config["X_STAGES"]) * 2 * block_m * deep + teams * 2 * _ROWS * block_m + 1024

    def _programs(self, problem: Problem, device: Device, form: Form, config: Config) -> list[int]:
        """In how many programs to launch a form, the best guess first.

        Of equal parts of a tile, or as many as the device runs at once; guessed from what a step and the sum of the
        parts took on an H200.
        """
        tiles, most = -(-problem.n // (_ROWS * form.teams)), form.each * device.units
        steps = self._steps(problem, config)
        # Parts of equal steps, two or more of them: others are not worth their sums.
        parts = [each for each in (1, 2, 4, 8, 16) if steps % each == 0 and (each == 1 or 2 * each <= steps)]
        cuts = {tiles * each for each in parts if tiles * each <= most} | {min(most, tiles * steps)}
        return sorted(cuts, key=lambda programs: self._work_us(problem, {**config, "programs": programs}))

    def _steps(self, problem: Problem, config: Config) -> int:
        return -(-problem.k // (self.step_words(config) * PER_WORD[kind_of(problem)]))

    def _work_us(self, problem: Problem, config: Config) -> float:
        """What the longest program takes on an H200 if the bytes are there: its steps, and the sums of parts."""
        m, teams, programs = self.block_m(problem.m), int(config["TEAMS"]), int(config["programs"])
        tiles, steps = -(-problem.n // (_ROWS * teams)), self._steps(problem, config)
        values = _ROWS * teams * self.step_words(config) * PER_WORD[kind_of(problem)]
        step_us = values * _values_ps(m) * 132e-6 * (2 if "maxnreg" in config else 1)
        us = -(-tiles * steps // programs) * step_us
        if tiles % programs:
            parts, sum_us = -(-programs // tiles), 2.2 + 0.02 * m
            equal = programs % tiles == 0 and steps % parts == 0
            us += sum_us + 0.35 * (parts - 1) + (0 if equal else sum_us + 1.3)  # others have two sums
        return us

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        """As measured on an H200: the bytes at 0.9 of the bandwidth, or the work, and a start."""
        bytes_us = problem.bytes_moved / (0.9 * device.read_gbs) * 1e-3
        launch_us = 2.0 + max(bytes_us, self._work_us(problem, config) * 132 / device.units)
        return launch_us * -(-problem.m // self.block_m(problem.m))

    def reduction(self, problem: Problem, config: Config) -> str:
        step = f"{config['LANE_WORDS']} x {config['UNROLL']} words of {problem.weight}, {config['SUBS']} to a step"
        tiles = f"tiles of {_ROWS * int(config['TEAMS'])}"
        return f"fp32, warpgroup MMAs of 16, {step}, {tiles} in {config['programs']} shares"
