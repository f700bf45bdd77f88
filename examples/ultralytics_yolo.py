"""A YOLO pruned inside ultralytics' own trainer: its data, losses, scheduler and moving average go on as they are.

    pip install ultralytics   # AGPL-3.0; graphcomb does not need it
    python examples/ultralytics_yolo.py yolov8n.yaml data.yaml imgsz=640 epochs=100

The smaller network comes back in their class (`result.transplant`), with the averaged weights, and as an ONNX file.
"""

import sys

import torch
import yaml
from ultralytics.models.yolo.detect import DetectionTrainer

import graphcomb
from graphcomb.passes import RemoveChannels


class PruningTrainer(DetectionTrainer):
    """The trainer with a session: one call before each optimizer step, one after."""

    macs = 0.5

    def _setup_train(self, *args):
        super()._setup_train(*args)
        images = torch.zeros(2, 3, self.args.imgsz, self.args.imgsz, device=self.device)
        steps = max(1, self.epochs * len(self.train_loader) // self.accumulate)  # warm-up takes more, never fewer
        pass_ = RemoveChannels(macs=self.macs, for_class=True)
        self.session = graphcomb.attach(self.model, pass_, example=(images,), steps=steps)
        self.session.follow(self.ema.ema)

    def optimizer_step(self):
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        self.session.before_step(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.model)
        self.session.after_step()


def main(model: str, data: str, *options: str) -> PruningTrainer:
    """Train and prune; the result is `trainer.result`, the smaller YOLO `trainer.small`."""
    settings = {key: yaml.safe_load(value) for key, value in (option.split("=", 1) for option in options)}
    trainer = PruningTrainer(overrides={"model": model, "data": data, "val": False, "plots": False} | settings)
    trainer.train()
    trainer.result = trainer.session.finish(weights=trainer.ema.ema)
    trainer.small = trainer.result.transplant(trainer.model)
    graphcomb.runtime.export_onnx(trainer.result.program, trainer.save_dir / "small.onnx", "fp16")
    print(f"{trainer.session.program} became {trainer.result.program}, in {trainer.save_dir}")
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
