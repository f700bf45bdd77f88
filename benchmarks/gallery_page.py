"""The pictures and the page of `gallery.py`, which calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import detr
import torch
import trained
from common import write
from gallery_networks import ppocr_boxes
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

PAGE = Path(__file__).parents[1] / "docs" / "gallery.md"
COUNT, SIDE, LABEL, COLOURS = 5, 144, 84, 96  # images of a picture, pixels of a tile and of the row's name, palette
GREEN, RED, INK = (20, 150, 60), (225, 45, 45), (30, 30, 30)
CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PALETTE = torch.tensor([
    (40, 40, 40), (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48), (145, 30, 180),
    (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212),
], dtype=torch.uint8)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- pictures
@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)


def look(image: Tensor, width: int = SIDE) -> Image.Image:
    """An input, however normalised, from its least to its largest value."""
    values = image.expand(3, -1, -1).permute(1, 2, 0)
    values = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-6)
    picture = Image.fromarray((255 * values).byte().numpy())
    return picture.resize((width, round(width * picture.height / picture.width)), Image.Resampling.BICUBIC)


def strip(text: str, colour: tuple[int, int, int] = INK) -> Image.Image:
    """Text on white, on as many lines as it has, cut to the width of a tile."""
    lines = text.split("\n")
    picture = Image.new("RGB", (SIDE, 16 * len(lines) + 4), "white")
    for i, line in enumerate(lines):
        while font(11).getlength(line) > SIDE - 4:
            line = line[:-2].rstrip() + "…"
        ImageDraw.Draw(picture).text((2, 16 * i + 2), line, colour, font(11))
    return picture


def shaded(image: Tensor, mask: Tensor, colour: tuple[int, int, int]) -> Image.Image:
    """An input with half of a colour where the mask (H, W), of any resolution, is true."""
    picture = look(image)
    alpha = Image.fromarray((140 * mask.byte()).numpy()).resize(picture.size, Image.Resampling.NEAREST)
    return Image.composite(Image.new("RGB", picture.size, colour), picture, alpha)


def class_tile(image: Tensor, output: Tensor) -> Image.Image:
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    share, which = output.softmax(0).max(0)
    return strip(f"{_IMAGENET_CATEGORIES[which]}\n{100 * share:.0f} %")


def word_tile(image: Tensor, output: Tensor) -> Image.Image:
    return strip(trained.read(output[None])[0])


def craft_tile(image: Tensor, output: Tensor) -> Image.Image:
    return shaded(image, (output > trained.THRESHOLD).any(2), RED)


def pp_ocr_tile(image: Tensor, output: Tensor) -> Image.Image:
    return shaded(image.flip(0), ppocr_boxes(output[None])[0], RED)


def segment_tile(image: Tensor, output: Tensor) -> Image.Image:
    """output: class scores (classes, H, W), or labels (H, W)."""
    labels = output.argmax(0) if output.ndim == 3 else output
    return Image.fromarray(PALETTE[labels].numpy()).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def box_tile(image: Tensor, output: dict[str, Tensor]) -> Image.Image:
    """output: scores and boxes of the queries, of which those from 0.4 on are drawn; or the targets."""
    found = output
    if "labels" not in output:
        found = detr.best({key: value[None] for key, value in output.items()}, 0.4)[0]
    picture = look(image)
    draw, factor = ImageDraw.Draw(picture), SIDE / image.shape[2]
    for box, label in zip(found["boxes"] * factor, found["labels"].tolist(), strict=True):
        colour = tuple(PALETTE[label + 1].tolist())
        draw.rectangle(box.tolist(), outline=colour, width=2)
        draw.text((float(box[0]) + 3, float(box[1]) + 1), CLASSES[label], colour, font(10))
    return picture


# By kind: how an input, an output and a ground truth are drawn.
Tile = Callable[[Tensor, Any], Image.Image]
TILES: dict[str, tuple[Callable[[Tensor], Image.Image], Tile, Tile | None]] = {
    "classes": (look, class_tile, None),
    "words": (look, word_tile, lambda image, word: strip(word, GREEN)),
    "craft": (look, craft_tile, lambda image, boxes: shaded(image, boxes, GREEN)),
    "pp_ocr": (
        lambda image: look(image.flip(0)),
        pp_ocr_tile,
        lambda image, boxes: shaded(image.flip(0), boxes, GREEN),
    ),
    "segments": (look, segment_tile, segment_tile),
    "boxes": (look, box_tile, box_tile),
}


def part(outputs: Any, i: int) -> Any:
    return {key: value[i] for key, value in outputs.items()} if isinstance(outputs, dict) else outputs[i]


def picture(kind: str, images: Tensor, truths: Any, dense: Any, compressed: Any, path: Path) -> None:
    """Write one picture: a column for each of the first images; below it the truth and what both networks make of it."""
    draw_input, draw_output, draw_truth = TILES[kind]
    rows = {"input": [draw_input(images[i]) for i in range(COUNT)]}
    if draw_truth is not None:
        rows["truth"] = [draw_truth(images[i], truths[i]) for i in range(COUNT)]
    for name, outputs in (("dense", dense), ("compressed", compressed)):
        rows[name] = [draw_output(images[i], part(outputs, i)) for i in range(COUNT)]
    heights = [max(tile.height for tile in tiles) + 6 for tiles in rows.values()]
    sheet = Image.new("RGB", (LABEL + COUNT * (SIDE + 6), sum(heights)), "white")
    top = 0
    for (name, tiles), height in zip(rows.items(), heights, strict=True):
        ImageDraw.Draw(sheet).text((4, top + 3), name, INK, font(12))
        for i, tile in enumerate(tiles):
            sheet.paste(tile, (LABEL + i * (SIDE + 6), top + 3))
        top += height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


# ----------------------------------------------------------------------------------------------------------------- page
def first(scores: dict[str, float]) -> tuple[str, float]:
    return next(iter(scores.items()))


def number(value: float) -> str:
    return f"{value / 1e6:,.2f} M" if value < 1e8 else f"{value / 1e9:,.2f} G"


def ratio(row: dict[str, Any]) -> str:
    found = row["latency"].get("ratio")
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})" if found else "not measured"


def predicted(row: dict[str, Any], target: str) -> str:
    if "note" in row["predicted"]:
        return "none"
    ms = row["predicted"][target]
    return f"{ms['dense'] / ms['compressed']:.2f}"


def summary_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| network | MACs left | score | before | after | times faster, measured | predicted | on an Orin Nano, predicted |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        (what, before), (_, after) = first(row["dense"]["scores"]), first(row["compressed"]["scores"])
        left = row["compressed"]["macs"] / row["dense"]["macs"]
        lines.append(
            f"| [{row['title']}](#{name}) | {left:.0%} | {what} | {before:.3f} | {after:.3f} | {ratio(row)} "
            f"| {predicted(row, 'cpu')} | {predicted(row, 'orin-nano')} |"
        )
    return lines


def card(name: str, row: dict[str, Any]) -> list[str]:
    (what, _), samples = first(row["dense"]["scores"]), row["images"]["repair"]
    lines = [f"## {row['title']} {{ #{name} }}", "", f"{row['title']}: {row['about']}.", ""]
    lines += [
        f"![{row['title']}: inputs, and what the dense and the compressed network make of them](gallery/{name}.png)",
        "",
    ]
    lines += ["| | before | after |", "| --- | ---: | ---: |"]
    dense, small = row["dense"], row["compressed"]
    lines += [f"| {key} | {value:.3f} | {small['scores'][key]:.3f} |" for key, value in dense["scores"].items()]
    lines += [
        f"| {label} | {number(dense[key])} | {number(small[key])} |"
        for key, label in (("macs", "MACs"), ("params", "parameters"))
    ]
    if "ms" in row["latency"]:
        ms = row["latency"]["ms"]
        lines.append(f"| latency, ms | {ms['dense']:.2f} | {ms['compressed']:.2f} |")
    lines += ["", latency_text(row), ""]
    lines += ["| MACs asked for | score without repair | score after repair |", "| ---: | ---: | ---: |"]
    for t in row["tried"]:
        cells = (
            ("cannot be reached", "") if "refused" in t else (f"{first(t[k])[1]:.3f}" for k in ("unrepaired", "scores"))
        )
        lines.append(f"| {t['share']:.0%} | {' | '.join(cells)} |")
    chosen = first(row["tried"][-1]["chosen by"])[1]
    fits = chosen >= row["least"] * chosen_dense(row)
    reached = "is the first that keeps" if fits else "is the largest tried, and does not keep"
    lines += [
        "",
        f"The last {reached} {row['least']:.0%} of the dense {what} on the half of the test images that chooses. The "
        f"figures are those of the other half ({row['images']['test']} images). Repaired from {samples} images without "
        f"labels. The removal is exact to {row['exact']:.0e} (float64).",
        "",
        "```yaml",
        "passes:",
        f"  - RemoveChannels: {{macs: {row['share']}, importance: repair, scope: global, samples: {samples}}}",
        f"  - Repair: {{samples: {samples}}}",
        "```",
        "",
        f"**What changed**: {row['narrowed']} groups of channels are narrower, and {row['repaired']} layers were repaired. "
        "Most went from " + ", ".join(f"`{c['what']}` ({c['before']} to {c['after']})" for c in row["changed"]) + ".",
        "",
    ]
    return [*lines, *left_alone(row)]


def chosen_dense(row: dict[str, Any]) -> float:
    return row["dense"]["chosen by"][next(iter(row["dense"]["scores"]))]


def latency_text(row: dict[str, Any]) -> str:
    prediction = (
        f"Predicted from data sheets: {predicted(row, 'cpu')} times on this processor, {predicted(row, 'orin-nano')} times "
        "on an Orin Nano in fp16."
    )
    if "note" in row["predicted"]:
        prediction = f"There is no prediction: {row['predicted']['note']}."
    if "ratio" not in row["latency"]:
        return f"Latency was not measured: {row['latency']['note']}. {prediction}"
    return (
        f"**{ratio(row)} times faster** in ONNX Runtime (one thread, one image; median of {row['latency']['rounds']} paired "
        f"rounds with its 95 % interval). {prediction}"
    )


def left_alone(row: dict[str, Any]) -> list[str]:
    if not row["left alone"]:
        return ["**Left alone**: nothing.", ""]
    lines = ["**Left alone**:", ""]
    for entry in row["left alone"][:5]:
        more = f" and {entry['count'] - 1} more" if entry["count"] > 1 else ""
        lines.append(f"- {entry['what']}: `{entry['for example']}`{more}: {entry['why']}")
    rest = sum(entry["count"] for entry in row["left alone"][5:])
    return [*lines, *([f"- and {rest} more, for other reasons"] if rest else []), ""]


def page(rows: dict[str, dict[str, Any]], missing: Sequence[str] = ()) -> str:
    """The page. missing: titles of cards that were not made yet."""
    environments = {row["latency"]["environment"]["cpu"] for row in rows.values() if "environment" in row["latency"]}
    lines = [
        "# Gallery", "",
        "**What can I have without training?** These are real trained networks. Each was made smaller on a CPU, from images "
        "without labels. `make gallery` makes this page; [Prune without training](guides/repair.md) explains how it works.",
        "", *summary_table(rows), "",
        f"Measured on {' and '.join(sorted(environments)) or 'no machine yet'}. All figures are in "
        "`benchmarks/results/gallery/`. Training afterwards recovers more: see [Your own loop](guides/loop.md). "
        "`make gallery ONLY=crnn` makes one card.",
        "",
    ]  # fmt: skip
    if missing:
        lines += [f"Not made yet, `make gallery` does: {', '.join(missing)}.", ""]
    for name, row in rows.items():
        lines += card(name, row)
    return "\n".join(lines).rstrip() + "\n"


def write_page(rows: dict[str, dict[str, Any]], missing: Sequence[str]) -> None:
    write(PAGE, page(rows, missing))
