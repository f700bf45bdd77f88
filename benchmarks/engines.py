"""Build engines of zoo models with TensorRT-RTX for three targets, in fp16, INT8 and FP8, on a machine without a GPU.

    python benchmarks/engines.py                 # resumes; results in benchmarks/results/engines.json and engines.md
    python benchmarks/engines.py --only 'torchvision/*' --kinds fp16

Every network (random weights, one 224 x 224 image) is captured, folded, exported and built. INT8 is `Quantize` with scales
from two random images, since the figures are about what builds and fuses, not about accuracy; mixed is INT8 in every second
layer and fp16 in the others, with a dynamic batch of 1 to 8; FP8 is built for the targets that have it. Three networks are
also pruned to half and a quarter of their MACs at the default alignment; the last section counts the padding kernels that
the dense network does not have. A failure is listed with the operator. The engines are not run: `graphcomb bundle` measures
latencies on a device.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import tempfile
import time
import warnings
from pathlib import Path

from common import revision, save, write
from zoo import environment, run_child

RESULTS = Path(__file__).parent / "results"
TARGETS = ("rtx-sm86", "rtx-sm89", "rtx-sm120")
MODELS = [
    *(f"torchvision/{name}" for name in (
        "resnet18", "resnet50", "resnext50_32x4d", "vgg11_bn", "densenet121", "mobilenet_v2", "mobilenet_v3_large",
        "efficientnet_b0", "efficientnet_v2_s", "regnet_y_400mf", "mnasnet1_0", "shufflenet_v2_x1_0", "squeezenet1_1",
        "googlenet", "convnext_tiny", "swin_t", "vit_b_16", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large",
    )),
    *(f"timm/{name}" for name in (
        "deit_tiny_patch16_224", "repvgg_b0", "ghostnet_100", "hrnet_w18_small", "mobilevit_s", "res2net50_26w_4s",
        "pvt_v2_b0", "poolformer_s12", "levit_128s", "edgenext_small", "efficientformer_l1",
    )),
]  # fmt: skip
PRUNED = ("torchvision/resnet50", "torchvision/mobilenet_v3_large", "torchvision/convnext_tiny")
KINDS = {  # and the share of the MACs that stays
    "fp16": 1.0, "int8": 1.0, "mixed": 1.0, "fp8": 1.0, "fp16 2x": 0.5, "fp16 4x": 0.25
}  # fmt: skip


def targets(kind: str) -> tuple[str, ...]:
    """The targets that compute in a kind's precision."""
    return TARGETS[1:] if kind == "fp8" else TARGETS


def make(name: str):
    """The network with random weights, in eval mode. The normalisations know the statistics of two random images: with
    those of initialisation the activations of some networks vanish in fp16."""
    import torch

    torch.manual_seed(0)
    model = untrained(name)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(torch.randn(2, 3, 224, 224))
    return model.eval()


def untrained(name: str):
    """The network as it is initialised."""
    family, _, rest = name.partition("/")
    if family == "timm":
        import timm

        return timm.create_model(rest).eval()
    from torchvision import models

    segmentation = rest in models.list_models(module=models.segmentation)
    options = {"weights_backbone": None} if segmentation else {}
    if rest == "googlenet":
        options["init_weights"] = False
    return models.get_model(rest, weights=None, **options).eval()


def measure(name: str, kind: str) -> dict:
    """One row: what was built for each target, or the stage and reason of the first failure."""
    import torch

    import graphcomb
    from graphcomb.passes import Fuse, Quantize, RemoveChannels
    from graphcomb.passes.base import Context
    from graphcomb.runtime import build_engine, export_onnx, get_target

    torch.set_num_threads(1)
    row: dict = {"status": "ok", "targets": {}}
    stage, start = "capture", time.process_time()
    try:
        image = torch.randn(2 if kind == "mixed" else 1, 3, 224, 224)
        program = graphcomb.capture(make(name), (image,), dynamic_shapes="batch" if kind == "mixed" else None)
        dense = program.macs
        context = Context(data=[image, torch.randn_like(image)], target=get_target(targets(kind)[0]), dtype="fp16")
        if KINDS[kind] < 1:
            stage = "prune"
            program = RemoveChannels(macs=KINDS[kind])(program, context).program
        stage = "fold"
        program = Fuse()(program, context).program
        if kind in ("int8", "mixed", "fp8"):
            stage = "quantise"
            precision = "fp8" if kind == "fp8" else "int8"
            quantise = functools.partial(Quantize, samples=2, calibration="minmax", precision=precision)
            found = quantise(include=("*",))(program, context)
            if kind == "mixed":
                layers = [changed["what"] for changed in found.record["changed"]]
                found = quantise(include=tuple(layers[::2]))(program, context)
            program, row["quantised"] = found.program, len(found.record["changed"])
        row["macs"] = program.macs / dense
        stage = "export"
        with tempfile.TemporaryDirectory() as folder:
            exported = export_onnx(program, Path(folder) / "net.onnx", "fp16", target=context.target)
            row |= {"parity": exported.parity, "nodes": sum(exported.nodes.values())}
            for target in targets(kind):
                stage = target
                built = build_engine(exported.path, target, Path(folder) / "net.rtx")
                row["targets"][target] = {
                    "kernels": len(built.kernels),
                    "padding": sorted(", ".join(kernel.nodes) for kernel in built.padding),
                    "pads": sorted({str(pad) for pad in built.pads if pad.how == "kernel"}),
                    "unfused": sorted(str(u) for u in built.unfused if u.how != "idle"),
                    "unread": len(built.unread),
                    "bytes": built.bytes,
                    "seconds": round(built.seconds, 1),
                }
    except Exception as error:  # whatever fails is a row of the table
        text = " ".join(f"{type(error).__name__}: {error}".split())
        row |= {"status": "failed", "stage": stage, "why": text.replace(tempfile.gettempdir(), "")[:400]}
    return row | {"cpu_seconds": round(time.process_time() - start, 1)}


def jobs(kinds: list[str]) -> list[tuple[str, str]]:
    """Pairs of a network and a kind."""
    return [(name, kind) for kind in kinds for name in (MODELS if KINDS[kind] == 1 else PRUNED)]


def table(data: dict) -> str:
    """The results as Markdown."""
    rows = data["rows"]
    lines = [f"# Engines\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n\n{data['environment']}.\n"]
    for kind in KINDS:
        found = {name: rows[f"{name} {kind}"] for name in MODELS if f"{name} {kind}" in rows}
        if not found:
            continue
        good = sum(row["status"] == "ok" for row in found.values())
        rest = len(jobs([kind])) - len(found)
        note = f" ({rest} not measured yet)" if rest else ""
        lines.append(f"\n## {kind}: {good} of {len(found)} networks build for {', '.join(targets(kind))}{note}\n")
        lines.append("| network | MACs left | ONNX nodes | kernels | kernels that pad | parity | engine MB | CPU s |")
        lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for name, row in found.items():
            if row["status"] != "ok":
                lines.append(
                    f"| {name} | failed at {row.get('stage', '')}: {row.get('why', '').replace('|', '/')} |" + " |" * 6
                )
                continue
            built = row["targets"].values()
            spans = {key: _span([_count(t[key]) for t in built]) for key in ("kernels", "padding")}
            size, parity = next(iter(built))["bytes"] / 1e6, row["parity"]
            lines.append(
                f"| {name} | {row['macs']:.2f} | {row['nodes']} | {spans['kernels']} | {spans['padding']} | "
                f"{f'{parity:.1e}' if parity is not None else ''} | {size:.1f} | {row['cpu_seconds']:.0f} |"
            )
    lines += ["\n## Kernels that pad\n"]
    for name in PRUNED:
        for kind in ("fp16 2x", "fp16 4x"):
            if (row := rows.get(f"{name} {kind}")) and row["status"] == "ok":
                dense = rows.get(f"{name} fp16", {}).get("targets", {})
                new = [len(t["padding"]) - len(dense.get(k, {}).get("padding", [])) for k, t in row["targets"].items()]
                lines.append(f"- {name}, {kind}: {max(max(new), 0)} more than dense")
    return "\n".join(lines) + "\n"


def _count(value: int | list) -> int:
    return len(value) if isinstance(value, list) else value


def _span(values: list[int]) -> str:
    """One number, or the range over the targets."""
    return str(values[0]) if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern over network names")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    parser.add_argument("--failed", action="store_true", help="measure anew what failed")
    parser.add_argument("--seconds", type=float, default=600, help="time limit for one row")
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--limit", type=float, default=float("inf"), help="start no new row after so many seconds")
    parser.add_argument("--results", type=Path, default=RESULTS / "engines.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import timm  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    import graphcomb.passes
    import graphcomb.runtime  # noqa: F401

    path: Path = options.results
    path.parent.mkdir(exist_ok=True)
    data = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    data["environment"], start = environment(), time.monotonic()
    wanted = [(n, k) for n, k in jobs(options.kinds) if fnmatch.fnmatch(n, options.only)]
    for i, (name, kind) in enumerate(wanted):
        old = data["rows"].get(f"{name} {kind}")
        if old and not options.again and not (options.failed and old["status"] != "ok"):
            continue
        if time.monotonic() - start > options.limit:
            print(f"stopped after {options.limit:.0f} s; run again to go on")
            break
        row = run_child(functools.partial(measure, name, kind), options.seconds, options.gigabytes)
        data["rows"][f"{name} {kind}"] = {"commit": revision()} | row
        save(path, data)
        print(f"[{i + 1}/{len(wanted)}] {name} {kind}: {row['status']} {row.get('why', '')[:200]}", flush=True)
    if data["rows"]:
        write(path.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
