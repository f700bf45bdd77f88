"""Options of builds: one dataclass, of which each backend takes some, asked for in Python, in recipes and on the command
line."""

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from graphcomb.cli.app import main
from graphcomb.graph.errors import BadInput
from graphcomb.recipe import parse_engines
from graphcomb.runtime.devices.table import get_target
from graphcomb.runtime.engines import ort, ov
from graphcomb.runtime.engines.backends import RTX_LACKS, engine_options, takes
from graphcomb.runtime.engines.build import build_engine
from graphcomb.runtime.engines.options import EngineOptions
from graphcomb.runtime.engines.torch import inductor, torch_tensorrt
from graphcomb.runtime.engines.trt import build as trt

NAMES = {field.name for field in dataclasses.fields(EngineOptions)}
BACKENDS = [ort, ov, inductor, torch_tensorrt, trt]


def test_every_backend_takes_options_that_exist_and_each_is_taken() -> None:
    assert set().union(*(module.TAKES for module in BACKENDS)) == NAMES
    assert all(len(set(module.TAKES)) == len(module.TAKES) for module in BACKENDS)


def test_every_option_is_described() -> None:
    assert {name for name in NAMES if f"\n    - {name}: " in (EngineOptions.__doc__ or "")} == NAMES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workspace": 0}, "workspace: a whole number of MiB, from 1 up, not 0"),
        ({"optimization_level": 6}, "optimization_level: a whole number from 0 to 5, not 6"),
        ({"dla": -1}, "dla: the number of a core, from 0 up, not -1"),
        ({"threads": 0}, "threads: a whole number, from 1 up, not 0"),
        ({"batch": [1, 8]}, r"batch: three are needed \(smallest, the one to optimise for, largest\), got 2"),
        ({"sparse": "yes"}, "sparse: true or false, not 'yes'"),
        (
            {"hardware_compatibility": "all"},
            "hardware_compatibility: ampere_plus or same_compute_capability, not 'all'",
        ),
        ({"timing_cache": 5}, "timing_cache: text, not 5"),
        ({"plugins": "a.so"}, "plugins: a list, not 'a.so'"),
    ],
)
def test_a_wrong_value_is_named_the_same_in_python_and_in_recipes(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=f"^option {message}$"):
        EngineOptions(**options)
    with pytest.raises(BadInput, match=rf"^outputs\.engines\.0\.{message}$"):
        parse_engines([{"target": "rtx-sm86", **options}])


@pytest.mark.parametrize("options", [{"sparse": True}, {"sparse": False}, {"progress": False}, {"batch": 1}])
def test_what_a_backend_does_not_take_is_refused_with_what_it_takes(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"not one of backend onnxruntime; known: threads$"):
        engine_options("onnxruntime", options)


def test_an_option_of_the_module_that_one_of_its_libraries_lacks() -> None:
    pytest.importorskip("tensorrt_rtx")
    assert set(takes("tensorrt_rtx")) == set(trt.TAKES) - set(RTX_LACKS)
    with pytest.raises(
        BadInput, match=r"^option timing_cache: not one of backend tensorrt_rtx: it measures no kernels"
    ):
        engine_options("tensorrt_rtx", {"timing_cache": "cache"})


@pytest.mark.parametrize(("batch", "three"), [(None, (1, 1, 8)), (4, (4, 4, 4)), ([1, 8, 16], (1, 8, 16))])
def test_batches_are_three(batch: Any, three: tuple[int, ...]) -> None:
    assert EngineOptions(batch=batch).batches == three


def test_a_recipe_asks_for_what_python_and_the_command_line_do(tmp_path: Path, monkeypatch: Any) -> None:
    """All three reach the backend as one and the same object."""
    pytest.importorskip("tensorrt_rtx")
    seen = []

    def stop(model: Path, target: Any, out: Any, options: EngineOptions, *, backend: str) -> None:
        seen.append((backend, options))
        raise BadInput("seen")

    monkeypatch.setattr(trt, "build", stop)
    model = tmp_path / "net.onnx"
    text = '<ir_version: 9, opset_import: ["": 17]> net (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), model)
    asked = {"batch": [1, 8, 16], "workspace": 64, "sparse": True, "tf32": False}
    (engine,) = parse_engines([{"target": "rtx-sm86", **asked, "dla": None}])
    line = ["--batch", "1,8,16", "--option", "workspace=64", "--option", "sparse=true", "--option", "tf32=false"]
    assert main(["build", str(model), "--target", "rtx-sm86", *line]) == 2
    for options in (asked, engine.options.given()):
        with pytest.raises(BadInput, match=r"^seen$"):
            build_engine(model, get_target("rtx-sm86"), **options)
    assert seen == [("tensorrt_rtx", EngineOptions(**asked))] * 3
