"""Images of any form become upright RGB tensors, and what is no image is named."""

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from images import ImageError, header_size, to_tensor
from tests.support.detectors import tiny_detector

TURNS = {  # EXIF orientation: from the pixels (H, W, 3) as stored to those displayed
    2: np.fliplr, 3: lambda x: np.rot90(x, 2), 5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90,
}  # fmt: skip
FORMATS = {"png": {}, "webp": {}, "tiff": {}, "tiff-jpeg": {"compression": "jpeg"}, "png-xmp": {}}  # besides JPEG


@pytest.mark.parametrize(
    ("name", "orientation"), [*(("jpeg", orientation) for orientation in TURNS), *((name, 6) for name in FORMATS)]
)
def test_size_and_pixels_are_those_displayed(tmp_path, name, orientation):
    """Nothing is turned twice, whether Pillow turns at loading, which it does with TIFF, or not."""
    stored = np.zeros((48, 96, 3), np.uint8)
    stored[:24, :48], stored[:24, 48:, 0], stored[24:, :48, 1] = 200, 250, 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = FORMATS.get(name, {}) | {"exif": exif}
    if name == "png-xmp":
        note = PngImagePlugin.PngInfo()
        note.add_itxt("XML:com.adobe.xmp", f'<x:xmpmeta tiff:Orientation="{orientation}"/>')
        options = {"pnginfo": note}
    path = tmp_path / "image"
    Image.fromarray(stored).save(path, name.partition("-")[0], **options)
    wanted = TURNS[orientation](stored).astype(int)
    assert header_size(path) == wanted.shape[1::-1]
    with Image.open(path) as opened, Image.open(path) as loaded:
        loaded.load()
        for image in (path, opened, loaded):
            pixels = to_tensor(image).permute(1, 2, 0).numpy()
            assert pixels.shape == wanted.shape and np.abs(pixels - wanted).mean() < 15


@pytest.mark.filterwarnings("error")  # Pillow warns of a transparency that it loses
def test_pil_images_of_any_mode_with_8_bits_keep_their_colour():
    for mode in ("L", "RGBA", "P", "1"):
        tensor = to_tensor(Image.new(mode, (5, 4), "white"))
        assert tensor.shape == (3, 4, 5) and tensor.min() == 255, mode
    assert to_tensor(Image.new("CMYK", (5, 4), (0, 255, 255, 0)))[:, 0, 0].tolist() == [255, 0, 0]
    palette = Image.new("RGB", (5, 4), (255, 0, 0)).convert("P")
    palette.info["transparency"] = bytes(256)
    assert to_tensor(palette)[:, 3, 4].tolist() == [255, 0, 0]


NO_IMAGES = [
    (np.zeros((4, 5), np.uint8), r"image 0 must .* uint8 .*, not \(4, 5\) uint8"),
    (torch.zeros(1, 3, 4, 5), r"list\(batch\)"),
    (torch.zeros(3, 4, 5).long(), "uint8, or floating point.*int64"),
    (torch.full((3, 4, 5), 255.0), r"in 0\.\.1 .*, not torch.float32 from 255 to 255"),
    (torch.full((3, 4, 5), torch.nan), "from nan to nan"),
    (torch.zeros(3, 1, 2000, dtype=torch.uint8), "image 0, 2000 x 1 px, cannot be resized: .*H: 0"),
    (Image.new("I;16", (4, 5)), "size=4x5.* cannot be read.*more than 8 bits"),
    ("nowhere.jpg", "there is no image file nowhere.jpg"),
]


def test_what_is_no_image_is_named():
    detector = tiny_detector()
    for image, message in NO_IMAGES:
        with pytest.raises(ImageError, match=message):
            detector.eval().predict(image)
    for training in (True, False):
        with pytest.raises(ImageError, match="image 1 must .* from -2 to -2"):
            detector.train(training)([torch.zeros(3, 96, 96), torch.full((3, 96, 96), -2.0)], [{}, {}])
