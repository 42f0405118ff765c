"""The network, its losses and its detections, without any data set."""

import copy
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from torchvision.ops import batched_nms, clip_boxes_to_image

from benchmarks.measure import host_syncs
from errors import UserError
from kernels import Assignment, OTAConfig, PointGrid
from model import Detector, DetectorConfig, load_weights, save_weights
from model.backbone import STRIDES, Backbone, FrozenNorm, freeze_norms
from model.batch import pad_images
from model.head import Predictions
from model.losses import detection_losses, points_inside
from model.postprocess import Detections, postprocess, unpad


def tiny_detector(backbone: str = "test_resnet", **settings) -> Detector:
    torch.manual_seed(0)
    settings = {"num_classes": 3, "channels": 32, "head_convs": 1, "image_size": (96, 128)} | settings
    return Detector(DetectorConfig(backbone=backbone, **settings))


def random_batch(sizes: list[tuple[int, int]], boxes_per_image: int = 3) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    targets = []
    for height, width in sizes:
        corner = torch.rand(boxes_per_image, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        side = 8 + torch.rand(boxes_per_image, 2, generator=generator) * torch.tensor([width, height]) * 0.3
        labels = torch.randint(0, 3, (boxes_per_image,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + side], 1), "labels": labels})
    return images, targets


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_mambaout", "swin_tiny_patch4_window7_224"],
    ids=["cnn", "cnn-without-format", "channels-last", "channels-last-transformer"],
)  # fmt: skip
def test_backbone_gives_five_levels(name):
    features = Backbone(name, 32)(torch.zeros(2, 3, 96, 160))
    assert [tuple(f.shape) for f in features] == [(2, 32, *hw) for hw in PointGrid.for_image((96, 160)).sizes]


def test_backbone_levels_follow_the_grid_at_odd_multiples_of_32():
    features = Backbone("test_resnet", 32)(torch.zeros(1, 3, 224, 352))
    assert tuple(tuple(f.shape[-2:]) for f in features) == PointGrid.for_image((224, 352), STRIDES).sizes


@pytest.mark.parametrize(
    "name, message",
    [("resnet18x", "no backbone 'resnet18x'.*--backbone"), ("test_vit", r"strides \[16.*not at \[8, 32\]")],
)
def test_unfit_backbone_is_refused_by_name(name, message):
    with pytest.raises(UserError, match=message):
        Backbone(name, 32)


def test_pretrained_weights_are_loaded_through_timm(monkeypatch):
    full = timm.create_model("test_resnet")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(full.state_dict()))
    body = Backbone("test_resnet", 32, pretrained=True).body
    torch.testing.assert_close(body.state_dict()["conv1.0.weight"], full.state_dict()["conv1.0.weight"])


def test_weights_that_cannot_be_had_stop_with_the_flag(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    with pytest.raises(UserError, match="cannot reach the hub(.|\n)*--no-pretrained"):
        Backbone("test_resnet", 32, pretrained=True)


def test_images_are_normalised_with_the_backbones_own_statistics():
    detector = tiny_detector("resnet10t")
    mean, std = (torch.tensor(detector.backbone.body.pretrained_cfg[name]) for name in ("mean", "std"))
    image = torch.full((3, 30, 40), 51, dtype=torch.uint8)
    batch = detector.normalise(*pad_images([image, image[:, :20, :33]]))
    assert batch.shape == (2, 3, 32, 64)
    torch.testing.assert_close(batch[0, :, 29, 39], (0.2 - mean) / std)
    assert not batch[1, :, 20:].any() and not batch[1, :, :, 33:].any()
    torch.testing.assert_close(detector.normalise(*pad_images([image.float() / 255])), batch[:1])


def test_training_gives_three_losses_and_gradients_everywhere():
    detector = tiny_detector().train()
    losses, assignment, predictions = detector(*random_batch([(90, 130), (64, 100)]))
    assert set(losses) == {"cls", "box", "iou"}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())
    assert (assignment.gt_index >= 0).any() and not any(tensor.requires_grad for tensor in predictions)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_labels_of_any_integer_type(dtype):
    """Images may differ in it."""
    images, targets = random_batch([(64, 96)] * 2)
    narrow = [targets[0] | {"labels": targets[0]["labels"].to(dtype)}, targets[1]]
    losses = [tiny_detector().train()(images, t)[0] for t in (targets, narrow)]
    assert losses[0] == losses[1]
    with pytest.raises(TypeError, match="gt_labels is torch.float32, expected torch.int64"):
        tiny_detector().train()(images, [targets[0] | {"labels": targets[0]["labels"].float()}, targets[1]])


@pytest.mark.parametrize("backbone", ["test_resnet", "test_mambaout"])
def test_batch_without_objects_trains_on_negatives(backbone):
    detector = tiny_detector(backbone).train()
    losses, *_ = detector(*random_batch([(64, 64), (64, 96)], boxes_per_image=0))
    assert losses["cls"] > 0 and losses["box"] == 0 and losses["iou"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.parameters())


def test_training_without_targets_says_so():
    with pytest.raises(ValueError, match="one target"):
        tiny_detector().train()([torch.zeros(3, 64, 64)])


def test_losses_of_perfect_predictions_vanish():
    gt_boxes, gt_labels = torch.tensor([[2.0, 3, 20, 30], [5, 5, 9, 9]]), torch.tensor([2, 0])
    gt_index = torch.tensor([[-1, 1, 0, -1, 0]])
    logits = torch.full((1, 5, 3), -30.0)
    logits[0, [1, 2, 4], [0, 2, 2]] = 30.0
    predictions = Predictions(logits, gt_boxes[gt_index.clamp(min=0)], torch.full((1, 5), 30.0))
    assignment = Assignment(gt_index, (gt_index >= 0).float(), torch.tensor([2, 1]))
    losses = detection_losses(predictions, assignment, gt_boxes, gt_labels)
    assert all(value < 1e-6 for value in losses.values())


def test_ignored_points_add_no_classification_loss():
    """Focal loss by hand: 0.75 sigmoid(x)^2 softplus(x) a negative, 0.25 sigmoid(-x)^2 softplus(-x) a positive."""
    gt_boxes, gt_labels = torch.tensor([[0.0, 0, 8, 8]]), torch.tensor([1])
    gt_index = torch.tensor([[-1, 0, -1, -1]])
    ignored = torch.tensor([[True, True, False, False]])
    logits = torch.tensor([[[1.0, 2.0], [0.5, -0.5], [-1.0, 0.0], [3.0, -2.0]]], requires_grad=True)
    predictions = Predictions(logits, gt_boxes.expand(1, 4, 4), torch.zeros(1, 4))
    assignment = Assignment(gt_index, (gt_index >= 0).float(), torch.tensor([1]))
    losses = detection_losses(predictions, assignment, gt_boxes, gt_labels, ignored)
    negatives = torch.tensor([0.5, -1.0, 0.0, 3.0, -2.0])
    matched = 0.25 * torch.tensor(0.5).sigmoid() ** 2 * F.softplus(torch.tensor(0.5))
    by_hand = (0.75 * negatives.sigmoid() ** 2 * F.softplus(negatives)).sum() + matched
    torch.testing.assert_close(losses["cls"], by_hand)
    losses["cls"].backward()
    assert not logits.grad[0, 0].any()
    assert logits.grad[0, 1:].all()  # a point that is matched learns, inside the region or not


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_ignored_points_take_no_part_in_any_float_type(dtype):
    logits = torch.randn(2, 5, 3).to(dtype)
    gt_index = torch.full((2, 5), -1)
    assignment = Assignment(gt_index, torch.zeros(2, 5), torch.zeros(0, dtype=torch.int32))
    predictions = Predictions(logits, torch.zeros(2, 5, 4), torch.zeros(2, 5))
    everywhere = torch.ones(2, 5, dtype=torch.bool)
    none = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    assert detection_losses(predictions, assignment, *none, everywhere)["cls"] == 0
    nowhere = detection_losses(predictions, assignment, *none, ~everywhere)
    assert all(
        torch.equal(a, b)
        for a, b in zip(nowhere.values(), detection_losses(predictions, assignment, *none).values(), strict=True)
    )


def test_points_inside_are_those_of_the_own_image():
    grid = PointGrid.for_image((64, 96))
    points, generator = grid.points(), torch.Generator().manual_seed(0)
    corner = torch.rand(7, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + torch.rand(7, 2, generator=generator) * 40], 1)
    boxes[0] = torch.tensor([4.0, 4, 12, 12])  # a point at (4, 4) and one at (12, 12) lie on its corners, no more
    image_index = torch.tensor([0, 0, 1, 1, 1, 3, 3])  # the third image has no region
    inside = points_inside(points, boxes, image_index, 4)
    for b in range(4):
        for n, (x, y) in enumerate(points.tolist()):
            mine = boxes[image_index == b].tolist()
            assert inside[b, n] == any(x1 < x < x2 and y1 < y < y2 for x1, y1, x2, y2 in mine)
    assert 0 < inside.sum() < inside.numel() and not inside[2].any()


def test_regions_to_ignore_change_the_negatives_only():
    """Regions of one image; a batch without any gives the losses of targets that never heard of them."""
    detector = tiny_detector().train()
    images, targets = random_batch([(90, 130), (64, 100)])
    for norm in detector.modules():  # the same statistics in every call
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.eval()
    plain = detector(images, targets)[0]
    empty = detector(images, [t | {"ignore": torch.zeros(0, 4)} for t in targets])[0]
    assert all(torch.equal(plain[name], empty[name]) for name in plain)
    whole = [targets[0] | {"ignore": torch.tensor([[0.0, 0, 130, 90], [5, 5, 6, 6]])}, targets[1]]
    ignoring = detector(images, whole)[0]
    assert ignoring["cls"] < plain["cls"]
    assert all(torch.equal(plain[name], ignoring[name]) for name in ("box", "iou"))


def test_detections_are_in_pixels_of_the_image_as_given(monkeypatch):
    detector = tiny_detector().eval()
    grid = PointGrid.for_image((96, 128))
    logits = torch.full((1, grid.num_points, 3), -20.0)
    logits[0, 5, 1] = 8.0
    boxes = torch.zeros(1, grid.num_points, 4)
    boxes[0, 5] = torch.tensor([12.0, 24, 36, 48])
    predictions = Predictions(logits, boxes, torch.full((1, grid.num_points), 8.0))
    monkeypatch.setattr(detector, "predict_raw", lambda batch: (predictions, grid))
    (found,) = detector([torch.zeros(3, 192, 256, dtype=torch.uint8)])  # resized to 96 x 128, a half
    torch.testing.assert_close(found.boxes, torch.tensor([[24.0, 48, 72, 96]]))
    assert found.labels.tolist() == [1]
    torch.testing.assert_close(found.scores, torch.tensor([8.0]).sigmoid())


def test_image_of_the_right_size_is_not_resized():
    detector = tiny_detector(image_size=(96, 128))
    for size in ((96, 100), (128, 96), (77, 128)):
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8)
        assert detector.resize(image) is image or torch.equal(detector.resize(image), image)


@torch.no_grad()
def test_detections_do_not_depend_on_neighbours_of_the_same_padded_size():
    detector = tiny_detector(score_threshold=0.0, max_detections=20).eval()
    images, _ = random_batch([(96, 120), (96, 128)])
    alone, together = detector(images[:1])[0], detector(images)[0]
    torch.testing.assert_close(alone.boxes, together.boxes, atol=1e-3, rtol=0)
    torch.testing.assert_close(alone.scores, together.scores, atol=1e-5, rtol=0)


def detections_of(predictions: Predictions, grid: PointGrid, sizes: list, *settings) -> list[Detections]:
    sizes = torch.tensor(sizes, device=predictions.boxes.device)
    names = "score_threshold", "topk_per_level", "nms_iou", "max_detections"
    config = SimpleNamespace(**dict(zip(names, settings, strict=True)))
    return unpad(*postprocess(predictions, grid, sizes, config), [])


def one_by_one(predictions: Predictions, grid, sizes, score_threshold, topk, nms_iou, most) -> list[Detections]:
    """Detections by a loop over images and levels; float32 predictions."""
    scores = (predictions.logits.sigmoid() * predictions.iou_logits.sigmoid()[..., None]).sqrt()
    num_classes = scores.shape[-1]
    detections = []
    for image_scores, image_boxes, size in zip(scores, predictions.boxes, sizes, strict=True):
        kept = []
        for start, end in zip(grid.level_offsets, grid.level_offsets[1:], strict=False):
            flat = image_scores[start:end].flatten()
            above = (flat > score_threshold).nonzero()[:, 0]
            best = flat[above].sort(stable=True, descending=True).indices[:topk]
            kept.append(above[best] + start * num_classes)
        kept = torch.cat(kept)
        kept_scores, labels = image_scores.flatten()[kept], kept % num_classes
        boxes = clip_boxes_to_image(image_boxes[kept // num_classes], size)
        # batched_nms may move classes apart by 100,000 px, where float32 leaves no more than 1/128 px
        best = batched_nms(boxes.double(), kept_scores.double(), labels, nms_iou)[:most]
        detections.append(Detections(boxes[best], kept_scores[best], labels[best], []))
    return detections


def test_postprocess_thresholds_suppresses_and_clips():
    grid = PointGrid.for_image((32, 32), (8, 16))
    logits, iou_logits = torch.full((1, 20, 2), -20.0), torch.full((1, 20), 20.0)
    boxes = torch.tensor([0.0, 0, 10, 10]).repeat(1, 20, 1)
    logits[0, 0, 0], logits[0, 1, 0] = 4.0, 3.0  # the same box twice: the better one stays
    logits[0, 2, 1] = 2.0  # the same box, another class: stays
    boxes[0, 3], logits[0, 3, 0] = torch.tensor([20.0, 20, 60, 60]), 1.0  # reaches out of the image
    logits[0, 16, 1], boxes[0, 16] = 1.5, torch.tensor([0.0, 20, 8, 30])  # second level
    logits[0, 17, 1], boxes[0, 17] = -5.5, torch.tensor([20.0, 0, 30, 8])  # sqrt(0.004) = 0.064
    (found,) = detections_of(Predictions(logits, boxes, iou_logits), grid, [(30, 28)], 0.07, 1000, 0.6, 100)
    assert found.labels.tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(found.scores, torch.tensor([4.0, 2.0, 1.5, 1.0]).sigmoid().sqrt())
    assert found.boxes[3].tolist() == [20, 20, 28, 30]
    (best,) = detections_of(Predictions(logits, boxes, iou_logits), grid, [(30, 28)], 0.05, 1, 0.6, 100)
    assert best.labels.tolist() == [0, 1]  # one of each level
    (none,) = detections_of(Predictions(logits - 40, boxes, iou_logits), grid, [(30, 28)], 0.05, 1000, 0.6, 100)
    assert none.boxes.shape == (0, 4) and len(none.labels) == 0


SCORE_TOLERANCE = 1e-6  # on a CPU the last bit of a sigmoid depends on the place in its tensor
SMALL = PointGrid.for_image((96, 128))  # 255 points: 192, 48, 12, 2 and 1


def crowded_predictions(images: int, classes: int, seed: int, share: float = 0.7) -> Predictions:
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


def assert_same(found: list[dict], expected: list[dict]) -> None:
    """Equal, in the same order; on a CPU the last bit of a sigmoid depends on its place in the tensor."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.labels, other.labels) and torch.equal(one.boxes, other.boxes)
        torch.testing.assert_close(one.scores, other.scores, rtol=SCORE_TOLERANCE, atol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "images, classes, share, topk, most",
    [
        (1, 1, 0.7, 1000, 100), (1, 5, 0.7, 1000, 100), (3, 1, 0.7, 1000, 100), (3, 5, 0.7, 1000, 100),
        (3, 5, 0.05, 1000, 100), (3, 5, 0.7, 30, 100), (3, 5, 0.7, 7, 100), (3, 5, 0.7, 1000, 9), (3, 1, 0.7, 1, 1),
    ],
    ids=[
        "B1-C1", "B1-C5", "B3-C1", "B3-C5", "few-scores", "topk-of-two-levels", "topk-of-all-levels",
        "most-detections", "one-of-each",
    ],
)  # fmt: skip
def test_postprocess_equals_one_by_one(images, classes, share, topk, most, seed):
    predictions = crowded_predictions(images, classes, seed, share)
    arguments = predictions, SMALL, [(96, 128), (90, 100), (61, 127)][:images], 0.05, topk, 0.5, most
    expected = one_by_one(*arguments)
    assert_same(detections_of(*arguments), expected)
    kept, candidates = (
        sum(len(d.scores) for d in found)
        for found in (expected, detections_of(predictions, SMALL, arguments[2], 0.05, 1000, 1.0, 9999))
    )
    assert 0 < kept < candidates  # something was suppressed or cut off


def test_no_candidate_at_all_and_beside_a_full_image():
    predictions = crowded_predictions(3, 5, 0)
    predictions.logits[[0, 2]] = -20
    arguments = SMALL, [(96, 128)] * 3, 0.05, 1000, 0.5, 100
    empty, full, _ = found = detections_of(predictions, *arguments)
    assert_same(found, one_by_one(predictions, *arguments))
    assert len(full.scores) > 20
    assert [(t.shape, t.dtype) for t in empty[:3]] == [
        ((0, 4), torch.float32), ((0,), torch.float32), ((0,), torch.int64)
    ]  # fmt: skip
    predictions.logits[1] = -20
    assert all(len(d.scores) == 0 for d in detections_of(predictions, *arguments))


def test_equal_scores_keep_the_order_of_points_and_classes():
    boxes = torch.cat([SMALL.points() - 1, SMALL.points() + 1], 1).repeat(2, 1, 1)
    predictions = Predictions(torch.zeros(2, SMALL.num_points, 2), boxes, torch.zeros(2, SMALL.num_points))  # all 0.5
    predictions.logits[1, 200, 1] = 1.0
    first, second = detections_of(predictions, SMALL, [(96, 128)] * 2, 0.05, 1000, 0.5, 40)
    assert torch.equal(first.boxes, boxes[0, :20].repeat_interleave(2, 0))
    assert first.labels.tolist() == [0, 1] * 20
    assert torch.equal(second.boxes, torch.cat([boxes[1, 200:201], first.boxes[:39]]))
    predictions.boxes[:] = torch.tensor([3.0, 3, 9, 9])
    predictions.logits[0, 5] = 1.0
    one, _ = detections_of(predictions, SMALL, [(96, 128)] * 2, 0.05, 1000, 0.5, 40)
    assert one.labels.tolist() == [0, 1]


@pytest.mark.parametrize("topk", [7, 30, 100])
@pytest.mark.parametrize("images", [1, 3])
def test_of_equal_scores_the_first_in_place_are_taken(images, topk):
    shape = (images, SMALL.num_points)
    boxes = torch.cat([SMALL.points() - 1, SMALL.points() + 1], 1).expand(*shape, 4)
    predictions = Predictions(torch.zeros(*shape, 2), boxes, torch.zeros(shape))
    arguments = predictions, SMALL, [(128, 128)] * images, 0.05, topk, 0.5, 9999
    ends = zip(SMALL.level_offsets, SMALL.level_offsets[1:], strict=False)
    places = torch.cat([torch.arange(2 * start, 2 * end)[:topk] for start, end in ends])
    found = detections_of(*arguments)
    for detections in found:
        assert torch.equal(detections.boxes, boxes[0, places // 2])
        assert torch.equal(detections.labels, places % 2)
    assert_same(found, one_by_one(*arguments))


@pytest.mark.parametrize("topk", [7, 30, 1000])
@pytest.mark.parametrize("equal", [True, False], ids=["equal-scores", "all-scores-differ"])
def test_neighbour_full_of_nan_changes_nothing(equal, topk):
    predictions = crowded_predictions(2, 5, 0, share=0.3)
    if equal:
        predictions.logits[:] = predictions.logits.clamp(-20, 0).round()
        predictions.iou_logits[:] = 0
    predictions.logits[1] = torch.nan
    arguments = 0.05, topk, 0.5, 9999
    together, nothing = detections_of(predictions, SMALL, [(96, 128)] * 2, *arguments)
    (alone,) = detections_of(Predictions(*(tensor[:1] for tensor in predictions)), SMALL, [(96, 128)], *arguments)
    assert_same([together], [alone])
    assert len(alone.scores) > 5 and len(nothing.scores) == 0


@pytest.mark.parametrize("topk", [1000, 7], ids=["all", "top-7"])
def test_nan_is_never_found_and_disturbs_no_other(topk):
    """A NaN in a score or a box has the effect of a score of 0."""
    predictions = crowded_predictions(3, 5, 0)
    unknown = torch.rand(predictions.logits.shape, generator=torch.Generator().manual_seed(1)) < 0.2
    unknown[0, :, 3] = True
    without = predictions._replace(logits=predictions.logits.masked_fill(unknown, -100))
    arguments = SMALL, [(96, 128)] * 3, 0.05, topk, 0.5, 100
    expected = detections_of(without, *arguments)
    for nan in (torch.nan, -torch.nan):  # of either sign
        found = detections_of(predictions._replace(logits=predictions.logits.masked_fill(unknown, nan)), *arguments)
        assert_same(found, expected)
        assert_same(found, one_by_one(without, *arguments))
    no_quality = predictions._replace(iou_logits=predictions.iou_logits.masked_fill(unknown[..., 0], torch.nan))
    silent = predictions._replace(logits=predictions.logits.masked_fill(unknown[..., :1], -100))
    assert_same(detections_of(no_quality, *arguments), detections_of(silent, *arguments))

    broken = predictions._replace(boxes=predictions.boxes.index_fill(1, torch.tensor([17, 30]), torch.nan))
    silent = predictions._replace(logits=predictions.logits.index_fill(1, torch.tensor([17, 30]), -100))
    arguments = SMALL, [(96, 128)] * 3, 0.05, 1000, 0.5, 9999
    assert_same(detections_of(broken, *arguments), detections_of(silent, *arguments))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_are_float32_for_any_type_of_predictions(dtype):
    predictions = Predictions(*(tensor.to(dtype) for tensor in crowded_predictions(3, 5, 0)))
    arguments = SMALL, [(96, 128)] * 3, 0.05, 1000, 0.5, 100
    found = detections_of(predictions, *arguments)
    assert_same(found, one_by_one(Predictions(*(tensor.float() for tensor in predictions)), *arguments))
    assert found[0].scores.dtype == found[0].boxes.dtype == torch.float32


def test_detections_do_not_depend_on_the_batch():
    predictions, sizes = crowded_predictions(3, 5, 0), [(96, 128), (90, 100), (61, 127)]
    predictions.logits[1, :150] = -20
    together = detections_of(predictions, SMALL, sizes, 0.05, 30, 0.5, 100)
    for order in ([0], [1], [2], [2, 0, 1]):
        some = Predictions(*(tensor[order] for tensor in predictions))
        found = detections_of(some, SMALL, [sizes[b] for b in order], 0.05, 30, 0.5, 100)
        assert_same(found, [together[b] for b in order])


def test_detections_carry_no_gradient():
    predictions = Predictions(*(tensor.requires_grad_() for tensor in crowded_predictions(1, 2, 0)))
    (found,) = detections_of(predictions, SMALL, [(96, 128)], 0.05, 1000, 0.5, 100)
    assert not found.boxes.requires_grad and len(found.boxes) > 0


@pytest.mark.gpu
def test_waits_for_a_gpu_do_not_grow_with_the_images():
    def waits(images: int) -> int:
        predictions = Predictions(*(tensor.cuda() for tensor in crowded_predictions(images, 5, 0)))
        arguments = predictions, SMALL, [(96, 128)] * images, 0.05, 1000, 0.5, 100
        return host_syncs(lambda: detections_of(*arguments), predictions.boxes.device)

    assert waits(9) == waits(2) <= 6


@torch.no_grad()
def test_weights_come_back_as_saved(tmp_path):
    detector = tiny_detector(ota=OTAConfig(center_prior="radius", top_q=7)).eval()
    save_weights(tmp_path / "ota.safetensors", detector, {"class_names": ["a", "b", "c"]})
    loaded, metadata = load_weights(tmp_path / "ota.safetensors")
    assert loaded.config == detector.config and metadata["class_names"] == ["a", "b", "c"]
    assert torch.equal(torch.tensor(metadata["normalisation"]["mean"]), detector.mean.flatten())
    images, _ = random_batch([(96, 128)])
    raw, loaded_raw = (d.predict_raw(d.normalise(*pad_images(images)))[0] for d in (detector, loaded))
    assert torch.equal(raw.boxes, loaded_raw.boxes)
    assert [p.name for p in tmp_path.iterdir()] == ["ota.safetensors"]


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet"], ids=["norm-then-act", "norm-act"])
def test_frozen_norms_and_the_head_stay_in_bfloat16(name):
    """A norm that gave float32 would double what everything after it reads and writes."""
    detector = tiny_detector(name, frozen_norm=True).train()
    types = set()
    for module in detector.modules():
        if isinstance(module, FrozenNorm | torch.nn.GroupNorm):
            module.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        predictions, _ = detector.predict_raw(detector.normalise(*pad_images(random_batch([(64, 96)])[0])))
        losses, *_ = detector(*random_batch([(64, 96)]))
    assert types == {torch.bfloat16}
    assert predictions.logits.dtype == torch.bfloat16 and predictions.boxes.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert not [m for m in detector.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet"], ids=["norm-then-act", "norm-act"])
def test_frozen_norms_are_batch_norms_in_evaluation(name):
    """Values and gradients, and nothing of the size of the activations is kept beside what the activation keeps."""
    torch.manual_seed(0)
    body = timm.create_model(name, features_only=True).eval()
    norms = [m for m in body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    frozen = copy.deepcopy(body)
    freeze_norms(frozen)
    assert sum(isinstance(m, FrozenNorm) for m in frozen.modules()) == len(norms) > 5
    kept = []
    for network in (body, frozen):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            features = network(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))[-1]
        (features**2).sum().backward()
        kept.append(sum(t.nbytes for t in {t.data_ptr(): t for t in saved}.values()))
    parameters = dict(body.named_parameters())
    for key, parameter in frozen.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[key].grad, rtol=1e-3, atol=1e-4)
    assert kept[1] < kept[0]


@torch.no_grad()
def test_normalisation_and_frozen_norms_come_from_the_file(tmp_path):
    detector = tiny_detector("resnet10t", frozen_norm=True).train()
    detector.mean.fill_(0.3)
    before = {name: value.clone() for name, value in detector.named_buffers()}
    detector(*random_batch([(64, 96)]))
    assert all(torch.equal(value, before[name]) for name, value in detector.named_buffers())
    save_weights(tmp_path / "ota.safetensors", detector, {})
    loaded, _ = load_weights(tmp_path / "ota.safetensors")
    assert loaded.mean.flatten().tolist() == pytest.approx([0.3] * 3) and loaded.config.frozen_norm


@pytest.mark.parametrize(
    "kind", ["missing", "text", "truncated", "other-tensors", "other-architecture", "newer-assigner"]
)
def test_unusable_weights_are_named(tmp_path, kind):
    path = tmp_path / "ota.safetensors"
    if kind == "text":
        path.write_text("not tensors at all")
    elif kind == "other-tensors":
        save_file({"x": torch.zeros(2)}, path)
    elif kind != "missing":
        save_weights(path, tiny_detector(), {})
        content = path.read_bytes()
        changed = {
            "truncated": content[:-1000],
            "other-architecture": content.replace(b'\\"num_classes\\": 3', b'\\"num_classes\\": 4'),
            "newer-assigner": content.replace(b'\\"top_q\\"', b'\\"top_Q\\"'),
        }
        path.write_bytes(changed[kind])
    expected = {
        "missing": "no weights file", "other-tensors": "no detector", "other-architecture": "does not fit",
        "newer-assigner": "cannot read.*top_Q",
    }  # fmt: skip
    with pytest.raises(UserError, match=expected.get(kind, "no safetensors file, or it is truncated")) as error:
        load_weights(path)
    assert str(path) in str(error.value)


def gradients(detector, images, targets) -> list[torch.Tensor]:
    sum(detector(images, targets)[0].values()).backward()
    return [p.grad for p in detector.parameters()]


def rank_gradients(rank: int, world: int, folder) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.set_num_threads(1)
    images, targets = random_batch([(64, 96)] * 4)
    targets[0] = {name: value[:1] for name, value in targets[0].items()}  # ranks differ in their positives
    detector = DistributedDataParallel(tiny_detector("test_convnext").train())
    grads = gradients(detector, images[2 * rank : 2 * rank + 2], targets[2 * rank : 2 * rank + 2])
    torch.save((grads, images, targets), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_gradients_of_one(tmp_path):
    mp.spawn(rank_gradients, args=(2, tmp_path), nprocs=2)
    (first, images, targets), (second, _, _) = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    expected = gradients(tiny_detector("test_convnext").train(), images, targets)  # a backbone without batch norm
    for one, two, both in zip(first, second, expected, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, both, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("has_triton", [True, False], ids=["triton", "no-triton"])
@pytest.mark.parametrize("assigner", ["ota", "atss"])
def test_what_is_compiled(assigner, device, has_triton, monkeypatch):
    """A whole step only if the assignment is one of Triton's operators; stand-ins for the modules, without a GPU."""

    def module(name: str) -> SimpleNamespace:
        return SimpleNamespace(compile=lambda **settings: compiled.append((name, settings)))

    compiled, settings = [], {"dynamic": False, "mode": "reduce-overhead"}
    stand_in = module("detector")
    stand_in.mean, stand_in.config = SimpleNamespace(device=torch.device(device)), SimpleNamespace(assigner=assigner)
    stand_in.backbone, stand_in.head = module("backbone"), module("head")
    monkeypatch.setattr("model.detector.HAS_TRITON", has_triton)
    text = Detector.compile_training(stand_in, "reduce-overhead")
    if device == "cuda" and has_triton and assigner == "ota":
        assert compiled == [("detector", settings)] and "assignment and losses" in text
    else:
        assert compiled == [("backbone", settings), ("head", settings)] and text == "backbone, neck and head"
