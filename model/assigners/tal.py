"""Task alignment learning (Feng et al., TOOD, ICCV 2021, arXiv 2108.07755)."""

import torch
from torchvision.ops import box_iou

from .claims import Claims, ImageInputs, best_per_row

SCORE_POWER, IOU_POWER, TOP = 1, 6, 13


def tal_claims(image: ImageInputs) -> Claims:
    """Claim, of the 13 points with the highest score^1 x IoU^6, those in the object's box where it is not 0. A point
    goes to the object with the highest IoU. TOOD also assigns by ATSS in its first epochs and weights its losses by the
    metric; both are left out."""
    logit, iou = image.logits.T[image.gt_labels].float(), box_iou(image.gt_boxes, image.boxes)
    alignment = logit.sigmoid() ** SCORE_POWER * iou**IOU_POWER
    best = best_per_row(-alignment, (alignment > 0) & (logit < torch.inf), TOP)
    return Claims(best & image.inside(), -iou)
