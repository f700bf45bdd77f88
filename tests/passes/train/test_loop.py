"""Training runs: what is frozen, modes and global state that stay the caller's, and where results are kept."""

import pytest
import torch

from graphcomb.graph.errors import BadInput
from graphcomb.passes import Comb, Distill, Fuse, PruneDepth, RemoveChannels, Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.common.scoring import evaluate

from ..toys import Cut, Stop, batches, captured, network, same, state

TRAIN = Distill(epochs=2, lr=1e-2, checkpoint_every=3, warmup=0.0)
TRAINED = {
    "distill": TRAIN,
    "channels": RemoveChannels(macs=0.6, interval=2, round_to=1, train=TRAIN),
    "depth": PruneDepth(names=("3.body",), calibrate=1, train=TRAIN),
    "sparsify": Sparsify(schedule=((0, 0.5), (1, 0.7)), gradients=8, block=16, train=TRAIN),
}
STOPS = {"depth": (13,), "sparsify": (15,)}  # batches in all: after the surgery, in the second stage


@pytest.mark.parametrize("name", TRAINED)
def test_with_frozen_parameters_an_interrupted_run_ends_where_a_whole_one_does(name, tmp_path):
    model = network()
    for part in (model[0], model[5], model[3].body[3]):
        part.requires_grad_(False)
    model[9].bias.requires_grad_(False)
    program, data = captured(model), batches()
    frozen = {n for n, p in program.module().named_parameters() if not p.requires_grad}
    whole = TRAINED[name](program, data=data, out=tmp_path / "whole")
    for stop in STOPS.get(name, (5, 13)):
        out = tmp_path / f"cut-{stop}"
        with pytest.raises(Stop):
            TRAINED[name](program, data=Cut(data, stop), out=out)
        assert list(out.iterdir()), "nothing is kept, so the test shows nothing"
        resumed = TRAINED[name](program, data=data, out=out)
        assert same(state(resumed.program), state(whole.program))
        left = {n for n, p in resumed.program.module().named_parameters() if not p.requires_grad}
        assert left == frozen & {n for n, _ in resumed.program.module().named_parameters()}
        if name == "distill":
            assert all(torch.equal(state(resumed.program)[n], state(program)[n]) for n in frozen)


def test_evaluate_leaves_frozen_normalisations_frozen():
    program, data = captured(), batches(2)
    module = program.module()
    for mode in ((True, False), (False, False)):
        module.train(mode[0], batch_norm=mode[1])
        code, before = module.code, {k: v.clone() for k, v in state(program).items()}
        score = evaluate(program, data)
        assert module.code == code
        assert module.training is mode[0]
        assert same(state(program), before)
        assert score == evaluate(program, data)
    with pytest.raises(BadInput, match="metric"):
        evaluate(program, data, lambda outputs, labels: outputs @ labels)
    assert module.code == code


def test_a_pass_that_changes_nothing_gives_a_program_of_its_own():
    program = captured()
    before = {k: v.clone() for k, v in state(program).items()}
    for pass_ in (Comb(), RemoveChannels(ratio=0.5, include=("9.*",)), Fuse()):
        result = pass_(program).program
        assert result.module() is not program.module()
        for parameter in result.module().parameters():
            parameter.data.zero_()
        assert same(state(program), before)


def test_a_folder_may_be_given_as_a_string(tmp_path):
    program, data = captured(), batches()
    assert Context(out=str(tmp_path)).out == tmp_path
    gradual = Sparsify(schedule=((0, 0.5),), gradients=8, block=16, train=Distill(epochs=1))
    assert len(gradual(program, data=data, out=str(tmp_path)).record["stages"]) == 1
    assert list(tmp_path.glob("sparsity-*.pt2"))
    PruneDepth(names=("3.body",), calibrate=1, train=Distill(steps=1))(program, data=data, out=str(tmp_path))
    assert list(tmp_path.glob("pruned-*"))
