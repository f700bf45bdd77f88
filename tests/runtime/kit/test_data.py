"""The accuracy on a folder of images, against counts made by hand."""

import importlib.util
import json

import numpy as np
import pytest

from graphcomb.runtime.kit import data
from graphcomb.runtime.kit.contents import Failure

from .toys import QUICKLY


class Identity:
    """An engine whose outputs are its input, averaged over height and width or not."""

    def __init__(self, pooled):
        self.pooled = pooled

    def outputs(self, feeds):
        (images,) = feeds.values()
        return {"y": images.mean((2, 3)) if self.pooled else images}


def images(folder, *values):
    """Images of 3 channels, of which one channel is 1: the class that `Identity` finds."""
    folder.mkdir(parents=True)
    for index, value in enumerate(values):
        image = np.zeros((3, 4, 4), np.float32)
        image[value] = 1
        np.save(folder / f"{index}.npy", image)


HOW = {"mean": [0.0], "std": [1.0]}


def test_the_first_class_is_counted(tmp_path):
    images(tmp_path / "ant", 0, 0, 1)
    images(tmp_path / "bee", 1)
    images(tmp_path / "cat", 2, 0, 2)
    pairs = data.find(tmp_path)
    assert [target for _, target in pairs] == [0, 0, 0, 1, 2, 2, 2]
    found = data.evaluate(Identity(True), "x", pairs, (2, 3, 4, 4), HOW, None)
    assert found == {"metric": "top1", "value": round(5 / 7, 6), "images": 7}


def test_folders_of_numbers_are_the_classes(tmp_path):
    images(tmp_path / "2", 2)
    images(tmp_path / "10", 0)
    assert [target for _, target in data.find(tmp_path)] == [10, 2]


def test_a_mask_gives_the_intersection_over_union(tmp_path):
    scores = np.zeros((3, 2, 2), np.float32)
    scores[1, 0] = 1  # the upper row is of class 1, the lower of class 0
    mask = np.array([[1, 1, 1, 1], [1, 1, 2, 255], [0, 0, 0, 0], [0, 0, 1, 0]], np.uint8)
    np.save(tmp_path / "a.npy", scores)
    np.save(tmp_path / "a.mask.npy", mask)
    found = data.evaluate(Identity(False), "x", data.find(tmp_path), (1, 3, 2, 2), HOW, None)
    # Class 0: 7 of 8; class 1: 6 hits, 7 predicted, 7 wanted; class 2: 0 of 1.
    assert found == {"metric": "miou", "value": round((7 / 8 + 6 / 8 + 0) / 3, 6), "images": 1}


def test_a_function_of_the_user_is_averaged(tmp_path):
    images(tmp_path / "images" / "a", 0, 1)
    (tmp_path / "metric.py").write_text("def margin(outputs, target):\n    return outputs[0][target]\n")
    metric = data.load_metric(f"{tmp_path}/metric.py:margin")
    pairs = data.find(tmp_path / "images")
    found = data.evaluate(Identity(True), "x", pairs, (1, 3, 4, 4), HOW, metric)
    assert found == {"metric": "margin", "value": 0.5, "images": 2}
    with pytest.raises(Failure, match=r"--metric .*other: AttributeError"):
        data.load_metric(f"{tmp_path}/metric.py:other")
    with pytest.raises(Failure, match=r"expected FILE\.py:FUNCTION"):
        data.load_metric("metric")


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="needs Pillow")
def test_a_picture_is_resized_and_normalised(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((8, 6, 3), (255, 0, 51), np.uint8)).save(tmp_path / "a.png")
    found = data.read_image(tmp_path / "a.png", (3, 4, 2), {"mean": [0.5, 0.5, 0.1], "std": [0.5, 0.25, 0.1]})
    assert found.shape == (3, 4, 2)
    np.testing.assert_allclose(found[:, 0, 0], [1, -2, 1], atol=1e-6)


def test_what_is_no_folder_of_images_is_said(tmp_path):
    with pytest.raises(Failure, match="there is no folder"):
        data.find(tmp_path / "no")
    with pytest.raises(Failure, match=r"no images in"):
        data.find(tmp_path)
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 4), np.float32))
    with pytest.raises(Failure, match=r"a\.npy has no mask beside it"):
        data.find(tmp_path)
    with pytest.raises(Failure, match=r"a\.npy has shape \(3, 4, 4\), the model takes \(3, 8, 8\)"):
        data.read_image(tmp_path / "a.npy", (3, 8, 8), HOW)
    (tmp_path / "b.npy").write_text("no array")
    with pytest.raises(Failure, match=r"b\.npy: no image"):
        data.read_image(tmp_path / "b.npy", (3, 8, 8), HOW)


@pytest.mark.parametrize("classic", ["10.3.0"], indirect=True)
def test_a_model_without_images_keeps_its_other_results(script, classic, bundle, tmp_path):
    """The stand-in's model takes rows of four numbers."""
    images(tmp_path / "images" / "a", 0)
    out = bundle / "r.json"
    assert script.main(["--out", str(out), *QUICKLY, "--quiet", "--data", str(tmp_path / "images")]) == 0
    found = json.loads(out.read_text())
    assert "dense: accuracy: not measured: --data: only for models with one input of images" in found["notes"]
    assert found["models"]["dense"]["layers"]
