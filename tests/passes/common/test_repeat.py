"""What a stored result depends on: anything changed starts anew, nothing changed goes on."""

import functools
import itertools
import shutil
import textwrap
import warnings

import pytest
import torch
from torch.nn import functional as F

from graphcomb import Pipeline, capture
from graphcomb.graph.errors import BadInput
from graphcomb.passes import Distill, PruneDepth, Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.common.repeat import code_of, sample
from graphcomb.passes.sparse.statistics.gradients import Gradients

from ..toys import Cut, Stop, batches, captured, same, state


def loss(outputs, labels):
    return F.cross_entropy(outputs, labels)


def made(source, **names):
    """The function `f` of a piece of code, compiled anew each time."""
    scope = {"__name__": __name__, "F": F, **names}
    exec(textwrap.dedent(source), scope)
    return scope["f"]


PLAIN = "def f(x, y):\n    return F.cross_entropy(x, y) * 2"
CHANGED = {
    "constant": "def f(x, y):\n    return F.cross_entropy(x, y) * 3",
    "call": "def f(x, y):\n    return F.mse_loss(x, y) * 2",
    "default": "def f(x, y=1):\n    return F.cross_entropy(x, y) * 2",
}


@pytest.mark.parametrize("name", CHANGED)
def test_functions_are_known_by_what_they_do(name):
    same_code = "def f(x, y):\n    # a comment moves lines, and decides nothing\n\n    return F.cross_entropy(x, y) * 2"
    assert code_of(made(PLAIN)) == code_of(made(PLAIN)) == code_of(made(same_code))
    assert code_of(made(CHANGED[name])) != code_of(made(PLAIN))


class Weighted(torch.nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, outputs, labels):
        return F.cross_entropy(outputs, labels, self.weight)


class Scaled:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, outputs, labels):
        return self.factor * F.cross_entropy(outputs, labels)

    def half(self, outputs, labels):
        return self(outputs, labels) / 2


def closure(factor):
    def f(outputs, labels):
        return factor * F.cross_entropy(outputs, labels)

    return f


def helped(factor):
    helper = made(f"def f(x):\n    return {factor} * x")
    return made("def f(x, y):\n    return helper(F.cross_entropy(x, y))", helper=helper)


@pytest.mark.parametrize(
    "make",
    [
        closure, helped, Scaled, lambda v: Scaled(v).half, lambda v: functools.partial(loss, scale=v),
        lambda v: Weighted([1.0, v]), lambda v: {"a": [v, {v}]}, lambda v: torch.full((3,), float(v)),
        lambda v: made("def f(x, y):\n    return FACTOR * x", FACTOR=v), lambda v: [torch.float16, v],
    ],
)  # fmt: skip
def test_what_functions_and_objects_hold_counts(make):
    assert code_of(make(2)) == code_of(make(2))
    assert code_of(make(2)) != code_of(make(3))


def test_values_that_cannot_be_looked_at_have_a_code_all_the_same():
    ring = [1]
    ring.append(ring)
    count = itertools.count()
    before = code_of([count, ring, open, torch.Generator()])
    next(count)
    assert code_of([count, ring, open, torch.Generator()]) == before
    assert code_of(captured()) == code_of(captured())


def other_labels(data):
    return [(x, (y + 1) % 4) for x, y in data]


def last_changed(data):
    return [*data[:-1], (data[-1][0] + 1, data[-1][1])]


@functools.cache
def small(seed=0):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    return capture(net, torch.randn(2, 3, 4, 4), dynamic_shapes="batch")


def pairs(count, seed=0):
    return [(x[..., :4, :4].contiguous(), y) for x, y in batches(count, seed)]


DATA = pairs(8)
CHANGES = {
    "labels": {"data": other_labels(DATA)},
    "images": {"data": [(x + 1, y) for x, y in DATA]},
    "loss": {"loss": lambda outputs, labels: -F.cross_entropy(outputs, labels)},
    "metric": {"metric": lambda outputs, labels: outputs.amax(1)},
    "teacher": {"teacher": small(seed=1)},
    "val": {"val": pairs(2, seed=5)},
}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """What trains in a context, its checkpoint after an interruption, and the weights of a whole run."""
    folder, train = tmp_path_factory.mktemp("run"), Distill(epochs=2, lr=1e-2, checkpoint_every=3, warmup=0.0)
    context = {"data": DATA, "val": pairs(2, seed=3), "teacher": small(seed=2), "loss": loss}
    with pytest.raises(Stop):
        train(small(), **context | {"data": Cut(DATA, 12)}, out=folder / "cut")
    (checkpoint,) = (folder / "cut").iterdir()
    return train, context, checkpoint, state(train(small(), **context, out=folder / "whole").program)


@pytest.mark.parametrize("change", CHANGES)
def test_training_goes_on_only_where_nothing_has_changed(change, interrupted, tmp_path):
    train, context, checkpoint, whole = interrupted
    program, other = small(), context | CHANGES[change]
    shutil.copy(checkpoint, tmp_path)
    with pytest.warns(UserWarning, match="Distill starts anew, what is stored there belongs to another run"):
        changed = train(program, **other, out=tmp_path)
    assert "resumed_at" not in changed.record
    assert same(state(changed.program), state(train(program, **other, out=tmp_path / "new").program))
    shutil.copy(checkpoint, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again = train(program, **context, out=tmp_path)
    assert again.record["resumed_at"] == 12
    assert same(state(again.program), whole)


class Unrepeatable:
    """Data that no seed decides."""

    draw = torch.Generator().manual_seed(0)

    def __len__(self):
        return 8

    def __iter__(self):
        for x, y in DATA:
            yield x + torch.rand(x.shape, generator=self.draw), y


def test_data_that_never_repeats_itself_does_not_stop_a_run_from_going_on(tmp_path):
    program, train = small(), Distill(epochs=2, checkpoint_every=3)
    with pytest.raises(Stop):
        train(program, data=Cut(Unrepeatable(), 12), out=tmp_path)
    assert train(program, data=Unrepeatable(), out=tmp_path).record["resumed_at"] == 12


def test_stages_of_depth_pruning_are_taken_up_only_where_nothing_has_changed(tmp_path):
    program, data = captured(), batches(3)
    prune = PruneDepth(names=("3.body",), calibrate=1, train=Distill(steps=2), merged=False)
    context = {"data": data, "teacher": program, "loss": loss}
    prune(program, **context, out=tmp_path)
    assert prune(program, **context, out=tmp_path).record["train"] == {"resumed": True}
    for change in ({"data": last_changed(data)}, {"loss": CHANGES["loss"]["loss"]}, {"teacher": captured(seed=1)}):
        with pytest.warns(UserWarning, match="PruneDepth's pruned starts anew"):
            changed = prune(program, **context | change, out=tmp_path)
        assert "resumed" not in changed.record["train"]
    prune(program, **context, out=tmp_path)  # the last batch's change had taken its place
    (file,) = [f for f in tmp_path.iterdir() if f.stat().st_mtime == max(g.stat().st_mtime for g in tmp_path.iterdir())]
    file.write_bytes(b"half a file")
    with pytest.raises(BadInput, match="delete it to start this stage anew"):
        prune(program, **context, out=tmp_path)


def times(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """A pass, its context, and the folder of its snapshots, which a second run leaves as they are."""
    pass_ = Sparsify(schedule=((0, 0.5),), method="magnitude", include=("1.*",), train=Distill(epochs=1))
    context = {"data": DATA, "val": pairs(2, seed=3), "teacher": small(), "loss": loss}
    folder = tmp_path_factory.mktemp("snapshots")
    pass_(small(), **context, out=folder)
    before = times(folder)
    pass_(small(), **context, out=folder)
    assert times(folder) == before
    return pass_, context, folder


@pytest.mark.parametrize("change", [*CHANGES, "last batch"])
def test_snapshots_are_taken_up_only_where_nothing_has_changed(change, snapshots, tmp_path):
    pass_, context, folder = snapshots
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    other = context | (CHANGES | {"last batch": {"data": last_changed(DATA)}})[change]
    with pytest.warns(UserWarning, match=r"Sparsify's stage 0\.5000 starts anew"):
        changed = pass_(small(), **other, out=tmp_path)
    assert times(tmp_path) != times(folder)
    assert same(state(changed.program), state(pass_(small(), **other).program))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A pipeline, its context, and the folder of its passes, which a second run leaves as it is."""
    passes, folder = Pipeline([Distill(steps=2)]), tmp_path_factory.mktemp("finished")
    context = {"data": DATA, "val": pairs(2, seed=3), "teacher": small(), "loss": loss}
    passes.run(small(), **context, out=folder)
    before = times(folder / "passes")["00-Distill.pt2"]
    passes.run(small(), **context, out=folder)
    assert times(folder / "passes")["00-Distill.pt2"] == before
    return passes, context, folder


@pytest.mark.parametrize("change", [*CHANGES, "last batch"])
def test_finished_passes_are_taken_over_only_where_nothing_has_changed(change, finished, tmp_path):
    passes, context, folder = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    other = context | (CHANGES | {"last batch": {"data": last_changed(DATA)}})[change]
    with pytest.warns(UserWarning, match="00-Distill starts anew"):
        passes.run(small(), **other, out=tmp_path)
    assert times(tmp_path / "passes")["00-Distill.pt2"] != times(folder / "passes")["00-Distill.pt2"]


def test_a_sample_disturbs_nothing():
    own = torch.Generator().manual_seed(3)
    loader = torch.utils.data.DataLoader(list(range(16)), 4, shuffle=True, generator=own)
    states = torch.get_rng_state(), own.get_state()
    assert sample(loader, 0) == sample(loader, 0) != sample(loader, 1)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(own.get_state(), states[1])
    iterator = iter(DATA)
    assert sample(iterator, 0) == sample(None, 0) == []
    assert next(iterator) is DATA[0]


def test_gradients_given_up_in_the_middle_leave_no_state_behind():
    program = small()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.rand(1)
    stream = Gradients(16, "sample", "labels").stream(program, ["1.weight"], Context(data=DATA), 10)
    with torch.no_grad():
        assert not next(stream)["1.weight"].requires_grad
        assert not torch.is_grad_enabled(), "the caller's mode holds between two chunks"
    assert torch.is_grad_enabled()
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    with torch.no_grad():
        del stream
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
