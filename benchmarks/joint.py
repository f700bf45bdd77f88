"""Widths and depth decided together, next to widths alone and depth alone, at equal measured latency; repair, no training.

    python benchmarks/joint.py                          # resumes; results/joint.json and .md
    python benchmarks/joint.py --networks resnet        # only some rows; the others keep their figures
    python benchmarks/joint.py --table measured         # layers measured one by one instead of the data sheet
    python benchmarks/joint.py --int8                   # the rows with INT8, from tables of their own
    python benchmarks/joint.py --int8 --target cpu-openvino  # in OpenVINO; results/joint_openvino.json and .md
    python benchmarks/joint.py --again --times 2        # rows for twice as fast anew
    python benchmarks/joint.py --predict                # rounds by predicted times, for a busy machine
    python benchmarks/joint.py --write                  # only rewrite the table

Networks are the trained references of `accuracy.py` and, for ConvNeXt, of `depth.py` (Fashion-MNIST, 28 x 28; score:
accuracy on the 10,000 test images) and two of `trained.py`: EfficientNet-Lite0 (score: agreement with the dense network on
96 crops of unseen photographs) and the text detector CRAFT (score: F-measure of the words on 32 unseen pages). Budgets are
shares of the dense network's latency in ONNX Runtime (or OpenVINO: --target), one thread, fp32, batch 2. Joint, widths and
blocks share the tables, the passes (PruneDepth, RemoveChannels, Repair on images without labels: 128, EfficientNet 32, CRAFT
8) and the rounds: a choice is built and measured, the budget is corrected by what it really takes, and the choice is made
again. torch-pruning (1.6.1; it has no repair) gets the least ratio that makes it as fast as the joint network by the same
measure, to within 2 %; of its rankings (magnitude layer by layer or globally, Taylor with the dense network's own classes as
labels; networks with attention layer by layer) the one with the best score is shown. Then all networks of a budget run in
turns, and the speed-up is the paired one. Rows with INT8 come from a second run of their own, whose choices include regions
of layers in INT8; they are scored as that library computes them, on a CPU with VNNI. Rows that say so had rounds by
predicted times, as on a busy machine; "–" means that it was too busy for a figure.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import revision, save, write
from precision import scored
from repair import RIVALS, bisected, first
from trained import NETWORKS as TRAINED
from trained import Network

import graphcomb
from graphcomb.data import cache_folder
from graphcomb.graph.errors import Contended
from graphcomb.passes.common.repeat import fingerprint
from graphcomb.passes.joint.carry_out import Decision
from graphcomb.passes.joint.tuning_rounds import OVER, Built, Time, Tuner, builder
from graphcomb.runtime import get_target
from graphcomb.runtime.measure.environment import environment
from graphcomb.tuning.tables import RUNS, prepare_tables

PATIENCE = 30  # attempts to measure on a busy machine, a minute apart
RESULTS = Path(__file__).parent / "results" / "joint.json"
FASHION = {name: f"fashion {name}" for name in ("resnet", "mobilenet", "convnext", "deit")}
NETWORKS = (*FASHION, "efficientnet_lite0", "craft")
TIMES = (1.5, 2.0, 3.0)  # as fast
METHODS = {"joint": "joint", "widths": "widths", "blocks": "blocks"}
INTEGER = {"joint with INT8": "joint", "INT8 alone": "precision"}
RIVAL = "torch-pruning"
FLOAT_ROWS = (*METHODS, RIVAL)
ALL = (*FLOAT_ROWS, *INTEGER)
IMAGES, ROUNDS = {"efficientnet_lite0": 32, "craft": 8}, 3
Row = dict[str, Any]


def rival(network: Network, images: list[torch.Tensor], fast: Callable[[graphcomb.Program], bool]) -> Any:
    """The network with the best score that torch-pruning makes fast enough, and its ranking."""
    found, attention = [], bool(network.heads(network.build()))
    for ranking in RIVALS:
        if attention and ranking == "torch-pruning global":
            continue  # it would be the local one
        try:
            program = bisected(network, ranking, images, fast)
        except graphcomb.GraphcombError:
            raise  # such as that the machine is too busy
        except Exception as error:
            print(f"{ranking}: {type(error).__name__}: {error}", flush=True)
        else:
            found.append((first(network.scored(program)), ranking, program))
    return max(found, key=lambda one: one[0])[1:] if found else None


def patiently(time_of: Callable[[graphcomb.Program], Time]) -> Callable[[graphcomb.Program], Time]:
    """The same measurement, repeated while the machine is too busy for it; of the same program only once, so that methods
    that choose the same network do not differ by noise."""
    known: dict[int, tuple[graphcomb.Program, Time]] = {}  # with the programs, so that their ids stay theirs

    def timed(program: graphcomb.Program) -> Time:
        attempts = 0
        while id(program) not in known:
            try:
                known[id(program)] = program, time_of(program)
            except Contended as error:
                attempts += 1
                if attempts > PATIENCE:
                    raise
                print(error, flush=True)
                time.sleep(60)
        return known[id(program)][1]

    return timed


def kept(program: graphcomb.Program) -> str:
    """The name under which a network is kept for `joint_training.py`."""
    name = fingerprint(program.module())
    path = network_path(name)
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        program.save(path)
    return name


def shapes(program: graphcomb.Program) -> list[str]:
    """The shapes of a program's outputs, as texts."""
    return [str(tuple(node.meta["val"].shape)) for node in program.graph.output_node().all_input_nodes]


def network_path(name: str) -> Path:
    return cache_folder() / "joint" / f"{name}.pt2"


def measure(
    name: str, seed: int, table: str, timed: bool, todo: list[float], methods: dict[str, str], target: str
) -> Iterator[dict[str, Row]]:
    """The rows of a network by budget and method, one budget after the other."""
    network, many = TRAINED[FASHION.get(name, name)], IMAGES.get(name, 128)
    images, dense = network.calibration(seed)[: 2 * many // 16], network.dense
    score = network.scored if methods is METHODS else partial(scored, network, backend=get_target(target).backend)
    dense_score = 100 * first(network.scored(dense))
    start = time.perf_counter()
    session = prepare_tables(
        dense, images, table="roofline" if table == "roofline" else None, measure=timed, samples=many, sizes=6,
        points=1 if name == "craft" else 2, seed=seed, progress=True, target=target,
        extra=["int8"] if methods is INTEGER else [],
    )  # fmt: skip
    tables = time.perf_counter() - start
    measured = patiently(session.time)
    make, made = builder(session.tables, "repair", many, session.tables.losses.context), {}

    def build(decided: Decision) -> graphcomb.Program:
        """Each network only once, whichever method chose it."""
        return made.get(str(decided)) or made.setdefault(str(decided), make(decided))

    for times in todo:
        start, rows = time.perf_counter(), {}
        networks: dict[str, Built] = {}
        for method, how in methods.items():
            tuner = Tuner(session.tables, build, measured, ROUNDS, session.say)
            try:
                networks[method] = tuner.within(tuner.dense / times, how)
            except graphcomb.Unreachable as error:
                print(error, flush=True)
        goal, theirs = networks["joint"].seconds if "joint" in networks else tuner.dense / times, None
        if methods is METHODS:
            theirs = rival(network, images, lambda program, goal=goal: measured(program).seconds <= OVER * goal)
        programs = {m: b.program for m, b in networks.items()} | ({RIVAL: theirs[1]} if theirs else {})
        different = {id(p): p for p in programs.values()}
        paired = graphcomb.runtime.bench(
            [dense, *different.values()], names=["dense", *map(str, different)], seconds=90.0, min_runs=RUNS,
            engine=session.target.backend,
        )  # fmt: skip
        if paired.note:
            print(paired.note, flush=True)
        for method, program in programs.items():
            ratio = paired.ratios.get(str(id(program)))
            rows[method] = {
                "faster": ratio and ratio["median"], "interval": ratio and [ratio.get("low"), ratio.get("high")],
                "score": 100 * first(score(program)), "dense": dense_score, "macs": program.macs / dense.macs,
                "loss": {}, "table": table, "timed": timed,
                "seconds": {"tables": tables, "budget": time.perf_counter() - start}, "contended": paired.contended,
                "revision": revision(), "network": kept(program), "processor": environment(1)["cpu"],
            }  # fmt: skip
            if shapes(program) == shapes(dense):  # torch-pruning narrows CRAFT's second output, its features
                rows[method]["loss"]["measured"] = session.tables.losses.divergence(program)
            if method == RIVAL:
                rows[method] |= {"how": theirs[0], "ms": {"measured": 1e3 * measured(program).seconds}}
                continue
            built = networks[method]
            rows[method] |= {
                "how": built.how,
                "blocks": built.decided.blocks,
                "widths": dict(built.decided.widths),
                "int8": sum(p == "int8" for p in built.decided.precisions.values()),
            }
            rows[method]["loss"]["predicted"] = built.predicted_loss
            rows[method]["ms"] = {
                "dense": 1e3 * tuner.dense, "predicted": 1e3 * built.predicted_seconds, "measured": 1e3 * built.seconds,
            }  # fmt: skip
        wanted = FLOAT_ROWS if methods is METHODS else INTEGER
        here = {"unreachable": True, "table": table, "processor": environment(1)["cpu"]}
        rows |= {m: here for m in wanted if m not in rows}
        yield {f"{name}/{seed}/{times:g}/{m}": row for m, row in rows.items()}


def table(data: dict[str, Row], target: str) -> str:
    """The results as Markdown."""
    lines = [
        f"# Widths and depth together, at equal measured latency{'' if target == 'cpu' else ', in OpenVINO'}", "",
        " ".join((__doc__ or "").split("\n\n")[-1].split()), "",
        "| network | asked | method | faster (measured) | score, % | divergence, predicted and measured | ms by the table "
        "and in the rounds | MACs | blocks gone, groups narrower, layers in INT8 |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    usual = Counter(row["processor"] for row in data.values()).most_common(1)[0][0] if data else ""
    for key, row in sorted(data.items(), key=lambda item: _order(item[0])):
        network, _, times, method = key.split("/")
        network += "" if row["processor"] == usual else " †"
        if row.get("unreachable"):
            lines.append(f"| {network} | {times}x | {method} | cannot be reached | | | | | |")
            continue
        low, high = row["interval"] or (None, None)
        faster = "–" if row["faster"] is None else f"{row['faster']:.2f}x"
        faster += f" ({low:.2f} to {high:.2f})" if low is not None else ""
        faster += "" if row["timed"] else " predicted rounds"
        chosen = f" (is {row['how']} alone)" if method == "joint" and row["how"] != "joint" else ""
        chosen += f", {row['how'].split()[-1]}" if method == RIVAL else ""
        loss, ms = row["loss"], row["ms"]
        both = [", ".join(f"{d[k]:.3g}" for k in ("predicted", "measured") if k in d) for d in (loss, ms)]
        parts = "" if method == RIVAL else f"{len(row['blocks'])}, {len(row['widths'])}, {row.get('int8', 0)}"
        lines.append(
            f"| {network} ({row['dense']:.2f} %) | {times}x | {method}{chosen} | {faster} | {row['score']:.2f} | "
            f"{' | '.join(both)} | {row['macs']:.2f} | {parts} |"
        )
    lines += [
        "",
        "Each method has rounds of its own, so a joint choice that is of widths alone may be another network than that of",
        "the row for widths. Blocks come whole, so that blocks alone are often faster than asked.",
    ]  # fmt: skip
    others = sorted({row["processor"] for row in data.values()} - {usual})
    lines += [f"Measured on {usual}" + (f", rows with † on {', '.join(others)}." if others else ".")]
    return "\n".join(lines) + "\n"


def stored(path: Path = RESULTS) -> dict[str, Row]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _order(key: str) -> tuple[int, str, float, int]:
    network, seed, times, method = key.split("/")
    return NETWORKS.index(network), seed, float(times), ALL.index(method)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--table", choices=["roofline", "measured"], default="roofline")
    parser.add_argument("--times", nargs="+", type=float, default=list(TIMES), choices=TIMES, help="times as fast")
    parser.add_argument("--again", action="store_true", help="measure rows that are there, too")
    parser.add_argument(
        "--predict", action="store_true", help="predict whole networks in the rounds, measure only in the end"
    )
    parser.add_argument("--target", choices=["cpu", "cpu-openvino"], default="cpu")
    parser.add_argument("--int8", action="store_true", help="the rows with INT8 instead")
    parser.add_argument("--write", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = RESULTS if options.target == "cpu" else RESULTS.with_name("joint_openvino.json")
    data = stored(results)
    for seed in range(0 if options.write else options.seeds):
        for network in options.networks:
            methods = INTEGER if options.int8 else METHODS
            wanted = INTEGER if options.int8 else FLOAT_ROWS
            todo = [
                t for t in options.times
                if options.again
                or any(data.get(f"{network}/{seed}/{t:g}/{m}", {}).get("table") != options.table for m in wanted)
            ]  # fmt: skip
            if not todo:
                continue
            for rows in measure(network, seed, options.table, not options.predict, todo, methods, options.target):
                data = stored(results) | rows  # another process may have written those of another network
                save(results, data)
                write(results.with_suffix(".md"), table(data, options.target))
    write(results.with_suffix(".md"), table(data, options.target))


if __name__ == "__main__":
    main()
