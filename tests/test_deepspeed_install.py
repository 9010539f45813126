"""vecmat's operator in DeepSpeed's own modules: what they make, what it computes, and what uninstall leaves.

DeepSpeed's modules run here on any machine: with an inference module that has no kernels, DeepSpeed's own ops choose
their Python fallbacks, and everything around the product is DeepSpeed's code.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import pickle
import re
import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from oracle import Truth
from vecmat import deepspeed
from vecmat.deepspeed import InstalledVectorMatMulOp


def needs_deepspeed(test: Any) -> Any:
    """A test that runs DeepSpeed's code, on the device that DeepSpeed itself chooses: the GPU where there is one."""
    absent = importlib.util.find_spec("deepspeed") is None
    test = pytest.mark.gpu(test) if torch.cuda.is_available() else test
    return pytest.mark.skipif(absent, reason="DeepSpeed is not installed (pip install deepspeed)")(test)


INFERENCE = "deepspeed.ops.transformer.inference"
BOUND = ("op_binding", "op_binding.vector_matmul", "ds_attention", "ds_mlp", "moe_inference")


def part(name: str) -> Any:
    """A module of DeepSpeed's inference package."""
    return importlib.import_module(f"{INFERENCE}.{name}")


@pytest.fixture
def theirs(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """DeepSpeed's class; its modules count from layer 0, with room for their keys and values, and take fallbacks."""
    layers = importlib.import_module("deepspeed.model_implementations.transformers.ds_transformer")
    monkeypatch.setattr(part("op_binding.base").BaseOp, "inference_module", types.SimpleNamespace())
    monkeypatch.setattr(part("ds_attention").DeepSpeedSelfAttention, "num_layers", 0)
    monkeypatch.setattr(layers.DeepSpeedTransformerInference, "layer_id", 0)
    monkeypatch.setattr(layers.DeepSpeedTransformerInference, "workspace", None)
    yield part("op_binding").VectorMatMulOp
    deepspeed.uninstall()


def here() -> torch.device:
    """The device that DeepSpeed makes its parameters on."""
    return torch.device(importlib.import_module("deepspeed.accelerator").get_accelerator().current_device_name())


def their_config(dtype: torch.dtype, **changes: Any) -> Any:
    return part("config").DeepSpeedInferenceConfig(hidden_size=64, heads=4, dtype=dtype, **changes)


def fill(module: torch.nn.Module, seed: int = 0) -> None:
    """Random numbers for the floating-point parameters, which DeepSpeed leaves uninitialised."""
    random = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data.copy_(torch.randn(parameter.shape, generator=random) / 8)


def attend(config: Any, attention: torch.nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(its output (2, 5, 64), the context (2, 5, 64) that its last product multiplied) of a random prompt."""
    context = part("op_binding.workspace").InferenceContext.Instance()
    context.gen_workspace(1, config.heads, 2, 5, config.hidden_size, 1, False, dtype, 0, 32, 1)
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).to(here(), dtype)
    norm = torch.ones(64, dtype=dtype, device=here()), torch.zeros(64, dtype=dtype, device=here())
    output, _, _, multiplied, _ = attention(x, None, norm_w=norm[0], norm_b=norm[1])
    return output, multiplied


# What is bound, and where


@needs_deepspeed
def test_every_module_that_bound_the_class_before_has_ours_and_gets_its_own_back(theirs, monkeypatch):
    mine = types.ModuleType("mine")
    mine.VectorMatMulOp = mine.KeptForComparison = theirs
    monkeypatch.setitem(sys.modules, "mine", mine)
    bound = [*map(part, BOUND), mine]
    deepspeed.install()
    assert [module.VectorMatMulOp for module in bound] == [InstalledVectorMatMulOp] * len(bound)
    assert mine.KeptForComparison is theirs
    deepspeed.uninstall()
    assert [module.VectorMatMulOp for module in bound] == [theirs] * len(bound)


@needs_deepspeed
def test_no_module_of_deepspeed_holds_the_class_under_another_name(theirs):
    deepspeed.install()
    holders = [
        f"{name}.{key}"
        for name, module in list(sys.modules.items())
        if name.startswith("deepspeed") and isinstance(module, types.ModuleType)
        for key, value in list(vars(module).items())
        if value is theirs
    ]
    assert not holders


@needs_deepspeed
def test_modules_imported_after_install_have_ours_and_get_deepspeeds_at_uninstall(python):
    code = f"""
import importlib, sys
from vecmat import deepspeed
deepspeed.install()
late = [importlib.import_module("{INFERENCE}." + name) for name in sys.argv[1:]]
exec("from {INFERENCE}.op_binding import VectorMatMulOp")
assert VectorMatMulOp is deepspeed.InstalledVectorMatMulOp
assert all(module.VectorMatMulOp is deepspeed.InstalledVectorMatMulOp for module in late)
deepspeed.uninstall()
classes = {{module.VectorMatMulOp for module in late}} | {{VectorMatMulOp}}
print(*[found.__module__ for found in classes])
"""
    triton = ("triton.attention", "triton.mlp") if importlib.util.find_spec("triton") else ()
    assert python(code, *BOUND, *triton).split()[-1] == f"{INFERENCE}.op_binding.vector_matmul"


@needs_deepspeed
def test_neither_importing_vecmat_nor_uninstall_imports_deepspeed(python):
    code = "import sys, vecmat.deepspeed as d; d.uninstall(); print('deepspeed' in sys.modules)"
    assert python(code).split() == ["False"]


@needs_deepspeed
def test_installing_twice_is_undone_once(theirs):
    deepspeed.install()
    deepspeed.install()
    assert part("ds_mlp").VectorMatMulOp is InstalledVectorMatMulOp
    deepspeed.uninstall()
    deepspeed.uninstall()
    assert {part(name).VectorMatMulOp for name in BOUND} == {theirs}


@needs_deepspeed
def test_another_class_in_one_module_is_left_alone_whenever_it_came(theirs, monkeypatch):
    class Before(theirs): ...

    class During(theirs): ...

    monkeypatch.setattr(part("ds_attention"), "VectorMatMulOp", Before)
    deepspeed.install()
    assert part("ds_attention").VectorMatMulOp is Before
    part("ds_mlp").VectorMatMulOp = During
    deepspeed.uninstall()
    found = [part(name).VectorMatMulOp for name in ("ds_attention", "ds_mlp", "op_binding")]
    part("ds_mlp").VectorMatMulOp = theirs
    assert found == [Before, During, theirs]


@needs_deepspeed
def test_a_class_that_somebody_had_put_into_the_package_comes_back(theirs, monkeypatch):
    class Other(theirs): ...

    monkeypatch.setattr(part("op_binding"), "VectorMatMulOp", Other)
    deepspeed.install()
    assert {part(name).VectorMatMulOp for name in BOUND} == {InstalledVectorMatMulOp}
    late = types.ModuleType("late")
    late.VectorMatMulOp = part("op_binding").VectorMatMulOp
    monkeypatch.setitem(sys.modules, "late", late)
    deepspeed.uninstall()
    assert part("op_binding").VectorMatMulOp is late.VectorMatMulOp is Other
    assert {part(name).VectorMatMulOp for name in BOUND[1:]} == {theirs}


@needs_deepspeed
def test_the_context_takes_back_only_what_it_put_there_itself(theirs):
    with deepspeed.installed():
        with deepspeed.installed():
            pass
        assert part("ds_mlp").VectorMatMulOp is InstalledVectorMatMulOp
    assert part("ds_mlp").VectorMatMulOp is theirs
    with contextlib.suppress(KeyError), deepspeed.installed():
        raise KeyError
    assert part("ds_mlp").VectorMatMulOp is theirs
    deepspeed.install()
    with deepspeed.installed():
        pass
    assert part("ds_mlp").VectorMatMulOp is InstalledVectorMatMulOp


@needs_deepspeed
def test_threads_that_install_and_uninstall_at_once_leave_deepspeeds_class(theirs):
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(50):
            deepspeed.install()
            deepspeed.uninstall()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {part(name).VectorMatMulOp for name in BOUND} == {theirs}


@needs_deepspeed
def test_a_module_that_loads_itself_when_asked_is_not_woken(theirs, monkeypatch, tmp_path):
    (tmp_path / "sleeper.py").write_text("raise AssertionError('woken')")
    spec = importlib.util.spec_from_file_location("sleeper", tmp_path / "sleeper.py")
    spec.loader = importlib.util.LazyLoader(spec.loader)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "sleeper", module)
    spec.loader.exec_module(module)
    deepspeed.install()
    deepspeed.uninstall()


# What DeepSpeed's modules compute with it


@needs_deepspeed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_deepspeeds_attention_ends_with_our_product(theirs, dtype, transposed):
    config = their_config(dtype, transposed_mode=transposed)
    with deepspeed.installed():
        attention = part("ds_attention").DeepSpeedSelfAttention(config)
    assert type(attention.vector_matmul_func) is InstalledVectorMatMulOp
    fill(attention)
    if transposed:
        attention.attn_qkvw.data = attention.attn_qkvw.data.t().contiguous()
    output, context = attend(config, attention, dtype)
    truth = Truth.of(context, attention.attn_ow, layout="nk" if transposed else "kn")
    assert truth.verdict(output) is None


@needs_deepspeed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deepspeeds_whole_layer_gives_what_it_gives_with_its_own_operator(theirs, dtype):
    layers = importlib.import_module("deepspeed.model_implementations.transformers.ds_transformer")
    outputs = []
    for ours in (False, True):
        part("ds_attention").DeepSpeedSelfAttention.num_layers = layers.DeepSpeedTransformerInference.layer_id = 0
        if ours:
            deepspeed.install()
        layer = layers.DeepSpeedTransformerInference(their_config(dtype, max_out_tokens=32))
        ops = [module for module in layer.modules() if isinstance(module, (theirs, InstalledVectorMatMulOp))]
        assert [isinstance(op, InstalledVectorMatMulOp) for op in ops] == [ours, ours]  # attention's and the MLP's
        fill(layer)
        random = torch.Generator().manual_seed(2)
        steps = [layer(torch.randn(2, m, 64, generator=random).to(here(), dtype))[0] for m in (5, 1)]
        outputs.append(torch.cat(steps, 1))
    assert outputs[0].shape == (2, 6, 64)
    few = 4 * torch.finfo(dtype).eps * float(outputs[0].abs().max())
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=few)


@needs_deepspeed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_deepspeeds_mlp_makes_our_operator_and_it_multiplies_its_weight(theirs, dtype):
    deepspeed.install()
    mlp = part("ds_mlp").DeepSpeedMLP(their_config(dtype))
    fill(mlp)
    x = torch.randn(2, 3, 256).to(here(), dtype)
    assert Truth.of(x, mlp.output_w, layout="kn").verdict(mlp.vector_matmul_func(x, mlp.output_w)) is None


@needs_deepspeed
def test_deepspeeds_moe_coefficients_come_from_our_product(theirs):
    moe = part("moe_inference")
    deepspeed.install()
    layer = moe.DeepSpeedMoEInference.__new__(moe.DeepSpeedMoEInference)  # its constructor fails in 0.16 to 0.19
    torch.nn.Module.__init__(layer)
    config = their_config(torch.float32)
    layer.vector_matmul_func, layer.coef_func = moe.VectorMatMulOp(config), lambda scores, *_: scores
    layer.res_coef = torch.nn.Parameter(torch.randn(64, 2, device=here()))
    x = torch.randn(2, 3, 64, device=here())
    assert Truth.of(x, layer.res_coef, layout="kn").verdict(layer.res_coef_func(x, True)) is None
    assert isinstance(moe.DeepSpeedMoEMLP(config).vector_matmul_func, InstalledVectorMatMulOp)


@needs_deepspeed
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_our_operator_takes_deepspeeds_config_and_a_copy_of_it(theirs, dtype):
    op = deepspeed.VectorMatMulOp(their_config(dtype, transposed_mode=True))
    x, weight = torch.randn(3, 64).to(here(), dtype), torch.randn(32, 64).to(here(), dtype)
    for each in (op, copy.deepcopy(op), pickle.loads(pickle.dumps(op))):
        assert Truth.of(x, weight).verdict(each(x, weight)) is None


@needs_deepspeed
def test_the_page_about_deepspeed_runs_as_it_is_written(theirs):
    page = (Path(__file__).parents[1] / "docs" / "deepspeed.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["op"]) is InstalledVectorMatMulOp
    assert Truth.of(names["x"].half(), dequantised(names["weight"], names["weight"].scale)).verdict(names["y"]) is None
    assert part("op_binding").VectorMatMulOp is theirs


# int8, as DeepSpeed's own quantiser stores it


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """The float64 matrix (N, K) that DeepSpeed's CUDA kernel makes: block g of N / groups rows times float g."""
    groups = scale.shape[0]
    flat = scale.flatten()[:groups].double()
    return (weight.double().reshape(groups, -1) * flat[:, None]).reshape(weight.shape)


def quantiser(groups: int) -> Any:
    return importlib.import_module("deepspeed.module_inject.replace_module").GroupQuantizer(num_groups=groups)


@needs_deepspeed
@pytest.mark.parametrize("groups", [0, 1, 4, 32])  # 0: a group a row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_int8_weights_of_deepspeeds_quantiser_are_multiplied_as_its_kernel_reads_them(
    theirs, groups, dtype, transposed
):
    dense = torch.randn(32, 64, generator=torch.Generator().manual_seed(3)) * torch.linspace(0.1, 3, 32)[:, None]
    dense = dense.to(here())
    weight = quantiser(groups).quantize(dense)
    read = dequantised(weight, weight.scale)
    step = (weight.scale.flatten()[: weight.scale.shape[0]]).repeat_interleave(32 // weight.scale.shape[0])
    assert ((read - dense).abs() <= 1.001 * step[:, None]).all()  # it is the weight, and no other scale's
    op = InstalledVectorMatMulOp(their_config(torch.int8, transposed_mode=transposed))
    x = torch.randn(2, 3, 64).to(here(), dtype)
    assert Truth.of(x, read).verdict(op(x, weight)) is None


@needs_deepspeed
def test_a_half_of_an_int8_weight_is_read_with_the_scales_that_deepspeeds_loader_gives_it(theirs):
    dense = (torch.randn(32, 64) * torch.linspace(0.1, 3, 64)).to(here())
    whole = quantiser(4).quantize(dense, parallel_dim=1)
    op, x = InstalledVectorMatMulOp(their_config(torch.int8)), torch.randn(3, 32, device=here())
    for rank in (0, 1):  # as its loader cuts the checkpoint's buffer, of which the first third is the whole's
        half = quantiser(4).quantize(dense[:, 32 * rank : 32 * rank + 32].contiguous())
        scale = whole.scale.view(-1)[4 * (rank + 1) :].reshape(4, -1).contiguous()
        part = torch.nn.Parameter(half.data, requires_grad=False)
        part.scale = scale
        read = dequantised(half, half.scale)
        assert torch.equal(read, dequantised(part, scale))
        assert Truth.of(x, read).verdict(op(x, part)) is None


@needs_deepspeed
def test_a_group_of_zeros_is_zero(theirs):
    dense = torch.randn(32, 64)
    dense[8:16] = 0
    weight = quantiser(4).quantize(dense)
    assert weight.scale.flatten()[1] == 0
    y = InstalledVectorMatMulOp(their_config(torch.int8))(torch.randn(3, 64, device=here()), weight)
    assert not y[:, 8:16].any()
    assert y[:, :8].all()


@needs_deepspeed
def test_deepspeeds_attention_runs_in_int8_with_ours_and_raises_with_its_own(theirs):
    config = their_config(torch.int8)
    for ours in (False, True):
        part("ds_attention").DeepSpeedSelfAttention.num_layers = 0
        if ours:
            deepspeed.install()
        attention = part("ds_attention").DeepSpeedSelfAttention(config)
        attention.attn_qkvw = torch.nn.Parameter(torch.empty(64, 192, device=here()).half(), requires_grad=False)
        fill(attention)
        attention.attn_ow = quantiser(8).quantize(torch.randn(64, 64))
        if ours:
            output, context = attend(config, attention, torch.float16)
            read = dequantised(attention.attn_ow, attention.attn_ow.scale)
            assert output.dtype == torch.float16
            assert Truth.of(context, read).verdict(output) is None
        else:
            with pytest.raises(RuntimeError, match="dtype"):
                attend(config, attention, torch.float16)


def test_what_deepspeed_does_not_wait_for_does_not_run_beside(monkeypatch):
    seen = []

    def function(input, weight, async_op, q_scale, q_int8, transpose):
        seen.append(async_op)
        return input

    monkeypatch.setattr(deepspeed.BaseOp, "inference_module", types.SimpleNamespace(vector_matmul_fp16=function))
    InstalledVectorMatMulOp(deepspeed.DeepSpeedInferenceConfig())(torch.ones(1, 1), torch.ones(1, 1), async_op=True)
    assert seen == [False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_the_result_is_on_the_current_stream_without_wait():
    op = InstalledVectorMatMulOp(deepspeed.DeepSpeedInferenceConfig())
    x, weight = torch.randn(2, 3, 64, device="cuda").half(), torch.randn(64, 32, device="cuda").half()
    assert Truth.of(x, weight, layout="kn").verdict(op(x, weight, async_op=True)) is None
    assert not op._streams


# Where DeepSpeed is not there, or not as known


def test_without_deepspeed_the_error_says_what_to_install(python):
    code = """
import sys
sys.modules["deepspeed"] = None
from vecmat import deepspeed
for enter in (deepspeed.install, deepspeed.installed().__enter__):
    try:
        enter()
    except ImportError as error:
        print(error.name, error, sep=": ")
deepspeed.uninstall()
"""
    told = "deepspeed: vecmat.deepspeed.install puts vecmat's operator into the package deepspeed, which is not "
    assert python(code).splitlines() == [told + "installed: pip install deepspeed"] * 2


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "has no class VectorMatMulOp in deepspeed.ops.transformer.inference.op_binding, where"),
        ({"op_binding/__init__.py": ""}, "VectorMatMulOp in deepspeed.ops.transformer.inference.op_binding, where"),
        (
            {"op_binding/__init__.py": "class VectorMatMulOp: ..."},
            "VectorMatMulOp in deepspeed.ops.transformer.inference.op_binding.vector_matmul, where",
        ),
        ({"op_binding/__init__.py": "import not_there"}, "No module named 'not_there'"),
        ({"op_binding/__init__.py": "import deepspeed.not_there"}, "No module named 'deepspeed.not_there'"),
    ],
)
def test_a_package_of_another_layout_is_named_and_left_alone(python, tmp_path: Path, files, told):
    files = {"__init__.py": "", **files} if files else {}
    for name, text in files.items():
        file = tmp_path / INFERENCE.replace(".", "/") / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (tmp_path / "deepspeed").mkdir(exist_ok=True)
    (tmp_path / "deepspeed" / "__init__.py").write_text("__version__ = '9.9.1'")
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from vecmat import deepspeed
try:
    deepspeed.install()
except ImportError as error:
    print(error)
print(deepspeed.InstalledVectorMatMulOp in [vars(m).get("VectorMatMulOp") for m in sys.modules.values() if m])
"""
    error, installed = python(code, str(tmp_path)).splitlines()
    assert told in error
    assert ("deepspeed 9.9.1" in error) == ("VectorMatMulOp" in error)
    assert installed == "False"
