"""Image files, and what else Python has for an image, to RGB tensors: the same for training, evaluation, prediction.

Depends on nothing of this repository but its error class.
"""

import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from errors import UserError

try:  # Deprecated since torchvision 0.29; where it is gone, Pillow gives the same pixels a seventh slower.
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None

LOWEST, HIGHEST = -0.45, 2.0  # of floating point pixels: bicubic resizing leaves 0..1 by at most 0.445
MAX_PIXELS = 2**27  # of an image: 400 MB decoded. A broken or hostile header can claim any size

ImageLike = str | os.PathLike | Image.Image | np.ndarray | Tensor


class ImageError(UserError):
    """An image cannot be read or is of no known form; the message names it."""


def to_tensor(image: ImageLike) -> Tensor:
    """RGB (3, H, W), uint8 in 0..255, or float32 in 0..1 where it was that before. Raises ImageError.

    path, PIL image     turned upright as the EXIF orientation says; of any mode with at most 8 bits a channel
    numpy array         (H, W, 3) uint8 RGB (OpenCV has BGR: give it image[..., ::-1])
    tensor              (3, H, W) uint8, or floating point in 0..1
    """
    if isinstance(image, str | os.PathLike):
        return load_image(Path(image))
    if isinstance(image, Image.Image):
        try:
            check_pixels(image)
            return _decode(ImageOps.exif_transpose(image))
        except Exception as error:  # its file is read only now
            name = getattr(image, "filename", "") or f"{image.width} x {image.height}"
            raise ImageError(f"the PIL image {name} cannot be read: {error}") from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ImageError(f"an array has to be (H, W, 3) uint8, this one is {image.shape} {image.dtype}")
        return torch.from_numpy(image.copy()).permute(2, 0, 1)
    if isinstance(image, Tensor):
        image = image.as_subclass(Tensor)
        kind = f"{tuple(image.shape)} {image.dtype}".replace("torch.", "")
        if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
            batch = "; a batch goes in as list(batch)" if image.ndim == 4 else ""
            raise ImageError(f"a tensor has to be (3, H, W), this one is {kind}{batch}")
        if image.dtype != torch.uint8 and not image.is_floating_point():
            raise ImageError(f"a tensor has to be uint8 or floating point, this one is {kind}")
        check_range(image)
        return image.float() if image.is_floating_point() else image
    raise ImageError(f"no image: {type(image).__name__}; wanted a path, PIL image, numpy array or tensor")


def check_range(image: Tensor, name: str = "this tensor") -> None:
    """Raise ImageError where a floating point tensor is not in 0..1, give or take what resizing adds."""
    if not image.is_floating_point() or not image.numel():
        return
    low, high = (bound.item() for bound in image.aminmax())
    if not math.isfinite(high - low):
        raise ImageError(f"floating point is for 0..1, {name} has pixels that are NaN or infinite")
    if low < LOWEST:
        remedy = "give it without its normalisation, the detector has its own"
        raise ImageError(f"floating point is for 0..1, {name} goes down to {low:g}; {remedy}")
    if high > HIGHEST:
        raise ImageError(f"floating point is for 0..1, {name} goes up to {high:g}; divide it by 255")


def load_image(path: Path) -> Tensor:
    """RGB, uint8 (3, H, W), turned upright as its EXIF orientation says. Raises ImageError naming the file.

    It lies in memory as (H, W, 3), which torchvision resizes and flips fastest.
    """
    try:
        with Image.open(path) as image:
            check_pixels(image)
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            if image.format == "JPEG" and image.mode in ("RGB", "L") and orientation == 1 and decode_jpeg:
                try:
                    return decode_jpeg(torch.from_numpy(np.fromfile(path, np.uint8)), ImageReadMode.RGB)
                except RuntimeError:
                    pass  # Pillow says better what is wrong
            return _decode(image if orientation == 1 else ImageOps.exif_transpose(image))
    except FileNotFoundError as error:
        raise ImageError(f"there is no image file {path}") from error
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        raise ImageError(f"image file {path} cannot be read: {error}") from error


def check_pixels(image: Image.Image) -> None:
    """Raise ValueError where the header claims more than MAX_PIXELS; Pillow itself refuses a third more."""
    if math.prod(image.size) > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} px is more than the {MAX_PIXELS} px that are read")


def header_size(path: Path) -> tuple[int, int]:
    """(width, height) as displayed, without decoding. Raises what Pillow raises."""
    with Image.open(path) as image:
        check_pixels(image)
        # A PNG's own getexif decodes all of it to look for EXIF behind the pixels; loading it will see to that.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        # Whether an opened TIFF has the size as stored or as displayed depends on Pillow's version; the tags do not.
        tags = getattr(image, "tag_v2", None)
        size = (tags[ExifTags.Base.ImageWidth], tags[ExifTags.Base.ImageLength]) if tags else image.size
        return size[::-1] if orientation in (5, 6, 7, 8) else size


def _decode(image: Image.Image) -> Tensor:
    """RGB, uint8 (3, H, W), by Pillow."""
    image.load()
    if image.mode.startswith(("I", "F")):  # Pillow would cut these off at 255 instead of scaling them
        raise ValueError("it has more than 8 bits a channel; save it with 8")
    if "transparency" in image.info:  # a palette has to become RGBA on its way
        image = image.convert("RGBA")
    return pil_to_tensor(image if image.mode == "RGB" else image.convert("RGB"))
