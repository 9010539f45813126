"""Every kernel that the registry finds, on every format, dtype, layout and shape it accepts, against the float64 truth.

A new kernel file is tested without a change here. What a kernel rejects is passed over (its reason must be a
sentence), and ``test_a_kernel_runs_part_of_the_grid_wherever_it_can_run_at_all`` sees that not everything is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch

import vecmat
from cases import (
    DENSE,
    FEW_ROWS,
    FEW_SHAPES,
    FORMATS,
    HARD,
    KERNELS,
    ROWS,
    SHAPES,
    WIDE,
    asked,
    computes,
    generator,
    guarded,
    interpreted,
    numbers,
    poisoned,
    refusal,
    refuses,
    stored,
)  # fmt: skip
from oracle import Truth
from vecmat.kernels import registry
from vecmat.ops import bind_problem
from vecmat.problem import DTYPES


def report(failures: list[str]) -> None:
    """Fail with what went wrong, the first dozen cases of it."""
    assert not failures, f"{len(failures)} cases are wrong:\n" + "\n".join(failures[:12])


def accepted_formats(kernel: str, device: str) -> list[tuple[str, str, str | None]]:
    """(format, x, compute) that a kernel accepts for a round problem; one group size of each kind is enough here."""
    found = []
    for fmt in (*DENSE, "int8", "int8:g32", "int4:g64", "int4:g32:zp", "fp8", "fp8:g128"):
        for x in DENSE:
            if fmt in DENSE and fmt != x:
                continue
            for compute in computes(fmt):
                if any(refusal(kernel, asked(m, 64, 128, x, fmt, compute=compute), device) is None for m in (1, 8)):
                    found.append((fmt, x, compute))
    return found


@torch.inference_mode()
def run_grid(
    kernel: str, fmt: str, device: str, shapes: Sequence[tuple[int, int]], rows: Sequence[int], layouts: Sequence[str]
) -> tuple[int, list[str], list[str]]:
    """How many products of the grid the kernel ran, what was wrong in them, and its reasons for the others."""
    ran, failures, reasons = 0, [], []
    for (place, (n, k)), x_name, layout, compute in product(enumerate(shapes), DENSE, layouts, computes(fmt)):
        able = []
        as_weight = fmt != x_name or place % 2 == 0  # a dense weight comes as a tensor, too
        for step, m in enumerate(rows):
            biased = (place + step) % 2 == 0
            problem = asked(m, n, k, x_name, fmt, layout=layout, compute=compute, bias=biased, packable=as_weight)
            reason = refusal(kernel, problem, device)
            if reason is None:
                able.append((m, biased))
            else:
                reasons.append(reason)
        if not able:
            continue
        options = {"layout": "nk" if as_weight else layout, "compute": compute}
        a, w, b = numbers("plain", max(rows), n, k, x_name, fmt)
        weight = stored(w, fmt, layout, device, as_weight=as_weight)
        a, b = a.to(device, DTYPES[x_name]), b.to(device, DTYPES[x_name])
        truths = {biased: Truth.of(a, weight, b if biased else None, **options) for _, biased in able}
        for m, biased in able:
            x, bias = guarded(a[:m]), guarded(b) if biased else None
            with poisoned(m, n, x.dtype, device):
                y = vecmat.matmul(x, weight, bias, kernel=kernel, **options)
            wrong = truths[biased].verdict(y, slice(0, m))
            ran += m > 0
            if wrong:
                failures.append(f"m={m} n={n} k={k} x={x_name} w={fmt} {layout} bias={biased} {compute}: {wrong}")
    return ran, failures, reasons


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_right_on_every_shape_dtype_and_layout(kernel: str, fmt: str, device: str) -> None:
    small = interpreted(kernel, device)
    shapes, rows = (FEW_SHAPES, FEW_ROWS) if small else (SHAPES, ROWS)
    ran, failures, reasons = run_grid(kernel, fmt, device, shapes, rows, ("nk", "kn"))
    report(failures)
    if not ran:
        pytest.skip(f"{kernel} runs no {fmt} here: {reasons[0]}")


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_right_where_threads_and_blocks_share_the_work(kernel: str, threads: int, device: str) -> None:
    shapes, rows = (((17, 33),), (3,)) if interpreted(kernel, device) else ((WIDE, (64, 128)), (1, 2, 17))
    failures = []
    for place, fmt in enumerate((*DENSE, "int8", "int8:g64", "int4:g32", "int4:g128:zp", "fp8")):
        failures += run_grid(kernel, fmt, device, shapes, rows, ("nk", "kn")[place % 2 :][:1])[1]
    report(failures)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_runs_part_of_the_grid_wherever_it_can_run_at_all(kernel: str, device: str) -> None:
    small = interpreted(kernel, device)
    shapes, rows = (FEW_SHAPES, FEW_ROWS) if small else (SHAPES, ROWS)
    big = tuple(product((1, 16, 512), (4096, 11008), (4096,)))
    for fmt, x in product(FORMATS, DENSE):
        for compute in computes(fmt):

            def accepts(m: int, n: int, k: int) -> bool:
                return refusal(kernel, asked(m, n, k, x, fmt, compute=compute), device) is None  # noqa: B023

            if any(accepts(*sizes) for sizes in big):
                reached = any(accepts(m, *shape) for m, shape in product(rows, shapes) if m)
                assert reached, f"{kernel} accepts x={x} w={fmt} {compute} at K=4096, but no problem of the grid"


@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_hard_numbers_are_right(kernel: str, device: str) -> None:
    failures = []
    for fmt, x_name, compute in accepted_formats(kernel, device):
        for kind in HARD:
            if kind == "tiny w" and fmt not in DENSE:
                continue  # such a weight has no scale: it is stored as zeros
            for m in (1, 5, 33):
                a, w, bias = (t.to(device) for t in numbers(kind, m, 64, 256, x_name, fmt))
                weight = stored(w, fmt, "nk", device)
                x, bias = guarded(a.to(DTYPES[x_name])), bias.to(DTYPES[x_name])
                if refuses(kernel, x, weight, bias, compute=compute):
                    continue
                truth = Truth.of(x, weight, bias, compute=compute)
                assert torch.isfinite(truth.value.to(x.dtype)).all(), "the case itself overflows"
                wrong = truth.verdict(vecmat.matmul(x, weight, bias, kernel=kernel, compute=compute))
                if wrong:
                    failures.append(f"{kind}: m={m} x={x_name} w={fmt} {compute}: {wrong}")
    report(failures)


@torch.inference_mode()
def test_the_fallback_is_right_on_hard_numbers_without_widening(device: str) -> None:
    failures = []
    fallback = registry()[0]["fallback"]
    for fmt, x_name, compute in accepted_formats("fallback", device):
        for kind in HARD:
            if compute or x_name == "fp32" or (kind == "tiny w" and fmt not in DENSE):
                continue
            a, w, bias = (t.to(device) for t in numbers(kind, 5, 64, 256, x_name, fmt))
            x, bias, weight = a.to(DTYPES[x_name]), bias.to(DTYPES[x_name]), stored(w, fmt, "nk", device)
            run = fallback.bind(*bind_problem(x, weight, bias), {"widen": False})
            wrong = Truth.of(x, weight, bias).verdict(run(x, fallback.operand(weight), bias))
            if wrong:
                failures.append(f"{kind}: x={x_name} w={fmt}: {wrong}")
    report(failures)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_inf_and_nan_stay_in_their_rows(kernel: str, device: str) -> None:
    failures = []
    bad = {1: torch.inf, 3: torch.nan, 4: -torch.inf, 19: torch.nan}
    for fmt, x_name, compute in accepted_formats(kernel, device):
        for m in (5, 8, 20):
            a, w, _ = (t.to(device) for t in numbers("plain", m, 64, 256, x_name, fmt))
            weight, x = stored(w, fmt, "nk", device), guarded(a.to(DTYPES[x_name]))
            if refuses(kernel, x, weight, None, compute=compute):
                continue
            ill = [row for row in bad if row < m]
            well = torch.tensor([row for row in range(m) if row not in bad])
            for position in (0, 200):
                sick = x.clone()
                for row in ill:
                    sick[row, position] = bad[row]
                y = vecmat.matmul(sick, weight, kernel=kernel, compute=compute)
                wrong = Truth.of(x, weight, compute=compute).verdict(y[well], well)
                if wrong:
                    failures.append(f"healthy rows: m={m} x={x_name} w={fmt} {compute}: {wrong}")
                if torch.isfinite(y[ill]).any():
                    failures.append(f"inf or NaN was lost: m={m} x={x_name} w={fmt} {compute}")
    report(failures)


def variants(m: int, k: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """x in every form that torch allows, last dimension k, some m rows in all."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator(shape, str(dtype))).to(device, dtype)

    return {
        "one dimension": draw(k),
        "three dimensions": draw(2, m, k),
        "four dimensions": draw(2, 1, m, k),
        "no rows in three dimensions": draw(2, 0, k),
        "transposed": draw(k, m).t(),
        "every second column": draw(m, 2 * k)[:, ::2],
        "every second row": draw(2 * m, k)[::2],
        "columns of a wider matrix": draw(m, k + 24)[:, 8 : k + 8],
        "permuted dimensions": draw(3, k, m).permute(2, 0, 1),
        "batch and sequence swapped": draw(m, 2, k).transpose(0, 1),
        "unaligned by one element": guarded(draw(m, k), offset=1),
        "unaligned by three elements": guarded(draw(m, k), offset=3),
        "expanded rows": draw(1, k).expand(m, k),
        "expanded columns": draw(m, 1).expand(m, k),
        "expanded batch": draw(1, m, k).expand(3, m, k),
    }


@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_x_may_have_any_shape_strides_and_offset(kernel: str, device: str) -> None:
    failures = []
    for fmt, x_name, compute in accepted_formats(kernel, device):
        for m in (1, 6):
            _, w, bias = (t.to(device) for t in numbers("plain", 1, 64, 128, x_name, fmt))
            weight, bias = stored(w, fmt, "nk", device), bias.to(DTYPES[x_name])
            for name, x in variants(m, 128, DTYPES[x_name], device).items():
                if refuses(kernel, x, weight, bias, compute=compute):
                    continue
                y = vecmat.matmul(x, weight, bias, kernel=kernel, compute=compute)
                if y.shape != (*x.shape[:-1], 64):
                    failures.append(f"{name}: x {tuple(x.shape)} gives y {tuple(y.shape)}")
                    continue
                wrong = Truth.of(x, weight, bias, compute=compute).verdict(y)
                if wrong:
                    failures.append(f"{name}: m={m} x={x_name} w={fmt} {compute}: {wrong}")
    report(failures)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_weight_and_bias_may_have_any_strides_and_offset(kernel: str, device: str) -> None:
    failures = []
    for fmt, x_name, compute in accepted_formats(kernel, device):
        a, w, bias = (t.to(device, DTYPES[x_name]) for t in numbers("plain", 6, 64, 128, x_name, fmt))
        forms: dict[str, torch.Tensor | vecmat.Weight] = {}
        if fmt in DENSE:
            forms["every second column"] = w.repeat_interleave(2, dim=1)[:, ::2]
            forms["every second row"] = w.repeat_interleave(2, dim=0)[::2]
            forms["transposed memory"] = w.t().contiguous().t()
            forms["unaligned"] = guarded(w, offset=1)
            forms["expanded"] = w[:1].expand(64, 128)
        else:
            whole = vecmat.quantize(w.float(), fmt)
            parts = [whole.data, whole.scale, whole.zero]
            strided = [None if t is None else t.repeat_interleave(2, dim=0)[::2] for t in parts]
            shifted = [None if t is None else guarded(t, offset=1) for t in parts]
            flipped = [None if t is None else t.t().contiguous().t() for t in parts]
            for name, tensors in (("every second row", strided), ("unaligned", shifted), ("transposed", flipped)):
                forms[name] = vecmat.Weight(whole.format, *tensors, k=whole.k)
        for name, weight in forms.items():
            for m in (1, 6):
                if refuses(kernel, a[:m], weight, bias, compute=compute):
                    continue
                spread = bias.repeat_interleave(3)[::3]
                y = vecmat.matmul(a[:m], weight, spread, kernel=kernel, compute=compute)
                wrong = Truth.of(a[:m], weight, bias, compute=compute).verdict(y)
                if wrong:
                    failures.append(f"{name}: m={m} x={x_name} w={fmt} {compute}: {wrong}")
    report(failures)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_scales_may_be_any_number_and_negative(kernel: str, device: str) -> None:
    """``quantize`` makes scales on bf16's grid; those of a stored weight may lie anywhere, here between its points."""
    failures = []
    for fmt, x_name, compute in accepted_formats(kernel, device):
        if fmt in DENSE:
            continue
        a, w, bias = (t.to(device, DTYPES[x_name]) for t in numbers("plain", 17, 64, 256, x_name, fmt))
        made = vecmat.quantize(w.float(), fmt)
        sign = torch.where(torch.arange(64, device=device) % 3 == 0, -1.0, 1.0)[:, None]
        weight = vecmat.Weight(made.format, made.data, made.scale * (1 + 2.0**-9) * sign, made.zero, k=made.k)
        for m in (1, 17):
            if refuses(kernel, a[:m], weight, bias, compute=compute):
                continue
            y = vecmat.matmul(a[:m], weight, bias, kernel=kernel, compute=compute)
            wrong = Truth.of(a[:m], weight, bias, compute=compute).verdict(y)
            if wrong:
                failures.append(f"m={m} x={x_name} w={fmt} {compute}: {wrong}")
    report(failures)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_out_dtype_rounds_once_to_the_dtype_asked_for(kernel: str, device: str) -> None:
    failures = []
    for fmt, x_name, compute in accepted_formats(kernel, device):
        a, w, bias = (t.to(device) for t in numbers("plain", 17, 64, 128, x_name, fmt))
        x, bias, weight = a.to(DTYPES[x_name]), bias.to(DTYPES[x_name]), stored(w, fmt, "nk", device)
        for out in DENSE:
            options = {"out_dtype": DTYPES[out], "compute": compute}
            for rows in (x, x[:1]):
                if refuses(kernel, rows, weight, bias, **options):
                    continue
                y = vecmat.matmul(rows, weight, bias, kernel=kernel, **options)
                wrong = Truth.of(rows, weight, bias, **options).verdict(y)
                if wrong:
                    failures.append(f"m={len(rows)} x={x_name} w={fmt} o={out} {compute}: {wrong}")
    report(failures)


@pytest.mark.parametrize(("planned", "others"), [(1, ()), (5, ()), (9, (16,)), (48, (33,))])
@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_every_config_is_right_for_every_m_of_its_bucket(
    kernel: str, planned: int, others: tuple[int, ...], device: str
) -> None:
    failures = []
    chosen = registry()[0][kernel]
    shapes = ((33, 130),) if interpreted(kernel, device) else ((33, 130), (64, 256), (272, 1024))
    for fmt, x_name, compute in accepted_formats(kernel, device):
        for n, k in shapes:
            a, w, bias = (t.to(device) for t in numbers("plain", 64, n, k, x_name, fmt))
            a, bias, weight = a.to(DTYPES[x_name]), bias.to(DTYPES[x_name]), stored(w, fmt, "nk", device)
            truth = Truth.of(a, weight, bias, compute=compute)
            problem, where = bind_problem(a[:planned], weight, bias, compute=compute)
            if chosen.rejects(problem, where):
                continue
            configs = [dict(config) for config in chosen.configs(problem, where)]
            assert dict(chosen.default_config(problem, where)) in configs
            assert 1 <= len(configs) <= 40
            assert len({str(sorted(c.items())) for c in configs}) == len(configs), "a config is listed twice"
            for config in configs:
                run = chosen.bind(problem, where, config)
                for m in (planned, *others):
                    with poisoned(m, n, a.dtype, device):
                        y = run(guarded(a[:m]), chosen.operand(weight), bias)
                    wrong = truth.verdict(y, slice(0, m))
                    if wrong:
                        failures.append(f"{config}: m={m} n={n} k={k} x={x_name} w={fmt} {compute}: {wrong}")
    report(failures)


@pytest.mark.parametrize("fmt", [*DENSE, "int8", "int8:g32", "int4:g128", "int4:g32:zp", "fp8", "fp8:g128"])
@torch.inference_mode()
def test_equal_reduction_strings_give_a_row_the_same_bits_whatever_m_is(fmt: str, device: str) -> None:
    failures = []
    for x_name in DENSE:
        for n, k in ((48, 128), (96, 640)):
            a, w, bias = (t.to(device) for t in numbers("plain", 64, n, k, x_name, fmt))
            a, bias, weight = a.to(DTYPES[x_name]), bias.to(DTYPES[x_name]), stored(w, fmt, "nk", device)
            for compute in computes(fmt):
                seen: dict[str, tuple[str, torch.Tensor]] = {}
                for name in KERNELS:
                    kernel, small = registry()[0][name], interpreted(name, device)
                    for m in () if small and k > 128 else (1, 2, 17) if small else (1, 2, 7, 16, 17, 64):
                        problem, where = bind_problem(a[:m], weight, bias, compute=compute)
                        if kernel.rejects(problem, where):
                            continue
                        for config in kernel.configs(problem, where):
                            run = kernel.bind(problem, where, config)
                            row = run(a[:m], kernel.operand(weight), bias)[0].clone()
                            told = f"{name} {dict(config)} m={m} n={n} k={k} x={x_name}"
                            if not small and not torch.equal(row, run(a[:m], kernel.operand(weight), bias)[0]):
                                failures.append(f"{told}: two equal calls differ")
                            first = seen.setdefault(f"{kernel.reduction(problem, config)}", (told, row))
                            if not torch.equal(first[1], row):
                                failures.append(f"{told} differs from {first[0]} but has its reduction string")
    report(failures)


@pytest.mark.parametrize("kernel", KERNELS)
@torch.inference_mode()
def test_results_are_fresh_memory_and_the_arguments_are_not_touched(kernel: str, device: str) -> None:
    for fmt, x_name, compute in accepted_formats(kernel, device):
        a, w, bias = (t.to(device) for t in numbers("plain", 9, 64, 128, x_name, fmt))
        x, bias, weight = a.to(DTYPES[x_name]), bias.to(DTYPES[x_name]), stored(w, fmt, "nk", device)
        x = x[:1] if refuses(kernel, x, weight, bias, compute=compute) else x
        parts = [x, bias, *(part for part in (weight.data, weight.scale, weight.zero) if part is not None)]
        before = [part.clone() for part in parts]
        first = vecmat.matmul(x, weight, bias, kernel=kernel, compute=compute)
        kept = first.clone()
        second = vecmat.matmul(-x, weight, bias, kernel=kernel, compute=compute)
        assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
        assert torch.equal(first, kept), f"{kernel} {fmt}: a later call changed an earlier result"
        for part, old in zip(parts, before, strict=True):
            assert torch.equal(part.view(torch.uint8), old.view(torch.uint8)), f"{kernel} {fmt} changed its arguments"
