"""Sinkhorn-Knopp over candidate pairs and its decoding, all T iterations in one Triton launch: one program per image.

Work. The plan is a sparse matrix, held twice: by ground truth, as its candidates were found ("slots"), and by point,
after one stable sort of all pairs by point ("edges"). Then each half of an iteration is a sum over consecutive
memory, with one gather of the other side's factors and no atomic. Background is one more entry of every point. The
points that are nobody's candidate have background as their one supplier: one column that counts `rest` times, a
scalar in registers. A program walks its image's points in tiles of _POINTS with _LANES edges of each side by side,
and its ground truths in tiles of _ROWS with _SLOTS; a barrier parts the two halves. Nothing is shared between images,
so an image with 5,000 ground truths delays nobody, and sums run in an order that the batch does not change.

Numbers. The first iteration is one in the log domain, with potentials u and v in float64. From then on every row of
the plan P = exp(u + v - c) sums to its supply, and an iteration multiplies: by point b = 1 / sum_i P_ij a_i, by ground
truth a = s / sum_j P_ij b_j, with P in float32, two multiplications per pair and no exponential. No column of P sums to
less than min(1, s) / N then, so an iteration changes a factor at most N / min(1, s) times, which says how many float32
bears (_burst) until the factors move into u and v and P is computed anew. Costs and potentials are in units of
eps / log2(e), so that exponentials are exp2.

Bytes and latency. Half an iteration reads 8 bytes a pair, plan and index, in order, and gathers 4. The fullest image of
the "coco" workload has 30 ground truths, 1,962 pairs and 1,716 candidate points: 60 KB with both orders of the plan,
which fits the L1 cache of one multiprocessor. So no bandwidth limits it but the chain: by point 3 steps of a tile, by
ground truth 4, each two dependent loads, a sum over lanes, changes of layout and a store, some 400 cycles; 2,800 an
iteration, 80 microseconds for T = 50 at 1.8 GHz. The "crowd" image of 400 ground truths has 17,305 pairs of 9,146
points, 20 steps and 21, 600 KB from L2: some 0.5 ms. These are estimates, and not measured; benchmarks/assign.py
prints the floor.

B images, N anchor points over all levels, G ground truths of a batch, A points of an image that are candidates.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import passes_triton as passes
from .candidates_triton import NO_POINT
from .config import EMPTY_SUPPLY, Assignment, OTAConfig
from .pairs_triton import Pairs, load_boxes, pair_iou

_EMPTY = tl.constexpr(EMPTY_SUPPLY)
_POINTS, _LANES = 1024, 4
_ROWS, _SLOTS = 64, 32
_EDGES = 2048
_WARPS = 16
# Numbers that change from batch to batch: no kernel is compiled anew because one of them is 1 or a multiple of 16.
_VARYING = ["G", "N", "iterations", "burst", "burst_when_full", "box_image"]


class Potentials(NamedTuple):
    """What Sinkhorn leaves behind, in units of eps / log2(e): log2 of a plan entry is u + v - cost."""

    u: Tensor  # (G,) float64
    u_background: Tensor  # (B,) float64
    v: Tensor  # (points,) float64, by position in the image's list of candidate points
    column: Tensor  # (slots,) int32, position of a slot's point in that list
    first: Tensor  # (B,) where an image's list begins


@triton.jit
def _decode(
    gt_index, iou, boxes, gt_boxes, box_point, box_side, gt_row, gt_side, shift, background_shift, edge_gt, edge_cost,
    point_begin, flat_point, first_point, num_points, POINTS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Give every listed point to the supplier with the largest 2^(v - c - shift); background has the last choice."""
    for base in range(0, num_points, POINTS):
        c, here, begin, end, most = passes.point_tile(point_begin, num_points, base, POINTS)
        least, supplier = passes.best_supplier(shift, edge_gt, edge_cost, begin, end, most, NO_POINT, LANES)
        matched = here & (least <= background_shift)
        point = tl.load(flat_point + c, mask=matched, other=0).to(tl.int64)
        x1, y1, x2, y2 = load_boxes(gt_boxes + supplier.to(tl.int64) * gt_row, gt_side, matched)
        bx1, by1, bx2, by2 = load_boxes(boxes + (point - first_point) * box_point, box_side, matched)
        overlap, _, _ = pair_iou(x1, y1, x2, y2, bx1, by1, bx2, by2)
        tl.store(gt_index + point, supplier.to(tl.int64), mask=matched)
        tl.store(iou + point, overlap, mask=matched)


@triton.jit(do_not_specialize=_VARYING)
def _sinkhorn_kernel(
    gt_index, iou, u, u_background, v, slot_column, shift,
    edge_gt, edge_cost, edge_plan, slot_plan, point_begin, flat_point, point_plan, point_factor, row_factor,
    sorted_point, order, first_edge_of_image, first_of_image, pair_gt, pair_cost, pair_start, pair_count, supply,
    gt_offsets, boxes, gt_boxes, offset_step, box_image, box_point, box_side, gt_row, gt_side,
    G, N, iterations, burst, burst_when_full,
    RESCALE: tl.constexpr, POINTS: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, SLOTS: tl.constexpr,
    EDGES: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    first_row = tl.maximum(tl.load(gt_offsets + image * offset_step).to(tl.int32), 0)
    end_row = tl.minimum(tl.load(gt_offsets + (image + 1) * offset_step).to(tl.int32), G)
    first_edge, end_edge = tl.load(first_edge_of_image + image), tl.load(first_edge_of_image + image + 1)
    first = tl.load(first_of_image + image)  # of its points in the arrays that have one entry for each
    point_begin += first + image
    flat_point += first
    v += first
    point_plan += first
    point_factor += first

    num_points = passes.list_points(
        edge_gt, edge_cost, slot_column, point_begin, flat_point, sorted_point, order, pair_gt, pair_cost,
        first_edge, end_edge, EDGES,
    )  # fmt: skip
    tl.debug_barrier()
    taken = tl.zeros([ROWS], tl.int32)
    most = tl.zeros([ROWS], tl.int32)
    for base in range(first_row, end_row, ROWS):
        g = base + tl.arange(0, ROWS)
        taken += tl.load(supply + g, mask=g < end_row, other=0)
        most = tl.maximum(most, tl.load(pair_count + g, mask=g < end_row, other=0))
    most_slots = tl.max(most, 0)
    left = N - tl.sum(taken, 0)
    left_supply = tl.where(left > 0, left.to(tl.float32), _EMPTY)
    burst = tl.where(left > 0, burst, burst_when_full)
    rest = (N - num_points).to(tl.float32)

    background = tl.zeros([], tl.float64)  # its potential
    v_rest = tl.zeros([], tl.float64)  # that of the points that are nobody's candidate
    for base in range(first_row, end_row, ROWS):
        g = base + tl.arange(0, ROWS)
        tl.store(u + g, tl.zeros([ROWS], tl.float64), mask=g < end_row)
    tl.debug_barrier()

    # The first iteration, in the log domain. Its float64 tiles of points are smaller, or their registers would spill.
    listed = passes.columns_in_log_domain(
        v, u, background, edge_gt, edge_cost, point_begin, num_points, POINTS // 2, LANES
    )
    tl.debug_barrier()
    passes.rows_in_log_domain(
        u, v, slot_column, pair_cost, pair_start, pair_count, supply, first_row, end_row, most_slots, ROWS, SLOTS
    )
    peak = tl.where(rest > 0, tl.maximum(listed, v_rest), listed)
    total = tl.exp2((listed - peak).to(tl.float32)) + rest * tl.exp2((v_rest - peak).to(tl.float32))
    background = tl.log2(left_supply).to(tl.float64) - peak - tl.log2(total).to(tl.float64)
    tl.debug_barrier()

    # The others multiply; after every burst of them their factors move into the potentials.
    for done in range(1, tl.where(num_points > 0, iterations, 0), burst):
        passes.plan_by_point(
            edge_plan, point_plan, point_factor, u, background, v, edge_gt, edge_cost, point_begin, num_points,
            POINTS, LANES,
        )  # fmt: skip
        passes.plan_by_row(
            slot_plan, row_factor, u, v, slot_column, pair_cost, pair_start, pair_count, first_row, end_row,
            most_slots, ROWS, SLOTS,
        )  # fmt: skip
        tl.debug_barrier()
        factor = tl.full([], 1.0, tl.float32)
        for _ in range(0, tl.minimum(burst, iterations - done)):
            v_rest = -(background + tl.log2(factor).to(tl.float64))
            sent = passes.columns(
                point_factor, row_factor, factor, edge_plan, point_plan, edge_gt, point_begin, num_points,
                POINTS, LANES,
            )  # fmt: skip
            factor = left_supply / (sent + rest / factor)
            tl.debug_barrier()
            passes.rows(
                row_factor, point_factor, slot_plan, slot_column, pair_start, pair_count, supply,
                first_row, end_row, most_slots, ROWS, SLOTS,
            )  # fmt: skip
            tl.debug_barrier()
        background += tl.log2(factor).to(tl.float64)
        passes.absorb(u, row_factor, first_row, end_row, ROWS)
        passes.absorb(v, point_factor, 0, num_points, POINTS)
        tl.debug_barrier()
    tl.store(u_background + image, background)

    if RESCALE:
        passes.row_peaks(
            shift, v, slot_column, pair_cost, pair_start, pair_count, first_row, end_row, most_slots, ROWS, SLOTS
        )
        background_shift = passes.largest(v, num_points, POINTS)
        background_shift = tl.where(rest > 0, tl.maximum(background_shift, v_rest), background_shift)
    else:
        for base in range(first_row, end_row, ROWS):
            g = base + tl.arange(0, ROWS)
            tl.store(shift + g, -tl.load(u + g, mask=g < end_row, other=0.0), mask=g < end_row)
        background_shift = -background
    tl.debug_barrier()
    _decode(
        gt_index, iou, boxes + image * box_image, gt_boxes, box_point, box_side, gt_row, gt_side, shift,
        background_shift, edge_gt, edge_cost, point_begin, flat_point, image * N, num_points, POINTS, LANES,
    )  # fmt: skip


def _burst(growth: float) -> int:
    """Iterations that float32 bears when each changes a factor at most `growth` times: up to 2^126."""
    return min(10, int(120 / math.log2(max(growth, 2))))


def sinkhorn(
    pairs: Pairs, boxes: Tensor, gt_boxes: Tensor, gt_offsets: Tensor, config: OTAConfig
) -> tuple[Assignment, Potentials]:
    """Transport plan of a batch and the assignment that it means; boxes (B, N, 4) are the predicted ones."""
    (B, N, _), G, num_slots, device = boxes.shape, gt_boxes.shape[0], pairs.point.numel(), boxes.device
    sorted_point, order = torch.sort(pairs.point, stable=True)
    first_edge = torch.searchsorted(
        sorted_point, torch.arange(0, B * N + 1, N, dtype=torch.int32, device=device), out_int32=True
    )

    # An image has at most as many candidate points as pairs, and at most N.
    num_points = min(num_slots, B * N)
    first_point = first_edge[:-1] if num_slots < B * N else torch.arange(0, B * N, N, dtype=torch.int32, device=device)

    def empty(size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    iou = torch.zeros(B, N, dtype=torch.float32, device=device)
    match = Assignment(torch.full((B, N), -1, device=device), iou, pairs.k)
    # Columns are zeroed: should gt_offsets fall, a slot may belong to no image, and its column must still be one.
    column = torch.zeros(num_slots, dtype=torch.int32, device=device)
    state = Potentials(
        empty(G, torch.float64), empty(B, torch.float64), empty(num_points, torch.float64), column, first_point
    )  # fmt: skip
    _sinkhorn_kernel[(B,)](
        match.gt_index, match.iou, state.u, state.u_background, state.v, column, empty(G, torch.float64),
        empty(num_slots, torch.int32), empty(num_slots), empty(num_slots), empty(num_slots),
        empty(num_points + B, torch.int32), empty(num_points, torch.int32), empty(num_points), empty(num_points),
        empty(G), sorted_point, order, first_edge, first_point, pairs.gt, pairs.cost, pairs.start, pairs.count, pairs.k,
        gt_offsets, boxes, gt_boxes, *gt_offsets.stride(), *boxes.stride(), *gt_boxes.stride(),
        G, N, config.iterations, _burst(N), _burst(N / EMPTY_SUPPLY),
        RESCALE=config.rescale, POINTS=_POINTS, LANES=_LANES, ROWS=_ROWS, SLOTS=_SLOTS, EDGES=_EDGES,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return match, state
