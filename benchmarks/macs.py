"""Compare the MACs of every exportable model of the zoo with half of what torch's FlopCounterMode counts for the eager
model.

    python benchmarks/macs.py                 # resumes; results in benchmarks/results/macs.json and macs.md
    python benchmarks/macs.py --only 'swin*'  # some models

The counter runs on the meta device if the model can, else on the CPU. Attention and recurrence are decomposed, since it
does not count their CPU kernels. It does not know deformable convolutions; this script counts them like plain ones. Each
model runs in its own process.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fnmatch
import functools
import json
import math
import warnings
from pathlib import Path

from common import revision, save, write
from zoo import build, run_child, timm_names, torchvision_names

WHY = {"timm/gemma4_vit_167m": "the angles of positions are a product of constants, which capture computes once"}
RESULTS = Path(__file__).parent / "results"


def measure(name: str) -> dict:
    import torch

    from graphcomb import capture

    torch.set_num_threads(1)
    model, inputs = build(name)
    try:
        program = capture(model, inputs, prove=False)  # `capture.py` proves it
    except Exception as error:
        return {"model": name, "status": "not exportable", "why": str(error)[:200]}
    cost = program.cost()
    row = {"model": name, "macs": cost["macs"], "unknown": cost.get("unknown", [])}
    for device in ("meta", "cpu"):
        with contextlib.suppress(Exception):
            row |= {"torch": counted(copy.deepcopy(model).to(device), inputs, device), "device": device}
            break
    if "torch" not in row:
        return row | {"status": "not counted"}
    return row | {"status": "equal" if row["torch"] == row["macs"] else "differs"}


def counted(model, inputs, device: str) -> float:
    import torch
    from torch.backends import mkldnn
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils import _pytree as pytree
    from torch.utils.flop_counter import FlopCounterMode

    def deformed(x, weight, *rest, out_shape, **more) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    model.requires_grad_(
        False
    )  # of an output that needs gradients the counter asks for its gradient function, in vain here
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), inputs)
    more = {torch.ops.torchvision.deform_conv2d: deformed}
    with (
        FlopCounterMode(display=False, custom_mapping=more) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH),
        mkldnn.flags(enabled=False),
    ):  # fmt: skip
        model(*inputs)
    return counter.get_total_flops() / 2


def table(data: dict) -> str:
    rows = data["rows"]
    count = {s: sum(r["status"] == s for r in rows.values()) for s in sorted({r["status"] for r in rows.values()})}
    lines = ["# MACs against torch's FlopCounterMode\n", ", ".join(f"{n} {s}" for s, n in count.items()) + ".\n"]
    odd = [r for r in rows.values() if r["status"] not in ("equal", "not exportable") or r.get("unknown")]
    if odd:
        lines += ["| model | graphcomb | torch | what |", "| --- | ---: | ---: | --- |"]
    for r in odd:
        what = r.get("why") or WHY.get(r["model"]) or "; ".join(r.get("unknown", [])) or r["status"]
        lines.append(f"| {r['model']} | {r.get('macs', 0):,} | {r.get('torch', 0):,.0f} | {what} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern over model names")
    parser.add_argument("--again", action="store_true", help="count anew what has a result")
    parser.add_argument("--results", type=Path, default=RESULTS / "macs.json")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import timm  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401

    import graphcomb.graph  # noqa: F401

    data = json.loads(options.results.read_text()) if options.results.exists() else {"rows": {}}
    data["commit"] = revision()
    for name in torchvision_names() + timm_names():
        if not fnmatch.fnmatch(name, options.only) or (name in data["rows"] and not options.again):
            continue
        data["rows"][name] = {"model": name} | run_child(functools.partial(measure, name), 300, 14)
        save(options.results, data)
        print(data["rows"][name], flush=True)
    write(options.results.with_suffix(".md"), table(data))


if __name__ == "__main__":
    main()
