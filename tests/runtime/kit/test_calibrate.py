"""INT8 on a DLA up to TensorRT 10: the form without Q/DQ nodes that a bundle brings, built with a calibration cache."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphcomb.runtime import write_bundle
from graphcomb.runtime.engines.trt.implicit import read_cache

from .toys import QUICKLY, edit

SCALES = {"x": 0.5, "first_out": 0.25}


@pytest.fixture
def quantised(bundle, classic):
    """The bundle, whose second model is quantised; the stand-in's parser refuses the form with the nodes."""
    classic.kernels = [("first", "CONVOLUTION"), ("shape", "SHAPE"), ("second", "SOFTMAX")]
    (bundle / "compressed/model.onnx").rename(bundle / "compressed/bad.onnx")
    (bundle / "compressed/implicit.onnx").write_bytes(b"implicit")
    row = {
        "file": "compressed/bad.onnx", "precision": "int8",
        "data": {"compressed/implicit.onnx": hashlib.sha256(b"implicit").hexdigest()},
        "implicit": {"file": "implicit.onnx", "scales": SCALES, "int8": ["first"], "notes": ["w: rounded again"]},
    }  # fmt: skip
    edit(bundle, lambda about: about["models"]["compressed"].update(row))
    return bundle


def test_the_device_builds_it_with_the_cache(script, classic, quantised):
    arguments = ["--out", str(quantised / "r.json"), *QUICKLY, "--dla", "0", "--quiet"]
    version = classic.module.__version__
    if version.startswith("11"):  # which takes Q/DQ nodes
        assert script.main(arguments) == 1
        assert "bad.onnx" in json.loads((quantised / "r.json").read_text())["failed"]["compressed"]
        return
    assert script.main(arguments) == 0
    found = json.loads((quantised / "r.json").read_text())
    flags = classic.module.NetworkDefinitionCreationFlag
    assert classic.network_flags == 1 << int(flags.EXPLICIT_BATCH)
    about = found["models"]["compressed"]["engine"]
    assert about["flags"] == ["OBEY_PRECISION_CONSTRAINTS", "FP16", "INT8", "GPU_FALLBACK"]
    calibrator = classic.config.int8_calibrator
    text = calibrator.read_calibration_cache().decode()
    number = {"8.5.2": 8502, "8.6.1": 8601, "10.3.0": 100300, "10.13.0": 101300}[version]
    assert text.startswith(f"TRT-{number}-EntropyCalibration2\n")
    assert read_cache(text) == SCALES
    assert calibrator.get_batch(["x"]) is None
    assert [classic.network.get_layer(index).precision.name for index in (0, 2)] == ["INT8", "HALF"]
    file = quantised / about["calibration"]["file"]
    assert file.read_text() == text
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert about["calibration"] == {"file": "compressed.calib", "sha256": digest, "tensors": 2}
    line = about["trtexec"]
    assert "--onnx=compressed/implicit.onnx" in line
    assert "--int8" in line
    assert "--calib=compressed.calib --precisionConstraints=obey '--layerPrecisions=*:fp16,first:int8'" in line
    assert "--stronglyTyped" not in line
    assert "compressed: w: rounded again" in found["notes"]
    assert "calibration" not in found["models"]["dense"]["engine"]
    # The engine is kept, and known to be of this form.
    assert script.main(arguments) == 0
    again = json.loads((quantised / "r.json").read_text())["models"]["compressed"]["engine"]
    assert (again["reused"], again["file"], again["calibration"]) == (True, about["file"], about["calibration"])


def test_without_a_dla_the_nodes_are_parsed(script, classic, quantised):
    assert script.main(["--out", str(quantised / "r.json"), *QUICKLY, "--quiet"]) == 1
    assert "OBEY_PRECISION_CONSTRAINTS" not in classic.flags
    assert "bad.onnx" in json.loads((quantised / "r.json").read_text())["failed"]["compressed"]


def test_a_form_that_is_not_the_one_that_was_bundled_is_refused(script, classic, quantised, capsys):
    (quantised / "compressed/implicit.onnx").write_bytes(b"another")
    assert script.main(["--out", str(quantised / "r.json"), *QUICKLY, "--dla", "0", "--quiet"]) == 2
    assert "implicit.onnx: not the file that was bundled" in capsys.readouterr().err


def model(path, zero):
    """A convolution whose input and weight go through Q/DQ nodes."""
    tensors = {"w": np.full((4, 4, 1, 1), 127, np.float32), "s": np.float32(1), "z": zero}
    nodes = [
        helper.make_node(kind, [source, "s", "z"], [out], name=out)
        for kind, source, out in (
            ("QuantizeLinear", "x", "xq"), ("DequantizeLinear", "xq", "xd"),
            ("QuantizeLinear", "w", "wq"), ("DequantizeLinear", "wq", "wd"),
        )
    ]  # fmt: skip
    nodes += [helper.make_node("Conv", ["xd", "wd"], ["y"], name="conv")]
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 4, 2, 2)) for n in "xy"]
    values = [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()]
    graph = helper.make_graph(nodes, "q", sides[:1], sides[1:], values)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("target", "zero", "there", "note"),
    [
        ("orin-nx", np.int8(0), True, ""),
        ("orin-nano", np.int8(0), False, ""),  # which has no DLA
        ("orin-nx", np.uint8(0), False, "a DLA runs none of it in INT8: node xd: it rounds to uint8"),
    ],
)
def test_a_bundle_brings_it_for_a_target_with_a_dla(tmp_path, target, zero, there, note):
    file = model(tmp_path / "net.onnx", zero)
    row = json.loads((write_bundle(tmp_path / "b", {"net": file}, "int8", target) / "bundle.json").read_text())
    row = row["models"]["net"]
    assert ("implicit" in row) == there
    assert note in row["note"]
    assert list(row["data"]) == ["net/model.implicit.onnx"] * there
    if there:
        plain = onnx.load(tmp_path / "b/net" / row["implicit"]["file"])
        assert [node.op_type for node in plain.graph.node] == ["Conv"]
        assert (row["implicit"]["scales"], row["implicit"]["int8"]) == ({"x": 1.0}, ["conv"])
