"""Pictures for people: boxes on images, and the curves of a training run."""

import colorsys
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, save_image

from data.files import printable

MIN_SIDE_PX = 400  # smaller images are enlarged, or the captions would hide them
MAX_ENLARGED_PX = 4000  # but not beyond this, for a long thin one
MIN_FONT_PX, FONT_SHARE = 12, 0.018  # of the geometric mean of an image's sides, so that it reads the same on a screen

SCORES = " .0123456789"  # besides a name, in a caption
CAPTION_LINES = (-1, 0, 1, 2, 3, -2)  # below a box's upper edge, in order of preference


def class_color(label: int) -> tuple[int, int, int]:
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.85, 1.0))


def font_files() -> Iterator[str]:
    """DejaVu Sans, which comes with matplotlib, and then the fonts of this machine."""
    yield str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    from matplotlib.font_manager import findSystemFonts  # reads the list of all fonts

    yield from sorted(findSystemFonts())


@lru_cache(maxsize=8)
def fonts_of(names: tuple[str, ...]) -> dict[str, str]:
    """The first font file that has every character of a name, by name; without those that no font has."""
    found, missing, files = {}, set(names), font_files()
    while missing and (file := next(files, None)):
        try:
            characters = FT2Font(file).get_charmap().keys()
            ImageFont.truetype(file, MIN_FONT_PX)  # a colour emoji font has one size only
        except (OSError, RuntimeError):
            continue
        found |= {name: file for name in missing if characters >= set(map(ord, name + SCORES))}
        missing -= found.keys()
    return found


def draw_detections(image: Tensor, truth: Tensor, found: dict[str, Tensor], class_names: list[str]) -> Tensor:
    """uint8 (3, H, W) with true boxes (n, 4) in white and detections in a colour per class, with name and score.

    Lines and captions grow with the image; an image smaller than MIN_SIDE_PX is enlarged. A name that no font of this
    machine can write is drawn as its label, "#3".
    """
    scale = max(1.0, min(MIN_SIDE_PX / min(image.shape[-2:]), MAX_ENLARGED_PX / max(image.shape[-2:])))
    picture = resize(image, [round(s * scale) for s in image.shape[-2:]], antialias=True)
    font_px = max(MIN_FONT_PX, round(FONT_SHARE * math.sqrt(picture.shape[1] * picture.shape[2])))
    width = max(2, round(font_px / 6))
    if len(truth):
        picture = draw_bounding_boxes(picture, truth * scale, colors="white", width=2 * width)
    if len(found["labels"]):
        labels, scores, boxes = found["labels"].tolist(), found["scores"].tolist(), found["boxes"].cpu() * scale
        colors = [class_color(c) for c in labels]
        worst_first = slice(None, None, -1)
        picture = draw_bounding_boxes(picture, boxes.flip(0), colors=colors[worst_first], width=width)
        class_names = [printable(name) for name in class_names]
        fonts = fonts_of(tuple(class_names))
        names = [class_names[c] if class_names[c] in fonts else f"#{c}" for c in labels]
        captions = [f"{name} {s:.2f}" for name, s in zip(names, scores, strict=True)]
        files = [fonts.get(name) for name in names]
        picture = draw_captions(picture, boxes.tolist(), captions, colors, font_px, files)
    return picture


def draw_captions(
    picture: Tensor, boxes: list[list[float]], captions: list[str], colors: list[tuple[int, int, int]], font_px: int,
    files: list[str | None] | None = None,
) -> Tensor:  # fmt: skip
    """Captions on a ground of the box's colour: above the box's upper edge or in lines below it, where the image and,
    best first, other captions leave room; torchvision would put each on top of the object.

    files: the font file of every caption; None is DejaVu Sans.
    """
    canvas = to_pil_image(picture)
    draw = ImageDraw.Draw(canvas)
    files = [file or next(font_files()) for file in files or [None] * len(captions)]
    fonts = {file: ImageFont.truetype(file, font_px) for file in set(files)}
    margin = max(2, font_px // 5)
    placed = []
    for (x1, y1, *_), caption, file in zip(boxes, captions, files, strict=True):
        height = sum(fonts[file].getmetrics()) + margin
        width = round(fonts[file].getlength(caption)) + 2 * margin
        left = max(0, min(round(x1), canvas.width - width))
        tops = (round(y1) + line * (height + 1) for line in CAPTION_LINES)
        tops = [top for top in tops if 0 <= top <= canvas.height - height] or [0]
        areas = [(left, top, left + width, top + height) for top in tops]
        placed.append(next((a for a in areas if not any(overlap(a, other) for other in placed)), areas[0]))
    for area, caption, color, file in list(zip(placed, captions, colors, files, strict=True))[::-1]:  # the best on top
        draw.rectangle(area, fill=color)
        brightness = 0.3 * color[0] + 0.59 * color[1] + 0.11 * color[2]
        fill = "black" if brightness > 110 else "white"
        draw.text((area[0] + margin, area[1]), caption, fill=fill, font=fonts[file])
    return pil_to_tensor(canvas)


def overlap(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def save_contact_sheet(pictures: list[Tensor], path: Path, columns: int = 4) -> None:
    height, width = (max(p.shape[d] for p in pictures) for d in (1, 2))
    padded = [F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures]
    save_image(torch.stack(padded) / 255, path, nrow=columns)


def draw_curves(log: list[dict], path: Path) -> None:
    """Loss terms, average precision and supplies over the steps, from the lines of log.jsonl."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    panels = (
        ("training loss", ("loss", "cls", "box", "iou"), "-", None),
        ("average precision", ("AP", "AP50", "AP75"), "o-", 1),
        ("points per object", ("positives_per_gt", "mean_k"), "-", None),
    )
    for axis, (title, names, line_style, top) in zip(axes, panels, strict=True):
        lines = [line for line in log if names[0] in line]
        for name in names:
            axis.plot([line["step"] for line in lines], [line[name] for line in lines], line_style, label=name)
        axis.set(xlabel="step", title=title, ylim=(0, top))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
