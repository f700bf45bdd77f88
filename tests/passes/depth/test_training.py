"""Blocks that fade while the network trains, and the supernet of all choices."""

import dataclasses

import torch

from graphcomb.passes import Context, PruneDepth
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.prune_depth import ablated
from graphcomb.passes.depth.relax import SWITCHES, relax
from graphcomb.passes.depth.search import Judge
from graphcomb.passes.depth.training import Fading

from .toys import QUICK, digits


def fading(program, how, kind=PruneDepth):
    return kind(blocks=2, progress=how, share=4 / 6)._fading(program, find_blocks(program)[:2], 6, 0)


def test_the_schedule_moves_l_and_ends_with_the_pruned_forms(program):
    relaxed = relax(program, find_blocks(program)[:2], fitted=True)
    own, seen, surgeries = fading(program, "cosine"), [], []
    assert own.begin(relaxed.module()) is None
    for step in range(6):
        seen.append(relaxed.module().get_buffer(SWITCHES).tolist())
        surgeries.append(own.after_step(step, relaxed.module()))
    assert [round(a, 3) for a, _ in seen] == [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    assert [s is not None for s in surgeries] == [False, False, False, True, False, False]
    assert SWITCHES not in surgeries[3].module.state_dict()
    assert own.error <= 1e-12
    assert own.identity != fading(program, "linear").identity
    assert fading(program, "linear", ablated(fading=False)).begin(relaxed.module()) is not None


def test_training_goes_on_alike_in_the_pruned_forms(program, monkeypatch):
    """At `l = 0` the relaxed network and the pruned one give the same gradients."""
    options = PruneDepth(blocks=2, **{**QUICK, "supernet_steps": 0}, share=0.3, merged=False)
    pruned = options(program, data=digits(slice(None, 320))).program.module().state_dict()
    monkeypatch.setattr(Fading, "stays", property(lambda self: True, lambda self, value: None), raising=False)
    relaxed = options(program, data=digits(slice(None, 320))).program.module().state_dict()
    assert pruned.keys() == relaxed.keys()
    for key, tensor in pruned.items():
        torch.testing.assert_close(tensor, relaxed[key], rtol=1e-3, atol=1e-4)


def test_a_supernet_answers_without_its_blocks(program):
    """The loss of the pruned paths falls, and the dense path stays what it was."""
    blocks = [b for b in find_blocks(program) if b.prunable]
    options = PruneDepth(blocks=2, **{**QUICK, "supernet_steps": 60})
    context = Context(data=digits(slice(None, 1200)), val=digits(slice(1200, None)))
    budget = options.budget(program, blocks, context)
    bits = tuple(i < 2 for i in range(len(blocks)))
    raw, _ = dataclasses.replace(options, supernet_steps=0).supernet(program, blocks, context, budget)
    trained, record = options.supernet(program, blocks, context, budget)
    scores = [Judge(p, context, 4, 20)([bits])[0] for p in (raw, trained)]
    assert scores[1] > scores[0]
    assert record["steps"] == 60
    assert Judge(trained, context, 4, 20)([(False,) * len(blocks)])[0] > 0.6
