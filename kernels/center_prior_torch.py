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
def _level_table(grid: PointGrid, device: torch.device) -> tuple[Tensor, ...]:
    """Stride px, columns, rows and index of the first point of every level: (L,) int64 each."""
    rows, columns = zip(*grid.sizes, strict=True)
    return torch.tensor([grid.strides, columns, rows, grid.level_offsets[:-1]], device=device).unbind(0)


@lru_cache(maxsize=32)
def possible_ranks(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(column rank, row rank) that a point among the `count` closest of its level can have.

    The point in the p-th closest column and the q-th closest row (from 0) has (p + 1)(q + 1) - 1 points at least
    as close as itself, so (p + 1)(q + 1) <= count: 87 pairs of ranks for 25 points instead of 625.
    """
    ranks = [(p, q) for p in range(count) for q in range(count // (p + 1))]
    return torch.tensor(ranks, device=device).unbind(1)


def _nearest(center: Tensor, stride: Tensor, size: Tensor, count: int) -> Tensor:
    """The `count` grid coordinates (..., count) closest to a centre on one axis; ties go to the lower one.

    The m closest form a run that starts at ceil(a - m / 2), a being the centre in grid coordinates, shifted into the
    grid. Entries from rank `size` on are meaningless.
    """
    m = torch.arange(1, count + 1, device=center.device)
    half = (stride * (UNITS_PER_PX // 2))[..., None]
    start = -((half * (m + 1) - center[..., None]) // (2 * half))
    start = torch.minimum(start, size[..., None] - m).clamp(min=0)
    grew_right = F.pad(start[..., 1:] == start[..., :-1], (1, 0))
    return start + grew_right * (m - 1)


def _inside_range(low: Tensor, high: Tensor, stride: Tensor) -> tuple[Tensor, Tensor]:
    """First and last grid coordinate of the points farther than the margin from both sides of a box, one axis."""
    first = (low / stride - 0.5).floor()
    last = (high / stride - 0.5).ceil()
    for _ in range(2):  # the quotients are off by two at most; this comparison is the definition
        first = first + ((first + 0.5) * stride - low <= INSIDE_MARGIN_PX).float()
        last = last - (high - (last + 0.5) * stride <= INSIDE_MARGIN_PX).float()
    return first.long(), last.long()


def _candidate_ranges(boxes: Tensor, center: Tensor, grid: PointGrid, config: OTAConfig) -> tuple[Tensor, ...]:
    """Columns and rows a candidate may lie in: first column, last column, first row, last row, (G, L) each."""
    stride, columns, rows, _ = _level_table(grid, boxes.device)
    boxes = boxes.clamp(-MAX_SIDE_PX, 2 * MAX_SIDE_PX)
    ranges = []
    for axis, size in ((0, columns), (1, rows)):
        first, last = _inside_range(boxes[:, axis, None], boxes[:, axis + 2, None], stride)
        if config.center_prior == "radius":
            reach = torch.tensor([radius_in_units(config.radius, s) for s in grid.strides], device=boxes.device)
            half, c = stride * (UNITS_PER_PX // 2), center[:, axis, None]
            first = torch.maximum(first, (c - reach - half) // (2 * half) + 1)
            last = torch.minimum(last, -((half - c - reach) // (2 * half)) - 1)
        ranges += [first.clamp(min=0), torch.minimum(last, size - 1)]
    return tuple(ranges)


def _all_in_ranges(ranges: tuple[Tensor, ...], grid: PointGrid) -> tuple[Tensor, Tensor]:
    """Every (ground truth, point) of the ranges."""
    _, columns, _, level_start = _level_table(grid, ranges[0].device)
    first_x, last_x, first_y, last_y = ranges
    width, height = (last_x - first_x + 1).clamp(min=0), (last_y - first_y + 1).clamp(min=0)
    count = (width * height).flatten()
    cell = torch.arange(count.numel(), device=count.device).repeat_interleave(count)  # gt * L + level
    inner = torch.arange(cell.numel(), device=count.device) - (count.cumsum(0) - count)[cell]
    y, x = inner // width.flatten()[cell], inner % width.flatten()[cell]
    gt, level = cell // len(grid.strides), cell % len(grid.strides)
    point = level_start[level] + (first_y[gt, level] + y) * columns[level] + first_x[gt, level] + x
    return gt, point


def _closest_in_ranges(
    center: Tensor, ranges: tuple[Tensor, ...], grid: PointGrid, count: int
) -> tuple[Tensor, Tensor]:
    """(ground truth, point) of the `count` points closest to the centre on each level, if in the ranges."""
    table = _level_table(grid, center.device)
    first_x, last_x, first_y, last_y = ranges
    gt, level = ((last_x >= first_x) & (last_y >= first_y)).nonzero(as_tuple=True)
    stride, columns, rows, level_start = (t[level] for t in table)
    center, rank_x, rank_y = center[gt], *possible_ranks(count, center.device)

    x = _nearest(center[:, 0], stride, columns, count)
    y = _nearest(center[:, 1], stride, rows, count)
    unit = (stride * (UNITS_PER_PX // 2))[:, None]
    square_x = ((2 * x + 1) * unit - center[:, :1]) ** 2
    square_y = ((2 * y + 1) * unit - center[:, 1:]) ** 2
    distance = square_x[:, rank_x] + square_y[:, rank_y]
    x, y = x[:, rank_x], y[:, rank_y]
    exists = (rank_x < columns[:, None]) & (rank_y < rows[:, None])
    distance = distance.masked_fill(~exists, torch.iinfo(torch.int64).max)

    # Closest first, ties to the lower point: two stable sorts, the second one by distance.
    point, by_point = (level_start[:, None] + y * columns[:, None] + x).sort(dim=1)
    by_distance = distance.gather(1, by_point).argsort(dim=1, stable=True)[:, :count]
    chosen = by_point.gather(1, by_distance)
    x, y, exists = x.gather(1, chosen), y.gather(1, chosen), exists.gather(1, chosen)
    inside = exists & (x >= first_x[gt, level, None]) & (x <= last_x[gt, level, None])
    inside &= (y >= first_y[gt, level, None]) & (y <= last_y[gt, level, None])
    row, _ = inside.nonzero(as_tuple=True)
    return gt[row], point.gather(1, by_distance)[inside]


def _closest_point(center: Tensor, grid: PointGrid) -> Tensor:
    """(G,) the point closest to the centre over all levels; ties go to the finest level."""
    stride, columns, rows, level_start = _level_table(grid, center.device)
    unit = stride * (UNITS_PER_PX // 2)
    shape = (center.shape[0], len(grid.strides))
    x = _nearest(center[:, :1].expand(shape), stride.expand(shape), columns.expand(shape), 1)[..., 0]
    y = _nearest(center[:, 1:].expand(shape), stride.expand(shape), rows.expand(shape), 1)[..., 0]
    distance = ((2 * x + 1) * unit - center[:, :1]) ** 2 + ((2 * y + 1) * unit - center[:, 1:]) ** 2
    level = distance.argmin(1, keepdim=True)
    return (level_start + y * columns + x).gather(1, level)[:, 0]


def candidate_pairs(gt_boxes: Tensor, valid: Tensor, grid: PointGrid, config: OTAConfig) -> tuple[Tensor, Tensor]:
    """Row in gt_boxes and point (0..N-1) of all candidate pairs, (P,) each, sorted by row."""
    rows = valid.nonzero()[:, 0]
    boxes = gt_boxes[rows].float()
    center = box_centers(boxes)
    ranges = _candidate_ranges(boxes, center, grid, config)
    if config.center_prior == "closest":
        gt, point = _closest_in_ranges(center, ranges, grid, int(config.radius) ** 2)
    else:
        gt, point = _all_in_ranges(ranges, grid)
    without = torch.bincount(gt, minlength=len(rows)) == 0
    if without.any():
        added = without.nonzero()[:, 0]
        gt, order = torch.cat([gt, added]).sort(stable=True)
        point = torch.cat([point, _closest_point(center[added], grid)])[order]
    return rows[gt], point
