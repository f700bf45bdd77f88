"""Bench bundles: written here, run by a plain interpreter with ONNX Runtime standing in for the engine, read back.

What only a GPU can do, TensorRT's part of the script, is run with the stand-ins of `test_device_script.py`.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import graphcomb
from graphcomb.cli.app import main
from graphcomb.graph.errors import BadInput, GraphcombError, Refused
from graphcomb.runtime.bundle.run import _contents as run_contents
from graphcomb.runtime.bundle.run import run_bundle
from graphcomb.runtime.bundle.write import write_bundle
from graphcomb.runtime.device_results import read_results
from graphcomb.runtime.export.to_onnx import export_onnx
from graphcomb.runtime.kit import archived_files
from graphcomb.runtime.kit.contents import read_bundle, read_reference

from .toys import QUICK

FILES = archived_files()
BUILT_IN = {"list", "dict", "tuple", "set", "type", "Sequence", "Iterator", "Iterable", "Mapping"}


def test_the_archive_of_a_bundle_has_the_files_of_the_kit(bundle):
    with zipfile.ZipFile(bundle / "kit.pyz") as archive:
        assert {name: archive.read(name).decode() for name in archive.namelist()} == FILES


@pytest.mark.parametrize("name", FILES)
def test_what_goes_to_the_device_is_python_3_8(name):
    tree = ast.parse(FILES[name], feature_version=(3, 8))
    allowed = {*sys.stdlib_module_names, "numpy", "onnxruntime", "tensorrt", "PIL", "graphcomb_kit"}
    allowed |= {Path(path).stem for path in FILES}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {n.split(".")[0] for n in names} <= allowed
        # An alias such as Callable[[int], str] is evaluated, unlike an annotation, and 3.8 has no subscripts of these.
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None and node in tree.body:
            parts = [part.value for part in ast.walk(node.value) if isinstance(part, ast.Subscript)]
            assert not {part.id for part in parts if isinstance(part, ast.Name)} & BUILT_IN
    # What the grammar does not tell: methods and functions that came after 3.8, in the forms that are easily written.
    assert not any(newer in FILES[name] for newer in ("removeprefix", "removesuffix", "strict=", "is_relative_to"))


def test_a_bundle_holds_the_models_in_the_precision_and_a_reference(bundle, programs):
    about = json.loads((bundle / "bundle.json").read_text())
    assert (about["precision"], about["target"]) == ("fp16", "agx-orin")
    assert list(about["models"]) == ["dense", "compressed"]
    assert json.loads((bundle / "record.json").read_text())[0]["pass"] == "RemoveChannels"
    for name, row in about["models"].items():
        assert row["batch"] == 2
        model = onnx.load(bundle / row["file"])
        assert {t.data_type for t in model.graph.initializer if t.dims} == {onnx.TensorProto.FLOAT16}
        with np.load(bundle / row["reference"]) as data:
            x = data["input:input"] if "input:input" in data else data[data.files[0]]
            wanted = programs[name].module().eval()(torch.from_numpy(x)).detach().numpy()
            assert np.abs(data["output:000"] - wanted).max() <= 1e-5 * np.abs(wanted).max()  # of the fp32 program
    assert sorted(p.name for p in (bundle / "dense").iterdir()) == ["model.onnx", "reference.npz"]


def test_a_bundle_measures_on_a_machine_without_graphcomb(bundle, tmp_path):
    out = tmp_path / "results.json"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", LONELY, str(bundle / "kit.pyz"), "--out", str(out), *QUICK]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = read_results(out)
    assert found["engine"] == "onnxruntime"
    assert found["device"]["cpus"] == os.cpu_count()
    for row in found["models"].values():
        ms = row["latency"]["stream"]["host_ms"]
        assert 0 < ms["p5"] <= ms["median"] <= ms["p95"] <= ms["p99"]
        assert row["latency"]["stream"]["runs"] == 3 * 17
        assert row["parity"]["finite"]
        assert row["parity"]["error"] < 5e-3  # fp16 against fp32
    refused = any(note.startswith("compressed (stream): no ratio: ") for note in found["notes"])  # on a busy machine
    assert refused or found["ratios"]["compressed"]["stream"]["median"] > 0
    assert "power" in found["models"]["dense"]
    assert not list(tmp_path.glob("*.part"))


# Only the script's own folder, numpy and ONNX Runtime can be imported.
LONELY = """
import runpy, sys, site
site.main()
class No:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("graphcomb", "torch", "onnx"):
            raise ImportError(name + " is not on the device")
sys.meta_path.insert(0, No())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_broken_output_is_noticed(bundle, tmp_path):
    folder = tmp_path / "b"
    shutil.copytree(bundle, folder)
    about = json.loads((folder / "bundle.json").read_text())
    with np.load(folder / about["models"]["dense"]["reference"]) as data:
        arrays = dict(data)
    arrays["input:input" if "input:input" in arrays else next(iter(arrays))][:] = np.inf
    np.savez(folder / about["models"]["dense"]["reference"], **arrays)
    found = run_bundle(folder, tmp_path / "r.json", arguments=QUICK)
    parity = {"finite": False, "error": None, "tolerance": 0.05, "note": "outputs that are not finite"}
    assert found["models"]["dense"]["parity"] == parity
    assert "dense: outputs that are not finite" in found["notes"]
    (folder / "compressed" / "model.onnx").write_bytes(b"cut off")
    with pytest.raises(GraphcombError, match=r"kit.pyz failed: model.onnx: not the file that was bundled"):
        run_bundle(folder, tmp_path / "r.json", arguments=QUICK)


def test_onnx_files_are_made_half_and_keep_their_origins(programs, tmp_path):
    from graphcomb.runtime.engines import origins

    export_onnx(programs["compressed"], tmp_path / "small.onnx", "fp32")
    folder = write_bundle(tmp_path / "b", {"dense": tmp_path / "small.onnx"}, "fp16")
    model = onnx.load(folder / "dense" / "model.onnx")
    assert {t.data_type for t in model.graph.initializer if t.dims} == {onnx.TensorProto.FLOAT16}
    assert origins.read(model) == origins.read(onnx.load(tmp_path / "small.onnx"))


def quantised(path, opset, scale, spread=1):
    """A linear layer whose input and weight go through Q/DQ nodes, then a ReLU."""
    rng = np.random.default_rng(0)
    weight = (spread * rng.integers(-8, 8, (4, 4))).astype(np.float32)  # multiples of 1 are exact in fp16
    weight[::2] = weight[1::2] * 0  # two zeros in every four of a column
    tensors = {"w": weight, "s": np.float32(scale), "b": np.ones(4, np.float32) / 3, "z": np.int8(0)}
    nodes = [
        onnx.helper.make_node(kind, inputs, [out], name=out)
        for kind, inputs, out in [
            ("QuantizeLinear", ["x", "s", "z"], "xq"), ("DequantizeLinear", ["xq", "s", "z"], "xd"),
            ("QuantizeLinear", ["w", "s", "z"], "wq"), ("DequantizeLinear", ["wq", "s", "z"], "wd"),
            ("MatMul", ["xd", "wd"], "m"), ("Add", ["m", "b"], "a"), ("Relu", ["a"], "y"),
        ]
    ]  # fmt: skip
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 4]) for n in "xy"]
    values = [onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "q", info[:1], info[1:], values)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def plain(path):
    """A linear layer."""
    info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 4]) for n in "xy"]
    weight = onnx.numpy_helper.from_array(np.arange(1, 17, dtype=np.float32).reshape(4, 4), "w")
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="y")
    graph = onnx.helper.make_graph([node], "d", info[:1], info[1:], [weight])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.mark.parametrize(
    ("kind", "opset", "scale", "spread", "types", "note"),
    [
        ("fp16", 18, 0.5, 1, ("fp16", "fp32"), "its floating-point parts stay as they are: opset 18 has no fp16 for "),
        ("fp16", 19, 0.1, 1, ("fp16", "fp32"), "its floating-point parts stay as they are: fp16 cannot hold s of "),
        ("fp16", 19, 0.5, 0.1, ("fp16", "fp32"), "its floating-point parts stay as they are: fp16 cannot hold w of "),
        ("fp16", 19, 0.5, 1, ("fp16", "fp16"), ""),
        ("fp32", 18, 0.1, 1, ("fp32", "fp32"), ""),
        ("int8", 18, 0.1, 1, ("fp32", "fp32"), "INT8, with its floating-point parts in fp32"),
    ],
)
def test_a_quantised_model_stands_beside_one_that_is_not(tmp_path, kind, opset, scale, spread, types, note):
    files = {"dense": plain(tmp_path / "d.onnx"), "small": quantised(tmp_path / "q.onnx", opset, scale, spread)}
    folder = write_bundle(tmp_path / "b", files, kind, "agx-orin", batch=3)
    about = json.loads((folder / "bundle.json").read_text())
    assert (about["precision"], about["engine"]) == (kind, "tensorrt")
    models = about["models"]
    assert [models[name]["precision"] for name in models] == [types[0], "int8"]
    assert models["dense"]["note"] == ""
    assert models["small"]["note"].startswith(note)
    assert bool(note) == bool(models["small"]["note"])
    for name, wanted in zip(models, types, strict=True):
        found = onnx.load(folder / models[name]["file"])
        assert found.graph.input[0].type.tensor_type.elem_type == {"fp16": 10, "fp32": 1}[wanted]
    assert models["small"]["outputs"] == ["y"]
    assert [models[name]["sparse"] for name in models] == [False, True]
    results = run_bundle(folder, tmp_path / "r.json", arguments=[*QUICK, "--rounds", "1"])
    assert not any("outputs" in text for text in results["notes"])
    assert any(note in text for text in results["notes"]) or not note
    if types[1] == "fp16":  # nothing but the floating-point part is rounded
        assert results["models"]["small"]["parity"]["error"] < 1e-3


def test_an_onnx_file_that_fp16_spoils_is_refused_or_kept(tmp_path):
    """(x + 2048) - 2048 is lost in fp16; x * 1e6 / 1e6 stays in fp32."""

    def file(first, second, number):
        info = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["batch", 4]) for n in "xy"]
        constant = onnx.numpy_helper.from_array(np.array(number, np.float32), "c")
        nodes = [
            onnx.helper.make_node(first, ["x", "c"], ["h"], name="there"),
            onnx.helper.make_node("Relu", ["h"], ["r"], name="relu"),
            onnx.helper.make_node(second, ["r", "c"], ["y"], name="back"),
        ]
        graph = onnx.helper.make_graph(nodes, "d", info[:1], info[1:], [constant])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
        onnx.save(model, tmp_path / f"{first}.onnx")
        return tmp_path / f"{first}.onnx"

    with pytest.raises(Refused, match=r"fp16 differs from the program .*first off in fp16: back \(Sub\)"):
        write_bundle(tmp_path / "b", {"dense": file("Add", "Sub", 2048.0)}, "fp16")
    folder = write_bundle(tmp_path / "c", {"dense": file("Mul", "Div", 1e6)}, "fp16")
    found = onnx.load(folder / "dense" / "model.onnx")
    assert [n.op_type for n in found.graph.node] == ["Cast", "Mul", "Relu", "Div", "Cast"]


def test_a_quantised_program_is_int8(tmp_path):
    program = graphcomb.capture(torch.nn.Linear(8, 8).eval(), (torch.randn(2, 8),))
    from graphcomb.passes import Fuse, Quantize

    context = graphcomb.passes.Context(data=[(torch.randn(2, 8), torch.zeros(2))])
    small = Quantize(include="*")(Fuse()(program).program, context).program
    folder = write_bundle(tmp_path / "b", {"dense": program, "small": small}, "int8")
    models = json.loads((folder / "bundle.json").read_text())["models"]
    assert [row["precision"] for row in models.values()] == ["fp32", "int8"]
    assert len(models["small"]["layers"][0]["onnx"]) > 0


def test_a_program_in_fp8_is_bundled_with_floats_of_either_size(tmp_path):
    from graphcomb.passes import Quantize

    layers = torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)
    program = graphcomb.capture(torch.nn.Sequential(*layers).eval(), (torch.randn(2, 8),))
    small = Quantize(include="*", precision="fp8")(program, data=[torch.randn(2, 8)]).program
    for kind, type_, note in (("fp16", 10, ""), ("fp8", 1, "FP8, with its floating-point parts in fp32")):
        folder = write_bundle(tmp_path / kind, {"dense": program, "small": small}, kind, "agx-thor")
        row = json.loads((folder / "bundle.json").read_text())["models"]["small"]
        assert (row["precision"], row["note"]) == ("fp8", note)
        assert [i.type.tensor_type.elem_type for i in onnx.load(folder / row["file"]).graph.input] == [type_]
    results = run_bundle(folder, tmp_path / "r.json", arguments=[*QUICK, "--rounds", "1"])
    assert not any("outputs" in text for text in results["notes"])
    with pytest.raises(BadInput, match=r"no fp8 in dense; give a model with Q/DQ nodes"):
        write_bundle(tmp_path / "none", {"dense": program}, "fp8", "agx-thor")
    with pytest.raises(BadInput, match=r"target agx-orin: no fp8"):
        write_bundle(tmp_path / "none", {"small": small}, "fp16", "agx-orin")


def test_a_quantised_program_computes_the_rest_in_fp16(tmp_path):
    """As the dense one beside it does; scales of random data are no fp16 numbers, and the file is compared as exported."""
    from graphcomb.passes import Quantize

    layers = torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8)
    program = graphcomb.capture(torch.nn.Sequential(*layers).eval(), (torch.randn(2, 8),))
    small = Quantize(include="*")(program, data=[(torch.randn(2, 8), torch.zeros(2))]).program
    for opset, kind in ((None, 10), (17, 1)):  # fp16 scales came with opset 19
        folder = write_bundle(tmp_path / f"b{opset}", {"dense": program, "small": small}, "fp16", opset=opset)
        row = json.loads((folder / "bundle.json").read_text())["models"]["small"]
        model = onnx.load(folder / row["file"])
        assert (row["precision"], row["note"]) == ("int8", "")
        assert [i.type.tensor_type.elem_type for i in model.graph.input] == [10]
        scales = {n.input[1] for n in model.graph.node if n.op_type == "QuantizeLinear"}
        assert {t.data_type for t in model.graph.initializer if t.name in scales} == {kind}
        results = run_bundle(folder, tmp_path / "r.json", arguments=[*QUICK, "--rounds", "1"])
        assert not any("outputs" in text for text in results["notes"])


def test_a_program_is_exported_for_an_older_tensorrt(programs, tmp_path):
    """Which only the one who asks for it knows: the target's releases parse more."""
    folder = write_bundle(tmp_path / "b", {"net": programs["dense"]}, "fp16", "agx-orin", opset=17)
    assert json.loads((folder / "bundle.json").read_text())["models"]["net"]["opset"] == 17


def external(path, location):
    """An ONNX file whose weights lie in a file of their own; the location is written as it is given."""
    model = onnx.load(plain(path))
    place = path.parent / location.lstrip("/")
    place.parent.mkdir(parents=True, exist_ok=True)
    onnx.external_data_helper.convert_model_to_external_data(model, location="w.bin", size_threshold=0)
    onnx.save(model, path)
    (path.parent / "w.bin").rename(place)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("kind", ["fp32", "fp16"])
def test_weights_may_lie_in_a_folder_below(tmp_path, kind):
    path = external(tmp_path / "net.onnx", "weights/w.bin")
    folder = write_bundle(tmp_path / "b", {"net": path}, kind)
    about = json.loads((folder / "bundle.json").read_text())["models"]["net"]
    files = {str(f.relative_to(folder)) for f in (folder / "net").rglob("*") if f.is_file()}
    wanted = {"net/model.onnx", "net/reference.npz"} | ({"net/weights/w.bin"} if kind == "fp32" else set())
    assert files == wanted
    assert set(about["data"]) == {f for f in files if f.endswith(".bin")}
    run_bundle(folder, tmp_path / "r.json", arguments=[*QUICK, "--rounds", "1"])
    if kind == "fp32":
        (folder / "net/weights/w.bin").write_bytes(bytes(100))
        with pytest.raises(GraphcombError, match=r"w.bin: not the file that was bundled"):
            run_bundle(folder, tmp_path / "r.json", arguments=QUICK)


@pytest.mark.parametrize("location", ["../w.bin", "/w.bin"])
def test_weights_elsewhere_are_refused(tmp_path, location):
    (tmp_path / "in").mkdir()
    path = external(tmp_path / "in" / "net.onnx", location)
    with pytest.raises(BadInput, match=r"in/net.onnx: .*"):
        write_bundle(tmp_path / "b", {"net": path}, "fp32")
    assert not any((tmp_path / "b").iterdir())


def test_errors_name_the_file_that_was_given(tmp_path):
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Erf", ["x"], ["y"], domain="somewhere")], "g",
        [onnx.helper.make_tensor_value_info("x", 1, [1])], [onnx.helper.make_tensor_value_info("y", 1, [1])],
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("somewhere", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "odd.onnx")
    for kind in ("fp32", "fp16"):
        with pytest.raises(BadInput, match=f"^{tmp_path}/odd.onnx: ONNX Runtime "):
            write_bundle(tmp_path / "b", {"odd": tmp_path / "odd.onnx"}, kind)
    assert write_bundle(tmp_path / "b", {"net": plain(tmp_path / "net.onnx")}).is_dir()  # nothing was left behind


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        ({}, {}, "no models"),
        ({"a b": "net.onnx"}, {}, "a b is no name"),
        ({"a": "net.onnx"}, {"kind": "int8"}, "no int8 in a; give a model with Q/DQ nodes"),
        ({"a": "net.onnx"}, {"kind": "fp8", "target": "agx-orin"}, "no fp8"),
        ({"a": "no.onnx"}, {}, "no such file"),
        ({"a": "net.onnx"}, {"target": "cpu-openvino"}, "the kit has no OpenVINO; target cpu measures in ONNX Runtime"),
        ({"a": "net.onnx"}, {"batch": 0}, "batch: 1 or more, not 0"),
        ({"a": "net.onnx"}, {"kind": "int4"}, "precision int4: not known; did you mean int8"),
    ],
)
def test_what_cannot_be_bundled_is_one_line(programs, tmp_path, monkeypatch, models, options, message):
    monkeypatch.chdir(tmp_path)
    export_onnx(programs["dense"], "net.onnx")
    with pytest.raises(BadInput, match=message):
        write_bundle(tmp_path / "b", models, **options)
    assert not list((tmp_path / "b").glob(".part*")) if (tmp_path / "b").exists() else True


def test_a_folder_with_other_things_is_left_alone(programs, tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(BadInput, match="not empty, and no bundle"):
        write_bundle(tmp_path, programs)


def test_plugins_go_along_with_models_that_only_they_can_run(tmp_path):
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, (2, 4)) for n in "xy")
    node = onnx.helper.make_node("Twice", ["x"], ["y"], name="head/twice", domain="plugins")
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("plugins", 1)]
    graph = onnx.helper.make_graph([node], "net", [x], [y])
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "net.onnx")
    library, folder = tmp_path / "libnet.so", tmp_path / "b"
    options = {"kind": "fp32", "target": "orin-nano"}
    with pytest.raises(BadInput, match=r"head/twice \(Twice\): operator not supported"):
        write_bundle(folder, {"net": tmp_path / "net.onnx"}, **options)
    with pytest.raises(BadInput, match=r"plugins: .*libnet\.so: no such file"):
        write_bundle(folder, {"net": tmp_path / "net.onnx"}, **options, plugins=[library])
    library.write_bytes(b"library")
    with pytest.raises(BadInput, match="two files of the same name"):
        write_bundle(folder, {"net": tmp_path / "net.onnx"}, **options, plugins=[library, library])
    with pytest.raises(BadInput, match="target rtx-sm86 runs tensorrt_rtx"):
        write_bundle(folder, {"net": tmp_path / "net.onnx"}, "fp32", "rtx-sm86", plugins=[library])
    arguments = ("--precision", "fp32", "--target", "orin-nano", "--plugin", library, "--out", folder)
    assert main(["bundle", *map(str, (tmp_path / "net.onnx", *arguments))]) == 0
    assert (folder / "plugin-libraries" / "libnet.so").read_bytes() == b"library"
    about = read_bundle(folder)
    assert list(about["plugins"]) == ["plugin-libraries/libnet.so"]
    row = about["models"]["net"]
    assert "its outputs are not compared: ONNX Runtime" in row["note"]
    feeds, outputs = read_reference(folder, row)
    assert ({n: a.shape for n, a in feeds.items()}, outputs) == ({"x": (2, 4)}, [])
    assert folder / "plugin-libraries" in run_contents(folder, folder)
