"""The backends TensorRT and TensorRT-RTX: build and run engines, and read build logs."""
