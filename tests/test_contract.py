"""The contract of label assignment, for OTA in each of its backends and for every other strategy."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_iou

import model.assigners
from kernels import Assignment, OTAConfig, PointGrid
from model.assigners import CLAIMS
from tests.support.backends import GRID, ORDINARY, OTHER, TRITON_MARKS, C, N, assert_equal, assign, scene_of
from tests.support.scenes import Scene, make_scene

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
QUICK = OTAConfig(iterations=12)  # Triton's interpreter takes seconds for 50; more than the kernel's bursts of 10


@pytest.fixture(params=["ota-reference", "ota-torch", pytest.param("ota-triton", marks=TRITON_MARKS), *CLAIMS])
def strategy(request) -> str:
    return request.param


def labels(strategy: str, scene: Scene, config: OTAConfig | None = None) -> Assignment:
    if strategy.startswith("ota-"):
        return assign(*scene, config or QUICK, backend=strategy.removeprefix("ota-"))
    return model.assigners.assign(strategy, scene, config)


def labels_of_rows(strategy: str, scene: Scene, rows: list[int]) -> Assignment:
    """The result for a one-image scene that has no ground truths except `rows`, numbered as in the scene."""
    truth = dict(gt_boxes=scene.gt_boxes[rows], gt_labels=scene.gt_labels[rows])
    match = labels(strategy, scene._replace(**truth, gt_offsets=torch.tensor([0, len(rows)])))
    k = match.k.new_zeros(len(scene.gt_boxes)).index_copy(0, torch.tensor(rows), match.k)
    return match._replace(gt_index=renumbered(match.gt_index, torch.tensor(rows)), k=k)


def renumbered(gt_index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.where(gt_index >= 0, rows[gt_index], gt_index)


def points_of(match: Assignment, row: int) -> list[int]:
    """Points of the first image that are matched to a ground truth."""
    return (match.gt_index[0] == row).nonzero()[:, 0].tolist()


NOTHING_TO_MATCH = {
    "no-gt-in-any-image": scene_of([], [], [0, 0, 0]),
    "only-ignored-rows": scene_of([ORDINARY, ORDINARY], [-1, -1]),
    "only-padding": scene_of([ORDINARY, ORDINARY], [1, 0], [0, 0]),
    "only-degenerate": scene_of([(5, 5, 5, 30), (9, 9, 4, 20), (1, 2, math.nan, 9)]),
}


def test_nothing_to_match(strategy):
    for name, scene in NOTHING_TO_MATCH.items():
        match = labels(strategy, scene)
        assert (match.gt_index == -1).all() and not match.iou.any() and not match.k.any(), name
        no_image = Scene(scene.logits[:0], scene.boxes[:0], *scene[2:4], scene.gt_offsets[:1], GRID)
        match = labels(strategy, no_image)
        assert match.gt_index.shape == match.iou.shape == (0, N) and not match.k.any(), name


IGNORED_ROWS = {
    "before-the-first-offset": (ORDINARY, 1),
    "zero-width": ((30, 30, 30, 60), 0),
    "zero-height": ((30, 30, 60, 30), 0),
    "negative-width": ((60, 30, 30, 60), 0),
    "nan": ((30, math.nan, 60, 60), 0),
    "inf": ((30, 30, math.inf, 60), 0),
    "minus-inf": ((-math.inf, 30, 60, 60), 0),
    "label-minus-1": ((30, 30, 60, 60), -1),
    "after-the-last-offset": (ORDINARY, 1),
}


def test_ignored_rows_change_nothing(strategy):
    boxes, classes = zip(*IGNORED_ROWS.values(), strict=True)
    scene = scene_of([*boxes[:-1], ORDINARY, OTHER, boxes[-1]], [*classes[:-1], 1, 2, 1], [1, len(boxes) + 1])
    kept = [len(boxes) - 1, len(boxes)]
    match = labels(strategy, scene)
    assert match.k.nonzero()[:, 0].tolist() == kept
    assert_equal(match, labels_of_rows(strategy, scene, kept))


def test_label_out_of_range(strategy):
    """An error. In OTA, whose checks can be off, the row is then ignored."""
    for label in (C, -2, 2**40, -(2**40)):
        scene = scene_of([ORDINARY, OTHER], [1, 0])
        scene.gt_labels[1] = label
        with pytest.raises(ValueError, match=rf"gt_labels\[1\] is {label}, expected 0..{C - 1}, or -1"):
            labels(strategy, scene)
        if strategy.startswith("ota-"):
            match = assign(*scene, QUICK, backend=strategy.removeprefix("ota-"), check=False)
            assert_equal(match, labels_of_rows(strategy, scene, [0]))


def test_matched_row_belongs_to_the_image_and_iou_to_the_row(strategy):
    scene = make_scene(GRID, (5, 0, 2), C, seed=10)
    match = labels(strategy, scene)
    assert set(match.gt_index[1].tolist()) <= {-1, model.assigners.claims.NEITHER} and not match.iou[1].any()
    for b in (0, 2):
        point = (match.gt_index[b] >= 0).nonzero()[:, 0]
        row = match.gt_index[b, point]
        assert len(row) and ((row >= scene.gt_offsets[b]) & (row < scene.gt_offsets[b + 1])).all()
        torch.testing.assert_close(match.iou[b, point], box_iou(scene.gt_boxes[row], scene.boxes[b, point]).diagonal())
        assert not match.iou[b, match.gt_index[b] < 0].any()


def test_image_alone_is_image_in_a_batch(strategy):
    scene = make_scene(GRID, (5, 0, 9, 1), C, seed=10)
    match = labels(strategy, scene)
    for b, (image, (start, end)) in enumerate(zip(scene.images(), itertools.pairwise(scene.gt_offsets), strict=True)):
        alone = labels(strategy, image)
        alone = alone._replace(gt_index=renumbered(alone.gt_index, torch.arange(start, end + 1)))
        assert_equal(alone, Assignment(match.gt_index[b : b + 1], match.iou[b : b + 1], match.k[start:end]))


def test_padding_of_the_image_changes_nothing(strategy):
    """An image beside a wider one in the batch; the points that are added predict nothing finite here."""
    scene, wide = make_scene(GRID, (6,), C), PointGrid.for_image((104, 264), (8, 16, 32))
    levels = zip(GRID.sizes, wide.sizes, wide.level_offsets[:-1], strict=True)
    points = [
        (torch.arange(h)[:, None] * wide_w + torch.arange(w) + first).flatten() for (h, w), (_, wide_w), first in levels
    ]
    points = torch.cat(points)
    logits, boxes = torch.full((1, wide.num_points, C), math.nan), torch.full((1, wide.num_points, 4), math.nan)
    logits[:, points], boxes[:, points] = scene.logits, scene.boxes
    match = labels(strategy, scene._replace(logits=logits, boxes=boxes, grid=wide))
    assert torch.equal(match.gt_index[:, points], labels(strategy, scene).gt_index)


def test_permuted_boxes_give_the_permuted_result(strategy):
    scene = make_scene(GRID, (9,), C, seed=12, crowded=True)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    permuted = scene._replace(gt_boxes=scene.gt_boxes[order], gt_labels=scene.gt_labels[order])
    match, other = labels(strategy, scene), labels(strategy, permuted)
    assert torch.equal(other.k, match.k[order])
    assert torch.equal(renumbered(other.gt_index, order), match.gt_index)


def test_identical_boxes_go_to_the_lowest_index(strategy):
    """Nine of them. Only a one-to-one match leaves a point to each."""
    scene = scene_of([(1, 1, 30, 30)] + [ORDINARY] * 9, [2] + [1] * 9)
    for rescale in (True, False):
        match = labels(strategy, scene, replace(QUICK, rescale=rescale))
        matched = [bool(points_of(match, row)) for row in range(1, 10)]
        assert matched == [True] + [strategy == "hungarian"] * 8
        if strategy.startswith("ota-"):
            assert len(set(match.k[1:].tolist())) == 1 and match.k[1] > 0


def test_tiny_box(strategy):
    """Between four points. OTA gives it the closest: its centre (50.5, 49.75) is 1.5 and 2.25 px from (52, 52)."""
    match = labels(strategy, scene_of([(50.25, 49.5, 50.75, 50.0)]))
    if strategy.startswith("ota-"):
        assert points_of(match, 0) == [6 * 17 + 6] and match.k[0] == 1
    else:
        assert len(points_of(match, 0)) == (strategy in ("simota", "hungarian"))


def test_no_point_whose_prediction_is_not_finite_is_matched(strategy):
    """NaN and both infinities in turn, in logits and boxes; then a whole image, then points in no object's reach."""
    scene = make_scene(GRID, (4, 3), C, seed=2, size_px=(30, 90))
    before = labels(strategy, scene)
    broken = scene._replace(logits=scene.logits.clone(), boxes=scene.boxes.clone())
    points = (before.gt_index[0] >= 0).nonzero()[::2, 0]
    for i, j in enumerate(points.tolist()):
        value = (math.nan, math.inf, -math.inf)[i % 3]
        if i % 2:
            broken.logits[0, j] = value
        else:
            broken.boxes[0, j, i % 4] = value
    after = labels(strategy, broken)
    assert (after.gt_index[0, points] < 0).all() and (after.gt_index[0] >= 0).any() and after.iou.isfinite().all()
    assert torch.equal(after.gt_index[1], before.gt_index[1]) and torch.equal(after.k[4:], before.k[4:])

    broken.logits[0] = math.nan
    after = labels(strategy, broken)
    assert (after.gt_index[0] < 0).all() and not after.k[:4].any() and after.iou.isfinite().all()
    assert torch.equal(after.gt_index[1], before.gt_index[1]) and torch.equal(after.k[4:], before.k[4:])

    far = scene_of([ORDINARY])
    broken = far._replace(logits=far.logits.clone(), boxes=far.boxes.clone())
    broken.logits[0, 0], broken.boxes[0, 0], broken.logits[0, 40, 2] = math.nan, math.inf, math.nan
    assert_equal(labels(strategy, broken), labels(strategy, far))


def test_huge_predictions(strategy):
    scene = make_scene(GRID, (3,), C)
    scene.boxes[0, ::3] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    match = labels(strategy, scene)
    assert match.iou.isfinite().all() and (match.gt_index[0, ::3] < 0).all()


def test_half_precision_is_loaded_as_it_is(strategy):
    scene = make_scene(GRID, (2, 1), C, seed=9)
    for dtype in (torch.bfloat16, torch.float16):
        half = scene._replace(logits=scene.logits.to(dtype), boxes=scene.boxes.to(dtype))
        rounded = half._replace(logits=half.logits.float(), boxes=half.boxes.float())
        assert_equal(labels(strategy, half), labels(strategy, rounded))


def test_labels_and_offsets_of_any_integer_type(strategy):
    """300 classes: more than a byte can count."""
    scene = make_scene(GRID, (2, 1), 300, seed=9)
    scene = scene._replace(gt_labels=scene.gt_labels % 100)
    config = OTAConfig(iterations=2)
    for first in (-1, 255):
        scene.gt_labels[0] = first
        match = labels(strategy, scene, config)
        assert (match.k[0] > 0) == (first == 255)
        for dtype in (torch.int32, torch.int16, torch.int8 if first < 0 else torch.uint8):
            narrow = scene._replace(gt_labels=scene.gt_labels.to(dtype), gt_offsets=scene.gt_offsets.to(dtype))
            assert_equal(labels(strategy, narrow, config), match)


def test_strided_inputs(strategy):
    scene = make_scene(GRID, (2, 1), C, seed=9)
    strided = Scene(*(torch.stack([tensor, tensor], -1)[..., 0] for tensor in scene[:5]), GRID)
    assert not any(tensor.is_contiguous() for tensor in strided[:5])
    assert_equal(labels(strategy, strided), labels(strategy, scene))


def test_same_bits_every_time_and_under_another_default_type(strategy):
    scene = make_scene(GRID, (2, 0, 4), C, seed=8, crowded=True)
    match = labels(strategy, scene)
    assert match.gt_index.dtype == torch.int64 and match.iou.dtype == torch.float32 and match.k.dtype == torch.int32
    assert_equal(labels(strategy, scene), match)
    torch.set_default_dtype(torch.float64)
    try:
        assert_equal(labels(strategy, scene), match)
    finally:
        torch.set_default_dtype(torch.float32)
