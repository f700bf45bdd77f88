"""A program as Python source that needs only PyTorch."""
