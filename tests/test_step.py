"""The parts of a training step: batches and their order, passes, statistics for the log, and weights to start from."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import train
from data.dataset import batches_from
from errors import UserError
from kernels import Inputs, OTAConfig, PointGrid, assignment_statistics
from kernels.assign_reference import assign_image
from model import Detector, init_weights, save_weights
from model.batch import pack, pad_rows, static_sides
from tests.support.detectors import random_batch, tiny_detector
from tests.support.scenes import make_scene

pytestmark = pytest.mark.usefixtures("one_thread")


# Batches


def test_one_graph_serves_every_number_of_ground_truths():
    """As --compile has it on a GPU: images padded to few sides, and rows that belong to no image, change no loss."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    detector = tiny_detector("test_convnext", image_size=(64, 96)).train().to(device)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(detector, backend=counter, dynamic=False, fullgraph=True)
    for counts in ([3, 2], [2, 0]):
        images, targets = random_batch([(64, 96), (64, 90)], counts)
        targets[0]["ignore"] = torch.tensor([[1.0, 1, 9, 9]]).expand(1 + sum(counts), 4)
        plain, static = pack(images, targets).to(device), pack(images, targets, (64, 96)).to(device)
        assert len(static.gt_labels) == len(static.ignore_boxes) == 64
        static.mark_ragged()
        losses, assignment, _ = compiled(static)
        expected, eager_assignment, _ = detector(plain)
        assert torch.equal(assignment.gt_index, eager_assignment.gt_index)
        torch.testing.assert_close(losses, expected)
    assert counter.frame_count == 1
    assert static_sides(480, 1333) == (480, 672, 832, 992, 1184, 1344)
    assert [len(pad_rows(torch.zeros(rows, 4))) for rows in (0, 64, 65, 129)] == [64, 64, 128, 256]


# Order


@pytest.mark.parametrize("batch_size", [1, 6])
def test_batches_are_a_function_of_seed_and_step(batch_size):
    """An epoch has every image once, except the remainder; at most one of its batches has both orientations."""
    tall = (torch.rand(101, generator=torch.Generator().manual_seed(batch_size)) < 0.3).tolist()
    epoch_steps = 101 // batch_size
    steps = 2 * epoch_steps
    batches = list(batches_from(0, steps, tall, batch_size, 5))
    assert list(batches_from(steps // 3, steps, tall, batch_size, 5)) == batches[steps // 3 :]
    assert list(batches_from(0, steps, tall, batch_size, 6)) != batches
    orders = []
    for epoch, of_epoch in enumerate((batches[:epoch_steps], batches[epoch_steps:])):
        orders.append([i for batch in of_epoch for _, i in batch])
        assert {e for batch in of_epoch for e, _ in batch} == {epoch}
        assert len(set(orders[-1])) == len(orders[-1]) == epoch_steps * batch_size
        assert sum(len({tall[i] for _, i in batch}) > 1 for batch in of_epoch) <= 1
    assert orders[0] != orders[1]
    whole = list(batches_from(0, steps, tall, 4 * batch_size, 5))
    for world in (2, 4):
        ranks = [list(batches_from(0, steps, tall, 4 * batch_size, 5, rank, world)) for rank in range(world)]
        assert [sum(parts, []) for parts in zip(*ranks, strict=True)] == whole


# Passes


def step_gradients(detector: Detector, images: list, targets: list, passes: int) -> tuple[dict, list[Tensor]]:
    """Return loss terms and gradients of a step in so many passes."""
    size = len(images) // passes
    parts = [slice(i, i + size) for i in range(0, len(images), size)]
    terms, _ = train.backward(detector, detector, [pack(images[p], targets[p]) for p in parts], bf16=False)
    return terms, [p.grad for p in detector.parameters()]


@pytest.mark.parametrize("counts", [[1, 6, 0, 3], [0, 0, 0, 0]], ids=["uneven", "no-gt"])
def test_passes_give_the_gradient_of_one_and_the_predictions_of_the_last(counts):
    images, targets = random_batch([(64, 96)] * 4, counts)
    detector = tiny_detector("test_convnext").train()  # a backbone without batch norm
    terms, expected = step_gradients(detector, images, targets, 1)
    detector.zero_grad()
    summed, grads = step_gradients(detector, images, targets, 2)
    torch.testing.assert_close(summed, terms)
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-6)
    halves = [pack(images[i:][:2], targets[i:][:2]) for i in (0, 2)]
    of_two, of_last = (train.backward(detector, detector, passes, bf16=False)[1] for passes in (halves, halves[1:]))
    assert torch.equal(of_two.boxes, of_last.boxes)


# Statistics


def test_statistics_are_those_of_the_dense_plan():
    """The share of background in a point that is nobody's candidate is 1, so only candidate points count."""
    grid, config = PointGrid.for_image((104, 136), (8, 16, 32)), OTAConfig(iterations=7)
    scene = make_scene(grid, (9, 0), 3, seed=2)
    inputs = [x.double() for x in (scene.logits[0], scene.boxes[0], scene.gt_boxes)]
    dense = assign_image(*inputs, scene.gt_labels, grid, config)
    plan = dense["log_plan"].exp()[:, dense["candidates"].any(0)]
    expected = {
        "positives_per_gt": (dense["supplier"] < 9).sum() / 9,
        "mean_k": dense["k"].sum() / 9,
        "one_point": (dense["k"] == 1).sum() / 9,
        "ambiguous": (plan.amax(0) < 0.9 * plan.sum(0)).double().mean(),
        "residual": (plan.sum(0) - 1).abs().mean(),
    }
    found = assignment_statistics(scene, config)[2]
    assert 0 < found.pop("gap") < 1  # proved in test_studies.py
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4, abs=1e-6)
    assert 0 < found["ambiguous"] < 1 and 0 < found["one_point"] < 1
    without_gt = make_scene(PointGrid.for_image((64, 64)), (0, 0), 3)
    assert not any(assignment_statistics(without_gt, OTAConfig())[2].values())


def test_gap_where_no_plan_sends_all_supplies_and_a_logit_is_not_finite():
    """Two boxes around one point. The gap is that of the plans which send half of either, so 0."""
    grid = PointGrid((8,), ((1, 1),))
    inputs = torch.tensor([[[0.0, torch.nan]]]), torch.tensor([[[0.0, 0, 8, 8]]]), torch.tensor([[1.0, 1, 7, 7]] * 2)
    scene = Inputs(*inputs, torch.zeros(2, dtype=torch.int64), torch.tensor([0, 2]), grid)
    assert assignment_statistics(scene, OTAConfig())[2]["gap"].item() == pytest.approx(0, abs=1e-6)


# Weights to start from


@pytest.mark.parametrize("frozen", [False, True], ids=["batch-norm", "frozen-norm"])
def test_init_takes_everything_except_the_class_layer_of_other_classes(tmp_path, frozen):
    path, names = tmp_path / "a.safetensors", ["a", "b", "c"]
    source = tiny_detector("resnet10t", frozen_norm=not frozen)
    source.mean.fill_(0.3)
    save_weights(path, source, {"class_names": names})
    torch.manual_seed(5)
    detector = tiny_detector("resnet10t", frozen_norm=frozen)
    for p in detector.parameters():
        p.data.fill_(7.0)
    others = init_weights(detector, path, ["a", "b", "d"])
    assert "class layer of the head starts afresh" in others and (detector.head.cls.weight == 7).all()
    assert "same 3 classes" in init_weights(detector, path, names)
    assert detector.mean.flatten().tolist() == pytest.approx([0.3] * 3)
    theirs = source.state_dict()
    assert all(torch.equal(v, theirs[n]) for n, v in detector.state_dict().items() if n in theirs)
    with pytest.raises(UserError, match="another network: channels is 32, not 64"):
        init_weights(tiny_detector("resnet10t", channels=64), path, names)
