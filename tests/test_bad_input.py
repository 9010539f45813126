"""A caller's mistake always raises, and the message names the argument, what it was and what was expected."""

from __future__ import annotations

import pytest
import torch

import vecmat
from cases import KERNELS, here
from vecmat import tables
from vecmat.device import Device
from vecmat.ops import explain_problem
from vecmat.problem import Format, Problem

X = torch.zeros(2, 64)
W = torch.zeros(8, 64)
STORED = vecmat.quantize(torch.ones(8, 64), "int4:g32")


@pytest.mark.parametrize("rows", [2, 0])
@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x is list; expected a tensor", {"x": [1.0]}),
        (TypeError, "x is NoneType; expected a tensor", {"x": None}),
        (TypeError, "weight is str; expected a tensor or a vecmat.Weight", {"weight": "int8"}),
        (TypeError, "weight is Linear; expected a tensor or a vecmat.Weight", {"weight": torch.nn.Linear(64, 8)}),
        (TypeError, "bias is float; expected a tensor", {"bias": 1.0}),
        (TypeError, "x is torch.float64; expected torch.float32", {"x": X.double()}),
        (TypeError, "x is torch.int64; expected", {"x": X.long()}),
        (TypeError, "weight is torch.int8; expected .* or a vecmat.Weight", {"weight": W.to(torch.int8)}),
        (TypeError, "weight is torch.float16 but x is torch.float32; cast one", {"weight": W.half()}),
        (TypeError, r"bias is torch.float16; expected x's torch.float32", {"bias": torch.zeros(8).half()}),
        (TypeError, "out_dtype is torch.float64; expected", {"out_dtype": torch.float64}),
        (TypeError, "out_dtype is torch.int8; expected", {"out_dtype": torch.int8}),
        (ValueError, r"weight has K=63 but x has K=64 \(x fp32 \(\d, 64\), weight fp32 \(8, 63\)\)",
         {"weight": W[:, 1:]}),
        (ValueError, r"weight has K=8 but x has K=64 .*weight fp32 \(8, 64\)", {"layout": "kn"}),
        (ValueError, r"weight has K=64 but x has K=60 .*weight int4:g32 \(8, 64\)", {"x": X[:, :60], "weight": STORED}),
        (ValueError, r"weight has shape \(8,\); expected two dimensions", {"weight": W[:, 0]}),
        (ValueError, r"weight has shape \(1, 8, 64\); expected two dimensions", {"weight": W[None]}),
        (ValueError, r"bias has shape \(7,\); expected \(8,\)", {"bias": torch.zeros(7)}),
        (ValueError, r"bias has shape \(1, 8\); expected \(8,\)", {"bias": torch.zeros(1, 8)}),
        (ValueError, "layout is 'mk'; expected 'nk'", {"layout": "mk"}),
        (ValueError, "layout is 'mk'; expected 'nk'", {"layout": "mk", "weight": STORED}),
        (ValueError, "weight is on meta but x is on cpu", {"weight": W.to("meta")}),
        (ValueError, "weight is on cpu but x is on meta", {"x": X.to("meta")}),
        (ValueError, "weight is on meta but x is on cpu .*int4:g32", {"weight": STORED.to("meta")}),
        (ValueError, "bias is on meta but x is on cpu", {"bias": torch.zeros(8, device="meta")}),
        (ValueError, "compute is 'int4'; expected None, 'int8' or 'fp8'", {"compute": "int4"}),
        (ValueError, "compute='int8' .* needs an int8 or int4 weight; this one is fp32", {"compute": "int8"}),
        (ValueError, "compute='fp8' .* this one is int4:g32", {"compute": "fp8", "weight": STORED}),
        (ValueError, "kernel 'cublas' is not known; known are .*fallback.*torch_dense", {"kernel": "cublas"}),
        (ValueError, "kernel 'torch_dense' cannot run m.* n8 k64 .*: the weight is int4:g32; this kernel multiplies",
         {"kernel": "torch_dense", "weight": STORED}),
    ],
)  # fmt: skip
def test_matmul_says_what_is_wrong_with_its_arguments(
    error: type[Exception], message: str, arguments: dict[str, object], rows: int
) -> None:
    whole = {"x": X, "weight": W, **arguments}
    if isinstance(whole["x"], torch.Tensor):
        whole["x"] = whole["x"][:rows]  # nothing to multiply is no excuse
    for attempt in range(2):  # a mistake must not be remembered as a plan
        with pytest.raises(error, match=message):
            vecmat.matmul(**whole)
        if attempt == 0 and "kernel" not in arguments:
            with pytest.raises(error, match=message):
                vecmat.explain(**whole)


def test_x_without_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x has no dimensions; expected \(..., K\) \(x fp32 \(\), weight fp32"):
        vecmat.matmul(torch.tensor(1.0), W)


def test_a_mistake_is_refused_after_a_call_that_was_right() -> None:
    """The warm path must not take a wrong call for the one it knows."""
    bias = torch.zeros(8)
    vecmat.matmul(X, W, bias)
    with pytest.raises(ValueError, match="K=63"):
        vecmat.matmul(X, W[:, 1:], bias)
    with pytest.raises(ValueError, match="bias has shape"):
        vecmat.matmul(X, W, bias[1:])
    with pytest.raises(TypeError, match=r"bias is torch.float64"):
        vecmat.matmul(X, W, bias.double())
    with pytest.raises(ValueError, match="layout"):
        vecmat.matmul(X, W, bias, layout="mk")
    with pytest.raises(ValueError, match="not known"):
        vecmat.matmul(X, W, bias, kernel="cublas")
    with pytest.raises(TypeError, match="out_dtype"):
        vecmat.matmul(X, W, bias, out_dtype=torch.float64)
    with pytest.raises(TypeError, match="bias is float"):
        vecmat.matmul(X, W, 0.0)
    stored = vecmat.quantize(W, "int8")
    vecmat.matmul(X, stored)
    with pytest.raises(ValueError, match="layout is 'mk'"):
        vecmat.matmul(X, stored, layout="mk")


def test_int8_compute_has_no_gradient_and_says_so() -> None:
    weight = vecmat.quantize(torch.ones(8, 64), "int8")
    with pytest.raises(ValueError, match="compute='int8' has no gradient"):
        vecmat.matmul(X.clone().requires_grad_(), weight, compute="int8")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "w is torch.int8; expected a tensor of floating-point numbers", {"w": W.to(torch.int8)}),
        (TypeError, "w is torch.int64", {"w": W.long()}),
        (TypeError, "w is torch.float8_e4m3fn", {"w": W.to(torch.float8_e4m3fn)}),
        (TypeError, "w is list", {"w": [[1.0]]}),
        (TypeError, "w is NoneType", {"w": None}),
        (ValueError, r"w has shape \(1, 8, 64\); expected two dimensions", {"w": W[None]}),
        (ValueError, r"w has shape \(64,\); expected two dimensions", {"w": W[0]}),
        (ValueError, r"w has values that are not finite \(shape \(1, 2\), torch.float32\)",
         {"w": torch.tensor([[1.0, torch.inf]])}),
        (ValueError, "w has values that are not finite", {"w": torch.full((3, 64), torch.nan), "format": "int4"}),
        (ValueError, "w has values that are not finite", {"w": torch.full((3, 64), -torch.inf), "format": "fp8"}),
        (ValueError, "format 'int3' is not known; known are fp32, bf16, fp16, int8, int4, fp8", {"format": "int3"}),
        (ValueError, "format 'int4:x64': 'x64' is no option; expected gSIZE or zp", {"format": "int4:x64"}),
        (ValueError, "group_size is 48; expected one of 32, 64, 128", {"group_size": 48}),
        (ValueError, "group_size is 0; expected one of", {"group_size": 0}),
        (ValueError, "group_size is 16; expected one of", {"format": "int4:g16"}),
        (ValueError, "group_size is 32, but the format 'int8:g64' names 64", {"format": "int8:g64", "group_size": 32}),
        (ValueError, "'fp16' has no groups, but group_size is 32", {"format": "fp16", "group_size": 32}),
        (ValueError, "'bf16' has no groups", {"format": "bf16", "group_size": 32}),
        (ValueError, "group_size is 48; expected one of 32, 64, 128", {"format": "fp8", "group_size": 48}),
        (ValueError, r"'int8' has no zero points \(symmetric=False\); int4 has", {"symmetric": False}),
        (ValueError, "layout is 'kk'", {"layout": "kk"}),
        (TypeError, "format is NoneType; expected a name such as 'int8'", {"format": None}),
    ],
)  # fmt: skip
def test_quantize_says_what_is_wrong(error: type[Exception], message: str, arguments: dict[str, object]) -> None:
    with pytest.raises(error, match=message):
        vecmat.quantize(**{"w": W, "format": "int8", **arguments})


DATA = torch.zeros(4, 64, dtype=torch.int8)
SCALE = torch.ones(4, 1)
NIBBLES = torch.zeros(4, 32, dtype=torch.uint8)
GROUPS = torch.ones(4, 2)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "data is torch.float32 but format int8 is stored as torch.int8", ("int8", DATA.float(), SCALE)),
        (TypeError, "scale is torch.float16; expected torch.float32", ("int8", DATA, SCALE.half())),
        (TypeError, "zero is torch.int8; expected torch.uint8",
         ("int4:g32:zp", NIBBLES, GROUPS, GROUPS.to(torch.int8))),
        (ValueError, r"data has shape \(64,\); expected two dimensions", ("int8", DATA[0], SCALE)),
        (ValueError, "format int8 needs scale", ("int8", DATA)),
        (ValueError, "format bf16 has no scale", ("bf16", DATA.bfloat16(), SCALE)),
        (ValueError, "format int4:g32 has no zero", ("int4:g32", NIBBLES, GROUPS, GROUPS.to(torch.uint8))),
        (ValueError, "format int4:g32:zp needs zero", ("int4:g32:zp", NIBBLES, GROUPS)),
        (ValueError, r"scale has shape \(4, 1\); expected \(4, 2\) for int8:g32", ("int8:g32", DATA, SCALE)),
        (ValueError, r"scale has shape \(4,\); expected \(4, 1\)", ("int8", DATA, SCALE[:, 0])),
        (ValueError, r"scale\[0, 0\] is 0.0; expected a finite number that is not zero", ("int8", DATA, 0 * SCALE)),
        (ValueError, r"scale\[0, 0\] is nan; expected", ("int8", DATA, torch.nan * SCALE)),
        (ValueError, r"scale\[0, 1\] is inf; expected", ("int8:g32", DATA, torch.tensor([[1.0, torch.inf]] * 4))),
        (ValueError, "zero has a value of 16; expected 0 to 15", ("int4:g32:zp", NIBBLES, GROUPS,
                                                                   torch.full((4, 2), 16, dtype=torch.uint8))),
        (ValueError, "scale is on meta but data is on cpu", ("int8", DATA, SCALE.to("meta"))),
        (ValueError, "data has NaN; expected finite", ("fp8", torch.full((4, 64), 127, dtype=torch.uint8).view(
            torch.float8_e4m3fn), SCALE)),
        (ValueError, "format 'int8:zp' has no zero|'int8' has no zero points", ("int8:zp", DATA, SCALE)),
    ],
)  # fmt: skip
def test_a_weight_checks_the_tensors_it_is_made_of(
    error: type[Exception], message: str, arguments: tuple[object, ...]
) -> None:
    with pytest.raises(error, match=message):
        vecmat.Weight(*arguments)


def test_a_weight_checks_k_and_layout() -> None:
    with pytest.raises(ValueError, match="int4 data has 32 bytes a row; expected 31 for K=62"):
        vecmat.Weight("int4:g32", NIBBLES, GROUPS, k=62)
    assert vecmat.Weight("int4:g32", NIBBLES, GROUPS, k=63).k == 63
    with pytest.raises(ValueError, match="data has K=64, but k=63"):
        vecmat.Weight("int8", DATA, SCALE, k=63)
    with pytest.raises(ValueError, match="layout is 'nm'"):
        vecmat.Weight("int8", DATA, SCALE, layout="nm")
    with pytest.raises(TypeError, match="data is list; expected a tensor"):
        vecmat.Weight("int8", [[1]], SCALE)


def test_a_table_context_and_a_device_name_are_checked() -> None:
    with pytest.raises(ValueError, match="rows without a device; pass device="):
        tables.use({})
    with pytest.raises(ValueError, match="device: 'h300' is not known; known are cpu, h200"):
        Device.named("h300")


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_named_kernel_that_cannot_run_says_why(kernel: str) -> None:
    """compute="fp8" on int4 is no problem a caller can make, so every kernel must have something to say."""
    problem = Problem(m=3, n=7, k=13, x="fp32", weight=Format.parse("int4:g32:zp"), out="fp16", grad=True)
    if kernel == "fallback":
        assert explain_problem(problem, here("cpu"), kernel=kernel).plan.kernel.name == kernel
        return
    with pytest.raises(
        ValueError, match=rf"kernel '{kernel}' cannot run m3 n7 k13 x=fp32 w=int4:g32:zp o=fp16 .*: \w+"
    ):
        explain_problem(problem, here("cpu"), kernel=kernel)
