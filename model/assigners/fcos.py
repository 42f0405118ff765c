"""FCOS (Tian et al., ICCV 2019, arXiv 1904.01355; center sampling of its journal version, arXiv 2006.09214)."""

import math

import torch

from .claims import Claims, ImageInputs

RADIUS = 1.5  # strides
RANGE = 4, 8  # strides: with strides 8 to 128, 64 to 128 px on the second level, 256 to 512 px on the last but one


def fcos_claims(image: ImageInputs) -> Claims:
    """Claim the points in the box and closer than 1.5 strides to its centre, on the level in whose range the distance
    to the farthest side of the box lies; the first level's range starts at 0, the last one's has no end. The range
    excludes its lower end, as in torchvision; mmdetection includes it. A point goes to the smallest object. Depends on
    no prediction."""
    farthest = image.on_grid(lambda low, high, at, _: torch.maximum(at - low, high - at), torch.maximum)
    low, high = (strides * image.strides for strides in RANGE)
    low = torch.where(image.strides == image.grid.strides[0], 0, low)
    high = torch.where(image.strides == image.grid.strides[-1], math.inf, high)
    wanted = image.inside() & image.near_center(RADIUS) & (farthest > low) & (farthest <= high)
    area = (image.gt_boxes[:, 2:] - image.gt_boxes[:, :2]).prod(1, keepdim=True)
    return Claims(wanted, area.expand(wanted.shape))
