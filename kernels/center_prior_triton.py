"""Center prior of one ground truth in Triton: the integer arithmetic of center_prior_torch.py and grid.py.

Values are scalars, except the BLOCK points that a program handles at once. Centres and half strides are in units of
2^-16 px. A level table has strides px, columns, rows, first points and reaches of the "radius" prior, (5, L) int64.
"""

import triton
import triton.language as tl

from .grid import INSIDE_MARGIN_PX, MAX_SIDE_PX, UNITS_PER_PX

BLOCK = tl.constexpr(128)
NO_POINT = tl.constexpr(2**31 - 1)  # sorts after every point
FARTHEST = tl.constexpr(2**63 - 1)
_MARGIN = tl.constexpr(INSIDE_MARGIN_PX)
_MAX_SIDE = tl.constexpr(float(MAX_SIDE_PX))
HALF_UNITS = tl.constexpr(UNITS_PER_PX // 2)


@triton.jit
def _ceil_div(a, b):
    """Ceiling of a / b for b > 0; Triton's // rounds towards zero."""
    return a // b + (a % b > 0).to(tl.int64)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def fixed_point(side):
    """Return a side in units of 2^-15 px, rounded half to even."""
    scaled = tl.minimum(tl.maximum(side, -_MAX_SIDE), 2 * _MAX_SIDE) * HALF_UNITS
    floor = tl.floor(scaled)
    rest = scaled - floor
    units = floor.to(tl.int64)
    return units + ((rest > 0.5) | ((rest == 0.5) & (units % 2 != 0))).to(tl.int64)


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
    for _ in tl.static_range(2):  # the quotients are off by two at most; this comparison is the definition
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
    """Starts of the runs of one and of two coordinates closest to a centre, on an unbounded axis.

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
    """The rank-th closest coordinate to a centre (from 0); ties go to the lower one."""
    start = _run_start(rank + 1, one, two, size)
    grew_right = (rank > 0) & (start == _run_start(rank, one, two, size))
    return tl.where(grew_right, start + rank, start)


@triton.jit
def squared_distance(x, y, center_x, center_y, half):
    """Squared distance of a point and a centre, exact, in squared units of 2^-16 px."""
    dx = (2 * x + 1).to(tl.int64) * half - center_x
    dy = (2 * y + 1).to(tl.int64) * half - center_y
    return dx * dx + dy * dy


@triton.jit
def rank_points(ranked_distance, ranked_point, ranks, num_ranks, num_listed, center_x, center_y, half, columns, rows):
    """Write the squared distance and the index in its level of every point that may be among the closest ones."""
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
def load_boxes(box, mask):
    """x1, y1, x2, y2 in float32 from pointers to x1; 0 0 1 1 where masked."""
    x1 = tl.load(box, mask=mask, other=0.0).to(tl.float32)
    y1 = tl.load(box + 1, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(box + 2, mask=mask, other=1.0).to(tl.float32)
    return x1, y1, x2, tl.load(box + 3, mask=mask, other=1.0).to(tl.float32)


@triton.jit
def ground_truth(g, gt_boxes, gt_labels, gt_offsets, B, C):
    """Image, label, box and validity of row g, as grid.valid_rows has them."""
    passed = tl.zeros([BLOCK], tl.int32)
    for base in range(0, B + 1, BLOCK):
        b = base + tl.arange(0, BLOCK)
        passed += ((b < B + 1) & (tl.load(gt_offsets + b, mask=b < B + 1, other=0) <= g)).to(tl.int32)
    image = tl.sum(passed, 0) - 1
    label = tl.load(gt_labels + g).to(tl.int64)
    x1, y1, x2, y2 = load_boxes(gt_boxes + g * 4, True)
    valid = is_finite(x1) & is_finite(y1) & is_finite(x2) & is_finite(y2) & (x2 > x1) & (y2 > y1)
    valid = valid & (label >= 0) & (label < C) & (image >= 0) & (image < B)
    return tl.minimum(tl.maximum(image, 0), B - 1).to(tl.int64), label, x1, y1, x2, y2, valid
