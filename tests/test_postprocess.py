"""Raw predictions to detections: a worked example, torchvision's NMS, ties, NaN and neighbours in a batch."""

import pytest
import torch
from torchvision.ops import batched_nms

from kernels import PointGrid
from model import DetectorConfig
from model.head import Predictions
from model.postprocess import Detections, postprocess, unpad

SMALL = PointGrid.for_image((96, 128))  # 257 points: 192, 48, 12, 4 and 1
SIZES = [(96, 128), (90, 100), (61, 127)]


def detections_of(predictions: Predictions, sizes: list, grid: PointGrid = SMALL, **settings) -> list[Detections]:
    config = DetectorConfig(predictions.logits.shape[2], **{"nms_iou": 0.5} | settings)
    sizes = torch.tensor(sizes, device=predictions.boxes.device)
    return unpad(*postprocess(predictions, grid, sizes, config), [])


def crowded_predictions(images: int, classes: int, seed: int = 0, share: float = 0.7) -> Predictions:
    """Boxes that overlap around a few places of each image; about `share` of the scores are above 0.05."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, SMALL.num_points)
    place = torch.rand(images, 6, 2, generator=generator) * torch.tensor([128.0, 96])
    center = place.gather(1, torch.randint(6, (*shape, 1), generator=generator).expand(-1, -1, 2))
    center = center + 4 * torch.randn(*shape, 2, generator=generator)
    half = 12 * (0.3 * torch.randn(*shape, 2, generator=generator)).exp()
    logits = 2 * torch.randn(*shape, classes, generator=generator)
    logits = logits.where(torch.rand(logits.shape, generator=generator) < share, -20)
    return Predictions(logits, torch.cat([center - half, center + half], -1), torch.randn(shape, generator=generator))


def assert_same(found: list[Detections], expected: list[Detections]) -> None:
    """Equal, in the same order; on a CPU the last bit of a sigmoid depends on its place in the tensor."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels) and torch.equal(one.boxes, other.boxes)
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-6, atol=0)


def test_worked_example():
    """An image of 28 x 30 px. Scores are sqrt(class * IoU), with an IoU of 1 except where it is given."""
    grid = PointGrid.for_image((32, 32), (8, 16))
    logits, boxes, iou_logits = torch.full((1, 20, 2), -20.0), torch.zeros(1, 20, 4), torch.full((1, 20), 20.0)
    candidates = [  # point, class, its logit, box, and where it ends
        (0, 0, 4.0, [0, 0, 10, 10], "found"),
        (1, 0, 3.0, [0, 0, 10, 7], "suppressed: IoU 0.7"),
        (2, 0, 2.5, [0, 0, 10, 5], "found: IoU 0.5"),
        (2, 1, 2.0, [0, 0, 10, 5], "found: another class"),
        (16, 1, 1.5, [0, 20, 8, 30], "found: second level"),
        (3, 0, 1.0, [20, 20, 60, 60], "found: cut to the image"),
        (17, 1, -5.5, [20, 0, 30, 8], "below the threshold: sqrt(0.004) = 0.064"),
        (4, 1, 3.5, [-9, 12, 5, 17], "found: an IoU of 0.5, so that it is the fourth; cut to the image"),
    ]
    for point, label, logit, box, _ in candidates:
        logits[0, point, label], boxes[0, point] = logit, torch.tensor(box, dtype=torch.float32)
    iou_logits[0, 4] = 0.0
    predictions = Predictions(logits, boxes, iou_logits)
    (found,) = detections_of(predictions, [(30, 28)], grid, score_threshold=0.07, nms_iou=0.6)
    assert found.labels.tolist() == [0, 0, 1, 1, 0, 1]
    classes = torch.tensor([4.0, 2.5, 2.0, 1.5, 1.0, 3.5]).sigmoid()
    torch.testing.assert_close(found.scores, (classes * torch.tensor([1, 1, 1, 1, 1, 0.5])).sqrt())
    expected = [[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 5], [0, 20, 8, 30], [20, 20, 28, 30], [0, 12, 5, 17]]
    assert found.boxes.tolist() == expected
    (lower,) = detections_of(predictions, [(30, 28)], grid, score_threshold=0.06, nms_iou=0.6)
    assert len(lower.scores) == 7
    (first,) = detections_of(predictions, [(30, 28)], grid, topk_per_level=1)
    assert first.boxes.tolist() == [expected[0], expected[3]]  # one of each level
    (limited,) = detections_of(predictions, [(30, 28)], grid, max_detections=2)
    assert limited.boxes.tolist() == expected[:2]


def test_limits_unless_set_are_1000_candidates_a_level_and_100_detections():
    predictions = crowded_predictions(1, 7, share=1.0)
    config = DetectorConfig(7)
    (count,) = (postprocess(predictions, SMALL, torch.tensor([[96, 128]]), config, suppress=None)[1] > 0).sum(1)
    scores = (predictions.logits.sigmoid() * predictions.iou_logits.sigmoid()[..., None]).sqrt()[0]
    assert (scores[:192] > 0.05).sum() > 1000  # of the 1344 of the first level
    assert count == 1000 + (scores[192:] > 0.05).sum()
    assert [len(d.scores) for d in detections_of(predictions, [(96, 128)])] == [100]


@pytest.mark.parametrize("topk, most", [(1000, 100), (30, 9)], ids=["all-candidates", "topk-of-two-levels"])
def test_nms_is_torchvisions(topk, most):
    predictions = crowded_predictions(3, 5)
    settings = {"topk_per_level": topk, "nms_iou": 0.5, "max_detections": most}
    found = detections_of(predictions, SIZES, **settings)
    candidates = postprocess(predictions, SMALL, torch.tensor(SIZES), DetectorConfig(5, **settings), suppress=None)
    for one, boxes, scores, labels in zip(found, *candidates, strict=True):
        count = int((scores > 0).sum())
        kept = batched_nms(boxes[:count].double(), scores[:count].double(), labels[:count], 0.5)[:most]
        assert_same([one], [Detections(boxes[kept], scores[kept], labels[kept], [])])
        assert 0 < len(kept) < count  # something is suppressed or cut off


def test_equal_scores_keep_the_order_of_points_and_classes():
    """All scores are 0.5, and boxes overlap between levels only."""
    boxes = torch.cat([SMALL.points() - 1, SMALL.points() + 1], 1)
    predictions = Predictions(torch.zeros(1, 257, 2), boxes[None].clone(), torch.zeros(1, 257))
    predictions.logits[0, 200, 1] = 1.0
    (found,) = detections_of(predictions, [(96, 128)], max_detections=41)
    assert found.labels.tolist() == [1] + [0, 1] * 20
    assert torch.equal(found.boxes, torch.cat([boxes[200:201], boxes[:20].repeat_interleave(2, 0)]))
    predictions.boxes[:] = torch.tensor([3.0, 3, 9, 9])
    assert detections_of(predictions._replace(logits=torch.zeros(1, 257, 2)), [(96, 128)])[0].labels.tolist() == [0, 1]


def test_detections_do_not_depend_on_the_batch():
    """Not even on a neighbour full of NaN, or one without any detection."""
    predictions = crowded_predictions(4, 5, share=0.3)
    predictions.logits[2], predictions.logits[3] = torch.nan, -20
    sizes = [*SIZES, SIZES[0]]
    together = detections_of(predictions, sizes, topk_per_level=30)
    assert [len(found.scores) > 20 for found in together] == [True, True, False, False]
    shapes = [(t.shape, t.dtype) for t in together[3][:3]]
    assert shapes == [((0, 4), torch.float32), ((0,), torch.float32), ((0,), torch.int64)]
    for order in ([0], [1], [2, 3], [3, 1, 0]):
        some = Predictions(*(tensor[order] for tensor in predictions))
        found = detections_of(some, [sizes[b] for b in order], topk_per_level=30)
        assert_same(found, [together[b] for b in order])


def test_nan_has_the_effect_of_a_score_of_0():
    """In a class, an IoU or a box."""
    logits, boxes, iou_logits = crowded_predictions(3, 5)
    random = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))
    of_class, of_iou, of_box = random < 0.2, random[..., :1] > 0.9, random[..., 1:2] > 0.9
    spoilt = logits.masked_fill(of_class, -torch.nan), boxes.masked_fill(of_box, torch.nan)
    spoilt = Predictions(*spoilt, iou_logits.masked_fill(of_iou[..., 0], torch.nan))
    silent = Predictions(logits.masked_fill(of_class | of_iou | of_box, -100), boxes, iou_logits)
    settings = {"topk_per_level": 7, "max_detections": 9999}
    assert_same(detections_of(spoilt, SIZES, **settings), detections_of(silent, SIZES, **settings))
