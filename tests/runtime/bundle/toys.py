"""What the tests of bundles share."""

SCRIPTS = [
    "bench_device.py",
    *(f"graphcomb_{name}.py" for name in "contents cuda measuring ort telemetry trt".split()),
]
QUICK = ["--engine", "onnxruntime", "--rounds", "3", "--power-seconds", "0.2", "--seconds", "5"]
