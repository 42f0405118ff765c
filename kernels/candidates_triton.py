"""Center prior of one ground truth on the device: the integer arithmetic of candidates.py and grid.py.

Everything is a scalar but the points that are looked at together. half is half a stride in units of 2^-16 px, as are
centres; a level table has strides px, columns, rows, first points and reaches of the "radius" prior, (5, L) int64.
"""

import triton
import triton.language as tl

from .grid import INSIDE_MARGIN_PX, MAX_SIDE_PX, UNITS_PER_PX

NO_POINT = tl.constexpr(2**31 - 1)  # sorts behind every point
FARTHEST = tl.constexpr(2**63 - 1)
_MARGIN = tl.constexpr(INSIDE_MARGIN_PX)
_MAX_SIDE = tl.constexpr(float(MAX_SIDE_PX))
HALF_UNITS = tl.constexpr(UNITS_PER_PX // 2)


@triton.jit
def _ceil_div(a, b):
    """Ceiling of a / b for b > 0; // rounds towards zero."""
    return a // b + (a % b > 0).to(tl.int64)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def fixed_point(side):
    """A side in units of 2^-15 px, a half rounded to even."""
    scaled = tl.minimum(tl.maximum(side, -_MAX_SIDE), 2 * _MAX_SIDE) * HALF_UNITS
    floor = tl.floor(scaled)
    rest = scaled - floor
    whole = floor.to(tl.int64)
    return whole + ((rest > 0.5) | ((rest == 0.5) & (whole % 2 != 0))).to(tl.int64)


@triton.jit
def level(levels, level, L):
    """Stride px, columns, rows, first point and reach (units of 2^-16 px) of a level."""
    row = levels + level
    columns, rows = tl.load(row + L).to(tl.int32), tl.load(row + 2 * L).to(tl.int32)
    return tl.load(row), columns, rows, tl.load(row + 3 * L).to(tl.int32), tl.load(row + 4 * L)


@triton.jit
def range_in_box(low, high, center, stride, size, reach, PRIOR: tl.constexpr):
    """First and last coordinate on one axis of a level that a candidate may have."""
    stride_px = stride.to(tl.float32)
    low = tl.minimum(tl.maximum(low, -_MAX_SIDE), 2 * _MAX_SIDE)
    high = tl.minimum(tl.maximum(high, -_MAX_SIDE), 2 * _MAX_SIDE)
    first = tl.floor(low / stride_px - 0.5)
    last = -tl.floor(0.5 - high / stride_px)
    for _ in tl.static_range(2):  # the guess is at most two short; the test itself is the literal one
        first += ((first + 0.5) * stride_px - low <= _MARGIN).to(tl.float32)
        last -= (high - (last + 0.5) * stride_px <= _MARGIN).to(tl.float32)
    first, last = first.to(tl.int32), last.to(tl.int32)
    if PRIOR == "radius":
        half = stride * HALF_UNITS
        first = tl.maximum(first, 1 - _ceil_div(half + reach - center, 2 * half).to(tl.int32))
        last = tl.minimum(last, _ceil_div(center + reach - half, 2 * half).to(tl.int32) - 1)
    return tl.maximum(first, 0), tl.minimum(last, size - 1)


@triton.jit
def first_runs(center, half):
    """Where the one and the two coordinates closest to a centre start, on an axis without ends.

    They are ceil(t / 2 - 1) and ceil(t / 2 - 3 / 2), t being the centre in half strides.
    """
    t = _ceil_div(center, half).to(tl.int32)
    return ((t + 1) >> 1) - 1, (t >> 1) - 1


@triton.jit
def _run_start(length, one, two, size):
    """Start of the run of the `length` coordinates closest to a centre, on an axis with `size` of them."""
    start = tl.where(length % 2 == 1, one, two) - (length - 1) // 2
    return tl.maximum(tl.minimum(start, size - length), 0)


@triton.jit
def nearest(rank, one, two, size):
    """The coordinate that is the rank-th closest to a centre (from 0), the lower one first on a tie."""
    start = _run_start(rank + 1, one, two, size)
    grew_right = (rank > 0) & (start == _run_start(rank, one, two, size))
    return tl.where(grew_right, start + rank, start)


@triton.jit
def squared_distance(x, y, center_x, center_y, half):
    """Exact, in units of 2^-16 px."""
    dx = (2 * x + 1).to(tl.int64) * half - center_x
    dy = (2 * y + 1).to(tl.int64) * half - center_y
    return dx * dx + dy * dy


@triton.jit
def rank_points(
    ranked_distance, ranked_point, ranks, num_ranks, num_listed, center_x, center_y, half, columns, rows,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Squared distance and index in its level of every point that can be among the closest ones, to scratch memory."""
    one_x, two_x = first_runs(center_x, half)
    one_y, two_y = first_runs(center_y, half)
    for base in range(0, num_listed, BLOCK):
        lane = base + tl.arange(0, BLOCK)
        listed = lane < num_listed
        rank_x = tl.load(ranks + lane, mask=listed, other=0).to(tl.int32)
        rank_y = tl.load(ranks + num_ranks + lane, mask=listed, other=0).to(tl.int32)
        x = nearest(rank_x, one_x, two_x, columns)
        y = nearest(rank_y, one_y, two_y, rows)
        distance = squared_distance(x, y, center_x, center_y, half)
        exists = (rank_x < columns) & (rank_y < rows)
        tl.store(ranked_distance + lane, tl.where(exists, distance, FARTHEST), mask=listed)
        tl.store(ranked_point + lane, tl.where(exists, y * columns + x, NO_POINT), mask=listed)


@triton.jit
def ground_truth(
    g, gt_boxes, gt_labels, gt_offsets, box_row, box_col, label_step, offset_step, B, C, BLOCK: tl.constexpr
):
    """Image, label, box and validity of row g, as grid.valid_rows has them."""
    lane = tl.arange(0, BLOCK)
    passed = tl.zeros([BLOCK], tl.int32)
    for base in range(0, B + 1, BLOCK):
        listed = base + lane < B + 1
        offset = tl.load(gt_offsets + (base + lane).to(tl.int64) * offset_step, mask=listed, other=0)
        passed += (listed & (offset <= g)).to(tl.int32)
    image = tl.sum(passed, 0) - 1
    label = tl.load(gt_labels + g * label_step).to(tl.int64)
    box = gt_boxes + g * box_row
    x1 = tl.load(box).to(tl.float32)
    box += box_col
    y1 = tl.load(box).to(tl.float32)
    box += box_col
    x2 = tl.load(box).to(tl.float32)
    box += box_col
    y2 = tl.load(box).to(tl.float32)
    valid = is_finite(x1) & is_finite(y1) & is_finite(x2) & is_finite(y2) & (x2 > x1) & (y2 > y1)
    valid = valid & (label >= 0) & (label < C) & (image >= 0) & (image < B)
    return tl.minimum(tl.maximum(image, 0), B - 1).to(tl.int64), label, x1, y1, x2, y2, valid
