"""``import vecmat`` is quick, quiet, and works with neither a GPU nor Triton."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Python = Callable[..., str]

HIDE_TRITON = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
{how}
"""
WORKS = """
import torch, vecmat
assert vecmat.HAS_TRITON is False
x, w = torch.randn(3, 64), torch.randn(8, 64)
torch.testing.assert_close(vecmat.matmul(x, w), x @ w.t())
torch.testing.assert_close(vecmat.matmul(x, vecmat.quantize(w, "int8")), x @ w.t(), rtol=0.1, atol=1.0)
told = str(vecmat.explain(x, w))
lines = [line for line in told.splitlines() if line.strip().startswith("triton_")]
assert lines, told
assert all("cannot: Triton is not installed (pip install 'vecmat[gpu]')" in line for line in lines), told
assert "triton" not in sys.modules or sys.modules["triton"] is None
"""


def test_without_triton_everything_works_and_its_kernels_are_listed_with_the_reason(python: Python) -> None:
    python(HIDE_TRITON.format(how="sys.meta_path.insert(0, Refuse())") + WORKS)


def test_with_triton_blocked_in_sys_modules_everything_works(python: Python) -> None:
    python(HIDE_TRITON.format(how="sys.modules['triton'] = None") + WORKS)


def test_a_triton_that_cannot_be_used_is_a_reason_and_not_an_end(python: Python) -> None:
    code = """
import sys, types
sys.modules["triton"] = types.ModuleType("triton")  # another thing of that name, or a version without what we use
sys.modules["triton"].__spec__ = None
import torch, vecmat
x, w = torch.randn(3, 64), torch.randn(8, 64)
torch.testing.assert_close(vecmat.matmul(x, w), x @ w.t())
assert "cannot: the Triton that is installed cannot be used" in str(vecmat.explain(x, w))
"""
    python(code)


def test_importing_initialises_no_device_and_loads_no_optional_package(python: Python) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import vecmat
assert not torch.cuda.is_initialized()
new = {name.partition(".")[0] for name in set(sys.modules) - before}
unwanted = new & {"triton", "rich", "transformers", "deepspeed", "numpy", "matplotlib", "safetensors", "gguf"}
import vecmat.checkpoints
unwanted |= {"transformers", "safetensors", "gguf", "accelerate", "rich"} & set(sys.modules) - before
assert not unwanted, unwanted
assert not [name for name in sys.modules if name.startswith("vecmat.kernels.triton_")]
"""
    python(code)


def test_importing_opens_no_file_but_python_modules(python: Python) -> None:
    code = """
import sys, torch, filelock, platformdirs
opened = []
sys.addaudithook(lambda event, args: opened.append(args) if event == "open" else None)
import vecmat
import vecmat.tables, vecmat.nn, vecmat.ops
print([args for args in opened if not str(args[0]).endswith((".py", ".pyc", ".so"))
       and ".pyc." not in str(args[0])])
"""
    assert python(code).strip() == "[]"


def test_importing_takes_less_than_300_ms_beyond_torch(python: Python) -> None:
    code = """
import time, torch
start = time.perf_counter()
import vecmat
print(time.perf_counter() - start)
"""
    best = min(float(python(code)) for _ in range(3))
    assert best < 0.3, f"import vecmat takes {best:.3f} s beyond torch's own import"


def test_every_public_name_exists() -> None:
    import vecmat

    for name in vecmat.__all__:
        assert hasattr(vecmat, name), name
    assert isinstance(vecmat.HAS_TRITON, bool)
    with pytest.raises(AttributeError, match="module 'vecmat' has no attribute 'matmull'"):
        _ = vecmat.matmull
