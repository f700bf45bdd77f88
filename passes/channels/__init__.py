"""Removal of channels, heads and hidden units: scores, selection of sizes, pruning at once or while training."""
