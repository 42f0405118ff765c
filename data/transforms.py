"""Resizing and flipping of images with their boxes, by torchvision.transforms.v2.

An image size is (shorter side, longest side at most) in px: the shorter side becomes the first number,
unless the longer one would then pass the second. Small images are enlarged.
"""

from torchvision.transforms import v2


def train_transform(
    image_size: tuple[int, int], flip: float = 0.5, shorter_sides: list[int] | None = None
) -> v2.Transform:
    """Flip with probability `flip`, resize, clip; boxes under 1 px a side after that are dropped.

    shorter_sides: instead of the one in `image_size`, one of these (px), drawn for every image.
    """
    longest = image_size[1]
    resize = v2.RandomShortestSize(shorter_sides, longest, antialias=True) if shorter_sides else _resize(image_size)
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(flip),
            resize,
            v2.ClampBoundingBoxes(),
            v2.SanitizeBoundingBoxes(min_size=1.0),
        ]
    )


def eval_transform(image_size: tuple[int, int]) -> v2.Transform:
    """Resize only: every box stays."""
    return _resize(image_size)


def resized_size(height: int, width: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in px of an image of height x width px after either transform."""
    shorter, longest = image_size
    short, long = min(height, width), max(height, width)
    # torchvision rounds down twice where the longest side binds; once is not the same.
    new_short, new_long = shorter, int(shorter * long / short)
    if shorter == longest:
        new_short, new_long = int(longest * short / long), longest
    elif new_long > longest:
        new_short, new_long = int(longest * new_short / new_long), longest
    return (new_long, new_short) if width <= height else (new_short, new_long)


def _resize(image_size: tuple[int, int]) -> v2.Resize:
    shorter, longest = image_size
    if not 0 < shorter <= longest:
        raise ValueError(f"image_size {image_size}: wanted (shorter side, longest side), 0 < shorter <= longest")
    # With equal sides only the longest one can bind, and torchvision wants that said with size=None.
    return v2.Resize(None if shorter == longest else [shorter], max_size=longest, antialias=True)
