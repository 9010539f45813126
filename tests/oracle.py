"""The truth that every kernel is held to: float64 on the exactly dequantised weight, and twice torch's own error.

A result passes when its largest error and its RMS error are each at most twice those of torch's own product of the
same problem (``F.linear`` in x's dtype on the dequantised weight rounded to x's dtype), plus what rounding alone may
cost. Errors are counted in each row's own unit, so that a row of large numbers does not hide the errors of a row of
small ones:

    unit of a row = half an ulp of the output's dtype at the row's largest |y|  (one rounding of the result)
                  + 2**-24 of the row's largest sum of |x * w|                  (one rounding of an fp32 sum)

The floor is one such unit for the largest error; for the RMS it is the RMS of the same two roundings at each
element's own magnitude. A correctly rounded result therefore always passes, however lucky torch was.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional as F

import vecmat

FP32_ROUNDING = 2.0**-24
# A quotient x / scale this close (relatively) to the middle of two steps may be rounded to either of them.
_TIE = 2.0**-20


def half_ulp(magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of ``dtype`` at a float64 magnitude."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(magnitude.clamp(min=info.tiny))  # magnitude = [0.5, 1) * 2**exponent
    return torch.ldexp(torch.full_like(magnitude, info.eps / 4), exponent)


def round_e4m3(value: Tensor) -> Tensor:
    """float64 numbers rounded to the nearest e4m3 number, ties to even, held within +-448."""
    _, exponent = torch.frexp(value)
    step = torch.ldexp(torch.ones_like(value), (exponent - 1).clamp(min=-6) - 3)
    return (torch.round(value / step) * step).clamp(-448, 448)


def quantise_rows(x: Tensor, compute: str) -> tuple[Tensor, Tensor]:
    """(x as ``compute`` means it, how far ties may move each element), both float64 (M, K).

    scale = max|row| / 127 or / 448, rounded to fp32; x / scale rounded to the nearest integer or e4m3 number.
    """
    x = x.double()
    top = 127.0 if compute == "int8" else 448.0
    scale = (x.abs().amax(-1, keepdim=True) / top).float().double()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)

    def rounded(value: Tensor) -> Tensor:
        return torch.round(value).clamp(-127, 127) if compute == "int8" else round_e4m3(value)

    q = x / scale
    span = (rounded(q * (1 + _TIE)) - rounded(q * (1 - _TIE))).abs()
    return rounded(q) * scale, span * scale


def exact(weight: Tensor | vecmat.Weight, layout: str = "nk") -> Tensor:
    """The weight in float64 as (N, K), exact, on the CPU."""
    if isinstance(weight, vecmat.Weight):
        dense, layout = weight.dequantize(torch.float64), weight.layout
    else:
        dense = weight.detach().double()
    dense = dense.cpu()
    return dense.t() if layout == "kn" else dense


@dataclasses.dataclass
class Truth:
    """What y (M, N) must be, for all rows of x at once; ``verdict`` judges a kernel's result for the first M of them.

    value: float64 truth. reach: sums of |x * w|, plus |bias|. slack: what ties in quantising x may change.
    """

    x: Tensor
    weight: Tensor  # (N, K), rounded to x's dtype, on x's device: torch's own operand
    bias: Tensor | None
    out: torch.dtype
    value: Tensor
    reach: Tensor
    slack: Tensor

    @staticmethod
    def of(x: Tensor, weight: Tensor | vecmat.Weight, bias: Tensor | None = None, *, layout: str = "nk",
           out_dtype: torch.dtype | None = None, compute: str | None = None) -> Truth:  # fmt: skip
        """The Truth of one product. x: (..., K), taken as (M, K)."""
        rows = x.detach().reshape(-1, x.shape[-1])
        dense = exact(weight, layout)
        seen, span = rows.double().cpu(), torch.zeros(rows.shape, dtype=torch.float64)
        if compute:
            seen, span = quantise_rows(rows.cpu(), compute)
        value, reach = seen @ dense.t(), seen.abs() @ dense.abs().t()
        if bias is not None:
            value, reach = value + bias.detach().double().cpu(), reach + bias.detach().double().cpu().abs()
        return Truth(
            x=seen.to(x.dtype).to(x.device), weight=dense.to(x.dtype).to(x.device), bias=bias,
            out=out_dtype or x.dtype, value=value, reach=reach,
            slack=span @ dense.abs().t() if compute else torch.zeros_like(value),
        )  # fmt: skip

    def verdict(self, y: Tensor, rows: slice | Tensor = slice(None)) -> str | None:
        """None if ``y`` is right for these rows of x, else a sentence with the shape, the place and the numbers."""
        value, reach = self.value[rows], self.reach[rows]
        m, n = value.shape
        if y.dtype != self.out:
            return f"result is {y.dtype}; expected {self.out}"
        if y.shape[-1:] != (n,) or y.numel() != m * n:
            return f"result has shape {tuple(y.shape)}; expected ({m}, {n})"
        if m == 0:
            return None
        got = y.detach().double().cpu().reshape(m, n)
        if not torch.isfinite(got).all():
            row, column = (~torch.isfinite(got)).nonzero()[0].tolist()
            return f"y[{row}, {column}] is {got[row, column].item()}; expected {value[row, column].item():.6g}"
        yardstick = F.linear(self.x[rows], self.weight, self.bias).detach().to(self.out).double().cpu()
        unit = half_ulp(value.abs().amax(-1, keepdim=True), self.out)
        unit = unit + FP32_ROUNDING * reach.amax(-1, keepdim=True)
        error = ((got - value).abs() - self.slack[rows]).clamp(min=0) / unit
        torchs = (yardstick - value).abs() / unit
        rounding = (half_ulp(value.abs(), self.out) + FP32_ROUNDING * reach) / unit
        limits = {
            "largest": (error.max(), 2 * torchs.max() + 1),
            "RMS": (_rms(error), 2 * _rms(torchs) + _rms(rounding)),
        }
        for name, (found, limit) in limits.items():
            if not found <= limit:
                row, column = divmod(int(error.argmax()), n)
                return (
                    f"{name} error {float(found):.3g} exceeds {float(limit):.3g} (in rounding units); worst at "
                    f"y[{row}, {column}] = {got[row, column].item():.6g}, truth {value[row, column].item():.6g}, "
                    f"torch {yardstick[row, column].item():.6g}"
                )
        return None


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
