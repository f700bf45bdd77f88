"""The example inside ultralytics' trainer, where that is installed: made scenes, a few steps, their class back."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

cv2 = pytest.importorskip("cv2")
pytest.importorskip("ultralytics")
FILE = Path(__file__).parents[2] / "examples" / "ultralytics_yolo.py"
SIDE = 64


def scenes(root: Path) -> Path:
    """Squares in two colours on noise, in ultralytics' folders."""
    draw = np.random.default_rng(0)
    for part in ("train", "val"):
        (root / "images" / part).mkdir(parents=True)
        (root / "labels" / part).mkdir(parents=True)
        for i in range(16):
            image = draw.integers(0, 60, (SIDE, SIDE, 3), dtype=np.uint8)
            side, kind = int(draw.integers(15, 30)), int(draw.integers(2))
            x, y = draw.integers(0, SIDE - side, 2)
            image[y : y + side, x : x + side] = ((0, 255, 0), (0, 0, 255))[kind]
            cv2.imwrite(str(root / "images" / part / f"{i}.png"), image)
            box = ((x + side / 2) / SIDE, (y + side / 2) / SIDE, side / SIDE, side / SIDE)
            (root / "labels" / part / f"{i}.txt").write_text(" ".join(map(str, (kind, *box))) + "\n")
    (root / "data.yaml").write_text(f"path: {root}\ntrain: images/train\nval: images/val\nnames: [green, red]\n")
    return root / "data.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_a_yolo_is_pruned_in_its_own_trainer(name, tmp_path):
    spec = importlib.util.spec_from_file_location("ultralytics_yolo", FILE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    trainer = example.main(
        f"{name}.yaml", str(scenes(tmp_path / "scenes")), f"imgsz={SIDE}", "epochs=6", "batch=8", "nbs=8", "workers=0",
        "amp=False", f"project={tmp_path}", "device=cpu",
    )  # fmt: skip
    result, small = trainer.result, trainer.small
    assert result.program.macs <= 0.5 * trainer.session.program.macs
    assert type(small) is type(trainer.model)
    assert sum(p.numel() for p in small.parameters()) == result.program.params
    images = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        ours, theirs = result.program.module()(images), small.eval()(images)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-3)
    assert (trainer.save_dir / "small.onnx").is_file()
