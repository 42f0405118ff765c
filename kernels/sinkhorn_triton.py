"""Sinkhorn-Knopp over candidate pairs and its decoding, all T iterations in one Triton launch: one program per image.

The plan is a sparse matrix, stored by ground truth, as find_pairs packed it ("slots"), and by point, after one stable
sort ("edges"). So each half of an iteration sums consecutive memory, in an order that the batch does not change, and
gathers the other side's factors. Background is one more entry of every point. The points that are no candidate have
background as their only supplier: one column that counts `rest` times.

Four warps share an image. Points take a tile of 512, four to a thread: a sum over a point's edges stays in its thread.
Ground truths take a tile of 32, eight threads to each: a sum over a row's slots is three shuffles. So an iteration has
two barriers, and two more for the sum of what background sends. Counted in PTX for sm_90: 170,000 warp instructions and
193 barriers a program on average for four images with 14 objects each of 800 x 1344 px; 2.4 and 2.6 million for 400
crowded and 1,500 small objects. In the log domain throughout they would be 269,000, 3.6 and 4.0 million.

The first iteration is in the log domain, with potentials u and v in float64. After it every row of the plan
P = exp(u + v - c) sums to its supply s, and an iteration multiplies in float32: b = 1 / sum_i P_ij a_i by point, then
a = s / sum_j P_ij b_j by ground truth. If the columns of P sum to between 1/r and r, so they do in all that follow (the
new sums are weighted means of the old), and an iteration changes a factor at most r times. That gives the iterations in
which factors stay within 2^48, where entries that float32 lost are under 2^-30; then the factors move into u and v, and
P is computed anew. Costs and potentials are in units of eps / log2(e), so that exponentials are exp2.
"""

from collections import namedtuple
from functools import partial

import torch
import triton
import triton.language as tl

from .center_prior_triton import load_boxes
from .config import EMPTY_SUPPLY, Assignment, Inputs, OTAConfig
from .edges_triton import POINTS, Edges, edge_step, list_points, point_tile
from .pairs_triton import Pairs, pair_iou, register_limit

_EMPTY = tl.constexpr(EMPTY_SUPPLY)
_LOWEST = tl.constexpr(-1e300)
_ROWS, _SLOTS = tl.constexpr(32), tl.constexpr(8)  # a tile of ground truths, and the neighbouring threads of each
_AT_ONCE = tl.constexpr(2)  # slots of a thread that are loaded together
_BLOCK = tl.constexpr(128)
_OPTIONS = dict(num_warps=4, enable_fp_fusion=False)
_VARYING = ["G", "N", "iterations"]  # see pairs_triton.py

# The solution in units of eps / log2(e), float64: log2 of a plan entry is u + v - cost. u (G,), u_background (B,);
# v[first[b] + i] is that of the i-th candidate point of image b, and column (slots,) has the i of a slot's point.
Potentials = namedtuple("Potentials", "u u_background v column first")
# Pairs of one image by ground truth: pointers to every slot's point, cost and plan entry, to every row's first slot,
# number of slots and supply, and to the most slots of a row in every tile.
_Slots = namedtuple("_Slots", "column cost plan start count supply most first_row end_row")


@triton.jit
def _row_tile(slots, base):
    """A tile of ground truths, _SLOTS threads for each: the threads' rows, whether they exist, every thread's first
    slot, the row's last slot, whether the thread writes for its row, and the most slots of a row of the tile."""
    thread = tl.arange(0, _ROWS * _SLOTS)
    g = base + thread // _SLOTS
    exists = g < slots.end_row
    slot = tl.load(slots.start + g, mask=exists, other=0).to(tl.int32)
    end = slot + tl.load(slots.count + g, mask=exists, other=0)
    lane = thread % _SLOTS
    return g, exists, slot + lane, end, lane == 0, tl.load(slots.most + base)


@triton.jit
def _exponents(slots, v, slot, exists):
    """v_j - c_ij of slots, -inf where there is none."""
    cost = tl.load(slots.cost + slot, mask=exists, other=float("inf"))
    usable = cost < float("inf")
    column = tl.load(slots.column + slot, mask=usable, other=0)
    return tl.load(v + column, mask=usable, other=0.0) - cost.to(tl.float64)


@triton.jit
def _by_row(value):
    return tl.reshape(value, [_ROWS, _SLOTS])


@triton.jit
def _to_threads(value):
    """Give the value of a row to its threads."""
    return tl.reshape(tl.broadcast_to(value[:, None], [_ROWS, _SLOTS]), [_ROWS * _SLOTS])


@triton.jit
def _add_exponent(peak, total, t):
    """Add 2^t to a running sum, kept as 2^peak total; peak and t are float64."""
    new_peak = tl.maximum(peak, t)
    added = tl.exp2((t - new_peak).to(tl.float32))
    return new_peak, total * tl.exp2((peak - new_peak).to(tl.float32)) + added


@triton.jit
def _log2_of_sum(peak, total):
    """The largest peak, and log2 of the sum of 2^peak total, over the last axis."""
    highest = tl.max(peak, -1)
    total = tl.sum(total * tl.exp2((peak - tl.expand_dims(highest, -1)).to(tl.float32)), -1)
    return highest, highest + tl.log2(total).to(tl.float64)


@triton.jit
def _first_columns(v, edges):
    """v_j = -log2 sum_i 2^(u_i - c_ij), all u_i being 0. Returns max_j v_j and log2 sum_j 2^v_j over listed points."""
    peak = tl.full([POINTS], _LOWEST, tl.float64)
    total = tl.zeros([POINTS], tl.float32)
    for base in range(0, edges.num_points, POINTS):
        c, exists, step, end_step = point_tile(edges, base)
        column_peak = tl.zeros([POINTS], tl.float64)
        column_total = tl.full([POINTS], 1.0, tl.float32)
        for s in range(step, end_step):
            e, there = edge_step(edges, s)
            cost = tl.load(edges.cost + e, mask=there, other=float("inf"))
            column_peak, column_total = _add_exponent(column_peak, column_total, -cost.to(tl.float64))
        potential = -(column_peak + tl.log2(column_total).to(tl.float64))
        tl.store(v + c, potential, mask=exists)
        peak, total = _add_exponent(peak, total, tl.where(exists, potential, _LOWEST))
    return _log2_of_sum(peak, total)


@triton.jit
def _rows_in_log_domain(out, v, slots, PEAKS: tl.constexpr):
    """u_i = log2 s_i - log2 sum_j 2^(v_j - c_ij), or max_j (v_j - c_ij), a row's largest entry without its factor."""
    for base in range(slots.first_row, slots.end_row, _ROWS):
        g, exists, slot, end, writes, most = _row_tile(slots, base)
        peak = tl.full([_ROWS * _SLOTS], _LOWEST, tl.float64)
        total = tl.zeros([_ROWS * _SLOTS], tl.float32)
        for d in range(0, most, _SLOTS):
            peak, total = _add_exponent(peak, total, _exponents(slots, v, slot + d, slot + d < end))
        k = tl.load(slots.supply + g, mask=exists, other=0)
        highest, log_sum = _log2_of_sum(_by_row(peak), _by_row(total))
        potential = tl.log2(k.to(tl.float32)).to(tl.float64) - _to_threads(log_sum)
        tl.store(out + g, _to_threads(highest) if PEAKS else potential, mask=writes & exists & (PEAKS | (k > 0)))


@triton.jit
def _plan_by_point(point_plan, point_factor, u, background, v, edges):
    """Write the plan by point, background's entries apart, and factors of one. Returns log2 r, the columns of the plan
    summing to between 1/r and r."""
    growth = tl.full([POINTS], 1.0, tl.float32)
    for base in range(0, edges.num_points, POINTS):
        c, exists, step, end_step = point_tile(edges, base)
        potential = tl.load(v + c, mask=exists, other=0.0)
        received = tl.exp2((background + potential).to(tl.float32))
        tl.store(point_plan + c, received, mask=exists)
        tl.store(point_factor + c, tl.full([POINTS], 1.0, tl.float32), mask=exists)
        for s in range(step, end_step):
            e, there = edge_step(edges, s)
            u_i = tl.load(u + tl.load(edges.gt + e, mask=there, other=0), mask=there, other=0.0)
            cost = tl.load(edges.cost + e, mask=there, other=float("inf"))
            plan = tl.exp2((u_i + potential - cost.to(tl.float64)).to(tl.float32))
            tl.store(edges.plan + e, plan, mask=there)
            received += plan
        growth = tl.maximum(growth, tl.where(exists, tl.maximum(received, 1.0 / received), 1.0))
    return tl.log2(tl.max(growth, 0))


@triton.jit
def _plan_by_row(row_factor, u, v, slots):
    """Write the plan by ground truth, and factors of one."""
    for base in range(slots.first_row, slots.end_row, _ROWS):
        g, exists, slot, end, writes, most = _row_tile(slots, base)
        potential = tl.load(u + g, mask=exists, other=0.0)
        tl.store(row_factor + g, tl.full([_ROWS * _SLOTS], 1.0, tl.float32), mask=exists & writes)
        for d in range(0, most, _SLOTS):
            t = potential + _exponents(slots, v, slot + d, slot + d < end)
            tl.store(slots.plan + slot + d, tl.exp2(t.to(tl.float32)), mask=slot + d < end)


@triton.jit
def _columns(point_factor, row_factor, background_factor, point_plan, edges, own_row):
    """b_j = 1 / sum_i P_ij a_i. Returns what background then sends to the listed points, before its own factor. Threads
    without an edge read the factor of `own_row`: a row of another image may not have been written."""
    sent = tl.zeros([POINTS], tl.float32)
    for base in range(0, edges.num_points, POINTS):
        c, exists, step, end_step = point_tile(edges, base)
        background = tl.load(point_plan + c, mask=exists, other=0.0)
        received = tl.where(exists, background * background_factor, 1.0)
        for s in range(step, end_step):
            e, there = edge_step(edges, s)
            gt = tl.load(edges.gt + e, mask=there, other=own_row)
            received = tl.fma(tl.load(row_factor + gt), tl.load(edges.plan + e, mask=there, other=0.0), received)
        factor = 1.0 / received
        tl.store(point_factor + c, factor, mask=exists)
        sent += background * factor
    return tl.sum(sent, 0)


@triton.jit
def _rows(row_factor, point_factor, slots):
    """a_i = s_i / sum_j P_ij b_j."""
    for base in range(slots.first_row, slots.end_row, _ROWS):
        g, exists, slot, end, writes, most = _row_tile(slots, base)
        k = tl.load(slots.supply + g, mask=exists, other=0)
        sent = tl.zeros([_AT_ONCE, _ROWS * _SLOTS], tl.float32)
        several = slot[None, :] + _SLOTS * tl.arange(0, _AT_ONCE)[:, None]
        for _ in range(0, most, _AT_ONCE * _SLOTS):
            there = several < end[None, :]
            column = tl.load(slots.column + several, mask=there, other=0)
            plan = tl.load(slots.plan + several, mask=there, other=0.0)
            sent = tl.fma(plan, tl.load(point_factor + column), sent)
            several += _AT_ONCE * _SLOTS
        factor = k.to(tl.float32) / _to_threads(tl.sum(_by_row(tl.sum(sent, 0)), 1))
        tl.store(row_factor + g, factor, mask=writes & (k > 0))


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
    for base in range(0, edges.num_points, POINTS):
        c, exists, step, end_step = point_tile(edges, base)
        least = tl.full([POINTS], float("inf"), tl.float64)
        supplier = tl.zeros([POINTS], tl.int32)
        for s in range(step, end_step):  # the edges of a point are in the order of their rows
            e, there = edge_step(edges, s)
            gt = tl.load(edges.gt + e, mask=there, other=0)
            cost = tl.load(edges.cost + e, mask=there, other=float("inf"))
            t = sign * tl.load(shift + gt, mask=there, other=0.0) + cost.to(tl.float64)
            supplier = tl.where(t < least, gt, supplier)
            least = tl.minimum(t, least)
        matched = exists & (least <= background_shift)
        point, row = tl.load(flat_point + c, mask=matched, other=0).to(tl.int64), supplier.to(tl.int64)
        overlap, _, _ = pair_iou(*load_boxes(gt_boxes + row * 4, matched), *load_boxes(boxes + point * 4, matched))
        tl.store(gt_index + point, row, mask=matched)
        tl.store(iou + point, overlap, mask=matched)


@triton.jit(do_not_specialize=_VARYING)
def _sinkhorn_kernel(match, potentials, scratch, sorting, pairs, inputs, G, N, iterations, RESCALE: tl.constexpr):
    gt_index, iou = match
    u, u_background, v, slot_column, first_of_image = potentials
    edge_gt, edge_cost, edge_plan, step_edge, tile_step, begin, ordered = scratch[:7]
    slot_plan, flat_point, point_plan, point_factor, row_factor, peaks, most_slots = scratch[7:]
    sorted_point, order, first_edge_of_image = sorting
    pair_gt, pair_cost, pair_start, pair_count, supply = pairs
    boxes, gt_boxes, gt_offsets = inputs
    image = tl.program_id(0).to(tl.int64)
    first_row = tl.maximum(tl.load(gt_offsets + image).to(tl.int32), 0)
    end_row = tl.minimum(tl.load(gt_offsets + image + 1).to(tl.int32), G)
    first_edge, end_edge = tl.load(first_edge_of_image + image), tl.load(first_edge_of_image + image + 1)
    first = tl.load(first_of_image + image)  # of the image's points, in the arrays that have an entry for each
    place = 2 * first_edge.to(tl.int64)  # of the image's edges, with those that fill steps
    edge_gt, edge_cost, edge_plan = edge_gt + place, edge_cost + place, edge_plan + place
    step_edge, tile_step = step_edge + first_edge + image, tile_step + first // POINTS + 2 * image
    begin, ordered = begin + first + image, ordered + first
    flat_point, v, point_plan, point_factor = flat_point + first, v + first, point_plan + first, point_factor + first

    by_point = edge_gt, edge_cost, step_edge, tile_step, begin, ordered, slot_column, flat_point
    num_points = list_points(by_point, sorted_point, order, pair_gt, pair_cost, first_edge, end_edge)
    taken = tl.zeros([_ROWS], tl.int32)
    for base in range(first_row, end_row, _ROWS):
        g = base + tl.arange(0, _ROWS)
        taken += tl.load(supply + g, mask=g < end_row, other=0)
        tl.store(u + g, tl.zeros([_ROWS], tl.float64), mask=g < end_row)
        tl.store(most_slots + base, tl.max(tl.load(pair_count + g, mask=g < end_row, other=0), 0))
    edges = Edges(edge_gt, edge_cost, edge_plan, step_edge, tile_step, num_points)
    slots = _Slots(slot_column, pair_cost, slot_plan, pair_start, pair_count, supply, most_slots, first_row, end_row)
    left = N - tl.sum(taken, 0)
    left_supply = tl.where(left > 0, left.to(tl.float32), _EMPTY)
    rest = (N - num_points).to(tl.float32)
    v_rest = tl.zeros([], tl.float64)  # potential of the points that are no candidate
    tl.debug_barrier()

    # The first iteration, in the log domain.
    v_highest, log_sum = _first_columns(v, edges)
    tl.debug_barrier()
    _rows_in_log_domain(u, v, slots, False)
    peak = tl.where(rest > 0, tl.maximum(log_sum, v_rest), log_sum)
    total = tl.exp2((log_sum - peak).to(tl.float32)) + rest * tl.exp2((v_rest - peak).to(tl.float32))
    background = tl.log2(left_supply).to(tl.float64) - peak - tl.log2(total).to(tl.float64)  # its potential
    tl.debug_barrier()

    own_row = tl.minimum(first_row, G - 1)  # if gt_offsets fall, there may be no first one
    # The other iterations multiply; before factors can grow too far, they move into the potentials.
    done = tl.where(num_points > 0, 1, iterations)
    while done < iterations:
        growth = _plan_by_point(point_plan, point_factor, u, background, v, edges)
        growth = tl.maximum(growth, tl.where(rest > 0, tl.abs(background + v_rest), 0.0).to(tl.float32))
        burst = tl.maximum(48.0 / tl.maximum(growth, 1.0), 1.0).to(tl.int32)
        _plan_by_row(row_factor, u, v, slots)
        tl.debug_barrier()
        factor = tl.full([], 1.0, tl.float32)
        before = factor
        for _ in range(0, tl.minimum(burst, iterations - done)):
            before = factor
            sent = _columns(point_factor, row_factor, factor, point_plan, edges, own_row)
            factor = left_supply / (sent + rest / factor)
            tl.debug_barrier()
            _rows(row_factor, point_factor, slots)
            tl.debug_barrier()
        v_rest = -(background + tl.log2(before).to(tl.float64))
        background += tl.log2(factor).to(tl.float64)
        _absorb(u, row_factor, first_row, end_row, _BLOCK)
        v_highest = _absorb(v, point_factor, 0, num_points, _BLOCK)
        tl.debug_barrier()
        done += burst
    tl.store(u_background + image, background)

    if RESCALE:
        _rows_in_log_domain(peaks, v, slots, True)
        tl.debug_barrier()
        background_shift = tl.where(rest > 0, tl.maximum(v_highest, v_rest), v_highest)
        _decode(gt_index, iou, boxes, gt_boxes, peaks, 1.0, background_shift, flat_point, edges)
    else:
        _decode(gt_index, iou, boxes, gt_boxes, u, -1.0, -background, flat_point, edges)


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
    by_edge = int32(2 * num_slots), float32(2 * num_slots), float32(2 * num_slots), int32(num_slots + B)
    lists = int32(num_points // POINTS.value + 2 * B), int32(num_points + B), int32(num_points)
    by_point = int32(num_points), float32(num_points), float32(room)
    scratch = *by_edge, *lists, float32(num_slots), *by_point, float32(G), float64(G), int32(G)
    sorting, truth = (sorted_point, order, first_edge), (inputs.boxes, inputs.gt_boxes, inputs.gt_offsets)
    settings = G, N, config.iterations, config.rescale
    options = _OPTIONS | register_limit()
    _sinkhorn_kernel[(B,)](match[:2], potentials, scratch, sorting, pairs[1:], truth, *settings, **options)
    return match, potentials
