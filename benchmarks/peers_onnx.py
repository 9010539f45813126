"""onnxruntime's ``MatMulNBits``: 4-bit weights in blocks of 128, x quantised to int8 inside (accuracy_level 4).

Needs ``pip install onnxruntime onnx`` ('vecmat[bench]'). A session for each copy of the weight, all with one global
pool of threads; x and y are bound beforehand, so that a call is the product and onnxruntime's own way to it.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from contender import Absent, Build, Calls, Material, Rate

_BLOCK = 128
_SPINS_S = 0.1  # 640x2048, M=16: vecmat's int4 took 232 us 4 or 20 ms after it, 107 after 100, 105 without it


@functools.cache
def runtime(threads: int) -> Any:
    """onnxruntime with its global pool set. Raises Absent where it, or onnx, is not installed."""
    for package in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(package) is None:
            raise Absent(f"{package} is not installed")
    import onnxruntime

    if not hasattr(onnxruntime, "set_global_thread_pool_sizes"):
        raise Absent(f"onnxruntime {onnxruntime.__version__} has no global pool of threads")
    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    return onnxruntime


class MatMulNBits:
    """x (M, K) fp32, weight (N, K) in 4 bits with an fp32 scale for each block of K."""

    rate: Rate = "int8"
    times = 1
    tolerance = 0.16

    def __init__(self, material: Material) -> None:
        self.runtime = runtime(material.threads)
        self.n, self.k = material.n, material.k
        weight = material.quantised(f"int4:g{_BLOCK}")[0]
        assert weight.scale is not None
        if self.k % _BLOCK:
            data = torch.nn.functional.pad(weight.data, (0, (-self.k % _BLOCK) // 2), value=0x88)
        else:
            data = weight.data
        blocks = -(-self.k // _BLOCK)
        self.weight_bytes = data.nbytes + weight.scale.nbytes
        model = self._model(data.view(self.n, blocks, _BLOCK // 2), weight.scale.reshape(-1))
        options = self.runtime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        self.sessions = [
            self.runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            for _ in range(material.copies(self.weight_bytes))
        ]

    def _model(self, data: Tensor, scale: Tensor) -> bytes:
        from onnx import TensorProto, helper, numpy_helper

        node = helper.make_node(
            "MatMulNBits", ["x", "data", "scale"], ["y"], domain="com.microsoft",
            K=self.k, N=self.n, bits=4, block_size=_BLOCK, accuracy_level=4,
        )  # fmt: skip
        graph = helper.make_graph(
            [node],
            "product",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", self.k])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", self.n])],
            [numpy_helper.from_array(data.numpy(), "data"), numpy_helper.from_array(scale.numpy(), "scale")],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        return model

    def rows(self, x: Tensor) -> Calls:
        own, y = x.float().contiguous(), torch.empty(x.shape[0], self.n)
        self.bound = own, y  # onnxruntime knows their addresses only
        calls = []
        for session in self.sessions:
            binding = session.io_binding()
            for bind, name, tensor in ((binding.bind_input, "x", own), (binding.bind_output, "y", y)):
                bind(name, "cpu", 0, "float32", tuple(tensor.shape), tensor.data_ptr())
            calls.append(functools.partial(session.run_with_iobinding, binding))

        def result(index: int) -> Tensor:
            y.fill_(torch.nan)
            calls[index]()
            return y.clone()

        return Calls(calls=calls, result=result, spins_s=_SPINS_S)

    def close(self) -> None:
        self.sessions = []


CONTENDERS: dict[str, Build] = {"onnxruntime MatMulNBits": MatMulNBits}
