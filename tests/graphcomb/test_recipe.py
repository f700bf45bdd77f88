"""Reading recipes: what is taken, and that every mistake names its place and the nearest valid name."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from graphcomb.graph.errors import BadInput
from graphcomb.passes import Comb, Distill, RemoveChannels, Sparsify
from graphcomb.passes.train.options import Training
from graphcomb.recipe import known_passes, override, parse_recipe, read_recipe, read_yaml
from graphcomb.runtime.engines.options import EngineOptions

GOOD = {"model": "a:b", "passes": []}


def test_short_forms_are_spelt_out() -> None:
    recipe = parse_recipe({
        "model": "a:b",
        "data": {"source": "digits", "arguments": {"size": 32}},
        "inputs": [[1, 3, 8, 8], {"shape": [1], "dtype": "int64"}],
        "passes": ["Comb", {"RemoveChannels": {"ratio": 0.25, "kinds": ["channel"]}}, {"Comb": None}],
    })  # fmt: skip
    assert recipe.model.source == "a:b"
    assert recipe.data is not None
    assert recipe.data.arguments == {"size": 32}
    assert [(i.shape, i.dtype) for i in recipe.inputs or []] == [([1, 3, 8, 8], "float32"), ([1], "int64")]
    assert recipe.passes == [Comb(), RemoveChannels(ratio=0.25, kinds=("channel",)), Comb()]


@pytest.mark.parametrize("text", ["no", "false", "'no'"])
def test_precision_no_may_be_written_as_yaml_reads_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    train = f"{{RemoveChannels: {{macs: 0.5, train: {{precision: {text}}}}}}}"
    path.write_text(f"model: a:b\npasses: [{{Distill: {{precision: {text}}}}}, {train}]\n")
    recipe = read_recipe(path, [f"passes.0.precision={text}"])
    assert recipe.passes == [Distill(), RemoveChannels(macs=0.5, train=Distill())]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        ("-.5e+1", -5.0),
        ("1.e2", 100.0),
        ("'1e-4'", "1e-4"),
        ("1e", "1e"),
        ("e4", "e4"),
    ],
)
def test_powers_of_ten_are_numbers_unless_in_quotes(tmp_path: Path, text: str, value: object) -> None:
    (tmp_path / "recipe.yaml").write_text(f"lr: {text}")
    (found,) = read_yaml(tmp_path / "recipe.yaml").values()
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["2:4", "'2:4'", " 2:4 "])
def test_a_pattern_is_no_number_in_base_60(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: a:b\nseed: 0x10\npasses:\n- Sparsify: {{pattern: {text}}}\n- Sparsify:\n    pattern: {text}\n"
    )
    recipe = read_recipe(path, [f"passes.0.pattern={text}"])
    assert recipe.passes == [Sparsify(pattern="2:4"), Sparsify(pattern="2:4")]
    assert recipe.seed == 16


def test_options_are_checked_alike_in_python() -> None:
    taken = RemoveChannels(ratio=np.float32(0.5), round_to=np.int64(8), kinds=["channel"], include="stem.*")
    assert taken == RemoveChannels(ratio=0.5, round_to=8, kinds=("channel",), include=("stem.*",))
    assert [type(value) for value in (taken.ratio, taken.round_to)] == [float, int]
    assert RemoveChannels(ratio=torch.tensor(0.25)).ratio == 0.25
    assert isinstance(RemoveChannels(macs=1000).macs, float)
    for options, message in [
        ({"ratio": "0.5"}, "RemoveChannels.ratio: a number, not '0.5'"),
        ({"ratio": True}, "RemoveChannels.ratio: a number, not True"),
        ({"kinds": [3]}, "RemoveChannels.kinds: a list of texts, not [3]"),
        ({"latency": [1]}, "RemoveChannels.latency: a number or text, not [1]"),
        ({"train": {"epochs": 2}}, "RemoveChannels.train: a Distill, not {'epochs': 2}"),
    ]:
        with pytest.raises(BadInput, match=f"^{re.escape(message)}$"):
            RemoveChannels(**options)
    with pytest.raises(BadInput, match=r"^Training.epochs: a whole number, not '3'$"):
        Training(epochs="3")


def test_an_importance_may_be_a_function_and_sizes_go_by_pattern() -> None:
    options = {"importance": "tests.passes.channels.test_own_choices:norms", "keep": {"layer4.*": 0.5, "stem*": 32}}
    (pass_,) = parse_recipe(GOOD | {"passes": [{"RemoveChannels": {**options, "scope": "isomorphic"}}]}).passes
    from tests.passes.channels.test_own_choices import norms

    assert pass_.importance is norms
    assert pass_.options()["importance"] == "tests.passes.channels.test_own_choices:norms"
    assert pass_.options()["keep"] == {"layer4.*": 0.5, "stem*": 32}
    for name, says in (("nowhere:norms", 'cannot import "nowhere"'), ("operator:nothing", "operator has no")):
        with pytest.raises(BadInput, match=rf"^passes\.0\.RemoveChannels\.importance: {says}"):
            parse_recipe(GOOD | {"passes": [{"RemoveChannels": {"importance": name}}]})


def test_an_heir_without_checks_of_its_own_has_those_of_its_base() -> None:
    @dataclass(frozen=True)
    class Longer(Distill):
        more: int = 1

    with pytest.raises(BadInput, match=r"^Longer.more: a whole number, not 'x'$"):
        Longer(more="x")
    with pytest.raises(BadInput, match=r"^Longer.epochs: at least 1, not 0$"):
        Longer(epochs=0)


def test_only_options_that_may_be_no_take_false() -> None:
    with pytest.raises(BadInput, match=r"passes.0.Distill.optimizer: adamw or sgd, not False"):
        parse_recipe(GOOD | {"passes": [{"Distill": {"optimizer": False}}]})


def test_engines_take_options() -> None:
    engines = ["rtx-sm86", {"target": "agx-orin", "dla": 0, "batch": [1, 2, 4], "sparse": False}]
    first, second = parse_recipe(GOOD | {"outputs": {"engines": engines}}).outputs.engines
    assert (first.target, first.options.given()) == ("rtx-sm86", {})
    assert second.options == EngineOptions(dla=0, batch=[1, 2, 4], sparse=False)
    assert second.options.given() == {"dla": 0, "batch": [1, 2, 4], "sparse": False}


def test_every_public_pass_can_be_named() -> None:
    assert {"Comb", "RemoveChannels"} <= set(known_passes())
    assert "Pass" not in known_passes()


def test_a_pass_inside_a_pass_takes_its_options() -> None:
    tree = GOOD | removal(macs=0.25, interval=20, train={"epochs": 3, "lr": 0.001})
    override(tree, "passes.0.train.alpha=0.5")
    [pass_] = parse_recipe(tree).passes
    assert pass_ == RemoveChannels(macs=0.25, interval=20, train=Distill(epochs=3, lr=0.001, alpha=0.5))
    assert parse_recipe(GOOD | removal(train=None)).passes == [RemoveChannels()]
    assert parse_recipe(GOOD | removal(train={})).passes == [RemoveChannels(train=Distill())]


def removal(**options: object) -> dict:
    return {"passes": [{"RemoveChannels": options}]}


HERE = "passes.0.RemoveChannels"
MISTAKES = [
    ({"modle": "x"}, "modle: unknown key; did you mean model?"),
    ({"passes": ["RemoveChanels"]}, 'passes.0: unknown pass "RemoveChanels"; did you mean RemoveChannels?'),
    (removal(ration=0.5), f"{HERE}.ration: unknown option; did you mean ratio"),
    ({"passes": [{"Comb": {"x": 1}}]}, "passes.0.Comb.x: unknown option; the pass takes none"),
    (removal(ratio="half"), f"{HERE}.ratio: a number, not 'half'"),
    (removal(ratio=1.5), f"{HERE}.ratio: a share"),
    (removal(ratio=float("nan")), f"{HERE}.ratio: a finite number, not nan"),
    (removal(round_to=2.5), f"{HERE}.round_to: a whole number, not 2.5"),
    (removal(min_channels=True), f"{HERE}.min_channels: a whole number, not True"),
    (removal(ratio=0.5, macs=0.5), f"{HERE}: give one of"),
    (removal(train={"epoch": 3}), f"{HERE}.train.epoch: unknown option; did you mean epochs"),
    (removal(train={"epochs": 0}), f"{HERE}.train.epochs: at least 1, not 0"),
    (removal(train={"lr": "low"}), f"{HERE}.train.lr: a number, not 'low'"),
    (removal(train=3), f"{HERE}.train: expected options as a mapping, got 3"),
    (removal(schedule="never"), f"{HERE}.schedule: adaptive, iterative or one-shot, not 'never'"),
    ({"passes": [{"RemoveChannels": 0.5}]}, f"{HERE}: expected options as a mapping, got 0.5"),
    ({"passes": [{"Comb": {}, "RemoveChannels": {}}]}, "passes.0: expected a pass name or one"),
    ({"passes": "Comb"}, "passes: should be a valid list"),
    ({"seed": -1}, "seed: should be greater than or equal to 0, got -1"),
    ({"seed": "one"}, 'seed: should be a valid integer, got "one"'),
    ({"precision": "fp61"}, "precision: should be 'fp32' or 'fp16', got \"fp61\""),
    ({"inputs": [[1, 3, 0, 8]]}, "inputs.0.shape.2: should be greater than 0, got 0"),
    ({"inputs": [{"shape": [1], "dtyp": "int64"}]}, "inputs.0.dtyp: unknown key; did you mean dtype?"),
    ({"outputs": {"onyx": True}}, "outputs.onyx: unknown key; did you mean onnx?"),
    ({"outputs": {"engines": "rtx"}}, "outputs.engines: should be a valid list"),
    (
        {"outputs": {"engines": [{"target": "cpu", "spars": True}]}},
        "outputs.engines.0.spars: unknown key; did you mean",
    ),
    ({"outputs": {"engines": [{"sparse": True}]}}, "outputs.engines.0.target: missing"),
    (
        {"outputs": {"engines": [{"target": "cpu", "workspace": 0}]}},
        "outputs.engines.0.workspace: a whole number of MiB, from 1 up, not 0",
    ),
    ({"outputs": {"engines": [{"target": 3}]}}, "outputs.engines.0.target: text, not 3"),
    (
        {"outputs": {"engines": ["cpu", {"target": "cpu", "threads": "all"}]}},
        "outputs.engines.1.threads: a whole number",
    ),
    ({"outputs": {"engines": [{"target": "cpu", "batch": [1, 2]}]}}, "outputs.engines.0.batch: three are needed"),
    ({"outputs": {"tolerance": 0}}, "outputs.tolerance: should be greater than 0"),
    ({"model": {"source": "a:b", "argument": {}}}, "model.argument: unknown key; did you mean arguments?"),
    ({"model": 3}, "model.source: should be a valid string, got 3"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_mistakes_name_the_field_and_what_is_valid(change: dict, message: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_recipe(GOOD | change)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(BadInput, match=r"^passes: missing$"):
        parse_recipe({"model": "a:b"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1", r"recipe.yaml:1:10: not valid YAML"),
        ("model: a:b\nmodel: c:d\n", r'recipe.yaml:2:1: not valid YAML \(key "model" twice\)'),
        ("- model", "recipe.yaml: expected a mapping at the top, found list"),
        ("", "recipe.yaml: expected a mapping at the top, found NoneType"),
        ("a: !!python/object:os.system {}", "recipe.yaml:1:4: not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_recipe(path)


def test_binary_and_absent_files(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not a text file"):
        read_yaml(tmp_path / "r.yaml")
    with pytest.raises(BadInput, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")


def test_overrides() -> None:
    tree = {"model": "a:b", "passes": ["Comb", {"RemoveChannels": {"ratio": 0.5}}, {"RemoveChannels": None}]}
    for text in ("passes.1.ratio=0.25", "passes.2.RemoveChannels.macs=1000", "model.arguments.depth=18", "seed=3"):
        override(tree, text)
    override(tree, "passes.0=RemoveChannels")
    recipe = parse_recipe(tree)
    assert recipe.passes == [RemoveChannels(), RemoveChannels(ratio=0.25), RemoveChannels(macs=1000)]
    assert recipe.model.arguments == {"depth": 18}
    assert recipe.seed == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes.0.ratio", "expected path=value"),
        ("passes.7.ratio=1", '"7" is not an index below 1'),
        ("seed.x=1", "seed holds a single value"),
        ("seed=[1", "is not valid YAML"),
    ],
)
def test_overrides_that_do_not_fit(text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        override({"model": "a:b", "seed": 1, "passes": ["Comb"]}, text)
