"""The effect of CAP's option `finish_rows`: how many channels `Minimise` can remove, and at which loss.

    python benchmarks/finish_rows.py                      # resumes; results/finish_rows.json and .md
    python benchmarks/finish_rows.py --networks resnet --sparsities 0.75 0.9
    python benchmarks/finish_rows.py --sparsities         # only removed channels, to compare with
    python benchmarks/finish_rows.py --table              # only rewrite the table

The networks are the references of `accuracy.py`, trained on Fashion-MNIST (apt-get install dataset-fashion-mnist). CAP
sets a share of the weights to zero at once, from 512 gradients. After `Fuse` has folded the norms, `Minimise` removes the
channels that have no effect any more. Loss and accuracy are on the 10,000 test images, before any training. "Channels" is
the share of removed channels among those of groups that can shrink. In the second table each discount is shown at the
sparsity at which it loses as much as CAP without a discount does at the named sparsity; it is interpolated linearly
between measured sparsities. "Times faster" is the median of paired ratios in ONNX Runtime, one thread, one image, fused
dense and smaller network in turns, with its interval. The last table has what stays after `RemoveChannels` by importance
"repair" and `Repair` (256 unlabelled training images), fused and timed alike.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import capture, gradient_batches, loaders, reference
from common import revision, save, write

import graphcomb
from graphcomb.passes import Fuse, Minimise, RemoveChannels, Repair, Sparsify

RESULTS = Path(__file__).parent / "results" / "finish_rows.json"
NETWORKS = ("resnet", "mobilenet")
SPARSITIES = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
DISCOUNTS = (0.0, 0.8, 0.9, 0.95, 0.98, 0.99)
SHARES = (0.95, 0.9, 0.8, 0.67, 0.5)  # of the MACs, for `RemoveChannels`
GRADIENTS, SAMPLES = 512, 256


def tested(program: graphcomb.Program) -> dict[str, float]:
    """Mean cross-entropy and top-1 accuracy on the test images."""
    module, loss, right, seen = program.module().eval(), 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loaders("classification", "small")[1]:
            found = module(images)
            loss += float(F.cross_entropy(found, labels, reduction="sum"))
            right, seen = right + int((found.argmax(1) == labels).sum()), seen + len(labels)
    return {"loss": loss / seen, "accuracy": right / seen}


def speed(dense: graphcomb.Program, smaller: graphcomb.Program) -> dict[str, Any]:
    """How many times faster the smaller network is, one image at a time: median of paired ratios and its interval."""
    torch.set_num_threads(1)
    found = graphcomb.runtime.bench(
        [dense, smaller], [torch.randn(1, 1, 28, 28)], seconds=60, max_runs=200, names=["dense", "smaller"]
    )
    return {"faster": found.ratios["smaller"]} if found.ratio else {"faster": None, "note": found.note}


def measure(network: str, sparsity: float, discount: float) -> dict[str, Any]:
    start = time.perf_counter()
    dense = Fuse()(capture(reference(network, 0, "small")[0], "classification")).program
    data = gradient_batches("classification", "small", 0, GRADIENTS)
    pass_ = Sparsify(sparsity=sparsity, gradients=GRADIENTS, finish_rows=discount)
    sparse = pass_(dense, data=data).program
    result = Minimise()(sparse)
    free = sum(g.size for g in graphcomb.comb(dense).groups if g.frozen is None)
    freed = sum(row["before"] - row["after"] for row in result.record["changed"])
    return {
        "network": network, "sparsity": sparsity, "finish_rows": discount, **tested(sparse), "dense": tested(dense),
        "channels": free, "freed": freed, "macs": result.program.macs / dense.macs, "left": result.record["refused"],
        "params": result.program.params / dense.params, "unchanged": result.record.get("unchanged"),
        **speed(dense, result.program), "seconds": time.perf_counter() - start, "revision": revision(),
    }  # fmt: skip


def removed(network: str, share: float) -> dict[str, Any]:
    """What stays after channels are removed at once and the rest is repaired."""
    start = time.perf_counter()
    dense = capture(reference(network, 0, "small")[0], "classification")
    images = gradient_batches("classification", "small", 0, SAMPLES)
    removal = RemoveChannels(macs=share, importance="repair", scope="global", round_to=4, samples=SAMPLES)
    smaller = removal(dense, data=images).program
    smaller = Repair(samples=SAMPLES)(smaller, data=images, teacher=dense).program
    dense, smaller = (Fuse()(program).program for program in (dense, smaller))
    return {
        "network": network, "share": share, **tested(smaller), "macs": smaller.macs / dense.macs,
        "params": smaller.params / dense.params, **speed(dense, smaller),
        "seconds": time.perf_counter() - start, "revision": revision(),
    }  # fmt: skip


def faster(row: dict[str, Any]) -> str:
    found = row.get("faster")
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else ""


def at_loss(rows: list[dict[str, Any]], loss: float) -> dict[str, float] | None:
    """Sparsity, freed channels and MACs at which runs of rising sparsity reach a loss; None beyond those measured."""
    for low, high in pairwise(sorted(rows, key=lambda r: r["sparsity"])):
        if low["loss"] <= loss <= high["loss"]:
            share = (loss - low["loss"]) / max(high["loss"] - low["loss"], 1e-12)
            return {key: low[key] + share * (high[key] - low[key]) for key in ("sparsity", "freed", "macs")}
    return None


def table(results: dict[str, Any]) -> str:
    rows = [r for r in results.values() if "sparsity" in r]
    lines = ["# Nearly empty outputs, finished", "", " ".join((__doc__ or "").split("\n\n")[-1].split()), ""]
    for network in NETWORKS:
        mine = [r for r in rows if r["network"] == network]
        if not mine:
            continue
        dense = mine[0]["dense"]
        lines += [f"## {network}", "", f"Dense: loss {dense['loss']:.3f}, accuracy {dense['accuracy']:.2%}.", ""]
        lines += [
            "| zeros | finish_rows | loss | accuracy | channels freed | MACs left | parameters left | times faster |",
            "| --- " * 8 + "|",
        ]
        for r in sorted(mine, key=lambda r: (r["sparsity"], r["finish_rows"])):
            lines.append(
                f"| {r['sparsity']:.0%} | {r['finish_rows']:g} | {r['loss']:.3f} | {r['accuracy']:.2%} | {r['freed']} of "
                f"{r['channels']} | {r['macs']:.1%} | {r['params']:.1%} | {faster(r)} |"
            )
        lines += ["", "At equal loss: channels freed (MACs left, zeros).", ""]
        found = sorted({r["finish_rows"] for r in mine})
        lines += [f"| as CAP at | loss | {' | '.join(f'{d:g}' for d in found)} |", "| --- " * (len(found) + 2) + "|"]
        for base in sorted((r for r in mine if not r["finish_rows"]), key=lambda r: r["sparsity"]):
            cells = [f"{base['sparsity']:.0%}", f"{base['loss']:.3f}"]
            for discount in found:
                at = base if not discount else at_loss([r for r in mine if r["finish_rows"] == discount], base["loss"])
                cells.append(f"{at['freed']:.0f} ({at['macs']:.1%}, {at['sparsity']:.0%})" if at else "")
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "Channels removed at once and the rest repaired.", ""]
        lines += ["| loss | accuracy | MACs left | parameters left | times faster |", "| --- " * 5 + "|"]
        others = (r for r in results.values() if "share" in r and r["network"] == network)
        for r in sorted(others, key=lambda r: -r["share"]):
            head = f"| {r['loss']:.3f} | {r['accuracy']:.2%} | {r['macs']:.1%} | {r['params']:.1%}"
            lines.append(f"{head} | {faster(r)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="*", type=float, default=list(SPARSITIES))
    parser.add_argument("--discounts", nargs="+", type=float, default=list(DISCOUNTS))
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    jobs: dict[str, Any] = {}
    for n in options.networks:
        jobs |= {f"{n} removed {share:g}": (removed, n, share) for share in SHARES}
        jobs |= {f"{n} {s:g} {d:g}": (measure, n, s, d) for s in options.sparsities for d in options.discounts}
    for key, (how, *what) in jobs.items():
        if options.table or results.get(key, {}).get("faster"):
            continue
        results[key] = how(*what)
        save(RESULTS, results, sort_keys=False)
        write(RESULTS.with_suffix(".md"), table(results))
        print(key, {k: results[key][k] for k in ("loss", "accuracy", "macs", "faster", "seconds")}, flush=True)
    write(RESULTS.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
