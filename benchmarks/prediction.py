"""Compare predicted with measured latencies of pruned networks, and measure the speed-up from fewer MACs.

    python benchmarks/prediction.py [--only variants speedup] [--networks resnet18] [--limit 3]

All networks run on one thread of ONNX Runtime, in fp32 at batch 1, with random weights, since only time is measured.
Variants of small networks are pruned at several ratios, locally and globally, in channels, heads or both, and each is
measured in turns with its dense network. Four predictions are compared: a latency table of this machine, the table
anchored to the dense network's measured time, the roofline of the data sheet, and the roofline calibrated with the
measurements of the other networks. Then five larger networks are pruned to half and a quarter of their MACs and measured.
A measurement that other processes disturbed is skipped and repeated in a later run. Results go to
benchmarks/results/prediction.json and prediction.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import revision, save, write
from gpu import NETWORKS as LARGE
from gpu import network as large

RESULTS = Path(__file__).parent / "results" / "prediction.json"
# Name and image size: so small that a measurement takes seconds.
SMALL = {
    "resnet18": 128, "mobilenet_v2": 128, "mobilenet_v3_small": 160, "timm:vit_tiny_patch16_224": 224,
    "timm:convnext_atto": 128,
}  # fmt: skip
RATIOS = (0.15, 0.3, 0.45, 0.6, 0.75)
SHARES = {"2x": 0.5, "4x": 0.25}
METHODS = ("anchored", "table", "calibrated", "roofline")
HEADS = {
    "anchored": "latency table, anchored",
    "table": "latency table",
    "calibrated": "roofline, calibrated",
    "roofline": "roofline, data sheet",
}


def variants(name: str) -> dict[str, Any]:
    """Options of RemoveChannels by the variant's name."""
    found: dict[str, Any] = {}
    for ratio in RATIOS:
        for scope in ("local", "global"):
            found[f"{scope} {ratio}"] = {"ratio": ratio, "scope": scope}
    if "vit" in name:
        for ratio in RATIOS[1::2]:
            found[f"hidden {ratio}"] = {"ratio": ratio, "scope": "local", "kinds": ("hidden", "channel")}
            found[f"head {ratio}"] = {"ratio": ratio, "scope": "local", "kinds": ("head", "head width")}
    else:
        found |= {f"odd {ratio}": {"ratio": ratio, "scope": "local", "round_to": 1} for ratio in RATIOS[1::2]}
    return found


def small(name: str) -> Any:
    """The dense network as a program."""
    import torch

    import graphcomb

    torch.manual_seed(0)
    if name.startswith("timm:"):
        import timm

        model = timm.create_model(name.removeprefix("timm:"), pretrained=False)
    else:
        from torchvision import models

        model = models.get_model(name, weights=None)
    return graphcomb.capture(model.eval(), (torch.randn(1, 3, SMALL[name], SMALL[name]),))


def measured(dense: Any, pruned: Any, seconds: float, least: int = 20) -> dict[str, Any] | None:
    """Milliseconds of both, fused, in turns; None when fewer than `least` rounds were undisturbed."""
    from graphcomb.passes import Fuse
    from graphcomb.runtime import bench

    programs = [Fuse()(program).program for program in (dense, pruned)]
    found = bench(programs, names=["dense", "pruned"], seconds=seconds, min_runs=least, max_runs=3 * least)
    if found.contended:
        return None
    ms = [timing.ms["median"] for timing in found.timings]
    kept = {"ms": ms[1], "dense_ms": ms[0], "faster": found.ratio, "rounds": found.rounds, "rejected": found.rejected}
    return kept | {"environment": found.environment, "commit": revision()}


def refused(build: Any) -> tuple[Any, str]:
    """What a surgery gives, or why it gives nothing."""
    from graphcomb.graph.errors import GraphcombError

    try:
        return build(), ""
    except GraphcombError as error:
        return None, str(error)[:300]


# ------------------------------------------------------------------------------------------------------------- variants
def measure_variants(data: dict, options: argparse.Namespace) -> Iterator[str]:
    """Measure what has no row yet; a line about each."""
    from graphcomb.passes import RemoveChannels
    from graphcomb.runtime.prediction.layers import describe

    for name in options.networks:
        wanted = list(variants(name).items())[: options.limit]
        missing = [(v, o) for v, o in wanted if f"{name} {v}" not in data["variants"]]
        dense = small(name) if missing else None
        for variant, step in missing:
            pruned, why = refused(lambda step=step, dense=dense: RemoveChannels(**step)(dense, seed=0).program)
            row: dict[str, Any] | None = {"refused": why} if why else measured(dense, pruned, options.seconds)
            if row is None:
                yield f"{name}, {variant}: the machine is busy; left for another run"
                continue
            if pruned is not None:
                row |= {"macs": pruned.macs, "dense_macs": dense.macs}
                save(layer_file(options, name, variant), describe(pruned), sort_keys=False)
                save(layer_file(options, name), describe(dense), sort_keys=False)
            data["variants"][f"{name} {variant}"] = row
            save(options.results, data)
            yield f"{name}, {variant}: {why or 'measured'}"


def layer_file(options: argparse.Namespace, *names: str) -> Path:
    """Where the layers of a variant, or of a dense network, are kept: too long for the results."""
    return options.table.parent / "layers" / f"{' '.join(names).replace(':', '-')}.json"


def layers_of(options: argparse.Namespace, *names: str) -> list[dict]:
    """The layers of a variant, or of a dense network, which is made again where they are not at hand."""
    from graphcomb.passes import RemoveChannels
    from graphcomb.runtime.prediction.layers import describe

    file = layer_file(options, *names)
    if not file.exists():
        program = small(names[0])
        if len(names) > 1:
            program = RemoveChannels(**variants(names[0])[names[1]])(program, seed=0).program
        save(file, describe(program), sort_keys=False)
    return json.loads(file.read_text())


def predict_variants(data: dict, options: argparse.Namespace) -> Iterator[str]:
    """Predict what is measured, by tables (which measure what they do not know yet) and by rooflines."""
    from graphcomb.graph.errors import Contended
    from graphcomb.graph.workload.layer import run_seconds
    from graphcomb.runtime import LatencyTable, Roofline, get_target
    from graphcomb.runtime.prediction.layers import from_dict

    table, plain = LatencyTable(options.table), Roofline(get_target("cpu"), "fp32")
    rows = {key: row for key, row in data["variants"].items() if "ms" in row}
    known = {key: layers_of(options, *key.split(" ", 1)) for key in rows}
    known |= {name: layers_of(options, name) for name in {key.split(" ")[0] for key in rows}}
    calibrated = {name: calibration(rows, known, name) for name in known if name in SMALL}
    for key, row in rows.items():
        layers = [from_dict(layer) for layer in known[key]]
        found = row.setdefault("predicted_ms", {})
        for method, by in (("roofline", plain), ("calibrated", calibrated[key.split(" ")[0]])):
            found.pop(method, None)
            if by is not None:
                found[method] = 1e3 * run_seconds(by, layers)
        try:
            found["table"] = 1e3 * run_seconds(table, layers)
            dense = 1e3 * run_seconds(table, map(from_dict, known[key.split(" ")[0]]))
            found["anchored"] = found["table"] * row["dense_ms"] / dense
        except Contended as error:
            yield f"{key}: {error}"
        save(options.results, data)
    data["calibrations"] = {name: by.calibration for name, by in calibrated.items() if by is not None}


def calibration(rows: dict, known: dict, left_out: str) -> Any:
    """The roofline fitted to all networks but one, dense and pruned; None without others."""
    from graphcomb.runtime import Roofline

    layers, models = {}, {}
    for key, row in rows.items():
        name = key.split(" ")[0]
        if name != left_out:
            for model, ms in ((key, "ms"), (name, "dense_ms")):
                layers[model] = {"layers": known[model]}
                latency = {"stream": {"runs": 1, "host_ms": {"median": row[ms]}}}
                models[model] = {"engine": {}, "latency": latency, "layers": []}
    if not models:
        return None
    bundle = {"target": "cpu", "precision": "fp32", "models": layers}
    about = {"engine": "onnxruntime", "version": "", "device": {"model": None}}
    return Roofline.calibrated({"bundle": bundle, "models": models} | about)


def agreement(rows: list[dict], method: str) -> dict[str, Any] | None:
    """Rank correlation of predicted and measured time, and the median relative error; None for fewer than three."""
    import numpy as np
    from scipy.stats import spearmanr

    pairs = [(row["predicted_ms"][method], row["ms"]) for row in rows if method in row.get("predicted_ms", {})]
    if len(pairs) < 3:
        return None
    predicted, found = np.array(pairs).T
    errors = np.abs(predicted / found - 1)
    rank = float(spearmanr(predicted, found).statistic)
    return {
        "count": len(pairs),
        "spearman": rank,
        "median_error": float(np.median(errors)),
        "worst": float(errors.max()),
    }


def summarise(data: dict) -> None:
    rows = {key: row for key, row in data["variants"].items() if "ms" in row}
    names = [name for name in SMALL if any(key.startswith(f"{name} ") for key in rows)]
    groups = {name: [row for key, row in rows.items() if key.startswith(f"{name} ")] for name in names}
    groups["all"] = list(rows.values())
    data["agreement"] = {name: {m: agreement(group, m) for m in METHODS} for name, group in groups.items()}


# -------------------------------------------------------------------------------------------------------------- speedup
def measure_speedup(data: dict, options: argparse.Namespace) -> Iterator[str]:
    """The five networks at half and a quarter of their MACs."""
    import torch

    import graphcomb
    from graphcomb.passes import RemoveChannels

    for name in options.large:
        missing = [s for s in SHARES if f"{name} {s}" not in data["speedup"]]
        if not missing:
            continue
        model, shape = large(name)
        dense = graphcomb.capture(model, (torch.randn(1, *shape),))
        for share in missing:
            build = RemoveChannels(macs=SHARES[share])
            pruned, why = refused(lambda build=build, dense=dense: build(dense, seed=0).program)
            row = {"refused": why} if why else measured(dense, pruned, options.long, 8)
            if row is None:
                yield f"{name}, {share}: the machine is busy; left for another run"
                continue
            if pruned is not None:
                fewer = dense.macs / pruned.macs
                row |= {"macs": pruned.macs, "dense_macs": dense.macs, "per_mac": row["faster"] / fewer}
            data["speedup"][f"{name} {share}"] = row
            save(options.results, data)
            yield f"{name}, {share}: {why or 'measured'}"


# ---------------------------------------------------------------------------------------------------------------- table
def table(data: dict) -> str:
    """The results as Markdown."""
    lines = [f"# Prediction\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}\n"]
    done = [row for row in (*data["variants"].values(), *data["speedup"].values()) if "environment" in row]
    for where in sorted(
        {f"{r['environment']['cpu']}, ONNX Runtime {r['environment']['versions']['onnxruntime']}" for r in done}
    ):
        lines.append(f"{where}.\n")
    if data.get("agreement"):
        lines.append(
            "## Variants\n\nSpearman's rank correlation of predicted and measured time, and the median relative error.\n"
        )
        lines.append(
            "| network | variants | "
            + " | ".join(HEADS[m] for m in METHODS)
            + " |\n"
            + "| --- " * (2 + len(METHODS))
            + "|"
        )
        for name, found in data["agreement"].items():
            cells = [f"{f['spearman']:.3f}, {f['median_error']:.0%}" if (f := found[m]) else "too few" for m in METHODS]
            count = max((f["count"] for f in found.values() if f), default=0)
            lines.append(f"| {name} | {count} | " + " | ".join(cells) + " |")
        lines.append("")
    if data["speedup"]:
        lines.append("## Speedup\n\nHow many times faster for how many times fewer MACs, and the quotient.\n")
        lines.append("| network | dense, ms | fewer MACs | times faster | faster / fewer |\n" + "| --- " * 5 + "|")
        for key, row in data["speedup"].items():
            name = key.split(" ")[0]
            if "refused" in row:
                lines.append(f"| {name} | | | {row['refused'].replace('|', '/')} | |")
                continue
            fewer = row["dense_macs"] / row["macs"]
            lines.append(
                f"| {name} | {row['dense_ms']:.2f} | {fewer:.2f} | {row['faster']:.2f} | {row['per_mac']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["variants", "speedup"], choices=["variants", "speedup"])
    parser.add_argument("--networks", nargs="+", default=list(SMALL), choices=SMALL, metavar="NAME")
    parser.add_argument("--large", nargs="+", default=list(LARGE), choices=LARGE, metavar="NAME")
    parser.add_argument("--limit", type=int, default=None, help="variants of each network; by default all")
    parser.add_argument("--seconds", type=float, default=20, help="time limit of one comparison of small networks")
    parser.add_argument("--long", type=float, default=120, help="and of large ones")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, default=None, help="latency table; default in the cache folder")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    from graphcomb.data import cache_folder

    options.table = options.table or cache_folder() / "prediction" / "latency.json"
    data = json.loads(options.results.read_text()) if options.results.exists() else {}
    data = {"variants": {}, "speedup": {}} | data
    if "variants" in options.only:
        for line in itertools.chain(measure_variants(data, options), predict_variants(data, options)):
            print(line, flush=True)
    if "speedup" in options.only:
        for line in measure_speedup(data, options):
            print(line, flush=True)
    summarise(data)
    save(options.results, data)
    write(options.results.with_suffix(".md"), table(data))
    return 0


if __name__ == "__main__":
    sys.exit(main())
