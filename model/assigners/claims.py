"""The part that all strategies except OTA share: objects claim points, then conflicts are settled.

One image at a time, dense: m ground truths, N anchor points over all levels, C classes; the host may wait for the
device. A strategy is a function `ImageInputs -> Claims`. A point goes to the claiming object with the lowest priority;
ties go to the lower index.
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


class ImageInputs(NamedTuple):
    """One image with its valid ground truths only, in float32."""

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

    def to_sides(self) -> Tensor:  # (m, N, 4): px to the left, upper, right and lower side, positive inside
        box = self.gt_boxes[:, None]
        return torch.cat([self.points - box[..., :2], box[..., 2:] - self.points], -1)

    def to_center(self) -> Tensor:  # (m, N, 2) px, from the object's centre to every point
        return self.points - (self.gt_boxes[:, None, :2] + self.gt_boxes[:, None, 2:]) / 2

    def inside(self) -> Tensor:  # (m, N) bool: the point lies in the object's box
        return self.to_sides().amin(-1) > INSIDE_MARGIN_PX

    def near_center(self, radius: float) -> Tensor:  # (m, N) bool: within `radius` strides of the centre along x and y
        return self.to_center().abs().amax(-1) < radius * self.strides

    def anchor_iou(self) -> Tensor:  # (m, N) of the square anchors, one a point
        half = ANCHOR_STRIDES / 2 * self.strides[:, None]
        return iou_and_giou(self.gt_boxes, torch.cat([self.points - half, self.points + half], 1))[0]

    def class_logits(self) -> Tensor:  # (m, N): every point's logit of the object's class
        return self.logits.T[self.gt_labels]


class Claims(NamedTuple):
    wanted: Tensor  # (m, N) bool
    priority: Tensor  # (m, N) float
    neither: Tensor | bool = False  # (N,) bool: no negatives if nobody claims them


def best_per_row(value: Tensor, allowed: Tensor, count: int | Tensor) -> Tensor:
    """(m, n) bool: the `count` (a number, or (m, 1)) lowest allowed values of every row; ties go to the lower index."""
    allowed = allowed & value.isfinite()
    order = value.masked_fill(~allowed, torch.inf).argsort(dim=1, stable=True)
    return allowed & (order.argsort(1) < count)


def best_per_level(value: Tensor, allowed: Tensor, grid: PointGrid, count: int) -> Tensor:
    """`best_per_row` on every level of the grid."""
    levels = (x.split([rows * columns for rows, columns in grid.sizes], 1) for x in (value, allowed))
    return torch.cat([best_per_row(v, a, count) for v, a in zip(*levels, strict=True)], 1)


def assign_claims(strategy: Callable[[ImageInputs], Claims], inputs: Inputs) -> tuple[Assignment, Tensor]:
    """Return the assignment, under the contract of `ota_assign`, and the points (B, N) that several objects claim."""
    logits, boxes, gt_boxes, gt_labels, gt_offsets, grid = check_inputs(inputs)
    gt_index = boxes.new_full(boxes.shape[:2], -1, dtype=torch.int64)
    iou, ambiguous = torch.zeros_like(gt_index, dtype=torch.float32), torch.zeros_like(gt_index, dtype=torch.bool)
    k = boxes.new_zeros(len(gt_boxes), dtype=torch.int32)
    image_of_row, valid = valid_rows(gt_boxes, gt_labels, gt_offsets, logits.shape[2])
    points, strides = grid.points(boxes.device), grid.point_strides(boxes.device)
    for b in image_of_row[valid].unique().tolist():
        rows = (valid & (image_of_row == b)).nonzero()[:, 0]
        labels, truth = gt_labels[rows], gt_boxes[rows].float()
        finite, finite_box = logits[b].isfinite(), boxes[b].isfinite().all(1)
        predicted = boxes[b].float().masked_fill(~finite_box[:, None], 0)
        pair_iou, giou = iou_and_giou(truth, predicted)
        usable = finite.T[labels] & finite_box & giou.isfinite()
        scores = logits[b].float().masked_fill(~finite, 0)
        claims = strategy(ImageInputs(scores, predicted, pair_iou, giou, usable, truth, labels, grid, points, strides))
        wanted = claims.wanted & usable
        winner, positive = claims.priority.masked_fill(~wanted, torch.inf).argmin(0), wanted.any(0)
        gt_index[b] = torch.where(positive, rows[winner], -1)
        gt_index[b, claims.neither & ~positive] = NEITHER
        iou[b] = torch.where(positive, pair_iou.gather(0, winner[None])[0], 0)
        k[rows] = wanted.sum(1, dtype=torch.int32)
        ambiguous[b] = wanted.sum(0) > 1
    return Assignment(gt_index, iou, k), ambiguous
