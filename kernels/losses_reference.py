"""The detection losses, literal: the documentation, and the oracle of every test. Autograd gives the gradients.

    focal  sum over points and classes of -alpha_t (1 - p_t)^2 log p_t         (Lin et al., ICCV 2017, equation 5)
           p_t = sigmoid(z), alpha_t = 1/4 where the class is the target's, else p_t = 1 - sigmoid(z), alpha_t = 3/4
    giou   sum over matched points of 1 - GIoU(b, g)                           (Rezatofighi et al., CVPR 2019)
    iou    sum over matched points of the binary cross entropy of the IoU logit against the IoU

B images, N anchor points over all levels, G ground truths of a batch, C classes. Works in the floating type of the
predictions, float32 at least.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .assign_reference import classification_loss
from .config import GIOU_EPS


def focal_loss_reference(logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None) -> Tensor:
    """The contract of `focal_loss`."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    matched = (gt_index >= 0) & (gt_index < len(gt_labels))
    label = torch.full_like(gt_index, -1)
    label[matched] = gt_labels[gt_index[matched]].to(label)
    targets = (label[..., None] == torch.arange(logits.shape[-1], device=label.device)).to(logits)
    learns = torch.ones_like(matched) if ignored is None else matched | ~ignored
    return classification_loss(logits[learns], targets[learns], "focal").sum()


def giou_loss(boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """1 - GIoU of paired (P, 4) boxes, with a small constant in both denominators."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    gx1, gy1, gx2, gy2 = gt_boxes.unbind(-1)
    width = torch.minimum(x2, gx2) - torch.maximum(x1, gx1)
    height = torch.minimum(y2, gy2) - torch.maximum(y1, gy1)
    overlap = torch.where((width > 0) & (height > 0), width * height, 0)
    union = (x2 - x1) * (y2 - y1) + (gx2 - gx1) * (gy2 - gy1) - overlap
    hull = (torch.maximum(x2, gx2) - torch.minimum(x1, gx1)) * (torch.maximum(y2, gy2) - torch.minimum(y1, gy1))
    return 1 - overlap / (union + GIOU_EPS) + (hull - union) / (hull + GIOU_EPS)


def box_loss_reference(
    boxes: Tensor, iou_logits: Tensor, gt_index: Tensor, iou: Tensor, gt_boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """The contract of `box_loss`."""
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    matched = (gt_index >= 0) & (gt_index < len(gt_boxes))
    giou = giou_loss(boxes[matched].to(dtype), gt_boxes[gt_index[matched]].to(dtype))
    iou_logits, iou = iou_logits[matched].to(dtype), iou[matched].to(dtype)
    return giou.sum(), F.binary_cross_entropy_with_logits(iou_logits, iou, reduction="sum")
