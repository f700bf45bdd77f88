"""Tables of operators: `op_name` can give every name in them, so that no entry is there in vain."""

import ast
import importlib
import inspect
import pkgutil
from collections.abc import Collection, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from graphcomb import capture
from graphcomb.graph import cost, facts, nodes, program
from graphcomb.graph.comb.rules import RULES
from graphcomb.graph.verify.meanings import RULES as MEANINGS
from graphcomb.graph.verify.meanings import means
from graphcomb.graph.workload import libraries
from graphcomb.runtime.export import opset

pytest.importorskip("torchvision")  # registers operators that the tables name

ASKED_ELSEWHERE = {  # tables that no line below asks with the name of a node on the spot
    "RULES": RULES,
    "MEANINGS": MEANINGS,
    "COUNTS": cost.COUNTS,
    "UNCOUNTED": cost.UNCOUNTED,
    "DECOMPOSED": program.DECOMPOSED,
    "SINCE": opset.SINCE,
    **{name: table for name, table in vars(facts).items() if name.isupper()},
    **dict(libraries.CLASSES),
}
NO_SCHEMA = {
    "placeholder",
    "get_attr",
    "output",
    "getitem",
    "cond",
    "mod",
    "truediv",
}  # nodes that call no operator, or a Python function


def known() -> set[str]:
    return {s.name.removeprefix("aten::") for s in torch._C._jit_get_all_schemas()} | NO_SCHEMA


def modules() -> Iterator[ModuleType]:
    for room in ("graph", "passes", "runtime"):
        package = importlib.import_module(f"graphcomb.{room}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".kit" not in found.name:  # runs on devices, without torch
                module = importlib.import_module(found.name)
                if getattr(module, "op_name", None) is nodes.op_name and module is not nodes:
                    yield module


def asked(module: ModuleType) -> Iterator[tuple[int, Any]]:
    """What the name of a node is compared with or looked up in, by line: `op_name(n) in X`, `name == "x"`, `X[name]`."""
    for function in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                target, value = node.targets[0], node.value
                pairs = (
                    zip(target.elts, value.elts, strict=True)
                    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                    else [(target, value)]
                )
                names |= {t.id for t, v in pairs if isinstance(t, ast.Name) and _calls(v)}
        for node in ast.walk(function):
            table = None
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn, ast.Eq, ast.NotEq)):
                table = node.comparators[0] if _asks(node.left, names) else None
            elif isinstance(node, ast.Subscript) and _asks(node.slice, names):
                table = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
                table = node.func.value if node.args and _asks(node.args[0], names) else None
            if table is not None:
                try:
                    value = eval(compile(ast.Expression(table), "table", "eval"), dict(vars(module)))
                except (NameError, AttributeError):  # a local set, or a field of an object
                    continue
                if isinstance(value, (str, Collection)):
                    yield node.lineno, value


def _calls(value: ast.AST) -> bool:
    return isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "op_name"


def _asks(value: ast.AST, names: set[str]) -> bool:
    return _calls(value) or (isinstance(value, ast.Name) and value.id in names)


def test_every_name_that_is_asked_for_is_one_that_a_node_can_have() -> None:
    tables = list(ASKED_ELSEWHERE.items())
    for module in modules():
        tables += [(f"{module.__name__}:{line}", table) for line, table in asked(module)]
    assert len(tables) > 120
    names, wrong = known(), set()
    for place, table in tables:
        wrong |= {(place, name) for name in ([table] if isinstance(table, str) else table) if name not in names}
    assert not wrong


def test_names_of_aten_may_be_spelled_out() -> None:
    @means("aten::trapezoid")
    def rule(call: Any) -> Any: ...

    assert MEANINGS.pop("trapezoid") is rule


def test_names_of_nodes() -> None:
    torchvision = pytest.importorskip("torchvision.ops")

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, offset: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            y = torchvision.deform_conv2d(x, offset, weight)
            return torch.cond(y.sum() > 0, torch.sin, torch.cos, (y.split(2, 1)[1],))

    sizes = (1, 3, 4, 4), (1, 18, 2, 2), (4, 3, 3, 3)
    found = {nodes.op_name(n) for n in capture(Net(), tuple(torch.randn(s) for s in sizes)).graph.nodes}
    assert found >= {
        "torchvision::deform_conv2d",
        "cond",
        "getitem",
        "split",
        "gt",
        "placeholder",
        "get_attr",
        "output",
    }
