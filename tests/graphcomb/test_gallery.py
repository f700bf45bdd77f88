"""The gallery: a card of a toy network from end to end, and the page that is in the book against the stored results."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import graphcomb
from graphcomb import passes

ROOT = Path(__file__).parents[2]
NAMES = ["efficientnet_lite0", "efficientnet_lite2", "mobilenet_v2", "craft", "crnn", "pp_ocr", "segformer", "detr"]
MADE = [name for name in NAMES if (ROOT / "benchmarks" / "results" / "gallery" / f"{name}.json").is_file()]


@pytest.fixture(scope="module")
def gallery():
    for package in ("timm", "torchvision"):
        pytest.importorskip(package)
    with pytest.MonkeyPatch.context() as path:
        path.syspath_prepend(ROOT / "benchmarks")
        import gallery

        yield gallery


def toy(gallery, score):
    """A segmenter with channels to spare: 16 of its 32 hidden ones are copies of the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 11, 1))
    with torch.no_grad():
        model[0].weight[16:], model[0].bias[16:] = model[0].weight[:16], model[0].bias[:16]
    draw = lambda seen: (torch.randn(20, 1, 12, 12), list(torch.randint(11, (20, 12, 12))))  # noqa: E731
    return dataclasses.replace(gallery.CARDS["segformer"].network(), build=lambda: model, score=score, draw=draw)


def agreement(outputs, dense, _):
    return {"agreement": float((outputs.argmax(1) == dense.argmax(1)).float().mean())}


def test_a_card_is_made_from_end_to_end(gallery, tmp_path, monkeypatch) -> None:
    network = toy(gallery, agreement)
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path))
    monkeypatch.setattr(gallery, "PICTURES", tmp_path)
    card = gallery.Card("Toy", "a toy", lambda: network, "segments", (0.1, 0.3, 0.5, 0.9))
    monkeypatch.setitem(gallery.CARDS, "toy", card)
    row = gallery.make("toy", seconds=1)
    row = json.loads(json.dumps(row))
    assert [t["share"] for t in row["tried"]] == [0.1, 0.3, 0.5]
    assert "cannot be reached" in row["tried"][0]["refused"]
    assert row["tried"][1]["scores"]["agreement"] < 0.98  # channels went that have no copy
    assert row["compressed"]["scores"]["agreement"] > 0.98
    assert row["compressed"]["macs"] * 2 == row["dense"]["macs"] == 12 * 12 * 32 * (9 + 11)
    assert row["exact"] < 1e-10
    assert any("an output of the program" in entry["why"] for entry in row["left alone"])
    assert graphcomb.load(gallery.file("toy")).params == row["compressed"]["params"]
    text = gallery.gallery_page.page({"toy": row})
    assert "50%" in text
    assert (tmp_path / "toy.png").stat().st_size < 100_000


def test_a_card_that_keeps_too_little_says_so(gallery, tmp_path, monkeypatch) -> None:
    network = toy(gallery, agreement)
    monkeypatch.setenv("GRAPHCOMB_CACHE", str(tmp_path))
    monkeypatch.setattr(gallery, "PICTURES", tmp_path)
    monkeypatch.setitem(gallery.CARDS, "toy", gallery.Card("Toy", "a toy", lambda: network, "segments", (0.3,), 1.01))
    assert "does not keep 101%" in gallery.gallery_page.page({"toy": gallery.make("toy", seconds=1)})


def test_the_page_is_made_from_the_results(gallery) -> None:
    rows = dict(gallery.rows())
    assert list(gallery.CARDS) == NAMES
    assert list(rows) == MADE
    assert len(rows) >= 2
    assert gallery.gallery_page.PAGE.read_text() == gallery.gallery_page.page(rows, gallery.missing())


@pytest.mark.parametrize("name", MADE)
def test_the_picture_of_a_card_is_there_and_small(name: str) -> None:
    assert (ROOT / "docs" / "gallery" / f"{name}.png").stat().st_size < 300_000


def test_the_recipes_of_the_page_name_passes_and_options() -> None:
    blocks = (ROOT / "docs" / "gallery.md").read_text().split("```yaml\n")[1:]
    assert len(blocks) == len(MADE)
    for block in blocks:
        for step in yaml.safe_load(block.split("```")[0])["passes"]:
            ((name, options),) = step.items()
            getattr(passes, name)(**options)
