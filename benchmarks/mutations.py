"""Test whether the oracle detects single wrong indices that are planted in parameter dimensions of pruned zoo models.

    python benchmarks/mutations.py                 # resumes; results in benchmarks/results/mutations.json and .md
    python benchmarks/mutations.py --count 100     # more mutations a model

Each model of the zoo up to a size is captured and pruned at ratio 0.5. A mutation replaces one index of one parameter
dimension by a removed index. It counts as detected if the outputs differ from the oracle's.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import warnings
from pathlib import Path

import zoo
from common import save, write

sys.path.append(str(Path(__file__).parents[1]))  # for tests/oracles


def measure(name: str, count: int, seed: int) -> dict:
    import torch

    from graphcomb import capture
    from graphcomb.passes import RemoveChannels
    from tests.oracles.mutate import mutation_test

    torch.set_num_threads(1)
    model, inputs = zoo.build(name)
    program = capture(model, inputs)
    report = mutation_test(program, RemoveChannels(ratio=0.5, round_to=1)(program), seed=seed, count=count)
    missed = [{"parameter": m.parameter, "dim": m.dim, "why": m.why} for m in report.missed]
    return {"status": "ok", "total": report.total, "caught": report.caught, "missed": missed}


def table(data: dict) -> str:
    rows = {n: r for n, r in sorted(data["rows"].items()) if r["status"] == "ok"}
    total, caught = (sum(r[k] for r in rows.values()) for k in ("total", "caught"))
    lines = [
        "# Planted single wrong indices\n",
        f"{caught} of {total} caught ({caught / max(total, 1):.2%}) on {len(rows)} models, seed {data['seed']}. "
        f"{data['environment']}\n",
        "| model | planted | caught | missed, and where the difference ends |",
        "| --- | ---: | ---: | --- |",
    ]
    for name, r in rows.items():
        missed = "; ".join(f"{m['parameter']}:{m['dim']}: {m['why']}" for m in r["missed"])
        lines.append(f"| {name} | {r['total']} | {r['caught']} | {missed} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=25, help="mutations a model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--largest", type=float, default=8e6, help="number of parameters of the largest model")
    parser.add_argument("--seconds", type=float, default=200)
    parser.add_argument(
        "--zoo", type=Path, default=zoo.RESULTS / "zoo.json", help="results that say which models there are"
    )
    parser.add_argument("--results", type=Path, default=zoo.RESULTS / "mutations.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import graphcomb.graph.verify
    import graphcomb.passes  # noqa: F401

    torch.set_num_threads(1)
    found = json.loads(options.zoo.read_text())["rows"]
    names = [n for n, r in found.items() if r["status"] == "ok" and r["params"] <= options.largest]
    data = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
    data |= {"seed": options.seed, "environment": zoo.environment()}
    for i, name in enumerate(names):
        if name in data["rows"]:
            continue
        job = functools.partial(measure, name, options.count, options.seed)
        row = data["rows"][name] = zoo.run_child(job, options.seconds, 12)
        save(options.results, data)
        print(
            f"[{i + 1}/{len(names)}] {name}: {row.get('caught')} of {row.get('total')} {row.get('why', '')}", flush=True
        )
    write(options.results.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
