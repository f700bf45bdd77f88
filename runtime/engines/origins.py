"""The origin of an ONNX node: the node of the program's graph, its module, and the passes that changed it.

The exporter stores origins in the metadata of the ONNX file, so that the kernels of an engine that any library builds from
the file can be traced back to the program. Source: ours.
"""

import ast
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import onnx
from torch.export import ExportedProgram

from ...graph.program import Program
from ..engine_summary import Origin

KEY = "graphcomb.origins"
SCOPES = "pkg.torch.onnx.name_scopes"


def scopes(node: onnx.NodeProto) -> tuple[str, str]:
    """Return the module path and the graph node that torch.onnx recorded for an ONNX node; empty texts if it did not."""
    text = {p.key: p.value for p in node.metadata_props}.get(SCOPES)
    names = ast.literal_eval(text) if text else []
    return (names[-2] if len(names) > 1 else ""), (names[-1] if names else "")


def trace(program: Program, places: Mapping[str, tuple[str, str]]) -> dict[str, Origin]:
    """Return origins by name of the ONNX node. places: module path and graph node, by name of the ONNX node."""
    changes = [(record["pass"], set(_changed(record))) for record in program.history if "pass" in record]
    origins = {}
    for name, (module, node) in places.items():
        passes = [pass_ for pass_, names in changes if ({module, node} - {""}) & names]
        origins[name] = Origin(node=node, module=module, passes=tuple(dict.fromkeys(passes)))
    return origins


def nodes_of_weights(
    exported: ExportedProgram, places: Mapping[str, tuple[str, str]], weights: Collection[str]
) -> list[str]:
    """Return the names of the ONNX nodes that come from a layer with one of these weights.

    places: module path and graph node, by name of the ONNX node. weights: names of parameters, which may be tied.
    """
    stored = exported.graph_signature.inputs_to_parameters
    reading = {n for n in exported.graph.nodes if stored.get(n.name) in weights}
    layers = {user.name for n in reading for user in n.users}
    return [name for name, (_, node) in places.items() if node in layers]


def store(model: onnx.ModelProto, origins: Mapping[str, Origin]) -> None:
    """Write the origins of the nodes that the model contains to its metadata."""
    kept = {n.name: origins[n.name].model_dump() for n in model.graph.node if n.name in origins}
    others = {p.key: p.value for p in model.metadata_props}
    onnx.helper.set_model_props(model, others | {KEY: json.dumps(kept, separators=(",", ":"))})


def read(model: onnx.ModelProto) -> dict[str, Origin]:
    """Return the origins that `store` wrote, by name of the ONNX node; empty for a model without them."""
    text = {p.key: p.value for p in model.metadata_props}.get(KEY)
    rows = json.loads(text) if text else {}
    return {name: Origin(**row) for name, row in rows.items()}


def _changed(record: Mapping[str, Any]) -> Iterable[str]:
    """Yield the names of nodes, parameters and modules that a pass's record says it changed."""
    rows = [row for row in record.get("changed", ()) if isinstance(row, Mapping)]
    rows += [row for row in record.get("layers", ()) if _shrank(row)]
    for row in rows:
        for name in (row.get("what"), row.get("into"), row.get("name"), *row.get("nodes", ())):
            if isinstance(name, str):
                yield from (name, name.rpartition(".")[0])


def _shrank(row: Mapping[str, Any]) -> bool:
    channels = row.get("channels", {})
    return channels.get("before") != channels.get("after")
