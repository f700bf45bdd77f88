"""Folders of images as data, and the recipes at paper scale, tried on a few generated images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from graphcomb.data import image_folder, segmentation_folder
from graphcomb.graph.errors import BadInput
from graphcomb.recipe import read_recipe

pytest.importorskip("torchvision")
Image = pytest.importorskip("PIL.Image")
RECIPES = Path(__file__).parents[3] / "benchmarks" / "recipes"


def photograph(path: Path, seed: int, size: tuple[int, int] = (48, 40)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    root = tmp_path / "classes"
    for split, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("ant", "bee")):
            for i in range(count):
                photograph(root / split / name / f"{i}.jpg", 10 * label + i)
    return root


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    root = tmp_path / "scenes"
    for split, count in (("training", 4), ("validation", 2)):
        for i in range(count):
            photograph(root / "images" / split / f"{i}.jpg", i)
            values = np.random.default_rng(i).integers(0, 4, (48, 40), dtype=np.uint8)
            (root / "annotations" / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(root / "annotations" / split / f"{i}.png")
    return root


def test_image_folder(classes: Path) -> None:
    train, val = image_folder(str(classes), size=32, batch_size=4, workers=0)
    images, labels = next(iter(val))
    assert (images.shape, images.dtype, labels.tolist()) == ((4, 3, 32, 32), torch.float32, [0, 0, 1, 1])
    assert len(train) == 2
    torch.manual_seed(0)
    first = [y.tolist() for _, y in train]
    torch.manual_seed(0)
    assert [y.tolist() for _, y in train] == first
    again = next(iter(val))[0]
    assert torch.equal(images, again)  # validation is not augmented
    assert abs(float(images.mean())) < 0.5  # normalised


def test_segmentation_folder(scenes: Path) -> None:
    train, val = segmentation_folder(str(scenes), size=32, batch_size=2, workers=0)
    images, labels = next(iter(val))
    assert (images.shape, labels.shape, labels.dtype) == ((2, 3, 32, 32), (2, 32, 32), torch.int64)
    assert set(labels.unique().tolist()) == {-100, 0, 1, 2}  # 0 is ignored, c is class c - 1
    for x, y in train:
        assert x.shape == (2, 3, 32, 32)
        assert y.shape == (2, 32, 32)


def test_labels_stay_on_their_pixels(tmp_path: Path) -> None:
    """The left half of the image is bright and of class 1: whatever is cropped, scaled and flipped, they agree."""
    root = tmp_path / "halves"
    for split in ("training", "validation"):
        for kind, values in (("images", (0, 255)), ("annotations", (1, 2))):
            (root / kind / split).mkdir(parents=True)
            half = np.full((64, 64), values[0], dtype=np.uint8)
            half[:, :32] = values[1]
            Image.fromarray(half).save(root / kind / split / "a.png")
    train = segmentation_folder(str(root), size=48, batch_size=1, workers=0)[0].dataset
    torch.manual_seed(0)
    for _ in range(12):
        x, y = train[0]
        known = y >= 0
        agree = (x.mean(0) > 0)[known] == (y == 1)[known]
        assert agree.float().mean() > 0.95  # but for the blurred edge


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: (root / "val").rename(root / "test"), "val is not a folder"),
        (lambda root: (root / "train" / "bee").rename(root / "train" / "wasp"), "only one of them has bee"),
    ],
)
def test_class_folders_that_do_not_fit(classes: Path, break_it, message: str) -> None:
    break_it(classes)
    with pytest.raises(BadInput, match=message):
        image_folder(str(classes), workers=0)


def test_empty_class_folders(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(BadInput, match="image-folder: "):
        image_folder(str(tmp_path), workers=0)


def test_scene_folders_that_do_not_fit(scenes: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a folder"):
        segmentation_folder(str(tmp_path), workers=0)
    (scenes / "annotations" / "validation" / "1.png").unlink()
    with pytest.raises(BadInput, match=r"1\.png is missing"):
        segmentation_folder(str(scenes), workers=0)


# ------------------------------------------------------------------------------------------------------- paper scale
SMALL = {
    "imagenet_resnet50.yaml": ["model.arguments={weights: null, num_classes: 2}"],
    "imagenet_deit_s.yaml": [
        "model.arguments={model_name: deit_small_patch16_224, img_size: 64, num_classes: 2, depth: 3}",
    ],
    "ade20k_deeplab.yaml": ["model.arguments={classes: 3}"],
    "ade20k_segformer.yaml": ["model.arguments={num_labels: 3}"],
}  # fmt: skip


def test_every_recipe_is_tried() -> None:
    assert {p.name for p in RECIPES.glob("*.yaml")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_recipes_are_valid(name: str) -> None:
    recipe = read_recipe(RECIPES / name)
    assert recipe.passes[0].train is not None
    assert "Not run at scale" in (RECIPES / name).read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_recipes_run_on_a_few_images(name: str, cli, classes: Path, scenes: Path, tmp_path: Path, monkeypatch) -> None:
    for package in ("timm", "transformers"):
        pytest.importorskip(package)
    monkeypatch.chdir(RECIPES)
    root, size = (classes, 64) if name.startswith("imagenet") else (scenes, 64)
    changes = [
        *SMALL[name], f"data.arguments={{root: {root}, size: {size}, batch_size: 2, workers: 0}}", "passes.0.macs=0.7",
        "passes.0.interval=1", "passes.0.train.steps=4", "passes.0.train.precision='no'", "target=cpu", "precision=fp32",
        "outputs={engines: [], bench: false, onnx: false}",
    ]  # fmt: skip
    options = [o for change in changes for o in ("--set", change)]
    outcome = cli("run", RECIPES / name, "--out", tmp_path / "out", *options)
    assert (outcome.code, outcome.err.strip()) == (0, "")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["macs_ratio"] >= 1 / 0.7
    assert summary["surgery_error"] <= 1e-10
    if name.startswith("ade20k"):
        monkeypatch.syspath_prepend(str(RECIPES))
        import miou

        from graphcomb import load

        batches = segmentation_folder(str(scenes), size, 2, 0)[1]
        assert 0 <= miou.mean_iou(load(tmp_path / "out" / "model.pt2"), batches) <= 100
