"""Which constants of a graph are weights, and the form in which layers store them.

A matrix product with a constant, and the addition of a constant after it, are one linear layer, whose weight is stored as
(outputs, inputs); an addition after a convolution is its bias; recurrent weights are in PyTorch's order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .names import Names
from .operators.recurrent import WEIGHTS as RECURRENT
from .operators.recurrent import in_torch_order
from .table import LINEAR, Step

# By operator, inputs that are weights if they are constant; those in `OTHERS` only if they have more than one entry.
LAYERS: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), LINEAR: (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1),
    "BatchNormalization": (1, 2), "LayerNormalization": (1, 2), "RMSNormalization": (1,), "PRelu": (1,),
    "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2), "Einsum": tuple(range(8)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), tuple(range(RECURRENT, RECURRENT + 8))),
}  # fmt: skip
OTHERS: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), (0, 1)), "Gather": (0,), "Concat": tuple(range(8)), "Expand": (0,),
    "Where": (1, 2),
}  # fmt: skip
BUFFERS: dict[str, tuple[int, ...]] = {"BatchNormalization": (3, 4)}
# Operators that prepare an image: their constants, before the first layer, are no weights.
PREPARATION = {
    "Add", "Sub", "Mul", "Div", "Cast", "Transpose", "Reshape", "Slice", "Concat", "Gather", "Split", "Unsqueeze", "Squeeze",
    "Identity",
}  # fmt: skip


@dataclass
class Plan:
    """A graph, ready to become a module.

    constants: all constants by key. parameters, buffers: for the keys of constants that become one, its path. layers: by a
    step's first output, the path of the module that the step belongs to.
    """

    steps: list[Step]
    constants: dict[str, np.ndarray]
    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    layers: dict[str, str] = field(default_factory=dict)


def plan(steps: list[Step], constants: dict[str, np.ndarray], inputs: Iterable[str], outputs: Iterable[str]) -> Plan:
    """Bring layers into PyTorch's form, and name their weights."""
    steps = _Layers(steps, constants, set(outputs)).run()
    _separate(steps, constants)
    result, names, raw = Plan(steps, constants), Names(), set(inputs)
    for number, step in enumerate(steps):
        table = step.op == "Gather" and step.inputs[0] in constants
        prepared = step.op in PREPARATION and not table and any(name in raw for name in step.inputs)
        if prepared and all(name in raw or name in constants for name in step.inputs if name):
            raw.update(step.outputs)
        for index, key in enumerate(step.inputs):
            array = constants.get(key)
            if array is None or array.dtype.kind not in "fV" or key in result.parameters or key in result.buffers:
                continue
            if index in BUFFERS.get(step.op, ()):
                result.buffers[key] = names.path(key, step, index, number)
            elif _is_weight(step, index, constants) and not (prepared and index in OTHERS.get(step.op, ())):
                result.parameters[key] = names.path(key, step, index, number)
        path = next((p for k in step.inputs for p in (result.parameters.get(k), result.buffers.get(k)) if p), "")
        if path and step.op in LAYERS:
            result.layers[next(filter(None, step.outputs))] = path.rpartition(".")[0]
    return result


def _separate(steps: list[Step], constants: dict[str, np.ndarray]) -> None:
    """Give layers copies of the constants that they do not share in the model.

    Exporters store equal constants once: the weight 1 of a norm and the variance 1 of another one, all biases 0. Sharing
    them would tie weights that the model trains apart. Layers are one layer that is called again if all their constants are
    the same and one of these has unequal entries; those keep sharing.
    """
    uses = Counter(name for step in steps for name in step.inputs)
    alike: dict[tuple[str, ...], int] = {}
    kept: dict[str, int] = {}
    for number, step in enumerate(steps):
        owned = tuple(name for name in step.inputs if name in constants)
        owner = alike.setdefault(owned, number) if any(_unequal(constants[name]) for name in owned) else number
        statistics = BUFFERS.get(step.op, ())
        for index in {*LAYERS.get(step.op, ()), *statistics}:
            key = step.inputs[index] if index < len(step.inputs) else ""
            if key not in owned or uses[key] < 2 or (_unequal(constants[key]) and index not in statistics):
                continue
            if kept.setdefault(key, owner) != owner or step.inputs.index(key) != index:
                step.inputs[index] = f"{key}:{owner}_{index}"
                constants[step.inputs[index]] = constants[key]


def _unequal(array: np.ndarray) -> bool:
    return array.size > 0 and bool((array != array.flat[0]).any())


def _is_weight(step: Step, index: int, constants: dict[str, np.ndarray]) -> bool:
    if step.op == "InstanceNormalization":  # with scale 1 and bias 0 it is part of a decomposed group norm
        scale, bias = (constants.get(name) for name in step.inputs[1:3])
        return scale is None or bias is None or not ((scale == 1).all() and (bias == 0).all())
    if index in LAYERS.get(step.op, ()):
        return True
    return index in OTHERS.get(step.op, ()) and constants[step.inputs[index]].size > 1


@dataclass
class _Layers:
    """Rewrites steps as layers."""

    steps: list[Step]
    constants: dict[str, np.ndarray]
    outputs: set[str]

    def run(self) -> list[Step]:
        self.readers: dict[str, list[Step]] = {}
        for step in self.steps:
            for name in step.inputs:
                self.readers.setdefault(name, []).append(step)
        self.uses = Counter(name for step in self.steps for name in step.inputs)
        gone: list[int] = []
        for step in self.steps:
            if step.op == "Gemm":
                self._gemm(step)
            elif step.op == "MatMul":
                self._matmul(step)
            elif step.op in ("LSTM", "GRU", "RNN"):
                self._recurrent(step)
            unbiased = step.op in (LINEAR, "Conv", "ConvTranspose") and len([n for n in step.inputs if n]) == 2
            if unbiased and (add := self._bias(step)):
                gone.append(id(add))
        return [step for step in self.steps if id(step) not in gone]

    def _put(self, key: str, form: str, array: np.ndarray) -> str:
        """Store another form of a constant and return its key: the constant's own if nothing else reads it, else one that
        all readers of this form share."""
        name = key if self.uses[key] == 1 and key not in self.outputs else f"{key}.{form}"
        self.constants[name] = np.ascontiguousarray(array)
        return name

    def _matmul(self, step: Step) -> None:
        weight = self.constants.get(step.inputs[1])
        if weight is not None and weight.ndim == 2 and weight.dtype.kind == "f":
            step.op, step.inputs[1] = LINEAR, self._put(step.inputs[1], "transposed", weight.T)

    def _gemm(self, step: Step) -> None:
        a = step.attributes
        weight = self.constants.get(step.inputs[1])
        third = step.inputs[2] if len(step.inputs) > 2 else ""
        bias = self.constants.get(third) if third else None
        if weight is None or a.get("transA", 0) or (third and bias is None):
            return
        alpha, beta, transposed = a.get("alpha", 1.0), a.get("beta", 1.0), a.get("transB", 0)
        weight = weight if transposed else weight.T
        if bias is not None and bias.ndim == 2 and bias.shape[0] != 1:
            return  # the bias has a row for each sample
        if not transposed or alpha != 1:
            scaled = weight if alpha == 1 else (weight * alpha).astype(weight.dtype)
            step.inputs[1] = self._put(step.inputs[1], f"scaled{alpha:g}_{transposed}", scaled)
        if bias is not None and (bias.shape != weight.shape[:1] or beta != 1):
            full = np.broadcast_to((bias * beta).astype(bias.dtype).reshape(-1), weight.shape[:1])
            step.inputs[2] = self._put(third, f"scaled{beta:g}_{len(full)}", full)
        step.op, step.attributes = LINEAR, {}

    def _bias(self, step: Step) -> Step | None:
        """Take over a constant that is added after a layer without a bias. Returns the addition, which becomes superfluous,
        or None."""
        weight, output = self.constants.get(step.inputs[1]), step.outputs[0]
        readers = self.readers.get(output, [])
        if weight is None or output in self.outputs or len(readers) != 1 or readers[0].op != "Add":
            return None
        add = readers[0]
        key = next((name for name in add.inputs if name != output), output)
        bias = self.constants.get(key)
        channels = weight.shape[0]
        if step.op == "ConvTranspose":
            channels = weight.shape[1] * step.attributes.get("group", 1)
        if bias is None or bias.size != channels or bias.dtype != weight.dtype:
            return None
        after = 0 if step.op == LINEAR else weight.ndim - 2
        most = after + 1 if step.op == LINEAR else after + 2
        if not after < bias.ndim <= most or bias.shape[bias.ndim - 1 - after] != channels:
            return None
        name = self._put(key, "bias", bias.reshape(-1)) if bias.ndim > 1 else key
        step.inputs = [*step.inputs[:2], name]
        step.outputs = list(add.outputs)
        return add

    def _recurrent(self, step: Step) -> None:
        names = [*step.inputs, *[""] * RECURRENT][:RECURRENT]
        w, r, b = (self.constants.get(name) for name in names[1:4])
        if w is None or r is None or (b is None and names[3]):
            return
        rows = in_torch_order(step.op, w, r, b)
        for d, row in enumerate(rows):
            for part, array in zip(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), row, strict=False):
                key = f"{names[1]}.{part}_l0{'_reverse' if d else ''}"
                self.constants[key] = array
                names.append(key)
        step.inputs = [name if i not in (1, 2, 3) else "" for i, name in enumerate(names)]
