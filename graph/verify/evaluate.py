"""Runs a captured graph node by node in float64, on given weights, without changing the program."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ..compat import pytree, schema
from ..errors import BadInput
from ..facts import DROPOUTS
from ..nodes import arguments, fetch, is_operator, op_name, source, writes
from ..program import Program, flatten_outputs
from ..trainable import switched, wanted

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
COMPLEX = (torch.complex32, torch.complex64)
Observer = Callable[[fx.Node, Any], None]


def to_double(value: Any) -> Any:
    """A floating-point or complex tensor or dtype in double precision; anything else unchanged."""
    dtype = value.dtype if isinstance(value, torch.Tensor) else value
    if not isinstance(dtype, torch.dtype):
        return value
    wide = torch.float64 if dtype in FLOATS else torch.complex128 if dtype in COMPLEX else dtype
    return value.detach().to(wide) if isinstance(value, torch.Tensor) else wide


def tensors_of(program: Program) -> dict[str, torch.Tensor]:
    """Every parameter, buffer and constant that the graph reads, by name; the names of a tied tensor map to the same
    tensor."""
    module = program.module()
    named = {str(n.target): fetch(module, str(n.target)) for n in module.graph.nodes if n.op == "get_attr"}
    return {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}


def double_weights(program: Program) -> dict[str, torch.Tensor]:
    """The program's own tensors in float64; tied names still share one tensor."""
    done: dict[int, torch.Tensor] = {}
    return {name: done.setdefault(id(t), to_double(t).detach().clone()) for name, t in tensors_of(program).items()}


class Evaluator:
    """Interprets a program's graph in float64 and in eval mode, on the weights given by name.

    Float dtypes in arguments are widened. Whatever mode the program is in, dropout does nothing, and batch_norm uses its
    running statistics, or the batch's where the model uses these in eval mode, too.
    """

    def __init__(self, program: Program, weights: dict[str, torch.Tensor]):
        self.module, self.weights = program.module(), weights
        self.written = {
            str(n.target) for n in self.module.graph.nodes if n.op == "get_attr" and any(map(writes, n.users))
        }
        self.state: dict[str, torch.Tensor] = {}
        self.dead: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        seen: set[fx.Node] = set()
        for node in reversed(list(self.module.graph.nodes)):
            for used in node.all_input_nodes:
                if used not in seen:
                    seen.add(used)
                    self.dead[node].append(used)

    @torch.no_grad()
    def run(self, inputs: Iterable[Any], observe: Observer | None = None) -> Any:
        """The outputs for flattened inputs, as the graph's output node has them. `observe(node, value)` sees all values.
        Raises BadInput for nodes that cannot be run."""
        values = iter(inputs)
        env: dict[fx.Node, Any] = {}
        self.state.clear()
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                env[node] = self.enter(next(values))
            elif node.op == "get_attr":
                env[node] = self.fetch(str(node.target))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], lambda n: env[n])
            elif node.op == "call_function":
                env[node] = self.call(node, env)
            else:
                raise BadInput(f"{source(node)}: a {node.op} node cannot be verified")
            if observe is not None:
                observe(node, env[node])
            for used in self.dead[node]:
                env.pop(used, None)
        raise BadInput("the graph has no output")

    def enter(self, value: Any) -> Any:
        """An input; in float64 if it is floating-point."""
        return to_double(value)

    def fetch(self, name: str) -> Any:
        """A stored tensor by name: the given weight, of which a copy is used if the run writes to it; without one, the
        program's own."""
        tensor = self.weights.get(name)
        if tensor is None:
            return fetch(self.module, name)
        return self.state.setdefault(name, tensor.clone()) if name in self.written else tensor

    def call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """The value of an operator node; `env` has the values of the nodes before it."""
        if not is_operator(node):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: env[n])
            return node.target(*args, **kwargs)  # type: ignore[operator]
        return invoke(node, evaluated(node, env))


def evaluated(node: fx.Node, env: dict[fx.Node, Any]) -> dict[str, Any]:
    """The node's arguments by schema name, with values in place of nodes, float dtypes widened, and flags set to eval
    mode."""
    values = fx.node.map_arg(arguments(node), lambda n: env[n])
    a = {k: to_double(v) if isinstance(v, torch.dtype) else v for k, v in values.items()}
    name = op_name(node)
    if name in DROPOUTS:
        a["train"] = False
    elif name == "batch_norm" and a["running_mean"] is not None:
        a["training"] = wanted(node, False).get("training", False)
        a["momentum"] = 0.0  # the statistics stay as they are
    elif name == "scaled_dot_product_attention":
        a["dropout_p"] = 0.0
    made = not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(a))
    if made and "dtype" in a and a["dtype"] is None and isinstance(node.meta.get("val"), torch.Tensor):
        a["dtype"] = to_double(node.meta["val"].dtype)  # otherwise zeros and the like have the default dtype, float32
    return a


def invoke(node: fx.Node, a: dict[str, Any]) -> Any:
    """Call the node's operator on arguments given by schema name. An operator that draws random numbers draws the same ones
    for every node of the same name, so that two programs can be compared."""
    if op_name(node).startswith("fake_quantize_per_channel"):
        a = a | {"scale": a["scale"].float()}  # takes no wider scales; they were stored like this
    args, kwargs = [], {}
    for spec in schema(node.target).arguments:
        if spec.kwarg_only:
            kwargs[spec.name] = a[spec.name]
        else:
            args.append(a[spec.name])
    draws = torch.Tag.nondeterministic_seeded in node.target.tags  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=[], enabled=draws):
        if draws:
            torch.manual_seed(zlib.crc32(node.name.encode()))
        return node.target(*args, **kwargs)  # type: ignore[operator]


# --------------------------------------------------------------------------------------------------------------- inputs
def eval_flags(program: Program) -> dict[str, dict[str, Any]]:
    """The arguments that the mode decides (dropout, batch_norm), as in eval mode, by the node's name."""
    return {node.name: wanted(node, False) for _, node in switched(program.module())}


def example_inputs(program: Program) -> list[Any]:
    """The program's example inputs, flattened in the order of its placeholders."""
    return pytree.tree_leaves((program.args, program.kwargs))


def _inputs(program: Program) -> list[tuple[fx.Node, Any]]:
    """The input nodes of a program, each with its example input."""
    nodes = [n for n in program.module().graph.nodes if n.op == "placeholder"]
    return list(zip(nodes, example_inputs(program), strict=True))


def random_inputs(program: Program, generator: torch.Generator, sizes: dict[Any, int] | None = None) -> list[Any]:
    """New inputs like the example's: floats are redrawn with the same mean and spread, everything else is kept.

    sizes: new values of the program's size symbols; tensors that depend on them are repeated or cut to fit. Floats that
    take at most two values (masks) are kept; constant ones are redrawn from N(0, 1).
    """
    result = []
    for node, leaf in _inputs(program):
        if not isinstance(leaf, torch.Tensor):
            result.append(leaf)
            continue
        for d, size in enumerate(node.meta["val"].shape if sizes else ()):
            expression = None if isinstance(size, int) else size.node.expr
            if expression is not None and expression.free_symbols & set(sizes or ()):
                n = int(expression.subs(sizes))
                leaf = leaf.index_select(d, torch.arange(n, device=leaf.device) % max(leaf.shape[d], 1))
        result.append(_redraw(leaf, generator))
    return result


def _redraw(leaf: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not leaf.is_floating_point() or leaf.numel() < 2:
        return leaf
    wide = leaf.detach().double()
    spread, mean = wide.std(), wide.mean()
    if len(wide.flatten()[:64].unique()) <= 2 and spread > 0:
        return wide
    noise = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
    return noise * spread + mean if spread > 0 else noise


def size_symbols(program: Program) -> dict[Any, tuple[int, int]]:
    """Dynamic sizes of the inputs: symbol -> (its value in the example, the first dimension that has it)."""
    places: dict[Any, tuple[int, int]] = {}
    for node, leaf in _inputs(program):
        if isinstance(leaf, torch.Tensor):
            for d, size in enumerate(node.meta["val"].shape):
                if not isinstance(size, int) and size.node.expr.is_symbol:
                    places.setdefault(size.node.expr, (leaf.shape[d], d))
    return places


# --------------------------------------------------------------------------------------------------------------- errors
def relative_error(a: Any, b: Any) -> float:
    """Worst max|a - b| / max|b| over the output tensors; inf if shapes differ, if a value is NaN, or if it is infinite in
    only one of them. Tensors of integers and booleans must be equal (0 or inf)."""
    left, right = flatten_outputs(a), flatten_outputs(b)
    if len(left) != len(right):
        return float("inf")
    return max((_tensor_error(x, y) for x, y in zip(left, right, strict=True)), default=0.0)


def _tensor_error(x: torch.Tensor, y: torch.Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    if not x.numel():
        return 0.0
    if not (y.is_floating_point() or y.is_complex()):
        return 0.0 if torch.equal(x.to(y.dtype), y) else float("inf")
    x = x.to(y.dtype)
    same = x == y
    if same.all():
        return 0.0
    difference = torch.where(same, torch.zeros((), dtype=y.dtype, device=y.device), x - y).abs()
    scale = y.abs().nan_to_num(0.0, posinf=0.0).max()  # the largest finite entry
    error = float(difference.max() / scale) if scale > 0 else float("inf")
    return error if error == error else float("inf")
