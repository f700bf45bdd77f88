"""Conversion of an ONNX file to fp16 or bf16: types, the nodes that stay in fp32, and an emulation to compare with."""
