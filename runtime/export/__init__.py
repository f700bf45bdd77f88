"""Export a program to an ONNX file (to_onnx) and compare the file with the program (compare, parity)."""
