"""Files that are refused: one line each, that says what to do."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphcomb import BadInput, from_onnx

from .toys import draw, from_text

ONE = "g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }"


def refused(path, message: str, **options: object) -> None:
    with pytest.raises(BadInput, match=message) as error:
        from_onnx(path, **options)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def graph(path, *nodes: onnx.NodeProto, opset: int = 17, domains: tuple[str, ...] = ()) -> str:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 4]) for n in "xy")
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(helper.make_graph(list(nodes), "g", [x], [y]), opset_imports=imports), str(path))
    return path


def test_a_file_that_is_not_there_or_no_onnx(tmp_path) -> None:
    refused(tmp_path / "absent.onnx", "no such file")
    (tmp_path / "empty.onnx").write_bytes(b"")
    refused(tmp_path / "empty.onnx", "not an ONNX file")
    (tmp_path / "text.onnx").write_text("hello, world " * 50)
    refused(tmp_path / "text.onnx", "not an ONNX file, or a damaged one")


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_a_file_that_was_cut_off(share, tmp_path) -> None:
    path = from_text(tmp_path / "m.onnx", "g (float[N,64] x) => (float[N,64] y) { y = MatMul(x, w) }", w=draw(64, 64))
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path, "not an ONNX file|not a valid ONNX file|cannot be read")


def test_all_unknown_operators_are_named_in_one_line(tmp_path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["a"], name="find"),
        helper.make_node("Fancy", ["x"], ["b"], domain="my.domain"),
        helper.make_node("Fancy", ["b"], ["y"], domain="my.domain"),
    ]
    refused(
        graph(tmp_path / "m.onnx", *nodes, domains=("my.domain",)),
        r"cannot be imported: NonZero \(find\): the size of its result depends on data.*; my\.domain::Fancy \(2 nodes\): of "
        "a domain of its own",
    )


def test_control_flow(tmp_path) -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    )
    yes = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
    node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch, name="choose")
    refused(graph(tmp_path / "m.onnx", yes, node), r"If \(choose\): control flow")


def test_quantised_networks(tmp_path) -> None:
    text = """g (float[N,4] x) => (float[N,4] y) {
        scale = Constant <value = float {0.1}> ()
        q = QuantizeLinear(x, scale)
        y = DequantizeLinear(q, scale)
    }"""
    refused(from_text(tmp_path / "m.onnx", text), "QuantizeLinear .*: a quantised network; import the float network")


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/hostname", "link.bin", "."])
def test_weights_outside_the_folder_are_never_read(place, tmp_path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(np.ones(16, np.float32).tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    path = from_text(folder / "m.onnx", "g (float[N,4] x) => (float[N,4] y) { y = MatMul(x, w) }", w=draw(4, 4))
    model = onnx.load(str(path))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=place)
    path.write_bytes(model.SerializeToString())
    refused(path, r"the weight w is kept in .*, outside the model's folder")


def test_weights_beside_the_file_are_read_and_missed(tmp_path) -> None:
    text = "g (float[N,40] x) => (float[N,40] y) { y = MatMul(x, w) }"
    path = from_text(tmp_path / "m.onnx", text, w=draw(40, 40))
    onnx.save_model(onnx.load(str(path)), str(path), save_as_external_data=True, location="w.bin", size_threshold=0)
    assert from_onnx(path).history[0]["parity"]["error"] <= 1e-5
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:100])
    refused(path, "the weight w cannot be read|not a valid ONNX file")
    (tmp_path / "w.bin").unlink()
    refused(path, r"its weights are in w\.bin, which is not there")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("g (float[N,4] x, float[N,4] z) => (float[N,4] y) { y = Relu(x) }", "nothing reads the input z"),
        ("g (string[N,4] x) => (string[N,4] y) { y = Identity(x) }", "the input x: element type STRING"),
        (
            "g (float[N,4] x, int64[2] s) => (float[a,b] y) { y = Reshape(x, s) }",
            r"y \(Reshape\): its input s depends on data",
        ),
        (
            "g (float[N,4] x) => (float[a,b] y) { "
            "s = Constant <value = int64[2] {1000000, 1000000}> ()  z = ConstantOfShape(s)  y = Add(x, z) }",
            r"z \(ConstantOfShape\): it asks for a constant of 1000000 x 1000000 elements",
        ),
        ("g (float[N,3] x) => (float[N,4] y) { y = MatMul(x, w) }", r"y \(Linear\): RuntimeError"),
    ],
)
def test_graphs_that_cannot_be_had(text, message, tmp_path) -> None:
    weights = {"w": draw(4, 4)} if "w)" in text else {}
    refused(from_text(tmp_path / "m.onnx", text, **weights), message)


def test_an_opset_that_is_too_old(tmp_path) -> None:
    refused(graph(tmp_path / "m.onnx", helper.make_node("Relu", ["x"], ["y"]), opset=5), "opset 5; 7 is the oldest")
