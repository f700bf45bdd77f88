"""Private names of PyTorch are used in one file; what that file gives."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

from graphcomb.graph.compat import exact_kernels

ROOT = Path(__file__).parents[2]
MODULE = {"_modules", "_parameters", "_buffers"}  # of nn.Module; see graph/compat.py
OTHERS = {"_exit", "_models"}  # of os and of accelerate


def sources():
    for room in ("graph", "passes", "runtime", "graphcomb"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield path, ast.parse(path.read_text())


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def defined(tree: ast.AST):
    """The names that a file gives to functions, classes, variables and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_only_compat_uses_private_names_of_torch():
    trees = list(sources())
    ours = {name for _, tree in trees for name in defined(tree)} | MODULE | OTHERS
    found = []
    for path, tree in trees:
        if path == ROOT / "graph" / "compat.py":
            continue
        for node in ast.walk(tree):
            where = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
                found += [where for a in node.names if any(map(private, f"{node.module}.{a.name}".split(".")))]
            elif isinstance(node, ast.Import):
                found += [where for a in node.names if a.name.startswith("torch") and "._" in a.name]
            elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours:
                if "aten." not in ast.unparse(node.value) and not ast.unparse(node.value).endswith("aten"):
                    found.append(f"{where}: {ast.unparse(node)}")
            elif isinstance(node, ast.Constant) and node.value in ("_schema", "_codegen", "_in_spec", "_out_spec"):
                found.append(f"{where}: {node.value!r}")
    assert not found


@pytest.fixture
def flags():
    """Sets PyTorch's flags of precision back."""
    cudnn, products = torch.backends.cudnn, torch.get_float32_matmul_precision()
    before = cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic
    yield
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if before[0] else "ieee"
    cudnn.allow_tf32, cudnn.benchmark, cudnn.deterministic = before
    torch.set_float32_matmul_precision(products)


@pytest.mark.parametrize("newer", [False, True])
def test_exact_kernels_compute_in_full_precision_and_leave_the_flags(flags, newer):
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    cudnn.benchmark = True
    if newer:  # the older flags raise an error then
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, products.fp32_precision = "tf32", "ieee", "tf32"
    else:
        torch.set_float32_matmul_precision("medium")
    read = lambda: (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision, products.fp32_precision)  # noqa: E731
    before = read()
    with exact_kernels():
        assert "tf32" not in read()
        assert (cudnn.benchmark, cudnn.deterministic) == (False, True)
    assert (read(), cudnn.benchmark, cudnn.deterministic) == (before, True, False)
    if not newer:
        assert torch.get_float32_matmul_precision() == "medium"
