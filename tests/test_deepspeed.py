"""DeepSpeed's names: the config, the choice of a function, int8 as DeepSpeed stores it, the side stream, matmul."""

from __future__ import annotations

import copy
import gc
import inspect
import json
import pickle
import subprocess
import sys
import types
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import vecmat
from cases import ROUNDING, far
from vecmat.deepspeed import (
    ActivationFuncType,
    BaseOp,
    DeepSpeedInferenceConfig,
    Fp16Matmul,
    InferenceModule,
    NormType,
    TransformerConfig,
    VectorMatMulOp,
    matmul,
    vector_matmul_func,
)

CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.fixture(autouse=True)
def _no_inference_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseOp, "inference_module", None)


def op_for(dtype: torch.dtype | str, **changes) -> VectorMatMulOp:
    return VectorMatMulOp(DeepSpeedInferenceConfig(dtype=dtype, **changes))


def quantised(n: int, k: int, groups: int, columns: int = 3, device: torch.device = CPU) -> torch.nn.Parameter:
    """An int8 weight (N, K) whose ``scale`` is (groups, columns), as DeepSpeed keeps it."""
    weight = torch.nn.Parameter(torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device), requires_grad=False)
    weight.scale = torch.rand(groups, columns, device=device) + 0.5
    return weight


def exact_int8(x: Tensor, weight: Tensor) -> Tensor:
    """The float64 product with an int8 weight, row by row as DeepSpeed's kernel reads the scales."""
    groups = weight.scale.shape[0]
    flat = weight.scale.flatten().double().tolist()
    rows = [weight[i].double() * flat[i // (weight.shape[0] // groups)] for i in range(weight.shape[0])]
    return (x.double() @ torch.stack(rows).T.to(x.device)).cpu()


# The config


def test_the_constructor_has_deepspeeds_arguments_in_order_with_its_defaults():
    wanted = {
        "hidden_size": -1, "intermediate_size": -1, "heads": -1, "num_hidden_layers": -1, "layer_norm_eps": 1e-12,
        "local_rank": -1, "mp_size": 1, "dtype": torch.float16, "pre_layer_norm": True, "norm_type": NormType.LayerNorm,
        "stochastic_mode": False, "scale_attention": True, "triangular_masking": True, "local_attention": False,
        "window_size": 256, "rotary_dim": -1, "rotate_half": False, "rotate_every_two": True, "return_tuple": True,
        "mlp_after_attn": True, "mlp_act_func_type": ActivationFuncType.GELU, "training_mp_size": 1,
        "bigscience_bloom": False, "max_out_tokens": 1024, "min_out_tokens": 1, "enable_qkv_quantization": False,
        "use_mup": False, "scale_attn_by_inverse_layer_idx": False, "return_single_tuple": False,
        "set_empty_params": False, "transposed_mode": False, "use_triton": False, "triton_autotune": False,
        "num_kv": -1, "rope_theta": 10000, "invert_mask": True,
    }  # fmt: skip
    found = {p.name: p.default for p in inspect.signature(DeepSpeedInferenceConfig).parameters.values()}
    assert list(found.items()) == list(wanted.items())


def test_every_argument_becomes_its_own_attribute():
    names = [p for p in inspect.signature(DeepSpeedInferenceConfig).parameters if p != "dtype"]
    config = DeepSpeedInferenceConfig(dtype=torch.int8, **{name: 1000 + i for i, name in enumerate(names)})
    found = {**vars(config)}
    assert found.pop("layer_id") == -1
    assert found.pop("dtype") == torch.int8
    found["layer_norm_eps"] = found.pop("epsilon")
    assert found == {name: 1000 + i for i, name in enumerate(names)}
    assert isinstance(config, TransformerConfig)


def test_the_intermediate_size_is_four_times_the_hidden_size_unless_given():
    assert DeepSpeedInferenceConfig(hidden_size=64).intermediate_size == 256
    assert DeepSpeedInferenceConfig(64, 100).intermediate_size == 100
    assert DeepSpeedInferenceConfig.from_dict({"hidden_size": 64}).intermediate_size == 256
    assert DeepSpeedInferenceConfig.from_dict({"intermediate_size": 7, "hidden_size": 64}).intermediate_size == 7


def test_the_enums_have_deepspeeds_members():
    assert [(m.name, m.value) for m in NormType] == [("UNKNOWN", 0), ("LayerNorm", 1), ("GroupNorm", 2), ("RMSNorm", 3)]
    assert {m.name: m.value for m in ActivationFuncType} == {
        "UNKNOWN": 0, "GELU": 1, "ReLU": 2, "GATED_GELU": 3, "GATED_SILU": 4
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp16", torch.float16), ("float16", torch.float16), ("half", torch.float16), ("torch.float16", torch.float16),
        ("bf16", torch.bfloat16), ("bfloat16", torch.bfloat16), ("torch.bfloat16", torch.bfloat16),
        ("fp32", torch.float32), ("float", torch.float32), ("torch.float32", torch.float32),
        ("int8", torch.int8), ("torch.int8", torch.int8), (torch.float64, torch.float64),
    ],
)  # fmt: skip
def test_a_dtype_may_be_its_name(name, dtype):
    assert DeepSpeedInferenceConfig(dtype=name).dtype is dtype
    assert DeepSpeedInferenceConfig.from_dict({"dtype": name}).dtype is dtype


@pytest.mark.parametrize("wrong", ["fp8", "", "torch.", "int4", None, 16])
def test_a_dtype_that_is_none_raises_with_the_accepted_names(wrong):
    for make in (
        lambda: DeepSpeedInferenceConfig(dtype=wrong),
        lambda: DeepSpeedInferenceConfig.from_dict({"dtype": wrong}),
    ):
        with pytest.raises(
            ValueError, match=r"expected a torch dtype or one of fp16, float16, half, bf16.*int8"
        ) as told:
            make()
        assert repr(wrong) in str(told.value)


def test_from_dict_takes_attributes_and_constructor_names():
    config = DeepSpeedInferenceConfig.from_dict({"layer_norm_eps": 1e-5, "layer_id": 3, "use_triton": True})
    assert (config.epsilon, config.layer_norm_eps, config.layer_id, config.use_triton) == (1e-5, 1e-5, 3, True)
    assert DeepSpeedInferenceConfig.from_dict({"epsilon": 1e-6}).epsilon == 1e-6


def test_an_unknown_key_warns_with_the_nearest_known_one_and_is_set():
    with pytest.warns(
        vecmat.VecmatWarning, match="'transposed_mod' is not known; the nearest known is 'transposed_mode'"
    ):
        config = DeepSpeedInferenceConfig.from_dict({"transposed_mod": True})
    assert config.transposed_mod is True
    assert config.transposed_mode is False


def test_from_json_file_reads_what_from_dict_takes(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"hidden_size": 32, "dtype": "bf16", "norm_type": 3}), encoding="utf-8")
    config = DeepSpeedInferenceConfig.from_json_file(file)
    assert (config.hidden_size, config.dtype, config.norm_type) == (32, torch.bfloat16, NormType.RMSNorm)


# Which function


def user_module(*names: str) -> types.SimpleNamespace:
    """An inference module of the user's: each function returns its own name and what it was called with."""

    def function(name: str) -> Callable[..., tuple]:
        return lambda *args: (name, *args)

    return types.SimpleNamespace(**{f"vector_matmul_{name}": function(f"vector_matmul_{name}") for name in names})


@pytest.mark.parametrize(
    ("dtype", "name"),
    [("fp16", "fp16"), ("bf16", "bf16"), ("int8", "int8"), ("fp32", "fp32"), (torch.float64, "fp32")],
)
def test_the_dtype_chooses_the_function_of_the_users_module(monkeypatch, dtype, name):
    monkeypatch.setattr(BaseOp, "inference_module", user_module("fp16", "bf16", "int8", "fp32"))
    assert op_for(dtype)(torch.ones(1), torch.ones(1))[0] == f"vector_matmul_{name}"


def test_every_function_gets_input_weight_async_op_q_scale_q_int8_transpose(monkeypatch):
    monkeypatch.setattr(BaseOp, "inference_module", user_module("int8", "fp16"))
    x, weight = torch.ones(1), quantised(4, 4, 2)
    _, *got = op_for("int8", transposed_mode=True)(x, weight, async_op=True)
    assert got[0] is x
    assert got[1] is weight
    assert got[3] is weight.scale
    assert (got[2], got[4], got[5]) == (True, True, True)
    _, *got = op_for("fp16")(x, x)
    assert (got[2], got[4], got[5]) == (False, False, False)


def test_without_a_scale_one_and_the_same_empty_tensor_is_passed(monkeypatch):
    monkeypatch.setattr(BaseOp, "inference_module", user_module("fp16"))
    op, x = op_for("fp16"), torch.ones(1)
    first, second = op(x, x)[4], op(x, x)[4]
    assert first is second
    assert first.numel() == 0


def test_int8_takes_the_modules_fp16_function_with_q_int8_where_it_has_no_int8_one(monkeypatch):
    monkeypatch.setattr(BaseOp, "inference_module", user_module("fp16", "fp32"))
    name, *got = op_for("int8")(torch.ones(1), torch.ones(1))
    assert name == "vector_matmul_fp16"
    assert got[4] is True


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "int8", "fp32"])
def test_an_attribute_error_from_looking_the_function_up_selects_the_fallback(monkeypatch, dtype):
    monkeypatch.setattr(BaseOp, "inference_module", types.SimpleNamespace())
    op = op_for(dtype)
    assert op.vector_matmul_func == op.vector_matmul_fallback


def test_any_other_error_from_looking_the_function_up_propagates(monkeypatch):
    class Broken:
        @property
        def vector_matmul_fp16(self):
            raise RuntimeError("the library could not be built")

    monkeypatch.setattr(BaseOp, "inference_module", Broken())
    with pytest.raises(RuntimeError, match="could not be built"):
        op_for("fp16")


def test_an_attribute_error_inside_autotuning_propagates(monkeypatch):
    def wrong(*args):
        raise AttributeError("a bug in the tuner")

    monkeypatch.setattr(VectorMatMulOp, "_triton_autotune", staticmethod(wrong))
    config = DeepSpeedInferenceConfig(hidden_size=16, use_triton=True, triton_autotune=True)
    config.layer_id = 0
    with pytest.raises(AttributeError, match="a bug in the tuner"):
        VectorMatMulOp(config)


def test_an_attribute_error_inside_the_users_function_propagates(monkeypatch):
    def wrong(*args):
        raise AttributeError("a bug in the function")

    monkeypatch.setattr(BaseOp, "inference_module", types.SimpleNamespace(vector_matmul_fp16=wrong))
    with pytest.raises(AttributeError, match="a bug in the function"):
        op_for("fp16")(torch.ones(1), torch.ones(1))


def test_an_attribute_error_from_a_config_that_lacks_a_field_propagates():
    config = TransformerConfig(16, 64, 2, 1)
    config.dtype = torch.float16
    with pytest.raises(AttributeError, match="use_triton"):
        VectorMatMulOp(config)


@pytest.mark.parametrize(("installed", "asked"), [(True, True), (True, False), (False, True)])
def test_fp16_takes_tritons_function_when_it_is_installed_and_asked_for(monkeypatch, installed, asked):
    monkeypatch.setattr(BaseOp, "inference_module", user_module("fp16", "bf16"))
    monkeypatch.setattr(vecmat, "HAS_TRITON", installed, raising=False)
    assert (op_for("fp16", use_triton=asked).vector_matmul_func is vector_matmul_func) == (installed and asked)
    assert op_for("bf16", use_triton=asked).vector_matmul_func is not vector_matmul_func


def test_the_inference_module_is_made_with_the_first_op_and_shared():
    assert BaseOp.inference_module is None
    BaseOp(DeepSpeedInferenceConfig())
    made = BaseOp.inference_module
    assert isinstance(made, InferenceModule)
    op = op_for("bf16")
    assert BaseOp.inference_module is made
    assert op.vector_matmul_func.__self__ is made
    assert isinstance(op, torch.nn.Module)


def test_importing_makes_no_module_and_imports_neither_triton_nor_deepspeed():
    code = (
        "import sys, torch, vecmat; from vecmat.deepspeed import BaseOp, Fp16Matmul, HAS_TRITON;"
        "assert BaseOp.inference_module is None and HAS_TRITON is vecmat.HAS_TRITON;"
        "assert vecmat.BaseOp is BaseOp and vecmat.VectorMatMulOp and vecmat.DeepSpeedInferenceConfig;"
        "assert not torch.cuda.is_initialized();"
        "assert not {'triton', 'deepspeed'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# The fallback


def test_the_fallback_is_torchs_product_when_the_environment_says_so(monkeypatch):
    monkeypatch.setattr(BaseOp, "inference_module", types.SimpleNamespace())
    monkeypatch.setenv("DS_KI_FALLBACK", "True")
    x, weight = torch.randn(2, 3, 8), torch.randn(8, 4)
    assert torch.equal(op_for("fp32")(x, weight), torch.matmul(x, weight))


@pytest.mark.parametrize("value", [None, "", "1", "true", "TRUE", "True "])
def test_the_fallback_raises_unless_the_environment_says_exactly_true(monkeypatch, value):
    monkeypatch.setattr(BaseOp, "inference_module", types.SimpleNamespace())
    monkeypatch.delenv("DS_KI_FALLBACK", raising=False)
    if value is not None:
        monkeypatch.setenv("DS_KI_FALLBACK", value)
    with pytest.raises(NotImplementedError, match=r"DS_KI_FALLBACK.*transposed_mode") as told:
        op_for("fp32")(torch.ones(1, 2), torch.ones(2, 1))
    assert f"found {value!r}" in str(told.value)


def test_the_fallback_raises_for_a_transposed_weight(monkeypatch):
    monkeypatch.setattr(BaseOp, "inference_module", types.SimpleNamespace())
    monkeypatch.setenv("DS_KI_FALLBACK", "True")
    with pytest.raises(NotImplementedError, match=r"found 'True'.*found True"):
        op_for("fp32", transposed_mode=True)(torch.ones(1, 2), torch.ones(1, 2))


# The product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(48,), (5, 48), (2, 3, 48), (2, 1, 3, 48)])
@pytest.mark.parametrize("use_triton", [False, True])
def test_any_rank_and_both_layouts_give_the_exact_product_to_one_rounding(dtype, transposed, shape, use_triton):
    x = torch.randn(shape).to(dtype)
    weight = torch.randn((40, 48) if transposed else (48, 40)).to(dtype)
    exact = x.double() @ (weight.T if transposed else weight).double()
    y = op_for(dtype, transposed_mode=transposed, use_triton=use_triton)(x, weight)
    assert y.dtype == dtype
    assert far(y, exact) < ROUNDING[dtype]


def test_the_output_is_fresh_each_time():
    op, x, weight = op_for("fp32"), torch.randn(1, 2, 16), torch.randn(16, 8)
    first = op(x, weight)
    kept = first.clone()
    second = op(2 * x, weight)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert first.untyped_storage().nbytes() == first.nbytes
    assert torch.equal(first, kept)


def test_the_tensors_decide_and_not_the_configs_dtype():
    x, weight = torch.randn(3, 16).bfloat16(), torch.randn(16, 8).bfloat16()
    y = op_for("fp16")(x, weight)
    assert y.dtype == torch.bfloat16
    assert far(y, x.double() @ weight.double()) < ROUNDING[torch.bfloat16]


def test_unequal_dtypes_raise_vecmats_own_error():
    with pytest.raises(TypeError, match=r"weight is torch\.bfloat16 but x is torch\.float16"):
        op_for("fp16")(torch.ones(1, 4).half(), torch.ones(4, 2).bfloat16())


@pytest.mark.parametrize("fmt", ["bf16", "int8", "int4:g32"])
@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_vecmat_weight_brings_its_own_layout_and_scales(fmt, dtype):
    weight = vecmat.quantize(torch.randn(24, 64), fmt)  # (N, K), though transposed_mode says (K, N)
    x = torch.randn(2, 5, 64).bfloat16()
    y = op_for(dtype)(x, weight)
    assert far(y, x.double() @ weight.dequantize(torch.float64).T) < 2 * ROUNDING[torch.bfloat16]


# int8 as DeepSpeed stores it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("groups", "columns"), [(1, 1), (1, 3), (8, 3), (32, 1), (32, 3)])
def test_int8_reads_the_first_scales_of_the_flat_buffer_by_groups_of_rows(dtype, transposed, groups, columns):
    x, weight = torch.randn(2, 3, 64).to(dtype), quantised(32, 64, groups, columns)
    y = op_for("int8", transposed_mode=transposed)(x, weight)
    assert y.dtype == dtype
    assert far(y, exact_int8(x, weight)) < 2 * ROUNDING[dtype]


def test_int8_through_the_fp16_function_of_our_module_is_the_same():
    x, weight = torch.randn(3, 64), quantised(32, 64, 4)
    y = InferenceModule().vector_matmul_fp16(x, weight, False, weight.scale, True, False)
    assert far(y, exact_int8(x, weight)) < 2e-6


@pytest.mark.parametrize("transposed", [False, True])
def test_a_floating_point_weight_under_int8_is_multiplied_as_it_is(transposed):
    x, weight = torch.randn(3, 16), torch.nn.Parameter(torch.randn(16, 16), requires_grad=False)
    weight.scale = torch.full((1,), torch.nan)  # what DeepSpeed puts on a layer it leaves alone: nobody may read it
    exact = x.double() @ (weight.T if transposed else weight).double()
    assert far(op_for("int8", transposed_mode=transposed)(x, weight), exact) < ROUNDING[torch.float32]


def test_an_int8_weight_is_prepared_once():
    op, other, x, weight = op_for("int8"), op_for("int8"), torch.randn(1, 64), quantised(32, 64, 4)
    op(x, weight)
    made = BaseOp.inference_module.operand(weight, weight.scale, True)
    op(x.bfloat16(), weight)
    other(x, weight)
    assert BaseOp.inference_module.operand(weight, weight.scale, True) is made
    assert made.data.data_ptr() == weight.data_ptr()  # and nothing is copied


def change_the_weight_in_place(weight: Tensor) -> None:
    weight.copy_(torch.randint(-127, 128, weight.shape, dtype=torch.int8))


def change_the_scale_in_place(weight: Tensor) -> None:
    weight.scale.mul_(2)


def replace_the_scale(weight: Tensor) -> None:
    weight.scale = weight.scale * 3


def replace_the_scale_by_a_view_of_it(weight: Tensor) -> None:
    weight.scale = weight.scale[:2]  # the same memory: fewer groups


def replace_the_weights_data(weight: Tensor) -> None:
    weight.data = torch.randint(-127, 128, weight.shape, dtype=torch.int8)


@pytest.mark.parametrize(
    "change",
    [
        change_the_weight_in_place,
        change_the_scale_in_place,
        replace_the_scale,
        replace_the_scale_by_a_view_of_it,
        replace_the_weights_data,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_weight_or_scale_is_seen(change, dtype):
    op, x, weight = op_for("int8"), torch.randn(4, 64).to(dtype), quantised(32, 64, 4)
    before = op(x, weight)
    made = BaseOp.inference_module.operand(weight, weight.scale, True)
    change(weight)
    after = op(x, weight)
    assert not torch.equal(before, after)
    assert far(after, exact_int8(x, weight)) < 2 * ROUNDING[dtype]
    assert BaseOp.inference_module.operand(weight, weight.scale, True) is not made  # nor its packed copies


def test_an_int8_weight_is_freed_with_its_last_owner():
    op, x, weight = op_for("int8"), torch.randn(4, 64).bfloat16(), quantised(32, 64, 4)
    op(x, weight)
    module = BaseOp.inference_module
    gone = [
        weakref.ref(weight),
        weakref.ref(weight.scale),
        weakref.ref(module.operand(weight, weight.scale, True).scale),
    ]
    gc.disable()  # it must not take a collection
    try:
        del weight
        assert [ref() for ref in gone] == [None, None, None]
    finally:
        gc.enable()
    assert not module._kept


def test_an_int8_weight_made_in_inference_mode_works():
    with torch.inference_mode():
        x, weight = torch.randn(4, 64), quantised(32, 64, 4)
        op = op_for("int8")
        assert far(op(x, weight), exact_int8(x, weight)) < 2e-6
        assert far(op(x, weight), exact_int8(x, weight)) < 2e-6


def test_an_int8_weight_that_is_a_strided_view_works():
    base = quantised(64, 32, 4)
    weight = base.t()
    weight.scale = base.scale
    x = torch.randn(4, 64).bfloat16()
    assert far(op_for("int8")(x, weight), exact_int8(x, weight)) < 2 * ROUNDING[torch.bfloat16]


def with_scale(scale: object, shape: tuple[int, ...] = (32, 64), dtype: torch.dtype = torch.int8) -> Tensor:
    weight = torch.ones(shape, dtype=dtype)
    if scale is not None:
        weight.scale = scale
    return weight


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (with_scale(None), r"needs weight.scale of shape \(groups, \.\.\.\).*int8 \(32, 64\), scale \(0,\)"),
        (with_scale(torch.ones(())), r"needs weight.scale of shape"),
        (with_scale(torch.ones(5, 1)), r"scale has 5 groups, which do not divide the weight's N=32"),
        (with_scale(torch.ones(64, 1)), r"scale has 64 groups"),
        (with_scale(torch.ones(4, 1), dtype=torch.uint8), r"no int8 matrix .*torch.uint8"),
        (with_scale(torch.ones(4, 1), dtype=torch.int32), r"no int8 matrix .*torch.int32"),
        (with_scale(torch.ones(1, 1), shape=(64,)), r"no int8 matrix"),
        (with_scale(torch.tensor([[1.0], [torch.nan]])), r"scale\[16, 0\] is nan"),
        (with_scale(torch.tensor([[0.0], [torch.inf]])), r"scale\[16, 0\] is inf"),
    ],
)
def test_an_int8_weight_that_cannot_be_read_raises(weight, told):
    with pytest.raises(ValueError, match=told):
        op_for("int8")(torch.ones(1, 64), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_group_with_scale_zero_is_zero_whatever_its_integers_are(dtype):
    weight, x = quantised(32, 64, 4), torch.randn(3, 64).to(dtype)
    weight.scale[0, 1] = 0  # the second value of the flat buffer
    stored = weight.clone()
    y = op_for("int8")(x, weight)
    assert not y[:, 8:16].any()
    assert far(y, exact_int8(x, weight)) < 2 * ROUNDING[dtype]
    assert torch.equal(weight, stored)


def test_a_scale_that_is_no_tensor_raises():
    with pytest.raises(TypeError, match="scale is float; expected a tensor"):
        op_for("int8")(torch.ones(1, 64), with_scale(0.5))


def test_an_int8_weight_under_a_floating_point_config_raises():
    with pytest.raises(TypeError, match=r"torch\.int8"):
        op_for("fp32")(torch.ones(1, 64), quantised(64, 64, 4))


# The op as a module


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda op: pickle.loads(pickle.dumps(op))])
@pytest.mark.parametrize("has_module", [True, False])
def test_an_op_is_copied_and_pickled(monkeypatch, copied, has_module):
    if not has_module:
        monkeypatch.setattr(BaseOp, "inference_module", types.SimpleNamespace())
        monkeypatch.setenv("DS_KI_FALLBACK", "True")
    op, x, weight = op_for("fp32"), torch.randn(3, 16), torch.randn(16, 8)
    op._streams[torch.device("cuda:0")] = object()  # stands for a stream: neither may travel
    other = copied(op)
    assert not other._streams
    assert other.config is not op.config
    assert torch.equal(other(x, weight), op(x, weight))


def test_an_int8_op_is_copied_without_what_it_keeps():
    op, x, weight = op_for("int8"), torch.randn(3, 64), quantised(32, 64, 4)
    op(x, weight)
    other = pickle.loads(pickle.dumps(op))
    assert not other.vector_matmul_func.__self__._kept
    assert torch.equal(other(x, weight), op(x, weight))


@pytest.mark.parametrize("use_triton", [False, True])
def test_async_on_a_cpu_runs_at_once_and_wait_does_nothing(use_triton):
    op, x, weight = op_for("fp16", use_triton=use_triton), torch.randn(3, 64).half(), torch.randn(64, 32).half()
    y = op(x, weight, async_op=True)
    assert far(y, x.double() @ weight.double()) < ROUNDING[torch.float16]
    assert op.wait() is None
    assert not op._streams


# The side stream (torch.cuda._sleep counts cycles: 2e8 are about a tenth of a second)


def on_cuda(dtype: str, device: torch.device) -> tuple[VectorMatMulOp, Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """An op, an input (64, 1024) and a weight for it, and the exact product of an input with that weight."""
    x = torch.randn(64, 1024, device=device).half()
    if dtype == "int8":
        weight: Tensor = quantised(512, 1024, 8, device=device)
        return op_for(dtype), x, weight, lambda x: exact_int8(x, weight)
    weight = torch.randn(1024, 512, device=device).half()
    return op_for(dtype), x, weight, lambda x: (x.double() @ weight.double()).cpu()


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_the_async_product_comes_after_the_work_the_current_stream_has(dtype):
    op, x, weight, exact = on_cuda(dtype, torch.device("cuda"))
    late = torch.randn_like(x)
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e8))
    x.copy_(late)  # after the sleep: a product that does not wait reads the old values
    y = op(x, weight, async_op=True)
    op.wait()
    assert far(y.clone(), exact(late)) < 2 * ROUNDING[torch.float16]


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_the_async_product_runs_beside_the_current_stream_until_wait(dtype):
    op, x, weight, exact = on_cuda(dtype, torch.device("cuda"))
    op(x, weight, async_op=True)  # compiles, packs, makes the stream
    torch.cuda.synchronize()
    (side,) = op._streams.values()
    with torch.cuda.stream(side):
        torch.cuda._sleep(int(1e9))
    y = op(x, weight, async_op=True)
    torch.cuda.current_stream().synchronize()  # nothing of the product is on this stream
    assert not side.query()
    op.wait()
    copied = y.clone()
    assert far(copied, exact(x)) < 2 * ROUNDING[torch.float16]
    assert side.query()


@pytest.mark.gpu
@cuda
@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_inputs_dropped_right_after_the_async_call_are_not_overwritten(dtype):
    one, x, weight, exact = on_cuda(dtype, torch.device("cuda"))
    two = op_for(dtype)
    wanted = exact(x)
    for op in (one, two):
        op(x, weight, async_op=True)
    torch.cuda.synchronize()
    for op in (one, two):
        with torch.cuda.stream(next(iter(op._streams.values()))):
            torch.cuda._sleep(int(2e8))
    results = []
    for op in (one, two):
        mine = x.clone()
        results.append(op(mine, weight, async_op=True))
        del mine
        spoiled = [torch.full_like(x, torch.nan) for _ in range(8)]
    one.wait()
    two.wait()
    assert len(spoiled) == 8
    for y in results:
        assert far(y.clone(), wanted) < 2 * ROUNDING[torch.float16]


@pytest.mark.gpu
@cuda
def test_a_dropped_result_is_not_reused_before_the_current_stream_has_read_it():
    op, x, weight, exact = on_cuda("fp16", torch.device("cuda"))
    op(x, weight, async_op=True)
    op.wait()
    torch.cuda.synchronize()
    (side,) = op._streams.values()
    y = op(x, weight, async_op=True)
    op.wait()
    torch.cuda._sleep(int(2e8))
    read = y.clone()  # after the sleep
    shape = y.shape
    del y
    with torch.cuda.stream(side):
        spoiled = [torch.full(shape, torch.nan, dtype=torch.float16, device="cuda") for _ in range(8)]
    assert len(spoiled) == 8
    assert far(read, exact(x)) < 2 * ROUNDING[torch.float16]


@pytest.mark.gpu
@cuda
def test_a_weight_packed_by_an_async_call_is_ready_for_a_plain_one():
    op, x, weight, exact = on_cuda("int8", torch.device("cuda"))
    first = op(x, weight, async_op=True)
    second = op(x, weight)
    op.wait()
    for y in (first, second):
        assert far(y.clone(), exact(x)) < 2 * ROUNDING[torch.float16]


@pytest.mark.gpu
@cuda
def test_a_users_function_is_called_on_the_current_stream_with_the_flag(monkeypatch):
    seen = []

    def function(input, weight, async_op, q_scale, q_int8, transpose):
        seen.append((async_op, torch.cuda.current_stream()))
        return input

    monkeypatch.setattr(BaseOp, "inference_module", types.SimpleNamespace(vector_matmul_fp16=function))
    op = op_for("fp16")
    op(torch.ones(1, 1, device="cuda"), torch.ones(1, 1, device="cuda"), async_op=True)
    assert seen == [(True, torch.cuda.current_stream())]
    assert not op._streams


@pytest.mark.gpu
@cuda
def test_a_used_op_is_copied_without_its_stream():
    op, x, weight, exact = on_cuda("fp16", torch.device("cuda"))
    op(x, weight, async_op=True)
    op.wait()
    for other in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        y = other(x, weight, async_op=True)
        other.wait()
        assert far(y.clone(), exact(x)) < 2 * ROUNDING[torch.float16]


# DeepSpeed's matmul


@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
@pytest.mark.parametrize("use_triton", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(
    ("activation", "exact"),
    [
        ("", lambda y: y),
        ("relu", lambda y: y.clamp(min=0)),
        ("leaky_relu", lambda y: torch.where(y > 0, y, 0.01 * y)),
        ("gelu", lambda y: y / (1 + torch.exp(-1.702 * y))),
        ("sigmoid", lambda y: 1 / (1 + torch.exp(-y))),
    ],
)
def test_matmul_adds_the_bias_and_applies_the_activation(shape, use_triton, biased, activation, exact):
    a, b = torch.randn(shape).half(), torch.randn(64, 32).half() / 8
    bias = torch.randn(32).half() if biased else None
    wanted = a.double() @ b.double()
    wanted = exact(wanted if bias is None else wanted + bias.double())
    y = matmul(a, b, bias=bias, activation=activation, use_triton=use_triton)
    assert y.dtype == torch.float16
    assert far(y, wanted) < 3 * ROUNDING[torch.float16]
    assert torch.equal(Fp16Matmul.forward(a, b, use_triton, bias, activation), y)


@pytest.mark.parametrize("activation", ["tanh", "GELU", None])
def test_matmul_with_an_unknown_activation_raises(activation):
    with pytest.raises(ValueError, match=r"activation is .*expected one of.*'gelu', 'leaky_relu', 'relu', 'sigmoid'"):
        matmul(torch.ones(1, 2), torch.ones(2, 1), activation=activation)
