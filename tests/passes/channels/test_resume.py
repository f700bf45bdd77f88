"""Pruning while training goes on after an interruption, is the same in two processes, and refuses what cannot be."""

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from graphcomb.graph.errors import BadInput, GraphcombError, Unreachable
from graphcomb.passes.channels.remove_channels import RemoveChannels

from ..toys import Cut, Stop, same, state
from .toys import batches, dense, pruning

ROOT, MODULE = Path(__file__).parents[3], "tests.passes.channels.test_resume"


@pytest.fixture(scope="module", params=[{}, {"schedule": "one-shot", "importance": "magnitude"}], ids=str)
def run(request, tmp_path_factory):
    """A pass, its context, and its result when nothing interrupts it."""
    pass_ = pruning({"checkpoint_every": 3, "features": 1.0}, interval=2, prune_share=0.7, **request.param)
    context = {"val": batches(2), "teacher": dense()}
    return pass_, context, pass_(dense(), data=batches(), out=tmp_path_factory.mktemp("whole"), **context)


@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_resumed_run_removes_the_same_and_ends_at_the_same_bits(stop, run, tmp_path):
    pass_, context, whole = run
    program, data = dense(), batches()
    cut = Cut(data, stop, every_pass=True)
    with pytest.raises(Stop):
        pass_(program, data=cut, out=tmp_path / "cut", **context)
    resumed = pass_(program, data=data, out=tmp_path / "cut", **context)
    assert resumed.record.get("resumed_at") == (stop // 3 * 3 or None)
    assert resumed.removed == whole.removed
    assert same(state(resumed.program), state(whole.program))
    assert resumed.record["events"] == whole.record["events"]
    for key in ("epochs", "curve"):
        assert resumed.record[key] == whole.record[key]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A pass, and the folder that holds its checkpoint."""
    pass_, folder = pruning({"checkpoint_every": 3}, interval=2), tmp_path_factory.mktemp("interrupted")
    with pytest.raises(Stop):
        pass_(dense(), data=Cut(batches(), 4, every_pass=True), out=folder)
    assert len(list(folder.iterdir())) == 1
    return pass_, folder


@pytest.mark.parametrize("change", [{"macs": 0.5}, {"prune_share": 0.4}, {"round_to": 4}, {"scope": "local"}])
def test_a_checkpoint_of_other_options_is_not_taken(change, interrupted, tmp_path):
    pass_, folder = interrupted
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    other = dataclasses.replace(pass_, **change)(dense(), data=batches(), out=tmp_path)
    assert "resumed_at" not in other.record


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"interval": 0}, "RemoveChannels.interval: a whole number of at least 1, not 0"),
        ({"rounds": 0}, "RemoveChannels.rounds"),
        ({"prune_share": 0}, "RemoveChannels.prune_share: a share above 0, at most 1, not 0"),
        ({"prune_share": 1.5}, "RemoveChannels.prune_share"),
        ({"schedule": "never"}, "RemoveChannels.schedule: adaptive, iterative or one-shot, not 'never'"),
    ],
)
def test_options_out_of_range_are_named(options, says):
    with pytest.raises(BadInput, match=says):
        RemoveChannels(**options)


def test_what_cannot_be_is_said_before_training():
    def never(outputs, labels):
        raise AssertionError("trained")

    program = dense()
    with pytest.raises(Unreachable, match=r"RemoveChannels.macs: .* cannot be reached"):
        pruning(macs=1e-6)(program, data=batches(), loss=never)
    with pytest.raises(BadInput, match="needs data to train on"):
        pruning()(program)
    with pytest.raises(BadInput, match="needs a teacher"):
        pruning({"features": 1.0})(program, data=batches(), loss=never)


def test_defaults_of_training_are_those_of_cpd():
    assert (RemoveChannels().importance, RemoveChannels().scope) == ("magnitude", "local")
    pass_ = pruning()
    assert (pass_.importance, pass_.scope, pass_.schedule) == ("fisher", "global", "adaptive")
    assert pass_.options()["train"]["epochs"] == 1, "nested options are plain data"


# ------------------------------------------------------------------------------------------------------ several processes
def job(out, per_process, die_at=0):
    """What the processes run: no batch statistics, so that only the global batch counts. die_at: the step at which
    this one kills itself."""

    class Dies(list):
        def __iter__(self):
            for i, batch in enumerate(super().__iter__()):
                if die_at and i == die_at * 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield batch

    program = dense(torch.float64)
    data = Dies(batches(96 // per_process, per_process, dtype=torch.float64))
    pass_ = pruning({"epochs": 2, "checkpoint_every": 3, "features": 1.0}, interval=2)
    return pass_(program, data=data, teacher=program, out=out)


def launch(out, port, deaths=(0, 0), timeout=200):
    """Two processes, without a launcher that would stop one when the other dies; raises when one hangs."""
    processes = []
    for rank, death in enumerate(deaths):
        environment = {
            **os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        arguments = [sys.executable, "-m", MODULE, str(out), str(death)]
        processes.append(subprocess.Popen(arguments, env=environment, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    return [(p.communicate(timeout=timeout)[1], p.returncode) for p in processes]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_remove_what_one_does_and_a_lost_one_is_said(tmp_path):
    one = job(tmp_path / "one", 8)
    done = launch(tmp_path / "two", free_port())
    assert [code for _, code in done] == [0, 0], done
    first, second = (torch.load(tmp_path / f"two-{rank}.pt") for rank in range(2))
    assert first["removed"] == second["removed"] == one.removed
    assert first["events"] == second["events"] == one.record["events"]
    assert same(first["state"], second["state"])
    for name, tensor in state(one.program).items():
        torch.testing.assert_close(first["state"][name], tensor, rtol=1e-6, atol=1e-9, msg=name)
    # one is killed between events: the other says so in one line and ends; started again, both end at the same bits
    (_, killed), (message, code) = launch(tmp_path / "lost", free_port(), deaths=(5, 0))
    assert killed == -signal.SIGKILL
    assert code == 2, message
    assert message.splitlines()[-1].startswith("error: Distill: process 1 of 2 lost another one at step")
    assert "continues from its last checkpoint" in message
    done = launch(tmp_path / "lost", free_port())
    assert [code for _, code in done] == [0, 0], done
    again = torch.load(tmp_path / "lost-1.pt")
    assert again["resumed_at"] == 3
    assert again["removed"] == one.removed
    assert same(again["state"], first["state"])


if __name__ == "__main__":
    folder, death = sys.argv[1:]
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=30))
    try:
        result = job(folder, 4, int(death))
    except GraphcombError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    found = {"removed": result.removed, "state": state(result.program), "events": result.record["events"]}
    found["resumed_at"] = result.record.get("resumed_at")
    torch.save(found, f"{folder}-{os.environ['RANK']}.pt")
