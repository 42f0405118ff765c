"""Batches for the detection losses, and the same losses by torchvision in float64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from kernels import box_loss, focal_loss
from tests.support.backends import device_of

# Of a float32 gradient to its own type, relative; Triton's interpreter cuts bf16 off instead of rounding it.
ROUNDING = {torch.float32: 0, torch.bfloat16: 2**-7, torch.float16: 2**-10}


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
