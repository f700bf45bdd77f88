"""Backends that compile PyTorch programs: inductor and Torch-TensorRT."""
