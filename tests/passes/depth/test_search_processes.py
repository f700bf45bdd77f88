"""The search for blocks in two processes: candidates are shared, and the choice is the one of a single process."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import nn

from graphcomb.graph.errors import BadInput
from graphcomb.passes import Context, PruneDepth
from graphcomb.passes.depth.price import find_blocks
from graphcomb.passes.depth.search import Judge

from .toys import NETWORKS, captured

SEARCH = PruneDepth(blocks=2, supernet_steps=0, population=5, generations=2, calibrate=2, score_batches=3)


def log_loss(outputs, labels):
    """A score that differs between all candidates."""
    return -nn.functional.cross_entropy(outputs, labels, reduction="none")


def search(folder: Path, labels: bool = True, own: int = 0):
    """The chosen blocks, the record, and how many candidates this process scored and together with the others. own: makes
    the batches those of this process alone."""
    torch.manual_seed(0)
    program = captured(NETWORKS["transformer"][0]())
    generator = torch.Generator().manual_seed(own)
    images = torch.randn(4, 6, 3, 16, 12, generator=generator, dtype=torch.float64)
    data = [(x, torch.randint(8, (6,), generator=generator)) for x in images] if labels else list(images)
    scored = []
    plain = Judge._score

    def counting(judge, bits, alone=False):
        scored.append(alone)
        return plain(judge, bits, alone)

    Judge._score = counting
    try:
        blocks, record = SEARCH.choose(program, find_blocks(program), Context(data=data, metric=log_loss, out=folder))
    finally:
        Judge._score = plain
    return {"names": [b.name for b in blocks], "record": record, "alone": sum(scored), "scored": len(scored)}


def job(folder: Path, rank: int):
    found = {"same": search(folder / "same"), "own": search(folder / f"own-{rank}", own=1 + rank)}
    with pytest.raises(BadInput, match="no labels"):
        search(folder / "unlabelled", labels=False)
    return found


@pytest.mark.slow
def test_two_processes_choose_what_one_does(tmp_path):
    one = search(tmp_path / "one")
    assert one["scored"] == one["record"]["evaluated"] > 4
    assert len(set(one["record"]["alone"])) == 4, "the candidates differ"
    processes = []
    for rank in range(2):
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",  # unused, the group meets by a file
        }  # fmt: skip
        command = [sys.executable, "-m", "tests.passes.depth.test_search_processes", str(tmp_path)]
        processes.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[3]))
    assert [p.wait(timeout=300) for p in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for found in (first["same"], second["same"]):
        assert found["names"] == one["names"]
        assert found["record"] == one["record"], "the same scores, bit by bit"
        assert found["alone"] == found["scored"] < one["scored"]
    assert first["same"]["scored"] + second["same"]["scored"] == one["scored"]
    # where processes see batches of their own, every candidate is scored by both together
    assert first["own"]["record"] == second["own"]["record"]
    assert first["own"]["names"] == second["own"]["names"]
    assert first["own"]["alone"] == second["own"]["alone"] == 0
    assert first["own"]["scored"] == second["own"]["scored"] == first["own"]["record"]["evaluated"]


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, timedelta(seconds=120), world_size=2, rank=rank)
    torch.save(job(folder, rank), folder / f"{rank}.pt")
