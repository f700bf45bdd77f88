"""The support matrix is what the results say, and says nothing without a result."""

import json
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def support() -> dict:
    return runpy.run_path(str(DOCS / "support.py"))


def test_the_page_is_what_the_results_say(support) -> None:
    assert (DOCS / "start" / "support.md").read_text() == support["page"](), "run: make docs-support"


def test_without_results_nothing_is_claimed(support, tmp_path: Path) -> None:
    support["results"].__globals__["RESULTS"] = tmp_path
    assert support["matrix"]() == {}


def test_measured_is_stronger_than_built(support, tmp_path: Path) -> None:
    globals_ = support["results"].__globals__
    globals_["RESULTS"] = tmp_path
    (tmp_path / "prediction.json").write_text(json.dumps({"variants": {"net global 0.3": {}}}))
    engines = {"torchvision/net int8": {"status": "ok"}, "torchvision/other int8": {"status": "failed"}}
    (tmp_path / "engines.json").write_text(json.dumps({"rows": engines}))
    wanted = {"ONNX Runtime": "measured", "RemoveChannels": "built", "TensorRT-RTX": "built", "Quantize": "built"}
    assert support["matrix"]() == {"net": wanted}
    assert support["table"]({"net": wanted}, ("Quantize", "TensorRT"))[-1] == "| net | built |  |"


def test_every_target_is_on_the_page(support) -> None:
    from graphcomb.runtime.devices.table import TARGETS

    text = "\n".join(support["targets"]())
    assert all(f"`{name}`" in text for name in TARGETS)
