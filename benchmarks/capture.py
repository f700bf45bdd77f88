"""Compare captured programs with eager models of torchvision, timm and transformers, in eval and in train mode, with
gradients.

    python benchmarks/capture.py                 # resumes; results in benchmarks/results/capture.json and capture.md
    python benchmarks/capture.py --only 'timm/s*'  # some models; --again measures them anew
    python benchmarks/capture.py --table         # only rewrite the table

Each model runs in its own process with a time and a memory limit. Weights are random. `graphcomb.graph.capture.proof`
defines what is compared and how rounding is distinguished from a difference. A model counts as refused if `capture`
raises.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import statistics
import time
import warnings
from pathlib import Path

from common import write
from zoo import build as build_vision
from zoo import environment, measure_each, timm_names, torchvision_names

RESULTS = Path(__file__).parent / "results"
SMALL = {  # options of a config, as far as it has them
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 64,
    "patch_size": 16, "num_labels": 5, "num_key_value_heads": 4, "vocab_size": 100, "pad_token_id": 0,
}  # fmt: skip
VISION = (
    "ViT DeiT Beit Data2VecVision Dinov2 Dinov2WithRegisters IJepa ViTMSN Swin Swinv2 ConvNext ConvNextV2 ResNet RegNet "
    "Bit MobileNetV1 MobileNetV2 MobileViT MobileViTV2 EfficientNet PoolFormer PvtV2 Cvt LevitForImage Segformer "
    "FocalNet HGNetV2 SwiftFormer Hiera TextNet"
).split()


def transformers_names() -> list[str]:
    return [f"transformers/{name.removesuffix('ForImage')}" for name in VISION]


def build_transformers(name: str):
    """An image classifier of transformers from a small config, or from its default one where that does not run small, and
    its input."""
    import torch
    import transformers

    kind = name.partition("/")[2]
    for options in (SMALL, {}):
        config = getattr(transformers, f"{kind}Config")()
        for key, value in options.items():
            if isinstance(getattr(config, key, None), int):
                setattr(config, key, value)
        config.num_labels = 5
        size = config.image_size if isinstance(getattr(config, "image_size", None), int) else 64 if options else 224
        try:
            torch.manual_seed(0)
            model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
            images = torch.randn(2, 3, size, size)
            with torch.no_grad():
                model(images)
        except Exception:
            if not options:
                raise
            continue
        return model, (images,)


def build(name: str):
    return build_transformers(name) if name.startswith("transformers/") else build_vision(name)


def measure(name: str) -> dict:
    """One row: worst relative error in both modes, what was warned, what was refused, and CPU seconds."""
    import torch

    from graphcomb import capture
    from graphcomb.graph.errors import CaptureError

    torch.set_num_threads(1)
    row: dict = {"model": name}
    model, inputs = build(name)
    row["params"] = sum(p.numel() for p in model.parameters())
    start, before = time.process_time(), time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            program = capture(model, tuple(inputs))
        except CaptureError as error:
            refused = str(error)
            status = "not exportable" if refused.startswith("torch.export refuses") else "refused"
            return row | {"status": status, "why": refused[:400]}
    row["cpu_s"], wall = time.process_time() - start, time.perf_counter() - before
    proof = program.proof
    row["proof_share"] = proof.seconds / wall
    row["error"], row["skipped"] = proof.error, proof.skipped
    row["warned"] = [str(w.message)[:300] for w in said if type(w.message).__name__ == "CaptureWarning"]
    row["nodes"] = len(program.graph.nodes)
    return row | {"status": "ok" if not proof.skipped else "part"}


def table(data: dict) -> str:
    rows = sorted(data["rows"].values(), key=lambda r: r["model"])
    runs = [r for r in rows if r["status"] in ("ok", "part")]
    good = [r for r in rows if r["status"] == "ok"]
    by_status = {s: sum(r["status"] == s for r in rows) for s in sorted({r["status"] for r in rows})}
    worst = max((e for r in runs for e in r["error"].values()), default=0)
    seconds = statistics.median([r["cpu_s"] for r in runs]) if runs else 0
    share = statistics.median([r["proof_share"] for r in runs]) if runs else 0
    lines = [
        "# Capture against eager\n",
        f"{len(good)} of {len(rows)} models measured so far ({data['names']} are listed) equal eager in outputs, buffers "
        f"and gradients, in eval and in train mode; all by status: "
        f"{', '.join(f'{n} {s}' for s, n in by_status.items())}. Worst difference relative to a tensor's norm: "
        f"{worst:.1e}. CPU seconds of a capture: median {seconds:.1f}, of which the proof takes {share:.0%}.\n",
        f"{data['environment']}\n",
        "| model | nodes | eval | train | CPU s | proof | warned, refused or not compared |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in rows:
        if r["status"] not in ("ok", "part"):
            lines.append(f"| {r['model']} | | | | | | {r['status']}: {r.get('why', '')[:160]} |")
            continue
        errors = [f"{r['error'][mode]:.0e}" if mode in r["error"] else "" for mode in ("eval", "train")]
        notes = "; ".join(w.removeprefix("capture: ")[:160] for w in r["warned"]).replace("|", "/")
        lines.append(
            f"| {r['model']} | {r['nodes']} | {' | '.join(errors)} | {r['cpu_s']:.1f} | {r['proof_share']:.0%} | {notes} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern over model names")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    parser.add_argument("--failed", action="store_true", help="measure anew what is neither ok nor not exportable")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--gigabytes", type=float, default=14)
    parser.add_argument("--results", type=Path, default=RESULTS / "capture.json")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    import transformers

    import graphcomb.graph  # noqa: F401

    torch.set_num_threads(1)
    path: Path = options.results
    path.parent.mkdir(exist_ok=True)
    data = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    names = transformers_names() + torchvision_names() + timm_names()
    data["environment"], data["names"] = environment() + f", transformers {transformers.__version__}", len(names)

    def wanted(name: str, old: dict | None) -> bool:
        settled = old is not None and (old["status"] in ("ok", "not exportable") or not options.failed)
        return fnmatch.fnmatch(name, options.only) and (options.again or not settled)

    if not options.table:
        measure_each(names, wanted, measure, data, options, lambda row: str(row.get("error", "")))
    if data["rows"]:
        write(path.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
