"""ONNX in: an ONNX file becomes a PyTorch module of ATen operators, which is captured like any other."""
