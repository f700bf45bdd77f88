"""Gradual runs: every sparsity on the way, and a run that is taken up."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import graphcomb as g
from graphcomb.graph import sparse as masks
from graphcomb.passes import Distill, Sparsify
from graphcomb.passes.base import Context

from .toys import ORIN, batches, weights, zero_counts


def test_a_gradual_run_goes_on_with_the_same_order_of_the_data(program, tmp_path):
    x, y = (torch.cat(t) for t in zip(*batches(8), strict=True))
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator().manual_seed(3))
    options = {"schedule": ((0, 0.3), (1, 0.5)), "train": Distill(epochs=2, lr=1e-2), "gradients": 16, "block": 32}
    pass_ = Sparsify(snapshots=str(tmp_path), **options)
    whole = pass_(program, data=loader, teacher=program)
    next(tmp_path.glob("*0.5000*.pt2")).unlink()
    again = pass_(program, data=loader, teacher=program)
    for name, w in weights(whole.program).items():
        assert torch.equal(weights(again.program)[name], w)


def gradual(train, **options):
    return Sparsify(
        schedule=((1, 0.5), (2, 0.8)), train=Distill(epochs=3, lr=3e-3, schedule="linear", alpha=0.0), gradients=64,
        block=32, **options,
    )  # fmt: skip


def test_a_gradual_run_yields_every_sparsity_and_resumes(trained, tmp_path, monkeypatch):
    program, train, val = trained
    pass_ = gradual(train, snapshots=str(tmp_path))
    whole = pass_(program, data=train, val=val)
    assert [s["sparsity"] for s in whole.record["stages"]] == [0.0, 0.5, 0.8]
    assert [len(s["training"]["epochs"]) for s in whole.record["stages"]] == [1, 1, 1]
    assert all(s["val"] > 0.9 for s in whole.record["stages"])
    files = sorted(tmp_path.glob("*.pt2"))
    assert len(files) == 3
    for file, share in zip(files, (0.0, 0.5, 0.8), strict=True):
        snapshot = g.load(file)
        counts = zero_counts(snapshot)
        names = list(whole.record["sparse"])
        total = sum(weights(snapshot)[n].numel() for n in names)
        assert sum(counts[n] for n in names) == round(share * total)
    assert set(masks.sparse_weights(g.load(files[2]))) == set(names)
    files[2].unlink()
    again = pass_(program, data=train, val=val)
    for name, w in weights(whole.program).items():
        assert torch.equal(weights(again.program)[name], w), "taken up after the second stage, the same end"
    assert len(again.record["stages"]) == 3
    assert len(again.program.history) == len(program.history) + 1


def test_snapshots_of_another_run_are_not_taken(program, tmp_path):
    pass_ = Sparsify(schedule=((0, 0.5),), train=Distill(epochs=1), method="magnitude", snapshots=str(tmp_path))
    own = torch.Generator().manual_seed(3)
    x, y = (torch.cat(t) for t in zip(*batches(), strict=True))
    loader = DataLoader(TensorDataset(x, y), 8, shuffle=True, generator=own)
    other = program.copy()
    other.module().get_parameter("head.bias").data.add_(1)

    def files(data, **context):
        pass_(program, **({"data": data, "teacher": program} | context))
        return len(list(tmp_path.glob("*.pt2")))

    states = torch.get_rng_state(), own.get_state()
    code = pass_._run_code(program, Context(data=loader))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(own.get_state(), states[1])
    assert pass_._run_code(program, Context(data=loader, seed=1)) != code
    assert [files(loader), files(loader)] == [1, 1], "the same run"
    assert files(loader, teacher=other) == 2
    assert files(batches()) == 3, "other batches"
    assert files(batches(3)) == 4, "another length"
    assert files(batches(), target=ORIN) == 5
    assert files(batches(), dtype="fp32") == 6
    assert files(batches(), loss=lambda out, y: 2 * F.cross_entropy(out, y)) == 7
    assert files(batches()) == 7
    again = pass_(program, data=batches(), teacher=program, val=batches())
    assert 0 <= again.record["stages"][0]["val"] <= 1, "a taken stage is scored, too"


def test_without_a_folder_a_gradual_run_leaves_nothing_behind(trained):
    program, train, _ = trained
    result = Sparsify(schedule=((0, 0.5),), train=Distill(epochs=1, alpha=0), method="magnitude")(program, data=train)
    assert [s["sparsity"] for s in result.record["stages"]] == [0.5]
    assert masks.sparse_weights(result.program) == dict.fromkeys(result.record["sparse"])
