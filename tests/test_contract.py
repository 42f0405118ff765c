"""The contract of label assignment, for OTA in each of its backends and for every other strategy."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_iou

import model.assigners
from kernels import Assignment, OTAConfig
from model.assigners import CLAIMS
from tests.support.backends import GRID, ORDINARY, OTHER, TRITON_MARKS, C, N, assert_equal, assign, scene_of
from tests.support.scenes import Scene, make_scene

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
QUICK = OTAConfig(iterations=2)  # Triton's interpreter takes seconds for 50


@pytest.fixture(params=["ota-reference", "ota-torch", pytest.param("ota-triton", marks=TRITON_MARKS), *CLAIMS])
def strategy(request) -> str:
    return request.param


def labels(strategy: str, scene: Scene, config: OTAConfig = QUICK) -> Assignment:
    if strategy.startswith("ota-"):
        return assign(*scene, config, backend=strategy.removeprefix("ota-"))
    return model.assigners.assign(strategy, scene, config)


def labels_of_rows(strategy: str, scene: Scene, rows: list[int]) -> Assignment:
    """The result for a one-image scene that has no ground truths except `rows`, numbered as in the scene."""
    truth = dict(gt_boxes=scene.gt_boxes[rows], gt_labels=scene.gt_labels[rows])
    match = labels(strategy, scene._replace(**truth, gt_offsets=torch.tensor([0, len(rows)])))
    k = match.k.new_zeros(len(scene.gt_boxes)).index_copy(0, torch.tensor(rows), match.k)
    return match._replace(gt_index=renumbered(match.gt_index, torch.tensor(rows)), k=k)


def renumbered(gt_index: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.where(gt_index >= 0, rows[gt_index], gt_index)


NOTHING_TO_MATCH = {
    "no-gt-in-any-image": scene_of([], [], [0, 0, 0]),
    "only-ignored-rows": scene_of([ORDINARY, ORDINARY], [-1, -1]),
    "only-padding": scene_of([ORDINARY, ORDINARY], [1, 0], [0, 0]),
}


def test_nothing_to_match(strategy):
    for name, scene in NOTHING_TO_MATCH.items():
        match = labels(strategy, scene)
        assert (match.gt_index == -1).all() and not match.iou.any() and not match.k.any(), name
    no_image = Scene(scene.logits[:0], scene.boxes[:0], *scene[2:4], scene.gt_offsets[:1], GRID)
    assert labels(strategy, no_image).gt_index.shape == (0, N)


IGNORED_ROWS = {
    "before-the-first-offset": (ORDINARY, 1),
    "zero-width": ((30, 30, 30, 60), 0),
    "negative-height": ((30, 60, 60, 30), 0),
    "nan": ((30, math.nan, 60, 60), 0),
    "inf": ((30, 30, math.inf, 60), 0),
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
    for label in (C, -(2**40)):
        scene = scene_of([ORDINARY, OTHER], [1, 0])
        scene.gt_labels[1] = label
        with pytest.raises(ValueError, match=rf"gt_labels\[1\] is {label}, expected 0..{C - 1}, or -1"):
            labels(strategy, scene)
        if strategy.startswith("ota-"):
            match = assign(*scene, QUICK, backend=strategy.removeprefix("ota-"), check=False)
            assert_equal(match, labels_of_rows(strategy, scene, [0]))


def test_batch(strategy):
    """Rows and IoUs of matches, the same bits every time and for each image alone."""
    scene = make_scene(GRID, (5, 0, 3), C, seed=10)
    match = labels(strategy, scene)
    assert match.gt_index.dtype == torch.int64 and match.iou.dtype == torch.float32 and match.k.dtype == torch.int32
    assert_equal(labels(strategy, scene), match)
    assert not (match.gt_index[1] >= 0).any() and not match.iou[match.gt_index < 0].any()
    for b, (image, (start, end)) in enumerate(zip(scene.images(), itertools.pairwise(scene.gt_offsets), strict=True)):
        alone = labels(strategy, image)
        alone = alone._replace(gt_index=renumbered(alone.gt_index, torch.arange(start, end + 1)))
        assert_equal(alone, Assignment(match.gt_index[b : b + 1], match.iou[b : b + 1], match.k[start:end]))
        point = (match.gt_index[b] >= 0).nonzero()[:, 0]
        row = match.gt_index[b, point]
        assert bool(len(row)) == (end > start) and ((row >= start) & (row < end)).all()
        torch.testing.assert_close(match.iou[b, point], box_iou(scene.gt_boxes[row], scene.boxes[b, point]).diagonal())


def test_permuted_boxes_give_the_permuted_result(strategy):
    scene = make_scene(GRID, (6,), C, seed=12, crowded=True)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    permuted = scene._replace(gt_boxes=scene.gt_boxes[order], gt_labels=scene.gt_labels[order])
    match, other = labels(strategy, scene), labels(strategy, permuted)
    assert torch.equal(other.k, match.k[order])
    assert torch.equal(renumbered(other.gt_index, order), match.gt_index)


def test_identical_boxes_go_to_the_lowest_index(strategy):
    """Nine of them. Only a one-to-one match leaves a point to each."""
    scene = scene_of([(1, 1, 30, 30)] + [ORDINARY] * 9, [2] + [1] * 9)
    for rescale in (True, False) if strategy.startswith("ota-") else (True,):
        match = labels(strategy, scene, replace(QUICK, rescale=rescale))
        assert [bool((match.gt_index == row).any()) for row in range(1, 10)] == [True] + [strategy == "hungarian"] * 8


def test_no_point_whose_prediction_is_not_finite_is_matched(strategy):
    """NaN, both infinities and areas past float32; then a whole image. The other image keeps its result."""
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
    broken.boxes[0, points[-1]] = torch.tensor([-1e30, -1e30, 1e30, 1e30])
    after = labels(strategy, broken)
    assert (after.gt_index[0, points] < 0).all() and (after.gt_index[0] >= 0).any()
    broken.logits[0] = math.nan
    nothing = labels(strategy, broken)
    assert (nothing.gt_index[0] < 0).all() and not nothing.k[:4].any()
    for match in (after, nothing):
        assert match.iou.isfinite().all()
        assert torch.equal(match.gt_index[1], before.gt_index[1]) and torch.equal(match.k[4:], before.k[4:])


def test_inputs_of_any_type_and_stride(strategy):
    """Half precision is computed in float32; 300 classes are more than a byte can count."""
    scene = make_scene(GRID, (2, 1), 300, seed=9)
    scene.gt_labels[:] = torch.tensor([255, 7, 40])
    for dtype, label_type in ((torch.bfloat16, torch.uint8), (torch.float16, torch.int16)):
        half = scene._replace(logits=scene.logits.to(dtype), boxes=scene.boxes.to(dtype))
        rounded = half._replace(logits=half.logits.float(), boxes=half.boxes.float())
        narrow = half._replace(gt_labels=scene.gt_labels.to(label_type), gt_offsets=scene.gt_offsets.to(label_type))
        strided = Scene(*(torch.stack([tensor, tensor], -1)[..., 0] for tensor in narrow[:5]), GRID)
        assert_equal(labels(strategy, strided), labels(strategy, rounded))
