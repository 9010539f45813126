"""llama.cpp's ggml, driven through ctypes: the libggml*.so that the package llama-cpp-python installs.

It is built for this processor by ``pip install --no-deps llama-cpp-python==0.3.36`` (from source, minutes; add
``CMAKE_ARGS=-DGGML_NATIVE=ON`` where the environment says otherwise). Its threads are those of the OpenMP runtime that
torch has loaded, the same pool as everybody else's, when it was built with OpenMP (the default); else a ggml_threadpool
of its own. Either lives as long as the process. A call is one graph of one ``mul_mat``, x in fp32; quantising x to
ggml's 8-bit blocks is part of it, as in llama.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contender import Absent, Build, Calls, Material, Rate

_GRAPH_NODES = 8
_WEIGHTS = 1  # GGML_BACKEND_BUFFER_USAGE_WEIGHTS


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


_SILENT = _LogCallback(lambda level, text, data: None)  # it tells of every tensor that it repacks

_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_log_set": (None, [_LogCallback, c_void_p]),
    "ggml_type_name": (c_char_p, [c_int]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_blck_size": (c_int64, [c_int]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_threadpool_params_init": (None, [c_void_p, c_int]),
    "ggml_threadpool_new": (c_void_p, [c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buffer_set_usage": (None, [c_void_p, c_int]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_tensor_alloc": (c_int, [c_void_p, c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
}


class Library:
    """ggml's functions, and its CPU backend with ``threads`` threads. Raises Absent where it is not installed."""

    def __init__(self, threads: int) -> None:
        found = importlib.util.find_spec("llama_cpp")
        if found is None or not found.origin:
            raise Absent("llama-cpp-python is not installed")
        folder = Path(found.origin).parent / "lib"
        names = ("libggml-base.so", "libggml-cpu.so")
        missing = [name for name in names if not (folder / name).exists()]
        if missing:
            raise Absent(f"llama-cpp-python came without {', '.join(missing)}")
        libraries = [ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL) for name in names]
        for name, (result, arguments) in _FUNCTIONS.items():
            function = next((getattr(library, name) for library in libraries if hasattr(library, name)), None)
            if function is None:
                raise Absent(f"this llama-cpp-python's ggml has no {name}")
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.log_set(_SILENT, None)
        self.cpu = self.backend_cpu_init()
        self.backend_cpu_set_n_threads(self.cpu, threads)
        parameters = ctypes.create_string_buffer(4096)  # a ggml_threadpool_params, which is smaller
        self.threadpool_params_init(parameters, threads)
        self.backend_cpu_set_threadpool(self.cpu, self.threadpool_new(parameters))

    def __getattr__(self, name: str) -> Any:  # for type checkers: the functions are set by __init__
        raise AttributeError(name)

    def type(self, name: str) -> int:
        """The number of a type such as "q8_0". Raises Absent where this ggml has none."""
        for number in range(64):
            found = self.type_name(number)
            if found is None:
                break
            if found.decode() == name:
                return number
        raise Absent(f"this llama-cpp-python's ggml has no type {name}")

    def context(self, tensors: int, graphs: int = 0) -> int:
        """A ggml_context with room for the descriptions of so many tensors and graphs, and no data."""
        room = self.tensor_overhead() * (tensors + 4)
        room += graphs * (self.graph_overhead_custom(_GRAPH_NODES, False) + 256) + 4096
        return int(self.init(_InitParams(room, None, True)))

    def buffer_types(self) -> Iterator[tuple[str, int]]:
        """The CPU backend's extra kinds of memory, which repack weights: name, handle."""
        registry = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            kinds = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(self.backend_reg_dev_get(registry, 0))
            index = 0
            while kinds and kinds[index]:
                yield self.backend_buft_name(kinds[index]).decode(), kinds[index]
                index += 1


@functools.cache
def library(threads: int) -> Library:
    """ggml, loaded at the first call."""
    return Library(threads)


class Ggml:
    """One of ggml's types. repacked: in the memory that reorders a weight for this processor's instructions."""

    times = 1

    def __init__(self, material: Material, type: str, rate: Rate, tolerance: float, repacked: bool = False) -> None:
        self.rate, self.tolerance, self.n, self.k = rate, tolerance, material.n, material.k
        self.ggml = ggml = library(material.threads)
        number = ggml.type(type)
        if material.k % ggml.blck_size(number):
            raise Absent(f"K={material.k} is not a multiple of {ggml.blck_size(number)}, the block of {type}")
        kind = ggml.backend_cpu_buffer_type()
        if repacked:
            kind = next((handle for name, handle in ggml.buffer_types() if name == "CPU_REPACK"), None)
            if kind is None:
                raise Absent("this llama-cpp-python's ggml repacks nothing")
        self.weight_bytes = ggml.row_size(number, material.k) * material.n
        count = material.copies(self.weight_bytes)
        self.contexts = [ggml.context(count)]
        self.buffers: list[int] = []
        self.extra: tuple[list[int], list[int]] = ([], [])  # contexts and buffers of the rows in use
        self.weights = [ggml.new_tensor_2d(self.contexts[0], number, self.k, self.n) for _ in range(count)]
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(self.contexts[0], kind)
        if not buffer:
            raise MemoryError(f"ggml has no memory for {count} copies of {type} ({self.n}, {self.k})")
        self.buffers.append(buffer)
        ggml.backend_buffer_set_usage(buffer, _WEIGHTS)
        if not self._supported():
            self.close()
            raise Absent(f"ggml repacks no {type} on this processor" if repacked else f"ggml has no product of {type}")
        data = torch.empty(self.weight_bytes, dtype=torch.uint8)
        ggml.quantize_chunk(number, material.w.data_ptr(), data.data_ptr(), 0, self.n, self.k, None)
        for weight in self.weights:
            ggml.backend_tensor_set(weight, data.data_ptr(), 0, self.weight_bytes)

    def _supported(self) -> bool:
        context = self.ggml.context(2)
        x = self.ggml.new_tensor_2d(context, self.ggml.type("f32"), self.k, 1)
        supported = self.ggml.backend_supports_op(self.ggml.cpu, self.ggml.mul_mat(context, self.weights[0], x))
        self.ggml.free(context)
        return bool(supported)

    def rows(self, x: Tensor) -> Calls:
        ggml, f32 = self.ggml, self.ggml.type("f32")
        self._free(*self.extra)
        plain, m = ggml.backend_cpu_buffer_type(), x.shape[0]
        fixed, graphs = ggml.context(2), ggml.context(len(self.weights), len(self.weights))
        own = ggml.new_tensor_2d(fixed, f32, self.k, m)
        y = ggml.new_tensor_2d(fixed, f32, self.n, m)
        buffer = ggml.backend_alloc_ctx_tensors_from_buft(fixed, plain)
        self.extra = ([fixed, graphs], [buffer])
        rows = x.float().contiguous()
        ggml.backend_tensor_set(own, rows.data_ptr(), 0, rows.nbytes)
        # every copy's product goes to the same place, as a model's do
        place = ggml.get_data(y)
        calls = []
        for weight in self.weights:
            product = ggml.mul_mat(graphs, weight, own)
            ggml.backend_tensor_alloc(buffer, product, place)
            graph = ggml.new_graph_custom(graphs, _GRAPH_NODES, False)
            ggml.build_forward_expand(graph, product)
            calls.append(functools.partial(ggml.backend_graph_compute, ggml.cpu, graph))

        def result(index: int) -> Tensor:
            if calls[index]() != 0:
                raise Absent("ggml could not compute the graph")
            out = torch.empty(m, self.n)
            ggml.backend_tensor_get(y, out.data_ptr(), 0, out.nbytes)
            return out

        return Calls(calls=calls, result=result)

    def _free(self, contexts: list[int], buffers: list[int]) -> None:
        for buffer in buffers:
            self.ggml.backend_buffer_free(buffer)
        for context in contexts:
            self.ggml.free(context)

    def close(self) -> None:
        self._free(*self.extra)
        self._free(self.contexts, self.buffers)
        self.extra, self.contexts, self.buffers = ([], []), [], []


CONTENDERS: dict[str, Build] = {
    "ggml Q8_0": functools.partial(Ggml, type="q8_0", rate="int8", tolerance=0.03),
    "ggml Q8_0 repacked": functools.partial(Ggml, type="q8_0", rate="int8", tolerance=0.03, repacked=True),
    "ggml Q4_0": functools.partial(Ggml, type="q4_0", rate="int8", tolerance=0.16),
    "ggml Q4_0 repacked": functools.partial(Ggml, type="q4_0", rate="int8", tolerance=0.16, repacked=True),
    "ggml Q4_K": functools.partial(Ggml, type="q4_K", rate="int8", tolerance=0.16),
    "ggml Q4_K repacked": functools.partial(Ggml, type="q4_K", rate="int8", tolerance=0.16, repacked=True),
    "ggml BF16": functools.partial(Ggml, type="bf16", rate="bf16", tolerance=0.006),
    "ggml F16": functools.partial(Ggml, type="f16", rate="fp32", tolerance=0.002),
    "ggml F32": functools.partial(Ggml, type="f32", rate="fp32", tolerance=1e-5),
}
