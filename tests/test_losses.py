"""Detection losses: both backends against torchvision in float64, and in what runs them."""

import math

import pytest
import torch
from torch import Tensor

from kernels import box_loss, focal_loss
from tests.support.backends import COMPARED, GPU_OR_INTERPRETER, NEEDS_TRITON, assert_equal, device_of
from tests.support.losses import Batch, assert_parity, make_batch, run, run_torchvision

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=COMPARED)
def backend(request) -> str:
    return request.param


BATCHES = {
    "no-gt": make_batch(2, 17, 3, 0),
    "no-image": make_batch(0, 9, 3, 2),
    "G1": make_batch(1, 33, 3, 1),
    "4001-matched": make_batch(1, 4001, 1, 50, matched=1),
    "C91": make_batch(1, 70, 91, 5),
    "ignored": make_batch(2, 31, 4, 3, ignored=True),
}


@pytest.mark.parametrize("name", BATCHES)
def test_parity(name, backend):
    assert_parity(BATCHES[name], backend)


def test_extreme_logits(backend):
    """Each value as background and as either class."""
    values = torch.tensor([0.0, -0.1, 8.0, -8.0, 17.5, -17.5, 87.0, -87.0, 1e4, -1e4])
    batch = make_batch(1, 3 * len(values), 2, 2, seed=2)
    gt_index = torch.tensor([-1, 0, 1]).repeat(len(values))[None]
    logits = values.repeat_interleave(3)[None, :, None].expand(1, -1, 2)
    batch = batch._replace(logits=logits, iou_logits=logits[..., 0], gt_index=gt_index, gt_labels=torch.tensor([0, 1]))
    for dtype in FLOATS:
        result = assert_parity(batch.cast(dtype), backend)
        assert all(tensor.isfinite().all() for tensor in result)


def test_index_or_label_out_of_range(backend):
    """Such an index is background; a point that is matched to a row with such a label has no class."""
    batch = make_batch(2, 31, 3, 3, ignored=True)
    batch.gt_index[:, ::4] = -1
    strange = batch._replace(gt_index=batch.gt_index.clone())
    strange.gt_index[:, ::4] = torch.tensor([3, -7, 2**40, 99]).repeat(2)
    assert_equal(run(strange, backend), run(batch, backend))
    for label in (-1, 3, 2**40):
        batch = make_batch(2, 31, 3, 3)
        batch.gt_labels[1] = label
        unmatched = batch._replace(gt_index=torch.where(batch.gt_index == 1, -1, batch.gt_index))
        result, expected = run(batch, backend), run(unmatched, backend)
        assert torch.equal(result.focal, expected.focal) and torch.equal(result.by_logits, expected.by_logits)


def test_ignored_points_take_no_part(backend):
    """Whatever they predict; their gradient is exactly 0. Nor do boxes and IoU logits of unmatched points."""
    batch = make_batch(2, 31, 3, 4, ignored=True)
    unmatched = batch.gt_index < 0
    out = batch.ignored & unmatched
    for value in (math.nan, math.inf):
        strange = batch._replace(
            logits=torch.where(out[..., None], value, batch.logits),
            boxes=torch.where(unmatched[..., None], value, batch.boxes),
            iou_logits=torch.where(unmatched, value, batch.iou_logits),
        )
        result = run(strange, backend)
        assert_equal(result, run(batch, backend))
        assert not result.by_logits[out].any() and result.by_logits[~out].all()
        assert not result.by_boxes[unmatched].any() and not result.by_iou_logits[unmatched].any()


BOXES = {  # predicted for the box (10, 20, 30, 50)
    "identical": (10, 20, 30, 50),
    "zero-width": (15, 20, 15, 40),
    "point-on-corner": (10, 20, 10, 20),
    "touching": (30, 20, 50, 50),
    "turned-round": (30, 50, 10, 20),
    "huge": (-1e9, -1e9, 1e9, 1e9),
}


@pytest.mark.parametrize("gt_box", [(10, 20, 30, 50), (15, 30, 15, 30)], ids=["gt", "gt-without-area"])
def test_special_boxes(gt_box, backend):
    """One at a time, so that every sum is held to its own digits."""
    for box in BOXES.values():
        batch = make_batch(1, 1, 2, 1, matched=1)
        boxes, gt_boxes = torch.tensor([[box]], dtype=torch.float32), torch.tensor([gt_box], dtype=torch.float32)
        result = assert_parity(batch._replace(boxes=boxes, gt_boxes=gt_boxes), backend)
        assert result.by_boxes.isfinite().all()


def test_strided_inputs_and_the_same_bits_every_time(backend):
    """Every other entry of a larger tensor; one row expanded over all images."""
    batch = make_batch(3, 37, 5, 4, ignored=True)
    assert_equal(run(batch, backend), run(batch, backend))
    strided = Batch(*(torch.stack([tensor, tensor], -1)[..., 0] for tensor in batch))
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_equal(run(strided, backend), run(batch, backend))
    expanded = batch._replace(ignored=batch.ignored[:1].expand(3, -1), gt_index=batch.gt_index[:1].expand(3, -1))
    assert_equal(run(expanded, backend), run(Batch(*(tensor.clone() for tensor in expanded)), backend))


def test_gradients_go_to_the_predictions_of_a_loss(backend):
    """Those of GIoU to boxes, those of the entropy to IoU logits, none to targets."""
    batch = make_batch(1, 19, 2, 3).to(device_of(backend))
    leaves = [tensor.requires_grad_() for tensor in (batch.boxes, batch.iou_logits, batch.iou, batch.gt_boxes)]
    losses = box_loss(*leaves[:2], batch.gt_index, *leaves[2:], backend=backend)
    for loss, reached in zip(losses, ([True, False, False, False], [False, True, False, False]), strict=True):
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == reached


def test_float64_is_computed_in_float64():
    batch = make_batch(2, 47, 5, 6, ignored=True)
    result, expected = run(batch.cast(torch.float64), "torch"), run_torchvision(batch)
    torch.testing.assert_close(tuple(result), tuple(expected), rtol=1e-9, atol=1e-12)


BAD_INPUTS = {
    "logits-of-2-dimensions": (dict(logits=torch.zeros(4, 3)), "logits has shape"),
    "index-of-other-batch": (dict(gt_index=torch.zeros(2, 4).long()), "gt_index has shape"),
    "ignored-of-other-batch": (dict(ignored=torch.zeros(2, 4).bool()), "ignored has shape"),
    "boxes-of-5": (dict(boxes=torch.zeros(1, 4, 5)), "boxes has shape"),
    "gt-boxes-of-5": (dict(gt_boxes=torch.zeros(1, 5)), "gt_boxes has shape"),
    "int-logits": (dict(logits=torch.zeros(1, 4, 3).long()), "logits is torch.int64, expected torch.float"),
    "int32-index": (dict(gt_index=torch.zeros(1, 4).int()), "gt_index is torch.int32, expected torch.int64"),
    "int32-labels": (dict(gt_labels=torch.zeros(2).int()), "gt_labels is torch.int32, expected torch.int64"),
    "int-ignored": (dict(ignored=torch.zeros(1, 4).long()), "ignored is torch.int64, expected torch.bool"),
}


def test_bad_inputs():
    """TypeError for a wrong type, ValueError for everything else."""
    for tensors, message in BAD_INPUTS.values():
        b = make_batch(1, 4, 3, 2)._replace(**tensors)
        with pytest.raises(TypeError if " is torch." in message else ValueError, match=message):
            focal_loss(b.logits, b.gt_index, b.gt_labels, b.ignored)
            box_loss(b.boxes, b.iou_logits, b.gt_index, b.iou, b.gt_boxes)
    with pytest.raises(ValueError, match="backend is 'cuda', choose from torch, triton"):
        focal_loss(b.logits, b.gt_index, b.gt_labels, backend="cuda")


def scaled(batch: Batch, backend: str) -> Tensor:
    focal = focal_loss(batch.logits * 1.5, batch.gt_index, batch.gt_labels, batch.ignored, backend=backend)
    giou, entropy = box_loss(
        batch.boxes * 1.1, batch.iou_logits * 2, batch.gt_index, batch.iou, batch.gt_boxes, backend=backend
    )
    return focal + 2 * giou + 3 * entropy


@NEEDS_TRITON
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_torch_compile_keeps_them_in_one_graph(compiler):
    """The second batch has other numbers of images and ground truths."""
    compiled = torch.compile(scaled, fullgraph=True, backend=compiler)
    for B, G in ((2, 5), (3, 8)):
        batch = make_batch(B, 37, 7, G, ignored=True).to(GPU_OR_INTERPRETER)
        leaves = [tensor.requires_grad_() for tensor in batch[:3]]
        losses = compiled(batch, "triton"), scaled(batch, "triton")
        found, expected = ((loss, *torch.autograd.grad(loss, leaves)) for loss in losses)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)  # a compiler may have another sigmoid


def full_size(dtype: torch.dtype = torch.float32) -> Batch:
    return make_batch(16, 22_400, 80, 117, matched=0.01, ignored=True).cast(dtype).to(GPU_OR_INTERPRETER)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_full_size(dtype):
    """Parity, and the same bits ten times."""
    batch = full_size(dtype)
    first = assert_parity(batch, "triton")
    for _ in range(9):
        assert_equal(run(batch, "triton"), first)


@pytest.mark.gpu
def test_no_synchronisation(backend):
    batch = full_size()
    leaves = [tensor.requires_grad_() for tensor in batch[:3]]
    torch.autograd.grad(scaled(batch, backend), leaves)
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(scaled(batch, backend), leaves)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graph_with_changed_inputs(backend):
    """A replay sees whatever has been copied into the inputs."""
    batches = [make_batch(2, 517, 11, 9, ignored=True, seed=seed).to(GPU_OR_INTERPRETER) for seed in range(3)]
    static = Batch(*(tensor.clone() for tensor in batches[0]))
    static_leaves = [tensor.requires_grad_() for tensor in static[:3]]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.autograd.grad(scaled(static, backend), static_leaves)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.autograd.grad(scaled(static, backend), static_leaves)
    for batch in (*batches, *reversed(batches)):
        with torch.no_grad():
            for target, source in zip(static, batch, strict=True):
                target.copy_(source)
        graph.replay()
        fresh = Batch(*(tensor.clone() for tensor in batch))
        leaves = [tensor.requires_grad_() for tensor in fresh[:3]]
        for a, b in zip(captured, torch.autograd.grad(scaled(fresh, backend), leaves), strict=True):
            assert torch.equal(a, b)


@pytest.mark.gpu
def test_memory_is_the_gradient():
    batch = full_size()
    logits = batch.logits.requires_grad_()

    def gradient() -> Tensor:
        loss = focal_loss(logits, batch.gt_index, batch.gt_labels, batch.ignored, backend="triton")
        return torch.autograd.grad(loss, logits)[0]

    gradient()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradient()
    assert torch.cuda.max_memory_allocated() - before <= logits.nbytes + 2**20
