"""Comb and prune every exportable torchvision model and one model of every timm family, and compare with torch-pruning.

    python benchmarks/zoo.py                 # resumes; results in benchmarks/results/zoo.json and zoo.md
    python benchmarks/zoo.py --only 'swin*'  # some models; --again measures them anew
    python benchmarks/zoo.py --table         # only rewrite the table

Each model runs in its own process with a time and a memory limit. It is captured without hints, combed, pruned with ratio
0.5 of every unfrozen axis, and checked against the oracle in float64. Weights are random.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import platform
import re
import signal
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from common import revision, save, write

RESULTS = Path(__file__).parent / "results"
SMALL = (
    "zepto atto femto pico nano xxtiny xtiny xxs xsmall xs tiny mini micro small 0 050 18 s 26 lite 002 004 010 020 34 50 "
    "t base b medium m 101 large l"
).split()


def timm_names() -> list[str]:
    """One model, a small one, for every (module, family) of timm."""
    from timm.models._registry import _module_to_models

    families: dict[tuple[str, str], list[str]] = {}
    for module, names in _module_to_models.items():
        for name in names:
            families.setdefault((module, re.split(r"[_\d]", name)[0]), []).append(name)

    def smallness(name: str) -> tuple[int, int, str]:
        tokens = re.findall(r"[a-z]+|\d+", name)
        rank = min((SMALL.index(t) for t in tokens if t in SMALL), default=len(SMALL))
        return rank, len(name), name

    return sorted(f"timm/{min(names, key=smallness)}" for names in families.values())


def torchvision_names() -> list[str]:
    from torchvision import models

    found = [*models.list_models(module=models)]
    for module in (models.segmentation, models.video, models.optical_flow):
        found += models.list_models(module=module)
    for name in models.list_models(module=models.detection):
        found += [name, f"{name}:heads"]
    return [f"torchvision/{name}" for name in found]


def build(name: str):
    """(model, example inputs) with random weights, at a small input size where the model allows it."""
    import torch

    family, _, rest = name.partition("/")
    torch.manual_seed(0)
    torch.nn.init.trunc_normal_ = lambda t, mean=0.0, std=1.0, a=-2.0, b=2.0, **_: t.data.normal_(mean, std).clamp_(
        a, b
    )  # fast
    if family == "timm":
        import timm

        options = {"img_size": 256} if rest.startswith("samvit") else {}  # at its own 1024 the oracle needs over 14 GB
        model = timm.create_model(rest, **options).eval()
        config = model.default_cfg
        channels, *full = config["input_size"]
        full = [options["img_size"]] * 2 if options else full
        small = 160 if "nception" in rest or "nasnet" in rest else 96  # the last stage has to be more than one pixel
        for size in [full] if config.get("fixed_input_size") else [[small, small], full]:
            try:
                with torch.no_grad():
                    model(torch.randn(2, channels, *size))
                return model, (torch.randn(2, channels, *size),)
            except (RuntimeError, AssertionError, ValueError):
                continue
        raise RuntimeError(f"{rest} does not run at its own input size")
    from torchvision import models

    rest, _, part = rest.partition(":")
    options = {"weights_backbone": None} if rest in _with_backbone() else {}
    if rest in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model = models.get_model(rest, weights=None, **options).eval()
    if rest in models.list_models(module=models.optical_flow):
        return model, (torch.randn(2, 3, 128, 128), torch.randn(2, 3, 128, 128), 2)
    if rest in models.list_models(module=models.video):
        shapes = {"mvit": (16, 224, 224), "s3d": (16, 224, 224)}
        size = next((s for k, s in shapes.items() if rest.startswith(k)), (8, 64, 64))
        return model, (torch.randn(2, 3, *size),)
    if part:
        size = 320 if rest.startswith("ssd") else 128
        return before_post_processing(model), (torch.randn(2, 3, size, size),)
    if rest in models.list_models(module=models.detection):
        return model, ([torch.randn(3, 128, 128)],)
    size = {"vit_l_32": 224, "vit_b_32": 224, "vit_h_14": 224, "inception_v3": 96}.get(rest)
    size = size or (224 if rest.startswith(("vit", "maxvit")) else 64)
    return model, (torch.randn(2, 3, size, size),)


def before_post_processing(detector):
    """Backbone and dense head of a torchvision detector (the RPN's for the R-CNNs), as far as it does not depend on data."""
    import torch

    class BackboneAndHead(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = detector.backbone
            self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

        def forward(self, images):
            features = self.backbone(images)
            return self.head(list(features.values()) if isinstance(features, dict) else [features])

    return BackboneAndHead().eval()


def _quick_normal(tensor, mean=0.0, std=1.0, a=-2.0, b=2.0, **_):
    return tensor.data.normal_(mean, std).clamp_(a, b)


def _with_backbone() -> list[str]:
    from torchvision import models

    return models.list_models(module=models.segmentation) + models.list_models(module=models.detection)


def measure(name: str, verify_up_to: float) -> dict:
    """One row: what the comb found, what was removed, how long it took, and the oracle's error."""
    import torch

    from graphcomb import capture
    from graphcomb.graph.comb.solve import Comb
    from graphcomb.graph.program import flatten_outputs
    from graphcomb.passes import RemoveChannels

    torch.set_num_threads(1)
    row: dict = {"model": name}
    model, inputs = build(name)
    row["params"] = sum(p.numel() for p in model.parameters())
    tensors = tuple(x for x in inputs)
    start = time.perf_counter()
    try:
        program = capture(model, tensors)
    except Exception as error:
        return row | {"status": "not exportable", "why": str(error)[:400]}
    row["capture_s"] = time.perf_counter() - start
    row["nodes"] = len(program.graph.nodes)
    row["comb_s"] = min(_timed(lambda: Comb(program)) for _ in range(3))
    solved = Comb(program)
    row["prunable_share"] = solved.coverage()
    row["refusals"] = [f"{node.name}: {why}" for node, why in solved.refusals][:10]
    row["frozen"] = [f"{g.name}: {g.frozen}" for g in solved.groups if g.frozen and g.kind != "constant"][:12]
    start = time.process_time()
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    row["remove_s"] = time.process_time() - start
    row["removed_share"] = 1 - result.program.params / program.params
    row["macs_ratio"] = program.macs / max(result.program.macs, 1)
    with torch.no_grad():
        before = [tuple(t.shape) for t in flatten_outputs(program.module()(*tensors))]
        after = [tuple(t.shape) for t in flatten_outputs(result.program.module()(*tensors))]
    if before != after:
        return row | {"status": "wrong shapes", "why": f"{before} became {after}"}
    if row["params"] <= verify_up_to:
        from graphcomb.graph import verify as oracle

        start = time.perf_counter()
        verdict = oracle.check(program, result)
        row["error"], row["dense_difference"] = verdict.error, verdict.dense_difference
        row["verify_s"] = time.perf_counter() - start
        if verdict.vacuous:
            return row | {"status": "vacuous"}
        if not verdict.error <= 1e-10:
            return row | {"status": "inexact", "why": "; ".join(map(str, verdict.disagreements))[:400]}
    return row | {"status": "ok"}


def _timed(function) -> float:
    """CPU seconds, which other processes on the machine do not lengthen."""
    start = time.process_time()
    function()
    return time.process_time() - start


def torch_pruning(name: str) -> dict:
    """torch-pruning out of the box on the same model: dependency graph, magnitude pruner at 0.5, one step."""
    import torch
    import torch_pruning as tp

    torch.set_num_threads(1)
    model, inputs = build(name)
    before = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        shapes = _shapes(model(*inputs))
    classifiers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m.out_features == 1000]
    try:
        start = time.perf_counter()
        tp.DependencyGraph().build_dependency(model, example_inputs=inputs)
        graph_s = time.perf_counter() - start
        start = time.perf_counter()
        pruner = tp.pruner.MagnitudePruner(
            model, inputs, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5, ignored_layers=classifiers
        )
        pruner.step()
        all_s = time.perf_counter() - start
        with torch.no_grad():
            after = _shapes(model(*inputs))
    except Exception as error:
        return {
            "status": "fails",
            "why": f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}",
        }
    removed = 1 - sum(p.numel() for p in model.parameters()) / before
    status = "runs" if after == shapes else "wrong shapes"
    return {"status": status, "graph_s": graph_s, "all_s": all_s, "removed_share": removed}


def _shapes(outputs) -> list:
    import torch
    from torch.utils import _pytree as pytree

    return [tuple(t.shape) for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]


# ----------------------------------------------------------------------------------------------------------- the parent
def run_child(function, seconds: float, gigabytes: float) -> dict:
    """The row that `function()` returns, computed in a forked process that is killed past the limits.

    Forked from this process, which has imported the libraries but not computed anything: importing costs more than most
    models do.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as out, tempfile.TemporaryFile() as log:
        pid = os.fork()
        if pid == 0:
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                Path(out.name).write_text(json.dumps(function()))
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
                Path(out.name).write_text(json.dumps({"status": "crash", "why": text[:400]}))
            finally:
                os._exit(0)
        end, peak, why = time.monotonic() + seconds, 0.0, None
        while os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.1)
            peak = max(peak, _resident(pid))
            if time.monotonic() > end or peak > gigabytes:
                why = f"memory limit of {gigabytes:.0f} GB" if peak > gigabytes else f"time limit of {seconds:.0f} s"
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return {"status": "limit", "why": why, "peak_gb": peak}
        text = Path(out.name).read_text()
        return (json.loads(text) if text else {"status": "crash", "why": "the process died"}) | {"peak_gb": peak}


def _resident(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9
    except (OSError, IndexError):
        return 0.0


def table(data: dict) -> str:
    rows = sorted(data["rows"].values(), key=lambda r: r["model"])
    exportable = [r for r in rows if r["status"] not in ("not exportable",)]
    good = [r for r in exportable if r["status"] == "ok"]
    exact = [r for r in good if "error" in r]
    rivals = [r["torch_pruning"]["status"] for r in exportable if "torch_pruning" in r]
    shares = [r["prunable_share"] for r in good]
    lines = [
        "# Every exportable model, combed and pruned\n",
        f"{len(good)} of {len(exportable)} exportable models pruned at ratio 0.5; {len(exact)} of them checked against "
        f"the oracle in float64, worst error {max((r['error'] for r in exact), default=0):.1e}. "
        f"Share of parameters on a prunable axis: median {statistics.median(shares):.2%}, "
        f"lowest {min(shares):.2%}. Comb: median {1e3 * statistics.median(r['comb_s'] for r in good):.1f} ms. "
        f"torch-pruning out of the box runs and keeps the output shapes on {rivals.count('runs')} of the {len(rivals)} "
        f"it was measured on.\n",
        f"{data['environment']}\n",
        "| model | nodes | on a prunable axis | removed | error | comb, CPU ms | with surgery | torch-pruning |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for r in rows:
        other = r.get("torch_pruning", {})
        theirs = other.get("status", "")
        theirs += f", removed {other['removed_share']:.0%}" if "removed_share" in other else ""
        if r["status"] != "ok":
            lines.append(f"| {r['model']} | {r['status']}: {r.get('why', '')[:120]} | | | | | | {theirs} |")
            continue
        error = f"{r['error']:.0e}" if "error" in r else "not checked"
        lines.append(
            f"| {r['model']} | {r['nodes']} | {r['prunable_share']:.1%} | {r['removed_share']:.1%} | {error} "
            f"| {1e3 * r['comb_s']:.1f} | {1e3 * r['remove_s']:.0f} | {theirs} |"
        )
    return "\n".join(lines) + "\n"


def plot(data: dict, path: Path) -> None:
    """Nodes against seconds for the comb and for comb + selection + surgery, one dot a model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [r for r in data["rows"].values() if r["status"] == "ok"]
    nodes = [r["nodes"] for r in rows]
    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    axis.scatter(nodes, [r["comb_s"] for r in rows], s=9, label="comb")
    axis.scatter(nodes, [r["remove_s"] for r in rows], s=9, label="comb + selection + surgery")
    line = [min(nodes), max(nodes)]
    unit = statistics.median(r["comb_s"] / r["nodes"] for r in rows)
    axis.plot(line, [n * unit for n in line], lw=0.8, color="grey", label=f"{1e6 * unit:.0f} µs a node")
    axis.set(xscale="log", yscale="log", xlabel="nodes in the graph", ylabel="CPU seconds, one thread")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def environment() -> str:
    import timm
    import torch
    import torchvision

    return (
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}, Python "
        f"{platform.python_version()}, one thread of {platform.processor() or platform.machine()}"
    )


def measure_each(
    names: list[str],
    wanted: Callable[[str, dict | None], bool],
    job: Callable[[str], dict],
    data: dict,
    options: argparse.Namespace,
    says: Callable[[dict], str] = lambda row: "",
) -> None:
    """Measure each model in a process of its own, under the limits of the options, and keep its row at once.

    wanted: of a name and its row so far, whether to measure it. says: what to print of a row besides its status and why.
    """
    for i, name in enumerate(names):
        if not wanted(name, data["rows"].get(name)):
            continue
        limits = options.seconds, options.gigabytes
        row = {"model": name, "commit": revision()} | run_child(functools.partial(job, name), *limits)
        data["rows"][name] = row
        save(options.results, data)
        text = " ".join(part for part in (says(row), row.get("why", "")[:150]) if part)
        print(f"[{i + 1}/{len(names)}] {name}: {row['status']} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="pattern over model names")
    parser.add_argument("--again", action="store_true", help="measure anew what has a result")
    parser.add_argument("--failed", action="store_true", help="measure anew what failed")
    parser.add_argument(
        "--verify-up-to", type=float, default=1e9, help="largest number of parameters to run the oracle on"
    )
    parser.add_argument("--no-rival", action="store_true", help="leave torch-pruning out")
    parser.add_argument("--seconds", type=float, default=400)
    parser.add_argument("--gigabytes", type=float, default=14)
    parser.add_argument("--results", type=Path, default=RESULTS / "zoo.json")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    import timm  # noqa: F401
    import torch
    import torchvision  # noqa: F401

    import graphcomb.graph.verify
    import graphcomb.passes  # noqa: F401

    torch.set_num_threads(1)
    path: Path = options.results
    path.parent.mkdir(exist_ok=True)
    data = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    data["environment"] = environment()
    if not options.table:
        names = [n for n in torchvision_names() + timm_names() if fnmatch.fnmatch(n, options.only)]
        for i, name in enumerate(names):
            old = data["rows"].get(name)
            unsettled = old and (
                old["status"] != "ok" or ("error" not in old and old["params"] <= options.verify_up_to)
            )
            rival = old.get("torch_pruning") if old else None
            missing = rival is None and not options.no_rival
            if old and not options.again and not (options.failed and unsettled):
                if not missing or old["status"] == "not exportable":
                    continue
                row = old
            else:
                job = functools.partial(measure, name, options.verify_up_to)
                row = {"model": name, "commit": revision()} | run_child(job, options.seconds, options.gigabytes)
            if missing and row["status"] != "not exportable":
                rival = run_child(functools.partial(torch_pruning, name), 120, options.gigabytes)
            if rival is not None:
                row["torch_pruning"] = rival
            data["rows"][name] = row
            save(path, data)
            print(
                f"[{i + 1}/{len(names)}] {name}: {row['status']} {row.get('error', '')} {row.get('why', '')[:150]}",
                flush=True,
            )
    if data["rows"]:
        write(path.with_suffix(".md"), table(data))
        plot(data, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
