"""A pass inside transformers' Trainer, on one of its models."""

import pytest
import torch

import graphcomb
from graphcomb.passes import RemoveChannels

transformers = pytest.importorskip("transformers")
STEPS = 8


def model():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=16, patch_size=8,
        num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


class Plain(torch.nn.Module):
    """A module of the user's own; checkpoints of ViT have other names than the model in some releases of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 2))
        self.head = torch.nn.Linear(16, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values).relu().mean((2, 3)))
        return {"logits": logits} | (
            {} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels)}
        )


def data():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 16, 16, generator=generator)
    return [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(images)]


def trained(folder, own, resume=None, stop=None):
    from graphcomb.session.transformers import SessionCallback

    callback = SessionCallback(
        RemoveChannels(macs=0.7, interval=1, round_to=1), kwargs={"pixel_values": torch.randn(2, 3, 16, 16)}
    )

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_save = state.global_step == 3
            control.should_training_stop |= state.global_step == stop

    arguments = transformers.TrainingArguments(
        folder, max_steps=STEPS, per_device_train_batch_size=4, report_to=[], disable_tqdm=True, use_cpu=True,
        save_strategy="no", seed=3, learning_rate=1e-2, logging_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(own, arguments, train_dataset=data(), callbacks=[callback, Stop()])
    trainer.train(resume_from_checkpoint=resume)
    return callback


def test_the_model_keeps_its_class_and_the_program_is_its_slice(tmp_path):
    own = model()
    callback = trained(tmp_path, own)
    result = callback.result
    assert isinstance(own, transformers.ViTForImageClassification)
    assert result.record["steps"] == STEPS
    assert result.program.macs <= 0.7 * callback.session.program.macs
    assert result.record["verified"]["error"] < 1e-10
    x = torch.randn(5, 3, 16, 16)
    ours = result.program.module().eval()(pixel_values=x)
    assert torch.allclose(ours.logits, own.eval()(pixel_values=x).logits, atol=1e-5)


def test_a_checkpoint_goes_on(tmp_path):
    whole = trained(tmp_path, Plain()).result
    resumed = trained(tmp_path, Plain(), resume=str(tmp_path / "checkpoint-3")).result
    assert resumed.record["events"] == whole.record["events"]
    for a, b in zip(resumed.program.module().parameters(), whole.program.module().parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_training_that_ends_too_early_says_so(tmp_path):
    with pytest.raises(graphcomb.BadInput, match="after 2 of 8 steps the pass has not done its work"):
        trained(tmp_path, Plain(), stop=2)
