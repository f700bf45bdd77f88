"""Accuracy after pruning and distillation on real data, compared with torch-pruning at the same MACs and the same training.

    python benchmarks/accuracy.py                                # resumes; results/accuracy.json, .md and two .png
    python benchmarks/accuracy.py --networks resnet --seeds 0 --methods graphcomb
    python benchmarks/accuracy.py --methods graphcomb "graphcomb paper score" --again   # both forms of the Fisher score
    python benchmarks/accuracy.py --latency                      # afterwards, on a quiet machine: adds latencies
    python benchmarks/accuracy.py --methods "graphcomb latency"  # also on a quiet machine, after the others
    python benchmarks/accuracy.py --table                        # only rewrite the tables and plots
    python benchmarks/accuracy.py --long                         # classifiers at 4.3x, trained as long as the dense ones
    python benchmarks/accuracy.py --full                         # larger networks and longer training, for a GPU

Needs torch-pruning 1.6.1 (pip install torch-pruning==1.6.1) and Fashion-MNIST (apt-get install dataset-fashion-mnist).

Every network has a dense reference, which is trained once and kept in the cache folder (with --full one for each of three
seeds). A seed determines the order of the data, the images for importance scores, and the training. A row starts from the
reference and prunes to a share of its MACs, which graphcomb counts on the captured program for all methods. Every method
then trains for the same number of steps with the same data, optimizer and schedule. The score is that on the test set:
top-1 accuracy for classifiers, mean IoU over 11 classes for segmenters. graphcomb's budget includes the steps during which
it prunes; torch-pruning prunes at once and trains for the whole budget. Widths of CNNs stay multiples of the same number
for both.

torch-pruning is used as in its examples: the classifier is ignored, attention projections are named with their number of
heads, and importances have their default normalisation. Gradients for its Taylor and Hessian importances come from the same
training images as those for graphcomb's one-shot Fisher scores. Its ratio is the smallest one whose MACs are within the
target, found by bisection. CNNs are ranked globally, transformers layer by layer, as in its examples; widths of transformers
are not rounded, because its step would be the multiple times the number of heads.
"""

from __future__ import annotations

import argparse
import ast
import copy
import datetime
import functools
import hashlib
import inspect
import json
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import networks
import scenes
import torch
import torch.nn.functional as F
from common import revision, save, write
from torch import nn

import graphcomb
from graphcomb.data import cache_folder, fashion_mnist
from graphcomb.graph.errors import Contended
from graphcomb.graph.workload.layer import run_seconds
from graphcomb.graph.workload.layers import Layers
from graphcomb.passes import Distill, RemoveChannels
from graphcomb.runtime import LatencyTable

HERE = Path(__file__).parent
TARGETS = {"classification": (4.3, 3.0, 2.0), "segmentation": (1.9, 3.0, 1.5)}  # times fewer MACs; the first has an aim
TP = "torch-pruning"
IMPORTANCES = ("magnitude", "taylor", "hessian")
PAPER = "graphcomb paper score"  # as graphcomb, but scored in CPD's published form instead of exactly
METHODS = ("graphcomb", PAPER, "graphcomb labels", *(f"{TP} {i}" for i in IMPORTANCES), f"{TP} distilled")
LATENCY = "graphcomb latency"  # as graphcomb, but the target is the latency predicted for graphcomb's own row
AFTERWARDS = ("distilled", "latency")
EXTRA = ("graphcomb one-shot", LATENCY)  # not in the default run


@dataclass(frozen=True)
class Size:
    """How large everything is. reference: optimizer steps of the dense network; references: how many dense networks there
    are, which the seeds take in turns; steps: of pruning and training after it; lr: peaks of both; arguments: of the
    network."""

    reference: dict[str, int]
    references: int = 1
    steps: int = 160
    batch: dict[str, int] = field(default_factory=lambda: {"classification": 64, "segmentation": 32})
    lr: tuple[float, float] = (2e-3, 1e-3)
    scenes: tuple[int, int] = (24_000, 1000)
    scored: int = 256  # training images for scores from gradients
    round_to: int = 4
    alpha: float = 0.7
    temperature: float = 2.0
    features: dict[str, float] = field(default_factory=lambda: {"classification": 1.0, "segmentation": 0.0})
    interval: int = 4
    arguments: dict[str, dict[str, int]] = field(default_factory=dict)


SIZES = {
    "small": Size(
        {"resnet": 4000, "mobilenet": 4000, "deit": 6000, "lraspp": 5000, "segformer": 5000}, steps=400,
        arguments={"lraspp": {"width": 16}},
    ),
    "full": Size(
        dict.fromkeys(networks.NETWORKS, 20_000), steps=6000, interval=20, scenes=(40_000, 4000), scored=2048,
        arguments={
            "resnet": {"width": 64, "blocks": 2}, "mobilenet": {"width": 32, "expansion": 6},
            "deit": {"width": 192, "depth": 8, "heads": 6}, "lraspp": {"width": 48},
            "segformer": {"width": 64, "depth": 3},
        },
    ),
}  # fmt: skip


# The budget that the dense networks had. As many events while pruning as in the short run, so a longer interval. No feature
# term: on images held out of the training set it cost the ResNet 0.4 points at this length.
SIZES["long"] = replace(SIZES["small"], steps=4000, interval=40, features={"classification": 0.0, "segmentation": 0.0})
RESULTS = {"small": "accuracy.json", "long": "accuracy_long.json", "full": "accuracy_full.json"}


@dataclass(frozen=True)
class Job:
    network: str
    seed: int
    method: str
    target: float
    size: str

    @property
    def key(self) -> str:
        return f"{self.network}/{self.seed}/{self.method}/{self.target:g}"


def kind(network: str) -> str:
    return "classification" if network in networks.CLASSIFIERS else "segmentation"


# ----------------------------------------------------------------------------------------------------- data and scores
@functools.cache
def loaders(task: str, size: str) -> tuple[Any, Any]:
    options = SIZES[size]
    if task == "classification":
        return fashion_mnist(batch_size=options.batch[task])
    return scenes.loaders(options.batch[task], *options.scenes)


def example(task: str) -> torch.Tensor:
    return torch.zeros(2, 1, 28, 28) if task == "classification" else torch.zeros(2, 1, scenes.SIZE, scenes.SIZE)


def capture(model: nn.Module, task: str) -> graphcomb.Program:
    return graphcomb.capture(model.eval(), (example(task),), dynamic_shapes="batch")


def score(program: graphcomb.Program, network: str, size: str) -> float:
    """Top-1 accuracy or mean IoU on the test set, in percent."""
    task = kind(network)
    classes = 10 if task == "classification" else scenes.CLASSES
    confusion = torch.zeros(classes, classes, dtype=torch.float64)
    module = program.module().eval()
    device = next(module.parameters()).device
    with torch.no_grad():
        for images, labels in loaders(task, size)[1]:
            found = module(images.to(device)).argmax(1).cpu()
            pairs = labels.flatten() * classes + found.flatten()
            confusion += torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    if task == "classification":
        return 100 * float(confusion.diagonal().sum() / confusion.sum())
    return 100 * scenes.miou(confusion)


def gradient_batches(task: str, size: str, seed: int, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Training images for scores from gradients, in batches of 32."""
    images, labels = loaders(task, size)[0].dataset.tensors
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count]
    return list(zip(images[chosen].split(32), labels[chosen].split(32), strict=True))


# ----------------------------------------------------------------------------------------------------------- references
def reference(network: str, seed: int, size: str) -> tuple[nn.Module, float]:
    """The dense network and its score, trained now or taken from the cache. Two processes do not train the same one."""
    options, task = SIZES[size], kind(network)
    seed %= options.references
    torch.manual_seed(seed)
    model = networks.NETWORKS[network](**options.arguments.get(network, {}))
    decides = {
        "network": network, "seed": seed, "arguments": options.arguments.get(network, {}), "lr": options.lr[0],
        "steps": options.reference[network], "batch": options.batch[task],
        "scenes": options.scenes if task == "segmentation" else None,
        "code": digest(network, model), "torch": torch.__version__,
    }  # fmt: skip
    code = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    path = cache_folder() / "accuracy" / f"{network}-{seed}-{code}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock")):
        if not path.is_file():
            program = capture(model, task)
            training = Distill(
                alpha=0.0, steps=options.reference[network], lr=options.lr[0], weight_decay=0.02, checkpoint_every=0
            )
            done = training(program, data=loaders(task, size)[0], seed=seed).program
            state = {k: v.detach().cpu() for k, v in done.module().state_dict().items()}
            part = path.with_suffix(".part")
            torch.save({"state": state, "score": score(done, network, size)}, part)
            part.replace(path)
    found = torch.load(path, weights_only=True)
    missing, unexpected = model.load_state_dict(found["state"], strict=False)
    if unexpected or not all(name.endswith("num_batches_tracked") for name in missing):
        raise RuntimeError(f"{path}: not the weights of {network}")
    return model.eval(), found["score"]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest(network: str, model: nn.Module) -> str:
    """Of the code that a reference depends on, without its layout and comments."""
    parts = {type(m) for m in model.modules() if type(m).__module__ == networks.__name__}
    sources = [inspect.getsource(p) for p in (*parts, networks.conv)]
    sources += [Path(scenes.__file__).read_text()] if kind(network) == "segmentation" else []
    return hashlib.sha256("".join(sorted(ast.dump(ast.parse(s)) for s in sources)).encode()).hexdigest()[:12]


# -------------------------------------------------------------------------------------------------------------- methods
def training(options: Size, distilled: bool, task: str) -> Distill:
    """The training that every method gets, with or without the dense teacher. Segmenters are taught by scores alone: a
    feature term lets the Fisher scores keep the early layers, at the cost of all others."""
    if not distilled:
        return Distill(alpha=0.0, steps=options.steps, lr=options.lr[1])
    return Distill(
        alpha=options.alpha, temperature=options.temperature, features=options.features[task], steps=options.steps,
        lr=options.lr[1],
    )  # fmt: skip


def graphcomb_adaptive(job: Job, dense: nn.Module, distilled: bool, importance: str = "fisher") -> graphcomb.Program:
    options, task = SIZES[job.size], kind(job.network)
    program = capture(dense, task)
    pass_ = RemoveChannels(
        macs=1 / job.target, importance=importance, scope="global", schedule="adaptive", interval=options.interval,
        round_to=options.round_to, train=training(options, distilled, task),
    )  # fmt: skip
    return pass_(
        program, data=loaders(task, job.size)[0], seed=job.seed, teacher=program if distilled else None
    ).program


def graphcomb_latency(job: Job, dense: nn.Module) -> graphcomb.Program:
    """Pruned to the latency that is predicted for the program which the MAC target gave, all else equal."""
    options, task = SIZES[job.size], kind(job.network)
    table = LatencyTable(cache_folder() / "accuracy" / "latency.json")
    rival = Layers(graphcomb.comb(graphcomb.load(stored(replace(job, method="graphcomb")))))
    layers = [layer for _, layer in rival.at({})]
    program = capture(dense, task)
    anchored = table.anchored(program)  # as the pass does
    seconds = run_seconds(anchored, layers, progress=True)
    pass_ = RemoveChannels(
        latency=f"{1e3 * seconds} ms",
        interval=options.interval,
        round_to=options.round_to,
        train=training(options, True, task),
    )
    data = loaders(task, job.size)[0]
    return pass_(program, data=data, seed=job.seed, teacher=program, latency=table, progress=True).program


def graphcomb_one_shot(job: Job, dense: nn.Module) -> graphcomb.Program:
    options, task = SIZES[job.size], kind(job.network)
    program = capture(dense, task)
    pass_ = RemoveChannels(
        macs=1 / job.target, importance="fisher", scope="global", round_to=options.round_to, samples=options.scored
    )
    pruned = pass_(program, data=gradient_batches(task, job.size, job.seed, options.scored), seed=job.seed).program
    data = loaders(task, job.size)[0]
    return training(options, True, task)(pruned, data=data, seed=job.seed, teacher=program).program


def torch_pruning(job: Job, dense: nn.Module, importance: str, distilled: bool) -> graphcomb.Program:
    options, task = SIZES[job.size], kind(job.network)
    program = capture(dense, task)
    gradients = tp_gradients(dense, importance, job) if importance != "magnitude" else None
    goal = program.macs / job.target
    low, high, best = 0.0, 0.95, None
    for _ in range(7):
        middle = (low + high) / 2
        pruned = capture(tp_pruned(dense, importance, middle, gradients, job), task)
        if pruned.macs <= goal:
            best, high = pruned, middle
        else:
            low = middle
    if best is None:
        raise RuntimeError(f"no ratio reaches {job.target:g} times fewer MACs")
    data = loaders(task, job.size)[0]
    return training(options, distilled, task)(
        best, data=data, seed=job.seed, teacher=program if distilled else None
    ).program


def tp_gradients(dense: nn.Module, importance: str, job: Job) -> list[torch.Tensor | None]:
    """What its importances read from `.grad`: the mean gradient (Taylor), or the mean of the squares of every image's
    gradient (Hessian; its own accumulator keeps the last image only)."""
    model, options, task = copy.deepcopy(dense).eval(), SIZES[job.size], kind(job.network)
    batches = gradient_batches(task, job.size, job.seed, options.scored)
    sums: list[torch.Tensor | None] = [None] * len(list(model.parameters()))
    count = 0
    for images, labels in batches:
        parts = [(images, labels)] if importance == "taylor" else zip(images.split(1), labels.split(1), strict=True)
        for x, y in parts:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
            count += 1
            for i, p in enumerate(model.parameters()):
                found = p.grad if importance == "taylor" or p.grad is None else p.grad.square()
                sums[i] = found if sums[i] is None else sums[i] + found
    return [None if s is None else s / count for s in sums]


def tp_pruned(dense: nn.Module, importance: str, ratio: float, gradients: list | None, job: Job) -> nn.Module:
    """A pruned copy, by torch-pruning alone."""
    import torch_pruning as tp

    model, options = copy.deepcopy(dense).eval(), SIZES[job.size]
    for p, g in zip(model.parameters(), gradients or (), strict=False):
        p.grad = None if g is None else g.clone()
    heads = {}
    for m in model.modules():
        if isinstance(m, networks.Attention):
            heads[m.qkv] = m.num_heads
        if isinstance(m, networks.MixBlock):
            heads |= {m.q: m.num_heads, m.k: m.num_heads, m.v: m.num_heads}
    last = [getattr(model, n) for n in ("head", "classify", "high", "low") if hasattr(model, n)]
    found = {
        "magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance,
        "hessian": tp.importance.GroupHessianImportance,
    }[importance]()  # fmt: skip
    pruner = tp.pruner.BasePruner(
        model, example(kind(job.network))[:1], importance=found, global_pruning=not heads, pruning_ratio=ratio,
        max_pruning_ratio=0.95, ignored_layers=last, round_to=None if heads else options.round_to, num_heads=heads,
    )  # fmt: skip
    pruner.step()
    model.zero_grad()
    return model


def build(job: Job, dense: nn.Module, rows: dict[str, Any]) -> graphcomb.Program:
    match job.method.split():
        case ["graphcomb"]:
            return graphcomb_adaptive(job, dense, distilled=True)
        case ["graphcomb", "paper", "score"]:
            return graphcomb_adaptive(job, dense, distilled=True, importance="fisher-paper")
        case ["graphcomb", "labels"]:
            return graphcomb_adaptive(job, dense, distilled=False)
        case ["graphcomb", "latency"]:
            return graphcomb_latency(job, dense)
        case ["graphcomb", "one-shot"]:
            return graphcomb_one_shot(job, dense)
        case [_, "distilled"]:
            return torch_pruning(job, dense, best_importance(job, rows), distilled=True)
        case [_, importance]:
            return torch_pruning(job, dense, importance, distilled=False)
    raise ValueError(job.method)


def best_importance(job: Job, rows: dict[str, Any]) -> str:
    """torch-pruning's best importance for this network, seed and target, trained on labels."""
    found = {i: rows.get(f"{job.network}/{job.seed}/{TP} {i}/{job.target:g}", {}).get("score") for i in IMPORTANCES}
    scored = {i: s for i, s in found.items() if s is not None}
    if not scored:
        raise RuntimeError("none of its importances worked")
    return max(scored, key=lambda i: scored[i])


def measure(job: Job, rows: dict[str, Any]) -> dict[str, Any]:
    """One row."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start, cpu = time.perf_counter(), time.process_time()
    dense, dense_score = reference(job.network, job.seed, job.size)
    before = capture(dense, kind(job.network))
    row: dict[str, Any] = {"dense_score": dense_score, "dense_macs": before.macs // 2, "dense_params": before.params}
    try:
        program = build(job, dense, rows)
    except Contended:
        raise
    except Exception as error:
        return row | {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"}
    row |= {"score": score(program, job.network, job.size), "macs": program.macs // 2, "params": program.params}
    if job.method.endswith("distilled"):
        row["importance"] = best_importance(job, rows)
    program.save(stored(job))
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return row | {k: round(v, 1) for k, v in times.items()} | {"code": revision()}


def stored(job: Job) -> Path:
    """Where the pruned program of a row waits for its latency to be measured."""
    folder = cache_folder() / "accuracy" / f"pruned-{job.size}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{job.key.replace('/', '_').replace(' ', '-')}.pt2"


# ----------------------------------------------------------------------------------------------------------- the driver
def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {"rows": {}}


def stages(options: argparse.Namespace, rows: dict[str, Any]) -> Iterator[list[Job]]:
    """Jobs that may run at the same time; all seeds of the targets with an aim first, and what looks at other rows after
    them. Later seeds try only the importance that was best for the first, and not torch-pruning with our distillation."""
    for rank in range(1 if options.size == "long" else 3):
        for seed in options.seeds:
            jobs = [
                Job(n, seed, m, TARGETS[kind(n)][rank], options.size) for n in options.networks for m in options.methods
            ]
            if seed != options.seeds[0]:
                jobs = [j for j in jobs if not loses(replace(j, seed=options.seeds[0]), rows)]
                jobs = [j for j in jobs if j.method != f"{TP} distilled"]
            yield [j for j in jobs if not j.method.endswith(AFTERWARDS)]
            yield [j for j in jobs if j.method.endswith(AFTERWARDS)]


def loses(job: Job, rows: dict[str, Any]) -> bool:
    """Whether the job's importance is another than the best of the same network, seed and target."""
    importances = {f"{TP} {i}": rows.get(replace(job, method=f"{TP} {i}").key, {}) for i in IMPORTANCES}
    if job.method not in importances or not any("score" in row for row in importances.values()):
        return False
    return job.method != f"{TP} {best_importance(job, rows)}"


def work(task: tuple[Job, dict[str, Any]]) -> tuple[Job, dict[str, Any] | None]:
    job, rows = task
    try:
        return job, measure(job, rows)
    except Contended:
        return job, None


def run(options: argparse.Namespace) -> None:
    from rich.progress import track

    data = load(options.results)
    size = json.loads(json.dumps({"name": options.size} | asdict(SIZES[options.size])))
    if data["rows"] and data["size"] != size:
        raise SystemExit(f"{options.results} holds rows of other settings; move it away or name another with --results")
    data["size"] = size
    data["environment"] = environment()
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for jobs in stages(options, data["rows"]):
            jobs = [j for j in jobs if options.again or j.key not in data["rows"]]
            tasks = [(j, dict(data["rows"])) for j in jobs]
            for job, row in track(pool.imap_unordered(work, tasks), "rows", total=len(tasks)):
                if row is None:
                    print(f"{job.key}: the machine is too busy", flush=True)
                    continue
                data["rows"][job.key] = row
                save(options.results, data)
                shown = (
                    row.get("failed") or f"{row['score']:.2f} of {row['dense_score']:.2f}, {ratio(row):.2f}x fewer MACs"
                )
                print(f"{job.key}: {shown}", flush=True)


def ratio(row: dict[str, Any]) -> float:
    return row["dense_macs"] / row["macs"]


def environment() -> str:
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "torch-pruning", "onnxruntime"))
    return f"{versions}; {datetime.date.today()}"


def latency(options: argparse.Namespace) -> None:
    """Add to every row of the first seed how many times faster its program is than the dense one."""
    from rich.progress import track

    torch.set_num_threads(1)
    data = load(options.results)
    options.methods = METHODS + EXTRA
    jobs = [j for jobs in stages(options, data["rows"]) for j in jobs if stored(j).is_file() and j.key in data["rows"]]
    jobs = [j for j in jobs if options.again or "speedup" not in data["rows"][j.key]]
    for job in track(jobs, "latencies"):
        dense = capture(reference(job.network, job.seed, job.size)[0], kind(job.network))
        pruned = graphcomb.load(stored(job))
        row = data["rows"][job.key]
        for name, batch in (("speedup", 1), ("speedup_batch_8", 8)):
            shape = (batch, *example(kind(job.network)).shape[1:])
            found = graphcomb.runtime.bench(
                [dense, pruned], [torch.randn(shape)], seconds=10, max_runs=200, names=["dense", "pruned"]
            )
            if found.ratio is None:
                print(f"{job.key}: {found.note}", flush=True)
                continue
            row[name] = {k: round(v, 3) for k, v in found.ratios["pruned"].items()}
            row[name] |= {f"{t.name}_ms": round(t.ms["median"], 4) for t in found.timings}
        save(options.results, data)


# ------------------------------------------------------------------------------------------------- tables and pictures
def points(data: dict[str, Any], network: str, method: str, target: float) -> list[dict[str, Any]]:
    """The rows of all seeds; for "torch-pruning best" those of its importance with the best mean score."""
    if method == f"{TP} best":
        found = [points(data, network, f"{TP} {i}", target) for i in IMPORTANCES]
        most = max(map(len, found))
        return max((f for f in found if len(f) == most), key=lambda f: mean(f)[0] if f else 0.0)
    keys = [k for k in data["rows"] if k.startswith(f"{network}/") and k.endswith(f"/{method}/{target:g}")]
    rows = [data["rows"][k] | {"seed": int(k.split("/")[1])} for k in sorted(keys)]
    return [r for r in rows if "score" in r]


def mean(rows: list[dict[str, Any]], field: str = "score") -> tuple[float, float]:
    values = [r[field] for r in rows]
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def cell(rows: list[dict[str, Any]], dense: bool = False) -> str:
    if not rows:
        return "-"
    value, spread = mean(rows, "dense_score" if dense else "score")
    return f"{value:.2f} ± {spread:.2f}" if len(rows) > 1 else f"{value:.2f}"


COLUMNS = {
    "graphcomb": "graphcomb", PAPER: "scored as published", "graphcomb labels": "without distillation",
    f"{TP} best": "torch-pruning", f"{TP} distilled": "torch-pruning + our distillation",
}  # fmt: skip


def table(data: dict[str, Any]) -> str:
    size = data["size"]
    lines = [
        "# Accuracy after pruning, real data\n",
        f"Made by `benchmarks/accuracy.py`, size {size['name']}; {data['environment']}. Mean ± standard deviation over "
        f"seeds (dense networks: {size['references']}), top-1 accuracy or mean IoU in percent. Every pruned network got "
        f"{size['steps']} optimizer steps of {size['batch']['classification']} images or {size['batch']['segmentation']} "
        f"scenes; the dense networks were trained briefly, for {min(size['reference'].values())} to "
        f"{max(size['reference'].values())} such steps. torch-pruning: the best of its magnitude, Taylor and Hessian "
        "importances for that point, trained on labels as it comes; all three below.\n",
        "| network | MACs, times fewer | seeds | dense | " + " | ".join(COLUMNS.values()) + " |",
        "| --- | ---: | ---: | ---: |" + " ---: |" * len(COLUMNS),
    ]
    names = [n for n in networks.NETWORKS if any(k.startswith(f"{n}/") for k in data["rows"])]
    for network in names:
        for target in sorted(TARGETS[kind(network)]):
            found = {m: points(data, network, m, target) for m in COLUMNS}
            rows = max(found.values(), key=len)
            if rows:
                cells = [cell(found[m]) for m in COLUMNS]
                lines.append(
                    f"| {network} | {target:g} | {len(rows)} | {cell(rows, dense=True)} | " + " | ".join(cells) + " |"
                )
    lines += ["", verdicts(data, names), "", "## torch-pruning's importances, trained on labels\n"]
    lines += [
        "| network | MACs, times fewer | " + " | ".join(IMPORTANCES) + " |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for network in names:
        for target in sorted(TARGETS[kind(network)]):
            cells = [cell(points(data, network, f"{TP} {i}", target)) for i in IMPORTANCES]
            lines.append(f"| {network} | {target:g} | " + " | ".join(cells) + " |")
    failed = {k: r["failed"] for k, r in data["rows"].items() if "failed" in r}
    if failed:
        lines += ["", "## What failed\n", *(f"- {k}: {why}" for k, why in sorted(failed.items()))]
    lines += speed_table(data, names) + latency_table(data, names)
    return "\n".join(lines) + "\n"


def verdicts(data: dict[str, Any], names: list[str]) -> str:
    """On how many points graphcomb is above torch-pruning, and where below by more than the spread."""
    above, below, total, single = 0, [], 0, 0
    for network in names:
        for target in sorted(TARGETS[kind(network)]):
            ours, theirs = (points(data, network, m, target) for m in ("graphcomb", f"{TP} best"))
            if ours and theirs:
                (a, sa), (b, sb) = mean(ours), mean(theirs)
                total, single = total + 1, single + (min(len(ours), len(theirs)) < 2)
                above += a > b
                if a < b - max(sa, sb):
                    below.append(f"{network} at {target:g}x ({a - b:+.2f})")
    note = f" {single} points have one seed only, so no spread." if single else ""
    return (
        f"graphcomb is above torch-pruning on {above} of {total} points; below it by more than the larger standard "
        f"deviation: {', '.join(below) or 'nowhere'}.{note}"
    )


def latency_table(data: dict[str, Any], names: list[str]) -> list[str]:
    """Pruned for MACs next to pruned for the latency that was predicted for the first."""
    lines = [
        "", "## Latency as the target\n",
        "Both prune alike and train alike; one towards a number of MACs, the other towards the latency that the table "
        "predicted for the first. Times faster than dense, measured in ONNX Runtime, one thread, batch 1.\n",
        "| network | seeds | for MACs: score | MACs, times fewer | times faster | for latency: score | MACs, times fewer "
        "| times faster |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    count = len(lines)
    for network in names:
        for target in sorted(TARGETS[kind(network)]):
            theirs, ours = ({r["seed"]: r for r in points(data, network, m, target)} for m in ("graphcomb", LATENCY))
            seeds = [s for s in theirs if s in ours]
            if not seeds:
                continue
            cells = []
            for found in (theirs, ours):
                rows = [found[s] for s in seeds]
                timed = [r["speedup"]["median"] for r in rows if "speedup" in r]
                cells += [cell(rows), f"{statistics.fmean(map(ratio, rows)):.2f}"]
                cells.append(f"{statistics.fmean(timed):.2f}" if timed else "-")
            lines.append(f"| {network} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines if len(lines) > count else []


def speed_table(data: dict[str, Any], names: list[str]) -> list[str]:
    lines = [
        "", "## Measured speed-up\n",
        "ONNX Runtime, one thread, dense and pruned in turns; median of the paired ratios, over seeds where several were "
        "measured. In brackets the share of the MAC reduction that arrives: little in networks this narrow, whose widths "
        "are small multiples of 4: with AVX-512 ONNX Runtime computes a convolution in blocks of 16 channels, so 40, 44 and "
        "48 take the same time. `prediction.md` has large networks, in multiples of 8.\n",
        "| network | method | MACs, times fewer | faster, batch 1 | faster, batch 8 |", "| --- | --- | ---: | ---: | ---: |",
    ]  # fmt: skip
    count = len(lines)
    for network in names:
        for method in COLUMNS:
            for target in sorted(TARGETS[kind(network)]):
                rows = [r for r in points(data, network, method, target) if "speedup" in r]
                if rows:
                    fewer = statistics.fmean(map(ratio, rows))
                    cells = []
                    for name in ("speedup", "speedup_batch_8"):
                        found = [r[name]["median"] for r in rows if name in r]
                        faster = statistics.fmean(found) if found else 0.0
                        cells.append(f"{faster:.2f} ({faster / fewer:.2f})" if found else "-")
                    lines.append(f"| {network} | {method} | {fewer:.2f} | " + " | ".join(cells) + " |")
    return lines if len(lines) > count else []


def plots(data: dict[str, Any], path: Path) -> None:
    """Score against MACs, and score against measured latency, a panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in networks.NETWORKS if any(k.startswith(f"{n}/") for k in data["rows"])]
    axes_of: dict[str, Callable[[dict[str, Any]], float]] = {
        "macs": lambda r: 100 / ratio(r), "latency": lambda r: 100 / r["speedup"]["median"],
    }  # fmt: skip
    for name, position in axes_of.items():
        figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.4), squeeze=False)
        drawn = False
        for axis, network in zip(axes[0], names, strict=True):
            for colour, (method, title) in enumerate(COLUMNS.items()):
                spots = []
                for target in sorted(TARGETS[kind(network)]):
                    rows = [r for r in points(data, network, method, target) if name == "macs" or "speedup" in r]
                    if rows:
                        spots.append((statistics.fmean(map(position, rows)), *mean(rows)))
                if spots:
                    x, y, e = zip(*sorted(spots), strict=True)
                    axis.errorbar(
                        x,
                        y,
                        e,
                        marker="o",
                        capsize=2,
                        label=title,
                        color=f"C{colour}",
                        ls="--" if TP in method else "-",
                        ms=4,
                    )
                    drawn = True
            dense = [r["dense_score"] for k, r in data["rows"].items() if k.startswith(f"{network}/")]
            axis.axhline(statistics.fmean(dense), color="grey", lw=0.8, ls=":")
            axis.set_title(network)
            axis.set_xlabel(f"{'MACs' if name == 'macs' else 'latency, 1 thread, batch 1'}, % of dense")
        axes[0, 0].set_ylabel("accuracy, mean IoU (%)")
        if drawn:
            axes[0, 0].legend(fontsize=6)
            figure.tight_layout()
            figure.savefig(path.with_name(f"{path.stem}_{name}.png"), dpi=110)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", choices=list(networks.NETWORKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS + EXTRA)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, one thread each")
    parser.add_argument("--results", type=Path, help="by default in benchmarks/results, a file for each size")
    parser.add_argument("--full", dest="size", action="store_const", const="full", default="small")
    parser.add_argument("--long", dest="size", action="store_const", const="long")
    parser.add_argument("--latency", action="store_true", help="measure the latency of the rows that are there")
    parser.add_argument("--table", action="store_true", help="only rewrite tables and plots")
    parser.add_argument("--again", action="store_true", help="measure rows that are there anew")
    options = parser.parse_args()
    options.networks = options.networks or list(networks.CLASSIFIERS if options.size == "long" else networks.NETWORKS)
    options.results = options.results or HERE / "results" / RESULTS[options.size]
    warnings.simplefilter("ignore")
    if options.latency:
        latency(options)
    elif not options.table:
        run(options)
    data = load(options.results)
    write(options.results.with_suffix(".md"), table(data))
    plots(data, options.results)


if __name__ == "__main__":
    main()
