import hashlib
import json

import numpy as np
import pytest

from graphcomb.runtime.kit import bench as bench_device


@pytest.fixture
def script():
    """The script that a bundle takes to a device."""
    return bench_device


@pytest.fixture
def bundle(script, tmp_path, monkeypatch):
    """A bundle of two models, whose files the stand-in does not read; the first is what it computes, the second not."""
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    models = {}
    for name, factor in (("dense", 2), ("compressed", 2.5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"model")
        np.savez(tmp_path / name / "reference.npz", **{"input:x": x, "output:000": factor * x})
        digest = hashlib.sha256(b"model").hexdigest()
        models[name] = {"file": f"{name}/model.onnx", "reference": f"{name}/reference.npz", "sha256": digest}
    head = {"format": script.FORMAT, "precision": "fp16"}
    (tmp_path / "bundle.json").write_text(json.dumps(head | {"models": models}))
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setenv("PATH", "")
    return tmp_path
