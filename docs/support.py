"""Write start/support.md beside this file from the targets and from benchmarks/results: `make docs-support`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphcomb.runtime.devices.table import EVIDENCE, TARGETS

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
PASSES = (
    "RemoveChannels",
    "Distill",
    "Repair",
    "Recalibrate",
    "PruneDepth",
    "Sparsify",
    "Minimise",
    "tune",
    "Quantize",
)
BACKENDS = ("ONNX Runtime", "TensorRT-RTX", "TensorRT", "OpenVINO")
COLUMNS = (*PASSES, *BACKENDS)
SMALL = {  # names in the results of small networks of benchmarks/networks.py
    "resnet": "ResNet, small", "mobilenet": "MobileNetV2, small", "deit": "DeiT, small", "convnext": "ConvNeXt, small",
    "lraspp": "LR-ASPP, small", "segformer": "SegFormer, small", "cnn": "CNN, small",
}  # fmt: skip
NAMES = {
    "efficientnet_lite0": "EfficientNet-Lite0", "efficientnet_lite1": "EfficientNet-Lite1",
    "efficientnet_lite2": "EfficientNet-Lite2", "mobilenet_v2": "MobileNetV2", "crnn": "CRNN", "craft": "CRAFT",
}  # fmt: skip
GALLERY = {"segformer": "SegFormer, small"}  # cards whose network has a row of another name
Found = Iterator[tuple[str, str, str]]  # network, column, "measured" or "built"


def results(name: str) -> dict[str, Any]:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def rows(name: str) -> dict[str, Any]:
    found = results(name)
    return found.get("rows", found)


def known(network: str) -> str:
    """The title of a network by its name in the results."""
    name = network.replace("-", "_").removesuffix(" things")  # benchmarks spell them both ways
    return NAMES[name] if name in NAMES else SMALL[network.removeprefix("fashion ").removeprefix("scenes ")]


def by_accuracy() -> Found:
    """Networks whose accuracy, or agreement with the dense network, was measured after a pass."""
    for name in ("accuracy", "accuracy_long"):
        for key, row in rows(name).items():
            network, _, method, _ = key.split("/")
            if method.startswith("graphcomb"):
                yield SMALL[network], "RemoveChannels", "measured"
                yield SMALL[network], "Distill", "measured"
                if "speedup" in row:
                    yield SMALL[network], "ONNX Runtime", "measured"
    for row in rows("repair").values():
        for state, column in (("repair", "Repair"), ("repair + recalibrate", "Recalibrate")):
            if state in row.get("scores", {}):
                yield known(row["network"]), column, "measured"
                yield known(row["network"]), "RemoveChannels", "measured"
    for key in rows("repair_training"):
        if "repaired" in key:
            yield SMALL[key.split("/")[0]], "Repair", "measured"
    for key in rows("depth"):
        network, _, method, _ = key.split("/")
        if method != "channels":
            yield SMALL[network], "PruneDepth", "measured"
            yield SMALL[network], "ONNX Runtime", "measured"
    for key in rows("sparsity"):
        network, _, method, _ = key.split("/")
        if not method.startswith("modelopt"):
            yield known(network), "Sparsify", "measured"
    for row in rows("finish_rows").values():
        yield SMALL[row["network"]], "Minimise", "measured"
    for name in results("precision"):
        yield known(name), "Quantize", "measured"
        yield known(name), "ONNX Runtime", "measured"
    for key in rows("joint"):
        yield known(key.split("/")[0]), "tune", "measured"
        yield known(key.split("/")[0]), "ONNX Runtime", "measured"


def by_gallery() -> Found:
    for path in sorted((RESULTS / "gallery").glob("*.json")):
        row = json.loads(path.read_text())
        network = GALLERY.get(path.stem, row["title"])
        yield network, "RemoveChannels", "measured"
        yield network, "Repair", "measured"
        if "ratio" in row["latency"]:
            yield network, "ONNX Runtime", "measured"


def by_latency() -> Found:
    """Networks of torchvision, timm and transformers with random weights: what was measured, or only built."""
    for key in results("prediction").get("variants", {}):
        yield key.split()[0], "ONNX Runtime", "measured"
        yield key.split()[0], "RemoveChannels", "built"
    for key, row in rows("engines").items():
        network, kind = key.split()[0], key.split()[-1]
        if row["status"] == "ok":
            yield network.split("/")[-1], "TensorRT-RTX", "built"
            if kind == "int8":
                yield network.split("/")[-1], "Quantize", "built"


def matrix() -> dict[str, dict[str, str]]:
    """For each network and column the strongest evidence."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for network, column, evidence in (*by_accuracy(), *by_gallery(), *by_latency()):
        if found[network].get(column) != "measured":
            found[network][column] = evidence
    return found


def table(networks: dict[str, dict[str, str]], columns: tuple[str, ...]) -> list[str]:
    lines = [
        f"| network | {' | '.join(f'`{c}`' if c in PASSES else c for c in columns)} |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    lines += [f"| {name} | {' | '.join(row.get(c, '') for c in columns)} |" for name, row in sorted(networks.items())]
    return lines


def targets() -> list[str]:
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for target in TARGETS.values():
        groups[target.backend, target.evidence].append(f"`{target.name}`")
    order = list(EVIDENCE)
    lines = ["| targets | engine library | tried |", "| --- | --- | --- |"]
    for (backend, evidence), names in sorted(groups.items(), key=lambda item: order.index(item[0][1])):
        lines.append(f"| {', '.join(names)} | `{backend}` | {evidence} |")
    return lines


def families() -> list[str]:
    """Counts over whole libraries of models, whose weights are random."""
    capture, zoo, back = (
        Counter(row.get("status") for row in rows(name).values()) for name in ("capture", "zoo", "onnx_zoo")
    )
    checked = sum("error" in row and row["error"] is not None for row in rows("zoo").values() if row["status"] == "ok")
    ways = [row["for_class"]["status"] for row in rows("transplant").values() if "for_class" in row]
    engines, kernels = [row["status"] for row in rows("engines").values()], rows("kernels").values()
    close = sum(abs(row["predicted"] / row["built"] - 1) <= 0.1 for row in kernels)
    return [
        "| models | what | result | file |", "| --- | --- | --- | --- |",
        f"| torchvision, timm, transformers | capture | {capture['ok']} of {capture.total()} equal eager in every bit "
        "| `benchmarks/results/capture.md` |",
        f"| torchvision, timm | comb and `RemoveChannels` | {zoo['ok']} that export, of which {checked} were checked in "
        "float64 | `benchmarks/results/zoo.md` |",
        f"| torchvision, timm | `transplant` | {ways.count('exact')} of {len(ways)} that ran to the end | "
        "`benchmarks/results/transplant.md` |",
        f"| ONNX files | `from_onnx`, pruned, exported | {back['ok']} of {back.total()} to the end | "
        "`benchmarks/results/onnx_zoo.md` |",
        f"| torchvision, timm | engines for three targets | {engines.count('ok')} of {len(engines)} built | "
        "`benchmarks/results/engines.md` |",
        f"| torchvision, timm, transformers | number of kernels predicted | {close} of {len(kernels)} within 10 % | "
        "`benchmarks/results/kernels.md` |",
    ]  # fmt: skip


def page() -> str:
    found = matrix()
    trained = {name: row for name, row in found.items() if any(row.get(c) == "measured" for c in PASSES)}
    others = {name: row for name, row in found.items() if name not in trained}
    lines = [
        "# Support matrix", "",
        "**What was tried, and how far?**", "",
        "- *measured*: accuracy was measured after this pass, or latency in this library.",
        "- *built*: it was applied to random weights, or an engine was built on a machine without the device.",
        "- An empty cell: *untested* there.", "",
        "`make docs-support` makes this page from `benchmarks/results/`.",
        "", "## Targets", "", "```bash", "graphcomb targets", "```", "", *targets(), "",
        "No latency of a TensorRT engine has been measured yet. [Bundles](../deploy/jetson.md) are how you measure yours.",
        "",
        "## Trained networks, by pass", "", *table(trained, PASSES), "",
        "Figures: [Choosing passes](choosing.md), [Results](../results.md). Pictures: [Gallery](../gallery.md).", "",
        "## Trained networks, by library", "", *table(trained, BACKENDS), "",
        "## Networks with random weights", "", *table(others, ("RemoveChannels", "Quantize", *BACKENDS)), "",
        "## Whole libraries of models", "", *families(),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    (DOCS / "start" / "support.md").write_text(page())
