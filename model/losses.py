"""Assignment and predictions -> the three losses, each over the positives of an average rank.

focal(0.25, 2) of the class logits + 2 x GIoU of the positive boxes + 0.5 x BCE of their IoU logits
"""

import torch
import torch.distributed as dist
from torch import Tensor

from kernels import Assignment, box_loss, focal_loss

from .head import Predictions

BOX_WEIGHT, IOU_WEIGHT = 2.0, 0.5


def mean_positives(assignment: Assignment) -> Tensor:
    """Return the number of matched points of an average rank, a float32 scalar on the device."""
    count = (assignment.gt_index >= 0).sum().float()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count


def points_inside(points: Tensor, boxes: Tensor, image_index: Tensor, num_images: int) -> Tensor:
    """(B, N) bool: the points (N, 2) inside any of an image's boxes (M, 4), of images image_index (M,)."""
    inside = ((points > boxes[:, None, :2]) & (points < boxes[:, None, 2:])).all(-1)
    hits = torch.zeros(num_images, len(points), dtype=torch.int32, device=points.device)
    return hits.index_add_(0, image_index, inside.int()) > 0


def detection_losses(
    predictions: Predictions, assignment: Assignment, gt_boxes: Tensor, gt_labels: Tensor, ignored: Tensor | None = None
) -> dict[str, Tensor]:
    """Scalars `cls`, `box` and `iou`; gt_boxes (G, 4) and gt_labels (G,) are those given to the assigner.

    ignored (B, N) bool: points that are no negatives; those of them that are matched learn all the same.
    """
    logits, boxes, iou_logits = predictions
    normaliser = mean_positives(assignment).clamp(min=1)
    cls = focal_loss(logits, assignment.gt_index, gt_labels, ignored)
    box, iou = box_loss(boxes, iou_logits, assignment.gt_index, assignment.iou, gt_boxes)
    return {"cls": cls / normaliser, "box": BOX_WEIGHT * box / normaliser, "iou": IOU_WEIGHT * iou / normaliser}
