"""What the choice without a table costs: ``python benchmarks/untuned.py --workload llama-3-8b --weights bf16,int8``.

Each problem is tuned in this process, and what would have been chosen without tuning is timed beside the best. Nothing
is written to a table. --layout kn: dense weights as (K, N).
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch

from vecmat.device import Device
from vecmat.measure import geometric_mean
from vecmat.tuner import Trial, tune
from vecmat.workloads import named, problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", default="llama-3-8b")
    parser.add_argument("--weights", default="bf16,int8,int4:g128")
    parser.add_argument("--m", help="rows of x (default: the workload's)")
    parser.add_argument("--layout", choices=("nk", "kn"), default="nk")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds in all")
    args = parser.parse_args()
    device = Device.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    workload = named(args.workload)
    ms = [int(m) for m in args.m.split(",")] if args.m else workload.m
    deadline = time.monotonic() + args.budget
    print(f"{device.name}, torch {torch.__version__}; us\n{'':40} untuned    best   torch")
    shares: dict[str, list[float]] = {}
    for fmt in args.weights.split(","):
        for nk in problems(workload.shapes, ms, fmt):
            problem = dataclasses.replace(nk, layout=args.layout)
            tried: list[Trial] = []
            found = (
                tune(problem, device, deadline=deadline, on_trial=tried.append) if time.monotonic() < deadline else None
            )
            if found is None:
                print(f"{problem.key():40} not tuned")
                continue
            first = next(t for t in found.trials if (t.kernel, t.config) == (tried[0].kernel, tried[0].config))
            untuned = first.us or float("nan")  # it failed
            best = min(trial.us for trial in found.trials if trial.us is not None)
            shares.setdefault(f"{fmt}, M={problem.m}", []).append(best / untuned)
            print(f"{problem.key():40} {untuned:7.1f} {best:7.1f} {found.row.torch_us or float('nan'):7.1f}  "
                  f"{first.kernel} -> {found.row.kernel} {found.row.config}")  # fmt: skip
    print("\nthe best over the untuned, geometric mean (least)")
    for name, values in shares.items():
        print(f"{name:24} {geometric_mean(values):6.3f} ({min(values):.3f})")


if __name__ == "__main__":
    main()
