"""What a program asks of a device: its layers at any sizes, and the kernels that an inference library makes of them."""
