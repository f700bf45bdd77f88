"""The report's section about an engine: library, kernels, padded axes, quantisation that buys nothing."""

from __future__ import annotations

from typing import Any

from ..engines.trt.kernels import UNFUSED
from ..summary import Engine, Pad

PAD_TEXTS = {
    "kernel": "an extra kernel",
    "fused": "inside a kernel that is there anyway",
    "weights": "zeros in the weights",
}


def engine_section(engine: Engine) -> dict[str, Any]:
    """What the template shows of an engine."""
    return {
        "title": f"{engine.backend} {engine.version}".strip(),
        "target": engine.target,
        "precision": engine.precision,
        "path": engine.path,
        "bytes": engine.bytes,
        "seconds": engine.seconds,
        "kernels": engine.kernels,
        "padding": sum(kernel.padding for kernel in engine.kernels),
        "nodes": len({node for kernel in engine.kernels for node in kernel.nodes}),
        "memory": [(name, size) for name, size in engine.memory.items() if size],
        "pads": [_pad(engine, pad) for pad in engine.pads],
        "unfused": [{"text": UNFUSED.get(r.how, ""), "nodes": r.nodes} for r in engine.unfused if r.how != "wide"],
        "wide": [node for row in engine.unfused if row.how == "wide" for node in row.nodes],
        "warnings": engine.warnings,
    }


def _pad(engine: Engine, pad: Pad) -> dict[str, Any]:
    """A padded axis, with the passes that changed its nodes."""
    passes = [name for node in pad.nodes if node in engine.origins for name in engine.origins[node].passes]
    alignment = "none" if pad.alignment is None else str(pad.alignment)
    return dict(pad) | {"alignment": alignment, "origin": ", ".join(dict.fromkeys(passes))}
