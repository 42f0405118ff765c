"""The detector: FCOS on a timm backbone, trained with optimal transport assignment."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import lru_cache
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from errors import UserError
from images import ImageError, ImageLike, to_tensor
from kernels import Assignment, Inputs, OTAConfig, PointGrid
from kernels.assign import HAS_TRITON
from kernels.grid import MAX_SIDE_PX

from .assigners import STRATEGIES, assign, assign_with_statistics
from .assigners.claims import NEITHER
from .backbone import STRIDES, Backbone
from .batch import Batch, pack, pad_images, padded_side
from .fields import Rule, first_flaw, integer, number, one_of_type
from .head import Head, Predictions
from .losses import detection_losses, points_inside
from .postprocess import Detections, postprocess, suppressed, unpad

DEFAULT_SCORE = 0.5  # lowest score of a detection where no evaluation has found a better one
_cached_points = lru_cache(maxsize=64)(PointGrid.points)


def points_of(grid: PointGrid, device: torch.device) -> Tensor:
    """Points (N, 2), made once a grid: no launches in a step. torch.compile folds the constants itself."""
    return grid.points(device) if torch.compiler.is_compiling() else _cached_points(grid, device)


def _is_image_size(value: object) -> bool:
    return isinstance(value, tuple) and [*map(type, value)] == [int, int] and 0 < value[0] <= value[1] <= MAX_SIDE_PX


RULES: dict[str, Rule] = {  # bounds far from use: no weights file can ask for more
    "num_classes": integer(1, 100_000),
    "backbone": one_of_type(str, "the name of a timm model"),
    "image_size": (_is_image_size, f"the shorter and the longest side in px, up to {MAX_SIDE_PX}"),
    "channels": (lambda v: type(v) is int and v in range(8, 2**14 + 1, 8), "a multiple of 8 (--channels) up to 16384"),
    "head_convs": integer(0, 100),
    "frozen_norm": one_of_type(bool, "true or false"),
    "score_threshold": number(0, 1),
    "topk_per_level": integer(1, 1_000_000),
    "nms_iou": number(0, 1),
    "max_detections": integer(1, 1_000_000),
    "assigner": (lambda value: value in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
    "ota": one_of_type(OTAConfig, "settings of the assigner ota"),
}


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that builds the network again. Raises UserError."""

    num_classes: int
    backbone: str = "resnet50"
    image_size: tuple[int, int] = (800, 1333)  # shorter and longest side (px) of images resized for inference
    channels: int = 256  # of neck and head
    head_convs: int = 4  # per tower
    frozen_norm: bool = False  # the backbone's batch norms are constants
    score_threshold: float = 0.05
    topk_per_level: int = 1000
    nms_iou: float = 0.6
    max_detections: int = 100
    assigner: str = "ota"  # label assignment, see model/assigners
    ota: OTAConfig = field(default_factory=OTAConfig)  # settings of the assigner "ota"

    def __post_init__(self):
        if flaw := first_flaw(vars(self), RULES):
            raise UserError(f"DetectorConfig.{flaw}")


class Detector(nn.Module):
    """The contract of torchvision's detection models.

    Input: a list of images (3, H, W) RGB, uint8 in 0..255 or floating point in 0..1, of any sizes; in training also a
    list of targets, one dict an image, with `boxes` (n, 4) float x1 y1 x2 y2 px, `labels` (n,) integers in 0..C-1
    (contiguous, no background class), and, optionally, `ignore` (m, 4): regions such as crowds, whose points are no
    negatives. A `Batch` on the detector's device takes the place of both lists.

    Output in training: a dict of scalar losses `cls`, `box`, `iou`, to be summed, the Assignment and the Predictions
    that it was made from, detached. Images are not resized.
    Output in evaluation: Detections in px of the images as given; a list's images are resized to `config.image_size`.

    Under torch.autocast, half() or bfloat16() the network runs in the lower precision; assignment, losses and
    detections are float32. `class_names` and `category_ids` are those of the annotation file, by label; `cuts` is
    the lowest score of a detection that `predict` returns, by label: that with the best F1 in the last evaluation.
    """

    def __init__(self, config: DetectorConfig, pretrained: bool = False):
        super().__init__()
        self.class_names = [str(label) for label in range(config.num_classes)]
        self.category_ids = list(range(config.num_classes))
        self.cuts = [DEFAULT_SCORE] * config.num_classes
        self.backbone = Backbone(config.backbone, config.channels, pretrained, config.frozen_norm)
        self.config = replace(config, backbone=self.backbone.name)
        self.head = Head(config.channels, config.head_convs, config.num_classes, STRIDES)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1), persistent=False)
        shorter, longest = config.image_size
        self.resize = v2.Resize([shorter] if shorter < longest else None, max_size=longest, antialias=True)
        self.to(memory_format=torch.channels_last)  # most convolutions are faster

    def forward(self, images: list[Tensor] | Batch, targets: list[dict[str, Tensor]] | None = None):
        """See above. Raises ImageError: an image of a list has a wrong shape, type or range."""
        if isinstance(images, Batch):
            return self.losses(images) if self.training else self.detect(images.images, images.sizes)
        images = [to_tensor(image, f"image {i}") for i, image in enumerate(images)]
        if not self.training:
            return self.resize_and_detect(images)
        if not images or targets is None or len(targets) != len(images):
            raise ValueError("a training step needs images, and one target (boxes, labels) for each")
        return self.losses(pack(images, targets).to(self.mean.device))

    def normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Normalise `images` and `sizes` of a Batch to float32, zero in the padding."""
        mean, std = self.mean.float(), self.std.float()
        scale = (1 if images.is_floating_point() else 1 / 255) / std
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
        # With channels last torch.export would compare the strides of H and W.
        layout = torch.contiguous_format if torch.compiler.is_exporting() else torch.channels_last
        images = images.to(torch.float32, memory_format=layout)
        return torch.where(inside[:, None], torch.addcmul(-mean / std, images, scale), 0)

    def predict_raw(self, images: Tensor) -> tuple[Predictions, PointGrid]:
        """Predictions for normalised images (B, 3, H, W), H and W multiples of 32 px."""
        features = self.backbone(images.to(self.head.scales.dtype))  # the network's, after half() or double()
        grid = PointGrid(STRIDES, tuple(tuple(level.shape[-2:]) for level in features))
        return self.head(features, points_of(grid, images.device)), grid

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Assignment, Predictions]:
        config, device, truth = self.config, batch.images.device, (batch.gt_boxes, batch.gt_labels)
        predictions, grid = self.predict_raw(self.normalise(batch.images, batch.sizes))
        detached = Predictions(*(tensor.detach() for tensor in predictions))
        with torch.autocast(device.type, enabled=False):
            assignment = assign(config.assigner, Inputs(*detached[:2], *truth, batch.gt_offsets, grid), config.ota)
            ignored = None if config.assigner == "ota" else assignment.gt_index == NEITHER
            if len(batch.ignore_boxes):
                inside = points_inside(
                    points_of(grid, device), batch.ignore_boxes, batch.ignore_image, len(batch.images)
                )
                ignored = inside if ignored is None else ignored | inside
            losses = detection_losses(predictions, assignment, *truth, ignored)
        return losses, assignment, detached

    def statistics(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """Numbers about the assignment of a training batch, see kernels.assignment_statistics. Waits for the device."""
        truth = batch.gt_boxes, batch.gt_labels, batch.gt_offsets
        grid = PointGrid.for_image(tuple(batch.images.shape[-2:]), STRIDES)
        return assign_with_statistics(self.config.assigner, Inputs(*predictions[:2], *truth, grid), self.config.ota)[2]

    def compile_training(self, mode: str) -> str:
        """Compile a training step, or without Triton's assignment the network, in place; return a name for this."""
        whole = HAS_TRITON and self.mean.device.type == "cuda" and self.config.assigner == "ota"
        for module in (self,) if whole else (self.backbone, self.head):
            module.compile(dynamic=False, mode=mode)
        return "backbone, neck and head" + ", assignment and losses" * whole

    def detect_padded(self, images: Tensor, sizes: Tensor, suppress=suppressed) -> tuple[Tensor, Tensor, Tensor]:
        """Result of `postprocess` for `images` and `sizes` of a Batch."""
        return postprocess(*self.predict_raw(self.normalise(images, sizes)), sizes, self.config, suppress)

    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        return unpad(*self.detect_padded(images, sizes), self.class_names)

    def resize_and_detect(self, images: list[Tensor], first: int = 0) -> list[Detections]:
        """Detect in batches of one padded size, so that no detection depends on other images. Raises ImageError, in
        which the images count from `first` on."""
        groups, detections, device = defaultdict(list), [None] * len(images), self.mean.device
        for i, image in enumerate(images):
            try:
                resized = self.resize(image)
            except RuntimeError as error:
                size = f"{image.shape[2]} x {image.shape[1]} px"
                raise ImageError(f"image {first + i}, {size}, cannot be resized: {error}") from error
            groups[tuple(map(padded_side, resized.shape[1:]))].append((i, resized))
        for group in groups.values():
            batch, sizes = pad_images([resized for _, resized in group])
            scales = (torch.tensor([images[i].shape[1:] for i, _ in group]) / sizes).flip(1).repeat(1, 2)
            results = self.detect(batch.to(device), sizes.to(device))
            for (i, _), scale, result in zip(group, scales, results, strict=True):
                detections[i] = result._replace(boxes=result.boxes * scale.to(result.boxes.device))
        return detections

    @torch.no_grad()
    def predict(self, images: ImageLike | list[ImageLike], score: float | None = None, batch_size: int = 8):
        """Return Detections of at least `score` in an image, or, for a list or tuple, a list of them; on the CPU.
        Without `score` each class has its own: `cuts`.

        For the kinds of images see images.to_tensor; `batch_size` images are read at a time. Boxes are in px of the
        upright image. No score is below `config.score_threshold`. Raises ImageError: an image cannot be read;
        RuntimeError: the detector is in training mode; ValueError: `batch_size` or `score` is not valid.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}, it must be an integer of at least 1")
        if not isinstance(score, Real | None) or score != score:
            raise ValueError(f"score is {score!r}, it must be a number or None")
        if self.training:
            raise RuntimeError("the detector is in training mode; call eval() first")
        if not isinstance(images, list | tuple):
            return self.predict([images], score, batch_size)[0]
        results, cuts = [], torch.tensor(self.cuts)
        for start in range(0, len(images), batch_size):
            chunk = enumerate(images[start : start + batch_size], start)
            for detections in self.resize_and_detect([to_tensor(image, f"image {i}") for i, image in chunk], start):
                boxes, scores, labels = (column.cpu() for column in detections[:3])
                kept = scores >= (cuts[labels] if score is None else score)
                results.append(Detections(boxes[kept], scores[kept], labels[kept], self.class_names))
        return results
