"""DeepSpeed-Inference's names for a product, on vecmat's dispatch: change the import and keep the calls.

``VectorMatMulOp(config)(input, weight)`` chooses a function by ``config.dtype`` and calls it. The functions are looked
up on ``BaseOp.inference_module``: an ``InferenceModule`` of this file, unless you put an object of your own there. All
of them, yours too, are called with ``(input, weight, async_op, q_scale, q_int8, transpose)``:

==========  ===================================================================================================
input       (..., K), of any number of dimensions
weight      dense (K, N), or (N, K) if ``transpose``; int8 (N, K) always; or a ``vecmat.Weight``, which knows itself
async_op    the caller will call ``op.wait()`` before it uses the result (CUDA only; see ``VectorMatMulOp.forward``)
q_scale     ``weight.scale``, or an empty tensor if the weight has none
q_int8      whether ``config.dtype`` is int8; a weight that stayed floating-point is multiplied as it is
transpose   ``config.transposed_mode``
==========  ===================================================================================================

The package ``deepspeed`` is imported by ``install`` and ``installed`` alone: they put this file's operator in the
place of DeepSpeed's own, for DeepSpeed's inference modules to make and call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from . import ops, table, tuner
from .deepspeed_config import ActivationFuncType, DeepSpeedInferenceConfig, NormType, TransformerConfig
from .deepspeed_install import Replacement
from .device import Device
from .dispatch import choose
from .problem import bucket
from .weights import Weight

__all__ = [
    "ActivationFuncType", "BaseOp", "DeepSpeedInferenceConfig", "Fp16Matmul", "InferenceModule",
    "InstalledVectorMatMulOp", "NormType", "TransformerConfig", "VectorMatMulOp", "autotune_lengths", "install",
    "installed", "matmul", "uninstall", "vector_matmul_func",
]  # fmt: skip

_FUNCTIONS = {  # the first one that the inference module has
    torch.float16: ("vector_matmul_fp16",),
    torch.bfloat16: ("vector_matmul_bf16",),
    torch.int8: ("vector_matmul_int8", "vector_matmul_fp16"),
}
_NO_SCALE = torch.empty(0, device="cpu")  # stands for the scale of a weight without one; nobody reads it


def __getattr__(name: str) -> Any:
    if name == "HAS_TRITON":  # DeepSpeed's other public name; the package looks it up when asked
        return importlib.import_module("vecmat").HAS_TRITON
    raise AttributeError(f"module 'vecmat.deepspeed' has no attribute {name!r}")


class _Kept(NamedTuple):
    """A Weight made of an int8 tensor and its scale, and what must still hold for it to be theirs."""

    weight: weakref.ref[Tensor]
    q_scale: Tensor
    stamp: tuple[int, ...]
    stored: Weight


class InferenceModule:
    """The functions that an op looks up, through ``vecmat.matmul`` on any device; what the tensors are decides.

    int8 weights are turned into a ``vecmat.Weight``, and packed for the kernels, once per weight tensor. It is made
    anew when the weight or its scale is replaced or changed in place, and goes when the weight goes. A change
    through ``.data``, or of a tensor made under ``torch.inference_mode()``, leaves no trace in torch's version
    counter and is not seen: assign a new tensor instead.
    """

    def __init__(self) -> None:
        self._kept: dict[int, _Kept] = {}

    def vector_matmul(self, input: Tensor, weight: Tensor | Weight, async_op: bool, q_scale: Tensor, q_int8: bool,
                      transpose: bool) -> Tensor:  # fmt: skip
        """The product (..., N), freshly allocated, on the current stream; the arguments are the module's top.

        Raises what ``vecmat.matmul`` raises, and ``ValueError`` for int8 weights as ``operand`` says.
        """
        return ops.matmul(input, self.operand(weight, q_scale, q_int8), layout="nk" if transpose else "kn")

    vector_matmul_fp16 = vector_matmul_bf16 = vector_matmul_fp32 = vector_matmul_int8 = vector_matmul

    def operand(self, weight: Tensor | Weight, q_scale: Tensor, q_int8: bool) -> Tensor | Weight:
        """What is multiplied: the weight itself, or the Weight kept for an int8 tensor (N, K) and its scale.

        q_scale: (groups, ...); the first ``groups`` values of the flat buffer each scale N / groups consecutive rows.
        That is how DeepSpeed's ``GroupQuantizer`` stores them, (groups, 3) of which the rest belongs to halves of the
        weight, and how its CUDA kernel reads them. A group of zeros has scale 0 there, and is zero here too.

        Raises ``ValueError`` if the weight is no int8 matrix, there is no scale, groups does not divide N, or a scale
        is not finite.
        """
        if not q_int8 or not isinstance(weight, Tensor) or weight.is_floating_point():
            return weight
        if not isinstance(q_scale, Tensor):
            raise TypeError(f"vector_matmul: scale is {type(q_scale).__name__}; expected a tensor")
        stamp = (_version(weight), weight.data_ptr(), _version(q_scale), q_scale.data_ptr())
        kept = self._kept.get(id(weight))
        if kept is not None and kept.weight() is weight and kept.q_scale is q_scale and kept.stamp == stamp:
            return kept.stored
        stored = _from_int8(weight, q_scale)
        forget = weakref.ref(weight, functools.partial(self._forget, id(weight)))
        self._kept[id(weight)] = _Kept(forget, q_scale, stamp, stored)
        return stored

    def _forget(self, key: int, dead: object) -> None:
        self._kept.pop(key, None)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy, in memory or pickled, keeps its own weights
        return type(self), ()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _from_int8(weight: Tensor, q_scale: Tensor) -> Weight:
    """The Weight that reads an int8 matrix (N, K) and its row-group scales; raises what ``operand`` says."""
    told = f"(weight {weight.dtype} {tuple(weight.shape)}, scale {tuple(q_scale.shape)})"
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(f"vector_matmul: weight is no int8 matrix (N, K), as dtype int8 stores it {told}")
    if q_scale.dim() == 0 or q_scale.numel() == 0:
        raise ValueError(f"vector_matmul: an int8 weight needs weight.scale of shape (groups, ...) {told}")
    n, groups = weight.shape[0], q_scale.shape[0]
    if n % groups:
        raise ValueError(f"vector_matmul: scale has {groups} groups, which do not divide the weight's N={n} {told}")
    rows = q_scale.detach().reshape(-1)[:groups].float().repeat_interleave(n // groups).view(n, 1)
    # .data: a Weight that held the tensor itself would keep it, and so its own entry, alive for ever.
    data, dead = weight.data.contiguous(), rows == 0
    if not data.is_meta and bool(dead.any()):  # a Weight has no zero scales
        data, rows = data.masked_fill(dead, 0), rows.masked_fill(dead, 1)
    return Weight("int8", data, rows)


def vector_matmul_func(input: Tensor, weight: Tensor | Weight, async_op: bool, q_scale: Tensor, q_int8: bool,
                       transposed_mode: bool) -> Tensor:  # fmt: skip
    """The product (..., N) that fp16 takes with ``use_triton``: every kernel is a candidate, Triton's among them.

    It asks no inference module. Raises what ``vecmat.matmul`` raises.
    """
    return ops.matmul(input, weight, layout="nk" if transposed_mode else "kn")


class BaseOp(torch.nn.Module):
    """An operation with a config, and the inference module that all of them share.

    inference_module: None until the first op is made, then an ``InferenceModule``. Set another object with the same
    functions here and ops made from then on use it.
    """

    inference_module: ClassVar[Any] = None

    def __init__(self, config: DeepSpeedInferenceConfig) -> None:
        super().__init__()
        self.config = config
        if BaseOp.inference_module is None:
            BaseOp.inference_module = InferenceModule()


class VectorMatMulOp(BaseOp):
    """input @ weight by the function that ``config.dtype`` chooses, ``vector_matmul_func``.

    fp16 takes this file's function of that name if Triton is installed and ``config.use_triton`` (and layer 0 tunes
    it first if ``config.triton_autotune``), else the inference module's ``vector_matmul_fp16``; bf16 its
    ``vector_matmul_bf16``; int8 its ``vector_matmul_int8``, or ``vector_matmul_fp16`` where it lacks that; any other
    dtype its ``vector_matmul_fp32``. Where the module has none, ``vector_matmul_fallback`` is chosen.
    """

    def __init__(self, config: DeepSpeedInferenceConfig) -> None:
        super().__init__(config)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self.vector_matmul_func: Callable[..., Tensor] = self._select()

    def _select(self) -> Callable[..., Tensor]:
        config = self.config
        if config.dtype == torch.float16 and config.use_triton and importlib.import_module("vecmat").HAS_TRITON:
            if config.triton_autotune and config.layer_id == 0:
                self._triton_autotune(2, config.max_out_tokens, config.hidden_size)
            return vector_matmul_func
        module = self.inference_module
        for name in _FUNCTIONS.get(config.dtype, ("vector_matmul_fp32",)):
            try:
                return getattr(module, name)  # type: ignore[no-any-return]
            except AttributeError:
                continue
        return self.vector_matmul_fallback

    def vector_matmul_fallback(self, input: Tensor, weight: Tensor, async_op: bool, q_scale: Tensor, q_int8: bool,
                               transpose: bool) -> Tensor:  # fmt: skip
        """torch.matmul(input, weight), if the environment says DS_KI_FALLBACK=True and ``transpose`` is false.

        Raises ``NotImplementedError`` otherwise.
        """
        found = os.environ.get("DS_KI_FALLBACK")
        if found == "True" and not transpose:
            return torch.matmul(input, weight)
        raise NotImplementedError(
            "vector_matmul_fallback: the inference module has no function for this dtype, and torch.matmul takes its "
            f"place only if DS_KI_FALLBACK is 'True' in the environment (found {found!r}) and transposed_mode is "
            f"False (found {transpose!r})"
        )

    def forward(self, input: Tensor, weight: Tensor | Weight, async_op: bool = False) -> Tensor:
        """The product (..., N), freshly allocated.

        input: (..., K). weight: see the module's top; ``weight.scale`` is passed on if there is one.

        async_op: on CUDA the product runs on the op's own side stream, after the work that the current stream has so
        far; call ``wait()`` before the result is used on the stream that called. The tensors may be dropped at once:
        their memory is not reused before the side stream is done, nor the result's before the calling stream is. On
        a CPU it changes nothing. A function of a module of your own is called as it is, with the flag.

        Raises what the chosen function raises.
        """
        scale = getattr(weight, "scale", None)
        q_scale = _NO_SCALE if scale is None else scale
        q_int8 = self.config.dtype == torch.int8
        if async_op and input.is_cuda and self._owns_function():
            return self._run_beside(input, weight, q_scale, q_int8)
        return self.vector_matmul_func(input, weight, async_op, q_scale, q_int8, self.config.transposed_mode)

    def wait(self) -> None:
        """Make the current stream of each device wait for what this op runs beside it; the host does not wait."""
        for device, side in self._streams.items():
            torch.cuda.current_stream(device).wait_stream(side)

    def _owns_function(self) -> bool:
        owner = getattr(self.vector_matmul_func, "__self__", None)
        return owner is self or isinstance(owner, InferenceModule) or self.vector_matmul_func is vector_matmul_func

    def _run_beside(self, input: Tensor, weight: Tensor | Weight, q_scale: Tensor, q_int8: bool) -> Tensor:
        """The product on the side stream of input's device, as ``forward`` describes it."""
        side = self._streams.get(input.device)
        if side is None:
            side = self._streams[input.device] = torch.cuda.Stream(input.device)  # type: ignore[no-untyped-call]
        current = torch.cuda.current_stream(input.device)
        owner = getattr(self.vector_matmul_func, "__self__", None)
        if isinstance(owner, InferenceModule):  # made on the current stream, whose later calls find it again
            weight = owner.operand(weight, q_scale, q_int8)
        packs = len(weight.packs) if isinstance(weight, Weight) else 0
        side.wait_stream(current)
        with torch.cuda.stream(side):
            output = self.vector_matmul_func(input, weight, True, q_scale, q_int8, self.config.transposed_mode)
        for tensor in _tensors((input, weight, q_scale)):
            tensor.record_stream(side)
        output.record_stream(current)
        if isinstance(weight, Weight) and len(weight.packs) > packs:
            # A kernel packed the weight on the side stream just now; a plain call will read the same copy.
            current.wait_stream(side)
            for tensor in _tensors(weight):
                tensor.record_stream(current)
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": {}}  # a stream is this process's own; the copy makes its own

    @staticmethod
    def _triton_autotune(min_seqlen: int, max_seqlen: int, hidden_size: int,
                         dtype: torch.dtype = torch.float16) -> None:  # fmt: skip
        """None; the best kernel of each length's problem, hidden x hidden, is in the user's table afterwards.

        One product is timed per bucket of lengths that the table knows, on the current CUDA device or the CPU, and
        none where a table has a row already. Raises ``ValueError`` if hidden_size is not positive.
        """
        if hidden_size <= 0:
            raise ValueError(f"triton_autotune: hidden_size is {hidden_size}; expected the layer's own, 1 or more")
        Fp16Matmul._read_autotune_table()
        where = _tuning_device()
        random = torch.Generator(where).manual_seed(0)  # the caller's random numbers stay as they were
        b = torch.randn(hidden_size, hidden_size, generator=random, device=where, dtype=dtype)
        for m in {bucket(m): m for m in autotune_lengths(min_seqlen, max_seqlen)}.values():
            Fp16Matmul._warm_up(torch.randn(m, hidden_size, generator=random, device=where, dtype=dtype), b)
        Fp16Matmul._update_autotune_table()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every CUDA tensor in a value: a tensor, a Weight with its packed forms, or a nest of tuples, lists, dicts."""
    if isinstance(value, Tensor):
        if value.is_cuda:
            yield value
    elif isinstance(value, Weight):
        yield from _tensors((value.data, value.scale, value.zero, value.packs))
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def autotune_lengths(min_seqlen: int, max_seqlen: int) -> list[int]:
    """The sequence lengths that autotuning covers: from the least, a stride apart, until one passes the most."""
    return list(range(min_seqlen, max_seqlen + Fp16Matmul._cache_stride + 1, Fp16Matmul._cache_stride))


def _tuning_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class Fp16Matmul:
    """DeepSpeed's handle on the 16-bit product and on its tuning table, which is vecmat's (a JSON file)."""

    _cache_stride: ClassVar[int] = 32
    _measured: ClassVar[dict[str, dict[str, table.Row]]] = {}  # by device and problem: rows still to be written

    @staticmethod
    def forward(A: Tensor, B: Tensor, use_triton: bool = True, bias: Tensor | None = None,
                activation: str = "") -> Tensor:  # fmt: skip
        """The product (..., N) of A (..., K) and B (K, N), plus bias (N,), through the activation; see ``matmul``."""
        if activation not in _ACTIVATIONS:
            raise ValueError(f"matmul: activation is {activation!r}; expected one of {sorted(_ACTIVATIONS)}")
        if use_triton:
            y = ops.matmul(A, B, bias, layout="kn")
        else:
            y = torch.matmul(A, B) if bias is None else torch.matmul(A, B) + bias
        return _ACTIVATIONS[activation](y.float()).to(y.dtype) if activation else y

    @staticmethod
    def _read_autotune_table() -> None:
        """None; the user's table of the device that would be tuned is in memory afterwards, if there is one."""
        name = Device.of(_tuning_device()).name
        table.user_table(name, table.path(name))

    @staticmethod
    def _update_autotune_table() -> None:
        """None; what was measured since the last time is in the user's table. One that cannot be written warns."""
        for name, rows in list(Fp16Matmul._measured.items()):
            if table.save(name, rows):
                del Fp16Matmul._measured[name]

    @staticmethod
    def _warm_up(a: Tensor, b: Tensor) -> None:
        """None; the fastest kernel for a (..., K) @ b (K, N) is measured, unless a table names one already."""
        problem, device = ops.bind_problem(a.detach(), b.detach(), layout="kn")
        known = problem.key() in Fp16Matmul._measured.get(device.name, ())
        if known or choose(problem, device).decided_by != "lowest estimate":
            return
        found = tuner.tune(problem, device)
        if found is not None:
            Fp16Matmul._measured.setdefault(device.name, {})[problem.key()] = found.row


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "relu": torch.relu,
    "leaky_relu": functools.partial(torch.nn.functional.leaky_relu, negative_slope=0.01),
    "gelu": lambda y: torch.sigmoid(1.702 * y) * y,
    "sigmoid": torch.sigmoid,
}


def matmul(A: Tensor, B: Tensor, bias: Tensor | None = None, activation: str = "", use_triton: bool = True,
           update_autotune_table: bool = False) -> Tensor:  # fmt: skip
    """activation(A @ B + bias), (M, N) or (B, M, N), freshly allocated.

    A: (M, K) or (B, M, K). B: (K, N). bias: (N,). activation: "", "relu", "leaky_relu" (slope 0.01), "gelu" (y times
    the sigmoid of 1.702 y) or "sigmoid", computed in fp32 on the rounded product. use_triton: False multiplies by
    ``torch.matmul``. update_autotune_table: then measure this problem, unless a table has it, and write the table.

    Raises ``ValueError`` for another activation, and what ``vecmat.matmul`` raises.
    """
    C = Fp16Matmul.forward(A, B, use_triton=use_triton, bias=bias, activation=activation)
    if update_autotune_table:
        if use_triton:
            Fp16Matmul._warm_up(A, B)
        Fp16Matmul._update_autotune_table()
    return C


class InstalledVectorMatMulOp(VectorMatMulOp):
    """The operator as DeepSpeed's modules make it. They never call ``wait``, so ``async_op`` runs nothing beside."""

    def forward(self, input: Tensor, weight: Tensor | Weight, async_op: bool = False) -> Tensor:
        """The product (..., N), as ``VectorMatMulOp.forward`` says, on the current stream whatever async_op is."""
        return super().forward(input, weight)


_REPLACEMENT = Replacement(InstalledVectorMatMulOp)


def install() -> None:
    """None; DeepSpeed's inference modules that are made from now on multiply with vecmat, until ``uninstall``.

    Imports DeepSpeed and binds ``VectorMatMulOp`` to ``InstalledVectorMatMulOp`` in every imported module that has
    DeepSpeed's class under that name, its own and yours; modules imported later find it too. Modules made before keep
    the op they have. Installing again changes nothing.

    It is the whole process's: a module that another thread makes meanwhile gets either operator, each a working one.

    Raises ``ImportError``, and replaces nothing, if DeepSpeed is not installed or has its class elsewhere.
    """
    _REPLACEMENT.install()


def uninstall() -> None:
    """None; each module has the class that it had before ``install``. Without an ``install`` it changes nothing."""
    _REPLACEMENT.uninstall()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """``with installed():`` modules made inside multiply with vecmat, also after it. Raises what ``install`` raises.

    Inside another, or after ``install``, it changes nothing, at its end neither. The whole process's, as ``install``.
    """
    mine = _REPLACEMENT.install()
    try:
        yield
    finally:
        if mine:
            _REPLACEMENT.uninstall()
