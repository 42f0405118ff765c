"""Images in any form to RGB tensors, the same way for training, evaluation and prediction."""

import math
import os
from contextlib import nullcontext

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from errors import UserError

LOWEST, HIGHEST = -0.45, 2.0  # of floating point pixels: bicubic resizing leaves 0..1 by at most 0.445
MAX_PIXELS = 2**27  # of an image: 400 MB decoded. A broken or hostile header can claim any size
ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor


class ImageError(UserError):
    """An image cannot be read or has no known form; the message names it."""


def to_tensor(image: ImageLike, name: str = "the image") -> Tensor:
    """Return RGB (3, H, W), uint8 in 0..255, or float32 in 0..1 for a floating point tensor. Raises ImageError.

    path, PIL image   turned upright as the EXIF orientation says; of any mode with at most 8 bits a channel
    array             (H, W, 3) uint8 RGB (OpenCV has BGR: give it image[..., ::-1]); `name` is for errors
    tensor            (3, H, W) uint8, or floating point in 0..1
    """
    if isinstance(image, str | os.PathLike | Image.Image):
        return load_image(image)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        image = torch.from_numpy(image.copy()).permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        kind = f"{tuple(image.shape)} {image.dtype}" if hasattr(image, "dtype") else type(image).__name__
        wanted = "a path, a PIL image, an array (H, W, 3) uint8 or a tensor (3, H, W)"
        raise ImageError(f"{name} must be {wanted}, not {kind}; pass a batch as list(batch)")
    if image.dtype == torch.uint8:
        return image.as_subclass(Tensor)
    low, high = (bound.item() for bound in image.aminmax())
    if not image.is_floating_point() or not (LOWEST <= low and high <= HIGHEST):
        wanted = "uint8, or floating point in 0..1 without the normalisation, which the detector does"
        raise ImageError(f"{name} must be {wanted}, not {image.dtype} from {low:g} to {high:g}")
    return image.as_subclass(Tensor).float()


def load_image(image: str | os.PathLike | Image.Image) -> Tensor:
    """Return uint8 RGB (3, H, W), turned upright as the EXIF orientation says. Raises ImageError naming the file."""
    try:
        with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as opened:
            check_pixels(opened)
            turned = opened.getexif().get(ExifTags.Base.Orientation, 1) != 1
            upright = ImageOps.exif_transpose(opened) if turned else opened  # which would copy an upright one, too
            if upright.mode.startswith(("I", "F")):  # Pillow would cut these off at 255 instead of scaling them
                raise ValueError("it has more than 8 bits a channel; save it with 8")
            upright = upright.convert("RGBA") if "transparency" in upright.info else upright  # palettes need RGBA first
            return pil_to_tensor(upright if upright.mode == "RGB" else upright.convert("RGB"))
    except FileNotFoundError as error:
        raise ImageError(f"there is no image file {image}") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        raise ImageError(f"image file {getattr(image, 'filename', '') or image} cannot be read: {error}") from error


def check_pixels(image: Image.Image) -> None:
    if math.prod(image.size) > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} px is more than the {MAX_PIXELS} px that are read")


def header_size(path: str | os.PathLike) -> tuple[int, int]:
    """Return (width, height) as displayed, without decoding. Raises Pillow's errors, and ValueError."""
    with Image.open(path) as image:
        check_pixels(image)
        turned = _is_turned(image)
        # Whether a TIFF's `size` is that as stored or as displayed depends on Pillow's version; the tags are as stored.
        tags = getattr(image, "tag_v2", None)
        size = (tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]) if tags else image.size
        return size[::-1] if turned else size


def is_turned(path: str | os.PathLike) -> bool:
    """Return whether the EXIF orientation swaps width and height, without decoding. Raises Pillow's errors."""
    with Image.open(path) as image:
        return _is_turned(image)


def _is_turned(image: Image.Image) -> bool:
    # PngImageFile.getexif would decode the whole file to look for EXIF behind the pixels.
    return Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
