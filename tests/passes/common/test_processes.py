"""Two processes, started as `torchrun` starts them on a CPU, that see different things (latencies, orders of the data,
losses, batch sizes, folders) still do the same."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from graphcomb import capture
from graphcomb.graph.comb.solve import Comb
from graphcomb.graph.errors import BadInput, GraphcombError
from graphcomb.passes import Distill, PruneDepth, RemoveChannels, Sparsify
from graphcomb.passes.base import Context
from graphcomb.passes.channels.importance.scores import from_gradients
from graphcomb.passes.common import processes
from graphcomb.passes.common.processes import accelerator, agreed
from graphcomb.passes.common.weights import layers
from graphcomb.passes.sparse.statistics.gradients import Gradients
from graphcomb.passes.sparse.statistics.moments import input_moments

from ..toys import Cut, Stop

ROOT, MODULE = Path(__file__).parents[3], "tests.passes.common.test_processes"


class Skewed:
    """Latencies that differ from process to process, as measured ones do."""

    per_run = 0.0

    def __init__(self, power):
        self.power = power

    def __str__(self):
        return "skewed"

    def prepare(self, layers, progress=False):
        pass

    def seconds(self, layer):
        return float(layer.macs()) ** self.power


class Busy(Skewed):
    """Cannot measure, on one process only."""

    def prepare(self, layers, progress=False):
        if self.power != 1:
            raise GraphcombError("the machine is too busy")


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(x)))


def residual():
    torch.manual_seed(0)
    return nn.Sequential(Residual(), nn.Flatten(), nn.Linear(100, 3))


def batches(sizes, seed):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 1, 10, 10, generator=draw), torch.randint(3, (n,), generator=draw)) for n in sizes]


def shared(program):
    """What processes make of their shares together, whatever their number is."""
    data = batches([4] * 5 + [3], 0)
    name = next(layer.name for layer in layers(program)[0] if layer.kind == "conv")
    importances = {i: from_gradients(i) for i in ("fisher", "taylor", "fisher-paper")}
    comb = Comb(program)
    groups = [group for group in comb.groups if group.frozen is None]
    gradients = Gradients(14, "sample", "labels")
    found = {
        i: lambda make=make: [s.tolist() for s in make(comb, groups, Context(data=data), 14).values()]
        for i, make in importances.items()
    }
    squares = lambda: [*gradients.mean_squares(program.copy(), [name], Context(data=data), 10**6)[0].values()]  # noqa: E731
    moments = lambda: input_moments(program.copy(), [name], Context(data=data), 14)  # noqa: E731
    return found | {"squares": lambda: [squares()], "moments": lambda: moments()[0][name].flatten(1).tolist()}


def digest(program):
    return [round(float(p.double().sum()), 9) for p in program.module().parameters()]


def interrupted(pass_, program, data, folder, left):
    """The weights after a run that was interrupted and started again, in a folder that only this process sees; and those of
    a whole one, and whether the second run trained less."""
    whole = pass_(program, data=data, out=folder / "whole")
    try:
        pass_(program, data=Cut(data, left), out=folder / "cut")
    except Stop:
        again = pass_(program, data=data, out=folder / "cut")
        return digest(again.program), digest(whole.program), again.record.get("resumed_at", 0)
    return None


def taken_up(pass_, program, data, folder):
    """Whether a second run gives the same weights and trains less."""
    first, second = (pass_(program, data=data, out=folder) for _ in range(2))
    return digest(first.program) == digest(second.program), second.record.get("train"), digest(second.program)


def raises_on_main(rank):
    """What an error that is not graphcomb's, raised by the first process alone, is in every process."""
    try:
        agreed(lambda: {}["nothing"])
    except KeyError:
        return rank == 0
    except GraphcombError as error:
        return rank == 1 and "another process failed (KeyError: 'nothing')" in str(error)


def scenarios(rank, folder):
    """By name what every process does; the result, or the error."""
    program = capture(network(), torch.randn(2, 1, 10, 10), dynamic_shapes="batch")
    fixed = capture(network(), torch.randn(2, 1, 10, 10))
    train = Distill(epochs=1, lr=1e-3)
    at_once = RemoveChannels(latency=0.5, round_to=1)
    slowly = RemoveChannels(latency=0.5, round_to=1, train=train, interval=2)
    same, own = batches([4] * 8, 0), batches([4] * 8, rank)
    power = 1.0 if rank == 0 else 1.7

    def nan_on_one(outputs, labels):
        loss = nn.functional.cross_entropy(outputs, labels)
        return loss * float("nan") if rank == 1 else loss

    yield "latency", lambda: at_once(program, latency=Skewed(power)).removed
    yield "latency while training", lambda: slowly(program, data=same, latency=Skewed(power)).removed
    yield "busy", lambda: at_once(program, latency=Busy(2.0 if rank == 0 else 1.0)).removed
    fisher = RemoveChannels(macs=0.5, importance="fisher", round_to=1)
    yield "order", lambda: fisher(program, data=own).removed
    yield from shared(program).items()
    yield "nan", lambda: train(program, data=same, loss=nan_on_one)
    yield "nan in one share", lambda: fisher(program, data=same, loss=nan_on_one)
    yield "short", lambda: train(fixed, data=batches([2, 2, 2, 1], 0))
    yield "error", lambda: raises_on_main(rank)
    steps = Distill(epochs=2, lr=1e-3, checkpoint_every=3)
    yield "checkpoint", lambda: interrupted(steps, program, same, folder / "checkpoint", 12)
    gradual = Sparsify(schedule=((0, 0.5),), method="magnitude", train=train)
    yield "snapshot", lambda: taken_up(gradual, program, same, folder / "snapshot")
    depth = PruneDepth(names=("0",), train=Distill(steps=2), calibrate=1, merged=False)
    blocks = capture(residual(), torch.randn(2, 1, 10, 10), dynamic_shapes="batch")
    yield "stage", lambda: taken_up(depth, blocks, same, folder / "stage")
    yield "whole", lambda: slowly(fixed, data=batches([2, 2, 2, 2], 0), latency=Skewed(power)).removed


@pytest.mark.skipif(sys.platform == "win32", reason="gloo needs the loopback of Linux or macOS")
def test_processes_agree(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    plain = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")}
    environment = plain | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", MODULE, str(tmp_path)],
            env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)}, cwd=ROOT, stderr=subprocess.PIPE, text=True,
        )
        for r in range(2)
    ]  # fmt: skip
    ended = [(p.communicate(timeout=200)[1], p.returncode) for p in running]
    assert [code for _, code in ended] == [0, 0], ended
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    assert first == second
    for name in ("latency", "latency while training", "order", "whole"):
        assert first[name], name
        assert not isinstance(first[name], str), first[name]
    for name, act in shared(capture(network(), torch.randn(2, 1, 10, 10), dynamic_shapes="batch")).items():
        for ours, alone in zip(first[name], act(), strict=True):
            assert ours == pytest.approx(alone, rel=1e-5, abs=1e-12), name
    assert "importance: the loss of batch 0 is nan" in first["nan in one share"]
    assert first["busy"] == "GraphcombError: the machine is too busy"
    assert "the loss is nan" in first["nan"]
    assert "drop_last=True" in first["short"]
    assert first["error"] is True
    again, whole, resumed_at = first["checkpoint"]
    assert again == whole
    assert resumed_at == 6
    assert first["snapshot"][0] is first["stage"][0] is True
    assert first["stage"][1] == {"resumed": True}
    assert [len(list((tmp_path / "0").rglob(f))) for f in ("sparsity-*", "pruned-*")] == [1, 1]
    assert not list((tmp_path / "1").rglob("*.*")), "the main process alone writes"


def test_processes_that_would_run_by_themselves_are_refused(monkeypatch):
    accelerator()  # made before anything said that there are several
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match=r"2 processes were started \(WORLD_SIZE\) and each would run by itself"):
        accelerator()


def test_weights_are_broadcast_by_way_of_the_device_that_processes_talk_on(monkeypatch):
    class Two:
        num_processes, device = 2, torch.device("meta")

    talked = []

    def broadcast(tensor):
        talked.append(tensor.device.type)
        return torch.ones(tensor.shape)

    monkeypatch.setattr(processes, "accelerator", Two)
    monkeypatch.setattr(processes, "broadcast", broadcast)
    weight = nn.Parameter(torch.zeros(3))
    processes.broadcast_all([weight])
    assert talked == ["meta"]
    assert weight.tolist() == [1.0, 1.0, 1.0]
    assert weight.requires_grad


def test_a_short_last_batch_is_told_from_a_whole_one():
    fixed = capture(network(), torch.randn(2, 1, 10, 10))
    train = Distill(epochs=2, lr=1e-3)
    pass_ = RemoveChannels(macs=0.6, round_to=1, train=train, interval=1, prune_share=1.0)
    result = pass_(fixed, data=batches([2, 2, 2, 1], 0))  # the last event is due at the last step there is
    assert result.program.macs <= 0.6 * fixed.macs
    assert result.record["steps"] == 6


def test_frozen_parameters_are_not_taken_for_unimportant_ones():
    model = network()
    program = capture(model, torch.randn(2, 1, 10, 10), dynamic_shapes="batch")
    for name, p in program.module().named_parameters():
        p.requires_grad_(not name.startswith(("0.", "2.")))
    data = batches([4] * 6, 0)
    result = RemoveChannels(macs=0.7, round_to=1, train=Distill(epochs=1), interval=1)(program, data=data)
    assert "0.weight" not in result.removed
    refused = {row["what"]: row["why"] for row in result.record["refused"]}
    assert "requires_grad" in refused["0.weight:0"]
    at_once = RemoveChannels(macs=0.5, importance="taylor", scope="global", round_to=1)
    program.module().requires_grad_(False)
    assert at_once(program, data=data).program.macs <= 0.5 * program.macs
    with pytest.raises(BadInput, match="nothing to train"):
        Distill(epochs=1)(program, data=data)


def test_one_shot_without_labels_looks_at_the_weights():
    program = capture(network(), torch.randn(2, 1, 10, 10), dynamic_shapes="batch")
    unlabelled = [x for x, _ in batches([4] * 6, 0)]
    pass_ = RemoveChannels(macs=0.5, schedule="one-shot", round_to=1, train=Distill(epochs=1))
    result = pass_(program, data=unlabelled, teacher=program)
    by_weights = RemoveChannels(macs=0.5, importance="magnitude", scope="global", round_to=1)(program)
    assert result.program.macs <= 0.5 * program.macs
    assert result.removed.keys() == by_weights.removed.keys()


def test_gradients_are_taken_of_batches_that_fit_a_fixed_program():
    fixed = capture(network(), torch.randn(2, 1, 10, 10))
    pass_ = RemoveChannels(macs=0.5, importance="fisher", round_to=1)
    assert pass_(fixed, data=batches([2, 2, 1], 0)).removed == pass_(fixed, data=batches([2, 2], 0)).removed
    with pytest.raises(BadInput, match=r"no input .nothing. in the program"):
        pass_(fixed, data=[{"nothing": torch.zeros(2), "labels": torch.zeros(2)}])


if __name__ == "__main__":
    rank = int(os.environ["RANK"])
    found, own = {}, Path(sys.argv[1]) / str(rank)
    for name, act in scenarios(rank, own):
        try:
            found[name] = act()
        except GraphcombError as error:
            found[name] = f"{type(error).__name__}: {error}"
    assert torch.distributed.get_world_size() == 2, "the processes do not know of each other"
    torch.save(found, f"{sys.argv[1]}/{rank}.pt")
