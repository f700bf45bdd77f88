"""From a program to an ONNX file that was compared with it."""
