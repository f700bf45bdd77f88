import json

import pytest
import torch

import graphcomb
from graphcomb.passes import RemoveChannels
from graphcomb.runtime.bundle.write import write_bundle


@pytest.fixture(scope="session")
def programs():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3), torch.nn.ReLU(), torch.nn.Conv2d(32, 8, 3))
    program = graphcomb.capture(net.eval(), (torch.randn(2, 3, 16, 16),), dynamic_shapes="batch")
    return {"dense": program, "compressed": RemoveChannels(ratio=0.5, round_to=8)(program).program}


@pytest.fixture(scope="session")
def bundle(programs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "b"
    record = folder.parent / "record.json"
    record.write_text(json.dumps(programs["compressed"].history, default=str))
    return write_bundle(folder, programs, "fp16", "agx-orin", batch=2, record=record)
