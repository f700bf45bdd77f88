"""Choose the nodes of a graph that stay in fp32 when the graph is converted to fp16, with the reason for each.

The largest number of fp16 is 65,504, the smallest about 6e-8, and it has all whole numbers only up to 2,048. Three kinds
of nodes stay in fp32: those whose measured values come near the largest number; those whose intermediate sums or powers
may exceed it on other inputs (norms written by hand, exp, pow; Softmax and LayerNormalization compute in fp32 internally);
and the last steps to an output with coordinates, such as the decoding of boxes. Source: ours.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from ....graph.errors import BadInput, nearest
from ..operators import MOVES
from .half import FP16, Half

MARGIN = 4.0  # values on other inputs may be this many times as large as the measured ones
FRAGILE = {
    "Exp": "an exponential leaves the range of fp16 from 11 on",
    "Pow": "powers leave the range of fp16",
    "ReduceProd": "products leave the range of fp16",
    "CumSum": "a running sum leaves the range of fp16, and its small terms vanish",
} | dict.fromkeys(
    "ReduceSum ReduceL1 ReduceL2 ReduceSumSquare ReduceLogSum ReduceLogSumExp".split(),
    "a sum over many values leaves the range of fp16",
)
ASKED = "asked for"
NORM = "part of a norm written by hand, whose squares fp16 cannot hold"
# AFTER: operators between a sum of squares and the division by its root (DIVIDE). ARITHMETIC, TAIL: operators that decode
# an output.
AFTER = frozenset("Add Sub Sqrt Reciprocal Pow Max Min Clip Neg Log Exp Expand Unsqueeze Squeeze Reshape Cast".split())
DIVIDE = frozenset(("Div", "Mul"))
ARITHMETIC = frozenset("Add Sub Mul Div Exp Pow".split())
COPIES = MOVES | frozenset("Expand Tile Where".split())
TAIL = ARITHMETIC | COPIES | frozenset("Sigmoid Clip Max Min Neg Cast Relu".split())
SHAPES = ("Shape", "Size")
SOFTMAX = ("Softmax", "LogSoftmax")

Ranges = Mapping[str, tuple[float, float]]


def islands(
    graph: gs.Graph,
    ranges: Ranges,
    patterns: Sequence[str] = (),
    io: bool = False,
    asked: Iterable[str] = (),
    half: Half = FP16,
) -> tuple[dict[str, str], set[str]]:
    """Return the nodes that should stay in fp32 (reason by name), and the names of the graph's inputs and outputs that
    should.

    - graph: the graph in fp32, with folded constants.
    - ranges: measured (smallest, largest) finite value of its tensors, by name.
    - patterns: names of nodes or paths of modules that stay in fp32 in any case; `*` matches any text.
    - io: whether all inputs and outputs of the graph stay in fp32.
    - asked: names of further nodes that stay in fp32 in any case.
    - half: the type of the other nodes. bf16 has the range of fp32, so only coordinates, which it rounds, stay in fp32.

    Raises BadInput for a pattern that matches no node.
    """
    search = _Islands(graph, ranges, half)
    search.by_name(patterns)
    search.keep |= dict.fromkeys(asked, ASKED)
    for node in graph.nodes if half is FP16 else ():
        search.by_range(node)
        search.by_operator(node)
    search.by_output()
    return search.keep, {t.name for t in (*graph.inputs, *graph.outputs) if io or t.name in search.io}


class _Islands:
    def __init__(self, graph: gs.Graph, ranges: Ranges, half: Half):
        self.graph, self.ranges, self.half = graph, ranges, half
        self.keep: dict[str, str] = {}
        self.masks: dict[int, bool] = {}
        self.io = {t.name for t in (*graph.inputs, *graph.outputs) if self._wide(t)}

    def by_name(self, patterns: Sequence[str]) -> None:
        for pattern in patterns:
            names = [n.name for n in self.graph.nodes if _matches(n.name, pattern)]
            if not names:
                known = {m for n in self.graph.nodes for m in (n.name, n.name.rpartition("/")[0]) if m}
                raise BadInput(f"keep_fp32: {pattern} matches no node; {nearest(pattern, sorted(known)[:200])}")
            self.keep |= dict.fromkeys(names, ASKED)

    def by_range(self, node: gs.Node) -> None:
        if node.op in SHAPES:
            return
        for tensor in (*node.inputs, *node.outputs):
            if self._wide(tensor):
                low, high = self._range(tensor)
                largest = high if high >= -low else low
                self._add(node, f"{tensor.name} reaches {largest:.3g}; fp16 ends at {FP16.largest:.0f}")
                return

    def by_operator(self, node: gs.Node) -> None:
        squares = node.op == "ReduceMean" and any(_is_square(p) for t in node.inputs[:1] for p in t.inputs)
        tiny = next((t for t in node.inputs if node.op in ("Add", "Max", "Clip") and _is_tiny(t)), None)
        if not (squares or tiny is not None or (node.op in FRAGILE and _is_float(node))):
            return
        why = NORM if squares else FRAGILE.get(node.op) or f"fp16 cannot hold its {tiny.values.flat[0]:.1g}"  # type: ignore[union-attr]
        self._add(node, why)
        for tensor in node.inputs[:1] if squares or node.op in FRAGILE else ():
            for square in tensor.inputs:
                if _is_square(square):
                    self._add(square, NORM)
        if node.op.startswith("Reduce") or tiny is not None:
            self._follow(node)

    def _follow(self, node: gs.Node) -> None:
        """Keep the nodes from a sum of squares to the division by its root in fp32."""
        for user in (u for t in node.outputs for u in t.outputs):
            if user.op in DIVIDE or user.op in AFTER:
                new = user.name not in self.keep
                self._add(user, NORM)
                if new and user.op not in DIVIDE:
                    self._follow(user)

    def by_output(self) -> None:
        """Keep the nodes that decode an output in fp32 if its values are too large for all whole numbers, or too small."""
        for output in self.graph.outputs:
            largest = max(map(abs, self._range(output)))
            small = 0 < largest < MARGIN * self.half.normal
            if (MARGIN * largest <= self.half.whole and not small) or output.dtype != np.float32:
                continue
            tail: dict[str, gs.Node] = {}
            stack = list(output.inputs)
            while stack:
                node = stack.pop()
                if node.op in TAIL and node.name not in tail:
                    tail[node.name] = node
                    stack += [p for t in node.inputs for p in t.inputs]
            if any(node.op in ARITHMETIC for node in tail.values()):
                self.io.add(output.name)
                for node in tail.values():
                    loss = "is coarse" if small else "misses whole numbers"
                    self._add(node, f"makes {output.name}, which reaches {largest:.3g}; {self.half.name} {loss} there")

    def _add(self, node: gs.Node, why: str) -> None:
        self.keep.setdefault(node.name, why)

    def _range(self, tensor: gs.Tensor) -> tuple[float, float]:
        if isinstance(tensor, gs.Constant):
            values = tensor.values[np.isfinite(tensor.values)] if tensor.dtype == np.float32 else np.zeros(1)
            return (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
        return self.ranges.get(tensor.name, (0.0, 0.0))

    def _wide(self, tensor: gs.Tensor) -> bool:
        """Return whether values may exceed the range of fp16.

        Large negative values that only mask a softmax do no harm. The values of a constant are known, so they need no
        margin.
        """
        low, high = self._range(tensor)
        margin = 1.0 if isinstance(tensor, gs.Constant) else MARGIN
        return margin * high > self.half.largest or (margin * -low > self.half.largest and not self._masks(tensor))

    def _masks(self, tensor: gs.Tensor) -> bool:
        """Return whether a tensor is only used for the scores of a softmax, directly or added to them."""
        if id(tensor) not in self.masks:
            self.masks[id(tensor)] = False  # ends the recursion if the graph had a loop
            steps = COPIES | {"Add", "Mul", "Cast"}
            self.masks[id(tensor)] = bool(tensor.outputs) and all(
                user.op in SOFTMAX or (user.op in steps and all(self._masks(t) for t in user.outputs))
                for user in tensor.outputs
            )
        return self.masks[id(tensor)]


def _matches(name: str, pattern: str) -> bool:
    module = name.rpartition("/")[0]
    return any(fnmatchcase(text, pattern) for text in (name, module)) or module.startswith(f"{pattern}.")


def _is_square(node: gs.Node) -> bool:
    if node.op == "Mul":
        return node.inputs[0] is node.inputs[1]
    return node.op == "Pow" and isinstance(node.inputs[1], gs.Constant) and bool((node.inputs[1].values % 2 == 0).all())


def _is_tiny(tensor: gs.Tensor) -> bool:
    """Return whether a tensor is a constant scalar that fp16 rounds to 0, such as an epsilon."""
    if not isinstance(tensor, gs.Constant) or tensor.dtype != np.float32 or tensor.values.size != 1:
        return False
    return 0 < abs(float(tensor.values.flat[0])) < FP16.smallest


def _is_float(node: gs.Node) -> bool:
    return any(t.dtype == np.float32 for t in node.outputs)


def with_ranges(model: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Return a model whose outputs are the smallest and the largest finite value of each float tensor of the given model,
    and the names of these tensors. Infinite values count as 0."""
    graph = gs.import_onnx(model)
    graph.toposort()
    tensors = [t for t in graph.tensors().values() if isinstance(t, gs.Variable) and t.dtype == np.float32]
    tensors = [t for t in tensors if t.inputs or any(t is i for i in graph.inputs)]
    zero = gs.Constant("graphcomb_zero", np.zeros((), np.float32))
    outputs: list[gs.Variable] = []
    for i, tensor in enumerate(tensors):
        places, finite = (
            gs.Variable(f"graphcomb_inf_{i}", np.dtype(bool)),
            gs.Variable(f"graphcomb_finite_{i}", zero.dtype),
        )
        graph.nodes.append(gs.Node("IsInf", f"graphcomb_isinf_{i}", {}, [tensor], [places]))
        graph.nodes.append(gs.Node("Where", f"graphcomb_where_{i}", {}, [places, zero, tensor], [finite]))
        for op in ("ReduceMin", "ReduceMax"):
            outputs.append(gs.Variable(f"graphcomb_{op}_{i}", zero.dtype, []))
            graph.nodes.append(gs.Node(op, outputs[-1].name, {"keepdims": 0}, [finite], [outputs[-1]]))
    graph.outputs = outputs
    return gs.export_onnx(graph, do_type_check=False), [t.name for t in tensors]


def widest(names: Sequence[str], runs: Iterable[Sequence[np.ndarray]]) -> dict[str, tuple[float, float]]:
    """Return (smallest, largest) by tensor over several runs of the model that `with_ranges` returned."""
    ranges: dict[str, tuple[float, float]] = {}
    for values in runs:
        for i, name in enumerate(names):
            low, high = float(values[2 * i]), float(values[2 * i + 1])
            old = ranges.get(name, (low, high))
            ranges[name] = min(old[0], low), max(old[1], high)
    return ranges
