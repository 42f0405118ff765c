"""Candidate pairs, their costs and the supplies of a batch in one Triton launch: one program per ground truth.

A program lists its candidates by the arithmetic of center_prior_triton.py, packs their points into its slots,
reads one logit and one box for each, and writes the relative cost in the units of Sinkhorn,

    D_ij log2(e) / eps,  D_ij = l(z_j,c_i ; 1) - l(z_j,c_i ; 0) + alpha L_reg(b_j, g_i),

and the supply k_i. B images, N anchor points over all levels, G ground truths of a batch, C classes, L levels.
"""

import math
from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import center_prior_triton as prior
from .center_prior_torch import possible_ranks
from .center_prior_triton import BLOCK, NO_POINT, load_boxes
from .config import FOCAL_ALPHA, IOU_FLOOR, Inputs, OTAConfig
from .grid import PointGrid, radius_in_units

_ALPHA = tl.constexpr(FOCAL_ALPHA)
_IOU_FLOOR = tl.constexpr(IOU_FLOOR)
_OPTIONS = dict(num_warps=4, enable_fp_fusion=False)
_VARYING = ["B", "N", "C"]  # change from batch to batch: Triton must not recompile for 1 or multiples of 16


class Pairs(NamedTuple):
    """Candidate pairs in slots; ground truth g owns `count[g]` slots from `start[g]` on."""

    point: Tensor  # (slots,) int32 image * N + point, NO_POINT for an empty slot
    gt: Tensor  # (slots,) int32 row in gt_boxes
    cost: Tensor  # (slots,) float32 D log2(e) / eps, inf for a pair with a non-finite prediction
    start: Tensor  # (G + 1,) int64
    count: Tensor  # (G,) int32
    k: Tensor  # (G,) int32


@triton.jit
def pair_iou(gx1, gy1, gx2, gy2, bx1, by1, bx2, by2):
    """IoU, union and area of the hull of a ground truth and a predicted box."""
    width = tl.maximum(tl.minimum(gx2, bx2) - tl.maximum(gx1, bx1), 0.0)
    overlap = width * tl.maximum(tl.minimum(gy2, by2) - tl.maximum(gy1, by1), 0.0)
    area_b = tl.maximum(bx2 - bx1, 0.0) * tl.maximum(by2 - by1, 0.0)
    union = (gx2 - gx1) * (gy2 - gy1) + area_b - overlap
    hull = (tl.maximum(gx2, bx2) - tl.minimum(gx1, bx1)) * (tl.maximum(gy2, by2) - tl.minimum(gy1, by1))
    return overlap / union, union, hull


@triton.jit
def _smooth_l1(difference):
    size = tl.abs(difference)
    return tl.where(size < 1.0, 0.5 * size * size, size - 0.5)


@triton.jit
def _relative_cls_cost(logit, CLS: tl.constexpr):
    """l(z ; 1) - l(z ; 0) of one class."""
    if CLS == "focal":
        softplus = tl.log(1.0 + tl.exp(-tl.abs(logit)))
        log_p, log_q = tl.minimum(logit, 0.0) - softplus, tl.minimum(-logit, 0.0) - softplus
        return (1 - _ALPHA) * tl.exp(2 * log_p) * log_q - _ALPHA * tl.exp(2 * log_q) * log_p
    else:
        return -logit


@triton.jit
def _top_sum(bits, start, count, top_q):
    """Sum of the top_q largest of `count` floats in [0, 2), given by their bits, which sort like the floats.

    Determines the q-th largest four bits at a time, from the number of floats that are not smaller.
    """
    lane = tl.arange(0, BLOCK)
    digit = tl.arange(0, 16)
    smallest = tl.zeros([], tl.int32)
    for step in range(0, tl.where(count > top_q, 8, 0)):
        shift = tl.maximum(27 - 4 * step, 0)  # floats below 2 have 30 bits
        trial = smallest + (digit << shift)
        not_smaller = tl.zeros([16], tl.int32)
        for base in range(0, count, BLOCK):
            x = tl.load(bits + start + base + lane, mask=base + lane < count, other=-1)
            not_smaller += tl.sum((x[:, None] >= trial[None, :]).to(tl.int32), 0)
        smallest += (tl.sum((not_smaller >= top_q).to(tl.int32), 0) - 1) << shift
    total = tl.zeros([BLOCK], tl.float32)
    larger = tl.zeros([BLOCK], tl.int32)
    for base in range(0, count, BLOCK):
        x = tl.load(bits + start + base + lane, mask=base + lane < count, other=-1)
        total += tl.where(x > smallest, x.to(tl.float32, bitcast=True), 0.0)
        larger += (x > smallest).to(tl.int32)
    left = (top_q - tl.sum(larger, 0)).to(tl.float32)
    return tl.sum(total, 0) + tl.where(smallest > 0, left * smallest.to(tl.float32, bitcast=True), 0.0)


@triton.jit(do_not_specialize=_VARYING)
def _pairs_kernel(
    pairs,
    scratch,
    inputs,
    tables,
    B,
    N,
    C,
    settings,
    PRIOR: tl.constexpr,
    CLS: tl.constexpr,
    REG: tl.constexpr,
):
    pair_point, pair_gt, pair_cost, pair_start, pair_count, supply = pairs
    iou_bits, ranked_distance, ranked_point = scratch
    logits, boxes, gt_boxes, gt_labels, gt_offsets = inputs
    levels, ranks = tables
    L, num_ranks, num_closest, top_q, per_q, fixed_k, alpha, scale = settings
    g = tl.program_id(0).to(tl.int64)
    image, label, x1, y1, x2, y2, valid = prior.ground_truth(g, gt_boxes, gt_labels, gt_offsets, B, C)
    center_x, center_y = prior.fixed_point(x1) + prior.fixed_point(x2), prior.fixed_point(y1) + prior.fixed_point(y2)
    lane = tl.arange(0, BLOCK)
    start = tl.load(pair_start + g)
    ranked_distance += g * num_ranks
    ranked_point += g * num_ranks

    # The candidates' points, packed.
    packed = tl.zeros([], tl.int32)
    least = tl.full([], prior.FARTHEST, tl.int64)
    closest_point = tl.zeros([], tl.int32)
    for level in range(tl.where(valid, L, 0)):
        stride, columns, rows, first_point, reach = prior.level(levels, level, L)
        half = stride * prior.HALF_UNITS
        first_x, last_x = prior.range_in_box(x1, x2, center_x, stride, columns, reach, PRIOR)
        first_y, last_y = prior.range_in_box(y1, y2, center_y, stride, rows, reach, PRIOR)
        width = tl.maximum(last_x - first_x + 1, 0)
        num_listed = width * tl.maximum(last_y - first_y + 1, 0)
        if PRIOR == "closest":
            num_listed = tl.where(num_listed > 0, num_ranks, 0)
            prior.rank_points(
                ranked_distance, ranked_point, ranks, num_ranks, num_listed, center_x, center_y, half, columns, rows
            )
            tl.debug_barrier()

        for base in range(0, num_listed, BLOCK):
            listed = base + lane < num_listed
            if PRIOR == "closest":
                distance = tl.load(ranked_distance + base + lane, mask=listed, other=prior.FARTHEST)
                point = tl.load(ranked_point + base + lane, mask=listed, other=NO_POINT)
                closer = tl.zeros([BLOCK], tl.int32)
                for other in range(0, num_listed):
                    other_distance, other_point = tl.load(ranked_distance + other), tl.load(ranked_point + other)
                    tie = (other_distance == distance) & (other_point < point)
                    closer += ((other_distance < distance) | tie).to(tl.int32)
                x, y = point % columns, point // columns
                inside = (x >= first_x) & (x <= last_x) & (y >= first_y) & (y <= last_y)
                chosen = inside & (closer < num_closest) & (point != NO_POINT)
            else:
                chosen = listed
                point = (first_y + (base + lane) // width) * columns + first_x + (base + lane) % width
            place = packed + tl.cumsum(chosen.to(tl.int32), 0) - 1
            flat = (image * N + first_point + point).to(tl.int32)
            tl.store(pair_point + start + place, flat, mask=chosen)
            packed += tl.sum(chosen.to(tl.int32), 0)
        if PRIOR == "closest":
            tl.debug_barrier()

        x = prior.nearest(0, *prior.first_runs(center_x, half), columns)
        y = prior.nearest(0, *prior.first_runs(center_y, half), rows)
        distance = prior.squared_distance(x, y, center_x, center_y, half)
        closest_point = tl.where(distance < least, first_point + y * columns + x, closest_point)
        least = tl.minimum(distance, least)
    without = valid & (packed == 0)
    tl.store(pair_point + start, (image * N + closest_point).to(tl.int32), mask=without)
    packed = tl.where(without, 1, packed)
    tl.debug_barrier()

    # Their costs.
    usable = tl.zeros([BLOCK], tl.int32)
    for base in range(0, packed, BLOCK):
        filled = base + lane < packed
        slot = start + base + lane
        flat = tl.load(pair_point + slot, mask=filled, other=0)
        tl.debug_barrier()  # on AMD two threads may hold the same slot: both read it before it is overwritten
        row = flat.to(tl.int64)
        logit = tl.load(logits + row * C + label, mask=filled, other=0.0).to(tl.float32)
        bx1, by1, bx2, by2 = load_boxes(boxes + row * 4, filled)
        iou, union, hull = pair_iou(x1, y1, x2, y2, bx1, by1, bx2, by2)
        if REG == "iou":
            reg = -tl.log(tl.maximum(iou, _IOU_FLOOR))
        elif REG == "giou":
            reg = 1.0 - iou + (hull - union) / hull
        else:
            point = tl.where(filled, flat - image * N, 0)
            stride_px = tl.zeros([BLOCK], tl.float32)
            for level in range(L):
                at_least = point >= tl.load(levels + 3 * L + level)
                stride_px = tl.where(at_least, tl.load(levels + level).to(tl.float32), stride_px)
            reg = _smooth_l1((bx1 - x1) / stride_px) + _smooth_l1((by1 - y1) / stride_px)
            reg += _smooth_l1((bx2 - x2) / stride_px) + _smooth_l1((by2 - y2) / stride_px)
        cost = (_relative_cls_cost(logit, CLS) + alpha * reg) * scale
        finite = prior.is_finite(bx1) & prior.is_finite(by1) & prior.is_finite(bx2) & prior.is_finite(by2)
        finite = finite & prior.is_finite(logit) & prior.is_finite(cost) & prior.is_finite(iou) & filled
        tl.store(pair_cost + slot, tl.where(finite, cost, float("inf")), mask=filled)
        tl.store(pair_gt + slot, tl.zeros([BLOCK], tl.int32) + g.to(tl.int32), mask=filled)
        tl.store(pair_point + slot, tl.where(finite, flat, NO_POINT), mask=filled)
        tl.store(iou_bits + slot, tl.where(finite, iou.to(tl.int32, bitcast=True), -1), mask=filled)
        usable += finite.to(tl.int32)
    num_usable = tl.sum(usable, 0)

    # The supply.
    if fixed_k > 0:
        k = tl.minimum(fixed_k, num_usable)
    else:
        tl.debug_barrier()
        q = tl.maximum(tl.minimum(top_q, (num_usable + per_q - 1) // per_q), 1)
        total = _top_sum(iou_bits, start, packed, q)
        k = tl.minimum(tl.maximum(total.to(tl.int32), 1), num_usable)
    tl.store(supply + g, k)
    tl.store(pair_count + g, packed)


COMPILED = isinstance(_pairs_kernel, triton.JITFunction)  # otherwise interpreted


def register_limit() -> dict[str, int]:
    """The registers a thread may have: by default NVIDIA's assembler takes fewer, and spills a few values."""
    on_cuda = COMPILED and triton.runtime.driver.active.get_current_target().backend == "cuda"
    return {"maxnreg": 128} if on_cuda else {}


@cache  # without a limit, because a captured CUDA graph copies the table at every replay
def _host_table(grid: PointGrid, center_prior: str, radius: float, pinned: bool) -> Tensor:
    """Level table (center_prior_triton.py), then the `possible_ranks` of "closest": (5 L + 2 ranks,) int64."""
    rows, columns = zip(*grid.sizes, strict=True)
    reach = [radius_in_units(radius, stride) if center_prior == "radius" else 0 for stride in grid.strides]
    parts = [torch.tensor([grid.strides, columns, rows, grid.level_offsets[:-1], reach]).flatten()]
    if center_prior == "closest":
        parts.append(possible_ranks(int(radius) ** 2, torch.device("cpu")).flatten())
    table = torch.cat(parts)
    return table.pin_memory() if pinned else table


def most_pairs_per_gt(grid: PointGrid, config: OTAConfig) -> int:
    """Upper bound of the candidates of one ground truth, for which memory is reserved: the host cannot count them."""
    if config.center_prior == "closest":
        return sum(min(int(config.radius) ** 2, rows * columns) for rows, columns in grid.sizes)
    if config.center_prior == "radius":
        side = math.ceil(2 * config.radius)  # of 2r strides, both ends excluded
        return max(1, sum(min(side, rows) * min(side, columns) for rows, columns in grid.sizes))
    return grid.num_points


def cost_scale(config: OTAConfig) -> float:
    return math.log2(math.e) / config.eps


def find_pairs(inputs: Inputs, config: OTAConfig) -> Pairs:
    """Candidate pairs, costs and supplies of the ground truths; inputs are contiguous.

    Every ground truth has slots for as many candidates as the center prior allows, with "none" for all N points.
    """
    logits, boxes, gt_boxes, gt_labels, gt_offsets, grid = inputs
    (B, N, C), G, L, device = logits.shape, len(gt_boxes), len(grid.strides), boxes.device
    # Pinned memory is copied without waiting for the device.
    host = _host_table(grid, config.center_prior, config.radius, device.type == "cuda")
    levels, ranks = tables = host.to(device, non_blocking=True).tensor_split([5 * L])
    most = most_pairs_per_gt(grid, config)
    num_slots, start = G * most, torch.arange(0, (G + 1) * most, most, device=device)
    if max(num_slots, B * N) > NO_POINT.value - 2**16:
        raise ValueError(f"{num_slots:,} possible pairs of {B * N:,} points are too many for 32 bits")
    empty, num_ranks = partial(torch.empty, dtype=torch.int32, device=device), len(ranks) // 2
    point, cost = empty(num_slots).fill_(NO_POINT.value), empty(num_slots, dtype=torch.float32)
    pairs = Pairs(point, empty(num_slots), cost, start, empty(G), empty(G))
    scratch = empty(num_slots), empty(G, num_ranks, dtype=torch.int64), empty(G, num_ranks)
    num_closest = int(config.radius) ** 2 if config.center_prior == "closest" else 0
    supply = config.top_q, config.per_q, config.fixed_k or 0
    settings = L, num_ranks, num_closest, *supply, float(config.alpha), cost_scale(config)
    kinds = dict(PRIOR=config.center_prior, CLS=config.cls_cost, REG=config.reg_cost)
    options = kinds | _OPTIONS | register_limit()
    _pairs_kernel[(G,)](pairs, scratch, inputs[:5], tables, B, N, C, settings, **options)
    return pairs
