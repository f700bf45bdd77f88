"""The effect of CAP's option `finish_rows`: how many channels `Minimise` can remove, and at which loss.

    python benchmarks/finish_rows.py                      # resumes; results/finish_rows.json and .md
    python benchmarks/finish_rows.py --networks resnet --sparsities 0.75 0.9
    python benchmarks/finish_rows.py --table              # only rewrite the table

The networks are the references of `accuracy.py`, trained on Fashion-MNIST (apt-get install dataset-fashion-mnist). CAP
sets a share of the weights to zero at once, from 512 gradients. After `Fuse` has folded the norms, `Minimise` removes the
channels that have no effect any more. Loss and accuracy are on the 10,000 test images, before any training. "Channels" is
the share of removed channels among those of groups that can shrink. In the second table each discount is shown at the
sparsity at which it loses as much as CAP without a discount does at the named sparsity; it is interpolated linearly
between measured sparsities.
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
from graphcomb.passes import Fuse, Minimise, Sparsify

RESULTS = Path(__file__).parent / "results" / "finish_rows.json"
NETWORKS = ("resnet", "mobilenet")
SPARSITIES = (0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
DISCOUNTS = (0.0, 0.8, 0.9, 0.95, 0.98, 0.99)
GRADIENTS = 512


def tested(program: graphcomb.Program) -> dict[str, float]:
    """Mean cross-entropy and top-1 accuracy on the test images."""
    module, loss, right, seen = program.module().eval(), 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loaders("classification", "small")[1]:
            found = module(images)
            loss += float(F.cross_entropy(found, labels, reduction="sum"))
            right, seen = right + int((found.argmax(1) == labels).sum()), seen + len(labels)
    return {"loss": loss / seen, "accuracy": right / seen}


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
        "seconds": time.perf_counter() - start, "revision": revision(),
    }  # fmt: skip


def at_loss(rows: list[dict[str, Any]], loss: float) -> dict[str, float] | None:
    """Sparsity, freed channels and MACs at which runs of rising sparsity reach a loss; None beyond those measured."""
    for low, high in pairwise(sorted(rows, key=lambda r: r["sparsity"])):
        if low["loss"] <= loss <= high["loss"]:
            share = (loss - low["loss"]) / max(high["loss"] - low["loss"], 1e-12)
            return {key: low[key] + share * (high[key] - low[key]) for key in ("sparsity", "freed", "macs")}
    return None


def table(results: dict[str, Any]) -> str:
    rows = list(results.values())
    lines = ["# Nearly empty outputs, finished", "", " ".join((__doc__ or "").split("\n\n")[-1].split()), ""]
    for network in NETWORKS:
        mine = [r for r in rows if r["network"] == network]
        if not mine:
            continue
        dense = mine[0]["dense"]
        lines += [f"## {network}", "", f"Dense: loss {dense['loss']:.3f}, accuracy {dense['accuracy']:.2%}.", ""]
        lines += [
            "| zeros | finish_rows | loss | accuracy | channels freed | MACs left | parameters left |",
            "| --- " * 7 + "|",
        ]
        for r in sorted(mine, key=lambda r: (r["sparsity"], r["finish_rows"])):
            lines.append(
                f"| {r['sparsity']:.0%} | {r['finish_rows']:g} | {r['loss']:.3f} | {r['accuracy']:.2%} | {r['freed']} of "
                f"{r['channels']} | {r['macs']:.1%} | {r['params']:.1%} |"
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
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--discounts", nargs="+", type=float, default=list(DISCOUNTS))
    parser.add_argument("--table", action="store_true", help="only rewrite the table")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    jobs = [(n, s, d) for n in options.networks for s in options.sparsities for d in options.discounts]
    for network, sparsity, discount in [] if options.table else jobs:
        key = f"{network} {sparsity:g} {discount:g}"
        if key not in results:
            results[key] = measure(network, sparsity, discount)
            save(RESULTS, results, sort_keys=False)
            write(RESULTS.with_suffix(".md"), table(results))
            print(key, {k: results[key][k] for k in ("loss", "accuracy", "freed", "macs", "seconds")}, flush=True)
    write(RESULTS.with_suffix(".md"), table(results))


if __name__ == "__main__":
    main()
