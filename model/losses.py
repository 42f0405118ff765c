"""Assignment and predictions -> the three losses, each over the positives of an average rank.

focal(0.25, 2) of the class logits + 2 x GIoU of the positive boxes + 0.5 x BCE of their IoU logits
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss, sigmoid_focal_loss

from kernels import Assignment

from .head import Predictions

BOX_WEIGHT, IOU_WEIGHT = 2.0, 0.5


def average_over_ranks(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        value = value.clone()
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value


def detection_losses(
    predictions: Predictions, assignment: Assignment, gt_boxes: Tensor, gt_labels: Tensor
) -> dict[str, Tensor]:
    """Scalars `cls`, `box` and `iou`; gt_boxes (G, 4) and gt_labels (G,) are those given to the assigner."""
    logits, boxes, iou_logits = predictions
    positive = assignment.gt_index >= 0
    matched = assignment.gt_index[positive]
    normaliser = average_over_ranks(positive.sum().float()).clamp(min=1)

    targets = torch.zeros_like(logits)
    targets[positive] = F.one_hot(gt_labels[matched], logits.shape[-1]).to(targets)
    cls = sigmoid_focal_loss(logits, targets, reduction="sum")
    box = generalized_box_iou_loss(boxes[positive], gt_boxes[matched].to(boxes), reduction="sum")
    iou = F.binary_cross_entropy_with_logits(iou_logits[positive], assignment.iou[positive], reduction="sum")
    return {"cls": cls / normaliser, "box": BOX_WEIGHT * box / normaliser, "iou": IOU_WEIGHT * iou / normaliser}
