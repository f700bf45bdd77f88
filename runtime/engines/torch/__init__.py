"""Engines that PyTorch compiles."""
