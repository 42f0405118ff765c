"""The detector: FCOS on a timm backbone, trained with optimal transport assignment."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from kernels import OTAConfig, PointGrid, ota_assign

from .backbone import STRIDES, Backbone
from .head import GROUP_CHANNELS, Head, Predictions
from .losses import detection_losses, points_inside
from .postprocess import postprocess

SIZE_DIVISOR = 32


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that is needed to build the network again.

    image_size      shorter side and longest side (px) that images are resized to for inference
    channels        width of neck and head, a multiple of 8
    head_convs      convolutions per tower
    frozen_norm     the backbone's batch norms are constants
    """

    num_classes: int
    backbone: str = "resnet50"
    image_size: tuple[int, int] = (800, 1333)
    channels: int = 256
    head_convs: int = 4
    frozen_norm: bool = False
    score_threshold: float = 0.05
    topk_per_level: int = 1000
    nms_iou: float = 0.6
    max_detections: int = 100
    assigner: OTAConfig = field(default_factory=OTAConfig)

    def __post_init__(self):
        if self.num_classes < 1 or self.channels < 1 or self.channels % GROUP_CHANNELS:
            raise ValueError(
                f"DetectorConfig needs a class at least and channels (--channels) in multiples of {GROUP_CHANNELS}, "
                f"not {self.num_classes} and {self.channels}"
            )


class Detector(nn.Module):
    """The contract of torchvision's detection models.

    Input: a list of images (3, H, W) RGB, uint8 in 0..255 or floating point in 0..1, of any sizes; in training
    also a list of targets, one dict an image, with `boxes` (n, 4) float x1 y1 x2 y2 in px and `labels` (n,) int64
    in 0..C-1 (contiguous, no background class), and, where wanted, `ignore` (m, 4): regions such as crowds, whose
    points are no negatives.

    Output in training: a dict of scalar losses `cls`, `box`, `iou`, to be summed. Images are taken as they are.
    Output in evaluation: a list of dicts `boxes` (n, 4), `scores` (n,), `labels` (n,), best first, in px of the
    images as given. Images are resized to `config.image_size` first; one that has this size already is not touched.

    `last_assignment` keeps the labels of the latest training batch, for logging.
    """

    def __init__(self, config: DetectorConfig, pretrained: bool = False):
        super().__init__()
        self.config = config
        self.backbone = Backbone(config.backbone, config.channels, pretrained, config.frozen_norm)
        self.head = Head(config.channels, config.head_convs, config.num_classes, STRIDES)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1), persistent=False)
        shorter, longest = config.image_size
        size, max_size = ([shorter], longest) if shorter < longest else (None, longest)
        self.resize = v2.Resize(size, max_size=max_size, antialias=True)
        self.last_assignment = None
        self.to(memory_format=torch.channels_last)  # convolutions are faster in this layout

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        if self.training:
            if targets is None or len(targets) != len(images):
                raise ValueError("a training step needs one target (boxes, labels) per image")
            return self.losses(images, targets)
        return self.detect(images)

    def batch(self, images: list[Tensor]) -> Tensor:
        """Images of different sizes -> one normalised (B, 3, H, W), padded with zeros to multiples of 32 px."""
        height, width = (-(-max(i.shape[d] for i in images) // SIZE_DIVISOR) * SIZE_DIVISOR for d in (1, 2))
        batch = torch.zeros(len(images), 3, height, width, device=self.mean.device).to(
            memory_format=torch.channels_last
        )
        for slot, image in zip(batch, images, strict=True):
            image = image.to(batch.device, non_blocking=True)
            image = image if image.is_floating_point() else image.float() / 255
            slot[:, : image.shape[1], : image.shape[2]] = (image - self.mean) / self.std
        return batch

    def predict_raw(self, batch: Tensor) -> tuple[Predictions, PointGrid]:
        grid = PointGrid.for_image(tuple(batch.shape[-2:]), STRIDES)
        return self.head(self.backbone(batch), grid.points(batch.device)), grid

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        predictions, grid = self.predict_raw(self.batch(images))
        device = predictions.boxes.device
        gt_boxes = torch.cat([torch.as_tensor(t["boxes"]).reshape(-1, 4) for t in targets]).float().to(device)
        gt_labels = torch.cat([t["labels"] for t in targets]).to(device)
        counts = torch.tensor([len(t["labels"]) for t in targets])
        gt_offsets = F.pad(counts.cumsum(0), (1, 0)).to(device)
        self.last_assignment = ota_assign(
            predictions.logits, predictions.boxes, gt_boxes, gt_labels, gt_offsets, grid, self.config.assigner
        )
        ignored = self.ignored_points(targets, grid, device)
        return detection_losses(predictions, self.last_assignment, gt_boxes, gt_labels, ignored)

    def ignored_points(self, targets: list[dict[str, Tensor]], grid: PointGrid, device: torch.device) -> Tensor | None:
        """(B, N) bool: points inside the `ignore` boxes of their image; None where no image has any."""
        regions = [torch.as_tensor(t.get("ignore", t["boxes"][:0])).reshape(-1, 4) for t in targets]
        counts = torch.tensor([len(boxes) for boxes in regions])
        if not counts.any():
            return None
        image_index = torch.arange(len(targets)).repeat_interleave(counts).to(device)
        return points_inside(grid.points(device), torch.cat(regions).float().to(device), image_index, len(targets))

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        resized = [self.resize(image) for image in images]
        predictions, grid = self.predict_raw(self.batch(resized))
        sizes = [tuple(image.shape[-2:]) for image in resized]
        c = self.config
        detections = postprocess(
            predictions, grid, sizes, c.score_threshold, c.topk_per_level, c.nms_iou, c.max_detections
        )
        scales = [
            (i.shape[2] / width, i.shape[1] / height) * 2 for i, (height, width) in zip(images, sizes, strict=True)
        ]
        scales = torch.tensor(scales).to(self.mean.device, non_blocking=True)
        for detection, scale in zip(detections, scales, strict=True):
            detection["boxes"] = detection["boxes"] * scale
        return detections
