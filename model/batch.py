"""Images and targets of different sizes -> one padded batch, its ground truths ragged; packed in loader processes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SIZE_DIVISOR = 32


class Batch(NamedTuple):
    """B images, G ground truths one image after the other, M regions to ignore."""

    images: Tensor  # (B, 3, H, W) uint8 0..255 or float 0..1; 0 in the padding
    sizes: Tensor  # (B, 2) int64: height and width of every image, px
    gt_boxes: Tensor  # (G, 4) float32 x1 y1 x2 y2 px
    gt_labels: Tensor  # (G,) int64
    gt_offsets: Tensor  # (B + 1,) int64: image b owns rows gt_offsets[b] to gt_offsets[b + 1]
    ignore_boxes: Tensor  # (M, 4) float32
    ignore_image: Tensor  # (M,) int64: the image of every region

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def mark_ragged(self) -> None:
        """Declare to torch.compile that G and M differ from batch to batch."""
        for tensor in (self.gt_boxes, self.gt_labels, self.ignore_boxes, self.ignore_image):
            torch._dynamo.mark_dynamic(tensor, 0)


def padded_side(side: int, sides: tuple[int, ...] = ()) -> int:
    """The smallest of `sides` (ascending) that is long enough, else the next multiple of 32 px."""
    return next((s for s in sides if s >= side), -(-side // SIZE_DIVISOR) * SIZE_DIVISOR)


def static_sides(shortest: int, longest: int) -> tuple[int, ...]:
    """Sides that images are padded to for torch.compile, px: from the shortest to the longest, a third of it apart."""
    intervals = max(1, round(3 * (longest - shortest) / shortest))
    return tuple(sorted({padded_side(shortest + (longest - shortest) * i // intervals) for i in range(intervals + 1)}))


def pad_images(images: Sequence[Tensor], sides: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Pad images (3, h, w), uint8 or float 0..1, on the right and below: `images` and `sizes` of a Batch."""
    if any(image.is_floating_point() for image in images):
        images = [image if image.is_floating_point() else image.float() / 255 for image in images]
    sizes = torch.tensor([image.shape[1:] for image in images])
    height, width = (padded_side(side, sides) for side in sizes.amax(0).tolist())
    batch = images[0].new_zeros(len(images), 3, height, width)
    for slot, image in zip(batch, images, strict=True):
        slot[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def pad_rows(tensor: Tensor, value: float = 0) -> Tensor:
    """Pad to a power of two of rows, at least 64, so that CUDA graphs are captured for few sizes."""
    missing = (1 << max(6, (len(tensor) - 1).bit_length())) - len(tensor)
    return torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), value)])


def pack(images: Sequence[Tensor], targets: Sequence[dict[str, Tensor]], sides: tuple[int, ...] = ()) -> Batch:
    """Pack images (3, h, w) and targets as `Detector` takes them, on the CPU, into a Batch.

    With `sides`, for torch.compile, sizes are few: images are padded to `sides`, and rows without image or area added.
    """
    boxes = [torch.as_tensor(t["boxes"]).reshape(-1, 4).float() for t in targets]
    ignored = [torch.as_tensor(t.get("ignore", ())).reshape(-1, 4).float() for t in targets]
    offsets = F.pad(torch.tensor([*map(len, boxes)]).cumsum(0), (1, 0))
    image_of_ignored = torch.arange(len(targets)).repeat_interleave(torch.tensor([*map(len, ignored)]))
    labels = torch.cat([boxes[0][:0, 0].long(), *(t["labels"] for t in targets)])  # integers of any type become int64
    rows = torch.cat(boxes), labels, torch.cat(ignored), image_of_ignored
    gt_boxes, gt_labels, ignore_boxes, ignore_image = map(pad_rows, rows, (0, -1, 0, 0)) if sides else rows
    return Batch(*pad_images(images, sides), gt_boxes, gt_labels, offsets, ignore_boxes, ignore_image)
