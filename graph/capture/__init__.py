"""How programs are made: from an eager model by torch.export, made functional and trainable, or from a `.pt2` file."""
