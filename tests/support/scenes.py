"""Seeded scenes for tests and benchmarks: ground truths, and predictions like those of a trained detector.

A point inside a box mostly predicts that box (the smallest one, if there are several) with an IoU of 0.3 to 0.95
and a logit that grows with it; every other logit lies around the prior of 0.01.
B images, N anchor points over all levels, G ground truths of a batch, C classes.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import Inputs, PointGrid

PRIOR_LOGIT = -math.log(99)
MISSED_SHARE = 0.1  # points inside a box that predict nothing of use


class Scene(Inputs):
    """The inputs of ota_assign for a batch."""

    def images(self) -> Iterator["Scene"]:
        """Each image as a scene with B = 1."""
        offsets = self.gt_offsets.tolist()
        for b, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
            truth = self.gt_boxes[start:end], self.gt_labels[start:end], self.gt_offsets.new_tensor([0, end - start])
            yield Scene(self.logits[b : b + 1], self.boxes[b : b + 1], *truth, self.grid)


class Workload(NamedTuple):
    """Sizes of a benchmark; the fullest image comes first, so a shorter batch keeps it."""

    image_size: tuple[int, int]
    strides: tuple[int, ...]
    num_classes: int
    counts: tuple[int, ...]  # ground truths per image
    size_px: tuple[float, float]
    crowded: bool = False


def ragged_counts(images: int, total: int) -> tuple[int, ...]:
    """Ground truths per image: quantiles of a log-normal distribution (sigma 1) that add up to `total`, shuffled."""
    weight = torch.special.ndtri((torch.arange(images, dtype=torch.float64) + 0.5) / images).exp()
    counts = (weight * total / weight.sum()).round().long()
    counts[images // 2] += total - counts.sum()
    return tuple(counts[torch.randperm(images, generator=torch.Generator().manual_seed(0))].tolist())


COCO_STRIDES, COCO_SIZES_PX = (8, 16, 32, 64, 128), (10, 500)
WORKLOADS = {
    "single": Workload((800, 1344), COCO_STRIDES, 80, (20,), COCO_SIZES_PX),
    "coco": Workload((800, 1344), COCO_STRIDES, 80, ragged_counts(16, 117), COCO_SIZES_PX),
    "crowd": Workload((800, 1344), COCO_STRIDES, 1, (400, *ragged_counts(15, 345)), (20, 200), crowded=True),
    "aerial": Workload((640, 640), (8, 16, 32), 60, (4967, *ragged_counts(127, 70390)), (6, 50)),
}


def make_workload(workload: Workload, images: int | None = None, seed: int = 0) -> Scene:
    """The first `images` images of a workload."""
    grid = PointGrid.for_image(workload.image_size, workload.strides)
    return make_scene(
        grid, workload.counts[:images], workload.num_classes, seed, size_px=workload.size_px, crowded=workload.crowded
    )


def make_scene(
    grid: PointGrid,
    counts: tuple[int, ...],
    num_classes: int,
    seed: int = 0,
    *,
    size_px: tuple[float, float] = (6, 90),
    crowded: bool = False,
) -> Scene:
    """A batch with counts[b] ground truths in image b."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor((0, *counts)).cumsum(0)
    gt_boxes = [random_boxes(grid, count, size_px, crowded, generator) for count in counts]
    gt_labels = torch.randint(num_classes, (sum(counts),), generator=generator)
    predictions = [
        trained_predictions(grid, boxes, labels, num_classes, generator)
        for boxes, labels in zip(gt_boxes, gt_labels.split(counts), strict=True)
    ]
    logits, boxes = (torch.stack(tensors) for tensors in zip(*predictions, strict=True))
    return Scene(logits, boxes, torch.cat(gt_boxes), gt_labels, offsets, grid)


def random_boxes(
    grid: PointGrid, count: int, size_px: tuple[float, float], crowded: bool, generator: torch.Generator
) -> Tensor:
    """(count, 4) boxes with log-uniform sizes, cut off at the border; in a crowd they gather around a few places."""
    (rows, columns), stride = grid.sizes[0], grid.strides[0]
    extent = torch.tensor([columns, rows]) * float(stride)
    low, high = map(math.log, size_px)
    size = (low + (high - low) * torch.rand(count, 1, generator=generator)).exp()
    aspect = (0.3 * torch.randn(count, 1, generator=generator)).exp()
    center = torch.rand(count, 2, generator=generator) * extent
    if crowded:
        place = torch.randint(1 + count // 20, (count,), generator=generator)
        center = center[place] + size * torch.randn(count, 2, generator=generator)
        center = center.clamp(min=0).minimum(extent)
    half = size * torch.cat([1 / aspect, aspect], 1) / 2
    return torch.cat([(center - half).clamp(min=0), (center + half).minimum(extent)], 1)


def trained_predictions(
    grid: PointGrid, gt_boxes: Tensor, gt_labels: Tensor, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Logits (N, C) and boxes (N, 4) of one image, for boxes (m, 4) of any kind and labels (m,) in 0..C-1."""
    points, stride = grid.points(), grid.point_strides()[:, None]
    logits = PRIOR_LOGIT + torch.randn(grid.num_points, num_classes, generator=generator)
    half = 3 * stride * (0.3 * torch.randn(grid.num_points, 2, generator=generator)).exp()
    boxes = torch.cat([points - half, points + half], 1)
    if len(gt_boxes) == 0:
        return logits, boxes

    low, high = gt_boxes[:, None, :2], gt_boxes[:, None, 2:]
    inside = ((points > low) & (points < high)).all(-1)
    area = (gt_boxes[:, 2:] - gt_boxes[:, :2]).prod(1)
    smallest = torch.where(inside, area[:, None], math.inf).argmin(0)
    seen = inside.any(0) & (torch.rand(grid.num_points, generator=generator) > MISSED_SHARE)
    target = gt_boxes[smallest]

    # A box moved by (1 - a) of its width and (1 - b) of its height has IoU ab / (2 - ab) with itself.
    iou = 0.3 + 0.65 * torch.rand(grid.num_points, 1, generator=generator)
    share = torch.rand(grid.num_points, 1, generator=generator)
    kept = (2 * iou / (1 + iou)) ** torch.cat([share, 1 - share], 1)
    sign = 2 * torch.randint(2, (grid.num_points, 2), generator=generator) - 1
    moved = target + (sign * (1 - kept) * (target[:, 2:] - target[:, :2])).repeat(1, 2)

    logits[seen, gt_labels[smallest][seen]] += 6 * iou[seen, 0]
    return logits, torch.where(seen[:, None], moved, boxes)
