"""Problems drawn at random, on every kernel that takes them: ``--problems 10000`` for a long run (on a GPU, say)."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch import Tensor

import vecmat
from cases import DENSE, FORMATS, KERNELS, asked, computes, guarded, interpreted, numbers, poisoned, refusal, stored
from oracle import Truth
from vecmat.problem import DTYPES

SEEDS = 16  # so that several workers share a long run


def drawn(rng: random.Random) -> dict[str, object]:
    """A problem's sizes, dtypes, format, layout and the strides of x. Small sizes and round ones come up often."""
    x = rng.choice(DENSE)
    fmt = rng.choice((x, *(fmt for fmt in FORMATS if fmt not in DENSE)))
    m = rng.choice((rng.randint(1, 8), rng.randint(9, 64), rng.randint(65, 200)))
    n = rng.choice((rng.randint(1, 300), 16 * rng.randint(1, 64), 128 * rng.randint(1, 10)))
    k = rng.choice((rng.randint(1, 600), 8 * rng.randint(1, 150), 128 * rng.randint(1, 16)))
    return {
        "m": m, "n": n, "k": k, "x": x, "fmt": fmt, "layout": rng.choice(("nk", "kn")), "bias": rng.random() < 0.5,
        "compute": rng.choice(computes(fmt)), "view": rng.choice(("plain", "columns", "rows", "transposed", "batch")),
        "offset": rng.choice((0, 1, 3, 8)),
    }  # fmt: skip


def viewed(x: Tensor, view: str, offset: int) -> Tensor:
    """The same rows with other strides, or in another shape, poison around them."""
    m, k = x.shape
    if view == "columns":
        return guarded(torch.nn.functional.pad(x, (offset, 5), value=torch.nan))[:, offset : offset + k]
    if view == "rows":
        return guarded(torch.stack((x, torch.full_like(x, torch.nan)), 1).reshape(2 * m, k))[::2]
    if view == "transposed":
        return guarded(x.t().contiguous()).t()
    return guarded(x, offset).reshape(1, m, 1, k) if view == "batch" else guarded(x, offset)


@pytest.mark.parametrize("seed", range(SEEDS))
@torch.inference_mode()
def test_problems_drawn_at_random_are_right_on_every_kernel_that_takes_them(
    seed: int, device: str, request: pytest.FixtureRequest
) -> None:
    rng, ran, wrong = random.Random(seed), 0, []
    for place in range(-(-int(request.config.getoption("--problems")) // SEEDS)):
        case = drawn(rng)
        m, n, k, x_name, fmt = (case[name] for name in ("m", "n", "k", "x", "fmt"))
        as_weight = fmt != x_name or place % 2 == 0  # a dense weight comes as a tensor, too
        options = {"layout": "nk" if as_weight else case["layout"], "compute": case["compute"]}
        a, w, b = numbers("plain", m, n, k, x_name, f"{fmt} {seed} {place}")
        weight = stored(w, fmt, case["layout"], device, as_weight=as_weight)
        x = viewed(a.to(device, DTYPES[x_name]), case["view"], case["offset"])
        bias = guarded(b.to(device, DTYPES[x_name])) if case["bias"] else None
        truth = Truth.of(x, weight, bias, **options)
        problem = asked(m, n, k, x_name, fmt, layout=case["layout"], compute=case["compute"], bias=case["bias"])
        problem = dataclasses.replace(problem, packable=as_weight)
        for kernel in KERNELS:
            if interpreted(kernel, device) or refusal(kernel, problem, device) is not None:
                continue
            with poisoned(m, n, x.dtype, device):
                y = vecmat.matmul(x, weight, bias, kernel=kernel, **options)
            ran += 1
            said = truth.verdict(y)
            if said:
                wrong.append(f"{kernel} {case}: {said}")
    assert not wrong, f"{len(wrong)} of {ran} products are wrong:\n" + "\n".join(wrong[:12])
    assert ran
