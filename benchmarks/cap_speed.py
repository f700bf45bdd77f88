"""Seconds and memory of CAP's linear algebra, compared with a plain implementation of the same algorithm.

    python benchmarks/cap_speed.py                 # results in benchmarks/results/cap_speed.json and .md; about 25 minutes
    python benchmarks/cap_speed.py --skip deit     # without the run over DeiT-S, a few minutes

The plain implementation follows the algorithm literally: for each block, each gradient updates the inverse (Woodbury
recursion), then one weight after another is eliminated, which updates inverse and weights. Both use one thread, and their
results are compared. Times are CPU times, which other processes affect little. The run over DeiT-S has the shapes of its
real weights (21 M in 48 layers), B = 192 and images of 32 x 32, so that gradients take little of the time; its peak memory
is that of the whole process.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import save, write

from graphcomb.passes.sparse import cap, ranking
from graphcomb.passes.sparse.statistics.fisher import Fisher, chunks

RESULTS = Path(__file__).parent / "results" / "cap_speed.json"
SIZES = ((32, 256), (64, 256), (128, 256), (192, 256), (256, 256), (384, 256))
COUNTS = ((192, 16), (192, 64), (192, 256), (192, 1024))
BLOCKS = (16, 64, 256, 1024)


def plain(
    weights: torch.Tensor, gradients: torch.Tensor, damping: float, share: float
) -> tuple[list[int], torch.Tensor]:
    """One block, weight by weight: the order, and the weights once the share is gone."""
    size, count = len(weights), len(gradients)
    inverse = torch.eye(size, dtype=weights.dtype) / damping
    for g in gradients:
        hg = inverse @ g
        inverse -= torch.outer(hg, hg) / (count + g @ hg)
    w, order, kept = weights.clone(), [], weights
    alive = torch.ones(size, dtype=torch.bool)
    for step in range(size):
        scores = (w.square() / inverse.diagonal()).masked_fill(~alive, torch.inf)
        q = int(scores.argmin())
        w = w - inverse[:, q] * (w[q] / inverse[q, q])
        inverse = inverse - torch.outer(inverse[:, q], inverse[q]) / inverse[q, q]
        alive[q] = False
        order.append(q)
        if step + 1 == round(share * size):
            kept = w.masked_fill(~alive, 0)
    return order, kept


def fast(
    weights: torch.Tensor, gradients: torch.Tensor, damping: float, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """All blocks `(b, B)`, gradients `(m, b, B)`, as `Sparsify` does it."""
    count, size = weights.shape
    fisher = Fisher(count, size, len(gradients), damping, weights.dtype)
    for part in gradients.split(32):
        fisher.add(part)
    orders, news = [], []
    for part in chunks(count, size):
        order, _ = cap.eliminate(weights[part], fisher.inverse(part).to(weights))
        mask = ranking.first(order, torch.full((len(order),), round(share * size)), size)
        orders.append(order)
        news.append(cap.repair(weights[part], fisher.matrix(part), mask))
    return torch.cat(orders), torch.cat(news)


def problem(blocks: int, size: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    mixing = torch.randn(size, size, dtype=dtype) / size**0.5
    return torch.randn(blocks, size, dtype=dtype), torch.randn(count, blocks, size, dtype=dtype) @ mixing


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        best = min(best, time.process_time() - start)
    return best


def agreement() -> dict:
    """Both in float64 on the same blocks: whether the orders are equal, and how far the weights are apart."""
    weights, gradients = problem(8, 96, 128, torch.float64)
    orders, news = fast(weights, gradients, 1e-4, 0.75)
    same, worst = True, 0.0
    for i in range(8):
        order, kept = plain(weights[i], gradients[:, i], 1e-4, 0.75)
        same &= order == orders[i].tolist()
        worst = max(worst, float((news[i] - kept).norm() / kept.norm()))
    return {"orders_equal": same, "weights_differ_by": worst}


def growth(blocks: int, size: int, count: int, rival: bool = True) -> dict:
    """Milliseconds of processor time per block."""
    weights, gradients = problem(blocks, size, count, torch.float32)
    ours = seconds(lambda: fast(weights, gradients, 1e-4, 0.75)) / blocks * 1e3
    row = {"blocks": blocks, "B": size, "m": count, "ms_per_block": ours}
    if rival:
        some = 2
        theirs = seconds(lambda: [plain(weights[i], gradients[:, i], 1e-4, 0.75) for i in range(some)], 2) / some * 1e3
        row |= {"plain_ms_per_block": theirs, "times_faster": theirs / ours}
    return row


def deit(count: int, memory: float) -> dict:
    """Sparsify over all of DeiT-S: seconds, and the largest memory the process had."""
    import timm

    import graphcomb
    from graphcomb.passes import Sparsify

    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224", img_size=32, num_classes=1000).eval()
    program = graphcomb.capture(model, torch.randn(2, 3, 32, 32), dynamic_shapes="batch")
    del model
    data = [(torch.randn(16, 3, 32, 32), torch.randint(1000, (16,))) for _ in range(-(-count // 16))]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    start, processor = time.perf_counter(), time.process_time()
    result = Sparsify(sparsity=0.75, gradients=count, memory=memory)(program, data=data)
    names = result.record["sparse"]
    weights = {n: p for n, p in result.program.module().named_parameters() if n in names}
    total = sum(w.numel() for w in weights.values())
    return {
        "weights": total,
        "layers": len(names),
        "B": 192,
        "m": count,
        "sparsity": sum(int((w == 0).sum()) for w in weights.values()) / total,
        "memory_limit_GB": memory / 1e9,
        "peak_GiB_before": before,
        "peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
    }


def table(data: dict) -> str:
    lines = ["# Speed and memory of CAP", "", data["environment"], ""]
    if found := data.get("agreement"):
        lines += [
            f"Against the plain implementation in float64: orders equal: {found['orders_equal']}, weights differ by "
            f"{found['weights_differ_by']:.1e} (relative).",
            "",
        ]
    if rows := data.get("growth"):
        lines += [
            "| blocks | B | m | ms per block | plain, ms | times faster |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for r in rows:
            plainly = f"{r['plain_ms_per_block']:.1f} | {r['times_faster']:.0f}" if "times_faster" in r else " | "
            lines.append(f"| {r['blocks']} | {r['B']} | {r['m']} | {r['ms_per_block']:.2f} | {plainly} |")
        lines.append("")
    for r in data.get("deit", ()):
        lines.append(
            f"DeiT-S ({r['weights']:,} weights in {r['layers']} layers), B = {r['B']}, m = {r['m']}, 75 %: peak "
            f"{r['peak_GiB']:.2f} GiB of the whole process (limit given {r['memory_limit_GB']:.1f} GB; "
            f"{r['peak_GiB_before']:.2f} GiB before), {r['processor_seconds']:.0f} s of one processor."
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skip", nargs="*", default=[], choices=["growth", "deit"])
    parser.add_argument("--count", type=int, default=192, help="gradients over DeiT-S")
    parser.add_argument("--memory", type=float, default=4e9, help="bytes for Sparsify over DeiT-S")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one-deit", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one_deit:
        print(json.dumps(deit(options.count, options.memory)))
        return
    data = json.loads(options.results.read_text()) if options.results.exists() else {}
    data["environment"] = f"One thread of {platform.machine()}, torch {torch.__version__}, processor time"

    def keep() -> None:
        save(options.results, data, sort_keys=False)
        write(options.results.with_suffix(".md"), table(data))

    if "growth" not in options.skip:
        data["agreement"] = agreement()
        print(data["agreement"], flush=True)
        data["growth"] = []
        settings = [(256, size, count) for size, count in SIZES]
        settings += [(256, size, count) for size, count in COUNTS if (size, count) not in SIZES]
        settings += [(blocks, 192, 256) for blocks in BLOCKS if blocks != 256]
        for blocks, size, count in settings:
            data["growth"].append(growth(blocks, size, count, rival=blocks == 256))
            print(data["growth"][-1], flush=True)
            keep()
    if "deit" not in options.skip:
        command = [
            sys.executable,
            __file__,
            "--one-deit",
            "--count",
            str(options.count),
            "--memory",
            str(options.memory),
        ]
        out = subprocess.run(command, capture_output=True, text=True)
        if out.returncode:
            sys.exit(out.stderr)
        data["deit"] = [json.loads(out.stdout.strip().splitlines()[-1])]
        print(data["deit"], flush=True)
        keep()


if __name__ == "__main__":
    main()
