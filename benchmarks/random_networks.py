"""Property-based test of the comb: random removals from random networks, each checked by two oracles.

    python benchmarks/random_networks.py [--networks 10000] [--first 0] [--jobs 1] [--out results/random_networks.json]

The script generates networks (tests/graph/random_networks), removes random indices of random groups from each, and
compares the result with the absence oracle and the restriction oracle. It writes the results every few networks, so an
interrupted run resumes; results of other versions are discarded. The exit code is 1 if a network is wrong or raises.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import platform
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from common import save
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
BATCH = 20  # networks between two writes
COUNTS = ("exact", "vacuous", "frozen", "wrong", "error")


def examine(seed: int) -> dict[str, Any]:
    """One network, as plain data."""
    from tests.graph.random_networks.trial import trial

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        t = trial(seed)
    except Exception as error:
        text = (str(error).splitlines() or [""])[0]
        return {"seed": seed, "outcome": "error", "why": f"{type(error).__name__}: {text[:300]}"}
    return {
        "seed": seed,
        "outcome": t.outcome,
        "absence": t.absence,
        "restriction": t.restriction,
        "why": t.why[:300],
        "kinds": dict(t.kinds),
        "products": t.products,
        "dynamic": t.dynamic,
        "operators": sorted(t.operators),
    }


def fingerprint() -> str:
    """Of the code that takes part: the graph package and the generator."""
    files = sorted([*(ROOT / "graph").rglob("*.py"), *(ROOT / "tests" / "graph" / "random_networks").glob("*.py")])
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def fresh(first: int) -> dict[str, Any]:
    return {
        "first_seed": first,
        "networks": 0,
        **dict.fromkeys(COUNTS, 0),
        "dynamic_batch": 0,
        "with_several_factors_of_a_product": 0,
        "worst_absence_error": 0.0,
        "worst_restriction_error": 0.0,
        "groups_removed_by_kind": {},
        "networks_by_operator": {},
        "failures": [],
        "seconds": 0.0,
        "versions": {"code": fingerprint(), "torch": torch.__version__, "python": platform.python_version()},
    }


def add(summary: dict[str, Any], found: dict[str, Any]) -> None:
    """Count one network."""
    summary["networks"] += 1
    summary[found["outcome"]] += 1
    if found["outcome"] in ("wrong", "error"):
        summary["failures"].append({k: found[k] for k in ("seed", "outcome", "why")})
    if found["outcome"] == "error":
        return
    summary["dynamic_batch"] += found["dynamic"]
    summary["with_several_factors_of_a_product"] += found["products"] > 0
    for oracle in ("absence", "restriction"):
        summary[f"worst_{oracle}_error"] = max(summary[f"worst_{oracle}_error"], found[oracle])
    for key, counts in (("groups_removed_by_kind", found["kinds"]), ("networks_by_operator", found["operators"])):
        total = Counter(summary[key])
        total.update(counts)
        summary[key] = dict(total.most_common())


def load(path: Path, first: int) -> dict[str, Any]:
    """The unfinished result at a path, or a fresh one."""
    if path.is_file():
        found = json.loads(path.read_text())
        if found["versions"] == fresh(first)["versions"] and found["first_seed"] == first:
            return found
    return fresh(first)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="first seed")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "random_networks.json")
    options = parser.parse_args()
    summary = load(options.out, options.first)
    seeds = range(options.first + summary["networks"], options.first + options.networks)
    before, start = summary["seconds"], time.perf_counter()
    with multiprocessing.get_context("spawn").Pool(options.jobs, maxtasksperchild=500) as pool:
        for found in track(pool.imap(examine, seeds), f"{len(seeds):,} networks", total=len(seeds)):
            add(summary, found)
            summary["seconds"] = round(before + time.perf_counter() - start, 1)
            if summary["networks"] % BATCH == 0 or summary["networks"] == options.networks:
                save(options.out, summary, sort_keys=False)
    counts = ", ".join(f"{summary[k]:,} {k}" for k in COUNTS)
    print(f"{summary['networks']:,} networks: {counts}; worst errors {summary['worst_absence_error']:.1e} (absence), "
          f"{summary['worst_restriction_error']:.1e} (restriction)")  # fmt: skip
    return 1 if summary["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
