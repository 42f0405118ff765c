"""SimOTA (Ge et al., YOLOX, arXiv 2107.08430): OTA's cost and dynamic k, but every object for itself."""

import torch.nn.functional as F

from .claims import Claims, ImageInputs, best_per_row

RADIUS = 2.5  # strides; that of YOLOX 0.2 and mmdetection, 1.5 in later versions of YOLOX
REG_WEIGHT, TOP_Q, IOU_FLOOR = 3.0, 10, 1e-8
OUTSIDE_COST = 1e5  # of a point that is not both in the box and near its centre


def simota_claims(image: ImageInputs) -> Claims:
    """Claim the k cheapest of the points in the box or closer than 2.5 strides to its centre along x and y; k is the
    sum of the 10 best IoUs among these, rounded down, at least 1. Cost: binary cross entropy over all classes - 3 log
    IoU, and more than any of those for a point that is not both. A point goes to the object that it is cheapest for.
    The class cost is of p, not of sqrt(p x objectness): this head has no objectness. k and the choice count each
    object's candidates (YOLOX: those of all objects of the image; 27 of 4,107 labels differ)."""
    inside, near, (logit, iou, _, usable) = image.inside(), image.near_center(RADIUS), image.all_predictions()
    candidates = (inside | near) & usable
    cross_entropy = F.softplus(image.finite_logits()).sum(1) - logit
    cost = cross_entropy - REG_WEIGHT * (iou + IOU_FLOOR).log() + OUTSIDE_COST * ~(inside & near)
    best = iou.masked_fill(~candidates, 0).topk(min(TOP_Q, candidates.shape[1]), dim=1).values
    k = best.sum(1, keepdim=True).floor().clamp(min=1)
    return Claims(best_per_row(cost, candidates, k), cost)
