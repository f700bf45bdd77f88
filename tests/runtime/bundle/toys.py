"""What the tests of bundles share."""

QUICK = ["--engine", "onnxruntime", "--rounds", "3", "--power-seconds", "0.2", "--seconds", "5"]
