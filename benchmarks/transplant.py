"""Transplant pruned models back into their classes: models of torchvision and timm at 60 % of their MACs, with and without
`for_class`.

    python benchmarks/transplant.py                  # resumes; benchmarks/results/transplant.json and transplant.md
    python benchmarks/transplant.py --only 'timm/s*' # some models; --again measures them anew, --failed those not exact
    python benchmarks/transplant.py --table          # only rewrite the table

Each model runs in its own process with a time and a memory limit. Weights are random, and the importance is magnitude.
`transplant` itself verifies its result in float64; here its outputs are compared again with the program's, in the model's
own precision. If 60 % of the MACs cannot be reached, the smallest reachable share is used.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import re
import time
import warnings
from pathlib import Path

from common import write
from zoo import build, environment, measure_each, timm_names, torchvision_names

RESULTS = Path(__file__).parent / "results"
MACS = 0.6
WAYS = {"for_class": True, "free": False}


def measure(name: str) -> dict:
    """One row: by way, exact or refused and why, and the share of the MACs that is left."""
    import torch

    from graphcomb import capture

    torch.set_num_threads(1)
    start = time.process_time()
    model, inputs = build(name)
    row: dict = {"model": name, "params": sum(p.numel() for p in model.parameters())}
    inputs = tuple(x[:1] if isinstance(x, torch.Tensor) and "torchvision" not in name else x for x in inputs)
    try:
        program = capture(model, inputs, prove=False)
    except Exception as error:
        return row | {"status": "not exportable", "why": str(error)[:300]}
    for way, for_class in WAYS.items():
        begin = time.process_time()
        row[way] = _way(model, program, inputs, for_class) | {"cpu_s": time.process_time() - begin}
    return row | {"status": row["for_class"]["status"], "cpu_s": time.process_time() - start}


def _way(model, program, inputs, for_class: bool) -> dict:
    import torch

    from graphcomb import Refused, Unreachable
    from graphcomb.graph.verify.evaluate import relative_error
    from graphcomb.passes import RemoveChannels

    try:
        result = RemoveChannels(macs=MACS, for_class=for_class, importance="magnitude")(program)
    except Unreachable as error:
        found = re.search(r"\(([\d.]+)%\) can", str(error))
        if found is None or float(found[1]) == 100:
            return {"status": "nothing to prune", "why": str(error)[:300], "macs": 1.0}
        share = min(float(found[1]) / 100 + 1e-3, 1.0)
        result = RemoveChannels(macs=share, for_class=for_class, importance="magnitude")(program)
    row = {"macs": result.program.macs / program.macs, "tied": len(result.record.get("tied", ()))}
    try:
        new = result.transplant(model)
    except Refused as error:
        return row | {"status": "refused", "why": str(error).removeprefix("transplant: ")[:300]}
    with torch.no_grad():
        again, expected = new(*copy.deepcopy(inputs)), result.program.module().eval()(*copy.deepcopy(inputs))
    row["difference"] = relative_error(again, expected)
    return row | {"status": "exact" if row["difference"] <= 1e-3 else "wrong"}


# ---------------------------------------------------------------------------------------------------------- the table
def table(data: dict) -> str:
    rows = sorted(data["rows"].values(), key=lambda r: r["model"])
    lines = ["# The class back\n"]
    for library in ("torchvision", "timm"):
        own = [r for r in rows if r["model"].startswith(library) and "for_class" in r]
        if not own:
            continue
        for way in WAYS:
            exact = [r for r in own if r[way]["status"] == "exact"]
            wrong = sum(r[way]["status"] == "wrong" for r in own)
            near = sum(r[way]["macs"] <= MACS + 0.02 for r in exact)
            lines.append(
                f"- {library}, {'`for_class=True`' if WAYS[way] else 'free selection'}: {len(exact)} of {len(own)} that ran "
                f"to the end exact ({len(exact) / len(own):.0%}), {near} of these with {MACS:.0%} of the MACs or fewer; "
                f"{wrong} silently wrong."
            )
    missing = data["names"] - len(rows)
    lines += [
        f"\n{len(rows)} of {data['names']} models measured{f' ({missing} are left)' if missing else ''}; "
        f"{sum('for_class' not in r for r in rows)} cannot be exported or hit a limit. {data['environment']}\n",
        "| model | for_class | MACs left | free | MACs left | CPU s | why |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    for r in rows:
        if "for_class" not in r:
            lines.append(f"| {r['model']} | {r['status']} | | | | | {_cell(r.get('why', ''))} |")
            continue
        ways = [r[way] for way in WAYS]
        why = next((w["why"] for w in ways if "why" in w), "")
        cells = " | ".join(f"{w['status']} | {w['macs']:.0%}" for w in ways)
        lines.append(f"| {r['model']} | {cells} | {r['cpu_s']:.0f} | {_cell(why)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:160]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern over model names")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    parser.add_argument("--failed", action="store_true", help="measure anew what is neither exact nor not exportable")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--results", type=Path, default=RESULTS / "transplant.json")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import graphcomb.passes  # noqa: F401

    torch.set_num_threads(1)
    path: Path = options.results
    data = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    names = torchvision_names() + timm_names()
    data["environment"], data["names"] = environment(), len(names)

    def wanted(name: str, old: dict | None) -> bool:
        settled = old is not None and (old["status"] in ("exact", "not exportable") or not options.failed)
        fits = any(fnmatch.fnmatch(name, p) for p in options.only.split(","))
        return fits and (options.again or not settled)

    def says(row: dict) -> str:
        ways = [f"{w}: {row[w]['status']} {row[w]['macs']:.2f} {row[w].get('why', '')}" for w in WAYS if w in row]
        return f"{row.get('cpu_s', 0):.0f}s {'; '.join(ways)}"

    if not options.table:
        measure_each(names, wanted, measure, data, options, says)
    if data["rows"]:
        write(path.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
