"""What a bench bundle measured, layer by layer: which layers its models have, which ONNX nodes compute them, and which of
them each kernel of a profile ran. Source: ours.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from torch import fx

from ...graph.comb.solve import Comb
from ...graph.errors import BadInput
from ...graph.files import read_json
from ...graph.nodes import arguments, is_operator, op_name
from ...graph.program import Program
from ...graph.workload.fusion import ONNXRUNTIME, Rules, classify
from ...graph.workload.layers import Layer, Layers
from ..devices.table import Target, get_target
from ..engines import origins
from ..engines.trt.log import SOURCE
from ..kit.bench_device import FORMAT

# What ONNX Runtime and TensorRT compute in the kernel of the convolution before it.
FOLLOWERS = ("Relu", "Clip", "LeakyRelu", "Add", "HardSigmoid", "Sigmoid")
# Endings that ONNX Runtime's rewrites give to the names of nodes.
REWRITTEN = re.compile(r"(_nchwc|_token_\d+|/\w+Fusion)+$")
BUSY = 0.1  # share of a model's runs that may have met something else on the processor


@dataclass
class Measured:
    """One model of a bundle: its layers, the median seconds of a run, and the kernels of its profile, each as indices of
    layers, number of launches and seconds within the run. Kernels that share a layer are one."""

    name: str
    layers: list[Layer]
    seconds: float
    kernels: list[tuple[tuple[int, ...], int, float]] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- layers
def describe(program: Program, batch: int = 1, rules: Rules = ONNXRUNTIME) -> list[dict[str, Any]]:
    """The layers of a program as JSON-able rows: name (of the weight, else of the node), node, call (the operator), op,
    sizes and options (see `Layer`), and beside and joined where they are not nothing. batch: where it is dynamic. rules:
    which nodes are one kernel."""
    return [describe_one(node, layer) for node, layer in Layers(Comb(program), batch, rules).at({})]


def describe_one(node: fx.Node, layer: Layer) -> dict[str, Any]:
    """A layer and the node that it is of, as `describe` has them."""
    if layer.op == "copy" and (node.op == "placeholder" or classify(node) in ("product", "depthwise", "attention")):
        return {"name": f"copy of {node.name}", "node": node.name, "call": "copy"} | to_dict(layer)
    weight = arguments(node).get("weight") if is_operator(node) else None
    while isinstance(weight, fx.Node) and weight.op == "call_function" and len(weight.all_input_nodes) > 0:
        weight = weight.all_input_nodes[0]  # quantised, or computed from the parameter otherwise
    name = str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else node.name
    return {"name": name, "node": node.name, "call": op_name(node)} | to_dict(layer)


def to_dict(layer: Layer) -> dict[str, Any]:
    found: dict[str, Any] = {"op": layer.op, "sizes": dict(layer.sizes), "options": dict(layer.options)}
    return found | {key: value for key in ("beside", "joined") if (value := getattr(layer, key))}


def from_dict(row: Mapping[str, Any]) -> Layer:
    """The layer of a row of `describe`, also after JSON. Raises KeyError, TypeError or AttributeError for another."""

    def pairs(values: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items())

    beside, joined = row.get("beside", 0), row.get("joined", False)
    return Layer(row["op"], pairs(row["sizes"]), pairs(row["options"]), int(beside), bool(joined))


def name_nodes(rows: Sequence[Mapping[str, Any]], model: onnx.ModelProto) -> list[dict[str, Any]]:
    """The rows of `describe` with `onnx`: names of the ONNX nodes, and of their results, that compute each layer, as far
    as the exported model tells; nothing is guessed."""
    found = _nodes(rows, model)
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for tensor in node.input:
            readers[tensor].append(node)
    merged: dict[str, tuple[int, onnx.NodeProto]] = {}
    for i, (row, nodes) in enumerate(zip(rows, found, strict=True)):
        last = nodes[-1] if row["op"] == "conv" and nodes else None
        while last and len(after := readers[last.output[0]]) == 1 and after[0].op_type in FOLLOWERS:
            last = after[0]
            merged[last.name] = i, last  # of two sums into one, the later convolution's
    for i, node in merged.values():
        found[i].append(node)
    names = [[text for node in nodes for text in (node.name, *node.output)] for nodes in found]
    return [dict(row) | {"onnx": texts} for row, texts in zip(rows, names, strict=True)]


def _nodes(rows: Sequence[Mapping[str, Any]], model: onnx.ModelProto) -> list[list[onnx.NodeProto]]:
    """The ONNX nodes of every layer itself. Convolutions are known by their weight. Other operators keep their order under
    export, so that where the model has as many nodes of an operator as there are layers of it, the first is the first."""
    groups: dict[str, dict[str, list[onnx.NodeProto]]] = defaultdict(dict)
    origin = origins.read(model)
    for node in model.graph.node:
        if node.name in origin:
            name = origin[node.name].node
            groups[re.sub(r"_\d+$", "", name)].setdefault(name, []).append(node)
    weights = {node.input[1]: node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose")}
    found: list[list[onnx.NodeProto]] = [[] for _ in rows]
    layers: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        if row["op"] == "conv":
            found[i] += [weights[row["name"]]] if row["name"] in weights else []
        else:
            layers[row["call"]].append(i)
    for call, which in layers.items():
        # An attention is exported as two products around a softmax.
        parts = [(call, 1)] if call != "scaled_dot_product_attention" else [("matmul", 2), ("softmax", 1)]
        for name, each in parts:
            nodes = list(groups[name].values())
            if len(nodes) == each * len(which) and (name == call or name not in layers):
                for k, i in enumerate(which):
                    found[i] += [n for part in nodes[each * k : each * (k + 1)] for n in part]
    return found


# ------------------------------------------------------------------------------------------------------------ kernels
def kernel_names(row: Mapping[str, Any], inspector: Mapping[str, str]) -> list[str]:
    """The ONNX nodes (or results) that a kernel of a profile says it computes. inspector: metadata by kernel."""
    name = str(row["name"])
    sources = SOURCE.findall(inspector.get(name, ""))
    return sources or [REWRITTEN.sub("", part) for part in name.split(" + ")]


def kernels(model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[tuple[set[int], list[str], float]]:
    """The kernels of a measured model's profile: indices of the layers it computes (empty where that is not known), its
    names, and milliseconds as profiled; kernels that share a layer joined."""
    owner = {text: i for i, row in enumerate(rows) for text in row.get("onnx", ())}
    inspector = {
        str(entry.get("Name")): str(entry.get("Metadata", ""))
        for entry in model.get("engine", {}).get("inspector", ())
        if isinstance(entry, Mapping)
    }
    found: list[tuple[set[int], list[str], float]] = []
    for row in model.get("layers", ()):
        which = {owner[text] for text in kernel_names(row, inspector) if text in owner}
        names, ms = [str(row["name"])], float(row["ms"])
        for other in [other for other in found if other[0] & which]:
            found.remove(other)
            which, names, ms = which | other[0], other[1] + names, ms + other[2]
        found.append((which, names, ms))
    return found


# ------------------------------------------------------------------------------------------------------------- reading
def are_results(path: str | Path) -> bool:
    """Whether a file looks like the results of a bench bundle."""
    try:
        return _are_results(read_json(Path(path)))
    except BadInput:
        return False


def _are_results(found: Any) -> bool:
    return isinstance(found, dict) and str(found.get("format", "")).startswith("graphcomb-bench")


def read_results(path: str | Path) -> dict[str, Any]:
    """What bench_device.py wrote. Raises BadInput for another file or another version's, or one without models."""
    path = Path(path)
    found = read_json(path)
    if not _are_results(found) or "models" not in found:
        raise BadInput(f"{path}: not the results of a bench bundle")
    if found["format"] != FORMAT:
        raise BadInput(f"{path}: of format {found['format']}, this version reads {FORMAT}; bundle and measure again")
    models = found["models"]
    if not isinstance(models, dict) or not models or not all(isinstance(row, dict) for row in models.values()):
        raise BadInput(f"{path}: models: expected what was measured, by name of the model; measure again")
    return found


def precision_of(bundle: Mapping[str, Any], name: str) -> str:
    """The precision of a bundle's model, which need not be the one that the bundle was asked for."""
    return str(bundle["models"][name].get("precision", bundle["precision"]))


def latency(model: Mapping[str, Any]) -> tuple[str, float]:
    """How a measured model was run, in a CUDA graph where it could be, and its median seconds, on the device where that
    is known."""
    mode = "graph" if "graph" in model["latency"] else "stream"
    found = model["latency"][mode]
    return mode, (found.get("gpu_ms") or found["host_ms"])["median"] / 1e3


def read_measured(
    results: Sequence[str | Path | Mapping[str, Any]], target: Target | None = None, dtype: str | None = None
) -> tuple[list[Measured], dict[str, Any]]:
    """The models of bundles' results whose layers are known, and what they are of: target, precision, device, engine.
    Of a bundle with several precisions, the models that have the one asked for, by default the bundle's.

    Raises BadInput for results of another target, engine, precision or device than the target's and the first ones', and
    for the same measurement twice.
    """
    runs: list[Measured] = []
    about: dict[str, Any] = {}
    seen: list[tuple[str, Mapping[str, Any]]] = []
    for given in results:
        found = given if isinstance(given, Mapping) else read_results(given)
        where = "these results" if isinstance(given, Mapping) else str(given)
        if twin := next((other for other, earlier in seen if earlier == found), None):
            raise BadInput(f"{where}: the same measurement as {twin}; give it once")
        seen.append((where, found))
        try:
            about = _same(found, where, about, target, dtype)
            for name, model in found["models"].items():
                if precision_of(found["bundle"], name) != about["precision"]:
                    continue
                rows = found["bundle"]["models"][name].get("layers") or ()
                mode, _ = latency(model)
                if model["engine"].get("contended", 0) > BUSY * model["latency"][mode]["runs"]:
                    raise BadInput(f"{where}: {name} was measured on a busy machine; measure again")
                if rows:
                    runs.append(_run(name, model, rows))
                    about["modes"] = sorted({*about.get("modes", ()), mode})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise BadInput(f"{where}: not the results of a bench bundle ({type(error).__name__}: {error})") from error
    if not runs:
        raise BadInput(
            "calibration: the bundle says nothing about the layers of its models; bundle programs (.pt2) or a run's folder"
        )
    return runs, about


def _same(
    found: Mapping[str, Any], where: str, about: Mapping[str, Any], target: Target | None, dtype: str | None
) -> dict[str, Any]:
    """What the results are of; BadInput when that is not what is wanted."""
    bundle = found["bundle"]
    if bundle.get("target") is None:
        raise BadInput(f"{where}: the bundle names no target; write it with --target")
    device = get_target(bundle["target"])
    if target is not None and device.name != target.name:
        raise BadInput(f"{where}: measured for target {device.name}, not {target.name}")
    if found["engine"] != device.backend:
        raise BadInput(f"{where}: measured with {found['engine']}, and {device.name} runs {device.backend}")
    measured = [precision_of(bundle, name) for name in found["models"]] or [bundle["precision"]]
    if dtype is not None and dtype not in measured:
        raise BadInput(f"{where}: measured in {' and '.join(dict.fromkeys(measured))}, not {dtype}")
    kind = dtype or (bundle["precision"] if bundle["precision"] in measured else measured[0])
    new = {
        "target": device.name, "precision": kind, "device": found["device"].get("model"),
        "engine": f"{found['engine']} {found['version']}",
    }  # fmt: skip
    different = [f"{k} {v}, not {about[k]}" for k, v in new.items() if k in about and about[k] != v]
    if different:
        raise BadInput(f"{where}: cannot be joined with the results before: {different[0]}")
    return {**about, **new}


def _run(name: str, model: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Measured:
    layers, (_, seconds) = [from_dict(row) for row in rows], latency(model)
    found = kernels(model, rows)
    times = [1e3 * seconds, *(ms for _, _, ms in found)]
    if not seconds > 0 or not all(map(math.isfinite, times)) or any(x.macs() < 0 or x.entries() < 0 for x in layers):
        raise ValueError(f"sizes or times of {name}")
    whole = sum(ms for _, _, ms in found) / 1e3
    scale = min(1.0, seconds / whole) if whole else 0.0  # the profiler slows the run down
    known = [(tuple(sorted(w)), len(names), scale * ms / 1e3) for w, names, ms in found if w and ms > 0]
    return Measured(name, layers, seconds, known)
