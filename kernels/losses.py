"""The losses of an assignment: focal loss of the classes, GIoU loss and IoU entropy of the boxes.

    focal  sum over points and classes of -alpha_t (1 - p_t)^2 log p_t         (Lin et al., ICCV 2017, equation 5)
           p_t = sigmoid(z), alpha_t = 1/4 where the class is the target's, else p_t = 1 - sigmoid(z), alpha_t = 3/4
    giou   sum over matched points of 1 - GIoU(b, g)                           (Rezatofighi et al., CVPR 2019)
    iou    sum over matched points of the binary cross entropy of the IoU logit against the IoU

Both functions consume the result of ota_assign; normalisation is the caller's. No shape depends on data.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .assign import FLOATS, HAS_TRITON, check_tensors, choose_backend
from .config import FOCAL_ALPHA, GIOU_EPS

if HAS_TRITON:
    from .box_loss_triton import box_sums
    from .focal_triton import focal_sum

BACKENDS = "torch", "triton"


def focal_loss(
    logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Sigmoid focal loss with alpha 0.25 and gamma 2, summed over points and classes: a scalar.

    logits     (B, N, C)  raw class logits, before the sigmoid
    gt_index   (B, N)     int64, row of the matched ground truth; any other number, such as -1, is background
    gt_labels  (G,)       int64, 0..C-1; with any other number a point that is matched to the row has no class
    ignored    (B, N)     bool, points that take no part unless they are matched

    `backend` is "torch" (any device) or "triton" (deterministic; keeps nothing of the logits' size between loss and
    gradient, and can be differentiated once); None is "triton" on an NVIDIA or AMD GPU, "torch" elsewhere. Both compute
    in float32 ("torch" in float64 where the predictions are) and never wait for the device.

    Raises ValueError for shapes, devices or a backend that do not fit, TypeError for wrong types.
    """
    backend = choose_backend(backend, BACKENDS, logits.device)
    if logits.dim() != 3:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (B, N, C)")
    expected = {
        "logits": (logits, tuple(logits.shape), FLOATS),
        "gt_index": (gt_index, tuple(logits.shape[:2]), (torch.int64,)),
        "gt_labels": (gt_labels, (gt_labels.numel(),), (torch.int64,)),
    }
    if ignored is not None:
        expected["ignored"] = (ignored, tuple(logits.shape[:2]), (torch.bool,))
    check_tensors(expected, logits.device)
    loss = focal_sum if backend == "triton" else _focal_loss_torch
    return loss(logits, gt_index, gt_labels, ignored)


def box_loss(
    boxes: Tensor, iou_logits: Tensor, gt_index: Tensor, iou: Tensor, gt_boxes: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """GIoU loss of the boxes and cross entropy of their IoU logits, summed over the matched points: two scalars.

    boxes       (B, N, 4)  predicted boxes, x1 y1 x2 y2 in px
    iou_logits  (B, N)     predicted IoU, before the sigmoid
    gt_index    (B, N)     int64, row of the matched ground truth; any other number, such as -1, is background
    iou         (B, N)     target of the IoU logits at matched points
    gt_boxes    (G, 4)     in px

    The GIoU loss is that of torchvision's generalized_box_iou_loss. Gradients go to boxes and iou_logits only, and are
    finite for boxes without area, too. Backends and errors are those of `focal_loss`.
    """
    backend, points = choose_backend(backend, BACKENDS, boxes.device), tuple(boxes.shape[:2])
    expected = {
        "boxes": (boxes, (*points, 4), FLOATS),
        "iou_logits": (iou_logits, points, FLOATS),
        "gt_index": (gt_index, points, (torch.int64,)),
        "iou": (iou, points, FLOATS),
        "gt_boxes": (gt_boxes, (*gt_boxes.shape[:1], 4), FLOATS),
    }
    check_tensors(expected, boxes.device)
    loss = box_sums if backend == "triton" else _box_loss_torch
    sums = loss(boxes, iou_logits, gt_index, iou.detach(), gt_boxes.detach())
    return sums[0], sums[1]  # the results of unbind cannot be changed in place


def _focal_loss_torch(logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None) -> Tensor:
    """Focal loss as w p^2 softplus(s), p = sigmoid(s): s = -z, w = 1/4 for the target's class, else s = z, w = 3/4."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    matched = (gt_index >= 0) & (gt_index < len(gt_labels))
    labels = F.pad(gt_labels, (0, 1), value=-1)  # one more row, for background, so that G may be 0
    label = labels[torch.where(matched, gt_index, len(gt_labels))]
    is_target = label[..., None] == torch.arange(logits.shape[2], device=logits.device)
    s = torch.where(is_target, -logits, logits)
    if ignored is not None:
        s = s.masked_fill((ignored & ~matched)[..., None], -torch.inf)  # adds exactly 0
    weight = torch.full_like(s, 1 - FOCAL_ALPHA).masked_fill(is_target, FOCAL_ALPHA)
    return (weight * s.sigmoid() ** 2 * F.softplus(s)).sum()


def _box_loss_torch(
    boxes: Tensor, iou_logits: Tensor, gt_index: Tensor, iou: Tensor, gt_boxes: Tensor
) -> tuple[Tensor, Tensor]:
    dtype, matched = torch.promote_types(boxes.dtype, torch.float32), (gt_index >= 0) & (gt_index < len(gt_boxes))
    targets = F.pad(gt_boxes.to(dtype), (0, 0, 0, 1))  # one more row, as in the focal loss
    # Where a point is background, prediction and target agree, so that its gradient is finite before it is masked.
    target = targets[torch.where(matched, gt_index, len(gt_boxes))]
    giou = _giou_loss(boxes.to(dtype).masked_fill(~matched[..., None], 0), target)
    logit = iou_logits.to(dtype).masked_fill(~matched, 0)
    entropy = F.binary_cross_entropy_with_logits(logit, iou.to(dtype), reduction="none")
    return giou.masked_fill(~matched, 0).sum(), entropy.masked_fill(~matched, 0).sum()


def _giou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(-1)
    gx1, gy1, gx2, gy2 = gt_boxes.unbind(-1)
    width = torch.minimum(x2, gx2) - torch.maximum(x1, gx1)
    height = torch.minimum(y2, gy2) - torch.maximum(y1, gy1)
    overlap = torch.where((width > 0) & (height > 0), width * height, 0)
    union = (x2 - x1) * (y2 - y1) + (gx2 - gx1) * (gy2 - gy1) - overlap
    hull = (torch.maximum(x2, gx2) - torch.minimum(x1, gx1)) * (torch.maximum(y2, gy2) - torch.minimum(y1, gy1))
    return 1 - overlap / (union + GIOU_EPS) + (hull - union) / (hull + GIOU_EPS)
