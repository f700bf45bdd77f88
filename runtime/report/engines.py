"""The report's section about an engine: library, kernels, padded axes, quantisation that buys nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..engines.trt.kernels import UNFUSED
from .reading import items, mapping
from .text import number

PAD_TEXTS = {
    "kernel": "an extra kernel",
    "fused": "inside a kernel that is there anyway",
    "weights": "zeros in the weights",
}


def engine_section(engine: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows of an `EngineReport.to_dict()`."""
    kernels: list[dict[str, Any]] = [
        {
            "name": str(kernel.get("name", "")),
            "kind": str(kernel.get("kind", "")),
            "padding": bool(kernel.get("padding")),
        }
        | {key: items(kernel.get(key), str) for key in ("nodes", "inputs", "outputs")}
        for kernel in items(engine.get("kernels"))
    ]
    memory = {str(name): number(size) for name, size in mapping(engine.get("memory")).items()}
    unfused = [(row.get("how"), items(row.get("nodes"), str)) for row in items(engine.get("unfused"))]
    return {
        "title": " ".join(str(engine[k]) for k in ("backend", "version") if engine.get(k)),
        "target": engine.get("target", ""),
        "precision": engine.get("precision", ""),
        "path": str(engine.get("path", "")),
        "bytes": engine.get("bytes"),
        "seconds": number(engine.get("seconds")),
        "kernels": kernels,
        "padding": sum(kernel["padding"] for kernel in kernels),
        "nodes": len({node for kernel in kernels for node in kernel["nodes"]}),
        "memory": [(name, size) for name, size in memory.items() if size],
        "pads": [_pad(engine, pad) for pad in items(engine.get("pads"))],
        "unfused": [{"text": UNFUSED.get(str(how), ""), "nodes": nodes} for how, nodes in unfused if how != "wide"],
        "wide": [node for how, nodes in unfused if how == "wide" for node in nodes],
        "warnings": items(engine.get("warnings"), str),
    }


def _pad(engine: Mapping[str, Any], pad: Mapping[str, Any]) -> dict[str, Any]:
    """A padded axis, with the passes that changed its nodes."""
    nodes, origins = items(pad.get("nodes"), str), mapping(engine.get("origins"))
    passes = [name for node in nodes for name in items(mapping(origins.get(node)).get("passes"), str)]
    texts = {key: str(pad.get(key, "")) for key in ("kernel", "how", "axis", "before", "after", "note")}
    alignment = pad.get("alignment", "")
    texts["alignment"] = "none" if alignment is None else str(alignment)
    return texts | {"nodes": nodes, "origin": ", ".join(dict.fromkeys(passes))}
