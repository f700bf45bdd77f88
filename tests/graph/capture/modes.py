"""A program and the model that it was made of, side by side in both modes."""

import pytest
import torch

import graphcomb as g


def capture(model, *args, **options):
    """Capture that must be proven in both modes without a word."""
    program = g.capture(model, args, **options)
    assert program.proof.skipped == []
    assert program.proof.error == {"eval": pytest.approx(0, abs=1e-5), "train": pytest.approx(0, abs=1e-5)}
    return program


def same_in_both_modes(model, module, x, calls=2):
    for training in (True, False):
        model.train(training)
        module.train(training)
        for _ in range(calls):
            torch.manual_seed(0)
            expected = model(x)
            torch.manual_seed(0)
            torch.testing.assert_close(module(x), expected)
    for name, buffer in model.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(module.get_buffer(name), buffer)
