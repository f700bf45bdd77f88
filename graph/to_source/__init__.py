"""A program as Python source that needs PyTorch alone."""
