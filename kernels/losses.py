"""focal_loss and box_loss: the public functions of the detection losses, and the choice of their backend.

Both consume what ota_assign returns, sum over all points of a batch, and leave normalisation to the caller.
"""

import torch
from torch import Tensor

from .assign import HAS_TRITON, choose_backend
from .losses_reference import box_loss_reference, focal_loss_reference
from .losses_torch import box_loss_torch, focal_loss_torch

box_loss_triton = focal_loss_triton = None
if HAS_TRITON:
    from .box_loss_triton import box_loss_triton
    from .focal_triton import focal_loss_triton

FOCAL_BACKENDS = {"reference": focal_loss_reference, "torch": focal_loss_torch, "triton": focal_loss_triton}
BOX_BACKENDS = {"reference": box_loss_reference, "torch": box_loss_torch, "triton": box_loss_triton}


def focal_loss(
    logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Sigmoid focal loss (Lin et al., ICCV 2017; alpha 0.25, gamma 2), summed over points and classes: a scalar.

    logits     (B, N, C)  raw class logits, before the sigmoid
    gt_index   (B, N)     int64, row of the matched ground truth; any other number, such as -1, is background
    gt_labels  (G,)       int64, 0..C-1; with any other number a point that is matched to the row has no class
    ignored    (B, N)     bool, points that take no part unless they are matched

    No target is spelled out: contiguous logits (others are copied first) are read once for the loss, read again and
    their gradient written once for the gradient, and nothing of the size of the logits is kept in between. `backend` is
    "reference" (one-hot targets, literal, float64-capable), "torch" (any device; on a CPU in chunks that stay in its
    caches) or "triton" (deterministic); None is "triton" on an NVIDIA or AMD GPU, "torch" elsewhere. The last two never
    wait for the device, compute in float32 whatever the logits are, and can be differentiated once.

    Raises ValueError for shapes, devices or a backend that do not fit, TypeError for types.
    """
    backend = choose_backend(backend, FOCAL_BACKENDS, logits.device)
    points = tuple(logits.shape[:2])
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (B, N, C)")
    tensors = {"gt_index": (gt_index, points), "gt_labels": (gt_labels, (gt_labels.numel(),))}
    if ignored is not None:
        tensors["ignored"] = (ignored, points)
    _check_shapes(tensors, logits.device)
    _check_types({"logits": logits}, {"gt_index": gt_index, "gt_labels": gt_labels})
    if ignored is not None and ignored.dtype != torch.bool:
        raise TypeError(f"ignored is {ignored.dtype}, expected torch.bool")
    return FOCAL_BACKENDS[backend](logits, gt_index, gt_labels, ignored)


def box_loss(
    boxes: Tensor, iou_logits: Tensor, gt_index: Tensor, iou: Tensor, gt_boxes: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Losses of the boxes and of their IoU logits, each summed over the matched points: two scalars.

    boxes       (B, N, 4)  predicted boxes, x1 y1 x2 y2 in px
    iou_logits  (B, N)     predicted IoU, before the sigmoid
    gt_index    (B, N)     int64, row of the matched ground truth; any other number, such as -1, is background
    iou         (B, N)     IoU to be predicted at matched points
    gt_boxes    (G, 4)     in px

    The first is 1 - GIoU (Rezatofighi et al., CVPR 2019; that of torchvision's generalized_box_iou_loss), the second
    binary cross entropy. Gradients go to boxes and iou_logits only, and are finite for boxes without area, too.
    Backends and errors are those of `focal_loss`.
    """
    backend = choose_backend(backend, BOX_BACKENDS, boxes.device)
    points = tuple(boxes.shape[:2])
    tensors = {
        "boxes": (boxes, (*points, 4)),
        "iou_logits": (iou_logits, points),
        "gt_index": (gt_index, points),
        "iou": (iou, points),
        "gt_boxes": (gt_boxes, (*gt_boxes.shape[:1], 4)),
    }
    _check_shapes(tensors, boxes.device)
    _check_types({"boxes": boxes, "iou_logits": iou_logits, "iou": iou, "gt_boxes": gt_boxes}, {"gt_index": gt_index})
    return BOX_BACKENDS[backend](boxes, iou_logits, gt_index, iou.detach(), gt_boxes.detach())


def _check_shapes(tensors: dict[str, tuple[Tensor, tuple[int, ...]]], device: torch.device) -> None:
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the predictions on {device}")


def _check_types(floating: dict[str, Tensor], int64: dict[str, Tensor]) -> None:
    for name, tensor in floating.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} is {tensor.dtype}, expected floating point")
    for name, tensor in int64.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is {tensor.dtype}, expected torch.int64")
