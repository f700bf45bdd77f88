"""A `.pt2` from a stranger: what is damaged is noticed, and what would run is refused, in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import graphcomb as g
from graphcomb.graph.errors import BadInput

from ..toys import CASES

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


class Runs:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    program = g.capture(net(), torch.randn(2, 3, 6, 6), dynamic_shapes="batch")
    program.history.append({"pass": "Nothing", "options": {}, "changed": []})
    return program.save(tmp_path / "m.pt2")


def rewritten(path: Path, change: Callable[[str, bytes], bytes], extra: dict[str, bytes] | None = None) -> Path:
    """The archive with other members, as a stranger would make it: without a seal and with fresh checksums."""
    new = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as out:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            out.writestr(name, change(name.partition("/")[2], old.read(name)))
        for name, data in (extra or {}).items():
            out.writestr(f"{root}/{name}", data)
    return new


def model_with(change: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
    """Change the graph's JSON."""

    def edit(name: str, data: bytes) -> bytes:
        if name != "models/model.json":
            return data
        found = json.loads(data)
        change(found)
        return json.dumps(found).encode()

    return edit


def refused(path: Path) -> str:
    with pytest.raises(BadInput) as error:
        g.load(path)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------------------ no code
def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("forbidden", [None, "1"])
def test_pickled_objects_are_refused_and_torch_is_left_as_it_was(saved, tmp_path, monkeypatch, forbidden) -> None:
    monkeypatch.delenv(FORCE, raising=False)
    if forbidden:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forbidden)
    before = dict(os.environ)
    evil = pickled(Runs(tmp_path / "ran"))
    bad = rewritten(saved, lambda name, data: evil if name == "data/sample_inputs/model.pt" else data)
    assert refused(bad).startswith("refused, as loading it could run code")
    assert not (tmp_path / "ran").exists()
    assert g.load(saved).params
    assert dict(os.environ) == before


def test_pickled_weights_are_refused(saved, tmp_path) -> None:
    def pickle_all(name: str, data: bytes) -> bytes:
        if name == "data/weights/model_weights_config.json":
            config = json.loads(data)
            for entry in config["config"].values():
                entry["use_pickle"] = True
            return json.dumps(config).encode()
        return pickled(Runs(tmp_path / "ran")) if name.startswith("data/weights/weight_") else data

    refused(rewritten(saved, pickle_all))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["opaque_obj_0", "custom_obj_0"])
def test_pickled_constants_are_refused(saved, tmp_path, kind: str) -> None:
    entry = {"path_name": kind, "is_param": False, "use_pickle": True, "tensor_meta": None}
    config = json.dumps({"config": {"thing": entry}}).encode()
    bad = rewritten(
        saved,
        lambda name, data: config if name == "data/constants/model_constants_config.json" else data,
        {f"data/constants/{kind}": pickle.dumps(Runs(tmp_path / "ran"))},
    )
    assert f"{kind} is a pickled object" in refused(bad)
    assert not (tmp_path / "ran").exists()


def test_compiled_code_is_refused(saved) -> None:
    bad = rewritten(saved, lambda name, data: data, {"data/aotinductor/model/code.so": b"\x7fELF"})
    assert "data/aotinductor/model/code.so is compiled code" in refused(bad)


def test_archives_of_old_torch_are_refused_before_their_pickles_are_read(saved, tmp_path) -> None:
    old = tmp_path / "old.pt2"
    with zipfile.ZipFile(old, "w") as out:
        out.writestr("version", "8.2")
        out.writestr("serialized_exported_program.json", "{}")
        for part in ("state_dict", "constants", "example_inputs"):
            out.writestr(f"serialized_{part}.pt", pickled(Runs(tmp_path / "ran")))
    assert "older" in refused(old)
    assert not (tmp_path / "ran").exists()


def nodes(model: Any) -> Any:
    return model["graph_module"]["graph"]["nodes"]


def first_size(model: Any) -> Any:
    return next(
        s["as_expr"]
        for value in model["graph_module"]["graph"]["tensor_values"].values()
        for s in value["sizes"]
        if "as_expr" in s
    )


def calls(target: str) -> Callable[[Any], None]:
    return lambda model: nodes(model)[0].update(target=target)


ATTACKS: dict[str, Callable[[Any], None]] = {
    "expression": lambda model: first_size(model).update(expr_str="__import__('os').getpid()"),
    "expression without quotes": lambda model: first_size(model).update(expr_str="eval(chr(49))"),
    "expression with an attribute": lambda model: first_size(model).update(expr_str="Max.func(1, 2)"),
    "expression with a lambda": lambda model: first_size(model).update(expr_str="(lambda x: x)(1)"),
    "function as operator": calls("torch.serialization.os.getpid"),
    "function of the operators' own module": calls("torch.ops.load_library"),
    "attribute of an operator": calls("torch.ops.aten.relu.default.__init__"),
    "function of the operator module": calls("_operator.methodcaller"),
    "file as an operator": calls("torch.ops.aten.from_file.default"),
    "name": lambda model: nodes(model)[0].update(name="x = print()\n    y"),
    "name of an input": lambda model: model["graph_module"]["signature"]["input_specs"][-1]["user_input"]["arg"][
        "as_tensor"
    ].update(name="x=print()"),
    "name of a parameter": lambda model: model["graph_module"]["signature"]["input_specs"][0]["parameter"].update(
        parameter_name='0.w", print()) or ("'
    ),
    "argument of forward": lambda model: model["graph_module"]["module_call_graph"][0]["signature"].update(
        forward_arg_names=["x=print()"]
    ),
    "module to import": lambda model: model["graph_module"]["module_call_graph"][0]["signature"].update(
        out_spec='[1, {"type": "collections.defaultdict", "context": "{\\"default_factory_module\\": \\"this\\"}"}]'
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_graphs_that_would_run_something_are_refused(saved, attack: str) -> None:
    text = refused(rewritten(saved, model_with(ATTACKS[attack])))
    assert text.startswith("refused, as loading it could run code: ")


@pytest.mark.parametrize("name", ["Glu", "FusedQkv", "SwinWindows", "GroupedConv", "GqaFlag", "C2f"])
def test_programs_of_all_kinds_come_back(name: str, tmp_path) -> None:
    case = CASES[name]
    program = g.capture(case.model(), torch.randn(case.shape), dynamic_shapes=None if case.static else "batch")
    again = g.load(program.save(tmp_path / "m.pt2"))
    torch.testing.assert_close(again.module()(*program.args), program.module()(*program.args), rtol=0, atol=0)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch.cond takes no dynamic heights and widths there")
def test_sizes_that_are_expressions_and_odd_names_come_back(tmp_path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a-b": nn.Conv2d(3, 4, 3, 2), "c d": nn.Conv2d(4, 4, 1)})

        def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            y = torch.cond(x.sum() > 0, lambda x: x.relu(), lambda x: x * 2, (self.parts["a-b"](x),))
            return {"loss/first": self.parts["c d"](y) * scale, "rest (all)": y.flatten(2)}

    inputs = torch.randn(2, 3, 16, 20), torch.ones(())
    dims = {"x": {2: Dim.DYNAMIC, 3: Dim.DYNAMIC}, "scale": None}
    program = g.capture(Odd(), (inputs[0],), {"scale": inputs[1]}, dynamic_shapes=dims)
    found = g.load(program.save(tmp_path / "m.pt2")).module()(inputs[0], scale=inputs[1])
    assert list(found) == ["loss/first", "rest (all)"]


# ------------------------------------------------------------------------------------------------------------- damage
def test_every_flipped_byte_of_an_own_file_is_noticed(saved) -> None:
    data, path = saved.read_bytes(), saved.with_name("flipped.pt2")
    for at in [*range(0, len(data), 41), *range(len(data) - 120, len(data))]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert "damaged" in refused(path), at


def test_flipped_weights_of_a_plain_exported_file_are_noticed(tmp_path) -> None:
    path = tmp_path / "plain.pt2"
    torch.export.save(torch.export.export(net(), (torch.randn(2, 3, 6, 6),)), path)
    assert g.load(path).params
    with zipfile.ZipFile(path) as archive:
        (member,) = [m for m in archive.infolist() if m.filename.endswith("weights/weight_0")]
    data = bytearray(path.read_bytes())
    data[member.header_offset + 30 + 300] ^= 1  # past the header, its name and the padding
    path.write_bytes(data)
    assert "damaged" in refused(path)


def test_every_truncated_file_is_one_line(saved) -> None:
    data, path = saved.read_bytes(), saved.with_name("short.pt2")
    for size in [*range(0, len(data), 997), len(data) - 1, len(data) - 70]:
        path.write_bytes(data[:size])
        assert "damaged" in refused(path), size


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b"not json", "is not JSON"),
        (b'{"pass": "Fuse"}', "is not a list but dict"),
        (b"null", "is not a list but NoneType"),
        (b'["Fuse"]', "entry 0 of its record of passes"),
        (b'[{"pass": "Fuse"}, {"options": {}}]', "entry 1 of its record of passes"),
        (b'[{"pass": "Sparsify", "changed": "all"}]', "changed in entry 0"),
        (b'[{"pass": "Sparsify", "sparse": {"a.weight": "2 of 4"}}]', "sparse in entry 0"),
        (b'[{"pass": "RemoveChannels", "layers": [3]}]', "layers in entry 0"),
        (b"\xff\xfe", "not a loadable .pt2"),
        (b"[" * 5000, "is not JSON"),
    ],
)
def test_a_broken_record_is_one_line(saved, record: bytes, why: str) -> None:
    bad = rewritten(saved, lambda name, data: record if name == "extra/graphcomb.json" else data)
    assert why in refused(bad)


def test_files_without_a_seal_load(saved) -> None:
    path = rewritten(saved, lambda name, data: data)
    assert g.load(path).history == g.load(saved).history


def test_a_sealed_file_is_still_one_for_torch(saved) -> None:
    program = torch.export.load(saved)
    torch.testing.assert_close(program.module()(torch.ones(3, 3, 6, 6)), g.load(saved).module()(torch.ones(3, 3, 6, 6)))


# --------------------------------------------------------------------------------------------------------- decomposed
@pytest.mark.parametrize("table", [None, {}])
def test_decomposed_programs_are_refused_with_the_way_out(tmp_path, table) -> None:
    exported = torch.export.export(net(), (torch.randn(2, 3, 6, 6),)).run_decompositions(table)
    torch.export.save(exported, tmp_path / "d.pt2")
    assert "without run_decompositions()" in refused(tmp_path / "d.pt2")
    with pytest.raises(BadInput, match=r"^the exported program is decomposed .* without run_decompositions\(\)$"):
        g.passes.RemoveChannels()(exported)


def test_products_the_user_wrote_are_no_decomposition() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(self.b, x, self.w)

    assert g.Program.from_exported(torch.export.export(Own(), (torch.randn(3, 4),))).macs == 3 * 4 * 6


def test_a_file_may_have_any_name(tmp_path, caplog):
    """torch.export.save logs a warning of names that do not end in .pt2."""
    program = g.capture(nn.Linear(3, 2), torch.randn(4, 3))
    assert g.load(program.save(tmp_path / "small.gc")).params == program.params
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_file_has_the_example_inputs_and_not_the_data_set_that_they_are_a_part_of(tmp_path):
    """The first images of a tensor of images are a view of all of them."""
    images = torch.randn(4096, 3, 16, 16)
    channels_last = images.to(memory_format=torch.channels_last)[1:3]
    for args in (images[:2], channels_last, images[4:6, :, :8].requires_grad_()):
        program = g.capture(nn.Conv2d(3, 4, 3), args, dynamic_shapes="batch")
        assert torch.equal(program.args[0], args)
        assert program.args[0].requires_grad == args.requires_grad
        assert program.save(tmp_path / "model.pt2").stat().st_size < 100_000
        assert torch.equal(g.load(tmp_path / "model.pt2").args[0], args)
