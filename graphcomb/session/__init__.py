"""Passes that train, in the user's own training loop: `attach` gives a `Session` (session.py).

The masks that hold removed channels and pruned weights at zero during training are in the passes: `HeldPruner` in
passes/channels/masked_module.py and `HeldZeros` in passes/train/callbacks.py. lightning.py and transformers.py have
callbacks for these trainers.
"""

from .session import Session, attach

__all__ = ["Session", "attach"]
