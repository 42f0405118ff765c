"""ATSS (Zhang et al., CVPR 2020, arXiv 1912.02424)."""

import torch

from .claims import Claims, ImageInputs, best_per_level

PER_LEVEL = 9


def atss_claims(image: ImageInputs) -> Claims:
    """Claim, of the 9 points per level closest to the object's centre, those in its box whose square anchor of 8
    strides has an IoU of at least mean + standard deviation over all these candidates. A point goes to the object with
    the highest IoU. Depends on no prediction."""
    iou, distance = image.anchor_iou(), image.on_grid(lambda a, b, at, _: (at - (a + b) / 2).square(), torch.add)
    candidates = best_per_level(distance, torch.ones_like(iou, dtype=torch.bool), image.grid, PER_LEVEL)
    candidate_iou = iou[candidates].view(len(iou), -1)  # every object has equally many
    threshold = candidate_iou.mean(1) + (candidate_iou.std(1) if candidate_iou.shape[1] > 1 else 0)
    return Claims(candidates & image.inside() & (iou >= threshold[:, None]), -iou)
