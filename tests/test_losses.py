"""Detection losses: both backends against torchvision in float64."""

import math
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

import kernels.losses
from kernels import Assignment, box_loss, focal_loss
from kernels.assign import HAS_TRITON
from model.head import Predictions
from model.losses import detection_losses
from tests.support.backends import COMPARED, INTERPRETED, TRITON, assert_equal, device_of
from tests.support.no_waiting import NoWaiting

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Of a float32 gradient to its own type, relative; Triton's interpreter cuts bf16 off instead of rounding it.
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(params=COMPARED)
def backend(request) -> str:
    if request.param == "triton" and not HAS_TRITON:
        pytest.skip("Triton is not installed")
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


class Batch(NamedTuple):
    """Arguments of the losses."""

    logits: Tensor
    boxes: Tensor
    iou_logits: Tensor
    gt_index: Tensor
    iou: Tensor
    gt_boxes: Tensor
    gt_labels: Tensor
    ignored: Tensor | None

    def cast(self, dtype: torch.dtype) -> "Batch":
        """Predictions rounded to a type."""
        return self._replace(**{name: getattr(self, name).to(dtype) for name in ("logits", "boxes", "iou_logits")})

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if tensor is None else tensor.to(device) for tensor in self))


class Result(NamedTuple):
    focal: Tensor
    giou: Tensor
    entropy: Tensor
    by_logits: Tensor
    by_boxes: Tensor
    by_iou_logits: Tensor


def make_batch(B: int, N: int, C: int, G: int, *, matched: float = 0.4, ignored: bool = False, seed: int = 0) -> Batch:
    """Random predictions; a share of the points is matched, and each of those overlaps its box more or less."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    corner, size = 90 * rand(G, 2), 2 + 40 * rand(G, 2)
    gt_boxes = torch.cat([corner, corner + size], 1)
    gt_index = torch.randint(0, max(G, 1), (B, N), generator=generator)
    gt_index = torch.where(rand(B, N) < (matched if G else 0), gt_index, -1)
    near = F.pad(gt_boxes, (0, 0, 0, 1))[gt_index] + 12 * rand(B, N, 4) - 6
    boxes = torch.cat([near[..., :2], torch.maximum(near[..., 2:], near[..., :2])], -1)  # some without area
    logits = 4 * torch.randn(B, N, C, generator=generator) - 2
    iou_logits = 3 * torch.randn(B, N, generator=generator)
    gt_labels = torch.randint(0, max(C, 1), (G,), generator=generator)
    return Batch(
        logits, boxes, iou_logits, gt_index, rand(B, N), gt_boxes, gt_labels, rand(B, N) < 0.5 if ignored else None
    )


def run(batch: Batch, backend: str) -> Result:
    """Sums and gradients, each loss with a factor of its own behind it; on the device that the backend is tested on."""
    batch = batch.to(device_of(backend))
    predictions = [tensor.detach().requires_grad_() for tensor in (batch.logits, batch.boxes, batch.iou_logits)]
    logits, boxes, iou_logits = predictions
    focal = focal_loss(logits, batch.gt_index, batch.gt_labels, batch.ignored, backend=backend)
    giou, entropy = box_loss(boxes, iou_logits, batch.gt_index, batch.iou, batch.gt_boxes, backend=backend)
    gradients = torch.autograd.grad(0.5 * focal + 0.3 * giou + 0.7 * entropy, predictions)
    return Result(*(tensor.detach().cpu() for tensor in (focal, giou, entropy, *gradients)))


def run_torchvision(batch: Batch) -> Result:
    """`run` in float64, with one-hot targets and the losses of torchvision and torch."""
    predictions = [tensor.double().requires_grad_() for tensor in (batch.logits, batch.boxes, batch.iou_logits)]
    logits, boxes, iou_logits = predictions
    matched = (batch.gt_index >= 0) & (batch.gt_index < len(batch.gt_boxes))
    row, targets = batch.gt_index[matched], torch.zeros_like(logits)
    targets[matched] = (batch.gt_labels[row, None] == torch.arange(logits.shape[2])).double()
    learns = torch.ones_like(matched) if batch.ignored is None else matched | ~batch.ignored
    focal = sigmoid_focal_loss(logits[learns], targets[learns], reduction="sum")
    giou = generalized_box_iou_loss(boxes[matched], batch.gt_boxes[row].double(), reduction="sum")
    iou = batch.iou[matched].double()
    entropy = F.binary_cross_entropy_with_logits(iou_logits[matched], iou, reduction="sum")
    gradients = torch.autograd.grad(0.5 * focal + 0.3 * giou + 0.7 * entropy, predictions)
    return Result(*(tensor.detach() for tensor in (focal, giou, entropy, *gradients)))


def assert_parity(batch: Batch, backend: str) -> Result:
    """Values to the last digits of float32, gradients to those of their type."""
    result, expected = run(batch, backend), run_torchvision(batch)
    for name in ("focal", "giou", "entropy"):
        value = getattr(result, name)
        assert value.dtype == torch.float32 and value.shape == ()
        torch.testing.assert_close(value.double(), getattr(expected, name), rtol=2e-6, atol=1e-6)
    for name, prediction in (("logits", batch.logits), ("boxes", batch.boxes), ("iou_logits", batch.iou_logits)):
        gradient, exact = getattr(result, f"by_{name}"), getattr(expected, f"by_{name}")
        assert gradient.dtype == prediction.dtype and gradient.is_contiguous()
        # Where terms cancel it has their digits: those of sigmoid and IoU for the IoU's logit, and for a box those of
        # its largest side, or of 1/1000 a px where they all cancel.
        box_terms = exact.abs().amax(-1, keepdim=True).clamp(min=1e-3)
        terms = {"logits": exact.abs(), "boxes": box_terms, "iou_logits": 1}[name]
        smallest = torch.finfo(prediction.dtype).smallest_normal
        wrong = (gradient.double() - exact).abs() > ROUNDING[prediction.dtype] * exact.abs() + 2e-6 * terms + smallest
        assert not wrong.any(), (
            f"{name} at {wrong.nonzero()[:8].tolist()}: {gradient[wrong][:8]} instead of {exact[wrong][:8]}"
        )
    return result


BATCHES = {
    "no-gt": make_batch(2, 17, 3, 0),
    "no-gt-ignored": make_batch(2, 17, 3, 0, ignored=True),
    "G1": make_batch(1, 33, 3, 1),
    "G7-N1023": make_batch(1, 1023, 3, 7),
    "4001-matched": make_batch(1, 4001, 1, 50, matched=1),
    "C80": make_batch(2, 65, 80, 5, ignored=True),
    "C91": make_batch(1, 70, 91, 5),
    "one-class": make_batch(3, 129, 1, 4),
    "one-point": make_batch(1, 1, 5, 2, matched=1),
    "all-matched": make_batch(2, 31, 4, 3, matched=1),
    "ignored": make_batch(2, 31, 4, 3, ignored=True),
    "ignored-all-matched": make_batch(2, 31, 4, 3, matched=1, ignored=True),
}


@pytest.mark.parametrize("name", BATCHES)
def test_parity(name, backend):
    assert_parity(BATCHES[name], backend)


def test_every_float_type_is_loaded_as_it_is(backend):
    for dtype in FLOATS:
        assert_parity(make_batch(2, 53, 7, 5, ignored=True, seed=1).cast(dtype), backend)


def test_empty_batches(backend):
    for dtype, shape in product(FLOATS, ((0, 9, 3, 2), (2, 0, 3, 2), (2, 9, 0, 2))):
        result = run(make_batch(*shape)._replace(gt_index=torch.full(shape[:2], -1)).cast(dtype), backend)
        assert result.focal == 0 and result.giou == 0 and result.entropy == 0
        assert result.by_logits.shape == shape[:3] and not result.by_boxes.any()


EXTREME = (0.0, 1e-3, 15.0, 17.5, 20.0, 87.0, 100.0, 1e4)


def test_extreme_logits(backend):
    """Each value as background and as either class."""
    values = torch.tensor([*EXTREME, *(-x for x in EXTREME)])
    batch = make_batch(1, 3 * len(values), 2, 2, seed=2)
    gt_index = torch.tensor([-1, 0, 1]).repeat(len(values))[None]
    logits = values.repeat_interleave(3)[None, :, None].expand(1, -1, 2)
    batch = batch._replace(logits=logits, iou_logits=logits[..., 0], gt_index=gt_index, gt_labels=torch.tensor([0, 1]))
    for dtype in FLOATS:
        result = assert_parity(batch.cast(dtype), backend)
        assert all(tensor.isfinite().all() for tensor in result)


def test_every_digit_of_a_small_loss(backend):
    """One logit at a time: in a sum, what small terms lack does not show."""
    for value, matched in product((-12.0, -8.0, -3.0, -0.1, 0.1, 3.0, 8.0, 12.0), (-1, 0)):
        batch = make_batch(1, 1, 1, 1)
        batch = batch._replace(logits=torch.full((1, 1, 1), value), gt_index=torch.full((1, 1), matched))
        result, exact = run(batch, backend), run_torchvision(batch)
        torch.testing.assert_close(result.focal.double(), exact.focal, rtol=2e-6, atol=0)
        torch.testing.assert_close(result.by_logits.double(), exact.by_logits, rtol=2e-6, atol=0)


def test_label_out_of_range_is_no_class(backend):
    for label in (-1, 3, -2, 2**40, -(2**40)):
        batch = make_batch(2, 31, 3, 3)
        batch.gt_labels[1] = label
        unmatched = batch._replace(gt_index=torch.where(batch.gt_index == 1, -1, batch.gt_index))
        result, expected = run(batch, backend), run(unmatched, backend)
        assert torch.equal(result.focal, expected.focal) and torch.equal(result.by_logits, expected.by_logits)


def test_index_out_of_range_is_background(backend):
    for G, index in product((0, 3), (3, -7, 2**40)):
        batch = make_batch(2, 31, 3, G, ignored=True)
        batch.gt_index[:, ::4] = -1
        strange = batch._replace(gt_index=batch.gt_index.clone())
        strange.gt_index[:, ::4] = index
        assert_equal(run(strange, backend), run(batch, backend))


def test_ignored_points_take_no_part(backend):
    """Whatever they predict; their gradient is exactly 0. Nor do boxes and IoU logits of unmatched points."""
    batch = make_batch(2, 31, 3, 4, ignored=True)
    unmatched = batch.gt_index < 0
    out = batch.ignored & unmatched
    for value in (math.nan, math.inf, -math.inf, 1e4):
        strange = batch._replace(
            logits=torch.where(out[..., None], value, batch.logits),
            boxes=torch.where(unmatched[..., None], value, batch.boxes),
            iou_logits=torch.where(unmatched, value, batch.iou_logits),
        )
        result = run(strange, backend)
        assert_equal(result, run(batch, backend))
        assert not result.by_logits[out].any() and result.by_logits[~out].all()
        assert not result.by_boxes[unmatched].any() and not result.by_iou_logits[unmatched].any()


BOXES = {
    "identical": (10, 20, 30, 50),
    "zero-width": (15, 20, 15, 40),
    "zero-height": (15, 20, 25, 20),
    "point-inside": (15, 30, 15, 30),
    "point-outside": (90, 90, 90, 90),
    "point-on-corner": (10, 20, 10, 20),
    "touching": (30, 20, 50, 50),
    "far": (1e4, 1e4, 2e4, 2e4),
    "around": (0, 0, 100, 100),
    "within": (12, 24, 28, 44),
    "three-sides-equal": (10, 20, 30, 45),
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
    """Transposed, expanded, every other column: what a caller may have."""
    batch = make_batch(3, 37, 5, 4, ignored=True)
    strided = Batch(
        batch.logits.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([batch.boxes, batch.boxes + 1], -1)[..., 0],
        batch.iou_logits.T.contiguous().T,
        batch.gt_index.T.contiguous().T,
        batch.iou.repeat_interleave(2, 1)[:, ::2],
        batch.gt_boxes.T.contiguous().T,
        batch.gt_labels.repeat_interleave(2)[::2],
        batch.ignored.T.contiguous().T,
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    assert_equal(run(strided, backend), run(batch, backend))
    expanded = batch._replace(ignored=batch.ignored[:1].expand(3, -1), gt_index=batch.gt_index[:1].expand(3, -1))
    spelled_out = expanded._replace(ignored=expanded.ignored.clone(), gt_index=expanded.gt_index.clone())
    assert_equal(run(expanded, backend), run(spelled_out, backend))


def test_same_bits_every_time_and_under_another_default_type(backend):
    batch = make_batch(2, 301, 11, 9, ignored=True)
    expected = run(batch, backend)
    assert [tensor.dtype for tensor in expected] == [torch.float32] * len(Result._fields)
    assert_equal(run(batch, backend), expected)
    torch.set_default_dtype(torch.float64)
    try:
        assert_equal(run(batch, backend), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradients_go_to_the_predictions_of_a_loss(backend):
    """To boxes of GIoU, to IoU logits of the entropy, never to targets."""
    batch = make_batch(1, 19, 2, 3).to(device_of(backend))
    leaves = [tensor.requires_grad_() for tensor in (batch.boxes, batch.iou_logits, batch.iou, batch.gt_boxes)]
    losses = box_loss(*leaves[:2], batch.gt_index, *leaves[2:], backend=backend)
    for loss, reached in zip(losses, ([True, False, False, False], [False, True, False, False]), strict=True):
        gradients = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == reached


def test_losses_can_be_changed_in_place(backend):
    batch = make_batch(1, 19, 2, 3).to(device_of(backend))
    predictions = logits, boxes, iou_logits = [tensor.requires_grad_() for tensor in batch[:3]]
    focal = focal_loss(logits, batch.gt_index, batch.gt_labels, backend=backend)
    giou, entropy = box_loss(boxes, iou_logits, batch.gt_index, batch.iou, batch.gt_boxes, backend=backend)
    for loss, factor in ((focal, 0.5), (giou, 0.3), (entropy, 0.7)):
        loss *= factor
    focal += giou + entropy
    for a, b in zip(torch.autograd.grad(focal, predictions), run(batch, backend)[3:], strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_float64_is_computed_in_float64():
    for ignored in (False, True):
        batch = make_batch(2, 47, 5, 6, ignored=ignored)
        for a, b in zip(run(batch.cast(torch.float64), "torch"), run_torchvision(batch), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_losses_by_hand(backend):
    """-1/4 (1/2)^2 log 1/2 for the class, -3/4 (1/2)^2 log 1/2 for the other one: log(2) / 4 together."""
    device = device_of(backend)
    logits, label, gt_index = torch.zeros(1, 1, 2), torch.ones(1).long(), torch.zeros(1, 1).long()
    focal = focal_loss(logits.to(device), gt_index.to(device), label.to(device), backend=backend)
    torch.testing.assert_close(focal.cpu(), torch.tensor(2.0).log() / 4)
    box, gt_box = torch.tensor([[[0.0, 0, 2, 2]]]), torch.tensor([[1.0, 1, 3, 3]])  # IoU 1/7, hull 9, union 7
    inputs = (box, torch.zeros(1, 1), gt_index, torch.ones(1, 1), gt_box)
    giou, entropy = box_loss(*(tensor.to(device) for tensor in inputs), backend=backend)
    torch.testing.assert_close(giou.cpu(), torch.tensor(1 - 1 / 7 + 2 / 9))
    torch.testing.assert_close(entropy.cpu(), torch.tensor(2.0).log())


def test_nothing_in_detection_losses_waits_for_a_device(backend, monkeypatch):
    monkeypatch.setattr(kernels.losses, "choose_backend", lambda *_: backend)
    for ignored in (False, True):
        batch = make_batch(2, 61, 7, 5, ignored=ignored).to(device_of(backend))
        predictions = Predictions(*(tensor.requires_grad_() for tensor in batch[:3]))
        match = Assignment(batch.gt_index, batch.iou, torch.zeros(5, dtype=torch.int32))
        with NoWaiting():
            losses = detection_losses(predictions, match, batch.gt_boxes, batch.gt_labels, batch.ignored)
            sum(losses.values()).backward()
        assert all(tensor.grad.isfinite().all() for tensor in predictions)


BAD_INPUTS = {
    "logits-of-2-dimensions": (dict(logits=torch.zeros(4, 3)), "logits has shape"),
    "index-of-other-batch": (dict(gt_index=torch.zeros(2, 4).long()), "gt_index has shape"),
    "ignored-of-other-batch": (dict(ignored=torch.zeros(2, 4).bool()), "ignored has shape"),
    "labels-of-2-dimensions": (dict(gt_labels=torch.zeros(1, 2).long()), "gt_labels has shape"),
    "boxes-of-5": (dict(boxes=torch.zeros(1, 4, 5)), "boxes has shape"),
    "iou-of-other-batch": (dict(iou=torch.zeros(2, 4)), "iou has shape"),
    "gt-boxes-of-5": (dict(gt_boxes=torch.zeros(1, 5)), "gt_boxes has shape"),
    "gt-boxes-of-no-dimension": (dict(gt_boxes=torch.zeros(())), "gt_boxes has shape"),
    "int-logits": (dict(logits=torch.zeros(1, 4, 3).long()), "logits is torch.int64, expected torch.float"),
    "int-boxes": (dict(boxes=torch.zeros(1, 4, 4).int()), "boxes is torch.int32, expected torch.float32"),
    "int32-index": (dict(gt_index=torch.zeros(1, 4).int()), "gt_index is torch.int32, expected torch.int64"),
    "float-labels": (dict(gt_labels=torch.zeros(2)), "gt_labels is torch.float32, expected torch.int64"),
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


@pytest.mark.parametrize("backend", [TRITON])
def test_operators_are_registered_as_torch_wants_them(backend):
    box_ops = pytest.importorskip("kernels.box_loss_triton")
    focal_ops = pytest.importorskip("kernels.focal_triton")
    for strided, ignored in ((False, True), (True, False)):
        batch = make_batch(2, 9, 3, 4, ignored=ignored).to(device_of(backend))
        logits, boxes = batch.logits, batch.boxes
        if strided:
            logits, boxes = (tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (logits, boxes))
        rest = (batch.gt_index, batch.iou, batch.gt_boxes)
        focal = (batch.gt_index, batch.gt_labels, batch.ignored)
        upstream = torch.tensor([0.3, 0.7], device=logits.device)
        torch.library.opcheck(focal_ops.focal_gradient, (upstream[0], logits, *focal))
        torch.library.opcheck(box_ops.box_gradient, (upstream, boxes, batch.iou_logits, *rest))
        logits, boxes, iou_logits = (x.detach().requires_grad_() for x in (logits, boxes, batch.iou_logits))
        torch.library.opcheck(focal_ops.focal_sum, (logits, *focal))
        torch.library.opcheck(box_ops.box_sums, (boxes, iou_logits, *rest))


def scaled(batch: Batch, backend: str) -> Tensor:
    focal = focal_loss(batch.logits * 1.5, batch.gt_index, batch.gt_labels, batch.ignored, backend=backend)
    giou, entropy = box_loss(
        batch.boxes * 1.1, batch.iou_logits * 2, batch.gt_index, batch.iou, batch.gt_boxes, backend=backend
    )
    return focal + 2 * giou + 3 * entropy


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_torch_compile_keeps_them_in_one_graph(compiler, backend):
    """The second batch has other numbers of images and ground truths."""
    compiled = torch.compile(scaled, fullgraph=True, backend=compiler)
    for B, G in ((2, 5), (3, 8)):
        batch = make_batch(B, 37, 7, G, ignored=True).to(device_of("triton"))
        leaves = [tensor.requires_grad_() for tensor in batch[:3]]
        losses = compiled(batch, backend), scaled(batch, backend)
        found, expected = ((loss, *torch.autograd.grad(loss, leaves)) for loss in losses)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)  # a compiler may have another sigmoid


def full_size(dtype: torch.dtype = torch.float32) -> Batch:
    return make_batch(16, 22_400, 80, 117, matched=0.01, ignored=True).cast(dtype).to(device_of("triton"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
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
    batches = [make_batch(2, 517, 11, 9, ignored=True, seed=seed).to(device_of("triton")) for seed in range(3)]
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
