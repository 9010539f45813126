"""Imports between the package's files go one way only, and a file does at import what the architecture allows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import vecmat

ROOT = Path(vecmat.__file__).parent
FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): file
    for file in sorted(ROOT.rglob("*.py"))
    if "__pycache__" not in file.parts
}
FILES = {name.removesuffix(".__init__"): file for name, file in FILES.items()}
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}

# A file may import files of a lower level only. Within L1 weights stands on problem, within L2 the kernels on their
# base and on what the Triton kernels share.
LEVELS = {
    "_version": 0, "errors": 0, "native": 0, "settings": 0, "deepspeed_install": 0,
    "device": 0.5, "deepspeed_config": 0.5,
    "problem": 1, "weights": 1.5, "packs": 1.7,
    "kernels.base": 2, "kernels._cpu": 2.1, "kernels._triton": 2.1, "kernels._widen": 2.1, "kernels._gluon": 2.2,
    "kernels._bring": 2.3, "kernels._wgmma": 2.4, "kernels": 2.9,
    "table": 2, "tables": 2.1, "bench": 2, "workloads": 2,
    "ready": 3, "tuner": 3.1, "dispatch": 4, "lowering": 0, "ops": 5, "library": 5.5, "measure": 5,
    "checkpoints.safe": 6, "checkpoints.integers": 6, "checkpoints.layer": 6.1, "checkpoints.quantization": 6.2,
    "checkpoints.fp8_blocks": 6.2, "checkpoints.gptq": 6.2, "checkpoints.awq": 6.2, "checkpoints.bitsandbytes": 6.2,
    "checkpoints.gguf": 6.2, "checkpoints.compressed_tensors": 6.3, "checkpoints.source": 6.4,
    "checkpoints.reading": 6.5, "checkpoints.loading": 6.6, "checkpoints.saving": 6.7, "checkpoints": 6.8,
    "siblings": 6, "linear": 6, "fusing": 6.2, "nn": 6.3,
    "models": 6, "decoding": 6.1, "deepspeed": 6, "doctor": 6, "compare": 6.5, "transformers": 6.5,
    "__init__": 7, "cli_tuning": 7.5, "cli_convert": 7.5, "cli": 8, "__main__": 9,
}  # fmt: skip
# What the Triton kernels share.
SHARED = {f"kernels.{name}" for name in ("_triton", "_widen", "_gluon", "_bring", "_wgmma")}
KERNEL = 2.5


def level(name: str) -> float:
    """A file's level. A new file is given one in LEVELS; a kernel has its own already."""
    if name.startswith("kernels.") and name not in LEVELS:
        return KERNEL
    assert name in LEVELS, f"{name}.py has no level: add it to LEVELS, as docs/architecture.md says"
    return LEVELS[name]


def imports(name: str) -> Iterator[tuple[str, int]]:
    """(imported file, or outside module and a dot, line) of every import in a file, also those inside functions."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    package = "" if name == "__init__" else package
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield _inside(alias.name) or f"{alias.name}.", node.lineno
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                base = _inside(node.module or "")
                if base is None:
                    yield f"{node.module}.", node.lineno
                    continue
            else:
                parts = [part for part in package.split(".") if part]
                parts = parts[: len(parts) - (node.level - 1)] + ([node.module] if node.module else [])
                base = ".".join(parts) or "__init__"
            for alias in node.names:
                child = alias.name if base == "__init__" else f"{base}.{alias.name}"
                yield child if child in FILES else base, node.lineno


def _inside(module: str) -> str | None:
    if module == "vecmat":
        return "__init__"
    return module.removeprefix("vecmat.") if module.startswith("vecmat.") else None


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_files_below_it(name: str) -> None:
    for imported, line in imports(name):
        if imported in FILES:
            assert level(imported) < level(name), f"{name}.py, line {line} imports {imported}, which is not below it"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("kernels.")])
def test_a_kernel_knows_its_base_problems_weights_and_devices_and_nothing_else(name: str) -> None:
    allowed = {"kernels.base", "problem", "weights", "device", "settings", "errors"}
    if name.startswith("kernels.triton_") or name in SHARED:
        allowed |= SHARED
    allowed |= {"packs"} if name == "kernels.base" else set()
    allowed |= {"kernels._cpu"} if name.startswith("kernels.cpu_") or name == "kernels.torch_onednn" else set()
    allowed |= {"native"} if name.startswith(("kernels.cpu_", "kernels._cpu")) else set()
    for imported, line in imports(name):
        assert imported not in FILES or imported in allowed, f"{name}.py, line {line} imports {imported}"


@pytest.mark.parametrize("name", FILES)
def test_triton_is_imported_by_triton_kernels_only(name: str) -> None:
    if name.startswith("kernels.triton_") or name in SHARED:
        return
    for imported, line in imports(name):
        assert imported.split(".")[0] != "triton", f"{name}.py, line {line} imports Triton"


def at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """The nodes that run when a file is imported: everything but the bodies of functions."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            todo += [*node.decorator_list, *node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]
            continue
        todo += list(ast.iter_child_nodes(node))


ASKS = (
    "torch.cuda.", "torch.backends.", "torch.xpu.", "torch.get_num_threads", "torch.version.hip", "torch.set_", "open",
    "os.environ", "os.getenv", "os.cpu_count", "os.sched_getaffinity", "platform.", "subprocess.", "ctypes.CDLL",
    "triton.runtime.driver", "atexit.", "Device.of", "signal.", "threading.Thread", "Path", "warnings.",
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_importing_a_file_asks_nothing_of_the_machine(name: str) -> None:
    for node in at_import(TREES[name]):
        if isinstance(node, ast.Call):
            told = ast.unparse(node.func)
        elif isinstance(node, (ast.Subscript, ast.Attribute)):
            told = ast.unparse(node)
            if not told.startswith(("os.environ", "torch.version.hip")):
                continue
        else:
            continue
        wrong = any(told == ask or (told.startswith(ask) and ask[-1] == ".") for ask in ASKS) or told == "os.environ"
        assert not wrong, f"{name}.py, line {node.lineno} runs {told} at import"


@pytest.mark.parametrize("name", FILES)
def test_no_handler_catches_everything_and_nothing_is_global(name: str) -> None:
    for node in ast.walk(TREES[name]):
        assert not isinstance(node, ast.Global), f"{name}.py, line {node.lineno}: global"
        if isinstance(node, ast.ExceptHandler):
            caught = [node.type] if not isinstance(node.type, ast.Tuple) else node.type.elts
            broad = any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught)
            # Cleaning up and raising again hides nothing.
            again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert again or not broad, f"{name}.py, line {node.lineno} catches everything"


def test_the_rules_themselves_can_fail() -> None:
    assert [node for node in at_import(ast.parse("X = torch.cuda.is_available()")) if isinstance(node, ast.Call)]
    assert not [node for node in at_import(ast.parse("def f():\n torch.cuda.init()")) if isinstance(node, ast.Call)]
    assert [node for node in at_import(ast.parse("def f(x=open('a')): pass")) if isinstance(node, ast.Call)]
    found = dict(imports("kernels.fallback"))
    assert {"kernels.base", "weights", "problem", "device", "torch."} <= set(found)
    assert "table" in dict(imports("dispatch"))
