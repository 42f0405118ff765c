"""What the strategies that answer object by object have in common: objects claim points, then conflicts are settled.

One image at a time: m ground truths, N anchor points over all levels, C classes. A strategy is a function
`Image -> Claims`; of several objects that claim a point the one with the lowest priority number gets it, of equal ones
the first.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import Assignment, Inputs, PointGrid
from kernels.assign import check_inputs
from kernels.assign_reference import iou_and_giou
from kernels.grid import INSIDE_MARGIN_PX, valid_rows

NEITHER = -2  # gt_index of a point that is neither positive nor negative
ANCHOR_STRIDES = 8  # side of the one square anchor per point, in strides (ATSS, section 3.1)


class Image(NamedTuple):
    """One image, its valid ground truths only, in float32."""

    logits: Tensor  # (N, C), 0 where not finite
    boxes: Tensor  # (N, 4) x1 y1 x2 y2 px, 0 where not finite
    iou: Tensor  # (m, N) of the predicted boxes
    giou: Tensor  # (m, N)
    usable: Tensor  # (m, N) bool: the prediction is finite
    gt_boxes: Tensor  # (m, 4)
    gt_labels: Tensor  # (m,)
    grid: PointGrid
    points: Tensor  # (N, 2)
    strides: Tensor  # (N,)

    def to_sides(self) -> Tensor:
        """(m, N, 4): how far every point is inside the left, upper, right and lower side of every object, px."""
        box = self.gt_boxes[:, None]
        return torch.cat([self.points - box[..., :2], box[..., 2:] - self.points], -1)

    def inside(self) -> Tensor:
        """(m, N) bool: the point lies in the object's box."""
        return self.to_sides().amin(-1) > INSIDE_MARGIN_PX

    def near_center(self, radius: float) -> Tensor:
        """(m, N) bool: closer than `radius` strides to the object's centre along x and y."""
        center = (self.gt_boxes[:, None, :2] + self.gt_boxes[:, None, 2:]) / 2
        return (self.points - center).abs().amax(-1) < radius * self.strides

    def anchor_iou(self) -> Tensor:
        """(m, N) of the square anchors, one a point."""
        half = ANCHOR_STRIDES / 2 * self.strides[:, None]
        return iou_and_giou(self.gt_boxes, torch.cat([self.points - half, self.points + half], 1))[0]

    def class_logits(self) -> Tensor:
        """(m, N): every point's logit of the object's class."""
        return self.logits.T[self.gt_labels]


class Claims(NamedTuple):
    wanted: Tensor  # (m, N) bool
    priority: Tensor  # (m, N) float
    neither: Tensor | None = None  # (N,) bool: no negatives, should nobody claim them


def best_per_row(value: Tensor, allowed: Tensor, count: int | Tensor) -> Tensor:
    """(m, n) bool: the `count` entries of every row with the lowest `value`, of those allowed; ties to the first."""
    allowed = allowed & value.isfinite()
    order = value.masked_fill(~allowed, torch.inf).argsort(dim=1, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(value.shape[1], device=value.device).expand_as(order)
    )
    return allowed & (rank < (count[:, None] if isinstance(count, Tensor) else count))


def best_per_level(value: Tensor, allowed: Tensor, grid: PointGrid, count: int) -> Tensor:
    """`best_per_row` on every level of the grid."""
    sizes = [rows * columns for rows, columns in grid.sizes]
    levels = zip(value.split(sizes, 1), allowed.split(sizes, 1), strict=True)
    return torch.cat([best_per_row(v, a, count) for v, a in levels], 1)


def assign_claims(
    strategy: Callable[[Image], Claims],
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    grid: PointGrid,
) -> tuple[Assignment, Tensor]:
    """The inputs and the contract of `ota_assign`; also the points (B, N) that more than one object claims."""
    *_, gt_labels, gt_offsets, _ = check_inputs(Inputs(logits, boxes, gt_boxes, gt_labels, gt_offsets, grid))
    num_images, num_points, num_classes = logits.shape
    device = boxes.device
    gt_index = torch.full((num_images, num_points), -1, device=device)
    iou = torch.zeros(num_images, num_points, dtype=torch.float32, device=device)
    k = torch.zeros(len(gt_boxes), dtype=torch.int32, device=device)
    ambiguous = torch.zeros(num_images, num_points, dtype=torch.bool, device=device)
    image_of_row, valid = valid_rows(gt_boxes, gt_labels, gt_offsets, num_classes)
    points, strides = grid.points(device), grid.point_strides(device)
    for b in range(num_images):
        rows = (valid & (image_of_row == b)).nonzero()[:, 0]
        if not len(rows):
            continue
        labels = gt_labels[rows]
        finite, finite_box = torch.isfinite(logits[b]), torch.isfinite(boxes[b]).all(1)
        predicted, truth = boxes[b].float().masked_fill(~finite_box[:, None], 0), gt_boxes[rows].float()
        pair_iou, giou = iou_and_giou(truth, predicted)
        image = Image(
            logits[b].float().masked_fill(~finite, 0), predicted, pair_iou, giou,
            finite.T[labels] & finite_box & torch.isfinite(giou), truth, labels, grid, points, strides,
        )  # fmt: skip
        claims = strategy(image)
        wanted = claims.wanted & image.usable
        winner = claims.priority.masked_fill(~wanted, torch.inf).argmin(0)
        positive = wanted.any(0)
        gt_index[b] = torch.where(positive, rows[winner], -1)
        if claims.neither is not None:
            gt_index[b, claims.neither & ~positive] = NEITHER
        iou[b] = torch.where(positive, pair_iou.gather(0, winner[None])[0], 0)
        k[rows] = wanted.sum(1, dtype=torch.int32)
        ambiguous[b] = wanted.sum(0) > 1
    return Assignment(gt_index, iou, k), ambiguous
