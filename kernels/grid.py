"""Anchor points of a feature pyramid, and the exact arithmetic of distances between points and boxes.

Points are ordered level by level, row by row, x fastest; point (x, y) of a level with stride s lies at
((x + 0.5) s, (y + 0.5) s) px. L levels, N points over all levels, G ground truths.

Centres and points are integers in units of 2^-16 px and squared distances are exact in int64, so all backends agree on
the closest points; ties go to the lower index. Whether a point is inside a box may be computed in float32: next to the
threshold the difference of the two coordinates is exact (Sterbenz).
"""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

INSIDE_MARGIN_PX = 0.01  # a point is inside a box when it is farther than this from all four sides
UNITS_PER_PX = 1 << 16
MAX_SIDE_PX = 1 << 14  # keeps the sum of two squared differences below 2^63


@dataclass(frozen=True)
class PointGrid:
    """Strides (px) and sizes (rows, columns) of the levels; plain Python ints, so it can key a cache."""

    strides: tuple[int, ...]
    sizes: tuple[tuple[int, int], ...]

    def __post_init__(self):
        if len(self.strides) != len(self.sizes) or not self.strides:
            raise ValueError(f"PointGrid needs one (rows, columns) per stride: {self.strides}, {self.sizes}")
        if any(s < 1 or h < 1 or w < 1 for s, (h, w) in zip(self.strides, self.sizes, strict=True)):
            raise ValueError(f"PointGrid: strides and sizes must be positive: {self.strides}, {self.sizes}")
        if any(s * n > MAX_SIDE_PX for s, hw in zip(self.strides, self.sizes, strict=True) for n in hw):
            raise ValueError(f"PointGrid: a level spans more than {MAX_SIDE_PX} px: {self.strides}, {self.sizes}")

    @classmethod
    def for_image(cls, image_size: tuple[int, int], strides: tuple[int, ...] = (8, 16, 32, 64, 128)) -> "PointGrid":
        """Grid of an image of (height, width) px, whose level of stride s has ceil(side / s) points a side."""
        return cls(tuple(strides), tuple(tuple(math.ceil(side / s) for side in image_size) for s in strides))

    @property
    def level_offsets(self) -> tuple[int, ...]:
        """Index of each level's first point, and N at the end: L + 1 ints."""
        return (0, *accumulate(h * w for h, w in self.sizes))

    @property
    def num_points(self) -> int:
        return self.level_offsets[-1]

    def points(self, device: torch.device | None = None) -> Tensor:
        """(N, 2) float32: x, y in px."""
        levels = []
        for stride, (rows, columns) in zip(self.strides, self.sizes, strict=True):
            y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * stride
            x = (torch.arange(columns, device=device, dtype=torch.float32) + 0.5) * stride
            levels.append(torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], -1).flatten(0, 1))
        return torch.cat(levels)

    def point_strides(self, device: torch.device | None = None) -> Tensor:
        """(N,) float32: the stride in px of every point's level."""
        counts = torch.tensor([h * w for h, w in self.sizes], device=device)
        strides = torch.tensor(self.strides, device=device, dtype=torch.float32)
        return strides.repeat_interleave(counts, output_size=self.num_points)


def box_centers(gt_boxes: Tensor) -> Tensor:
    """Centres of (G, 4) boxes as (G, 2) int64 in units of 2^-16 px; sides are first rounded to 2^-15 px."""
    sides = gt_boxes.float().nan_to_num(0.0).clamp(-MAX_SIDE_PX, 2 * MAX_SIDE_PX)
    sides = (sides * (UNITS_PER_PX // 2)).round().long()
    return sides[:, :2] + sides[:, 2:]


def radius_in_units(radius: float, stride: int) -> int:
    """Reach of the "radius" center prior on one level, in the units of `box_centers`."""
    return round(radius * stride * UNITS_PER_PX)


def valid_rows(gt_boxes: Tensor, gt_labels: Tensor, gt_offsets: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Image index (G,) of every ground truth row, and which rows (G,) take part in the assignment.

    Such a row belongs to an image, its box is finite with positive sides and its label is in [0, C). The image index
    of a row outside all images is clamped, so that gathering with it is safe.
    """
    rows = torch.arange(gt_boxes.shape[0], device=gt_boxes.device)
    image = torch.bucketize(rows, gt_offsets.to(rows.dtype).contiguous(), right=True) - 1
    num_images = gt_offsets.shape[0] - 1
    x1, y1, x2, y2 = gt_boxes.float().unbind(1)
    valid = torch.isfinite(gt_boxes).all(1) & (x2 > x1) & (y2 > y1)
    valid &= (gt_labels >= 0) & (gt_labels < num_classes) & (image >= 0) & (image < num_images)
    return image.clamp(0, max(num_images - 1, 0)), valid
