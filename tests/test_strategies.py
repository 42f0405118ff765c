"""The rule of every strategy other than OTA, on examples worked out by hand; what all share is in test_contract.py."""

import itertools
from itertools import product

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from kernels import Assignment, OTAConfig, PointGrid
from model.assigners import assign, assign_with_statistics
from model.assigners.claims import NEITHER, Claims, ImageInputs, assign_claims
from model.assigners.hungarian import hungarian_claims
from tests.support.backends import GRID, C, assert_equal, scene_of
from tests.support.scenes import Scene, make_scene

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
A, B = (36, 20, 100, 84), (44, 20, 108, 84)  # 64 px, as anchors of stride 8; centres (68, 52) and (76, 52) are points


def matched(match: Assignment, row: int, grid: PointGrid = GRID) -> set[tuple[int, int, int]]:
    """x, y and stride of the points with this gt_index."""
    found = match.gt_index[0] == row
    strides = grid.point_strides()[found].int().tolist()
    return {(int(x), int(y), stride) for (x, y), stride in zip(grid.points()[found].tolist(), strides, strict=True)}


def around(x: int, y: int, reach: int) -> set[tuple[int, int, int]]:
    """Points of stride 8 whose steps along x and y add up to at most `reach` px."""
    steps = range(-reach, reach + 1, 8)
    return {(x + dx, y + dy, 8) for dx, dy in product(steps, steps) if abs(dx) + abs(dy) <= reach}


def predicted(gt_boxes: list, gt_labels: list[int], boxes: list, logits: list, grid: PointGrid) -> Scene:
    """One image with predictions, too, given by hand."""
    boxes, logits = torch.tensor([boxes], dtype=torch.float32), torch.tensor([logits], dtype=torch.float32)
    truth = torch.tensor(gt_boxes, dtype=torch.float32), torch.tensor(gt_labels)
    return Scene(logits, boxes, *truth, torch.tensor([0, len(gt_boxes)]), grid)


def test_fcos_by_hand():
    """Points within 1.5 strides of the centre: 12 px (36 and 44 around 40, not 28 and 52), 24 px, 48 px.

    Sides at most 44 px away are of the first level, up to 64 px; 72 to 88 px of the second, 64 to 128 px; over 168 px
    of the last. A point goes to the smallest box: 28, 36 and 44 are within 12 px of 36, among them all of the first.
    """
    for box, columns, rows, stride in (
        ((8, 8, 72, 72), (36, 44), (36, 44), 8),
        ((0, 0, 136, 104), (56, 72, 88), (40, 56, 72), 16),
        ((-100, -100, 236, 204), (48, 80, 112), (16, 48, 80), 32),
    ):
        match = assign("fcos", scene_of([box]), OTAConfig())
        assert matched(match, 0) == set(product(columns, rows, [stride]))
    match = assign("fcos", scene_of([(8, 8, 72, 72), (16, 16, 56, 56)]), OTAConfig())
    assert matched(match, 1) == set(product((28, 36, 44), (28, 36, 44), [8])) and not matched(match, 0)


def test_retinanet_by_hand():
    """An anchor of 64 px moved by a and b px has the IoU o / (2 64^2 - o) with a box of 64 px, o = (64 - a)(64 - b).

    That is 0.6 for 16 and 0, 0.62 for 8 and 8: positive. 0.488 for 16 and 8, 0.4545 for 24 and 0: neither. 0.391 for 16
    and 16, 0.376 for 24 and 8: negative. No anchor has 0.5 with a box of 20 px: those with the best IoU are positive.
    """
    match = assign("retinanet", scene_of([A]), OTAConfig())
    assert matched(match, 0) == around(68, 52, 16)
    assert matched(match, NEITHER) == around(68, 52, 24) - around(68, 52, 16)
    small = assign("retinanet", scene_of([(40, 40, 60, 60)]), OTAConfig())
    assert matched(small, 0) == set(product((44, 52), (44, 52), [8])) and not matched(small, NEITHER)


def test_atss_by_hand():
    """Of the 9 closest anchors on each level, IoUs are 1, 4 x 0.778, 4 x 0.620; 9 x 1/4; 9 x 1/16.

    Mean 0.348 + standard deviation 0.296 = 0.644: the centre and its four neighbours. Of two boxes 8 px apart each
    claims the other's centre, which goes to the higher IoU.
    """
    assert matched(assign("atss", scene_of([A]), OTAConfig()), 0) == around(68, 52, 8)
    match = assign("atss", scene_of([A, B]), OTAConfig())
    assert matched(match, 0) == around(68, 52, 8) - {(76, 52, 8)}
    assert matched(match, 1) == around(76, 52, 8) - {(68, 52, 8)}
    assert match.k.tolist() == [5, 5]


def test_simota_by_hand():
    """IoUs 0.95 + 0.8 + 0.7 + 0.2 make k = 2 for both objects, which have the same box and other classes.

    Costs, cross entropy - 3 log IoU: 1.94 2.06 1.79 6.21 for class 0, 1.44 2.06 5.79 6.21 for class 1. So the first
    object claims points 0 and 2, the second one 0 and 1, and point 0 goes to the second, for which it is cheaper.
    """
    box, grid = (0, 0, 16, 16), PointGrid((8,), ((2, 2),))
    boxes = [(0, 0, 16, 16 * iou) for iou in (0.95, 0.8, 0.7, 0.2)]
    logits = [(0.5, 1), (0, 0), (4, 0), (0, 0)]
    match = assign("simota", predicted([box, box], [0, 1], boxes, logits, grid), OTAConfig())
    assert match.gt_index.tolist() == [[1, 1, 0, -1]] and match.k.tolist() == [2, 2]


def test_simota_prefers_points_in_the_box_and_near_its_centre():
    """Of 4, 12, 20 and 28 px all are within 2.5 strides of the centre at 12, but 28 lies outside the box.

    It is a candidate, the cheapest by far but for being outside: claimed if k is 4 (4 IoUs of 1), not if k is 3 (3.25).
    """
    for iou, k, expected in ((1, 4, [0, 0, 0, 0]), (0.75, 3, [0, 0, 0, -1])):
        boxes = [(0, 0, 24, 8 * iou)] * 3 + [(0, 0, 24, 8)]
        logits = [(-3,), (-3,), (-3,), (3,)]
        scene = predicted([(0, 0, 24, 8)], [0], boxes, logits, PointGrid((8,), ((1, 4),)))
        match = assign("simota", scene, OTAConfig())
        assert match.gt_index.tolist() == [expected] and match.k.tolist() == [k]


def test_tal_by_hand():
    """Of 16 points in the box, the 13 with the highest score x IoU^6.

    Twelve have scores of 0.4. An IoU of 0.9 instead of 0.5 weighs 1.8^6 = 34 times as much: a score of 0.3 / 26 is then
    better than 0.3, one of 0.3 / 45 is not. A point claimed twice goes to the higher IoU, 24/25 and not 25/32.
    """
    box, boxes = (0, 0, 32, 32), [(0, 0, 32, 28.8)] * 2 + [(0, 0, 32, 16)] * 14
    logits = torch.tensor([0.3 / 26, 0.3 / 45, 0.2, 0.3] + [0.4] * 12).logit()[:, None].tolist()
    match = assign("tal", predicted([box], [0], boxes, logits, PointGrid((8,), ((4, 4),))), OTAConfig())
    assert match.gt_index.tolist() == [[0] + [-1] * 3 + [0] * 12]
    twice = predicted([box, (0, 0, 32, 24)], [0, 0], [(0, 0, 32, 25)], [(0,)], PointGrid((32,), ((1, 1),)))
    match = assign("tal", twice, OTAConfig())
    assert match.gt_index.tolist() == [[1]] and match.k.tolist() == [1, 1]


def test_paa_by_hand():
    """Losses of the points 4 to 44 px: 1 - IoU, and for the last 0.69 of focal loss at logit -3, which others lack.

    They are 0.05 0.45 0.55 0.55 0.65 1.35. The first three are positive, up to the densest of the
    lower Gaussian. The anchor at 44 px has a higher IoU with a second box, whose only candidate it is: it is positive
    there.
    """
    box, grid = (0, -16, 48, 24), PointGrid((8,), ((1, 6),))
    boxes = [(0, -16, 48 * iou, 24) for iou in (0.95, 0.55, 0.45, 0.45, 0.35, 0.34)]
    logits = [(20,)] * 5 + [(-3,)]
    match = assign("paa", predicted([box], [0], boxes, logits, grid), OTAConfig())
    assert match.gt_index.tolist() == [[0, 0, 0, -1, -1, -1]]
    match = assign("paa", predicted([box, (32, -16, 80, 24)], [0, 0], boxes, logits, grid), OTAConfig())
    assert match.gt_index[0, 5] == 1 and match.k[1] == 1


def test_hungarian_match_is_the_cheapest_of_all():
    """2 focal + 5 L1 in units of the longer side - 2 GIoU, over all 120 matches of 3 objects and 6 points."""
    scene = make_scene(PointGrid((32,), ((2, 3),)), (3,), C, seed=5, size_px=(20, 60))
    logit = scene.logits[0].T[scene.gt_labels]
    focal = sigmoid_focal_loss(logit, torch.ones_like(logit)) - sigmoid_focal_loss(logit, torch.zeros_like(logit))
    truth, boxes = (box_convert(boxes, "xyxy", "cxcywh") for boxes in (scene.gt_boxes, scene.boxes[0]))
    l1 = (truth[:, None] - boxes).abs().sum(2) / truth[:, 2:].amax(1, keepdim=True)
    cost = 2 * focal + 5 * l1 - 2 * generalized_box_iou(scene.gt_boxes, scene.boxes[0])
    best = min(itertools.permutations(range(6), 3), key=lambda points: float(cost[range(3), points].sum()))

    def watched(image: ImageInputs) -> Claims:
        claims = hungarian_claims(image)
        torch.testing.assert_close(claims.priority, cost)
        return claims

    match, _ = assign_claims(watched, scene)
    assert [(match.gt_index[0] == i).nonzero().tolist() for i in range(3)] == [[[j]] for j in best]
    scene = make_scene(PointGrid((32,), ((1, 2),)), (5,), C, size_px=(20, 60))
    match = assign("hungarian", scene, OTAConfig())  # more objects than points
    assert (match.gt_index >= 0).all() and match.k.sum() == 2


@pytest.mark.parametrize("strategy", ["ota", "fcos", "hungarian"])
def test_statistics(strategy):
    """Two objects that share half of their points, which are ambiguous, and one that is alone."""
    scene = scene_of([(16, 16, 80, 80), (24, 16, 88, 80), (104, 72, 136, 104)])
    match, ambiguous, numbers = assign_with_statistics(strategy, scene, OTAConfig())
    assert_equal(match, assign(strategy, scene, OTAConfig()))
    assert numbers["positives_per_gt"] == pytest.approx((match.gt_index >= 0).sum().item() / 3)
    assert numbers["mean_k"] == pytest.approx(match.k.sum().item() / 3)
    assert numbers["one_point"] == (strategy == "hungarian")
    assert ambiguous.any() == (strategy != "hungarian") and 0 <= numbers["ambiguous"] <= 1
    if strategy == "fcos":
        x, y = GRID.points()[ambiguous[0]].unbind(1)
        assert ((x > 24) & (x < 80) & (y > 16) & (y < 80)).all()
