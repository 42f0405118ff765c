"""Numbers that describe an optimal transport assignment, for the log of a training run.

P candidate pairs, A candidate points; costs are relative to background's, as in assign_torch.py.
"""

import torch
from torch import Tensor

from .assign import check_inputs
from .assign_reference import classification_loss
from .assign_torch import solve
from .config import Assignment, Inputs, OTAConfig, Plan

AMBIGUOUS_SHARE = 0.9  # a point is ambiguous if no supplier sends more of what it receives (paper, section 4.2)
ROUNDING_PASSES = 11  # enough for crowds of 400 objects; nothing is missing yet in the first one
TINY = 1e-300  # in place of a divisor of 0


def units_received(plan: Plan) -> tuple[Tensor, Tensor]:
    """Units that every candidate point (A,) receives: in total, and from the supplier that sends most."""
    column = plan.column
    sent, sent_by_background = plan.log_plan.exp(), plan.log_plan_bg.exp()
    received = sent_by_background.scatter_add(0, column, sent)
    return received, sent_by_background.scatter_reduce(0, column, sent, "amax")


def background_cost(logits: Tensor, plan: Plan, config: OTAConfig) -> Tensor:
    """c_bg (A,) float64 of the candidate points."""
    logits = logits.flatten(0, 1)[plan.points].double().nan_to_num(0, 0, 0)  # other classes' logits may be not finite
    return classification_loss(logits, torch.zeros_like(logits), config.cls_cost)


def units_in_marginals(plan: Plan) -> Tensor:
    """Units (P,) float64 near the plan's: no point receives more than one, ground truth i sends k_i if there is room.

    As in Altschuler et al. (NeurIPS 2017, algorithm 2), overfull points are scaled down, and what is missing is sent to
    others: here only to candidates, in proportion to units and room. Several suppliers may overfill one: hence passes.
    """
    column, units = plan.column, plan.log_plan.exp()
    for _ in range(ROUNDING_PASSES):
        missing = plan.k - torch.bincount(plan.gt, units, len(plan.k))
        room = units * (1 - torch.bincount(column, units, len(plan.points))).clamp(min=0)[column]
        total = torch.bincount(plan.gt, room, len(plan.k)).clamp(min=TINY)
        units = units + room * (missing.clamp(min=0) / total)[plan.gt]
        units = units / torch.bincount(column, units, len(plan.points)).clamp(min=1)[column]
    return units


def dual_potentials(plan: Plan, eps: float) -> tuple[Tensor, Tensor]:
    """u (G,) and v (A,) float64, feasible for the dual: no plan costs less than sum_i k_i u_i + sum_j v_j.

    u is Sinkhorn's, shifted so that u_bg = 0; v_j = min_i (D_ij - u_i) over the suppliers i of point j and background.
    """
    column, cost = plan.column, plan.cost.double()
    u = cost + eps * (plan.log_plan - plan.log_plan_bg[column])  # the same for all pairs of i, except for rounding
    u = cost.new_zeros(len(plan.k)).scatter_reduce(0, plan.gt, u, "amax", include_self=False)
    return u, cost.new_zeros(len(plan.points)).scatter_reduce(0, column, cost - u[plan.gt], "amin")


def duality_gap(plan: Plan, cost_bg: Tensor, eps: float) -> Tensor:
    """(cost - bound) / cost of the plan once it meets its marginals, c_bg (A,) included: no plan saves a larger share.

    Where supplies do not fit the candidates, the bound is on plans that send as much as this one does. Scalar float64.
    """
    units, (u, v), cost = units_in_marginals(plan), dual_potentials(plan, eps), plan.cost.double()
    return (units @ (cost - u[plan.gt]) - v.sum()) / (units @ cost + cost_bg.sum()).clamp(min=TINY)


@torch.no_grad()
def assignment_statistics(inputs: Inputs, config: OTAConfig) -> tuple[Assignment, Tensor, dict[str, Tensor]]:
    """Assignment, ambiguous points (B, N) bool and float32 scalars, 0 if no ground truth takes part; waits for a GPU.

    positives_per_gt  points assigned to a ground truth, per ground truth that takes part
    mean_k            units that such a ground truth supplies
    one_point         share of these ground truths that supply one unit, the least there is
    ambiguous         share of the candidate points whose largest supplier sends less than 0.9 of what they receive
    residual          mean over these of |units received - 1|, the error of Sinkhorn's columns; its rows are exact
    gap               share of its cost that the plan could save at most, see duality_gap
    """
    inputs = check_inputs(inputs.to("cpu") if inputs.boxes.device.type == "mps" else inputs)  # mps has no float64
    match, plan = solve(inputs, config)
    received, largest = units_received(plan)
    ambiguous = torch.zeros_like(match.gt_index, dtype=torch.bool)
    ambiguous.view(-1)[plan.points[largest < AMBIGUOUS_SHARE * received]] = True
    num_gts, num_points = (plan.k > 0).sum().clamp(min=1).float(), max(1, len(received))
    numbers = {
        "positives_per_gt": (match.gt_index >= 0).sum() / num_gts,
        "mean_k": plan.k.sum() / num_gts,
        "one_point": (plan.k == 1).sum() / num_gts,
        "ambiguous": ambiguous.sum().float() / num_points,
        "residual": (received - 1).abs().sum().float() / num_points,
        "gap": duality_gap(plan, background_cost(inputs.logits, plan, config), config.eps).float(),
    }
    return match, ambiguous, numbers
