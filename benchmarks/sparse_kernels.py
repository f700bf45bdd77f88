"""Measure the speed-up from zeros: 2:4 in torch's semi-structured kernels (GPU), unstructured ones in OpenVINO (CPU with
AMX).

    python benchmarks/sparse_kernels.py          # results in benchmarks/results/sparse_kernels.json, by device

GPU: `y = x W^T` of fp16, bf16 and int8 with the widths of DeiT-S, ViT-B and ConvNeXt-B and more, dense against 2:4, both as
CUDA graphs, in turns, median of ratios. Needs an NVIDIA GPU of compute capability 8.0 or more.

CPU: three linear layers in INT8 (by `Quantize`) with 90 % zeros, in OpenVINO with and without its sparse weight
decompression. It does not store zeros in memory and restores them in the caches, which saves memory traffic but no
arithmetic. It exists only for INT8 matrix products on processors with AMX; this part needs openvino and such a processor.
It uses one thread, and runs during which other processes had the processor (CPU time below 93 % of wall time) do not
count.

A part that cannot run on this machine reports why. For TensorRT's sparse kernels use `build_engine(..., sparse=True)` and
compare the engines on the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from common import save

RESULTS = Path(__file__).parent / "results" / "sparse_kernels.json"
SHAPES = (
    (384, 1152),
    (384, 1536),
    (1536, 384),
    (768, 3072),
    (3072, 768),
    (1024, 4096),
    (4096, 4096),
    (256, 256),
    (128, 128),
)
ROWS = (197 * 8, 8192)
GUARD = 0.93


def gpu(repeats: int) -> dict:
    """Milliseconds of dense and 2:4 products, or why there are none."""
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    if torch.cuda.get_device_capability() < (8, 0):
        return {"skipped": f"{torch.cuda.get_device_name()} has no sparse tensor cores"}
    from torch.sparse import to_sparse_semi_structured

    from graphcomb.passes.sparse.ranking import lowest_of_groups

    rows = []
    for dtype in (torch.float16, torch.bfloat16, torch.int8):
        for into, out in SHAPES:
            weight = torch.randn(out, into, device="cuda")
            weight = weight.masked_fill(lowest_of_groups(weight.abs(), (2, 4)), 0)
            weight = (weight * 40).round().clamp(-127, 127).to(dtype) if dtype is torch.int8 else weight.to(dtype)
            sparse = to_sparse_semi_structured(weight)
            for count in ROWS:
                x = torch.randn(count, into, device="cuda")
                x = (x * 40).clamp(-127, 127).to(dtype)
                dense = partial(torch._int_mm if dtype is torch.int8 else torch.mm, x, weight.T)
                work = (dense, partial(torch.mm, sparse, x.T))
                row = {"dtype": str(dtype).removeprefix("torch."), "inputs": into, "outputs": out, "rows": count}
                try:
                    times = _graphs(work, repeats)
                except RuntimeError as error:
                    rows.append(row | {"failed": str(error).splitlines()[0]})
                    continue
                ratios = [a / b for a, b in zip(*times, strict=True)]
                row |= {"dense_ms": statistics.median(times[0]), "sparse_ms": statistics.median(times[1])}
                rows.append(row | {"times_faster": statistics.median(ratios)})
                print(rows[-1], flush=True)
    return {"rows": rows}


def _graphs(work: tuple[Callable[[], object], ...], repeats: int) -> list[list[float]]:
    """Milliseconds of each function as a CUDA graph, in turns."""
    graphs = []
    for function in work:
        for _ in range(3):
            function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(20):
                function()
        graphs.append(graph)
    times: list[list[float]] = [[] for _ in work]
    for _ in range(repeats):
        for graph, found in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 20)
    return times


def cpu(repeats: int) -> dict:
    """Milliseconds with zeros and without, with decompression and without, or why there are none."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "amx_int8" not in flags:
        return {"skipped": "the processor has no AMX"}
    try:
        import openvino
    except ImportError:
        return {"skipped": "openvino is not installed"}
    import graphcomb
    from graphcomb.passes import Quantize, Sparsify
    from graphcomb.runtime import export_onnx

    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(768, 3072), torch.nn.ReLU(), torch.nn.Linear(3072, 3072), torch.nn.ReLU(),
        torch.nn.Linear(3072, 768),
    )  # fmt: skip
    x = torch.randn(4, 768)
    program = graphcomb.capture(net, x)
    pass_ = Sparsify(sparsity=0.9, method="magnitude", scope="uniform", include=("*",))
    variants = {"dense": program, "sparse": pass_(program).program}
    core, engines = openvino.Core(), {}
    with tempfile.TemporaryDirectory() as folder:
        for name, variant in variants.items():
            path = Path(folder) / f"{name}.onnx"
            export_onnx(Quantize(samples=4, calibration="minmax", include=("*",))(variant, data=[x]).program, path)
            for rate in (1.0, 0.6):
                options = {"INFERENCE_NUM_THREADS": 1, "CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": rate}
                engines[f"{name}, {'packed' if rate < 1 else 'as it is'}"] = core.compile_model(path, "CPU", options)
        times: dict[str, list[float]] = {name: [] for name in engines}
        thrown = 0
        for _ in range(repeats):
            turn = {}
            for name, engine in engines.items():
                wall, processor = time.perf_counter(), time.process_time()
                for _ in range(20):
                    engine([x.numpy()])
                wall, processor = time.perf_counter() - wall, time.process_time() - processor
                turn[name] = (wall / 20 * 1e3, processor / wall)
            if min(share for _, share in turn.values()) < GUARD:
                thrown += 1
                continue
            for name, (milliseconds, _) in turn.items():
                times[name].append(milliseconds)
    if thrown > repeats / 2:
        return {"skipped": f"the machine is busy: {thrown} of {repeats} turns had to be thrown away"}
    first = times["dense, as it is"]
    return {
        "openvino": openvino.__version__,
        "thrown_away": thrown,
        "rows": [
            {
                "variant": name,
                "ms": statistics.median(found),
                "times_faster": statistics.median(a / b for a, b in zip(first, found, strict=True)),
            }
            for name, found in times.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    data = json.loads(options.results.read_text()) if options.results.exists() else {}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    for part, work in (("gpu", gpu), ("cpu", cpu)):
        found = work(options.repeats)
        print(part, found)
        if "skipped" not in found:
            data[f"{part}: {name if part == 'gpu' else platform.machine()}"] = found | {"torch": torch.__version__}
    if data:
        save(options.results, data, sort_keys=False)


if __name__ == "__main__":
    main()
