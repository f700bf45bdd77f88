"""A training run that is killed at any point ends where a whole one does, in one process and in two."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from graphcomb.graph.errors import BadInput
from graphcomb.passes.train.distill import Distill

from ..toys import Cut, Stop, same, state
from .toys import capture, loaders, network, small, tensors

ROOT, MODULE = Path(__file__).parents[3], "tests.passes.train.test_checkpoint"


class Noisy(torch.utils.data.Dataset):
    """Digits with noise drawn from the global generator while training goes on, the hardest case for a resume."""

    def __init__(self):
        self.x, self.y = tensors()

    def __len__(self):
        return 256

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(1, 8, 8), self.y[i]


def noisy(own_generator):
    generator = torch.Generator().manual_seed(5) if own_generator else None
    return DataLoader(Noisy(), 32, shuffle=True, generator=generator)


@pytest.fixture(scope="module", params=[False, True], ids=["global generator", "own generator"])
def run(request, teacher, tmp_path_factory):
    """A student, what trains it, and the result when nothing interrupts it."""
    _, val = loaders()

    def train(out, stop=None):
        data = noisy(request.param) if stop is None else Cut(noisy(request.param), stop)
        distill = Distill(epochs=2, checkpoint_every=3)
        return distill(small(6), data=data, val=val, teacher=teacher, out=out)

    return train, train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [1, 3, 8, 11])
def test_a_resumed_run_ends_bit_by_bit_where_a_whole_one_does(stop, run, tmp_path):
    train, whole = run
    with pytest.raises(Stop):
        train(tmp_path, stop)
    assert len(list(tmp_path.glob("*"))) == (stop >= 3)
    resumed = train(tmp_path)
    assert resumed.record.get("resumed_at") == {1: None, 3: 3, 8: 6, 11: 9}[stop]
    assert same(state(resumed.program), state(whole.program))
    assert resumed.record["epochs"] == whole.record["epochs"]
    assert list(tmp_path.glob("*")) == [], "a finished run leaves no checkpoint"


def job(out, *, kill_at=0, per_process=64, epochs=2):
    """The run of the tests with several processes: no dropout and frozen statistics, so that only the global batch
    counts. kill_at: the checkpoint in whose middle the process kills itself."""
    student, teacher = capture(network(6, dropout=0.0)), capture(network(12))
    data, val = loaders(batch=per_process)
    save, calls = torch.save, itertools.count(1)

    def half_a_file(value, path, **options):
        if isinstance(path, Path) and next(calls) == kill_at:
            path.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, path, **options)

    torch.save = half_a_file
    try:
        distill = Distill(epochs=epochs, checkpoint_every=3, batch_norm="frozen")
        return distill(student, data=data, val=val, teacher=teacher, out=out)
    finally:
        torch.save = save


def command(*arguments):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_run_killed_while_it_writes_a_checkpoint_resumes(tmp_path):
    whole = job(tmp_path / "whole")
    done = command("-m", MODULE, str(tmp_path / "killed"), "3")
    assert done.returncode == -signal.SIGKILL, done.stderr
    files = sorted(f.name for f in (tmp_path / "killed").iterdir())
    assert [f.split(".")[-2:] for f in files] == [["part", "ckpt"], [files[1].removesuffix(".ckpt"), "ckpt"]]
    assert (tmp_path / "killed" / files[0]).read_bytes() == b"half a file"
    resumed = job(tmp_path / "killed")
    assert resumed.record["resumed_at"] == 6
    assert same(state(resumed.program), state(whole.program))
    assert resumed.record["epochs"] == whole.record["epochs"]
    assert list((tmp_path / "killed").iterdir()) == []


def test_a_checkpoint_of_another_run_is_not_taken_and_a_damaged_one_is_named(tmp_path):
    data, _ = loaders()
    student = small(6)
    with pytest.raises(Stop):
        Distill(checkpoint_every=2)(student, data=Cut(data, 5), out=tmp_path)
    (checkpoint,) = tmp_path.iterdir()
    for options, context in (({"lr": 2e-3}, {}), ({}, {"seed": 1})):
        other = Distill(checkpoint_every=2, **options)(student, data=data, out=tmp_path, **context)
        assert "resumed_at" not in other.record
    other = Distill(checkpoint_every=2)(capture(network(7)), data=data, out=tmp_path)
    assert "resumed_at" not in other.record
    assert list(tmp_path.iterdir()) == [checkpoint]
    checkpoint.write_bytes(b"half a file")
    with pytest.raises(BadInput, match=r"distill-\w+.ckpt: no usable checkpoint .*delete it to train from the start"):
        Distill(checkpoint_every=2)(student, data=data, out=tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    data, _ = loaders()
    with pytest.raises(BadInput, match=r"\.ckpt: cannot be written"):
        Distill(checkpoint_every=2)(small(4), data=data, out=tmp_path / "file")


@pytest.mark.slow
def test_two_processes_train_what_one_does_with_the_same_global_batch(tmp_path):
    one = job(tmp_path / "one")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = command(*launch, "-m", MODULE, str(tmp_path / "two"), "0", "32")
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"two-{rank}.pt") for rank in range(2))
    assert first["record"]["processes"] == 2
    assert first["record"]["steps"] == one.record["steps"]
    assert same(first["state"], second["state"])
    for name, tensor in state(one.program).items():
        torch.testing.assert_close(first["state"][name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    for found, expected in zip(first["record"]["epochs"], one.record["epochs"], strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    # killed in the middle of a checkpoint, the launcher stops both; started again, they end at the same bits
    done = command(*launch, "-m", MODULE, str(tmp_path / "killed"), "2", "32")
    assert done.returncode != 0
    done = command(*launch, "-m", MODULE, str(tmp_path / "killed"), "0", "32")
    assert done.returncode == 0, done.stderr
    again = torch.load(tmp_path / "killed-0.pt")
    assert again["record"]["resumed_at"] == 3
    assert same(again["state"], first["state"])
    assert again["record"]["epochs"] == first["record"]["epochs"]


if __name__ == "__main__":
    folder, kill, per_process = (*sys.argv[1:], "64")[:3]
    rank = os.environ.get("RANK", "0")
    result = job(folder, kill_at=int(kill) if rank == "0" else 0, per_process=int(per_process))
    torch.save({"state": state(result.program), "record": result.record}, f"{folder}-{rank}.pt")
