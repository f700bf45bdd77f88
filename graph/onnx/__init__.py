"""Import of ONNX: a file becomes a PyTorch module of ATen operators, which is captured like any other."""
