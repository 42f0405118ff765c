"""Sinkhorn-Knopp over candidate pairs and its decoding, all T iterations in one Triton launch: one program per image.

The plan is a sparse matrix, stored by ground truth, as find_pairs packed it ("slots"), and by point, after one stable
sort ("edges"). So each half of an iteration sums consecutive memory, in an order that the batch does not change, and
gathers the other side's factors. Background is one more entry of every point. The points that are no candidate have
background as their only supplier: one column that counts `rest` times.

The first iteration is in the log domain, with potentials u and v in float64. After it every row of the plan
P = exp(u + v - c) sums to its supply s, and an iteration multiplies in float32: b = 1 / sum_i P_ij a_i by point, then
a = s / sum_j P_ij b_j by ground truth. No column of P sums to less than min(1, s) / N, so a factor changes at most
N / min(1, s) times. That bounds the iterations that fit float32 (_burst) before the factors move into u and v and P is
computed anew. Costs and potentials are in units of eps / log2(e), so that exponentials are exp2.
"""

import math
from collections import namedtuple
from functools import partial

import torch
import triton
import triton.language as tl

from .center_prior_triton import NO_POINT, load_boxes
from .config import EMPTY_SUPPLY, Assignment, Inputs, OTAConfig
from .pairs_triton import Pairs, pair_iou

_EMPTY = tl.constexpr(EMPTY_SUPPLY)
_LOWEST = tl.constexpr(-1e300)
_POINTS, _LANES = tl.constexpr(1024), tl.constexpr(4)  # a tile of points, and the edges of each handled at once
_LOG_POINTS = tl.constexpr(512)  # in the log domain, where registers for float64 tiles of _POINTS would spill
_ROWS, _SLOTS = tl.constexpr(64), tl.constexpr(32)  # a tile of ground truths, and the slots of each handled at once
_EDGES = tl.constexpr(2048)
_OPTIONS = dict(num_warps=16, enable_fp_fusion=False)
_VARYING = ["G", "N", "iterations", "burst", "burst_when_full"]  # see pairs_triton.py

# The solution in units of eps / log2(e), float64: log2 of a plan entry is u + v - cost. u (G,), u_background (B,);
# v[first[b] + i] is that of the i-th candidate point of image b, and column (slots,) has the i of a slot's point.
Potentials = namedtuple("Potentials", "u u_background v column first")
# Pairs of one image by point: pointers to every edge's row, cost and plan entry, and to every point's first edge.
_Edges = namedtuple("_Edges", "gt cost plan begin num_points")
# Pairs of one image by ground truth: pointers to every slot's point, cost and plan entry, and to every row's first
# slot, number of slots (at most `most`) and supply.
_Slots = namedtuple("_Slots", "column cost plan start count supply first_row end_row most")


@triton.jit
def _point_tile(edges, base, POINTS: tl.constexpr):
    """A tile of points, whether they exist, their first and last edge (as columns), and the most edges of one."""
    c = base + tl.arange(0, POINTS)
    exists = c < edges.num_points
    begin = tl.load(edges.begin + c, mask=exists, other=0)
    end = tl.load(edges.begin + c + 1, mask=exists, other=0)
    return c, exists, begin[:, None], end[:, None], tl.max(end - begin, 0)


@triton.jit
def _edge_tile(edges, rows, values, other, begin, end, d):
    """The next edges of a tile of points: which exist, their ground truths, and entries of `rows` and `values`."""
    e = begin + (d + tl.arange(0, _LANES)[None, :])
    exists = e < end
    gt = tl.load(edges.gt + e, mask=exists, other=0)
    row = tl.load(rows + gt, mask=exists, other=0.0)
    return e, exists, gt, row, tl.load(values + e, mask=exists, other=other)


@triton.jit
def _row_tile(slots, base):
    """A tile of ground truths, whether they exist, their first slot and their number of slots (as columns)."""
    g = base + tl.arange(0, _ROWS)
    exists = g < slots.end_row
    begin = tl.load(slots.start + g, mask=exists, other=0)
    count = tl.load(slots.count + g, mask=exists, other=0)
    return g, exists, begin[:, None], count[:, None]


@triton.jit
def _slot_tile(slots, v, begin, count, d):
    """The next slots of a tile of ground truths, whether they exist, and their v_j - c_ij."""
    lane = d + tl.arange(0, _SLOTS)[None, :]
    slot, exists = begin + lane, lane < count
    cost = tl.load(slots.cost + slot, mask=exists, other=float("inf"))
    finite = cost < float("inf")  # an image without any finite pair has no v
    column = tl.load(slots.column + slot, mask=finite, other=0)
    return slot, exists, tl.load(v + column, mask=finite, other=0.0) - cost.to(tl.float64)


@triton.jit
def _add_exponents(peak, total, t):
    """Add 2^t of float64 exponents t (rows, lanes) to running sums, kept as 2^peak total."""
    new_peak = tl.maximum(peak, tl.max(t, 1))
    added = tl.sum(tl.exp2((t - new_peak[:, None]).to(tl.float32)), 1)
    return new_peak, total * tl.exp2((peak - new_peak).to(tl.float32)) + added


@triton.jit
def _list_points(by_point, sorted_point, order, pair_gt, pair_cost, first, end):
    """Write the image's edges by point, and each point's first edge. Returns the number of points."""
    edge_gt, edge_cost, slot_column, begin, flat_point = by_point
    num_points = tl.zeros([], tl.int32)
    for base in range(first, end, _EDGES):
        e = base + tl.arange(0, _EDGES)
        exists = e < end
        point = tl.load(sorted_point + e, mask=exists, other=0)
        previous = tl.load(sorted_point + e - 1, mask=exists & (e > first), other=-1)
        slot = tl.load(order + e, mask=exists, other=0)
        head = exists & (point != previous)
        column = num_points + tl.cumsum(head.to(tl.int32), 0) - 1
        tl.store(edge_gt + e, tl.load(pair_gt + slot, mask=exists, other=0), mask=exists)
        tl.store(edge_cost + e, tl.load(pair_cost + slot, mask=exists, other=0.0), mask=exists)
        tl.store(slot_column + slot, column, mask=exists)
        tl.store(begin + column, e, mask=head)
        tl.store(flat_point + column, point, mask=head)
        num_points += tl.sum(head.to(tl.int32), 0)
    tl.store(begin + num_points, end)
    return num_points


@triton.jit
def _columns_in_log_domain(v, u, background, edges):
    """v_j = -log2 sum_i 2^(u_i - c_ij). Returns max_j v_j and log2 sum_j 2^v_j over the listed points."""
    peak = tl.full([_LOG_POINTS], _LOWEST, tl.float64)
    total = tl.zeros([_LOG_POINTS], tl.float32)
    for base in range(0, edges.num_points, _LOG_POINTS):
        c, exists, begin, end, most = _point_tile(edges, base, _LOG_POINTS)
        column_peak = tl.zeros([_LOG_POINTS], tl.float64) + background
        column_total = tl.full([_LOG_POINTS], 1.0, tl.float32)
        for d in range(0, most, _LANES):
            _, _, _, u_i, cost = _edge_tile(edges, u, edges.cost, float("inf"), begin, end, d)
            column_peak, column_total = _add_exponents(column_peak, column_total, u_i - cost.to(tl.float64))
        potential = -(column_peak + tl.log2(column_total).to(tl.float64))
        tl.store(v + c, potential, mask=exists)
        peak, total = _add_exponents(peak, total, tl.where(exists, potential, _LOWEST)[:, None])
    highest = tl.max(peak, 0)
    total = tl.sum(total * tl.exp2((peak - highest).to(tl.float32)), 0)
    return highest, highest + tl.log2(total).to(tl.float64)


@triton.jit
def _rows_in_log_domain(out, v, slots, PEAKS: tl.constexpr):
    """u_i = log2 s_i - log2 sum_j 2^(v_j - c_ij), or max_j (v_j - c_ij), a row's largest entry without its factor."""
    for base in range(slots.first_row, slots.end_row, _ROWS):
        g, exists, begin, count = _row_tile(slots, base)
        peak = tl.full([_ROWS], _LOWEST, tl.float64)
        total = tl.zeros([_ROWS], tl.float32)
        for d in range(0, slots.most, _SLOTS):
            _, _, t = _slot_tile(slots, v, begin, count, d)
            peak, total = _add_exponents(peak, total, t)
        if PEAKS:
            tl.store(out + g, peak, mask=exists)
        else:
            k = tl.load(slots.supply + g, mask=exists, other=0)
            potential = tl.log2(k.to(tl.float32)).to(tl.float64) - peak - tl.log2(total).to(tl.float64)
            tl.store(out + g, potential, mask=k > 0)


@triton.jit
def _plan_by_point(point_plan, point_factor, u, background, v, edges):
    """Write the plan by point, background's entries apart, and factors of one."""
    for base in range(0, edges.num_points, _POINTS):
        c, exists, begin, end, most = _point_tile(edges, base, _POINTS)
        potential = tl.load(v + c, mask=exists, other=0.0)
        tl.store(point_plan + c, tl.exp2((background + potential).to(tl.float32)), mask=exists)
        tl.store(point_factor + c, tl.full([_POINTS], 1.0, tl.float32), mask=exists)
        for d in range(0, most, _LANES):
            e, on, _, u_i, cost = _edge_tile(edges, u, edges.cost, float("inf"), begin, end, d)
            plan = tl.exp2((u_i + potential[:, None] - cost.to(tl.float64)).to(tl.float32))
            tl.store(edges.plan + e, plan, mask=on)


@triton.jit
def _plan_by_row(row_factor, u, v, slots):
    """Write the plan by ground truth, and factors of one."""
    for base in range(slots.first_row, slots.end_row, _ROWS):
        g, exists, begin, count = _row_tile(slots, base)
        potential = tl.load(u + g, mask=exists, other=0.0)[:, None]
        tl.store(row_factor + g, tl.full([_ROWS], 1.0, tl.float32), mask=exists)
        for d in range(0, slots.most, _SLOTS):
            slot, on, t = _slot_tile(slots, v, begin, count, d)
            tl.store(slots.plan + slot, tl.exp2((potential + t).to(tl.float32)), mask=on)


@triton.jit
def _columns(point_factor, row_factor, background_factor, point_plan, edges):
    """b_j = 1 / sum_i P_ij a_i. Returns what background then sends to the listed points, before its own factor."""
    sent = tl.zeros([_POINTS], tl.float32)
    for base in range(0, edges.num_points, _POINTS):
        c, exists, begin, end, most = _point_tile(edges, base, _POINTS)
        background = tl.load(point_plan + c, mask=exists, other=0.0)
        received = tl.where(exists, background * background_factor, 1.0)
        for d in range(0, most, _LANES):
            _, _, _, factor, plan = _edge_tile(edges, row_factor, edges.plan, 0.0, begin, end, d)
            received += tl.sum(plan * factor, 1)
        tl.store(point_factor + c, 1.0 / received, mask=exists)
        sent += background / received
    return tl.sum(sent, 0)


@triton.jit
def _rows(row_factor, point_factor, slots):
    """a_i = s_i / sum_j P_ij b_j."""
    for base in range(slots.first_row, slots.end_row, _ROWS):
        g, exists, begin, count = _row_tile(slots, base)
        k = tl.load(slots.supply + g, mask=exists, other=0)
        sent = tl.zeros([_ROWS], tl.float32)
        for d in range(0, slots.most, _SLOTS):
            lane = d + tl.arange(0, _SLOTS)[None, :]
            plan = tl.load(slots.plan + begin + lane, mask=lane < count, other=0.0)
            column = tl.load(slots.column + begin + lane, mask=plan > 0.0, other=0)
            sent += tl.sum(plan * tl.load(point_factor + column, mask=plan > 0.0, other=0.0), 1)
        tl.store(row_factor + g, k.to(tl.float32) / sent, mask=k > 0)


@triton.jit
def _absorb(potential, factor, first, end, BLOCK: tl.constexpr):
    """Move factors into potentials. Returns the largest potential."""
    highest = tl.full([BLOCK], _LOWEST, tl.float64)
    for base in range(first, end, BLOCK):
        i = base + tl.arange(0, BLOCK)
        moved = tl.load(potential + i, mask=i < end, other=_LOWEST)
        moved += tl.log2(tl.load(factor + i, mask=i < end, other=1.0)).to(tl.float64)
        tl.store(potential + i, moved, mask=i < end)
        highest = tl.maximum(highest, moved)
    return tl.max(highest, 0)


@triton.jit
def _decode(gt_index, iou, boxes, gt_boxes, shift, sign, background_shift, flat_point, edges):
    """Give every point to the supplier with the largest 2^(v - c - sign shift); the lowest row wins a tie."""
    for base in range(0, edges.num_points, _POINTS):
        c, exists, begin, end, most = _point_tile(edges, base, _POINTS)
        least = tl.full([_POINTS], float("inf"), tl.float64)
        supplier = tl.zeros([_POINTS], tl.int32)
        for d in range(0, most, _LANES):
            _, _, gt, shift_i, cost = _edge_tile(edges, shift, edges.cost, float("inf"), begin, end, d)
            t = sign * shift_i + cost.to(tl.float64)
            tile_least = tl.min(t, 1)
            first_row = tl.min(tl.where(t == tile_least[:, None], gt, NO_POINT), 1)
            supplier = tl.where(tile_least < least, first_row, supplier)
            least = tl.minimum(tile_least, least)
        matched = exists & (least <= background_shift)
        point, row = tl.load(flat_point + c, mask=matched, other=0).to(tl.int64), supplier.to(tl.int64)
        overlap, _, _ = pair_iou(*load_boxes(gt_boxes + row * 4, matched), *load_boxes(boxes + point * 4, matched))
        tl.store(gt_index + point, row, mask=matched)
        tl.store(iou + point, overlap, mask=matched)


@triton.jit(do_not_specialize=_VARYING)
def _sinkhorn_kernel(
    match, potentials, scratch, sorting, pairs, inputs, G, N, iterations, burst, burst_when_full, RESCALE: tl.constexpr
):
    gt_index, iou = match
    u, u_background, v, slot_column, first_of_image = potentials
    edge_gt, edge_cost, edge_plan, slot_plan, begin, flat_point, point_plan, point_factor, row_factor, peaks = scratch
    sorted_point, order, first_edge_of_image = sorting
    pair_gt, pair_cost, pair_start, pair_count, supply = pairs
    boxes, gt_boxes, gt_offsets = inputs
    image = tl.program_id(0).to(tl.int64)
    first_row = tl.maximum(tl.load(gt_offsets + image).to(tl.int32), 0)
    end_row = tl.minimum(tl.load(gt_offsets + image + 1).to(tl.int32), G)
    first_edge, end_edge = tl.load(first_edge_of_image + image), tl.load(first_edge_of_image + image + 1)
    first = tl.load(first_of_image + image)  # of the image's points, in the arrays that have an entry for each
    begin += first + image
    flat_point, v, point_plan, point_factor = flat_point + first, v + first, point_plan + first, point_factor + first

    by_point = edge_gt, edge_cost, slot_column, begin, flat_point
    num_points = _list_points(by_point, sorted_point, order, pair_gt, pair_cost, first_edge, end_edge)
    tl.debug_barrier()
    taken = tl.zeros([_ROWS], tl.int32)
    most = tl.zeros([_ROWS], tl.int32)
    for base in range(first_row, end_row, _ROWS):
        g = base + tl.arange(0, _ROWS)
        taken += tl.load(supply + g, mask=g < end_row, other=0)
        most = tl.maximum(most, tl.load(pair_count + g, mask=g < end_row, other=0))
        tl.store(u + g, tl.zeros([_ROWS], tl.float64), mask=g < end_row)
    most = tl.max(most, 0)
    edges = _Edges(edge_gt, edge_cost, edge_plan, begin, num_points)
    slots = _Slots(slot_column, pair_cost, slot_plan, pair_start, pair_count, supply, first_row, end_row, most)
    left = N - tl.sum(taken, 0)
    left_supply = tl.where(left > 0, left.to(tl.float32), _EMPTY)
    burst = tl.where(left > 0, burst, burst_when_full)
    rest = (N - num_points).to(tl.float32)
    background = tl.zeros([], tl.float64)  # potential of background
    v_rest = tl.zeros([], tl.float64)  # potential of the points that are no candidate
    tl.debug_barrier()

    # The first iteration, in the log domain.
    v_highest, listed = _columns_in_log_domain(v, u, background, edges)
    tl.debug_barrier()
    _rows_in_log_domain(u, v, slots, False)
    peak = tl.where(rest > 0, tl.maximum(listed, v_rest), listed)
    total = tl.exp2((listed - peak).to(tl.float32)) + rest * tl.exp2((v_rest - peak).to(tl.float32))
    background = tl.log2(left_supply).to(tl.float64) - peak - tl.log2(total).to(tl.float64)
    tl.debug_barrier()

    # The other iterations multiply; after every burst their factors move into the potentials.
    for done in range(1, tl.where(num_points > 0, iterations, 0), burst):
        _plan_by_point(point_plan, point_factor, u, background, v, edges)
        _plan_by_row(row_factor, u, v, slots)
        tl.debug_barrier()
        factor = tl.full([], 1.0, tl.float32)
        for _ in range(0, tl.minimum(burst, iterations - done)):
            v_rest = -(background + tl.log2(factor).to(tl.float64))
            sent = _columns(point_factor, row_factor, factor, point_plan, edges)
            factor = left_supply / (sent + rest / factor)
            tl.debug_barrier()
            _rows(row_factor, point_factor, slots)
            tl.debug_barrier()
        background += tl.log2(factor).to(tl.float64)
        _absorb(u, row_factor, first_row, end_row, _ROWS)
        v_highest = _absorb(v, point_factor, 0, num_points, _POINTS)
        tl.debug_barrier()
    tl.store(u_background + image, background)

    if RESCALE:
        _rows_in_log_domain(peaks, v, slots, True)
        tl.debug_barrier()
        background_shift = tl.where(rest > 0, tl.maximum(v_highest, v_rest), v_highest)
        _decode(gt_index, iou, boxes, gt_boxes, peaks, 1.0, background_shift, flat_point, edges)
    else:
        _decode(gt_index, iou, boxes, gt_boxes, u, -1.0, -background, flat_point, edges)


def _burst(growth: float) -> int:
    """Iterations that fit float32 when each changes a factor at most `growth` times: up to 2^126."""
    return min(10, int(120 / math.log2(max(growth, 2))))


def sinkhorn(pairs: Pairs, inputs: Inputs, config: OTAConfig) -> tuple[Assignment, Potentials]:
    """Transport plan of a batch and its assignment; inputs are contiguous."""
    (B, N, _), G, num_slots, device = inputs.boxes.shape, len(inputs.gt_boxes), len(pairs.point), inputs.boxes.device
    sorted_point, order = torch.sort(pairs.point, stable=True)
    image_start = torch.arange(0, B * N + 1, N, dtype=torch.int32, device=device)
    first_edge = torch.searchsorted(sorted_point, image_start, out_int32=True)
    # An image has at most as many candidate points as pairs, and at most N.
    num_points, first_point = min(num_slots, B * N), (first_edge if num_slots < B * N else image_start)[:-1]
    kinds = torch.int32, torch.float32, torch.float64
    int32, float32, float64 = (partial(torch.empty, dtype=kind, device=device) for kind in kinds)
    match = Assignment(torch.full((B, N), -1, device=device), float32(B, N).zero_(), pairs.k)
    # If gt_offsets fall, a slot may belong to no image or be read by another one: columns are zeroed, and entries of
    # points have room for the columns of another image, at most N.
    room = num_points + N
    potentials = Potentials(float64(G), float64(B), float64(room), int32(num_slots).zero_(), first_point)
    by_pair = int32(num_slots), float32(num_slots), float32(num_slots), float32(num_slots)
    by_point = int32(num_points + B), int32(num_points), float32(num_points), float32(room)
    scratch = *by_pair, *by_point, float32(G), float64(G)
    sorting, truth = (sorted_point, order, first_edge), (inputs.boxes, inputs.gt_boxes, inputs.gt_offsets)
    settings = G, N, config.iterations, _burst(N), _burst(N / EMPTY_SUPPLY), config.rescale
    _sinkhorn_kernel[(B,)](match[:2], potentials, scratch, sorting, pairs[1:], truth, *settings, **_OPTIONS)
    return match, potentials
