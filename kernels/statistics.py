"""Numbers that describe an optimal transport assignment, for the log of a training run."""

import torch
from torch import Tensor

from .assign import check_inputs
from .assign_torch import solve
from .config import Assignment, Inputs, OTAConfig, Plan

AMBIGUOUS_SHARE = 0.9  # a point is ambiguous if no supplier sends more of what it receives (paper, section 4.2)


def units_received(plan: Plan) -> tuple[Tensor, Tensor]:
    """Units that every candidate point (A,) receives: in total, and from the supplier that sends most."""
    column = torch.searchsorted(plan.points, plan.flat_point)
    sent, sent_by_background = plan.log_plan.exp(), plan.log_plan_bg.exp()
    received = sent_by_background.scatter_add(0, column, sent)
    return received, sent_by_background.scatter_reduce(0, column, sent, "amax")


@torch.no_grad()
def assignment_statistics(inputs: Inputs, config: OTAConfig) -> tuple[Assignment, Tensor, dict[str, Tensor]]:
    """Assignment, ambiguous points (B, N) bool and float32 scalars, 0 if no ground truth takes part; waits for a GPU.

    positives_per_gt  points assigned to a ground truth, per ground truth that takes part
    mean_k            units that such a ground truth supplies
    one_point         share of these ground truths that supply one unit, the least there is
    ambiguous         share of the candidate points whose largest supplier sends less than 0.9 of what they receive
    residual          mean over these of |units received - 1|, the error of Sinkhorn's columns; its rows are exact
    """
    inputs = check_inputs(inputs)
    match, plan = solve(inputs.to("cpu") if inputs.boxes.device.type == "mps" else inputs, config)  # mps has no float64
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
    }
    return match, ambiguous, numbers
