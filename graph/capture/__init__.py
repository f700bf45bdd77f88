"""Where programs come from: an eager model by torch.export, made functional and trainable, or a `.pt2` file."""
