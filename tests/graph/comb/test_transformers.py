"""Vision models of the transformers library, small configurations: captured, combed, pruned at half and exact."""

from __future__ import annotations

import pytest
import torch

from graphcomb import capture, verify
from graphcomb.graph.errors import CaptureError
from graphcomb.passes import RemoveChannels

from ...oracles.restriction import restriction
from ..toys.vision_encoders import ENCODERS
from ..toys.vision_tasks import TASKS

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

MODELS = ENCODERS | TASKS

# These specialise their batch size, so that it cannot be dynamic.
STATIC = {"Superpoint", "RTDETR", "DFine", "PixtralVision"}


@pytest.mark.parametrize("name", MODELS)
def test_a_vision_model_of_transformers_is_pruned_exactly(name: str) -> None:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(shape)
    if name in STATIC:
        with pytest.raises(CaptureError):
            capture(model, x, dynamic_shapes="batch")
    program = capture(model, x, dynamic_shapes=None if name in STATIC else "batch")
    result = RemoveChannels(ratio=0.5, round_to=1)(program)
    verdict = verify.check(program, result)
    assert verdict.ok, verdict.disagreements
    assert restriction(program, result) <= 1e-10
    assert result.program.params < 0.9 * program.params
