"""A program as work for a device: its layers at any sizes, and the kernels that an inference library makes of them."""
