"""A callback that runs a pass inside Lightning's Trainer."""

from __future__ import annotations

from typing import Any

from ..passes.base import Pass, PassResult
from .session import Session, attach

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]


class SessionCallback(Callback):
    """Apply a pass to a network while Lightning trains it: `Trainer(callbacks=[SessionCallback(pass_, example=(x,))])`.

    network: dotted path of the network in the LightningModule; None for the LightningModule itself. The other arguments are
    those of `graphcomb.attach`, with cut="end": the module keeps its class and shapes. After training `result` is the
    `PassResult`. Checkpoints of the Trainer contain the session.
    """

    result: PassResult | None = None
    session: Session | None = None

    def __init__(self, pass_: Pass, example: tuple[Any, ...], network: str | None = "model", **options: Any):
        self.pass_, self.network, self.options = pass_, network, {"example": example} | options
        self._stored: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the pass. Only now does the Trainer know the number of steps."""
        model = pl_module if self.network is None else pl_module.get_submodule(self.network)
        steps = int(trainer.estimated_stepping_batches)
        self.session = attach(model, self.pass_, steps=steps, cut="end", **self.options)
        if self._stored is not None:
            self.session.load_state_dict(self._stored)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Call `Session.before_step`. The gradients are complete and unscaled now."""
        if self.session is not None:
            self.session.before_step(optimizer)

    def on_train_batch_end(self, *_: Any) -> None:
        """Call `Session.after_step`, unless this batch only accumulated gradients."""
        if self.session is not None and self.session.stepping:
            self.session.after_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the session, which removes what was held at zero."""
        if self.session is not None:
            self.result = self.session.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the session."""
        return {} if self.session is None else self.session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep a state, which is loaded when the pass is attached."""
        self._stored = state_dict or None
