"""Pictures for people: boxes on images, and the curves of a training run."""

import colorsys
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import matplotlib
import torch
from matplotlib.ft2font import FT2Font
from PIL import ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pad, resize
from torchvision.utils import draw_bounding_boxes, save_image

from data.files import printable

MIN_SIDE_PX, MAX_ENLARGED_PX = 400, 4000  # smaller images are enlarged, or captions would hide them; not beyond 4000
MIN_FONT_PX, FONT_SHARE = 12, 0.018  # of the geometric mean of an image's sides, so that it reads the same on a screen
SCORES = " .0123456789"  # besides a name, in a caption


def font_files() -> Iterator[str]:
    """Yield DejaVu Sans, which comes with matplotlib, then the fonts of this machine."""
    yield str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))
    from matplotlib.font_manager import findSystemFonts  # reads the list of all fonts

    yield from sorted(findSystemFonts())


@lru_cache(maxsize=8)
def fonts_of(names: tuple[str, ...]) -> dict[str, str]:
    """Return the first font file that has every character of a name, by name; names that no font has are left out."""
    fonts, missing, files = {}, set(names), font_files()
    while missing and (file := next(files, None)):
        try:
            characters = FT2Font(file).get_charmap().keys()
            ImageFont.truetype(file, MIN_FONT_PX)  # a colour emoji font has one size only
        except (OSError, RuntimeError):
            continue
        fonts |= {name: file for name in missing if characters >= set(map(ord, name + SCORES))}
        missing -= fonts.keys()
    return fonts


def draw_detections(
    image: Tensor, truth: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor, class_names: list[str]
) -> Tensor:
    """Draw true boxes (n, 4) in white and detections in a colour per class, with name and score; uint8 (3, H, W). Small
    images are enlarged."""
    scale = max(1.0, min(MIN_SIDE_PX / min(image.shape[-2:]), MAX_ENLARGED_PX / max(image.shape[-2:])))
    picture = resize(image, [round(s * scale) for s in image.shape[-2:]], antialias=True)
    return draw_boxes(picture, truth * scale, boxes.cpu() * scale, labels, class_names, scores)


def draw_boxes(
    picture: Tensor, plain: Tensor, boxes: Tensor, labels: Tensor, class_names: list[str], scores: Tensor | None = None
) -> Tensor:
    """Draw boxes (n, 4) in a colour per class, with its name and the score, over `plain` boxes in white. A name that no
    font of this machine can write is drawn as "#3"."""
    font_px = max(MIN_FONT_PX, round(FONT_SHARE * math.sqrt(picture.shape[1] * picture.shape[2])))
    width = max(2, round(font_px / 6))
    if len(plain):
        picture = draw_bounding_boxes(picture, plain, colors="white", width=2 * width)
    names = [printable(name) for name in class_names]
    fonts, by_font = fonts_of(tuple(names)) if len(labels) else {}, {}
    for row, label in reversed(list(enumerate(labels.tolist()))):  # the best on top
        by_font.setdefault(fonts.get(names[label], next(font_files())), []).append((row, label))
    for font, rows in by_font.items():
        captions = [names[c] if names[c] in fonts else f"#{c}" for _, c in rows]
        if scores is not None:
            captions = [f"{caption} {scores[row]:.2f}" for caption, (row, _) in zip(captions, rows, strict=True)]
        hues = [colorsys.hsv_to_rgb(c * 0.618 % 1, 0.85, 1.0) for _, c in rows]
        colors = [tuple(int(255 * part) for part in hue) for hue in hues]
        text = ["black" if 0.3 * r + 0.59 * g + 0.11 * b > 0.43 else "white" for r, g, b in hues]
        style = {"width": width, "font": font, "font_size": font_px, "fill_labels": True, "label_colors": text}
        picture = draw_bounding_boxes(picture, boxes[[r for r, _ in rows]], captions, colors, **style)
    return picture


def save_contact_sheet(pictures: list[Tensor], path: Path, columns: int = 4) -> None:
    height, width = (max(p.shape[d] for p in pictures) for d in (1, 2))
    padded = [pad(p, [0, 0, width - p.shape[2], height - p.shape[1]]) for p in pictures]
    save_image(torch.stack(padded) / 255, path, nrow=columns)


def draw_curves(log: list[dict], path: Path) -> None:
    """Draw loss terms, average precision and supplies over the steps, from the lines of log.jsonl."""
    from matplotlib.figure import Figure  # reads the list of all fonts

    figure = Figure(figsize=(15, 4), layout="constrained")
    panels = (
        ("training loss", ("loss", "cls", "box", "iou"), "-", None),
        ("average precision", ("AP", "AP50", "AP75"), "o-", 1),
        ("points per object", ("positives_per_gt", "mean_k"), "-", None),
    )
    for axis, (title, names, line_style, top) in zip(figure.subplots(1, 3), panels, strict=True):
        lines = [line for line in log if names[0] in line]
        for name in names:
            axis.plot([line["step"] for line in lines], [line[name] for line in lines], line_style, label=name)
        axis.set(xlabel="step", title=title, ylim=(0, top))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=120)
