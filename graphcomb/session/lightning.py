"""A pass inside Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from ..passes.base import Pass, PassResult
from .session import Session, attach

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]


class SessionCallback(Callback):
    """Let a pass work on a network that Lightning trains: `Trainer(callbacks=[SessionCallback(pass_, example=(x,))])`.

    network: the attribute of the LightningModule that is the network, as a dotted path; None for the LightningModule itself.
    The other arguments are those of `graphcomb.attach`; the module keeps its class and shapes (cut="end"). `result` holds
    the `PassResult` when training has ended; checkpoints of the Trainer hold the session.
    """

    result: PassResult | None = None
    session: Session | None = None

    def __init__(self, pass_: Pass, example: tuple[Any, ...], network: str | None = "model", **options: Any):
        self.pass_, self.network, self.options = pass_, network, {"example": example} | options
        self._stored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach, once the Trainer knows how many steps there will be."""
        model = pl_module if self.network is None else pl_module.get_submodule(self.network)
        steps = int(trainer.estimated_stepping_batches)
        self.session = attach(model, self.pass_, steps=steps, cut="end", **self.options)
        if self._stored is not None:
            self.session.load_state_dict(self._stored)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Gradients are complete and unscaled."""
        if self.session is not None:
            self.session.before_step(optimizer)

    def on_train_batch_end(self, *_: Any) -> None:
        """Count the step, where this batch ended one."""
        if self.session is not None and self.session.stepping:
            self.session.after_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut."""
        if self.session is not None:
            self.result = self.session.finish()

    def state_dict(self) -> dict[str, Any]:
        """The session's."""
        return {} if self.session is None else self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it until the session is attached."""
        self._stored = state_dict or None
