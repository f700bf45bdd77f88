"""Budgets of blocks, MACs and predicted latency, and choices that keep the outputs connected with the inputs."""

import dataclasses
import random

import pytest
import torch

from graphcomb.graph.errors import BadInput, Refused, Unreachable
from graphcomb.passes import Context, Distill, Fuse, PruneDepth
from graphcomb.passes.depth.budget import Predictor
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.prune_depth import ablated
from graphcomb.passes.depth.relax import relax

from .toys import QUICK, PerMac, Sheet, digits, vit


def test_a_budget_of_macs_is_met_by_what_is_needed_and_no_more(program):
    options = PruneDepth(macs=0.8, **QUICK)
    prunable = [b for b in find_blocks(program) if b.prunable]
    budget = options.budget(program, prunable, Context())
    generator = random.Random(1)
    for _ in range(20):
        bits = budget.draw(generator)
        chosen = [b.saves for b, bit in zip(prunable, bits, strict=True) if bit]
        assert program.macs - sum(chosen) <= 0.8 * program.macs
        assert program.macs - sum(chosen) + min(chosen) > 0.8 * program.macs
        child = budget.child(bits, budget.draw(generator), generator)
        assert program.macs - sum(b.saves for b, bit in zip(prunable, child, strict=True) if bit) <= 0.8 * program.macs
    exactly = PruneDepth(blocks=3).budget(program, prunable, Context())
    assert all(sum(exactly.draw(generator)) == 3 for _ in range(9))


def test_a_budget_of_predicted_latency(program):
    options = ablated(search=False)(latency=0.85, **{**QUICK, "train": Distill(steps=2)})
    result = options(program, data=digits(slice(None, 1200)), latency=PerMac())
    seconds = [Predictor(Context(latency=PerMac()), p)(p) for p in (Fuse()(program).program, result.program)]
    assert seconds[1] <= 0.85 * seconds[0]
    with pytest.raises(BadInput, match="nothing predicts latencies"):
        options(program, data=digits(slice(None, 64)))


def test_a_latency_leaves_the_least_macs_of_every_choice(program):
    options = PruneDepth(latency=0.7, **{**QUICK, "train": Distill(steps=2)})
    prunable = [b for b in find_blocks(program) if b.prunable]
    shares = {}
    for least in (0.0, 0.7):
        budget = dataclasses.replace(options, least_macs=least).budget(program, prunable, Context(latency=Sheet()))
        draws = [budget.draw(random.Random(seed)) for seed in range(30)]
        draws += [budget.child(draws[i], draws[i + 1], random.Random(i)) for i in range(20)]
        draws.append(budget.greedy([0.0] * len(prunable)))
        assert all(budget.met(bits) for bits in draws)
        shares[least] = [
            1 - sum(b.saves for b, bit in zip(prunable, bits, strict=True) if bit) / program.macs for bits in draws
        ]
    assert min(shares[0.0]) < 0.7 <= min(shares[0.7])
    with pytest.raises(
        Unreachable, match=r"PruneDepth.latency: .* as a data sheet predicts, leaves .*least_macs is 99%"
    ):
        dataclasses.replace(options, least_macs=0.99).budget(program, prunable, Context(latency=Sheet()))


def test_a_prediction_without_measurements_leaves_a_quarter_of_the_macs(program):
    prunable = [b for b in find_blocks(program) if b.prunable]
    budget = PruneDepth(latency=0.7).budget(program, prunable, Context(latency=Sheet()))
    assert budget.spare == 0.75 * program.macs
    measured = PruneDepth(latency=0.7).budget(program, prunable, Context(latency=PerMac()))
    assert measured.spare == float("inf")
    for wrong in ({"latency": 0.5, "least_macs": 1.5}, {"macs": 0.5, "least_macs": 0.1}):
        with pytest.raises(BadInput, match=r"PruneDepth\.least_macs"):
            PruneDepth(**wrong)


def test_targets_that_cannot_be_met(program):
    data = digits(slice(None, 64))
    with pytest.raises(Unreachable, match="prunable blocks"):
        PruneDepth(blocks=99)(program, data=data)
    with pytest.raises(Unreachable, match="cannot be reached"):
        PruneDepth(macs=0.01)(program, data=data)
    with pytest.raises(BadInput, match="no block 'nobody'"):
        PruneDepth(names=("nobody",))(program, data=data)
    with pytest.raises(BadInput, match="needs data"):
        PruneDepth(blocks=1, supernet_steps=0)(program)


def test_attention_that_alone_connects_outputs_with_inputs_is_not_left_out_whole():
    network = vit()
    found = [b for b in find_blocks(network) if b.prunable]
    attention = tuple(b.name for b in found if b.dropped)
    assert len(attention) == 3
    with pytest.raises(Refused, match="no longer depend on the inputs; keep one of "):
        PruneDepth(names=attention, merged=False)(network, data=digits(slice(None, 64)))
    with pytest.raises(Unreachable, match=r"PruneDepth.blocks: without all attention"):
        PruneDepth(blocks=len(found), supernet_steps=0)(network, data=digits(slice(None, 64)))
    least = (network.macs - sum(b.saves for b in found)) / network.macs
    with pytest.raises(Unreachable, match=r"PruneDepth.macs: without all attention"):
        PruneDepth(macs=least * 1.001, supernet_steps=0)(network, data=digits(slice(None, 64)))


def test_every_choice_of_the_search_answers_to_its_inputs():
    network = vit()
    found = [b for b in find_blocks(network) if b.prunable]
    options = PruneDepth(blocks=len(found) - 1)
    budget = options.budget(network, found, Context())
    generator = random.Random(0)
    draws = [budget.draw(generator) for _ in range(30)]
    draws += [budget.child(draws[0], draws[1], generator) for _ in range(10)] + [budget.greedy([0.0] * len(found))]
    for bits in {*draws, budget.widest()}:
        assert sum(bits) == len(found) - 1
        small = relax(network, [b for b, bit in zip(found, bits, strict=True) if bit], settled=True).module().eval()
        answers = small(torch.randn(4, 1, 8, 8))
        assert (answers[0] - answers[1]).abs().max() > 1e-6


def test_attention_may_all_go_where_the_outputs_read_every_token():
    network = vit(pooled=True)
    found = [b for b in find_blocks(network) if b.prunable]
    bits = PruneDepth(blocks=len(found)).budget(network, found, Context()).widest()
    assert all(bits)
