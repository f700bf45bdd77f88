"""Two processes, each with its share of the images, repair as one does with all of them."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from graphcomb.passes import Distill, PruneDepth, RemoveChannels, Repair

from ..channels import toys as pruned_toys
from ..depth import toys as depth_toys
from ..toys import same, state
from . import test_attention, test_repair

MODULE = "tests.passes.repair.test_processes"


def job(per_process: int) -> dict[str, dict]:
    """By what was done, the weights, the losses on record, and what was removed. per_process: samples of a batch."""
    found = {}

    def keep(name, result, record):
        keys = ("what", "before", "predicted", "after", "rows")
        losses = [[-1.0 if row[key] is None else row[key] for key in keys] for row in record["repaired"]]
        found[name] = {"state": state(result.program), "losses": losses, "removed": result.removed}

    torch.manual_seed(0)
    mixed, images = test_repair.capture(test_repair.Mixed()), test_repair.images(batch=per_process)
    for name, importance in (("channels", "magnitude"), ("scored", "repair")):
        result = RemoveChannels(ratio=0.5, round_to=2, importance=importance, repair=True)(mixed, data=images)
        keep(name, result, result.record["repair"])

    heads = test_attention.network("grouped")
    cut = test_attention.pruned(heads).program
    result = Repair()(cut, data=list(torch.cat(test_attention.data()).split(per_process)), teacher=heads)
    keep("heads", result, result.record)

    blocks = depth_toys.captured(depth_toys.NETWORKS["transformer"][0]())
    x = torch.randn(32, 3, 16, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    names = ("blocks.0.body", "blocks.3.body")
    pass_ = PruneDepth(names=names, repair=True, calibrate=8)  # affine maps are fitted to all images, however they come
    result = pass_(blocks, data=list(x.split(per_process)))
    keep("blocks", result, result.record["repair"])

    dense = pruned_toys.dense(torch.float64)
    data = pruned_toys.batches(96 // per_process, per_process, dtype=torch.float64)
    train = Distill(epochs=1, lr=0.01, warmup=0.0)
    result = RemoveChannels(macs=0.4, round_to=2, interval=2, train=train, repair=True)(dense, data=data)
    keep("training", result, result.record["events"][-1]["repair"])
    return found


@pytest.mark.slow
def test_two_processes_repair_as_one_does(tmp_path):
    one = job(8)
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",  # unused, the group meets by a file
        }  # fmt: skip
        command = [sys.executable, "-m", MODULE, str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[3]))
    assert [p.wait(timeout=300) for p in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for name, whole in one.items():
        assert first[name]["removed"] == second[name]["removed"], name
        assert same(first[name]["state"], second[name]["state"]), name
        if name == "scored":
            continue  # the scores draw random projections, in each process others
        assert first[name]["removed"] == whole["removed"], name
        for key, tensor in whole["state"].items():
            torch.testing.assert_close(first[name]["state"][key], tensor, rtol=1e-6, atol=1e-8, msg=f"{name}: {key}")
        assert len(first[name]["losses"]) == len(whole["losses"]) > 0
        for ours, theirs in zip(first[name]["losses"], whole["losses"], strict=True):
            assert ours[0] == theirs[0]
            assert ours[4] == theirs[4]
            assert ours[1:4] == pytest.approx(theirs[1:4], rel=1e-6, abs=1e-12)


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, timedelta(seconds=120), world_size=2, rank=rank)
    torch.save(job(4), folder / f"{rank}.pt")
