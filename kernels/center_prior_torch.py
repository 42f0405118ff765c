"""Center prior: which points are candidates of which ground truths (paper, section 3.3), by arithmetic on the grid.

The points inside a box are a range of columns and a range of rows on each level, and the closest ones to its centre
follow from the grid, so distances to all N points are never computed. G ground truths, L levels, P candidate pairs.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import OTAConfig
from .grid import INSIDE_MARGIN_PX, MAX_SIDE_PX, UNITS_PER_PX, PointGrid, box_centers, radius_in_units


@lru_cache(maxsize=32)
def _level_table(grid: PointGrid, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Stride px (L, 1), columns and rows (L, 2) and index of the first point (L,) of every level, int64."""
    rows, columns = zip(*grid.sizes, strict=True)
    table = torch.tensor([grid.strides, columns, rows, grid.level_offsets[:-1]], device=device).T
    return table[:, :1], table[:, 1:3], table[:, 3]


@lru_cache(maxsize=32)
def possible_ranks(count: int, device: torch.device) -> Tensor:
    """Column rank p and row rank q (2, ranks), from 0, that a point among the `count` closest of its level can have.

    (p + 1)(q + 1) - 1 points are at least as close, so (p + 1)(q + 1) <= count: 87 pairs instead of 625 for 25 points.
    """
    ranks = [(p, q) for p in range(count) for q in range(count // (p + 1))]
    return torch.tensor(ranks, device=device).T


def _nearest(center: Tensor, stride: Tensor, size: Tensor, count: int) -> Tensor:
    """The `count` grid coordinates (..., count) closest to a centre a on one axis; ties go to the lower one.

    The m closest form a run from ceil(a - m / 2), shifted into the grid. Entries from rank `size` on are meaningless.
    """
    m = torch.arange(1, count + 1, device=center.device)
    half = (stride * (UNITS_PER_PX // 2))[..., None]
    start = -((half * (m + 1) - center[..., None]) // (2 * half))
    start = torch.minimum(start, size[..., None] - m).clamp(min=0)
    grew_right = F.pad(start[..., 1:] == start[..., :-1], (1, 0))
    return start + grew_right * (m - 1)


def _candidate_ranges(boxes: Tensor, center: Tensor, grid: PointGrid, config: OTAConfig) -> tuple[Tensor, Tensor]:
    """First and last (column, row) that a candidate may have, (G, L, 2) each."""
    stride, sizes, _ = _level_table(grid, boxes.device)
    low, high = boxes.clamp(-MAX_SIDE_PX, 2 * MAX_SIDE_PX)[:, None].split(2, dim=2)
    first, last = (low / stride - 0.5).floor(), (high / stride - 0.5).ceil()
    for _ in range(2):  # the quotients are off by two at most; this comparison is the definition
        first = first + ((first + 0.5) * stride - low <= INSIDE_MARGIN_PX).float()
        last = last - (high - (last + 0.5) * stride <= INSIDE_MARGIN_PX).float()
    first, last = first.long(), last.long()
    if config.center_prior == "radius":
        reach = torch.tensor([[radius_in_units(config.radius, s)] for s in grid.strides], device=boxes.device)
        half, center = stride * (UNITS_PER_PX // 2), center[:, None]
        first = torch.maximum(first, (center - reach - half) // (2 * half) + 1)
        last = torch.minimum(last, -((half - center - reach) // (2 * half)) - 1)
    return first.clamp(min=0), torch.minimum(last, sizes - 1)


def _all_in_ranges(first: Tensor, last: Tensor, grid: PointGrid) -> tuple[Tensor, Tensor]:
    _, sizes, level_start = _level_table(grid, first.device)
    width, height = (last - first + 1).clamp(min=0).flatten(0, 1).unbind(1)
    count = width * height
    cell = torch.arange(count.numel(), device=count.device).repeat_interleave(count)  # gt * L + level
    inner = torch.arange(cell.numel(), device=count.device) - (count.cumsum(0) - count)[cell]
    gt, level = cell // len(grid.strides), cell % len(grid.strides)
    x, y = first[gt, level, 0] + inner % width[cell], first[gt, level, 1] + inner // width[cell]
    return gt, level_start[level] + y * sizes[level, 0] + x


def _closest(center: Tensor, first: Tensor, last: Tensor, grid: PointGrid, count: int) -> tuple[Tensor, Tensor]:
    """(ground truth, point) of the `count` points closest to the centre on each level, if in the ranges."""
    gt, level = (last >= first).all(2).nonzero(as_tuple=True)
    first, last, center = first[gt, level], last[gt, level], center[gt]
    stride, size, level_start = (table[level] for table in _level_table(grid, center.device))
    ranks = possible_ranks(count, center.device).expand(len(gt), -1, -1)
    place = _nearest(center, stride, size, count).gather(2, ranks)  # (pairs of box and level, 2, ranks)
    offset = (2 * place + 1) * (stride * (UNITS_PER_PX // 2))[..., None] - center[..., None]
    exists = (ranks < size[..., None]).all(1)
    distance = (offset**2).sum(1).masked_fill(~exists, torch.iinfo(torch.int64).max)
    inside = exists & ((place >= first[..., None]) & (place <= last[..., None])).all(1)

    # Closest first, ties to the lower point: two stable sorts, the second one by distance.
    point, by_point = (level_start[:, None] + place[:, 1] * size[:, :1] + place[:, 0]).sort(dim=1)
    by_distance = distance.gather(1, by_point).argsort(dim=1, stable=True)[:, :count]
    inside = inside.gather(1, by_point.gather(1, by_distance))
    return gt[inside.nonzero()[:, 0]], point.gather(1, by_distance)[inside]


def _closest_point(center: Tensor, grid: PointGrid) -> Tensor:
    """(G,) the point closest to the centre over all levels; ties go to the finest level."""
    stride, size, level_start = _level_table(grid, center.device)
    place = _nearest(center[:, None], stride, size, 1)[..., 0]
    offset = (2 * place + 1) * stride * (UNITS_PER_PX // 2) - center[:, None]
    level = (offset**2).sum(2).argmin(1, keepdim=True)
    return (level_start + place[..., 1] * size[:, 0] + place[..., 0]).gather(1, level)[:, 0]


def pairs_inside(boxes: Tensor, grid: PointGrid, config: OTAConfig) -> tuple[Tensor, Tensor]:
    """Row in float32 boxes (n, 4) and point (0..N-1) of the candidate pairs, sorted by row; a box may have none."""
    center = box_centers(boxes)
    ranges = _candidate_ranges(boxes, center, grid, config)
    if config.center_prior == "closest":
        return _closest(center, *ranges, grid, int(config.radius) ** 2)
    return _all_in_ranges(*ranges, grid)


def candidate_pairs(gt_boxes: Tensor, valid: Tensor, grid: PointGrid, config: OTAConfig) -> tuple[Tensor, Tensor]:
    """Row in gt_boxes and point (0..N-1) of all candidate pairs, (P,) each, sorted by row. A ground truth without a
    point inside has the closest one."""
    rows = valid.nonzero()[:, 0]
    boxes = gt_boxes[rows].float()
    gt, point = pairs_inside(boxes, grid, config)
    without = torch.bincount(gt, minlength=len(rows)) == 0
    if without.any():
        added = without.nonzero()[:, 0]
        gt, order = torch.cat([gt, added]).sort(stable=True)
        point = torch.cat([point, _closest_point(box_centers(boxes[added]), grid)])[order]
    return rows[gt], point
