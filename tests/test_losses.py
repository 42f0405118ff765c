"""Detection losses: both backends against torchvision in float64."""

import math

import numpy as np
import pytest
import torch

from kernels import box_loss, focal_loss
from kernels.assign import HAS_TRITON
from tests.support.backends import COMPARED, INTERPRETED, assert_equal, device_of
from tests.support.losses import Batch, Result, assert_parity, make_batch, run, run_torchvision

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=COMPARED)
def backend(request) -> str:
    return request.param


@pytest.fixture(autouse=True, scope="module")
def rounding_of_a_gpu():
    """Triton's interpreter rounds exp and / like NumPy; here as badly as a GPU may, where they are a product rounded
    before ex2.approx, and div.full, which may be off by two units.
    """
    if not (INTERPRETED and HAS_TRITON):
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder

    def exp(builder, x):
        return builder.unary_op(x, lambda data: np.exp2(data * data.dtype.type(math.log2(math.e))))

    def divide(builder, x, y):
        return builder.binary_op(x, y, lambda a, b: a / b * b.dtype.type(1 + 2**-22))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_exp", exp)
        patch.setattr(InterpreterBuilder, "create_fdiv", divide)
        yield


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


def test_every_float_type_is_loaded_as_it_is(backend):
    for dtype in FLOATS:
        assert_parity(make_batch(2, 53, 7, 5, ignored=True, seed=1).cast(dtype), backend)


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


def test_strided_inputs(backend):
    """Every other entry of a larger tensor; one row expanded over all images."""
    batch = make_batch(3, 37, 5, 4, ignored=True)
    strided = Batch(*(torch.stack([tensor, tensor], -1)[..., 0] for tensor in batch))
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_equal(run(strided, backend), run(batch, backend))
    expanded = batch._replace(ignored=batch.ignored[:1].expand(3, -1), gt_index=batch.gt_index[:1].expand(3, -1))
    assert_equal(run(expanded, backend), run(Batch(*(tensor.clone() for tensor in expanded)), backend))


def test_same_bits_every_time(backend):
    batch = make_batch(2, 301, 11, 9, ignored=True)
    expected = run(batch, backend)
    assert [tensor.dtype for tensor in expected] == [torch.float32] * len(Result._fields)
    assert_equal(run(batch, backend), expected)


def test_gradients_go_to_the_predictions_of_a_loss(backend):
    """To boxes of GIoU, to IoU logits of the entropy, never to targets."""
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
