"""Two processes under DistributedDataParallel prune as one process with the whole batch does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from graphcomb.passes import RemoveChannels

from .toys import STEPS, attached, attention, batch, train

ROOT, MODULE = Path(__file__).parents[3], "tests.graphcomb.session.test_processes"
PASS = RemoveChannels(macs=0.6, interval=3, round_to=1)


def optimizer_of(module):
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)


def main(cut, out):
    """What each process runs: a plain script of torch alone."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    session = attached(attention().train(), cut, PASS)
    model, optimizer = DistributedDataParallel(session.module), optimizer_of(session.module)
    for step in range(STEPS):
        x, y = (t.chunk(2)[rank] for t in batch(step))
        F.cross_entropy(model(x), y).backward()
        session.before_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        if session.after_step():
            model = DistributedDataParallel(session.module)
    result = session.finish()
    torch.save((result.record["events"], dict(result.program.module().state_dict())), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["end", "during"])
def test_two_processes_are_one(cut, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        code = f"import {MODULE} as t; t.main({cut!r}, {str(tmp_path)!r})"
        processes.append(subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=ROOT))
    assert [p.wait(timeout=300) for p in processes] == [0, 0]
    session = attached(attention().train(), cut, PASS)
    train(session, optimizer_of(session.module))
    one = session.finish()
    for rank in range(2):
        events, state = torch.load(tmp_path / f"{rank}.pt")
        assert [e["removed"] for e in events] == [e["removed"] for e in one.record["events"]]
        for name, value in one.program.module().state_dict().items():
            assert torch.allclose(state[name], value, rtol=1e-6, atol=1e-9), name
