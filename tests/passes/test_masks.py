"""Zeros survive every later pass, file and export, or the pass is refused with the right order."""

import onnx
import pytest
import torch
from torch import nn

import graphcomb as g
from graphcomb.graph import sparse as masks
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.comb.surgery import remove
from graphcomb.graph.errors import Refused
from graphcomb.passes import Distill, Fuse, RemoveChannels, Sparsify
from graphcomb.passes.base import Pass, PassResult
from graphcomb.runtime import export_onnx
from graphcomb.runtime.export.sparsity import check_sparsity, sparse_weights

from .depth.toys import Tied
from .toys import Cut, Stop, draws


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 24),
        nn.ReLU(), nn.Linear(24, 5),
    )  # fmt: skip


def batches(count=4):
    return draws(count, (8, 3, 12, 12), 5)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    model = network()
    model(torch.randn(64, 3, 12, 12))
    return g.capture(model.eval(), torch.randn(2, 3, 12, 12), dynamic_shapes="batch")


@pytest.fixture(scope="module")
def sparse(program):
    return Sparsify(pattern="2:4", where="all", gradients=16, block=48)(program, data=batches()).program


@pytest.fixture(scope="module")
def scattered(program):
    return Sparsify(sparsity=0.7, gradients=16, block=48)(program, data=batches()).program


def zeros_of(program):
    return {n: (w == 0).clone() for n, w in program.module().named_parameters() if n in masks.sparse_weights(program)}


def test_masks_are_the_zeros_of_the_recorded_weights(sparse, scattered):
    assert masks.sparse_weights(sparse) == dict.fromkeys(("3.weight", "6.weight", "11.weight"), "2:4")
    assert set(masks.sparse_weights(scattered).values()) == {None}
    assert all(torch.equal(mask, zeros_of(sparse)[n]) for n, mask in masks.zeros(sparse).items())
    assert all(masks.legal(masks.weight(sparse, n), "2:4") for n in zeros_of(sparse))
    assert not any(masks.legal(masks.weight(scattered, n), "2:4") for n in zeros_of(scattered))
    assert masks.weight(sparse, "no.such") is None


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_holds_the_zeros_and_moves_the_rest(sparse, optimizer):
    before = zeros_of(sparse)
    old = {n: w.detach().clone() for n, w in sparse.module().named_parameters()}
    result = Distill(epochs=2, lr=1e-2, optimizer=optimizer)(sparse, data=batches(), teacher=sparse)
    after = zeros_of(result.program)
    for name, mask in before.items():
        assert torch.equal(after[name], mask)
        assert (result.program.module().get_parameter(name)[~mask] != old[name][~mask]).float().mean() > 0.9


def test_a_resumed_training_holds_them_too(sparse, tmp_path):
    distill = Distill(epochs=3, lr=1e-2, alpha=0)
    whole = distill(sparse, data=batches())
    with pytest.raises(Stop):
        distill(sparse, data=Cut(batches(), 6), out=tmp_path)
    resumed = distill(sparse, data=batches(), out=tmp_path)
    assert resumed.record["resumed_at"] == 4
    for name, mask in zeros_of(sparse).items():
        assert torch.equal(zeros_of(resumed.program)[name], mask)
        assert torch.equal(masks.weight(resumed.program, name), masks.weight(whole.program, name))


def test_zeros_survive_storage(sparse, tmp_path):
    loaded = g.load(sparse.save(tmp_path / "sparse.pt2"))
    assert masks.sparse_weights(loaded) == masks.sparse_weights(sparse)
    trained = Distill(epochs=1, lr=1e-2, alpha=0)(loaded, data=batches()).program
    assert all(torch.equal(zeros_of(trained)[n], mask) for n, mask in zeros_of(sparse).items())


def test_folding_a_normalisation_keeps_zeros_and_pattern(sparse):
    fused = Fuse()(sparse)
    assert len(fused.record["changed"]) >= 3
    assert all(torch.equal(zeros_of(fused.program)[n], mask) for n, mask in zeros_of(sparse).items())
    assert masks.sparse_weights(fused.program) == masks.sparse_weights(sparse)


@pytest.mark.parametrize("target", [{"pattern": "2:4", "where": "all"}, {"sparsity": 0.5}])
def test_layers_are_merged_before_they_are_sparse_and_not_after(target):
    """Two 1x1 convolutions that are cheaper as one, and a skip that would fill a diagonal."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.wide, self.narrow, self.skip = nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 1), nn.Conv2d(8, 8, 1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            x = self.norm(self.narrow(self.wide(self.stem(x).relu()))).relu()
            return self.last((x + self.skip(x)).relu())

    torch.manual_seed(0)
    dense = g.capture(Linear().eval(), torch.randn(2, 3, 5, 5), dynamic_shapes="batch")
    free = Fuse()(dense)
    assert "narrow.weight" not in dict(free.program.module().named_parameters())
    early = Sparsify(method="magnitude", **target)(dense).program
    late = Fuse()(early)
    assert {"wide.weight", "narrow.weight", "skip.weight"} == set(masks.sparse_weights(late.program))
    assert all(torch.equal(zeros_of(late.program)[n], mask) for n, mask in zeros_of(early).items())
    assert sum("run Fuse before Sparsify" in r["why"] for r in late.record["refused"]) >= 2
    assert [c["into"] for c in late.record["changed"]] == ["narrow.weight"], "the normalisation still folds"


def test_removing_channels_takes_their_part_of_the_mask_along(scattered):
    result = RemoveChannels(ratio=0.5, round_to=1)(scattered)
    found = zeros_of(result.program)
    for name, mask in zeros_of(scattered).items():
        for dim, indices in result.removed.get(name, {}).items():
            kept = [i for i in range(mask.shape[dim]) if i not in indices]
            mask = mask.index_select(dim, torch.tensor(kept))
        assert torch.equal(found[name], mask)
    trained = Distill(epochs=1, lr=1e-2, alpha=0)(result.program, data=batches()).program
    assert all(torch.equal(zeros_of(trained)[n], mask) for n, mask in found.items())


def test_removing_channels_that_breaks_the_pattern_is_refused_with_the_right_order(sparse):
    with pytest.raises(Refused) as error:
        RemoveChannels(ratio=0.3, round_to=1)(sparse)
    text = str(error.value)
    assert "would break the pattern of" in text
    assert "run RemoveChannels before Sparsify" in text


@pytest.fixture(scope="module")
def twice(sparse):
    """2:4 first, and more zeros outside the pattern later."""
    return Sparsify(sparsity=0.6, method="magnitude", scope="uniform")(sparse)


def test_more_zeros_leave_the_pattern(sparse, twice, tmp_path):
    assert set(twice.record["sparse"].values()) == {"2:4"}
    assert masks.sparse_weights(twice.program) == masks.sparse_weights(sparse)
    with pytest.raises(Refused, match="would break the pattern of"):
        RemoveChannels(ratio=0.3, round_to=1)(twice.program)
    export_onnx(Fuse()(twice.program).program, tmp_path / "sparse.onnx")
    model = onnx.load(str(tmp_path / "sparse.onnx"))
    with pytest.raises(Refused, match="no weight of the ONNX file has it so"):
        check_sparsity(Fuse()(twice.program).program, _filled(model))


def test_a_record_without_a_pattern_leaves_the_one_before(sparse):
    later = sparse.copy()
    later.history.append({"sparse": dict.fromkeys(masks.sparse_weights(sparse))})
    assert masks.sparse_weights(later) == masks.sparse_weights(sparse)


def test_the_right_order_works(program):
    smaller = RemoveChannels(ratio=0.5, round_to=4)(program).program
    result = Sparsify(pattern="2:4", where="all", method="magnitude")(smaller).program
    assert len(masks.sparse_weights(result)) == 3
    assert all(masks.legal(masks.weight(result, n), "2:4") for n in masks.sparse_weights(result))


def test_whole_groups_of_four_may_go(sparse):
    comb = Comb(sparse)
    [group] = [x for x in comb.groups if x.frozen is None and ("6.weight", 1) in x.members]
    keep = torch.ones(group.size, dtype=torch.bool)
    keep[4:8] = False
    smaller, removed = remove(comb, {group.atom: keep.numpy()})
    masks.check_masks(sparse, smaller, removed, "RemoveChannels", False)
    keep[8] = False
    with pytest.raises(Refused, match="would break the pattern"):
        masks.check_masks(sparse, *remove(comb, {group.atom: keep.numpy()}), "RemoveChannels", False)


def test_channels_that_would_break_a_pattern_are_refused_before_training(sparse):
    with pytest.raises(Refused, match=r"pattern of 3\.weight.*run RemoveChannels before Sparsify"):
        RemoveChannels(macs=0.9, train=Distill(steps=10**9))(sparse, data=batches())


class Fill(Pass):
    def run(self, program, context):
        new = program.copy()
        new.module().get_parameter("6.weight").data.add_(1e-3)
        return PassResult(new, {"changed": ["6.weight"], "refused": []})


def test_a_pass_that_fills_zeros_is_refused(sparse):
    with pytest.raises(
        Refused, match=r"Fill: would fill up zeros of 6\.weight, which Sparsify made 2:4; run Fill before"
    ):
        Fill()(sparse)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_two_of_four_arrives_in_the_onnx_file(sparse, tmp_path, precision):
    fused = Fuse()(sparse).program
    report = export_onnx(fused, tmp_path / "sparse.onnx", precision=precision)
    model = onnx.load(str(tmp_path / "sparse.onnx"))
    found = [w for w in sparse_weights(model) if w.pattern]
    assert found == report.sparse
    assert sorted(w.op for w in found) in (["Conv", "Conv", "Gemm"], ["Conv", "Conv", "MatMul"])
    assert all(abs(w.sparsity - 0.5) < 1e-6 for w in found)
    with pytest.raises(Refused, match="no weight of the ONNX file has it so"):
        check_sparsity(fused, _filled(model))


def test_the_pattern_of_a_tied_weight_is_looked_for_under_all_its_names(tmp_path):
    torch.manual_seed(0)
    dense = g.capture(Tied(), torch.randn(2, 3), dynamic_shapes="batch")
    tied = Sparsify(pattern="2:4", where="all", method="magnitude")(dense).program
    export_onnx(tied, tmp_path / "tied.onnx")
    model = onnx.load(str(tmp_path / "tied.onnx"))
    with pytest.raises(Refused, match="no weight of the ONNX file has it so"):
        check_sparsity(tied, _filled(model))
    tied.history.append({"sparse": {"a.weight": "2:4", "b.weight": "2:4"}})
    export_onnx(tied, tmp_path / "tied.onnx")


def _filled(model):
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        tensor.CopyFrom(onnx.numpy_helper.from_array((values + (values == 0)).astype(values.dtype), tensor.name))
    return model
