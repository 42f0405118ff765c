"""The parts of a training step: batches and their order, passes, statistics for the log, and weights to start from."""

import json

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import train
from data import CocoDataset, eval_transform, find_splits, generate_shapes
from data.dataset import SeededDataset, batches_from
from errors import UserError
from kernels import OTAConfig, PointGrid, assignment_statistics
from kernels.assign_reference import assign_image
from model import init_weights, save_weights
from model.batch import pack, pad_rows, padded_side
from tests.support.scenes import make_scene
from tests.support.steps import random_images, step_gradients, tiny_detector

pytestmark = pytest.mark.usefixtures("one_thread")


# Batches


def test_batch_is_ragged_and_padded():
    images, targets = random_images([(40, 70), (64, 33), (10, 10)], [2, 0, 3])
    targets[2]["ignore"] = torch.tensor([[0.0, 0, 5, 5], [1, 1, 2, 2]])
    batch = pack(images, targets)
    assert batch.images.shape == (3, 3, 64, 96) and batch.images.dtype == torch.uint8
    assert batch.sizes.tolist() == [[40, 70], [64, 33], [10, 10]] and batch.gt_offsets.tolist() == [0, 2, 2, 5]
    assert torch.equal(batch.gt_boxes[2:], targets[2]["boxes"]) and batch.ignore_image.tolist() == [2, 2]
    for image, slot in zip(images, batch.images, strict=True):
        height, width = image.shape[1:]
        assert torch.equal(slot[:, :height, :width], image)
        assert not slot[:, height:].any() and not slot[:, :, width:].any()
    mixed = pack([images[0].float() / 255, *images[1:]], targets).images
    torch.testing.assert_close(mixed, batch.images / 255)


def test_static_batch_gives_the_same_losses():
    """Rows are added that belong to no image; of images that are padded further only the padding differs."""
    detector = tiny_detector("test_convnext").train()
    images, targets = random_images([(64, 96), (64, 90)], [3, 0])
    targets[0]["ignore"] = torch.tensor([[0.0, 0, 30, 30]])
    plain, static = pack(images, targets), pack(images, targets, (96, 160))
    assert static.images.shape == (2, 3, 96, 96) and len(static.gt_labels) == len(static.ignore_boxes) == 64
    assert static.gt_labels[3:].unique().tolist() == [-1] and torch.equal(static.gt_offsets, plain.gt_offsets)
    further = detector.normalise(static.images, static.sizes)
    assert torch.equal(further[:, :, :64, :96], detector.normalise(plain.images, plain.sizes))
    assert not further[:, :, 64:].any()
    losses, *others = [
        detector(*batch)[0] for batch in ((plain,), (static._replace(images=plain.images),), (images, targets))
    ]
    assert all(torch.equal(losses[name], other[name]) for name in losses for other in others)
    for rows, padded in ((0, 64), (64, 64), (65, 128), (129, 256)):
        assert len(pad_rows(torch.zeros(rows, 4))) == padded


def test_one_graph_serves_every_number_of_ground_truths():
    """The assignment is an operator, so the whole step to the losses is one graph, as --compile has it on a GPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = tiny_detector(frozen_norm=True).train().to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(detector, backend=counter, dynamic=False, fullgraph=True)
    for counts in ([3, 2], [2, 0]):
        images, targets = random_images([(64, 96)] * 2, counts)
        targets[0]["ignore"] = torch.tensor([[1.0, 1, 9, 9]]).expand(1 + sum(counts), 4)
        batch = pack(images, targets).to(device)
        batch.mark_ragged()
        losses, assignment, _ = compiled(batch)
        sum(losses.values()).backward()
        expected, eager_assignment, _ = detector.losses(batch)
        assert torch.equal(assignment.gt_index, eager_assignment.gt_index)
        torch.testing.assert_close(losses, expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("shortest", "longest", "sides"),
    [(800, 1333, (800, 1088, 1344)), (480, 1333, (480, 672, 832, 992, 1184, 1344)), (512, 512, (512,))],
    ids=["coco", "multi-scale", "square"],
)
def test_static_sides(shortest, longest, sides):
    assert train.static_sides(shortest, longest) == sides
    assert {padded_side(s, sides) for s in range(1, longest + 1)} == set(sides)


# Order


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_batches_are_a_function_of_seed_and_step(batch_size):
    """An epoch has every image once, except the remainder; at most one of its batches has both orientations."""
    tall = (torch.rand(101, generator=torch.Generator().manual_seed(batch_size)) < 0.3).tolist()
    epoch_steps = 101 // batch_size
    steps = 3 * epoch_steps
    batches = list(batches_from(0, steps, tall, batch_size, 5))
    assert list(batches_from(steps // 2, steps, tall, batch_size, 5)) == batches[steps // 2 :]
    assert list(batches_from(0, steps, tall, batch_size, 6)) != batches
    epochs = [[i for batch in batches[e * epoch_steps :][:epoch_steps] for _, i in batch] for e in range(3)]
    assert [e for batch in batches for e, _ in batch] == [e for e in range(3) for _ in epochs[e]]
    assert all(len(set(epoch)) == len(epoch) == epoch_steps * batch_size for epoch in epochs)
    assert epochs[0] != epochs[1]
    for e in range(3):
        assert sum(len({tall[i] for _, i in b}) > 1 for b in batches[e * epoch_steps :][:epoch_steps]) <= 1
    ranks = [list(batches_from(0, steps, tall, 2 * batch_size, 5, rank, 2)) for rank in (0, 1)]
    whole = list(batches_from(0, steps, tall, 2 * batch_size, 5))
    assert [one + two for one, two in zip(*ranks, strict=True)] == whole


def test_images_of_a_rare_orientation_are_seen():
    tall = [i < 3 for i in range(99)]
    seen = [i for batch in batches_from(0, 50 * (99 // 8), tall, 8, 0) for _, i in batch]
    assert min(seen.count(i) for i in range(99)) > 40


def test_random_transforms_are_a_function_of_seed_epoch_and_image():
    class Draws(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return torch.rand(1).item()

    keys = [(epoch, i) for epoch in range(5) for i in range(50)]
    drawn = [SeededDataset(Draws(), 0)[key] for key in keys]
    torch.manual_seed(5)
    assert [SeededDataset(Draws(), 0)[key] for key in reversed(keys)] == drawn[::-1]
    assert len(set(drawn)) == 250 and 0.45 < sum(drawn) / len(drawn) < 0.55
    assert SeededDataset(Draws(), 1)[keys[0]] != drawn[0]


def test_first_images_are_those_with_boxes(tmp_path):
    generate_shapes(tmp_path / "shapes", train_images=6, val_images=0, size_px=64)
    split = find_splits(str(tmp_path / "shapes"))[0]
    content = json.loads(split.annotations.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (1, 3)]
    split.annotations.write_text(json.dumps(content))
    dataset = CocoDataset(split, eval_transform((64, 107)), first=3)
    assert [image["id"] for image in dataset.images] == [2, 4, 5] and len(dataset) == 3
    assert {a["image_id"] for a in dataset.annotations["annotations"]} == {2, 4, 5}
    assert dataset[1][1]["image_id"] == 4 and len(dataset.class_names) == 5


# Passes


@pytest.mark.parametrize("counts", [[1, 6, 0, 3], [0, 0, 2, 2], [0, 0, 0, 0]], ids=["uneven", "one-empty", "no-gt"])
def test_passes_give_the_gradient_of_one(counts):
    images, targets = random_images([(64, 96)] * 4, counts)
    detector = tiny_detector("test_convnext").train()  # a backbone without batch norm
    terms, expected = step_gradients(detector, detector, images, targets, 1)
    for passes in (2, 4):
        detector.zero_grad()
        summed, grads = step_gradients(detector, detector, images, targets, passes)
        torch.testing.assert_close(summed, terms)
        torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-6)


def test_predictions_are_those_of_the_last_pass():
    images, targets = random_images([(64, 96)] * 2, [1, 6])
    detector, alone = tiny_detector().train(), tiny_detector().train()
    passes = [pack(images[i:][:1], targets[i:][:1]) for i in (0, 1)]
    _, of_two = train.backward(detector, detector, passes, bf16=False)
    terms, of_one = train.backward(alone, alone, passes[1:], bf16=False)
    assert torch.equal(of_two.boxes, of_one.boxes) and set(terms) == {"cls", "box", "iou"}
    assert detector.statistics(of_two, passes[1])["mean_k"] == alone.statistics(of_one, passes[1])["mean_k"] > 0


# Statistics


def test_statistics_are_those_of_the_dense_plan():
    """The share of background in a point that is nobody's candidate is 1, so only candidate points count."""
    grid, config = PointGrid.for_image((104, 136), (8, 16, 32)), OTAConfig(iterations=7)
    scene = make_scene(grid, (5, 0, 9), 3, seed=2)
    found = {name: value.item() for name, value in assignment_statistics(scene, config)[2].items()}
    positives = k = ambiguous = residual = points = 0
    for b in (0, 2):
        rows = slice(scene.gt_offsets[b], scene.gt_offsets[b + 1])
        inputs = [x.double() for x in (scene.logits[b], scene.boxes[b], scene.gt_boxes[rows])]
        dense = assign_image(*inputs, scene.gt_labels[rows], grid, config)
        plan = dense["log_plan"].exp()[:, dense["candidates"].any(0)]
        positives += (dense["supplier"] < len(dense["k"])).sum().item()
        k += dense["k"].sum().item()
        ambiguous += (plan.amax(0) < 0.9 * plan.sum(0)).sum().item()
        residual += (plan.sum(0) - 1).abs().sum().item()
        points += plan.shape[1]
    expected = {"positives_per_gt": positives / 14, "mean_k": k / 14}
    expected |= {"ambiguous": ambiguous / points, "residual": residual / points}
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert 0 < found["ambiguous"] < 1 and found["residual"] > 0
    converged = assignment_statistics(scene, OTAConfig(iterations=500))[2]
    assert converged["residual"] < 0.1 * found["residual"]
    without_gt = make_scene(PointGrid.for_image((64, 64)), (0, 0), 3)
    assert not any(assignment_statistics(without_gt, OTAConfig())[2].values())


# Weights to start from


@pytest.mark.parametrize("frozen", [False, True], ids=["batch-norm", "frozen-norm"])
def test_init_takes_everything_if_the_classes_are_the_same(tmp_path, frozen):
    source = tiny_detector("resnet10t", frozen_norm=not frozen)
    source.mean.fill_(0.3)
    save_weights(tmp_path / "a.safetensors", source, {"class_names": ["a", "b", "c"]})
    torch.manual_seed(5)
    detector = tiny_detector("resnet10t", frozen_norm=frozen)
    detector.head.cls.weight.data.fill_(7.0)
    said = init_weights(detector, tmp_path / "a.safetensors", ["a", "b", "c"])
    assert "same 3 classes" in said and detector.mean.flatten().tolist() == pytest.approx([0.3] * 3)
    theirs = source.state_dict()
    assert all(torch.equal(v, theirs[n]) for n, v in detector.state_dict().items() if n in theirs)


def test_init_starts_the_class_layer_afresh_for_other_classes(tmp_path):
    source, detector = tiny_detector(num_classes=2), tiny_detector(num_classes=3)
    for p in source.parameters():
        p.data.fill_(0.25)
    save_weights(tmp_path / "a.safetensors", source, {"class_names": ["a", "b"]})
    before = detector.head.cls.weight.clone()
    said = init_weights(detector, tmp_path / "a.safetensors", ["a", "b", "c"])
    assert "class layer of the head starts afresh" in said
    assert torch.equal(detector.head.cls.weight, before) and (detector.head.box.weight == 0.25).all()
    with pytest.raises(UserError, match="another network: channels is 32, not 64"):
        init_weights(tiny_detector(channels=64), tmp_path / "a.safetensors", ["a", "b", "c"])
