"""Tens of rows of x by a dense, int8, fp8 or int4 weight (N, K): Hopper's warpgroup MMA, the weight in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..device import Device
from ..problem import Problem
from ._gluon import PER_WORD, Cut, Fragments, kind_of, lane_words
from ._wgmma import warpgroups
from .base import Config


class TritonWgmma(Fragments):
    """9 to 128 rows, layout nk, compute capability 9.0: x through shared memory, m64nMk16 on the tensor cores."""

    version = 3
    function = warpgroups
    words = (0, 1)
    most_rows = 128

    def block_m(self, m: int) -> int:
        return max(16, 1 << (m - 1).bit_length())

    def step_words(self, config: Config) -> int:
        return 4 * int(config["LANE_WORDS"]) * int(config["UNROLL"]) * int(config["SUBS"])

    def rejects(self, problem: Problem, device: Device) -> str | None:
        if device.kind == "cuda" and device.capability != 90:
            return f"warpgroup MMA is for compute capability 9.0; this is {device.arch}"
        if problem.m <= 8:
            return f"M={problem.m}; eight rows or fewer leave half of the instruction empty"
        group = problem.weight.group_size
        if group and group < 64:
            return f"groups of {group}; this kernel takes 64 values of a group at once"
        return super().rejects(problem, device)

    def cut(self, problem: Problem, config: Config) -> Cut:
        """Programs that take equal shares of all steps of all tiles, one after the other."""
        rows, teams, programs = int(config["ROWS"]), int(config["TEAMS"]), int(config["programs"])
        tiles, steps = -(-problem.n // (rows * teams)), self._steps(problem, config)
        alone = tiles % programs == 0  # each has whole tiles
        floats = 0 if alone else 2 * programs * rows * teams * self.block_m(problem.m)
        return Cut((programs, 1), floats, 0 if alone else tiles * teams)

    def _steps(self, problem: Problem, config: Config) -> int:
        return -(-problem.k // (self.step_words(config) * PER_WORD[kind_of(problem)]))

    def configs(self, problem: Problem, device: Device) -> Sequence[Config]:
        return [self.default_config(problem, device)]

    def default_config(self, problem: Problem, device: Device) -> Config:
        return self._config(problem, device, 2, 1)

    def shared(self, problem: Problem, config: Config) -> int:
        """Bytes of shared memory that a program takes."""
        rows, teams, kind = int(config["ROWS"]), int(config["TEAMS"]), kind_of(problem)
        block_m, words = self.block_m(problem.m), self.step_words(config)
        deep, group = words * PER_WORD[kind], problem.weight.group_size
        scales = teams * rows * max(1, deep // group) if group else teams * rows
        weight = int(config["W_STAGES"]) * 4 * (rows * words * teams + scales)
        return weight + int(config["X_STAGES"]) * 2 * block_m * deep + teams * 2 * rows * block_m + 1024

    def _config(self, problem: Problem, device: Device, teams: int, each: int, **given: int) -> Config:
        kind, m, group = kind_of(problem), self.block_m(problem.m), problem.weight.group_size
        lane, unroll, subs = lane_words(problem), 1, 2
        if kind == "dense":
            unroll = 2
        elif kind == "int4":
            subs = 128 // (16 * lane) if m <= 16 else 64 // (16 * lane)
        config = {"ROWS": 64, "TEAMS": teams, "LANE_WORDS": lane, "UNROLL": unroll, "SUBS": subs, "W_STAGES": 4,
                  "X_STAGES": 2, "BRINGERS": 2, "BRING_WARPS": 2, "REGS": 128, "BRING_REGS": 128}  # fmt: skip
        config.update({name: value for name, value in given.items() if name in config})
        groups = teams + config["BRINGERS"] * config["BRING_WARPS"] // 4
        regs = (65536 // (each * groups * 128)) // 8 * 8
        if "REGS" not in given:
            config["REGS"] = config["BRING_REGS"] = min(regs, 168 if each == 1 else 128)
            if config["BRINGERS"] * config["BRING_WARPS"] == 2 * 4: config["BRING_REGS"] = 96
        limit = (device.shared_bytes + 1024) // each - 1024
        x_stages = given.get("X_STAGES", 3)
        for stages in range(given.get("W_STAGES", 8), 2, -1):
            config["W_STAGES"], config["X_STAGES"] = stages, min(x_stages, stages - 1)
            if self.shared(problem, config) <= limit:
                break
        tiles = -(-problem.n // (64 * teams))
        steps = self._steps(problem, config)
        programs = given.get("programs", min(each * device.units, max(tiles, tiles * steps // 4)))
        config["programs"] = programs
        made = {**config, "num_warps": 4}
        if each > 1:
            made["maxnreg"] = min(regs, 128)
        return made

    def estimate_us(self, problem: Problem, device: Device, config: Config) -> float:
        """As measured on an H100: the bytes at 0.92 of the bandwidth or, for 132 multiprocessors, what a weight takes
        to be widened and multiplied by M rows (0.18, 0.25, 0.39 ps for 16, 32, 64), and a start."""
        bytes_us = problem.bytes_moved / (0.92 * device.read_gbs) * 1e-3
        values_us = problem.n * problem.k * (0.11 + 0.0043 * problem.m) * 1e-6 * 132 / device.units
        return 4.0 + 0.06 * problem.m + max(bytes_us, values_us)

    def reduction(self, problem: Problem, config: Config) -> str:
        step = f"{config['LANE_WORDS']} x {config['UNROLL']} words of {problem.weight}, {config['SUBS']} to a step"
        tiles = f"tiles of {int(config['ROWS']) * int(config['TEAMS'])}"
        return f"fp32, warpgroup MMAs of 16, {step}, {tiles} in {config['programs']} shares"
