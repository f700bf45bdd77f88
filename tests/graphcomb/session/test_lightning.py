"""A pass inside Lightning's Trainer does what it does in a plain loop."""

import warnings

import pytest
import torch
from torch.nn import functional as F

from graphcomb.passes import RemoveChannels

from .toys import STEPS, Residual, attached, batch, train

L = pytest.importorskip("lightning.pytorch")


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = Residual()

    def training_step(self, _):
        x, y = batch(self.global_step)  # the Trainer's loader begins anew after a resume within an epoch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)


def fitted(tmp_path, *callbacks, first=None, **options):
    from graphcomb.session.lightning import SessionCallback

    pass_ = RemoveChannels(macs=0.5, interval=2, round_to=1)
    callback, module = SessionCallback(pass_, example=(batch(0)[0],)), Classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(
            max_steps=STEPS, callbacks=[callback, *callbacks], default_root_dir=tmp_path, logger=False, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
        )  # fmt: skip
        data = torch.utils.data.DataLoader([batch(step) for step in range(STEPS)], batch_size=None)
        trainer.fit(module, data, ckpt_path=first)
    return callback, module, trainer


def test_it_is_the_plain_loop(tmp_path):
    callback, module, _ = fitted(tmp_path)
    session = attached(Residual().train(), "end")
    train(session, torch.optim.SGD(session.module.parameters(), lr=0.05, momentum=0.9, nesterov=True))
    plain = session.finish()
    assert callback.result.record["events"] == plain.record["events"]
    for a, b in zip(callback.result.program.module().parameters(), plain.program.module().parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert isinstance(module.model, Residual)


def test_a_checkpoint_of_the_trainer_goes_on(tmp_path):
    class Keep(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 5:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    whole = fitted(tmp_path, Keep())[0].result
    resumed = fitted(tmp_path, first=tmp_path / "half.ckpt")[0].result
    assert resumed.record["events"] == whole.record["events"]
    for a, b in zip(resumed.program.module().parameters(), whole.program.module().parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_gradients_may_be_accumulated(tmp_path):
    callback, _, trainer = fitted(tmp_path, accumulate_grad_batches=3)
    assert callback.session.step == trainer.global_step == STEPS
    assert callback.result.record["verified"]["error"] < 1e-10
