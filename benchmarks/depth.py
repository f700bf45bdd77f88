"""Depth pruning (UPDP) on Fashion-MNIST: progressive or at once, searched or random blocks, depth or channels.

    python benchmarks/depth.py                                   # resumes; results/depth.json, .md and .png
    python benchmarks/depth.py --networks convnext --seeds 0     # a part of it
    python benchmarks/depth.py --latency                         # afterwards, on a quiet machine: adds latencies
    python benchmarks/depth.py --kernels                         # kernels of engines; also results/depth_kernels.json, .md
    python benchmarks/depth.py --steps 1500 --networks resnet --counts 4    # longer training: results/depth_1500.json, ...
    python benchmarks/depth.py --table                           # only rewrite the table and the plot
    python benchmarks/depth.py --full                            # larger networks and longer training, for a GPU

Needs Fashion-MNIST (apt-get install dataset-fashion-mnist). --kernels needs only the TensorRT-RTX wheel: it counts the
kernels of the engines that it builds for trained rows, if there are any, and for all networks without training, since
weights do not matter, with those blocks pruned that save most MACs. Beside them it shows the predicted savings of the
blocks.

Every network has a dense reference, which is trained once on 58,000 images and kept in the cache folder; the other 2,000
training images evaluate the candidates of the search. For each network and number of blocks the blocks are chosen once (a
supernet for each network, an evolutionary search for each number); "random" draws other blocks for every seed. A seed
determines the order of the data and the training of a row.
All rows train for the same number of steps with the same optimizer, schedule and dense teacher:

    progressive   activations and norms of the searched blocks fade over a quarter of the steps, then training goes on
    at once       the same blocks, without activations and norms from the first step (UPDP's baseline)
    at once, fit  the same, with what is removed replaced by the nearest affine maps (ours; progressive does so, too)
    random        other blocks, progressive
    channels      RemoveChannels (Fisher, global) at once to the latency of the progressive row: of the networks that
                  bisection over the share of MACs gives, the largest one that is not slower in ONNX Runtime, measured in
                  turns; this needs a quiet machine

Every result is fused; accuracy is top-1 on the 10,000 test images. A row takes about half a minute on one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networks
import torch
from accuracy import locked
from common import save, write
from torch.utils.data import DataLoader, TensorDataset

import graphcomb
from graphcomb.data import cache_folder, fashion_mnist
from graphcomb.graph.nodes import op_name
from graphcomb.graph.program import Program
from graphcomb.passes import Context, Distill, Fuse, PruneDepth, RemoveChannels
from graphcomb.passes.common.losses import accuracy
from graphcomb.passes.common.repeat import fingerprint
from graphcomb.passes.common.scoring import evaluate
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.prune_depth import ablated
from graphcomb.passes.depth.relax import relax

HERE = Path(__file__).parent
METHODS = ("progressive", "at once", "at once, fit", "random", "channels")
NETWORKS = {
    "resnet": networks.ResNet,
    "mobilenet": networks.MobileNet,
    "convnext": networks.ConvNeXt,
    "deit": networks.DeiT,
}
LAYERS = ("conv2d", "linear", "scaled_dot_product_attention")
HELD = 2000


@dataclass(frozen=True)
class Size:
    """arguments: of the networks. depths: how many blocks are pruned. reference: steps of the dense network; steps: of every
    row; supernet: of the supernet; lr: peaks of reference and rows."""

    arguments: dict[str, dict[str, Any]]
    depths: dict[str, tuple[int, ...]]
    reference: int = 3000
    steps: int = 300
    supernet: int = 150
    batch: int = 64
    lr: tuple[float, float] = (2e-3, 1e-3)
    search: dict[str, int] = field(default_factory=lambda: {"population": 12, "generations": 3, "score_batches": 4})


SIZES = {
    "small": Size(
        {"resnet": {"width": 16, "blocks": 2}, "mobilenet": {"expansion": 6}, "convnext": {}, "deit": {}},
        {"resnet": (1, 2, 4), "mobilenet": (1, 2, 4), "convnext": (2, 4, 6), "deit": (2, 3, 4)},
    ),
    "full": Size(
        {
            "resnet": {"width": 64, "blocks": 4}, "mobilenet": {"width": 32, "expansion": 6},
            "convnext": {"width": 96, "depths": (3, 9)}, "deit": {"width": 192, "depth": 12, "heads": 3},
        },
        {"resnet": (3, 6, 9), "mobilenet": (1, 2, 4), "convnext": (4, 6, 9), "deit": (4, 6, 8)},
        reference=20_000, steps=8000, supernet=4000, batch=256,
        search={"population": 32, "generations": 10, "score_batches": 8},
    ),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- data
@functools.cache
def loaders(size: str) -> tuple[Any, Any, Any]:
    """Batches to train on, to search with, and to score."""
    whole, test = fashion_mnist(batch_size=SIZES[size].batch)
    images, labels = whole.dataset.tensors
    train, _ = fashion_mnist(batch_size=SIZES[size].batch, train_samples=len(images) - HELD)
    return train, DataLoader(TensorDataset(images[-HELD:], labels[-HELD:]), 250), test


def reference(network: str, size: str) -> tuple[Program, float]:
    """The dense program and its accuracy, trained now or taken from the cache."""
    options = SIZES[size]
    torch.manual_seed(0)
    model = NETWORKS[network](**options.arguments[network])
    program = graphcomb.capture(model.eval(), (torch.zeros(2, 1, 28, 28),), dynamic_shapes="batch")
    code = fingerprint(program.module(), options.reference, options.lr[0], options.batch, torch.__version__)
    path = cache_folder() / "depth" / f"{network}-{code}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    train, _, test = loaders(size)
    with locked(path.with_suffix(".lock")):
        if not path.is_file():
            training = Distill(alpha=0.0, steps=options.reference, lr=options.lr[0], weight_decay=0.02)
            done = training(program, data=train, progress=True).program
            part = path.with_suffix(".part")
            torch.save({"state": done.module().state_dict(), "score": evaluate(done, test, accuracy)}, part)
            part.replace(path)
    found = torch.load(path, weights_only=True)
    program.module().load_state_dict(found["state"])
    program.module().to(memory_format=torch.channels_last)  # trains in two thirds of the time on a CPU
    return program, found["score"]


def chosen(network: str, count: int, size: str, data: dict[str, Any]) -> list[str]:
    """The blocks that the search takes, once for each network and number of blocks. One supernet of each network, trained on
    choices of its middle number of blocks, serves all; it is kept in the cache."""
    key = f"{network}/{count}"
    if key not in data["chosen"]:
        options, (train, held, _) = SIZES[size], loaders(size)
        program, _ = reference(network, size)
        middle = PruneDepth(
            blocks=options.depths[network][1],
            supernet_steps=options.supernet,
            train=training(options),
            **options.search,
        )
        context = Context(data=train, val=held, out=cache_folder() / "depth", progress=True, teacher=program)
        blocks = [b for b in find_blocks(program) if b.prunable]
        supernet, _ = middle.supernet(program, blocks, context, middle.budget(program, blocks, context))
        pass_ = dataclasses.replace(middle, blocks=count)
        bits, record = pass_.search(supernet, pass_.budget(program, blocks, context), context)
        names = [b.name for b, bit in zip(blocks, bits, strict=True) if bit]
        data["chosen"][key] = {"names": names, "score": record["score"]}
    return data["chosen"][key]["names"]


def training(options: Size) -> Distill:
    return Distill(steps=options.steps, lr=options.lr[1])


# -------------------------------------------------------------------------------------------------------------- methods
def build(network: str, count: int, method: str, seed: int, size: str, data: dict[str, Any]) -> Program:
    """The fused result of a row."""
    options, (train, _, _) = SIZES[size], loaders(size)
    program, _ = reference(network, size)
    if method == "channels":
        return channels(program, f"{network}/{count}", seed, size, data)
    if method == "random":
        pass_ = ablated(search=False)(blocks=count, train=training(options))
    else:
        kind = ablated(fading=method == "progressive", fitted=method != "at once")
        pass_ = kind(names=tuple(chosen(network, count, size, data)), train=training(options))
    return pass_(program, data=train, seed=seed, teacher=program).program


def channels(program: Program, variant: str, seed: int, size: str, data: dict[str, Any]) -> Program:
    """Channels pruned until the network is as fast as the depth-pruned one, then trained alike."""
    train, _, _ = loaders(size)
    pruned = narrow(program, share(program, variant, size, data), seed, size)
    return Fuse()(training(SIZES[size])(pruned, data=train, seed=seed, teacher=program).program).program


def narrow(program: Program, macs: float, seed: int, size: str) -> Program:
    images, labels = (t[: 8 * 32] for t in loaders(size)[0].dataset.tensors)
    scored = list(zip(images.split(32), labels.split(32), strict=True))
    pass_ = RemoveChannels(macs=macs, importance="fisher", scope="global", round_to=4)
    return pass_(program, data=scored, seed=seed).program


def share(program: Program, variant: str, size: str, data: dict[str, Any]) -> float:
    """The largest share of the MACs found by bisection whose network is not slower than the first progressive one; once
    for each network and number of blocks, since seeds differ in weights only."""
    found = data.setdefault("shares", {})
    if variant not in found:
        key = next(k for k in data["rows"] if k.startswith(f"{variant}/progressive/"))
        rival, low, high = graphcomb.load(stored(key, size)), 0.05, 1.0
        for _ in range(5):
            middle = (low + high) / 2
            result = graphcomb.runtime.bench([rival, Fuse()(narrow(program, middle, 0, size)).program], seconds=4)
            if result.ratio is None:
                raise RuntimeError(f"{variant}: {result.note}")
            if result.ratio >= 1:
                found[variant] = low = middle
            else:
                high = middle
        if variant not in found:
            raise RuntimeError(f"{variant}: no width is as fast as the depth-pruned network")
    return found[variant]


def facts(program: Program, size: str) -> dict[str, Any]:
    ops = Counter(op_name(n) for n in program.graph.nodes if n.op == "call_function")
    score = evaluate(program, loaders(size)[2], accuracy)
    return {"score": score, "macs": program.macs, "params": program.params, "layers": sum(ops[k] for k in LAYERS)}


def kernels(program: Program) -> int:
    """Kernels of the fp16 engine that TensorRT-RTX builds for SM 8.6."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        graphcomb.runtime.export_onnx(program, path, precision="fp16")
        return len(graphcomb.runtime.build_engine(path, target="rtx-sm86").kernels)


def count_kernels(options: argparse.Namespace, path: Path) -> None:
    """Kernels of the engines of all networks, dense and with blocks pruned, and how many fewer they were to be."""
    size, data = SIZES[options.size], json.loads(path.read_text()) if path.exists() else {}
    for network in (n for n in options.networks if n not in data):
        torch.manual_seed(0)
        model = NETWORKS[network](**size.arguments[network]).eval()
        program = graphcomb.capture(model, (torch.zeros(2, 1, 28, 28),), dynamic_shapes="batch")
        blocks = sorted((b for b in find_blocks(program) if b.prunable), key=lambda b: -(b.saves or 0))
        rows: dict[str, Any] = {"0": {"kernels": kernels(Fuse()(program).program)}}
        for count in (*size.depths[network], len(blocks)):
            pruned = Fuse()(relax(program, blocks[:count], settled=True)).program
            names, predicted = [b.name for b in blocks[:count]], sum(b.kernels or 0 for b in blocks[:count])
            rows[str(count)] = {"names": names, "predicted": predicted, "kernels": kernels(pruned)}
        data[network] = rows
        save(path, data)
    lines = ["| network | blocks pruned | kernels | fewer | predicted |", "|" + " --- |" * 5]
    for network, rows in ((n, data[n]) for n in NETWORKS if n in data):
        dense = rows["0"]["kernels"]
        for count, row in sorted(rows.items(), key=lambda r: int(r[0])):
            fewer = [str(dense - row["kernels"]), str(row["predicted"])] if int(count) else ["", ""]
            lines.append("| " + " | ".join([network, count, str(row["kernels"]), *fewer]) + " |")
    text = [
        "Kernels of the fp16 TensorRT-RTX engine for SM 8.6, before training, blocks pruned that save most MACs. Predicted:"
    ]
    text += ["one for each layer, normalisation over features and attention that is gone; kernels of its own that the"]
    text += ["library adds around them (moves of heads, an activation that it does not fuse) go with them.", "", *lines]
    write(path.with_suffix(".md"), "\n".join(text) + "\n")


# ----------------------------------------------------------------------------------------------------------------- rows
def stored(key: str, size: str) -> Path:
    return cache_folder() / "depth" / f"{size}-{key.replace('/', '-').replace(' ', '_')}.pt2"


def load(path: Path) -> dict[str, Any]:
    empty: dict[str, Any] = {"dense": {}, "chosen": {}, "rows": {}}
    return json.loads(path.read_text()) if path.exists() else empty


def keys(options: argparse.Namespace) -> Iterator[tuple[str, int, str, int]]:
    size = SIZES[options.size]
    for seed in options.seeds:
        for network in options.networks:
            for count in options.counts or size.depths[network]:
                for method in options.methods:
                    yield network, count, method, seed


def run(options: argparse.Namespace, path: Path) -> None:
    data = load(path)
    for network in options.networks:
        if network not in data["dense"]:
            program, _ = reference(network, options.size)
            fused = Fuse()(program).program
            fused.save(stored(f"{network}/dense", options.size))
            data["dense"][network] = facts(fused, options.size)
            save(path, data)
    jobs = list(keys(options))
    for i, (network, count, method, seed) in enumerate(jobs):
        key = f"{network}/{count}/{method}/{seed}"
        if key not in data["rows"]:
            program = build(network, count, method, seed, options.size, data)
            program.save(stored(key, options.size))
            data["rows"][key] = facts(program, options.size)
            save(path, data)
        print(f"[{i + 1}/{len(jobs)}] {key}: {data['rows'][key]['score']:.2%}", flush=True)


def measure(options: argparse.Namespace, path: Path) -> None:
    """Latency of every row against its dense network, in turns; and kernels of the engines, for the first seed. Rows that
    differ in their weights only are measured once."""
    data = load(path)
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for key, row in data["rows"].items():
        network, _, method, _ = key.split("/")
        if network not in options.networks or method not in options.methods:
            continue
        dense = data["dense"][network]
        same = known.setdefault((network, *(row[k] for k in ("macs", "params", "layers"))), {})
        if options.latency and row.get("times_faster") is None:
            if same.get("times_faster") is None:
                pair = [graphcomb.load(stored(k, options.size)) for k in (f"{network}/dense", key)]
                found = graphcomb.runtime.bench(pair, seconds=options.seconds)
                same |= {"times_faster": found.ratio, "ms": [t.ms for t in found.timings]}
            row |= {k: same[k] for k in ("times_faster", "ms")}
            save(path, data)
        if options.kernels and "kernels" not in row and key.endswith(f"/{options.seeds[0]}"):
            if "kernels" not in dense:
                dense["kernels"] = kernels(graphcomb.load(stored(f"{network}/dense", options.size)))
            if "kernels" not in same:
                same["kernels"] = kernels(graphcomb.load(stored(key, options.size)))
            row["kernels"] = same["kernels"]
            save(path, data)


# ---------------------------------------------------------------------------------------------------------------- table
def mean(rows: list[dict[str, Any]], name: str) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds."""
    found = [r[name] for r in rows if r.get(name) is not None]
    return (statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0) if found else None


def cells(rows: list[dict[str, Any]]) -> list[str]:
    score, macs, layers = mean(rows, "score"), mean(rows, "macs"), mean(rows, "layers")
    faster, count = mean(rows, "times_faster"), mean(rows, "kernels")
    assert score is not None
    assert macs is not None
    assert layers is not None
    return [
        f"{score[0]:.2%} ± {100 * score[1]:.2f}",
        f"{macs[0] / 1e6:.2f}",
        f"{layers[0]:.0f}",
        f"{faster[0]:.2f} ± {faster[1]:.2f}" if faster else "",
        f"{count[0]:.0f}" if count else "",
        str(len(rows)),
    ]


def write_table(data: dict[str, Any], path: Path) -> None:
    head = ["network", "blocks pruned", "method", "accuracy", "MMACs", "layers", "times faster", "kernels", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    verdicts = Counter()
    variants = dict.fromkeys(tuple(k.split("/")[:2]) for k in data["rows"])
    for network in data["dense"]:
        lines.append("| " + " | ".join([network, "0", "dense", *cells([data["dense"][network]])]) + " |")
        for _, count in [v for v in variants if v[0] == network]:
            found = {}
            for method in METHODS:
                rows = [r for k, r in data["rows"].items() if k.startswith(f"{network}/{count}/{method}/")]
                if rows:
                    found[method] = rows
                    lines.append("| " + " | ".join([network, count, method, *cells(rows)]) + " |")
            for rival in METHODS[1:]:
                if "progressive" in found and rival in found:
                    verdicts[rival, verdict(found["progressive"], found[rival])] += 1
    text = [
        "Fashion-MNIST, top-1; mean and standard deviation over seeds. Times faster: ONNX Runtime, one thread, against"
    ]
    text += ["the dense network, all fused. Kernels: of the fp16 TensorRT-RTX engine for SM 8.6.", "", *lines, ""]
    for rival in METHODS[1:]:
        counts = {how: verdicts[rival, how] for how in ("better", "within the spread", "worse")}
        if any(counts.values()):
            said = ", ".join(f"{how} on {n}" for how, n in counts.items())
            text.append(f"- progressive against {rival}, of {sum(counts.values())} variants: {said}")
    write(path, "\n".join(text) + "\n")


def verdict(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str:
    """Whether the means differ by more than both standard deviations together."""
    a, b = mean(ours, "score"), mean(theirs, "score")
    assert a is not None
    assert b is not None
    if abs(a[0] - b[0]) <= a[1] + b[1]:
        return "within the spread"
    return "better" if a[0] > b[0] else "worse"


def plot(data: dict[str, Any], path: Path) -> None:
    """Accuracy over MACs, by network and method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(data["dense"]), figsize=(4.2 * len(data["dense"]), 3.6), squeeze=False)
    for axis, (network, dense) in zip(axes[0], data["dense"].items(), strict=True):
        axis.set(title=network, xlabel="MMACs", ylabel="accuracy, %")
        axis.plot(dense["macs"] / 1e6, 100 * dense["score"], "k*", label="dense")
        for method in METHODS:
            found: dict[str, list[dict[str, Any]]] = {}
            for key, row in data["rows"].items():
                if key.startswith(f"{network}/") and key.split("/")[2] == method:
                    found.setdefault(key.split("/")[1], []).append(row)
            points = sorted((mean(rows, "macs")[0] / 1e6, *mean(rows, "score")) for rows in found.values())  # type: ignore[index, misc]
            if points:
                x, y, spread = zip(*points, strict=True)
                axis.errorbar(x, [100 * v for v in y], [100 * v for v in spread], marker="o", capsize=3, label=method)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--counts", nargs="+", type=int, default=[], help="numbers of pruned blocks, instead of the size's"
    )
    parser.add_argument(
        "--steps", type=int, help="of the training of a row, instead of the size's; blocks are the same"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="of each latency measurement")
    parser.add_argument("--full", dest="size", action="store_const", const="full", default="small")
    for name in ("latency", "kernels", "table"):
        parser.add_argument(f"--{name}", action="store_true")
    options = parser.parse_args()
    results, name = HERE / "results", "depth" if options.size == "small" else "depth_full"
    if options.steps:
        usual = load(results / f"{name}.json")
        SIZES[f"{options.size}-{options.steps}"] = dataclasses.replace(SIZES[options.size], steps=options.steps)
        options.size, name = f"{options.size}-{options.steps}", f"{name}_{options.steps}"
        if not (results / f"{name}.json").exists():
            save(results / f"{name}.json", usual | {"dense": {}, "rows": {}})
    if options.kernels:
        count_kernels(options, results / f"{name}_kernels.json")
    if options.latency or options.kernels:
        measure(options, results / f"{name}.json")
    elif not options.table:
        run(options, results / f"{name}.json")
    data = load(results / f"{name}.json")
    if not data["dense"]:
        return
    write_table(data, results / f"{name}.md")
    plot(data, results / f"{name}.png")


if __name__ == "__main__":
    main()
