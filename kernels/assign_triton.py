"""Optimal transport assignment in Triton: find_pairs, a library sort by point, sinkhorn.

A call launches the copy of a table, six fills (two aranges among them), find_pairs, a stable sort, a searchsorted and
sinkhorn. Nothing waits for the device and no shape depends on data, so a CUDA graph can capture a call of compiled
kernels.
"""

import math

import torch

from .center_prior_triton import NO_POINT
from .config import Assignment, Inputs, OTAConfig, Plan
from .pairs_triton import Pairs, cost_scale, find_pairs
from .sinkhorn_triton import Potentials, sinkhorn


def _solve(inputs: Inputs, config: OTAConfig, max_pairs: int | None = None) -> tuple[Assignment, Pairs, Potentials]:
    inputs = Inputs(*(tensor.contiguous() for tensor in inputs[:5]), inputs.grid)
    with torch.cuda.device_of(inputs.boxes):
        pairs = find_pairs(inputs, config, max_pairs)
        match, potentials = sinkhorn(pairs, inputs, config)
    return match, pairs, potentials


def ota_assign_triton(inputs: Inputs, config: OTAConfig, max_pairs: int | None = None) -> Assignment:
    """The contract of `ota_assign`, on a GPU, or on a CPU in Triton's interpreter."""
    return _solve(inputs, config, max_pairs)[0]


def solve(inputs: Inputs, config: OTAConfig) -> tuple[Assignment, Plan]:
    """The assignment, and the plan that it comes from."""
    match, pairs, state = _solve(inputs, config)
    num_points, slot = inputs.grid.num_points, (pairs.point != NO_POINT.value).nonzero()[:, 0]
    gt, point, cost = pairs.gt[slot].long(), pairs.point[slot].long(), pairs.cost[slot].double()
    v = state.v[state.first[point // num_points] + state.column[slot].long()]
    log_plan = (state.u[gt] + v - cost) * math.log(2)
    points, inverse = torch.unique(point, return_inverse=True)
    v_of_point = torch.empty_like(points, dtype=v.dtype).scatter_(0, inverse, v)
    log_plan_bg = (state.u_background[points // num_points] + v_of_point) * math.log(2)
    return match, Plan(gt, point, cost / cost_scale(config), pairs.k.long(), log_plan, points, log_plan_bg)
