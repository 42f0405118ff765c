"""Optimal transport assignment in Triton: find_pairs, a library sort by point, sinkhorn.

Nothing waits for the device, no shape depends on data and no Python loop runs over images or ground truths. So a call
can be captured in a CUDA graph, once a first call has compiled the kernels.
"""

import math

import torch
from torch import Tensor

from .candidates_triton import NO_POINT
from .config import Assignment, OTAConfig, Plan
from .grid import PointGrid
from .pairs_triton import find_pairs
from .sinkhorn_triton import sinkhorn


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
    with torch.cuda.device_of(boxes):
        pairs = find_pairs(logits, boxes, gt_boxes, gt_labels, gt_offsets, grid, config, max_pairs)
        return sinkhorn(pairs, boxes, gt_boxes, gt_offsets, config)[0]


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
