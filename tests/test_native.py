"""vecmat's own CPU library: every instruction set, threads, forks, sanitizers, and an install without it."""

from __future__ import annotations

import concurrent.futures
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import vecmat
from cases import asked, here, stored
from vecmat.kernels import registry
from vecmat.kernels._cpu import Memory
from vecmat.native import native

ROOT = Path(__file__).parents[1]
SANITIZED = 300  # seconds to build and run it

needs_library = pytest.mark.skipif(not native().isa, reason=native().reason or "-")
OWN = sorted(name for name in registry()[0] if name.startswith("cpu_"))


def products(
    fmt: str, x: str = "bf16", n: int = 200, k: int = 300, rows: int = 40
) -> tuple[torch.Tensor, vecmat.Weight]:
    """x (rows, k) and a weight (n, k) of a format."""
    rng = torch.Generator().manual_seed(7)
    weight = stored(torch.randn(n, k, generator=rng), fmt, "nk", "cpu")
    assert isinstance(weight, vecmat.Weight)
    return torch.randn(rows, k, generator=rng).to({"bf16": torch.bfloat16, "fp32": torch.float32}[x]), weight


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_where_there_is_a_compiler_the_library_was_built_and_is_in_use() -> None:
    assert native().isa, native().reason  # an install whose build fails goes on without it
    assert native().isa in native().isas
    assert native().isas[-1] == "portable"
    assert here("cpu").native == native().isa


@needs_library
@pytest.mark.parametrize("isa", native().isas[1:])
def test_every_instruction_set_passes_the_conformance_suite(isa: str) -> None:
    picked = f"({' or '.join(OWN)}) and not fp8 and not zp and not g128 and (shape or threads or leak or reduction)"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_conformance.py", "-k", picked],
        cwd=ROOT, env={**os.environ, "VECMAT_ISA": isa}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "....." in done.stdout  # dots: some ran


def test_an_instruction_set_that_is_not_there_is_named(python: Callable[..., str]) -> None:
    code = "import vecmat, torch; print(vecmat.explain(torch.ones(1, 64), vecmat.quantize(torch.ones(64, 64), 'int8')))"
    told = python(code, VECMAT_ISA="avx1024")
    if native().isa:
        assert "VECMAT_ISA is 'avx1024'; this processor has" in told
        assert "portable" in told
    assert "fallback" in told


def test_without_the_library_everything_works_and_says_why(python: Callable[..., str]) -> None:
    code = (
        "import importlib.util, sys, torch\n"
        "from pathlib import Path\n"
        "exists = Path.exists\n"
        "Path.exists = lambda self: self.name != 'libvecmat.so' and exists(self)\n"  # as after an install without g++
        "import vecmat\n"
        "w = torch.randn(64, 96)\n"
        "q = vecmat.quantize(w, 'int8')\n"
        "y = vecmat.matmul(torch.ones(2, 96), q)\n"
        "print(torch.allclose(y, q.dequantize().sum(1).expand(2, 64), rtol=1e-4, atol=1e-4))\n"
        "print(vecmat.explain(torch.ones(2, 96), q))"
    )
    told = python(code)
    assert told.startswith("True")
    assert "installed without its CPU library" in told


@needs_library
@pytest.mark.parametrize("fmt", ["int8", "int8:g64", "int4:g32:zp", "bf16", "fp32"])
@pytest.mark.parametrize("kernel", OWN)
def test_a_row_has_the_same_bits_whatever_the_threads_and_the_other_rows(kernel: str, fmt: str, threads: int) -> None:
    if fmt.startswith("int") != (kernel == "cpu_panels"):
        pytest.skip("another kernel's format")
    x, weight = products(fmt, "fp32" if fmt == "fp32" else "bf16")
    whole = vecmat.matmul(x, weight, kernel=kernel)
    for rows in (1, 2, 3, 7, 16, 39):
        assert torch.equal(vecmat.matmul(x[:rows], weight, kernel=kernel), whole[:rows]), rows
    torch.set_num_threads(1)
    assert torch.equal(vecmat.matmul(x, weight, kernel=kernel), whole)


@needs_library
@pytest.mark.parametrize("n", [200, 1100])  # so few columns that threads share the writing of x's digits, and enough
@pytest.mark.parametrize("fmt", ["int8", "int4:g128"])
def test_many_long_rows_taken_in_parts_have_the_same_bits(fmt: str, n: int, threads: int) -> None:
    x, weight = products(fmt, "fp32", n=n, k=8200, rows=300)  # 9.8 MB of digits
    whole = vecmat.matmul(x, weight, kernel="cpu_panels")
    truth = x.double() @ weight.dequantize().double().t()
    assert float((whole - truth).abs().max() / truth.abs().max()) < 1e-5
    for rows in (slice(0, 1), slice(100, 140), slice(299, 300)):
        assert torch.equal(vecmat.matmul(x[rows], weight, kernel="cpu_panels"), whole[rows])


@needs_library
def test_packed_weights_lie_in_huge_pages_and_small_ones_share_them() -> None:
    memory = Memory()
    small, chunk = memory.take(1000)
    other, same = memory.take(3000)
    assert same is chunk
    assert chunk.data_ptr() % (2 << 20) == 0
    assert other.data_ptr() == small.data_ptr() + 1024
    large, own = memory.take(5 << 20)
    assert large.numel() == 5 << 20
    assert large.data_ptr() % (2 << 20) == 0
    assert own is not chunk
    small.fill_(1)
    other.fill_(2)
    assert small.eq(1).all()


@needs_library
def test_a_chunk_is_gone_with_the_last_weight_in_it_and_full_ones_are_left() -> None:
    memory = Memory()
    kept = [memory.take(3 << 20) for _ in range(6)]  # five of them fill 16 MB
    chunks = {owner.data_ptr() for _, owner in kept}
    assert len(chunks) == 2
    first, last = weakref.ref(kept[0][1]), weakref.ref(kept[5][1])
    del kept[:5]
    assert first() is None
    assert last() is not None
    kept.clear()
    assert last() is None
    again, _ = memory.take(10)
    assert again.numel() == 10


@needs_library
def test_reductions_are_the_same_whatever_m() -> None:
    device = here("cpu")
    for name in OWN:
        kernel = registry()[0][name]
        said = {
            kernel.reduction(p, {})
            for p in (asked(m, 64, 64, "bf16", "int8" if name == "cpu_panels" else "bf16") for m in (1, 16, 512))
        }
        assert len(said) == 1, f"{name} sums in another order for another M on {device.name}"


@needs_library
@pytest.mark.parametrize("fmt", ["int8", "int4:g64", "bf16"])
def test_python_threads_at_once_get_the_same_numbers(fmt: str, threads: int) -> None:
    x, weight = products(fmt)
    expected = vecmat.matmul(x, weight)

    def work(_: int) -> bool:
        return all(torch.equal(vecmat.matmul(x, weight), expected) for _ in range(50))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@needs_library
def test_another_thread_runs_while_a_product_does(threads: int) -> None:
    x, weight = products("int8", n=2048, k=4096, rows=512)
    vecmat.matmul(x, weight)
    began = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: [vecmat.matmul(x, weight) for _ in range(10)])
        turns = 0
        while not running.done():
            turns += 1
            time.sleep(0.001)
    assert time.perf_counter() - began > 0.02
    assert turns > 5, "the interpreter was held during the products"


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_worker_of_a_dataloader_multiplies(python: Callable[..., str]) -> None:
    code = (
        "import torch, vecmat\n"
        "torch.set_num_threads(2)\n"
        "x, w = torch.randn(64, 512), vecmat.quantize(torch.randn(512, 512), 'int8')\n"
        "y = vecmat.matmul(x, w)\n"  # the pool of threads exists before the fork
        "class Rows(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 8\n"
        "    def __getitem__(self, i): return vecmat.matmul(x, w)\n"
        "loader = torch.utils.data.DataLoader(Rows(), num_workers=2, batch_size=1, multiprocessing_context='fork')\n"
        "print(all(torch.equal(batch[0], y) for batch in loader))"
    )
    assert python(code).strip() == "True"


@needs_library
def test_an_inference_tensor_is_no_obstacle() -> None:
    with torch.inference_mode():
        x, weight = products("int4:g32")
        y = vecmat.matmul(x, weight)
    assert torch.equal(vecmat.matmul(x.clone(), weight), y)


@needs_library
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("c++") is None, reason="no C++ compiler or no CMake")
def test_sanitizers_find_nothing_in_small_and_awkward_sizes(tmp_path: Path) -> None:
    build = tmp_path / "build"
    configure = ["cmake", "-S", str(ROOT / "csrc"), "-B", str(build), "-DVECMAT_SANITIZE=ON"]
    for command in (configure, ["cmake", "--build", str(build), "--parallel", "2"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZED)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    done = subprocess.run(
        [str(build / "check_native"), str(build / "libvecmat.so")], capture_output=True, text=True, timeout=SANITIZED
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.splitlines()[:-1] == native().isas if os.environ.get("VECMAT_ISA") is None else True
    assert done.stdout.splitlines()[-1].endswith(" 0 wrong")


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_compiler_leaves_in_what_a_tile_asks_of_the_memory(tmp_path: Path) -> None:
    """gcc 12 once took the loop of prefetches for one without effect: the same numbers, a fifth slower."""
    source = tmp_path / "tile.cpp"
    source.write_text(
        '#include "panels.h"\n'
        "namespace vecmat { namespace VECMAT_ISA {\n"
        "template void tile<8, 1, 1, 4>(const Out&, const Shape&, const Strip&, const Digits&, int64_t, int64_t,\n"
        "                               int64_t, const Ahead&, float*);\n"
        "}}\n"
    )
    command = ["c++", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-w", "-DVECMAT_ISA=portable", "-I",
               str(ROOT / "csrc"), "-S", "-o", "-", str(source)]  # fmt: skip
    for level in ("-O1", "-O3"):
        done = subprocess.run([*command, level], capture_output=True, text=True, timeout=SANITIZED)
        assert done.returncode == 0, done.stderr[-3000:]
        assert re.search(r"\b(prefetch|prfm)", done.stdout), level


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no compiler for arm64")
@pytest.mark.parametrize("source", [file.name for file in sorted((ROOT / "csrc").glob("*.cpp"))])
def test_it_compiles_for_arm64(source: str, tmp_path: Path) -> None:
    done = subprocess.run(
        ["aarch64-linux-gnu-g++", "-O1", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-fopenmp", "-Wno-psabi",
         "-DVECMAT_ISA=portable", "-c", str(ROOT / "csrc" / source), "-o", str(tmp_path / "out.o")],
        capture_output=True, text=True, timeout=SANITIZED,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
