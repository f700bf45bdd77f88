"""A pass in a loop of the user's own: both cuts do the same, and everything the loop holds follows."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphcomb
from graphcomb import BadInput
from graphcomb.passes import Distill, PruneDepth, RemoveChannels, Sparsify

from .toys import CUTS, OPTIMIZERS, STEPS, Residual, attached, attention, batch, train


def distance(a, b):
    x = batch(99)[0]
    with torch.no_grad():
        return float((a.eval()(x) - b.eval()(x)).abs().max())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_cuts_train_the_same_network(name):
    """Masks in the user's module and slices of the captured one are one and the same run, momentum included."""
    results = {}
    for cut in CUTS:
        model = Residual().train()
        session = attached(model, cut)
        assert (session.module is model) == (cut == "end")
        train(session, OPTIMIZERS[name](session.module.parameters()))
        results[cut] = session.finish()
    end, during = (results[cut] for cut in CUTS)
    assert end.record["events"] == during.record["events"]
    assert end.removed == during.removed
    assert end.program.macs <= 0.5 * session.program.macs
    for a, b in zip(end.program.module().parameters(), during.program.module().parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-9)
    for result in (end, during):
        assert result.record["verified"]["error"] < 1e-10
        assert graphcomb.verify.surgery(result.masked, result) < 1e-10


def test_the_users_module_is_what_is_cut():
    model = Residual().train()
    session = attached(model, "end")
    seen = []
    model.blocks[0].register_forward_hook(lambda *a: seen.append(1))
    train(session, OPTIMIZERS["sgd"](model.parameters()))
    result = session.finish()
    assert len(seen) == STEPS + 1  # and once for the comparison at the end
    assert distance(model, result.program.module()) < 1e-12
    x = batch(99)[0].double()
    assert torch.allclose(
        copy.deepcopy(model).double().eval()(x), result.program.copy().module().double().eval()(x), atol=1e-12
    )
    assert all(p.shape == q.shape for p, q in zip(model.parameters(), Residual().parameters(), strict=True))


@pytest.mark.parametrize("cut", CUTS)
def test_momentum_is_that_of_a_reference_cut_by_hand(cut):
    """The loop's parameters and moments after an event equal those of a plain run whose tensors are sliced by hand."""
    session = attached(Residual().train(), cut, RemoveChannels(ratio=0.5, schedule="iterative", rounds=1, round_to=1))
    optimizer = torch.optim.Adam(session.module.parameters(), lr=1e-2)
    plain = Residual().train()
    reference = torch.optim.Adam(plain.parameters(), lr=1e-2)
    due = STEPS // 2
    for step in range(due):
        x, y = batch(step)
        F.cross_entropy(plain(x), y).backward()
        reference.step()
        reference.zero_grad()
    train(session, optimizer, steps=due)
    names = dict(plain.named_parameters())
    removed = _removed(session)
    assert removed
    shrunk = 0
    for name, p in session.module.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            expected, moment = reference.state[names[name]][key], optimizer.state[p][key]
            own, weight = p.detach(), names[name].detach()
            for dim, gone in removed.get(name, {}).items():
                keep = [i for i in range(weight.shape[dim]) if i not in gone]
                expected, weight = (t.index_select(dim, torch.tensor(keep)) for t in (expected, weight))
                if cut == "end":
                    moment, own = (t.index_select(dim, torch.tensor(keep)) for t in (moment, own))
                shrunk += 1
            assert torch.allclose(moment, expected, rtol=1e-7, atol=1e-9)
            assert torch.allclose(own, weight, rtol=1e-7, atol=1e-9)
    assert shrunk


def _removed(session):
    (pruner,) = session._trainee.callbacks
    return pruner.removed()


def test_groups_and_schedulers_stay():
    session = attached(Residual().train(), "during")
    module = session.module
    groups = [{"params": list(module.stem.parameters()), "lr": 1e-3}, {"params": list(module.blocks.parameters())}]
    optimizer = torch.optim.AdamW([*groups, {"params": list(module.head.parameters()), "weight_decay": 0.0}], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    train(session, optimizer, each=lambda step: scheduler.step())
    assert session.module is module
    assert [len(g["params"]) for g in optimizer.param_groups] == [4, 12, 2]
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in module.parameters()} == {id(p) for p in optimizer.state}
    assert optimizer.param_groups[1]["lr"] < 1e-6
    session.finish()


def test_state_of_another_shape_starts_anew_with_a_warning():
    session = attached(Residual().train(), "during")
    optimizer = torch.optim.Adafactor(session.module.parameters(), lr=1e-2)
    with pytest.warns(UserWarning, match="Adafactor: its state of .* starts anew"):
        train(session, optimizer)
    session.finish()


class Preconditioned(torch.optim.Optimizer):
    """Shampoo (arXiv 1802.09568) on one side: the state of a weight is square, as some weights are."""

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            gradient = parameter.grad.reshape(len(parameter), -1)
            state = self.state[parameter]
            state.setdefault("left", torch.eye(len(parameter), dtype=parameter.dtype)).add_(gradient @ gradient.T)
            parameter -= 1e-2 * torch.linalg.solve(state["left"], gradient).reshape(parameter.shape)


class Listed(Preconditioned):
    """As Kron (PSGD) stores it: the preconditioners of a parameter are a list, one for each dimension."""

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            gradient = parameter.grad.reshape(len(parameter), -1)
            state = self.state[parameter]
            state.setdefault("sides", [torch.eye(len(parameter), dtype=parameter.dtype)])[0].add_(gradient @ gradient.T)
            parameter -= 1e-2 * torch.linalg.solve(state["sides"][0], gradient).reshape(parameter.shape)


def test_a_list_of_preconditioners_starts_anew_with_a_warning():
    session = attached(Residual().train(), "during")
    optimizer = Listed(session.module.parameters(), {})
    with pytest.warns(UserWarning, match="Listed: its state of .* starts anew"):
        train(session, optimizer)
    assert all(state["sides"][0].shape == (len(p), len(p)) for p, state in optimizer.state.items())
    session.finish()


def test_a_preconditioner_of_a_square_weight_is_no_moment_of_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    session = attached(model.double(), "during")
    optimizer = Preconditioned(session.module.parameters(), {})
    with pytest.warns(UserWarning, match="Preconditioned: its state of .* starts anew"):
        train(session, optimizer)
    assert all(state["left"].shape == (len(p), len(p)) for p, state in optimizer.state.items())
    session.finish()


def test_lists_of_parameters_that_an_optimizer_keeps_follow():
    session = attached(Residual().train(), "during")
    optimizer = OPTIMIZERS["adamw"](session.module.parameters())
    kept = optimizer.param_groups[0]["params"]
    train(session, optimizer)
    assert [id(p) for p in kept] == [id(p) for p in session.module.parameters()]


@pytest.mark.parametrize("cut", CUTS)
def test_accumulated_gradients_and_a_scaler(cut):
    """Two half batches a step with scaled losses prune as whole batches do."""

    def run(parts, scaled):
        session = attached(attention().train(), cut)
        optimizer = torch.optim.SGD(session.module.parameters(), lr=0.05, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(STEPS):
            x, y = batch(step)
            for own_x, own_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                scaler.scale(F.cross_entropy(session.module(own_x), own_y) / parts).backward()
            session.before_step(optimizer, scaler)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            session.after_step()
        return session.finish()

    whole, halves = run(1, False), run(2, True)
    assert [e["removed"] for e in whole.record["events"]] == [e["removed"] for e in halves.record["events"]]
    assert distance(whole.program.module(), halves.program.module()) < 1e-4


@pytest.mark.parametrize("cut", CUTS)
def test_averages_follow(cut):
    """The average of sliced weights is the slice of the averaged weights of a run that is never cut."""
    session = attached(Residual().train(), cut)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
    ema = torch.optim.swa_utils.AveragedModel(session.module, multi_avg_fn=average)
    session.follow(ema)
    sums = copy.deepcopy(dict(session.module.named_parameters())) if cut == "end" else None
    train(
        session, OPTIMIZERS["sgd"](session.module.parameters()), each=lambda step: ema.update_parameters(session.module)
    )
    result = session.finish(weights=ema)
    assert distance(ema.module, result.program.module()) < 1e-6
    assert result.program.macs <= 0.5 * session.program.macs
    if sums is not None:
        assert any(not torch.equal(p, sums[n]) for n, p in ema.module.named_parameters())


def test_averages_of_both_cuts_are_the_same():
    results = []
    for cut in CUTS:
        session = attached(Residual().train(), cut)
        ema = copy.deepcopy(session.module)
        session.follow(ema)

        def update(step, ema=ema, session=session):
            with torch.no_grad():
                for a, b in zip(ema.state_dict().values(), session.module.state_dict().values(), strict=True):
                    a.copy_(a.lerp(b, 0.3) if a.is_floating_point() else b)

        train(session, OPTIMIZERS["adamw"](session.module.parameters()), each=update)
        results.append(session.finish(weights=ema).program.module())
    assert distance(*results) < 1e-5


@pytest.mark.parametrize("cut", CUTS)
def test_a_checkpoint_in_the_middle(cut):
    def start():
        session = attached(Residual().train(), cut)
        return session, OPTIMIZERS["adamw"](session.module.parameters())

    session, optimizer = start()
    train(session, optimizer)
    whole = session.finish()
    first, optimizer = start()
    train(first, optimizer, steps=5)
    stored = copy.deepcopy((first.state_dict(), first.module.state_dict(), optimizer.state_dict()))
    second, optimizer = start()
    second.load_state_dict(stored[0], [optimizer])
    second.module.load_state_dict(stored[1])
    optimizer.load_state_dict(stored[2])
    train(second, optimizer, first=5)
    resumed = second.finish()
    assert resumed.record["events"] == whole.record["events"]
    for a, b in zip(resumed.program.module().parameters(), whole.program.module().parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cut", CUTS)
def test_attention_loses_heads_and_hidden_units(cut):
    session = attached(attention().train(), cut, RemoveChannels(macs=0.6, interval=2, round_to=1))
    train(session, OPTIMIZERS["adamw"](session.module.parameters()))
    result = session.finish()
    refused = {row["what"]: row["why"] for row in result.record["refused"]}
    trunk = [why for name, why in refused.items() if name == "embed.weight:0"]
    if cut == "end":
        assert "layer_norm" in trunk[0]
        assert 'cut="during" can remove it' in trunk[0]
        assert distance(session.module, result.program.module()) < 1e-5
    else:
        assert not trunk
    assert result.record["verified"]["error"] < 1e-10


@pytest.mark.parametrize("cut", CUTS)
def test_compiled_between_events(cut):
    session = attached(Residual().train(), cut)
    plain = attached(Residual().train(), cut)
    compiled = torch.compile(session.module, backend="aot_eager")
    optimizers = [OPTIMIZERS["sgd"](s.module.parameters()) for s in (session, plain)]
    train(plain, optimizers[1])
    for step in range(STEPS):
        x, y = batch(step)
        F.cross_entropy(compiled(x), y).backward()
        session.before_step(optimizers[0])
        optimizers[0].step()
        optimizers[0].zero_grad()
        session.after_step()
    assert distance(session.finish().program.module(), plain.finish().program.module()) < 1e-4


@pytest.mark.parametrize("cut", CUTS)
def test_the_loss_of_distill(cut):
    teacher = graphcomb.capture(Residual(), (batch(0)[0],), dynamic_shapes="batch")
    session = attached(Residual().train(), cut, Distill(alpha=0.7, temperature=3.0), teacher=teacher)
    optimizer = OPTIMIZERS["sgd"](session.module.parameters())
    x, y = batch(1)
    outputs = session.module(x)
    with torch.no_grad():
        taught = teacher.module().eval()(x)
    kl = F.kl_div((outputs / 3).log_softmax(1), (taught / 3).log_softmax(1), log_target=True, reduction="batchmean")
    expected = 0.3 * F.cross_entropy(outputs, y) + 0.7 * 9 * kl
    assert torch.allclose(session.loss(outputs, x, y), expected.float(), rtol=1e-5)
    for step in range(STEPS):
        x, y = batch(step)
        session.loss(session.module(x), x, y).backward()
        session.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step()
    assert distance(session.module, session.finish().program.module()) < 1e-6


def test_repair_in_both_cuts():
    """What an event leaves gets the same least-squares weights in the user's module as in the captured one."""
    data = [batch(100 + i)[0] for i in range(4)]
    pass_ = RemoveChannels(macs=0.5, schedule="iterative", rounds=2, round_to=1, repair=True)
    results = []
    for cut in CUTS:
        session = attached(Residual().train(), cut, pass_, data=data)
        train(session, OPTIMIZERS["sgd"](session.module.parameters()))
        results.append(session.finish())
    assert all("repair" in event for event in results[0].record["events"])
    assert distance(*(r.program.module() for r in results)) < 1e-6


class TestOtherPasses:
    @pytest.mark.parametrize("cut", CUTS)
    @pytest.mark.parametrize("method", ["cap", "magnitude"])
    def test_sparsify_in_steps(self, cut, method):
        data = [batch(100 + i) for i in range(4)]
        schedule = Sparsify(schedule=((0, 0.3), (1, 0.6)), method=method, gradients=16, train=Distill(epochs=3))
        session = attached(Residual().train(), cut, schedule, data=data)
        ema = copy.deepcopy(session.module)
        session.follow(ema)
        shares = []
        optimizer = OPTIMIZERS["adamw"](session.module.parameters())
        train(session, optimizer, each=lambda step: shares.append(_zeros(session.module)))
        result = session.finish()
        rows = {row["what"]: row["sparsity"] for row in result.record["changed"]}
        assert rows
        sizes = {n: p.numel() for n, p in result.program.module().named_parameters() if n in rows}
        for share, goal in ((shares[0], 0.3), (shares[STEPS // 3], 0.6), (shares[-1], 0.6)):
            assert abs(share / sum(sizes.values()) - goal) < 0.02
        zero = result.program.module().state_dict()
        assert sum(int((zero[n] == 0).sum()) for n in rows) >= 0.59 * sum(sizes.values())
        assert all((ema.state_dict()[n][zero[n] == 0] == 0).all() for n in rows)
        assert graphcomb.graph.sparse.sparse_weights(result.program).keys() == rows.keys()

    def test_blocks_fade_and_are_merged(self):
        pass_ = PruneDepth(blocks=1, supernet_steps=0, population=4, generations=1)
        data = [batch(100 + i) for i in range(4)]
        session = attached(Residual().train(), "during", pass_, data=data, val=data)
        module = session.module
        train(session, OPTIMIZERS["adamw"](module.parameters()))
        held = {id(p) for p in module.parameters()}
        result = session.finish()
        assert session.module is module
        assert held
        assert result.program.macs < session.program.macs
        assert result.record["merge"]["error"] < 1e-6
        assert distance(module, result.program.module()) < 1e-6

    def test_what_a_module_of_the_users_cannot_do(self):
        with pytest.raises(BadInput, match='attach with cut="during"'):
            attached(Residual().train(), "end", PruneDepth(blocks=1))


def _zeros(module):
    return sum(int((p == 0).sum()) for p in module.parameters() if p.dim() > 1)


def test_gradients_that_the_loop_has_unscaled_are_left():
    """To clip them a loop unscales gradients itself, which a scaler allows once a step."""
    session = attached(Residual().train(), "end")
    optimizer, scaler = OPTIMIZERS["sgd"](session.module.parameters()), torch.amp.GradScaler("cpu", init_scale=64.0)
    x, y = batch(0)
    scaler.scale(F.cross_entropy(session.module(x), y)).backward()
    scaler.unscale_(optimizer)
    gradient = session.module.head.weight.grad.clone()
    session.before_step(optimizer, scaler)
    assert torch.equal(session.module.head.weight.grad, gradient)
    scaler.step(optimizer)


def test_what_the_loop_froze_stays_frozen():
    """A BatchNorm that the user put into eval mode keeps its statistics, before an event and after."""
    session = attached(Residual().train(), "during")
    frozen, other = (session.module.get_submodule(n) for n in ("blocks.0.n", "blocks.1.m"))
    frozen.eval()
    before, moving = frozen.running_mean.clone(), other.running_mean.clone()
    train(session, OPTIMIZERS["sgd"](session.module.parameters()))
    frozen, other = (session.module.get_submodule(n) for n in ("blocks.0.n", "blocks.1.m"))
    assert session.module.training
    assert not frozen.training
    assert all(value in before for value in frozen.running_mean)
    assert not torch.equal(other.running_mean, moving)


class Autocast(Residual):
    """A forward that turns autocast on by itself."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.blocks(self.stem(x))
        return self.head(x.to(self.head.weight.dtype).mean((2, 3)))


@pytest.mark.parametrize("cut", CUTS)
def test_a_forward_with_autocast_of_its_own_is_pruned_and_warned_of(cut):
    with pytest.warns(UserWarning, match="computes 5 layers in half precision, the first .*turn autocast on"):
        session = attached(Autocast().float().train(), cut, example=(batch(0, dtype=torch.float32)[0],))
    optimizer = torch.optim.SGD(session.module.parameters(), lr=0.01)
    for step in range(STEPS):
        x, y = batch(step, dtype=torch.float32)
        F.cross_entropy(session.module(x), y).backward()
        session.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        session.after_step()
    assert session.finish().program.macs <= 0.5 * session.program.macs
