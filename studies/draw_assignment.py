"""Draw label assignment: a transport plan, and the points that each strategy gives to each object.

    python -m studies.draw_assignment [--weights FILE [--data DIR] [--image INDEX|NAME]] [--strategies ota ...]
                                      [--out DIR]

Writes plan.png, the units that each of three overlapping objects and background send to every point,
and the labels decoded from them (the paper's figure 2); and levels.png, one image with strategies below one another and
levels side by side. The image is one of a data set under the predictions of a detector (by default the one with the
most objects), or, without --weights, a generated crowd under synthetic predictions. A dot is a point in the colour of
its object; a ring is around an ambiguous one.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.collections import EllipseCollection
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import box_iou
from torchvision.transforms.v2.functional import adjust_saturation

from data import DatasetError, shapes
from errors import UserError, run_script
from eval import load_with_data
from kernels import OTAConfig, PointGrid
from kernels.assign_torch import solve
from kernels.statistics import AMBIGUOUS_SHARE
from model.assigners import STRATEGIES, assign_with_statistics
from model.backbone import STRIDES
from studies.predictions import find_image, predicted_scene
from tests.support.scenes import PRIOR_LOGIT, Scene, trained_predictions

TOY_BOXES_PX = [[16.0, 20, 88, 88], [38, 12, 110, 80], [28, 38, 98, 108]]
CROWD_PX, CROWD_SEED = 256, 12
# Distinct in hue and lightness, for most colour-blind readers as well (after Okabe and Ito, and Tol).
COLORS = "#d55e00 #0072b2 #009e73 #cc3399 #e6a700 #56b4e9 #332288 #882255 #7a5230 #66aa00".split()
BACKGROUND_COLOR = "#555555"
PAPER_WHITE, SATURATION = 0.5, 0.3  # share of white and of its colour in the image under the dots
DPI = 110


def colors_of(boxes: Tensor) -> list[str]:
    """A colour for each of (m, 4) boxes, not that of a box it overlaps as long as there are enough."""
    chosen: list[int] = []
    for i, overlaps in enumerate(box_iou(boxes, boxes) > 0):
        taken = {chosen[j] for j in range(i) if overlaps[j]}
        turns = [(i + turn) % len(COLORS) for turn in range(len(COLORS))]
        chosen.append(next((c for c in turns if c not in taken), turns[0]))
    return [COLORS[c] for c in chosen]


def toy_scene() -> Scene:
    """Return three objects of one class that overlap, on 3 levels of an image of 128 x 128 px.

    A point predicts a mean of the boxes, weighted by closeness, and a logit that rises towards the closest centre.
    """
    grid, boxes = PointGrid.for_image((128, 128), (8, 16, 32)), torch.tensor(TOY_BOXES_PX)
    center, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    distance = ((grid.points()[:, None] - center) / size).norm(dim=2)  # (N, 3), 0.5 about where a box ends
    predicted = (-6 * distance).softmax(1) @ boxes
    logits = PRIOR_LOGIT + 7 * (1 - distance.amin(1, keepdim=True)).clamp(min=0)
    return Scene(logits[None], predicted[None], boxes, torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]), grid)


def generated_crowd() -> tuple[str, Tensor, Scene, OTAConfig]:
    """Return a title, an image (3, H, W) uint8, what is assigned on it (B = 1), and the settings."""
    generated = shapes.Scene(CROWD_PX, np.random.default_rng(CROWD_SEED))
    generated.fill()
    image = torch.from_numpy(generated.canvas.clip(0, 255).astype(np.uint8)).permute(2, 0, 1)
    boxes = torch.tensor(np.array([shape.box(CROWD_PX) for shape in generated.shapes]), dtype=torch.float32)
    labels = torch.tensor([shape.label for shape in generated.shapes])
    grid = PointGrid.for_image((CROWD_PX, CROWD_PX), STRIDES)
    predictions = trained_predictions(grid, boxes, labels, len(shapes.CLASSES), torch.Generator().manual_seed(0))
    scene = Scene(*(t[None] for t in predictions), boxes, labels, torch.tensor([0, len(boxes)]), grid)
    return "generated crowd, synthetic predictions", image, scene, OTAConfig()


def chosen_image(args: argparse.Namespace) -> tuple[str, Tensor, Scene, OTAConfig]:
    """Return what `generated_crowd` does, for the image that the flags name."""
    if args.weights is None:
        if args.data or args.image:
            raise UserError("--data and --image need --weights, whose predictions are assigned there")
        return generated_crowd()
    detector, dataset, data = load_with_data(args.weights, args.data)
    index = find_image(dataset, args.image)
    image, scene = predicted_scene(detector, dataset, index)
    name = dataset.images[index]["file_name"]
    if not len(scene.gt_boxes):
        raise DatasetError(f"{name} (--image) has no objects to assign to")
    return f"{name} of {Path(data).name}, {args.weights.name}", image, scene, detector.config.ota


def draw_boxes(axis, size_px: tuple[int, int], boxes: Tensor, colors: list[str], width: float = 1.5) -> None:
    """Draw boxes (m, 4), and show the whole of an image of (height, width) px."""
    axis.set(xlim=(0, size_px[1]), ylim=(size_px[0], 0), xticks=[], yticks=[], aspect="equal")
    for (x1, y1, x2, y2), color in zip(boxes.tolist(), colors, strict=True):
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, linewidth=width, zorder=2))


def draw_points(axis, points: Tensor, labels: Tensor, ambiguous: Tensor, colors: list[str], dot_px: float) -> None:
    """Points (n, 2) px with labels (n,), -1 for background, in dots `dot_px` wide, a length on the axis."""

    def dots(which: Tensor, share: float, **style) -> None:
        size = torch.full((int(which.sum()),), share * dot_px).numpy()
        place = {"offsets": points[which].numpy(), "offset_transform": axis.transData}
        axis.add_collection(EllipseCollection(size, size, 0, units="xy", **place, **style))

    positive = labels >= 0
    dots(~positive, 0.2, facecolors=BACKGROUND_COLOR, linewidths=0, alpha=0.6, zorder=3)
    dots(positive, 0.8, facecolors=[colors[c] for c in labels[positive]], edgecolors="white", linewidths=0.4, zorder=4)
    dots(ambiguous, 1.15, facecolors="none", edgecolors="black", linewidths=1.3, zorder=5)


def draw_levels(title: str, image: Tensor, scene: Scene, config: OTAConfig, strategies: list[str], path: Path) -> None:
    """Strategies below one another, levels side by side, except those where no strategy has anything to show."""
    grid, points, (height, width), colors = scene.grid, scene.grid.points(), image.shape[-2:], colors_of(scene.gt_boxes)
    drawn = {}  # strategy: labels (N,) and ambiguous points (N,)
    for strategy in strategies:
        match, ambiguous, _ = assign_with_statistics(strategy, scene, config)
        drawn[strategy] = match.gt_index[0], ambiguous[0]
    shown = torch.stack([(labels >= 0) | ambiguous for labels, ambiguous in drawn.values()]).any(0)
    levels = [slice(*ends) for ends in zip(grid.level_offsets, grid.level_offsets[1:], strict=False)]
    kept = [level for level, rows in enumerate(levels) if shown[rows].any()] or range(len(levels))
    left = [f"{stride}" for level, stride in enumerate(grid.strides) if level not in kept]

    panel = min(max(3.4, 0.11 * grid.sizes[0][1]), 6)  # inches; dots that touch stay distinct
    figsize = max(9, panel * len(kept)), panel * len(drawn) * height / width + 1.2
    figure = Figure(figsize, layout="constrained")
    axes = figure.subplots(len(drawn), len(kept), squeeze=False)
    pale = adjust_saturation(image, SATURATION).permute(1, 2, 0).numpy() / 255 * (1 - PAPER_WHITE) + PAPER_WHITE
    for row, (strategy, (labels, ambiguous)) in zip(axes, drawn.items(), strict=True):
        counts = f"{int((labels >= 0).sum())} positive\n{int(ambiguous.sum())} ambiguous"
        row[0].set_ylabel(f"{strategy}\n{counts}", fontsize=13)
        for level, axis in zip(kept, row, strict=True):
            rows, stride = levels[level], grid.strides[level]
            axis.imshow(pale, extent=(0, width, height, 0))
            draw_boxes(axis, (height, width), scene.gt_boxes, colors)
            dot_px = max(grid.strides[0], min(stride, 0.06 * width))
            draw_points(axis, points[rows], labels[rows], ambiguous[rows], colors, dot_px)
            axis.set_xlabel(f"{int((labels[rows] >= 0).sum())} positive")
    for level, axis in zip(kept, axes[0], strict=True):
        rows, columns = grid.sizes[level]
        axis.set_title(f"stride {grid.strides[level]} px, {columns} x {rows} points", fontsize=13)
    rest = f"; nothing on strides {', '.join(left)}" if left else ""
    figure.suptitle(f"{title}\ndot: positive, in the colour of its object; ring: ambiguous{rest}", fontsize=13)
    figure.savefig(path, dpi=DPI)


def draw_plan(scene: Scene, config: OTAConfig, path: Path) -> None:
    """The units that every object and background send to every point, and the labels: a row for each level."""
    grid, count = scene.grid, len(scene.gt_boxes)
    plan = solve(scene, config)[1]
    match, ambiguous, _ = assign_with_statistics("ota", scene, config)
    sent = torch.full((count + 1, grid.num_points), torch.nan, dtype=torch.float64)
    sent[plan.gt, plan.flat_point] = plan.log_plan.exp()
    sent[count] = 1  # background is the only supplier of points that are no candidate
    sent[count, plan.points] = plan.log_plan_bg.exp()

    colors, points = [*colors_of(scene.gt_boxes), BACKGROUND_COLOR], grid.points()
    size_px = tuple(side * grid.strides[0] for side in grid.sizes[0])
    figure = Figure((2.7 * (count + 2), 2.7 * len(grid.strides) + 1), layout="constrained")
    axes = figure.subplots(len(grid.strides), count + 2)
    for level, row in enumerate(axes):
        rows, dot_px = slice(*grid.level_offsets[level : level + 2]), min(grid.strides[level], 12)
        row[0].set_ylabel(f"stride {grid.strides[level]} px")
        draw_boxes(row[-1], size_px, scene.gt_boxes, colors[:count], 2)
        draw_points(row[-1], points[rows], match.gt_index[0, rows], ambiguous[0, rows], colors, dot_px)
        for i, axis in enumerate(row[:-1]):
            shades = LinearSegmentedColormap.from_list("", ["white", colors[i]]).with_extremes(bad="#ececec")
            heat = sent[i, rows].view(grid.sizes[level]).numpy()
            axis.imshow(heat, cmap=shades, vmin=0, vmax=1, extent=(0, size_px[1], size_px[0], 0))
            others = [color if j == i else "#999999" for j, color in enumerate(colors[:count])]
            draw_boxes(axis, size_px, scene.gt_boxes, others if i < count else colors[:count])
    for i, axis in enumerate(axes[0, :count]):
        axis.set_title(f"object {i + 1} supplies {int(plan.k[i])}", color=colors[i], fontweight="bold")
    axes[0, count].set_title(f"background supplies {grid.num_points - int(plan.k.sum())}", fontweight="bold")
    axes[0, count + 1].set_title("decoded labels", fontweight="bold")
    legend = "Units sent to every point: full colour is 1, white 0; grey fields are no candidates of the object."
    figure.suptitle(f"{legend}\nRings: points that no supplier sends {AMBIGUOUS_SHARE:g} of their unit")
    figure.savefig(path, dpi=DPI)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="file written by train.py; default: a generated crowd")
    parser.add_argument("--data", help="coco, crowdhuman, shapes or a folder; default: what it was trained on")
    parser.add_argument("--image", help="index or file name; default: the image with the most objects")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"), help="folder to write to")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    draw_levels(*chosen_image(args), args.strategies, args.out / "levels.png")
    draw_plan(toy_scene(), OTAConfig(), args.out / "plan.png")
    print(f"wrote {args.out / 'levels.png'} and plan.png")


if __name__ == "__main__":
    run_script(main)
