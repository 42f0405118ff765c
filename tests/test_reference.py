"""The float64 reference, oracle of all backends, against torchvision, a linear program and arithmetic by hand."""

import pytest
import torch
from scipy.optimize import linprog
from torch.nn.functional import one_hot, smooth_l1_loss
from torchvision.ops import box_iou, generalized_box_iou, sigmoid_focal_loss

from kernels import OTAConfig
from kernels.assign_reference import decode, foreground_cost, sinkhorn, supplies
from tests.support.backends import GRID, C
from tests.support.scenes import make_scene

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")


def test_costs_are_those_of_torchvision():
    """-log IoU has a floor: boxes that do not meet cost 15.94, the logarithm of 2^-23."""
    scene = make_scene(GRID, (4,), C)
    logits, boxes, gt_boxes = (tensor.double() for tensor in (scene.logits[0], scene.boxes[0], scene.gt_boxes))
    strides = GRID.point_strides().double()
    focal, cross_entropy = (
        torch.stack([
            sigmoid_focal_loss(logits, one_hot(label, C).double().expand_as(logits), **gamma).sum(1)
            for label in scene.gt_labels
        ])
        for gamma in (dict(alpha=0.25, gamma=2), dict(alpha=-1, gamma=0))
    )  # fmt: skip
    log_iou = box_iou(gt_boxes, boxes).log()
    assert log_iou.isneginf().any()
    sides = [(boxes[:, i] - gt_boxes[:, None, i]) / strides for i in range(4)]
    expected = {
        "iou": -log_iou.clamp(min=-15.942385),
        "giou": 1 - generalized_box_iou(gt_boxes, boxes),
        "smooth_l1": sum(smooth_l1_loss(side, torch.zeros_like(side), reduction="none") for side in sides),
    }
    for cls_cost, cls in (("focal", focal), ("bce", cross_entropy)):
        for reg_cost, reg in expected.items():
            config = OTAConfig(cls_cost=cls_cost, reg_cost=reg_cost, alpha=1.5)
            cost = foreground_cost(logits, boxes, gt_boxes, scene.gt_labels, strides, config)
            torch.testing.assert_close(cost, cls + 1.5 * reg, rtol=1e-6, atol=1e-6)


def test_supplies_by_hand():
    """Floor of the sum of the best IoUs, at least 1, at most the number of candidates."""
    iou = torch.tensor([[0.9, 0.8, 0.4, 0.3, 0.9], [0.1, 0.1, 0.0, 0.0, 0.9], [0.9] * 5, [0.9] * 5])
    candidates = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]) > 0
    for config, expected in {
        OTAConfig(): [2, 1, 1, 0],  # sums 2.4, 0.2, 0.9 and none
        OTAConfig(top_q=2): [1, 1, 1, 0],  # 1.7
        OTAConfig(per_q=3): [1, 1, 1, 0],  # the 2 best of 4 candidates
        OTAConfig(per_q=2, top_q=3): [1, 1, 1, 0],
        OTAConfig(fixed_k=3): [3, 3, 1, 0],
    }.items():
        assert supplies(iou, candidates, config).tolist() == expected


def test_one_iteration_by_hand():
    """One ground truth that supplies 1, background that supplies 3, four points, eps = 1 and c = -log K with

        K = 2 1 1 1    columns sum to 5 5 10 10, so after v the shares are  4/10 2/10 1/10 1/10   sum 8/10
            3 4 9 9                                                         6/10 8/10 9/10 9/10   sum 32/10

    u multiplies the first row by 1 / (8/10) = 5/4 and the second by 3 / (32/10) = 15/16. Each point takes the larger
    entry of its column, and that is background everywhere (1/2 < 9/16): the ground truth is left with nothing.
    Rows divided by their maxima, 1/2 and 27/32, are 1 1/2 1/4 1/4 and 2/3 8/9 1 1: it keeps its best point.
    """
    cost = -torch.tensor([[2, 1, 1, 1], [3, 4, 9, 9]], dtype=torch.float64).log()
    supply = torch.tensor([1, 3], dtype=torch.float64)
    log_plan = sinkhorn(cost, supply, OTAConfig(eps=1.0, iterations=1))
    expected = [[1 / 2, 1 / 4, 1 / 8, 1 / 8], [9 / 16, 3 / 4, 27 / 32, 27 / 32]]
    torch.testing.assert_close(log_plan.exp(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert decode(log_plan, OTAConfig(rescale=False)).tolist() == [1, 1, 1, 1]
    assert decode(log_plan, OTAConfig(rescale=True)).tolist() == [0, 1, 1, 1]


def test_linear_program_is_a_lower_bound_that_falling_eps_approaches():
    """The rows of every plan sum to their supplies, and its columns, once it has converged, to 1."""
    cost = 3 * torch.rand(4, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    supply = torch.tensor([1, 2, 3, 8], dtype=torch.float64)
    equal = torch.cat([torch.eye(4).repeat_interleave(14, 1), torch.eye(14).repeat(1, 4)])
    demand = torch.ones(14, dtype=torch.float64)
    marginals = torch.cat([supply, demand])
    least = linprog(cost.flatten().numpy(), A_eq=equal.numpy(), b_eq=marginals.numpy(), method="highs").fun
    gaps = []
    for eps, iterations in ((1.0, 100), (0.3, 300), (0.03, 1000)):
        plan = sinkhorn(cost, supply, OTAConfig(eps=eps, iterations=iterations)).exp()
        torch.testing.assert_close(plan.sum(1), supply, rtol=1e-6, atol=0)
        gaps.append(float((plan * cost).sum()) - least)
        if eps > 0.1:
            torch.testing.assert_close(plan.sum(0), demand, rtol=1e-6, atol=0)
    assert gaps == sorted(gaps, reverse=True)
    assert -1e-6 < gaps[-1] < 0.01 * gaps[0]
