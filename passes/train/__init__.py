"""Training: options, callbacks, the loop."""
