"""The module that computes an ONNX graph, step by step. Its weights are parameters, so it can be trained."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BadInput, GraphcombError, in_a_line
from .dtypes import to_torch
from .names import Names, cleaned, identifier
from .steps import attempt, perform
from .table import Call, Handler, Step, Value
from .weights import Plan


class Layer(nn.Module):
    """Holds the weights of a step and runs it, so that the graph knows the module of the step's operators."""

    def forward(self, call: Call) -> list[Value]:
        return perform(call)


class OnnxModule(nn.Module):
    """The weights of an ONNX graph under their names, which may be any: the class has no other attribute than `graph`.
    `build` gives `forward` the names of the graph's inputs."""

    graph: OnnxGraph


class OnnxGraph:
    """The steps of an ONNX graph, run with the weights in `module`.

    inputs, outputs: names in the file. batch: the batch size that the file fixes, if the module is to take others.
    """

    def __init__(self, plan: Plan, inputs: Sequence[str], outputs: Sequence[str], module: OnnxModule):
        self.module = module
        module.graph = self
        self.steps, self.inputs, self.outputs = plan.steps, list(inputs), list(outputs)
        self.batch: int | None = None
        self.complete = False  # whether all constants are stored, which one run without gradients does before a trace
        self.host = {k: v for k, v in plan.constants.items() if k not in plan.parameters and k not in plan.buffers}
        self.paths = dict(plan.parameters) | dict(plan.buffers)
        self.layers = plan.layers
        self.names = Names()
        for key, path in plan.parameters.items():
            self._register(path, nn.Parameter(to_torch(plan.constants[key])))
        for key, path in plan.buffers.items():
            self._register(path, to_torch(plan.constants[key]))
        for path in plan.layers.values():
            self._folder(path)
        self.names.paths.update(self.paths.values())
        used = {name for step in self.steps for name in step.inputs} | set(outputs)
        self.host = {k: v for k, v in self.host.items() if k in used}
        self.last = {name: i for i, step in enumerate(self.steps) for name in step.inputs}

    @property
    def training(self) -> bool:
        return self.module.training

    def _folder(self, path: str) -> nn.Module:
        module: nn.Module = self.module
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, Layer())
            module = module._modules[part]  # type: ignore[assignment]
        return module

    def _register(self, path: str, tensor: Tensor) -> None:
        folder, _, name = path.rpartition(".")
        if isinstance(tensor, nn.Parameter):
            self._folder(folder).register_parameter(name, tensor)
        else:
            self._folder(folder).register_buffer(name, tensor)

    def _fetch(self, path: str) -> Tensor:
        folder, _, name = path.rpartition(".")
        return getattr(self.module.get_submodule(folder), name)

    def constant(self, key: str, array: np.ndarray) -> Tensor:
        """The tensor that is stored under a key; at first it is made from the array."""
        if key not in self.paths:
            if self.complete:  # a value that only occurs in a trace
                return to_torch(array)
            self.paths[key] = self.names.unique(f"constants.{cleaned(key)}")
            self._register(self.paths[key], to_torch(array))
        return self._fetch(self.paths[key])

    def run(self, inputs: Sequence[Tensor], keep: Collection[str] = ()) -> dict[str, Value]:
        """The outputs, and the intermediate values named in `keep`, by name. Raises BadInput, naming the node that
        fails."""
        wanted = {*self.outputs, *keep}
        values: dict[str, Value] = {"": None, **self.host}
        values |= {key: self._fetch(path) for key, path in self.paths.items()}
        values |= dict(zip(self.inputs, inputs, strict=True))
        for i, step in enumerate(self.steps):
            call = Call(step, [values[name] for name in step.inputs], self)
            results = self._perform(step, call)
            for name, value in zip(step.outputs, results, strict=False):
                if name:
                    values[name] = value
            for name in step.inputs:
                if self.last[name] == i and name and name not in wanted:
                    values.pop(name, None)
        return {name: values[name] for name in wanted}

    def _perform(self, step: Step, call: Call) -> list[Value]:
        path = self.layers.get(next(filter(None, step.outputs)))
        layer: Handler = self.module.get_submodule(path) if path else perform
        if self.complete:
            return attempt(call, layer)
        try:
            return attempt(call, layer)
        except GraphcombError:
            raise
        except Exception as error:
            raise BadInput(f"{step.title}: {in_a_line(error)}") from error

    def compute(self, inputs: Sequence[Tensor]) -> Any:
        """One output as a tensor, several as a dictionary by their names."""
        values = self.run(inputs)
        tensors = {n: v if isinstance(v, Tensor) else self._lifted(n, v) for n, v in values.items()}
        return next(iter(tensors.values())) if len(tensors) == 1 else {n: tensors[n] for n in self.outputs}

    def _lifted(self, name: str, value: Value) -> Tensor:
        if value is None:
            raise BadInput(f"the output {name} is empty")
        return Call(Step("", [], [name], {}, name, 0), [], self).constant(np.asarray(value), name)


def build(plan: Plan, inputs: Sequence[str], outputs: Sequence[str]) -> OnnxGraph:
    """The graph of a plan. The forward of its module takes the graph's inputs by their names (as identifiers)."""
    names = arguments(inputs)
    Kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(n, Kind) for n in ("self", *names)])

    def forward(self: OnnxModule, *args: Tensor, **kwargs: Tensor) -> Any:
        bound = signature.bind(self, *args, **kwargs).arguments
        return self.graph.compute([bound[name] for name in names])

    forward.__signature__ = signature  # type: ignore[attr-defined]
    module = type("OnnxModule", (OnnxModule,), {"forward": forward})()
    return OnnxGraph(plan, inputs, outputs, module)


def arguments(inputs: Sequence[str]) -> list[str]:
    """The names of inputs as names of arguments, all different."""
    names: list[str] = []
    for name in map(identifier, inputs):
        while name in names:
            name += "_"
        names.append(name)
    return names


@torch.no_grad()
def complete(graph: OnnxGraph, inputs: Sequence[Tensor]) -> None:
    """Run once, so that all constants that the graph reads as tensors become buffers."""
    graph.compute(inputs)
    graph.complete = True
