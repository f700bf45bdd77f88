"""Sparsification: choosing the weights that become zero, and adapting the others."""
