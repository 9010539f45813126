"""Timing: cold weights by rotation, CUDA graphs on a GPU, medians of interleaved rounds, and the roof beside them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .device import Device

Call = Callable[[], object]

# Copies of a weight are rotated until they exceed the last cache this many times over, so each call reads memory.
_CACHES = 6
_MOST_COPIES = 64
_SAMPLE_US = 2000.0  # a sample's length, and the most calls in one
_MOST_CALLS = 2000
_GRAPH_CALLS = 20
_ENOUGH_S = 2.0


def copies_needed(device: Device, weight_bytes: int) -> int:
    """How many copies of a weight to rotate so that none is still in the device's last cache when it is read again."""
    return max(2, min(_MOST_COPIES, -(-_CACHES * device.l2_bytes // max(weight_bytes, 1))))


class Sampler:
    """Times one contender: ``once()`` is a sample, in microseconds a call, over calls that rotate the weight.

    calls: one per copy of the weight, compiled and packed by a first call made here. On a GPU they are captured into
    one CUDA graph, so that neither Python nor the launch is inside the time; on a CPU they are called in turn, Python
    included. Raises whatever a call raises.
    """

    def __init__(self, device: Device, calls: Sequence[Call]) -> None:
        self.calls = calls
        self._graph: torch.cuda.CUDAGraph | None = None
        self._next = 0
        calls[0]()
        self._synchronize: Call = torch.cuda.synchronize if device.is_gpu else lambda: None
        self._synchronize()
        rounds = min(3, len(calls))
        begin = time.perf_counter()
        for call in calls[:rounds]:
            call()
        self._synchronize()
        us = max((time.perf_counter() - begin) * 1e6 / rounds, 0.1)
        self._count = max(1, min(round(_SAMPLE_US / us), _MOST_CALLS))
        if device.is_gpu:
            # whole turns, so that every copy is read equally often and last read a turn ago
            self._count = len(calls) * max(1, min(-(-_GRAPH_CALLS // len(calls)), -(-self._count // len(calls))))
            with torch.cuda.device(device.place):
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._call_all()
                self._graph.replay()
                torch.cuda.synchronize()

    def _call_all(self) -> None:
        for index in range(self._next, self._next + self._count):
            self.calls[index % len(self.calls)]()
        self._next = (self._next + self._count) % len(self.calls)

    def once(self) -> float:
        """Microseconds a call, of one sample."""
        if self._graph is not None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()  # type: ignore[no-untyped-call]
            self._graph.replay()
            end.record()  # type: ignore[no-untyped-call]
            end.synchronize()  # type: ignore[no-untyped-call]
            return float(start.elapsed_time(end)) * 1e3 / self._count  # type: ignore[no-untyped-call]
        begin = time.perf_counter()
        self._call_all()
        return (time.perf_counter() - begin) / self._count * 1e6


def medians(samplers: Sequence[Sampler], rounds: int) -> list[float]:
    """Each contender's median over interleaved rounds, so that a slow moment of the machine falls on all of them.

    After three rounds it ends early once they have taken ``_ENOUGH_S``.
    """
    samples: list[list[float]] = [[] for _ in samplers]
    begin = time.perf_counter()
    while len(samples[0]) < rounds:
        for sampler, own in zip(samplers, samples, strict=True):
            own.append(sampler.once())
        if len(samples[0]) >= 3 and time.perf_counter() - begin > _ENOUGH_S:
            break
    return [statistics.median(own) for own in samples]


@dataclasses.dataclass(frozen=True, slots=True)
class Roof:
    """What the device gave in this run: GB/s of a read-only stream."""

    read_gbs: float


def read_probe(device: Device) -> tuple[Sampler, int]:
    """A sampler of a read-only stream (the sum of a large tensor), and the bytes it reads a call."""
    size = (2 << 30) if device.is_gpu else min(max(8 * device.l2_bytes, 128 << 20), 512 << 20)
    generator = torch.Generator(device.place).manual_seed(0)  # the caller's random numbers stay as they are
    stream = torch.rand(size // 4, device=device.place, generator=generator, dtype=torch.float32)
    return Sampler(device, [lambda: torch.sum(stream)]), stream.nbytes


def measure_roof(device: Device, rounds: int = 7) -> Roof:
    """The device's read bandwidth now."""
    sampler, nbytes = read_probe(device)
    return Roof(nbytes / medians([sampler], rounds)[0] * 1e-3)
