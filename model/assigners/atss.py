"""ATSS (Zhang et al., CVPR 2020, arXiv 1912.02424)."""

import torch

from .claims import Claims, Image, best_per_level

PER_LEVEL = 9


def atss_claims(image: Image) -> Claims:
    """Of the 9 points per level that are closest to the object's centre, those in its box whose square anchor of 8
    strides has an IoU of at least mean + standard deviation over all these candidates. A point goes to the object with
    the highest IoU. Depends on no prediction."""
    iou = image.anchor_iou()
    center = (image.gt_boxes[:, None, :2] + image.gt_boxes[:, None, 2:]) / 2
    distance = (image.points - center).square().sum(-1)
    candidates = best_per_level(distance, torch.ones_like(iou, dtype=torch.bool), image.grid, PER_LEVEL)
    of_candidates = iou[candidates].view(len(iou), -1)  # as many for every object
    deviation = of_candidates.std(1) if of_candidates.shape[1] > 1 else torch.zeros_like(of_candidates[:, 0])
    threshold = of_candidates.mean(1) + deviation
    return Claims(candidates & image.inside() & (iou >= threshold[:, None]), -iou)
