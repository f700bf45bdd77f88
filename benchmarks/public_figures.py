"""Hold predictions of the roofline against latencies that others have published.

    python benchmarks/public_figures.py                         # or [--again]

Each figure was read at the address beside it. The network has the published architecture and random weights, since a
prediction depends on shapes alone. The first prediction comes from the data sheet. The two others are calibrated by one row,
the first of a device, precision and source, which does not count: one row can fit one number, which is a common factor or a
time of every run that belongs to no kernel. Published times of YOLO11 on Jetson are those of whole images through a Python
library, and those of EfficientViT include the transfer of data. YOLO11 needs the package `ultralytics`; without it those
rows are skipped. Results go to benchmarks/results/public_figures.json and .md, and a run that was ended goes on where it
was; --again predicts all rows anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from common import revision, save, write

RESULTS = Path(__file__).parent / "results"
NVIDIA = "https://docs.nvidia.com/deeplearning/tensorrt/tensorflow-quantization-toolkit/docs/docs/model_zoo.html"
ULTRALYTICS = "https://github.com/ultralytics/ultralytics/blob/main/docs/en/guides/nvidia-jetson.md"
MODELS = "https://github.com/ultralytics/ultralytics/blob/main/docs/en/models/yolo11.md"
EFFICIENTVIT = "https://github.com/mit-han-lab/efficientvit/blob/master/applications/efficientvit_cls/README.md"
YOLO = {  # milliseconds at batch 1 and 640 x 640: fp16, int8
    "agx-orin": {"n": (2.60, 2.45), "s": (3.68, 3.01), "m": (6.79, 5.12), "l": (8.11, 6.60), "x": (13.66, 9.78)},
    "orin-nano": {"n": (4.91, 3.91), "s": (7.30, 5.25), "m": (13.99, 9.58), "l": (17.57, 12.37), "x": (32.94, 20.72)},
    "orin-nx": {"n": (4.85, 4.37), "s": (7.55, 5.63), "m": (14.45, 10.19), "l": (18.53, 13.36), "x": (35.99, 22.32)},
}
ROWS = [  # target, precision, network, milliseconds, source; the first of a target and precision calibrates
    *(("rtx-sm80", "int8", name, ms, NVIDIA) for name, ms in
      (("resnet50", 0.46), ("resnet101", 0.84), ("mobilenet_v2", 0.30), ("efficientnet_b0", 0.67))),
    *((target, kind, f"yolo11{size}", ms[i], ULTRALYTICS) for target, sizes in YOLO.items()
      for i, kind in enumerate(("fp16", "int8")) for size, ms in sizes.items()),
    *(("rtx-sm75", "fp16", f"yolo11{size}", ms, MODELS) for size, ms in
      {"n": 1.5, "s": 2.5, "m": 4.7, "l": 6.2, "x": 11.3}.items()),
    *(("agx-orin", "fp16", f"efficientvit_{size}", ms, EFFICIENTVIT) for size, ms in
      {"b1 224": 1.48, "b1 256": 1.57, "b1 288": 1.82, "b2 224": 2.63, "b2 256": 2.84, "b2 288": 3.30, "b3 224": 4.36,
       "b3 256": 4.74, "b3 288": 5.63}.items()),
]  # fmt: skip
GOALS = {"sheet": 1.5, "factor": 1.2, "per_run": 1.2}
TITLES = {"sheet": "Data sheet", "factor": "Calibrated by a factor", "per_run": "Calibrated by a time of every run"}


def program(name: str) -> Any:
    """The network as a program for one image."""
    import torch

    import graphcomb

    torch.manual_seed(0)
    if name.startswith("yolo"):
        from ultralytics.nn.tasks import DetectionModel

        model, size = DetectionModel(f"{name}.yaml", verbose=False).eval(), 640
        model.model[-1].export, model.model[-1].format = True, "onnx"
    elif name.startswith("efficientvit"):
        import timm

        kind, size = name.split()[0], int(name.split()[1])
        model = timm.create_model(kind).eval()
    else:
        from torchvision import models

        model, size = models.get_model(name, weights=None).eval(), 224
    return graphcomb.capture(model, (torch.randn(1, 3, size, size),))


def predicted(source: Any, target: str, kind: str) -> float:
    """Milliseconds that the data sheet's roofline predicts."""
    from graphcomb.runtime import Roofline, get_target
    from graphcomb.runtime.prediction.layers import describe, from_dict

    roofline = Roofline(get_target(target), kind)
    rows = describe(source, 1, roofline.rules)
    return 1e3 * (sum(roofline.seconds(from_dict(row)) for row in rows) + roofline.per_run)


def compare(path: Path, again: bool = False) -> list[dict[str, Any]]:
    """The rows with both predictions. They are stored one by one, and those that are stored are not predicted again."""
    stored = [] if again or not path.exists() else json.loads(path.read_text())["rows"]
    known = {(row["target"], row["precision"], row["network"]): row for row in stored}
    programs: dict[str, Any] = {}
    for target, kind, name, ms, source in ROWS:
        if (target, kind, name) in known:
            continue
        try:
            programs[name] = programs.get(name) or program(name)
        except ModuleNotFoundError as error:
            print(f"{name}: skipped: {error}")
            continue
        sheet = predicted(programs[name], target, kind)
        row = {"target": target, "precision": kind, "network": name, "published": ms, "source": source, "sheet": sheet}
        known[target, kind, name] = row | {"commit": revision()}
        print(f"{target}, {kind}, {name}: {ms} ms published, {sheet:.2f} ms predicted", flush=True)
        save(path, {"rows": calibrated(known)})
        write(path.with_suffix(".md"), table(calibrated(known)))
    return calibrated(known)


def calibrated(known: dict[tuple[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """The known rows in the order of `ROWS`, calibrated by the first of each device, precision and source."""
    firsts: dict[tuple[str, str, str], dict[str, Any]] = {}
    found = []
    for target, kind, name, _, source in ROWS:
        if (row := known.get((target, kind, name))) is not None:
            first = firsts.setdefault((target, kind, source), row)
            factor = row["sheet"] * first["published"] / first["sheet"]
            per_run = row["sheet"] + first["published"] - first["sheet"]
            found.append(
                row | {"factor": None, "per_run": None}
                if row is first
                else row | {"factor": factor, "per_run": per_run}
            )
    return found


def error(row: dict[str, Any], which: str) -> float:
    """How many times too long or too short a prediction is, from 1 up."""
    quotient = row[which] / row["published"]
    return max(quotient, 1 / quotient)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [f"# Public figures\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n"]
    for which, goal in GOALS.items():
        errors = [error(row, which) for row in rows if row[which] is not None]
        if errors:
            share = sum(e <= goal for e in errors) / len(errors)
            lines.append(
                f"{TITLES[which]}: {share:.0%} of {len(errors)} rows within a factor of {goal}; median factor "
                f"{median(errors):.2f}, largest {max(errors):.2f}.\n"
            )
    titles = "".join(f" {title[0].lower()}{title[1:]}, ms | off by |" for title in TITLES.values())
    lines.append(f"| target | precision | network | published, ms |{titles}")
    lines.append("| --- " * 10 + "|")
    for row in rows:
        cells = [row["target"], row["precision"], row["network"], f"{row['published']:.2f}"]
        for which in GOALS:
            cells += ["", ""] if row[which] is None else [f"{row[which]:.2f}", f"{row[which] / row['published']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"- {source}" for source in dict.fromkeys(row["source"] for row in rows))]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="predict anew what has a result")
    compare(RESULTS / "public_figures.json", parser.parse_args().again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
