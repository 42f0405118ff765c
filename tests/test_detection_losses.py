"""The three losses of a batch, worked by hand, and the regions that are no negatives."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from kernels import Assignment, PointGrid
from model.head import Predictions
from model.losses import detection_losses, points_inside
from tests.support.detectors import random_batch, tiny_detector

NO_TRUTH = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)


def assignment_of(gt_index: list[list[int]], iou: list[list[float]]) -> Assignment:
    gt_index = torch.tensor(gt_index)
    return Assignment(gt_index, torch.tensor(iou), torch.bincount(gt_index[gt_index >= 0], minlength=1))


def test_losses_worked_by_hand(monkeypatch):
    """Two of three points are matched. The first box has IoU 1/3 with its ground truth, and fills their hull with it;
    the second does not meet its ground truth: IoU 0, union 32 and hull 48."""
    truth = torch.tensor([[0.0, 0, 8, 8], [0, 16, 4, 20]]), torch.tensor([1, 0])
    boxes = torch.tensor([[[4.0, 0, 12, 8], [8, 16, 12, 20], [0, 0, 1, 1]]])
    predictions = Predictions(torch.zeros(1, 3, 2), boxes, torch.tensor([[1.0, -2.0, 5.0]]))
    inputs = predictions, assignment_of([[0, 1, -1]], [[1 / 3, 0, 0]]), *truth
    losses = detection_losses(*inputs)
    log_2 = torch.tensor(2.0).log()
    focal = (0.25 * 2 + 0.75 * 4) * 0.25 * log_2  # two logits of the target's class and four others, all 0
    giou = (1 - 1 / 3) + (1 - 0 + (48 - 32) / 48)
    entropy = F.softplus(torch.tensor(1.0)) - 1 / 3 + F.softplus(torch.tensor(-2.0))
    torch.testing.assert_close(losses["cls"], focal / 2)
    torch.testing.assert_close(losses["box"], torch.tensor(2 * giou / 2))
    torch.testing.assert_close(losses["iou"], 0.5 * entropy / 2)

    # A point to ignore is no negative, but learns if it is matched.
    ignoring = detection_losses(*inputs, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(ignoring["cls"], (0.25 * 2 + 0.75 * 2) * 0.25 * log_2 / 2)

    # On two ranks, of which the other one has no match, the sums are divided by one positive a rank.
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda count: count.add_(0))
    of_two_ranks = detection_losses(*inputs)
    assert all(of_two_ranks[name] == 2 * losses[name] for name in losses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_losses_without_a_match_are_divided_by_one(dtype):
    """If all points are ignored, nothing is left."""
    predictions = Predictions(torch.zeros(1, 3, 2, dtype=dtype), torch.zeros(1, 3, 4), torch.ones(1, 3))
    inputs = predictions, assignment_of([[-1] * 3], [[0.0] * 3]), *NO_TRUTH
    losses = detection_losses(*inputs)
    torch.testing.assert_close(losses["cls"], 6 * 0.75 * 0.25 * torch.tensor(2.0).log())
    assert losses["box"] == losses["iou"] == 0
    assert detection_losses(*inputs, torch.ones(1, 3, dtype=torch.bool))["cls"] == 0


def test_points_inside_are_those_of_the_image_itself():
    grid = PointGrid((8,), ((2, 2),))  # points at 4 and 12 px
    boxes = torch.tensor([[0.0, 0, 8, 8], [0, 0, 16, 8], [4, 4, 12, 12], [0, 0, 16, 16]])
    inside = points_inside(grid.points(), boxes, torch.tensor([0, 0, 1, 3]), 4)
    top_row = [True, True, False, False]
    # The box of image 1 has the points on its corners only; image 2 has no box.
    assert inside.tolist() == [top_row, [False] * 4, [False] * 4, [True] * 4]


def test_regions_to_ignore_change_the_negatives_only():
    detector = tiny_detector(frozen_norm=True).train()  # the same statistics in every call
    images, targets = random_batch([(90, 130), (64, 100)])
    plain = detector(images, targets)[0]
    assert detector(images, [t | {"ignore": torch.zeros(0, 4)} for t in targets])[0] == plain
    whole = [targets[0] | {"ignore": torch.tensor([[0.0, 0, 130, 90], [5, 5, 6, 6]])}, targets[1]]
    ignoring = detector(images, whole)[0]
    assert ignoring["cls"] < plain["cls"]
    assert ignoring["box"] == plain["box"] and ignoring["iou"] == plain["iou"]
