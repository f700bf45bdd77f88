"""A summary with everything in it, and the page that the report makes of it."""

from html.parser import HTMLParser

from graphcomb.runtime.engine_summary import Kernel
from graphcomb.runtime.engines.base import EngineReport
from graphcomb.runtime.report.report import write_report

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Text, tags and ids of a page; fails where tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.ids, self.text, self.skip = [], [], [], "", 0
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for key, value in attributes if key == "id"]
        if tag not in VOID:
            self.open.append(tag)
        self.skip += tag in ("style", "script")

    def handle_startendtag(self, tag, attributes):
        self.ids += [value for key, value in attributes if key == "id"]
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.skip -= tag in ("style", "script")

    def handle_data(self, data):
        if not self.skip:
            self.text += data

    def count(self, tag):
        return sum(name == tag for name, _ in self.tags)


def layer(i, before=64, after=32):
    macs = {"before": 1e6 * (i + 1), "after": 2.5e5 * (i + 1)}
    return {
        "name": f"layers.{i}.weight",
        "kind": "conv",
        "channels": {"before": [16, before], "after": [8, after]},
        "macs": macs,
    }


def cost(macs, params):
    return {"macs": macs, "params": params}


def device():
    """What a bench bundle measured."""
    ms = {"p5": 4.0, "median": 4.25, "p95": 5.0, "p99": 5.5}

    def model(factor, error):
        run = {"runs": 100, "host_ms": ms, "gpu_ms": {k: v / factor for k, v in ms.items()}}
        return {
            "latency": {"graph": run},
            "power": {"total_mw": 7250.0, "energy_mj": 30.8 / factor, "temperatures_c": {"tj": 48.2}},
            "parity": {"finite": error is not None, "error": error},
            "layers": [{"name": "conv1 + relu", "ms": 3.0 / factor}, {"name": "/fc0", "ms": 1.0 / factor}],
            "engine": {},
            "file": "net.onnx",
        }

    return {
        "device": {"model": "Jetson Orin Nano", "power_mode": "MAXN_SUPER"},
        "format": "graphcomb-bench/1", "engine": "tensorrt", "version": "10.3.0", "date": "", "idle": {}, "monitor": None,
        "bundle": {
            "precision": "fp16", "target": "orin-nano",
            "models": {"big": {"layers": [work(0, 1024)]}, "small": {"layers": [work(0, 512)]}},
        },
        "models": {"big": model(1, 2e-3), "small": model(2.5, None)},
        "ratios": {"small": {"graph": {"median": 2.5}}},
        "notes": ["small: outputs that are not finite"],
    }  # fmt: skip


def work(i, width):
    """A linear layer of a bundle, or of one side of a prediction."""
    return {
        "name": f"layers.{i}.weight", "node": f"linear_{i}", "call": "linear", "op": "matmul",
        "sizes": {"batch": 1, "inputs": width, "outputs": width}, "options": {"rows": 4096, "shared": 1},
        "onnx": [f"/fc{i}", f"fc{i}_out"],
    }  # fmt: skip


def prediction(layers=3):
    """What is predicted of a network whose first layer has no channels that can go, and whose last op has no weights."""

    def side(i, width, ms):
        verdict = "" if i else "none of its channels can go"
        cost = {"macs": 1000 * width, "padded_macs": 1000 * (width + 4), "bytes": 8e5 * width, "ms": ms, "half": 0.5}
        return work(i, width) | cost | {"bound": "compute" if ms > 1 else "launch", "verdict": verdict}

    rows = [
        {"name": f"layers.{i}.weight", "op": "matmul", "before": side(i, 64, 1.5), "after": side(i, 32, 0.75)}
        for i in range(layers)
    ]
    loose = {
        "node": "add",
        "call": "add",
        "half": 1.0,
        "op": "copy",
        "sizes": {"entries": 5},
        "options": {},
        "macs": 0,
        "padded_macs": 0,
        "bytes": 40,
        "ms": 0.002,
    }
    gone = {"name": "add", "op": "copy", "before": loose | {"bound": "memory", "verdict": ""}, "after": None}
    return {
        "by": "a roofline", "target": "orin-nano", "precision": "fp16", "batch": 1, "run_ms": 0.0, "calibration": None,
        "ms": {"before": 1.5 * layers + 0.002, "after": 0.75 * layers}, "layers": [*rows, gone],
    }  # fmt: skip


def summary(layers=3):
    ms = {"p5": 4.9, "p25": 5.0, "median": 5.1, "p75": 5.2, "p95": 5.4, "p99": 5.9}
    runs = {"runs": 50, "rejected": 0, "repeats": 1}
    engine = EngineReport(
        "1.7", "net.rtx", "fp16",
        [Kernel(name="conv_k", kind="correlation", nodes=("conv", "relu"), inputs=("fp16[1,3,8,8]",),
                outputs=("fp16[1,61,8,8]",)),
         Kernel(name="pad_k", kind="kgen", nodes=("conv2",), padding=True)],
        {"weights": 89_128, "activations": 8_716_288}, ["a warning of the library"], "tensorrt_rtx", "rtx-sm86", 768_020,
        0.42,
    )  # fmt: skip
    pads = [{"kernel": "pad_k", "how": "kernel", "nodes": ["conv2"], "axis": 1, "before": 61, "after": 62,
             "alignment": 2},
            {"kernel": "pad_k", "how": "kernel", "nodes": ["conv3"], "axis": 1, "before": 64, "after": 128,
             "alignment": None, "note": "each of its 64 groups has 1"}]  # fmt: skip
    return {
        "model": "my.models:net",
        "target": "rtx-sm86",
        "accuracy_before": 0.9861,
        "accuracy_after": 0.9833,
        "accuracy_interval": [0.9641, 0.9923],
        "cost": {"before": cost(8e8, 11e6), "after": cost(2e8, 2.75e6)},
        "macs_ratio": 4.0,
        "params_ratio": 4.0,
        "latency_ratio": 3.12,
        "bench": {
            "timings": [
                {"name": "dense", "ms": ms} | runs,
                {"name": "small", "ms": {k: v / 3.12 for k, v in ms.items()}} | runs,
            ],
            "ratio": 3.12,
            "rounds": 50,
            "contended": False,
            "environment": {},
            "ratios": {"small": {"p5": 3.02, "median": 3.12, "p95": 3.19, "low": 3.09, "high": 3.14}},
            "note": "",
        },
        "surgery_error": 3.4e-14,
        "onnx_parity": 2.1e-6,
        "onnx_parity_fp16": 1.3e-3,
        "engine": "net.rtx",
        "engines": [
            engine.to_dict()
            | {
                "pads": pads,
                "unfused": [{"kernel": "q_k", "how": "float", "nodes": ["conv2"]}],
                "origins": {"conv2": {"node": "conv2d_1", "module": "b", "passes": ["SlimPass"]}},
            }
        ],
        "devices": [device()],
        "prediction": prediction(layers),
        "passes": [
            {
                "pass": "RemoveChannels",
                "options": {"ratio": 0.5, "kinds": ["channel", "head"], "macs": None},
                "changed": [],
                "layers": [layer(i) for i in range(layers)],
                "refused": [
                    {"what": "fc.weight:0", "why": "linear (/a/b/c/net.py:7: return fc(x)): an output of the program"},
                    {"what": "aux.weight:0", "why": "linear_1 (/a/b/c/net.py:9: aux(x)): an output of the program"},
                    {"what": "stem.weight:1", "why": "x: an input of the program"},
                ],
                "cost": {"before": cost(8e8, 11e6), "after": cost(2e8, 2.75e6)},
                "accuracy": {"before": 0.9861, "after": 0.51},
                "verified": {"error": 3.4e-14},
                "seconds": 1.31,
            },
            {
                "pass": "Distill",
                "options": {"epochs": 2},
                "changed": ["weights"],
                "refused": [],
                "cost": {"before": cost(2e8, 2.75e6), "after": cost(2e8, 2.75e6)},
                "accuracy": {"before": 0.51, "after": 0.9833},
                "epochs": [{"epoch": 1, "loss": 2.0, "val": 0.7}, {"epoch": 2, "loss": 0.5, "val": 0.98}],
                "seconds": 60.2,
            },
        ],
        "environment": {"python": "3.11.7", "cpu": "a CPU", "seed": 7, "versions": {"torch": "2.14.1"}},
        "files": {"onnx": "out/model.onnx"},
    }


def page(tmp_path, values):
    path = write_report(values, tmp_path / "report.html")
    assert path == tmp_path / "report.html"
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    html = path.read_text(encoding="utf-8")
    return Page(html), html
