"""Pictures for people: boxes on images, and the curves of a training run."""

import colorsys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import resize
from torchvision.utils import draw_bounding_boxes, save_image

MIN_SIDE_PX = 400  # smaller images are enlarged, or the captions would hide them


def class_color(label: int) -> tuple[int, int, int]:
    return tuple(int(255 * c) for c in colorsys.hsv_to_rgb(label * 0.618 % 1, 0.85, 1.0))


def draw_detections(image: Tensor, truth: Tensor, found: dict[str, Tensor], class_names: list[str]) -> Tensor:
    """uint8 (3, H, W) with true boxes (n, 4) in white and detections in a colour per class, with scores."""
    scale = max(1.0, MIN_SIDE_PX / min(image.shape[-2:]))
    picture = resize(image, [round(s * scale) for s in image.shape[-2:]], antialias=True)
    if len(truth):
        picture = draw_bounding_boxes(picture, truth * scale, colors="white", width=4)
    if len(found["labels"]):
        labels, scores = found["labels"].tolist(), found["scores"].tolist()
        captions = [f"{class_names[c]} {s:.2f}" for c, s in zip(labels, scores, strict=True)]
        picture = draw_bounding_boxes(
            picture, found["boxes"].cpu() * scale, captions, [class_color(c) for c in labels], width=2
        )
    return picture


def save_contact_sheet(pictures: list[Tensor], path: Path, columns: int = 4) -> None:
    height, width = (max(p.shape[d] for p in pictures) for d in (1, 2))
    padded = [F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures]
    save_image(torch.stack(padded) / 255, path, nrow=columns)


def draw_curves(log: list[dict], path: Path) -> None:
    """Loss terms, average precision and supplies over the steps, from the lines of log.jsonl."""
    import matplotlib

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
