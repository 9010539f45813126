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
_SAMPLE_US = {"gpu": 300.0, "cpu": 2000.0}


def copies_needed(device: Device, weight_bytes: int) -> int:
    """How many copies of a weight to rotate so that none is still in the device's last cache when it is read again."""
    return max(2, min(_MOST_COPIES, -(-_CACHES * device.l2_bytes // max(weight_bytes, 1))))


class Sampler:
    """Times one contender: ``once()`` is a sample, in microseconds a call, over calls that rotate the weight.

    calls: one per copy of the weight. On a GPU they are captured into one CUDA graph, so that neither Python nor the
    launch is inside the time; on a CPU they are called in turn, Python included. Each is called once first, which
    compiles and packs. Raises whatever a call raises.
    """

    def __init__(self, device: Device, calls: Sequence[Call]) -> None:
        self.calls = calls
        for call in calls:
            call()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._count = len(calls)
        if device.is_gpu:
            self._capture(device)
        else:
            start = time.perf_counter()
            for call in calls:
                call()
            per_round = (time.perf_counter() - start) * 1e6
            self._count = len(calls) * max(1, round(_SAMPLE_US["cpu"] / max(per_round, 1.0)))

    def _capture(self, device: Device) -> None:
        with torch.cuda.device(device.index):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for call in self.calls:
                call()
            torch.cuda.synchronize()
            per_round = (time.perf_counter() - start) * 1e6
            rounds = max(1, min(-(-20 // len(self.calls)), round(4 * _SAMPLE_US["gpu"] / max(per_round, 1.0)) or 1))
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(rounds):
                    for call in self.calls:
                        call()
            graph.replay()
            torch.cuda.synchronize()
        self._graph, self._count = graph, rounds * len(self.calls)

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
        for index in range(self._count):
            self.calls[index % len(self.calls)]()
        return (time.perf_counter() - begin) / self._count * 1e6


def medians(samplers: Sequence[Sampler], rounds: int) -> list[float]:
    """Each contender's median over interleaved rounds, so that a slow moment of the machine falls on all of them."""
    samples: list[list[float]] = [[] for _ in samplers]
    for _ in range(rounds):
        for sampler, own in zip(samplers, samples, strict=True):
            own.append(sampler.once())
    return [statistics.median(own) for own in samples]


@dataclasses.dataclass(frozen=True, slots=True)
class Roof:
    """What the device gave in this run: GB/s of a read-only stream."""

    read_gbs: float


def read_probe(device: Device) -> tuple[Sampler, int]:
    """A sampler of a read-only stream (the sum of a large tensor), and the bytes it reads a call."""
    size = (2 << 30) if device.is_gpu else min(max(8 * device.l2_bytes, 128 << 20), 512 << 20)
    stream = torch.rand(size // 4, device=device.place)
    return Sampler(device, [lambda: torch.sum(stream)]), stream.nbytes


def measure_roof(device: Device, rounds: int = 7) -> Roof:
    """The device's read bandwidth now."""
    sampler, nbytes = read_probe(device)
    return Roof(nbytes / medians([sampler], rounds)[0] * 1e-3)
