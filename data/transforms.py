"""Resizing and flipping of images with their boxes, by torchvision.transforms.v2.

An image size is (shorter side, longest side at most) in px: the shorter side becomes the first number, unless the
longer one would then pass the second. Small images are enlarged.
"""

from functools import lru_cache

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2


def train_transform(
    image_size: tuple[int, int], flip: float = 0.5, shorter_sides: list[int] | None = None
) -> v2.Transform:
    """Flip with probability `flip`, resize and clip; boxes under 1 px a side after that are dropped.

    shorter_sides: instead of the one in `image_size`, one of these (px), drawn for every image.
    """
    resize = eval_transform(image_size)
    if shorter_sides:
        resize = v2.RandomShortestSize(shorter_sides, image_size[1], antialias=True)
    clean = (v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1.0))
    return v2.Compose([v2.RandomHorizontalFlip(flip), resize, *clean])


def eval_transform(image_size: tuple[int, int]) -> v2.Transform:
    """Resize only: every box stays."""
    shorter, longest = image_size
    if not 0 < shorter <= longest:
        raise ValueError(f"image_size {image_size}: wanted (shorter side, longest side), 0 < shorter <= longest")
    # With equal sides only the longest one can bind, and torchvision wants size=None for that.
    return v2.Resize(None if shorter == longest else [shorter], max_size=longest, antialias=True)


@lru_cache(maxsize=2**16)
def resized_size(height: int, width: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) in px of an image of height x width px after either transform."""
    canvas = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(height, width))
    return tuple(eval_transform(image_size)(canvas).canvas_size)
