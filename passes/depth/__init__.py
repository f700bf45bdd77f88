"""Removal of whole blocks: finding them, pricing them, fading them in training, and their pruned forms."""
