"""Optimal transport assignment in Triton: find_pairs, a library sort by point, sinkhorn. Registered as a torch op.

Nothing waits for the device, no shape depends on data and no Python loop runs over images or ground truths. So a call
can be captured in a CUDA graph, once a first call has compiled the kernels, and torch.compile keeps it in its graph.
"""

import math

import torch
from torch import Tensor

from .candidates_triton import NO_POINT
from .config import Assignment, OTAConfig, Plan
from .grid import PointGrid
from .pairs_triton import find_pairs
from .sinkhorn_triton import sinkhorn

SCHEMA = (  # spelled out, for what torch infers it from differs between versions
    "(Tensor logits, Tensor boxes, Tensor gt_boxes, Tensor gt_labels, Tensor gt_offsets, int[] strides, int[] rows, "
    "int[] columns, float alpha, float eps, int iterations, int top_q, int per_q, int? fixed_k, str center_prior, "
    "float radius, str cls_cost, str reg_cost, bool rescale, int? max_pairs) -> (Tensor, Tensor, Tensor)"
)


# The name says which copy of this folder it belongs to, for a process may hold two.
@torch.library.custom_op(f"ota_triton::assign_{__package__.replace('.', '_')}", mutates_args=(), schema=SCHEMA)
def _assign(
    logits: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_offsets: Tensor,
    strides: list[int], rows: list[int], columns: list[int], alpha: float, eps: float, iterations: int, top_q: int,
    per_q: int, fixed_k: int | None, center_prior: str, radius: float, cls_cost: str, reg_cost: str, rescale: bool,
    max_pairs: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grid = PointGrid(tuple(strides), tuple(zip(rows, columns, strict=True)))
    config = OTAConfig(
        alpha, eps, iterations, top_q, per_q, fixed_k, center_prior, radius, cls_cost, reg_cost, rescale
    )  # fmt: skip
    with torch.cuda.device_of(boxes):
        pairs = find_pairs(logits, boxes, gt_boxes, gt_labels, gt_offsets, grid, config, max_pairs)
        match, _ = sinkhorn(pairs, boxes, gt_boxes, gt_offsets, config)
    return tuple(match)


@_assign.register_fake
def _(logits: Tensor, boxes: Tensor, gt_boxes: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    points = boxes.shape[:2]
    return (
        boxes.new_empty(points, dtype=torch.int64),
        boxes.new_empty(points, dtype=torch.float32),
        boxes.new_empty(gt_boxes.shape[0], dtype=torch.int32),
    )


def ota_assign_triton(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    grid: PointGrid,
    config: OTAConfig,
    max_pairs: int | None = None,
) -> Assignment:
    """The contract of `ota_assign`, on a GPU, or on a CPU in Triton's interpreter."""
    match = _assign(
        logits, boxes, gt_boxes, gt_labels, gt_offsets,
        grid.strides, [rows for rows, _ in grid.sizes], [columns for _, columns in grid.sizes],
        config.alpha, config.eps, config.iterations, config.top_q, config.per_q, config.fixed_k, config.center_prior,
        config.radius, config.cls_cost, config.reg_cost, config.rescale, max_pairs,
    )  # fmt: skip
    return Assignment(*match)


def solve(
    logits: Tensor,
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    grid: PointGrid,
    config: OTAConfig,
) -> tuple[Assignment, Plan]:
    """The assignment, and the plan that it comes from, for those who want to look at it."""
    num_points = grid.num_points
    pairs = find_pairs(logits, boxes, gt_boxes, gt_labels, gt_offsets, grid, config, None)
    match, state = sinkhorn(pairs, boxes, gt_boxes, gt_offsets, config)
    slot = (pairs.point != NO_POINT.value).nonzero()[:, 0]
    gt, point, cost = pairs.gt[slot].long(), pairs.point[slot].long(), pairs.cost[slot].double()
    image, column = point // num_points, state.column[slot].long()
    v = state.v[state.first[image] + column]
    log_plan = (state.u[gt] + v - cost) * math.log(2)
    points, inverse = torch.unique(point, return_inverse=True)
    v_of_point = torch.empty_like(points, dtype=v.dtype).scatter_(0, inverse, v)
    log_plan_bg = (state.u_background[points // num_points] + v_of_point) * math.log(2)
    return match, Plan(gt, point, cost / pairs.scale, pairs.k.long(), log_plan, points, log_plan_bg)
