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
from kernels.assign_torch import pair_iou_giou
from kernels.grid import INSIDE_MARGIN_PX, valid_rows

NEITHER = -2  # gt_index of a point that is neither positive nor negative
ANCHOR_STRIDES = 8  # side of the one square anchor per point, in strides (ATSS, section 3.1)


class ImageInputs(NamedTuple):
    """One image with its valid ground truths only, in float32."""

    logits: Tensor  # (N, C) of any float type
    boxes: Tensor  # (N, 4) x1 y1 x2 y2 px, NaN if one side is not finite
    gt_boxes: Tensor  # (m, 4)
    gt_labels: Tensor  # (m,)
    grid: PointGrid
    strides: Tensor  # (N,)

    def finite_logits(self) -> Tensor:  # (N, C), 0 where not finite
        return self.logits.float().nan_to_num(0, 0, 0)

    def predictions(self, row: Tensor, point: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For pairs of an object and a point: logit of its class, IoU and GIoU of its box, whether all are finite."""
        logit = self.logits[point, self.gt_labels[row]].float()
        iou, giou = pair_iou_giou(self.gt_boxes[row], self.boxes[point])
        return logit, iou, giou, logit.isfinite() & giou.isfinite()

    def all_predictions(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # each (m, N)
        row, point = (torch.arange(len(x), device=x.device) for x in (self.gt_boxes, self.boxes))
        return self.predictions(row[:, None], point)

    def on_grid(self, of_axis: Callable, join: Callable = torch.mul) -> Tensor:
        """(m, N) `join(of_row, of_column)`, from `of_axis(low, high, at, stride)` of a level's rows and of its columns:
        sides of the objects along this axis, (m, 1) px, and places of the rows or columns, (n,) px, to (m, n)."""
        x1, y1, x2, y2 = self.gt_boxes.split(1, 1)
        levels = []
        for stride, (rows, columns) in zip(self.grid.strides, self.grid.sizes, strict=True):
            x, y = ((torch.arange(n, device=x1.device) + 0.5) * stride for n in (columns, rows))
            of_row, of_column = of_axis(y1, y2, y, stride), of_axis(x1, x2, x, stride)
            levels.append(join(of_row[:, :, None], of_column[:, None]).flatten(1))
        return torch.cat(levels, 1)

    def inside(self) -> Tensor:  # (m, N) bool: the point lies in the object's box
        return self.on_grid(lambda low, high, at, _: torch.minimum(at - low, high - at) > INSIDE_MARGIN_PX)

    def near_center(self, radius: float) -> Tensor:  # (m, N) bool: within `radius` strides of the centre along x and y
        return self.on_grid(lambda low, high, at, stride: (at - (low + high) / 2).abs() < radius * stride)

    def anchor_iou(self) -> Tensor:  # (m, N) of the square anchors, one a point
        def side(low: Tensor, high: Tensor, at: Tensor, stride: int) -> Tensor:
            half = ANCHOR_STRIDES / 2 * stride
            return (torch.minimum(high, at + half) - torch.maximum(low, at - half)).clamp(min=0)

        area, overlap = (self.gt_boxes[:, 2:] - self.gt_boxes[:, :2]).prod(1, keepdim=True), self.on_grid(side)
        return overlap / (area + (ANCHOR_STRIDES * self.strides) ** 2 - overlap)


class Claims(NamedTuple):
    wanted: Tensor  # (m, N) bool
    priority: Tensor  # (m, N) float
    neither: Tensor | bool = False  # (N,) bool: no negatives if nobody claims them


def best_per_row(value: Tensor, allowed: Tensor, count: int | Tensor) -> Tensor:
    """(m, n) bool: the `count` (a number, or (m, 1)) lowest finite values of every row of those allowed, none of them
    NaN; ties go to the lower index."""
    value = value.masked_fill(~allowed, torch.inf)
    count = (value.new_zeros(len(value), 1) + count).clamp(max=value.shape[1]).long()
    last = value.topk(int(count.amax()), largest=False).values.gather(1, count - 1)  # faster than to sort them all
    lower, tied = value < last, (value == last) & (value < torch.inf)
    return lower | (tied & (tied.cumsum(1, dtype=torch.int32) <= count - lower.sum(1, keepdim=True)))


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
    strides = grid.point_strides(boxes.device)
    for b in image_of_row[valid].unique().tolist():
        rows = (valid & (image_of_row == b)).nonzero()[:, 0]
        predicted = boxes[b].float().masked_fill(~boxes[b].isfinite().all(1, keepdim=True), torch.nan)
        image = ImageInputs(logits[b], predicted, gt_boxes[rows].float(), gt_labels[rows], grid, strides)
        claims = strategy(image)
        row, point = claims.wanted.nonzero(as_tuple=True)
        _, pair_iou, _, usable = image.predictions(row, point)
        row, point, pair_iou = row[usable], point[usable], pair_iou[usable]
        k[rows] = torch.bincount(row, minlength=len(rows)).int()
        ambiguous[b] = torch.bincount(point, minlength=len(strides)) > 1
        order = claims.priority[row, point].argsort(stable=True)  # rows ascend, so the lower one is the first of equals
        place = torch.arange(len(order), device=order.device)
        first = place.new_full(strides.shape, len(order)).scatter_reduce(0, point[order], place, "amin")
        won = order[first[first < len(order)]]
        gt_index[b, point[won]], iou[b, point[won]] = rows[row[won]], pair_iou[won]
        gt_index[b, claims.neither & (gt_index[b] < 0)] = NEITHER
    return Assignment(gt_index, iou, k), ambiguous
