import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphcomb.graph import files
from graphcomb.graph.errors import BadInput, MissingBackend
from graphcomb.graph.files import replacing
from graphcomb.runtime import build_engine, load_engine, open_engine
from graphcomb.runtime.engines.backends import BACKENDS, Backend
from graphcomb.runtime.engines.base import Engine, UnparsedOp
from graphcomb.runtime.engines.options import EngineOptions
from graphcomb.runtime.engines.trt import build as tensorrt
from graphcomb.runtime.onnx_file import check_model, precision


def linear_model(dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """y = relu(x w), x of shape [n, 4]."""
    weights = np.arange(12, dtype=np.float32).reshape(4, 3) - 5
    w = numpy_helper.from_array(weights.astype(helper.tensor_dtype_to_np_dtype(dtype)), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], "mm"), helper.make_node("Relu", ["h"], ["y"], "act")]
    x, y = (helper.make_tensor_value_info(n, dtype, ["n", c]) for n, c in (("x", 4), ("y", 3)))
    graph = helper.make_graph(nodes, "g", [x], [y], [w])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    onnx.save(linear_model(), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_build_and_run_on_the_cpu(path: Path) -> None:
    report = build_engine(path)
    assert (report.backend, report.target, report.path, report.precision) == ("onnxruntime", "cpu", path, "fp32")
    assert report.bytes == path.stat().st_size
    assert report.memory == {"weights": 48}
    assert [k.kind for k in report.kernels] == ["MatMul", "Relu"]
    assert report.to_dict()["padding"] == []
    engine = load_engine(path)
    assert isinstance(engine, Engine)
    assert [(i.name, i.dtype, i.shape) for i in engine.inputs] == [("x", "float32", (None, 4))]
    assert [(o.name, o.shape) for o in engine.outputs] == [("y", (None, 3))]
    x = np.random.default_rng(0).standard_normal((5, 4), np.float32)
    (y,) = engine.run([x])
    np.testing.assert_allclose(y, np.maximum(x @ (np.arange(12).reshape(4, 3) - 5), 0), rtol=1e-5, atol=1e-5)


def test_the_optimised_model_is_kept_where_asked(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "optimised.onnx"
    report = build_engine(path, out=out)
    assert report.path == out
    assert report.bytes == out.stat().st_size
    assert [f.name for f in out.parent.iterdir()] == [out.name]
    x = np.ones((1, 4), np.float32)
    np.testing.assert_array_equal(load_engine(out).run([x])[0], load_engine(path).run([x])[0])


def test_half_precision_on_the_cpu_says_that_it_computes_in_fp32(tmp_path: Path) -> None:
    onnx.save(linear_model(TensorProto.FLOAT16), tmp_path / "half.onnx")
    report = build_engine(tmp_path / "half.onnx")
    assert report.precision == "fp16"
    casts = [k for k in report.kernels if k.kind == "Cast"]
    assert bool(casts) == any("computes in fp32" in w for w in report.warnings)


def test_wrong_inputs(path: Path) -> None:
    engine = load_engine(path)
    with pytest.raises(BadInput, match=r"takes 1 inputs \(x\), got 2"):
        engine.run([np.ones((1, 4), np.float32)] * 2)
    for wrong in (np.ones((1, 5), np.float32), np.ones((1, 4), np.float64)):
        with pytest.raises(BadInput, match="do not fit the engine") as caught:
            engine.run([wrong])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07" * 40])
def test_foreign_files(tmp_path: Path, content: bytes) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(content)
    with pytest.raises(BadInput, match=r"bad\.onnx: not a") as caught:
        build_engine(bad)
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match=r"bad\.onnx"):
        load_engine(bad)


def test_a_truncated_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="not a valid ONNX file"):
        build_engine(path)


def test_an_invalid_graph(path: Path) -> None:
    model = linear_model()
    model.graph.node[0].op_type = "MatMull"
    onnx.save(model, path)
    with pytest.raises(BadInput, match=r"model\.onnx: not a valid ONNX file .*MatMull"):
        check_model(path)


def save_one(path: Path, op: str, opset: int = 20, domain: str = "") -> Path:
    """A model of two nodes, the second of which is the operator."""
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.UINT8, shape) for n, shape in (("x", ["n"]), ("y", list("abc")))
    )
    nodes = [
        helper.make_node("Identity", ["x"], ["h"], "first"),
        helper.make_node(op, ["h"], ["y"], "head/op", domain=domain),
    ]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets, ir_version=10), path)
    return path


@pytest.mark.parametrize(("op", "domain"), [("ImageDecoder", ""), ("Odd", "mine")])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_an_operator_the_library_lacks_is_named_with_its_node(
    tmp_path: Path, op: str, domain: str, backend: str
) -> None:
    pytest.importorskip(backend)
    model = save_one(tmp_path / "net.onnx", op, domain=domain)
    for use in (build_engine, open_engine):
        with pytest.raises(
            UnparsedOp, match=rf"net\.onnx: .* cannot parse it: node head/op \({op}\): operator not sup"
        ):
            use(model, backend=backend)
    assert list(tmp_path.iterdir()) == [model]


def test_missing_files_and_unknown_names(path: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        build_engine(tmp_path / "none.onnx")
    with pytest.raises(BadInput, match="no such file"):
        load_engine(tmp_path / "none.onnx")
    with pytest.raises(BadInput, match="target gpu: not known"):
        build_engine(path, "gpu")
    with pytest.raises(BadInput, match="backend onnxruntim: not known; did you mean onnxruntime"):
        build_engine(path, backend="onnxruntim")
    with pytest.raises(BadInput, match="option thread: not one of backend onnxruntime; did you mean threads"):
        build_engine(path, thread=2)
    (tmp_path / "model.xyz").write_bytes(b"?")
    with pytest.raises(BadInput, match=r"no backend for this suffix \(known: \.onnx"):
        load_engine(tmp_path / "model.xyz")


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({"threads": "abc"}, "threads: a whole number, not 'abc'"),
        ({"threads": True}, "threads: a whole number, not True"),
        ({"threads": 1.5}, "threads: a whole number, not 1.5"),
        ({"threads": None}, "threads: a whole number, not None"),
    ],
)
@pytest.mark.parametrize("use", [build_engine, load_engine])
def test_options_are_of_their_kind(path: Path, use, option: dict, wanted: str) -> None:
    with pytest.raises(BadInput, match=f"option {wanted}$"):
        use(path, **option)


@pytest.mark.parametrize(
    ("option", "wanted"),
    [
        ({"workspace": True}, "workspace: a whole number, not True"),
        ({"dla": "abc"}, "dla: a whole number, not 'abc'"),
        ({"sparse": 1}, "sparse: true or false, not 1"),
        ({"batch": "1,2"}, "batch: a whole number or a list, not '1,2'"),
        ({"batch": (1, 2.5, 4)}, r"batch: a whole number or a list, not \(1, 2.5, 4\)"),
        ({"shapes": 5}, "shapes: a mapping, not 5"),
        ({"shapes": {"x": [1, 2, 3]}}, r"shapes: a mapping, not \{'x': \[1, 2, 3\]\}"),
        ({"log": 5}, "log: text, not 5"),
    ],
)
def test_options_of_tensorrt_are_of_their_kind(path: Path, option: dict, wanted: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(BadInput, match=f"option {wanted}$"):
        build_engine(path, "rtx-sm86", **option)


@pytest.mark.parametrize("option", [{"batch": 2}, {"batch": [1, 2, 4]}, {"log": Path("log")}, {"workspace": None}])
def test_options_of_every_kind_are_taken(option: dict) -> None:
    assert EngineOptions(**option).given() == {name: value for name, value in option.items() if value is not None}
    assert option.keys() <= set(tensorrt.TAKES)


@pytest.mark.parametrize(
    ("target", "dtype", "kind"), [("rtx-sm75", "BFLOAT16", "bf16"), ("rtx-sm86", "DOUBLE", "fp64")]
)
def test_a_precision_that_the_gpu_lacks_is_refused(tmp_path: Path, target: str, dtype: str, kind: str) -> None:
    pytest.importorskip("tensorrt_rtx")
    onnx.save(linear_model(TensorProto.DataType.Value(dtype)), tmp_path / "net.onnx")
    with pytest.raises(
        BadInput, match=rf"net\.onnx: target {target} does not compute in {kind}; export it in one of fp32"
    ):
        build_engine(tmp_path / "net.onnx", target)


def test_a_missing_library_names_the_extra(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = Backend("tensorrt", "no_such_library", "rtx", (".rtx",))
    monkeypatch.setitem(BACKENDS, "tensorrt_rtx", missing)
    with pytest.raises(MissingBackend, match=r"no_such_library is not installed.*pip install 'graphcomb\[rtx\]'"):
        build_engine(path, "rtx-sm86")


def test_precision_of_quantised_models() -> None:
    model = linear_model()
    assert precision(model) == "fp32"
    model.graph.node.append(helper.make_node("QuantizeLinear", ["y", "s", "z"], ["q"]))
    assert precision(model) == "int8"


@pytest.mark.parametrize("how", ["zero point", "attribute", "inferred"])
def test_models_quantised_to_8_bit_floats_are_not_called_int8(how: str) -> None:
    model, kind = linear_model(), onnx.TensorProto.FLOAT8E4M3FN
    names = ["y", "s", "z"] if how == "zero point" else ["y", "s"]
    node = helper.make_node("QuantizeLinear", names, ["q"], **({"output_dtype": kind} if how == "attribute" else {}))
    model.graph.node.append(node)
    if how == "zero point":
        model.graph.initializer.append(helper.make_tensor("z", kind, [], [0.0]))
    if how == "inferred":
        model.graph.value_info.append(helper.make_tensor_value_info("q", kind, None))
    assert precision(model) == "fp8"


def test_temporary_names_follow_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    precious, target = tmp_path / "precious", tmp_path / "file.bin"
    precious.write_text("keep")
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / ".file.guessed.part.bin").symlink_to(precious)
    with pytest.raises(BadInput, match=r"file\.bin: cannot be written"), replacing(target) as part:
        part.write_text("spoilt")
    assert precious.read_text() == "keep"
    monkeypatch.undo()
    old = os.umask(0o027)
    try:
        with replacing(target) as part:
            part.write_text("good")
    finally:
        os.umask(old)
    assert target.stat().st_mode & 0o777 == 0o640


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "file.bin"
    target.write_text("old")

    def interrupted() -> None:
        with replacing(target) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["file.bin"]
    with pytest.raises(BadInput, match="cannot be written"), replacing(target / "below" / "a.bin") as part:
        part.write_text("never")


def test_an_engine_is_opened_by_its_file_or_by_name(path: Path, tmp_path: Path) -> None:
    x = np.ones((2, 4), np.float32)
    (wanted,) = load_engine(path).run([x])
    for engine in (open_engine(path), open_engine(path, "onnxruntime", threads=2)):
        np.testing.assert_array_equal(engine.run([x])[0], wanted)
    with pytest.raises(BadInput, match="backend onnxruntim: not known; did you mean onnxruntime"):
        open_engine(path, "onnxruntim")
    with pytest.raises(BadInput, match=r"net\.bin: no such file"):
        open_engine(tmp_path / "net.bin")
