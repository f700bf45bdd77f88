"""What stays lost after repair, against removing and refitting by hand."""

import numpy as np
import pytest
import torch
from torch import nn

import graphcomb
from graphcomb.graph.comb.surgery import remove
from graphcomb.models import SmallResNet
from graphcomb.passes import Context, RemoveChannels, Repair, Sparsify
from graphcomb.passes.channels.importance.scores import importance_of, losses_of
from graphcomb.passes.repair import images, readers, score


def network(copies: bool = False) -> nn.Module:
    torch.manual_seed(0)
    first, last = nn.Linear(12, 10), nn.Linear(10, 3)
    if copies:
        with torch.no_grad():
            first.weight[5:] = first.weight[:5]
            first.bias[5:] = first.bias[:5]
            last.weight[:, 5:] *= 10  # large, so that only the repair tells that they can go
    return nn.Sequential(first, nn.Tanh(), last).double().eval()


def batches(count: int = 200) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count, 12, dtype=torch.float64, generator=generator).split(50))


def comb(model: nn.Module) -> graphcomb.Comb:
    return graphcomb.comb(graphcomb.capture(model, torch.zeros(2, 12).double(), dynamic_shapes="batch"))


def test_the_first_index_to_go_costs_what_refitting_by_hand_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "RIDGES", (1e-9,))
    model, x = network(), torch.cat(batches())
    found = comb(model)
    (group,) = [g for g in found.groups if g.frozen is None]
    (reader,), count = readers.readers(found, [group], Context(data=batches()), 1000)
    assert count == len(x)
    order, losses = score.Losses(found, [group], Context(data=batches()), 1000)._order(group)
    hidden = model[:2](x).detach()
    root = (reader.sensitivity * reader.coherent[0] / reader.coherent[1] / len(x)).sqrt()
    lost = []
    for i in range(10):
        rest = torch.cat([hidden[:, [j for j in range(10) if j != i]], torch.ones(len(x), 1)], 1)
        column = hidden[:, i : i + 1]
        residual = column - rest @ torch.linalg.lstsq(rest, column).solution
        squares = residual.square().sum() * (root * model[2].weight[:, i].detach()).square().sum()
        lost.append(float(squares) / len(x))
    assert order[0] == int(np.argmin(lost))
    assert losses[0] == pytest.approx(lost[order[0]], rel=1e-5)


class Pooled(nn.Module):
    """Two readers of one group, one with a kernel, behind which positions are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(2, 8, 3, padding=1)
        self.left, self.right = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.body(x))
        return self.head(torch.relu(self.left(x) + self.right(x)).mean((2, 3)))


def pooled() -> tuple[nn.Module, list[torch.Tensor]]:
    torch.manual_seed(3)
    model = Pooled().double().eval()
    with torch.no_grad():
        model.head.weight.mul_(8)
    return model, list((torch.randn(96, 2, 6, 6) + 2 * torch.randn(96, 2, 1, 1)).double().split(16))


def test_what_a_part_of_a_group_loses_is_the_gauss_newton_form_on_the_other_half(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By hand: refits by least squares on one half, the change of the readers run on the other, gradients by autograd."""
    monkeypatch.setattr(readers, "RIDGES", (1e-9,))
    model, data = pooled()
    found = graphcomb.comb(graphcomb.capture(model, data[0][:2], dynamic_shapes="batch"))
    (group,) = [g for g in found.groups if g.name == "body.weight:0"]
    context = Context(data=data)
    losses = score.Losses(found, [group], context, 1000)
    order, _ = losses._order(group)
    factors = losses._factors({group.atom: order})[group.atom]
    assert list(factors) == [1, 2, 5]  # of eight indices
    every = torch.cat(data)
    part = torch.arange(len(every)) % 2
    hidden = torch.relu(model.body(every)).detach()

    def by_hand(gone: list[int]) -> float:
        left = [i for i in range(8) if i not in gone]
        products = torch.zeros(len(every), dtype=torch.float64)
        taps = {}
        for k in range(2):
            rows = hidden[part == k].movedim(1, -1).flatten(0, -2)
            rows = rows - rows.mean(0)
            taps[k] = torch.linalg.lstsq(rows[:, left], rows[:, gone]).solution.T, hidden[part == k].mean((0, 2, 3))
        generator = torch.Generator().manual_seed(0)
        for start in range(0, len(every), 16):
            x = hidden[start : start + 16]
            outputs = [layer(x).detach().requires_grad_() for layer in (model.left, model.right)]
            logits = model.head(torch.relu(sum(outputs)).mean((2, 3)))
            log = logits.log_softmax(1)
            chosen = torch.multinomial(log.detach().exp(), 1, generator=generator)
            gradients = torch.autograd.grad(log.gather(1, chosen).sum(), outputs)
            for k, (mix, mean) in taps.items():
                on = part[start : start + 16] == 1 - k
                for layer, gradient in zip((model.left, model.right), gradients, strict=True):
                    weight = layer.weight.detach().clone()
                    weight[:, left] = torch.einsum("ogij,gk->okij", layer.weight.detach()[:, gone], mix)
                    weight[:, gone] = -layer.weight.detach()[:, gone]
                    change = nn.functional.conv2d(x[on], weight, padding=layer.padding)
                    change = change - torch.einsum("ocij,c->o", weight, mean)[:, None, None]
                    products[torch.arange(start, start + 16)[on]] += (change * gradient[on]).sum((1, 2, 3))
        return float(products.square().mean())

    for count, lost in factors.items():
        assert lost == pytest.approx(by_hand(order[:count]), rel=1e-5)
    monkeypatch.setattr(score, "LEAST", 0.0)
    scores = np.sort(losses.scores()[group.atom])
    assert scores[0] == pytest.approx(factors[1], rel=1e-6)  # the curve goes through the first of them
    assert np.cumsum(scores)[4] == pytest.approx(factors[5], rel=0.5)


def test_what_seems_to_lose_nothing_keeps_a_share_of_what_the_diagonal_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that show nothing of what channels stand for say that these channels can go."""
    model, data = pooled()
    found = graphcomb.comb(graphcomb.capture(model, data[0][:2], dynamic_shapes="batch"))
    (group,) = [g for g in found.groups if g.name == "body.weight:0"]
    losses = score.Losses(found, [group], Context(data=data), 1000)
    order, diagonal = losses._order(group)
    for share, kept in ((1e-6, score.LEAST), (0.5, 0.5), (3.0, 3.0)):
        told = {c: share * float(np.cumsum(diagonal)[c - 1]) for c in (1, 2, 5)}
        monkeypatch.setattr(losses, "_factors", lambda orders, told=told: {group.atom: told})
        expected = np.maximum.accumulate(kept * diagonal)
        np.testing.assert_allclose(losses.scores()[group.atom][order], expected, rtol=1e-9)


def test_half_of_the_scores_is_the_divergence_that_is_measured_afterwards() -> None:
    """Of all groups of a small residual network, within a factor of four; it is measured on other images."""
    torch.manual_seed(0)
    model = SmallResNet(width=8).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    data = list(
        (
            torch.randn(160, 1, 16, 16) + 2 * torch.randn(160, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        ).split(32)
    )
    with torch.no_grad():
        model.train()
        for _ in range(20):
            for x in data:
                model(x)
        model.eval()
    program = graphcomb.capture(model, data[0][:2], dynamic_shapes="batch")
    found = graphcomb.comb(program)
    groups = [g for g in found.groups if g.frozen is None and g.kind == "channel"]
    context = Context(data=data[:4])
    scores = score.Losses(found, groups, context, 1000).scores()
    dense = program.module().eval()(data[4]).detach().log_softmax(1)
    ratios = []
    for group in groups:
        order = np.argsort(scores[group.atom], kind="stable")
        mask = np.ones(group.size, dtype=bool)
        mask[order[: group.size // 4]] = False
        smaller, removed = remove(found, {group.atom: mask})
        Repair(samples=1000, include=tuple(name for name, _ in group.members)).apply(program, smaller, removed, context)
        after = smaller.module().eval()(data[4]).detach().log_softmax(1)
        measured = float((dense.exp() * (dense - after)).sum(1).mean())
        ratios.append(measured / (scores[group.atom][~mask].sum() / 2))
    assert len(ratios) > 3
    assert max(ratios) < 4, ratios
    assert min(ratios) > 1 / 4, ratios


def test_scores_are_those_of_one_sample() -> None:
    """As those of axes that no linear layer reads, with which they are compared."""
    model, data = pooled()
    found = graphcomb.comb(graphcomb.capture(model, data[0][:2], dynamic_shapes="batch"))
    groups = [g for g in found.groups if g.frozen is None]
    once, twice = (score.Losses(found, groups, Context(data=d), 1000).scores() for d in (data, [*data, *data]))
    for group in groups:
        assert twice[group.atom].sum() == pytest.approx(once[group.atom].sum(), rel=0.5)  # twice as many, other classes


def test_batches_of_one_image_give_the_same_scores() -> None:
    """Each of them lies in one half, so that the other has none."""
    model, data = pooled()
    found = graphcomb.comb(graphcomb.capture(model, data[0][:2], dynamic_shapes="batch"))
    groups = [g for g in found.groups if g.frozen is None]
    singly = list(torch.cat(data).split(1))
    together, apart = (score.Losses(found, groups, Context(data=d), 1000).scores() for d in (data, singly))
    for group in groups:
        assert apart[group.atom].sum() == pytest.approx(together[group.atom].sum(), rel=0.5)  # other classes are drawn


def test_windows_of_images_and_tables_that_no_image_reaches_are_scored() -> None:
    """As in Swin: a layer sees eight windows of two images as sixteen entries, and a small network makes a table of biases
    for all images. Images and windows have one size here, so that sizes do not tell them apart."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.up, self.down = nn.Linear(3, 12), nn.Linear(12, 16), nn.Linear(16, 12)
            self.table = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 12))
            self.register_buffer("places", torch.rand(4, 2))
            self.head = nn.Linear(12, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x).reshape(-1, 4, 12) + self.table(self.places)
            x = x + self.down(torch.relu(self.up(x)))
            return self.head(x.unflatten(0, (-1, 4)).mean((1, 2)))

    torch.manual_seed(0)
    program = graphcomb.capture(Windows().eval(), torch.randn(3, 4, 4, 3), dynamic_shapes="batch")
    data = list(torch.randn(64, 4, 4, 3).split(4))
    found = graphcomb.comb(program)
    groups = [g for g in found.groups if g.frozen is None]
    assert {"up.weight:0", "table.0.weight:0"} <= {g.name for g in groups}
    losses = score.Losses(found, groups, Context(data=data), 64)
    assert losses.count == 64
    assert all(np.isfinite(values).all() and values.max() > 0 for values in losses.scores().values())
    (reader,) = [r for r in losses.readers if r.weight.shape[1] == 16]
    assert reader.count.tolist() == [32 * 16, 32 * 16]  # positions of the images of each half
    result = RemoveChannels(macs=0.7, round_to=1, importance="repair", scope="global", repair=True)(program, data=data)
    assert result.program.macs <= 0.7 * program.macs


def test_of_channels_that_repeat_one_another_one_goes_and_the_other_stays() -> None:
    found = comb(network(copies=True))
    (group,) = [g for g in found.groups if g.frozen is None]
    scores = score.Losses(found, [group], Context(data=batches()), 1000).scores()[group.atom]
    gone = set(np.argsort(scores)[:5].tolist())
    assert {i % 5 for i in gone} == set(range(5))
    result = RemoveChannels(ratio=0.5, round_to=1, importance="repair", repair=True)(found.program, data=batches())
    x = torch.cat(batches())
    wanted = found.program.module().eval()(x)
    torch.testing.assert_close(result.program.module().eval()(x), wanted, rtol=0, atol=1e-6)


def test_an_axis_that_no_linear_layer_reads_is_scored_in_the_same_unit() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).flatten(2)).mean(1)

    torch.manual_seed(0)
    program = graphcomb.capture(Attention().double().eval(), torch.zeros(2, 5, 8).double(), dynamic_shapes="batch")
    data = list(torch.randn(32, 5, 8, dtype=torch.float64).split(8))
    found = graphcomb.comb(program)
    groups = [g for g in found.groups if g.frozen is None]
    scores = score.Losses(found, groups, Context(data=data), 100).scores()
    assert any(np.isinf(own).all() for own in scores.values())
    result = RemoveChannels(ratio=0.5, round_to=1, importance="repair", kinds=("head width", "head"))(
        program, data=data
    )
    assert result.removed


@pytest.mark.parametrize("last", [False, True])
def test_a_wide_layer_after_flattening_is_scored_like_the_kernel_that_it_is(
    monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    """With channels first or last; its columns are channels then, of which there are few."""
    torch.manual_seed(0)
    body, wide = nn.Conv2d(3, 12, 3, padding=1), nn.Linear(12 * 20, 7)
    kernel = nn.Conv2d(12, 7, (4, 5))
    kernel.bias = wide.bias
    with torch.no_grad():
        weight = wide.weight.unflatten(1, (4, 5, 12)).movedim(-1, 1) if last else wide.weight.unflatten(1, (12, 4, 5))
        kernel.weight.copy_(weight)

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.wide = body, wide

        def forward(self, x):
            x = self.body(x).relu()
            return self.wide((x.permute(0, 2, 3, 1) if last else x).flatten(1))

    generator = torch.Generator().manual_seed(1)
    data = list(torch.randn(48, 3, 4, 5, dtype=torch.float64, generator=generator).split(16))
    found = []
    for model in (Flat(), nn.Sequential(body, nn.ReLU(), kernel, nn.Flatten())):
        program = graphcomb.capture(model.double().eval(), torch.zeros(2, 3, 4, 5).double(), dynamic_shapes="batch")
        monkeypatch.setattr(readers, "WIDE", 100)
        combed = graphcomb.comb(program)
        groups = [g for g in combed.groups if g.frozen is None]
        losses = losses_of(combed, groups, Context(data=data), 48)
        (reader,) = losses.readers
        assert reader.xx.shape == (2, 12, 12)
        (group,) = groups
        scores = losses.scores()[group.atom]
        mask = scores > np.median(scores)
        found.append((scores, losses.swapped({group.atom: mask})[0][group.atom]))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-9)
    np.testing.assert_array_equal(found[0][1], found[1][1])


def test_layers_whose_sums_would_take_gigabytes_are_scored_by_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MOST", 9)
    found = comb(network())
    group = next(g for g in found.groups if g.frozen is None)
    losses = losses_of(found, [group], Context(data=batches()), 200)
    assert not losses.readers
    assert np.isinf(losses.scores()[group.atom]).all()
    assert np.isfinite(importance_of("repair")(found, [group], Context(data=batches()), 200)[group.atom]).all()


def test_entries_of_an_image_belong_to_one_half() -> None:
    half = torch.tensor([0, 1, -1])
    assert images.spread(half, 6).tolist() == [0, 0, 1, 1, -1, -1]
    assert images.spread(half, 4).tolist() == [0, 1, 0, 1]  # no multiple: nothing is known
    height, batch = torch.export.Dim("height"), torch.export.Dim("batch")

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.transpose(0, 1) * 2

    value = torch.arange(64.0).reshape(4, 4, 4)  # positions, samples, channels, all of one size
    for shapes, moved in (({0: batch}, True), ({0: batch, 1: height}, True), ({1: height}, False)):
        program = graphcomb.capture(Turned(), torch.zeros(5, 3, 4), dynamic_shapes={"x": shapes})
        node = next(n for n in program.graph.nodes if n.op == "call_function")
        wanted = value.movedim(1, 0) if moved else value  # as the program says; of a fixed size, by the sizes
        assert torch.equal(images.by_sample(value, 4, node), wanted)
    assert images.by_sample(torch.zeros(7, 5, 4), 5, node).shape == (5, 7, 4)


class Read(nn.Module):
    """A group that a linear layer and a recurrence read, and hidden units that a linear layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm = nn.Linear(12, 10), nn.LSTM(10, 7, batch_first=True)
        self.direct, self.last = nn.Linear(10, 3), nn.Linear(7, 3)

    def forward(self, x):
        x = self.first(x).relu()
        return self.direct(x) + self.last(self.lstm(x[:, None])[1][0][0])


class Grouped(nn.Module):
    """A group that a linear layer, or one with a computed weight, and a grouped convolution read."""

    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.grouped = grouped
        self.first, self.direct = nn.Linear(12, 12), nn.Linear(12, 3)
        self.beside = nn.Conv1d(12, 6, 1, groups=3) if grouped else nn.Conv1d(12, 6, 1)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x).relu()
        weight = self.beside.weight
        weight = weight if self.grouped else weight.tanh()
        beside = nn.functional.conv1d(x[..., None], weight, self.beside.bias, groups=3 if self.grouped else 1)
        return self.direct(x) + self.last(beside[..., 0].relu())


@pytest.mark.parametrize("grouped", [True, False])
def test_what_a_grouped_or_computed_layer_reads_is_not_scored_by_linear_readers_alone(grouped: bool) -> None:
    found = comb(Grouped(grouped).double().eval())
    groups = [g for g in found.groups if g.frozen is None]
    unscored = "first.weight:0/channel" if grouped else "first.weight:0"  # whole groups the last layer reads
    assert unscored in {g.name for g in groups}
    scores = losses_of(found, groups, Context(data=batches()), 200).scores()
    assert all(np.isinf(scores[g.atom]).all() == (g.name == unscored) for g in groups)


class Beside(nn.Module):
    """A group that a linear layer reads, and something else that no repair changes."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.first, self.direct, self.tail = what, nn.Linear(12, 10), nn.Linear(10, 3), nn.Linear(1, 3)

    def forward(self, x):
        h = self.first(x).relu()
        out = self.direct(h)
        if self.what == "similarity":
            return out, h @ h.mT
        if self.what == "shared":
            return out, self.direct(h.square())
        if self.what == "norm":  # what it gives, the layer reads
            return self.direct(nn.functional.layer_norm(h, (10,)))
        return out + self.tail(h.sum(1, keepdim=True) if self.what == "sum" else h.mean(1, keepdim=True))


@pytest.mark.parametrize("what", ["similarity", "shared", "sum", "mean", "sparse", "norm"])
def test_what_no_repair_changes_reads_is_not_scored_by_linear_readers_alone(what: str) -> None:
    program = graphcomb.capture(Beside(what).double().eval(), torch.zeros(2, 12).double(), dynamic_shapes="batch")
    if what == "sparse":
        program = Sparsify(sparsity=0.5, method="magnitude", include=("direct.weight",))(program).program
    found = graphcomb.comb(program)
    (group,) = [g for g in found.groups if g.name == "first.weight:0"]
    context = Context(data=batches())
    repair = importance_of("repair")(found, [group], context, 200)[group.atom]
    fisher = importance_of("fisher-unlabelled")(found, [group], context, 200)[group.atom]
    assert (repair == fisher).all() == (what != "norm")


def test_images_without_variety_are_scored_and_outputs_that_are_not_finite_are_named() -> None:
    found = comb(network())
    (group,) = [g for g in found.groups if g.frozen is None]
    blank = [torch.zeros(8, 12).double()] * 3
    assert np.isfinite(importance_of("repair")(found, [group], Context(data=blank), 24)[group.atom]).all()
    broken = [batches()[0].clone() for _ in range(3)]
    broken[1][0, 0] = float("nan")
    for name in ("repair", "fisher-unlabelled"):
        with pytest.raises(graphcomb.BadInput, match="check the data and the model"):
            importance_of(name)(found, [group], Context(data=broken), 150)


def test_frozen_parameters_are_scored_and_stay_frozen() -> None:
    class Bytes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

        def forward(self, x):
            return self.last(self.first(x.float() / 255).relu().mean((2, 3)))

    torch.manual_seed(0)
    model, x = Bytes().eval(), torch.randint(0, 255, (32, 3, 8, 8), dtype=torch.uint8)
    programs = [graphcomb.capture(m, x[:2], dynamic_shapes="batch") for m in (model, model.requires_grad_(False))]
    results = [RemoveChannels(ratio=0.25, round_to=1, importance="repair")(p, data=[x]) for p in programs]
    assert results[0].removed == results[1].removed
    assert not any(p.requires_grad for p in programs[1].module().parameters())


def test_a_vector_of_parameters_is_no_row_and_a_single_number_has_a_gradient() -> None:
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(6))
            self.a, self.b, self.i, self.o = nn.Linear(6, 16), nn.Linear(16, 8), nn.Linear(12, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = (self.i(x) * self.b(self.a(self.query).relu())).relu()
            return self.o(h), h.square().mean()

    torch.manual_seed(0)
    program = graphcomb.capture(Query().double().eval(), torch.zeros(2, 12).double(), dynamic_shapes="batch")
    result = RemoveChannels(ratio=0.5, round_to=1, importance="repair", repair=True)(program, data=batches())
    whys = {row["what"]: row["why"] for row in result.record["repair"]["refused"]}
    assert whys["b.weight"] == "its input is one vector without samples"
    one = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 1)).double()
    program = graphcomb.capture(one, torch.zeros(2, 12).double(), dynamic_shapes="batch")
    assert RemoveChannels(ratio=0.25, round_to=1, importance="repair")(program, data=batches()[0].split(1)).removed


def test_what_a_recurrence_reads_is_not_scored_by_its_linear_readers_alone() -> None:
    found = comb(Read().double().eval())
    groups = [g for g in found.groups if g.frozen is None]
    assert {g.name for g in groups} >= {"lstm.weight_ih_l0:0"}
    context = Context(data=batches())
    assert all(np.isinf(scores).all() for scores in losses_of(found, groups, context, 200).scores().values())
    repair, fisher = (importance_of(name)(found, groups, context, 200) for name in ("repair", "fisher-unlabelled"))
    assert all((repair[g.atom] == fisher[g.atom]).all() for g in groups)
    assert all((repair[g.atom] > 0).all() for g in groups)


def test_channels_that_hardly_vary_next_to_their_mean_are_scored() -> None:
    """Their sums about the mean consist of rounding errors, which leave no positive definite matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 1), nn.ReLU(), nn.Conv2d(64, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 4)
    ).double()
    with torch.no_grad():
        model[0].weight.mul_(7e-7)
        model[0].bias.fill_(1.0)
    data = list(torch.randn(4, 16, 3, 4, 4, dtype=torch.float64))
    found = graphcomb.Comb(graphcomb.capture(model.eval(), data[0][:2], dynamic_shapes="batch"))
    group = next(g for g in found.groups if g.name == "0.weight:0")
    scores = importance_of("repair")(found, [group], Context(data=data), 64)[group.atom]
    assert np.isfinite(scores).all()
    assert (scores >= 0).all()
