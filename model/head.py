"""FCOS head, shared over the levels: features -> class logits, boxes and an IoU logit at every point.

    distances (l, t, r, b) = stride * relu(scale_level * conv(x)),  box = point -+ distances

B images, N points over all levels, C classes. The IoU branch takes the place of FCOS's centerness.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

CLASS_PRIOR = 0.01


class Predictions(NamedTuple):
    """Raw outputs. Logits are of the network's type; their readers compute in float32."""

    logits: Tensor  # (B, N, C)
    boxes: Tensor  # (B, N, 4) float32 x1 y1 x2 y2 px
    iou_logits: Tensor  # (B, N)


class GroupNorm(nn.GroupNorm):
    """GroupNorm in the type of its input. Autocast would use float32, which doubles the memory traffic."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def tower(channels: int, convs: int) -> nn.Sequential:
    layers = []
    for _ in range(convs):
        norm = GroupNorm(channels // 8, channels)  # 32 groups at 256 channels
        layers += [nn.Conv2d(channels, channels, 3, padding=1), norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class Head(nn.Module):
    """Two towers of `convs` 3x3 convolutions with GroupNorm, on maps of `channels`."""

    def __init__(self, channels: int, convs: int, num_classes: int, strides: tuple[int, ...]):
        super().__init__()
        self.strides = strides
        self.cls_tower, self.box_tower = tower(channels, convs), tower(channels, convs)
        self.cls, self.box, self.iou = (nn.Conv2d(channels, n, 3, padding=1) for n in (num_classes, 4, 1))
        self.scales = nn.Parameter(torch.ones(len(strides)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls.bias, -math.log((1 - CLASS_PRIOR) / CLASS_PRIOR))
        nn.init.ones_(self.box.bias)  # boxes start two strides wide: with none, relu leaves no gradient to start from

    def forward(self, features: list[Tensor], points: Tensor) -> Predictions:
        """features: one (B, channels, h, w) per level; points (N, 2) px, level by level."""
        logits, distances, iou_logits = [], [], []
        for level, x in enumerate(features):
            cls, box = self.cls_tower(x), self.box_tower(x)
            logits.append(rearrange(self.cls(cls), "b c h w -> b (h w) c"))
            raw = rearrange(self.box(box), "b d h w -> b (h w) d").float()
            distances.append(raw * (self.scales[level] * self.strides[level]))
            iou_logits.append(rearrange(self.iou(box), "b 1 h w -> b (h w)"))
        to_left_top, to_right_bottom = F.relu(torch.cat(distances, 1)).split(2, dim=-1)
        boxes = torch.cat([points - to_left_top, points + to_right_bottom], -1)
        return Predictions(torch.cat(logits, 1), boxes, torch.cat(iou_logits, 1))
