"""Pruning inside transformers' Trainer: one callback. A small ViT on digits of scikit-learn.

python examples/transformers_trainer.py        # pip install transformers accelerate
"""

import sys

from torch import randn
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from graphcomb.data import digits
from graphcomb.passes import RemoveChannels
from graphcomb.session.transformers import SessionCallback


def main(steps: int = 400, width: int = 64, folder: str = "out-transformers"):
    config = ViTConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=4, intermediate_size=2 * width, image_size=16,
        patch_size=4, num_channels=1, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    train, _ = digits(size=16)
    images, labels = zip(*train.dataset, strict=True)
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, labels, strict=True)]
    # The trunk stays whole: its LayerNorms count zeros. Heads and hidden units go.
    callback = SessionCallback(
        RemoveChannels(macs=0.8, interval=10, round_to=1), kwargs={"pixel_values": randn(2, 1, 16, 16)}
    )
    arguments = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=64, learning_rate=1e-3, report_to=[], save_strategy="no"
    )
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    callback.result.program.save("small.pt2")
    print(f"{callback.result.program.macs / callback.session.program.macs:.0%} of the MACs")
    return model, callback


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
