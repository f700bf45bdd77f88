"""Accuracy that repair recovers without training on trained networks, compared with no repair and with torch-pruning.

    python benchmarks/repair.py                                   # resumes; results/repair.json and .md
    python benchmarks/repair.py --networks crnn --draws 1         # only some rows; the others keep their figures
    python benchmarks/repair.py --images 64                       # fewer calibration images, in rows of their own
    python benchmarks/repair.py --cost                            # time and memory instead, on a quiet machine
    python benchmarks/repair.py --table                           # only rewrite the table

Networks, images and scores are those of `trained.py`; weights and photographs are downloaded into the cache folder.
A row removes channels at once, to a share of the MACs, by one importance: magnitude (the same share of each group),
fisher-unlabelled or repair (all groups together). It is scored on photographs that are not used for calibration:
without repair, after `Repair`, and after `Repair` and `Recalibrate` (against the dense network). Rows marked with *
are older: their last column has the statistics of the images with a prior of 64 images, and importance repair judged
a refit on its own samples. In the last column of rows marked with + layers that go into a sum were compared, too.
These and things at 0.90 have the score before it got a least value (`LEAST`). A draw is a seed of calibration
images, which have no labels. Widths stay multiples of 8 (Fashion-MNIST: 4) for all methods, except that torch-
pruning cannot round the widths of networks with attention. It (1.6.1) ranks by magnitude, layer by layer or
globally, or globally by Taylor with the dense network's own classes as labels; networks with attention always layer
by layer. Its ratio is found by bisection, and its best row is shown. CRAFT's score is the F-measure of the words on
pages: rectangles that overlap by half.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import revision, save, write
from torch import Tensor, nn
from trained import NETWORKS, Network

import graphcomb
from graphcomb.passes import Recalibrate, RemoveChannels, Repair

RESULTS = Path(__file__).parent / "results" / "repair.json"
SCOPES = {"magnitude": "local", "fisher-unlabelled": "global", "repair": "global"}  # of each importance
RIVALS = ("torch-pruning local", "torch-pruning global", "torch-pruning taylor")
STATES = ("none", "repair", "repair + recalibrate")
Row = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------- rows
def ours(network: Network, share: float, importance: str, images: list[Tensor]) -> Row:
    """Scores and seconds of one removal in three states."""
    dense, scores, seconds = network.dense, {}, {}

    def state(name: str, make: Any) -> graphcomb.Program:
        start = time.perf_counter()
        program = make()
        seconds[name] = time.perf_counter() - start
        scores[name] = network.scored(program)
        return program

    many = sum(map(len, images))
    removal = RemoveChannels(
        macs=share, importance=importance, scope=SCOPES[importance], round_to=network.round_to, samples=many,  # type: ignore[arg-type]
    )  # fmt: skip
    removed = state("none", lambda: removal(dense, data=images).program)
    repaired = state("repair", lambda: Repair(samples=many)(removed, data=images, teacher=dense).program)
    state("repair + recalibrate", lambda: Recalibrate(samples=many)(repaired, data=images, teacher=dense).program)
    return {"scores": scores, "seconds": seconds, "left": removed.macs / dense.macs, "reference": "dense, but sums"}


def rival(network: Network, share: float, ranking: str, images: list[Tensor]) -> Row:
    """The same removal by torch-pruning."""
    start = time.perf_counter()
    best = bisected(network, ranking, images, lambda program: program.macs <= share * network.dense.macs)
    return {
        "scores": {"none": network.scored(best)},
        "seconds": {"none": time.perf_counter() - start},
        "left": best.macs / network.dense.macs,
    }


def bisected(network: Network, ranking: str, images: list[Tensor], small: Callable[[graphcomb.Program], bool]) -> Any:
    """The network that torch-pruning leaves at the least ratio that makes it small enough, found by bisection."""
    import torch_pruning as tp

    example = images[0][:1]
    dense = network.build().eval()
    gradients = own_gradients(dense, images) if ranking == "torch-pruning taylor" else []
    low, high, best = 0.0, 0.95, None
    for _ in range(7):
        model, ratio = copy.deepcopy(dense), (low + high) / 2
        for parameter, gradient in zip(model.parameters(), gradients, strict=False):
            parameter.grad = None if gradient is None else gradient.clone()
        score = tp.importance.GroupTaylorImportance() if gradients else tp.importance.GroupMagnitudeImportance()
        heads = network.heads(model)
        tp.pruner.BasePruner(
            model, example, importance=score, global_pruning=ranking != "torch-pruning local" and not heads,
            pruning_ratio=ratio, max_pruning_ratio=0.95, ignored_layers=network.ignored(model), num_heads=heads,
            round_to=None if heads else network.round_to,
        ).step()  # fmt: skip
        model.zero_grad()
        program = graphcomb.capture(model, (network.test[0][0][:2],), dynamic_shapes="batch", prove=False)
        if small(program):
            best, high = program, ratio
        else:
            low = ratio
    if best is None:
        raise RuntimeError("no ratio makes it small enough")
    return best


def own_gradients(model: nn.Module, images: list[Tensor]) -> list[Tensor | None]:
    """Of the cross-entropy against the network's own decisions; of maps, which decide nothing, of their squares."""
    model = copy.deepcopy(model)
    for batch in images:
        outputs = model(batch)
        if isinstance(outputs, Tensor):
            logits = (outputs.movedim(1, -1) if outputs.dim() == 4 else outputs).flatten(0, -2)
            F.cross_entropy(logits, logits.argmax(1)).backward()
        else:
            outputs[0].square().mean().backward()
    return [p.grad for p in model.parameters()]


def measure(name: str, share: float, importance: str, draw: int, limit: int | None) -> Row:
    network = NETWORKS[name]
    images = network.calibration(draw)[: None if limit is None else -(-limit // 16)]
    make = rival if importance in RIVALS else ours
    try:
        row = make(network, share, importance, images)
    except Exception as error:
        if importance not in RIVALS:
            raise
        row = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]}
    head = {"network": name, "macs": share, "importance": importance, "draw": draw, "images": sum(map(len, images))}
    dense_scores = network.score(network.dense_outputs, network.dense_outputs, network.test[1])
    return head | row | {"dense": dense_scores, "revision": revision()}


# ----------------------------------------------------------------------------------------------------------------- cost
def cost(name: str, images: int, connection: Any) -> None:
    """In a process of its own, with one thread: seconds of processor time of `Repair`, next to those of one forward pass of
    the dense and of the smaller network over the same images, and the peak of the memory in bytes."""
    import torchvision

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval()
    data = list(torch.randn(images, 3, 224, 224).split(16))
    dense = graphcomb.capture(model, (data[0][:2],), dynamic_shapes="batch", prove=False)
    smaller = RemoveChannels(ratio=0.25, round_to=8)(dense).program
    start = time.process_time()
    with torch.no_grad():
        for program in (dense, smaller):
            module = program.module().eval()
            for batch in data:
                module(batch)
    forward, before, start = time.process_time() - start, peak(), time.process_time()
    result = Repair(samples=images)(smaller, data=data, teacher=dense)
    connection.send({
        "images": images, "forward": forward, "repair": time.process_time() - start, "peak before": before, "peak": peak(),
        "layers": len(result.record["repaired"]), "revision": revision(),
    })  # fmt: skip


def peak() -> int:
    """The most memory that this process had, in bytes; the files of /tmp, where they lie in memory, are not in it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cost_row(name: str, images: int) -> Row:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=cost, args=(name, images, there))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


# ---------------------------------------------------------------------------------------------------------------- table
def table(results: Row) -> str:
    rows = list(results["rows"].values())
    lines = [
        "# What repair gives back without training",
        "",
        *(__doc__ or "").split("\n\n")[-1].strip().split("\n"),
        "",
    ]
    lines[2:-1] = [" ".join(lines[2:-1])]
    for name in NETWORKS:
        mine = [r for r in rows if r["network"] == name]
        if not mine:
            continue
        dense = ", ".join(f"{key} {value:.3f}" for key, value in mine[0]["dense"].items() if key != "divergence")
        lines += [
            f"## {name}",
            "",
            f"Dense: {dense}.",
            "",
            f"| MACs | removed by | {' | '.join(STATES)} | images, draws |",
        ]
        lines.append("| --- " * (len(STATES) + 3) + "|")
        for share in sorted({r["macs"] for r in mine}, reverse=True):
            lines += table_rows([r for r in mine if r["macs"] == share], share)
        lines.append("")
    if results.get("cost"):
        lines += [
            "## Time and memory of `Repair`",
            "",
            "A quarter of each group removed, random weights, images of 224 x 224; processor time of one thread.",
            "",
        ]
        lines += [
            "| network | images | forward passes, s | repair, s | ratio | peak memory, GiB | graphcomb |",
            "| --- " * 7 + "|",
        ]
        for name, c in sorted(results["cost"].items()):
            seconds = f"{c['forward']:.0f} | {c['repair']:.0f} | {c['repair'] / c['forward']:.2f}"
            lines.append(f"| {name} | {c['images']} | {seconds} | {c['peak'] / 2**30:.1f} | {c['revision']} |")
    return "\n".join(lines).rstrip() + "\n"


def table_rows(rows: list[Row], share: float) -> list[str]:
    """One line for each importance and number of images, and one for the best of torch-pruning."""
    lines, groups = [], {}
    for row in rows:
        groups.setdefault((row["importance"], row["images"]), []).append(row)
    for (importance, images), same in sorted(
        groups.items(), key=lambda g: ([*SCOPES, *RIVALS].index(g[0][0]), g[0][1])
    ):
        if importance in SCOPES:
            cells = [cell([r["scores"][state] for r in same]) for state in STATES]
            kinds = {r.get("reference") for r in same}
            older = " *" if None in kinds else " +" if "dense" in kinds else ""
            lines.append(f"| {share:.2f} | {importance}{older} | {' | '.join(cells)} | {images}, {len(same)} |")
    theirs = [same for (importance, _), same in groups.items() if importance in RIVALS]
    done = [same for same in theirs if all("scores" in r for r in same)]
    if done:
        best = max(done, key=lambda same: statistics.mean(first(r["scores"]["none"]) for r in same))
        text = cell([r["scores"]["none"] for r in best])
        lines.append(f"| {share:.2f} | {best[0]['importance']} (best of {len(done)}) | {text} | | | {len(best)} |")
    elif theirs:
        lines.append(f"| {share:.2f} | torch-pruning | {theirs[0][0]['error']} | | | |")
    return lines


def first(scores: dict[str, float]) -> float:
    return next(iter(scores.values()))


def cell(scores: list[dict[str, float]]) -> str:
    """Means over draws, of the first figure with its least and most."""
    values = [first(s) for s in scores]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    others = [f"{key} {statistics.mean(s[key] for s in scores):.2f}" for key in list(scores[0])[1:]]
    return ", ".join([f"{statistics.mean(values):.3f}{spread}", *others])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--importances", nargs="+", choices=[*SCOPES, *RIVALS], default=[*SCOPES, *RIVALS])
    parser.add_argument(
        "--macs", nargs="+", type=float, help="only these of a network's shares of the MACs, to two places"
    )
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--images", type=int, help="calibrate with so many at most")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--cost", nargs="*", metavar="NETWORK", help="of torchvision; by default resnet50 and vit_b_16")
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}, "cost": {}}

    def keep(part: str, key: str, row: Row) -> None:
        if RESULTS.exists():  # another run may have added rows
            results.update(json.loads(RESULTS.read_text()))
        results[part][key] = row
        save(RESULTS, results, sort_keys=False)
        write(RESULTS.with_suffix(".md"), table(results))

    if options.cost is not None:
        for name in options.cost or ("resnet50", "vit_b_16"):
            keep("cost", name, cost_row(name, options.images or 256))
            print(name, results["cost"][name], flush=True)
    elif not options.table:
        for draw in range(options.draws):
            for name in options.networks:
                for share in NETWORKS[name].macs:
                    for importance in (
                        options.importances if options.macs is None or round(share, 2) in options.macs else ()
                    ):
                        many = min(options.images or 10**9, NETWORKS[name].calibrated)
                        key = f"{name} {share:.2f} {importance} {many} {draw}"
                        if key in results["rows"] and not options.again:
                            continue
                        try:
                            row = measure(name, share, importance, draw, options.images)
                        except Exception:
                            traceback.print_exc()
                            continue
                        keep("rows", key, row)
                        print(key, row.get("scores", row.get("error")), row.get("seconds"), flush=True)
    write(RESULTS.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
