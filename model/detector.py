"""The detector: FCOS on a timm backbone, trained with optimal transport assignment."""

from collections import defaultdict
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from numbers import Integral, Real
from typing import NamedTuple, overload

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from images import ImageError, ImageLike, to_tensor
from kernels import Assignment, OTAConfig, PointGrid
from kernels.assign import HAS_TRITON
from kernels.grid import MAX_SIDE_PX

from .assigners import NEITHER, STRATEGIES, assign, statistics_of
from .backbone import STRIDES, Backbone
from .batch import Batch, pack, pad_images, padded_side
from .fields import Rule, first_flaw, number, one_of_type, whole
from .head import GROUP_CHANNELS, Head, Predictions
from .losses import detection_losses, points_inside
from .postprocess import postprocess

_cached_points = lru_cache(maxsize=64)(PointGrid.points)


def points_of(grid: PointGrid, device: torch.device) -> Tensor:
    """Without a launch, but for the first time; torch.compile has its own way with constants."""
    return (grid.points if torch.compiler.is_compiling() else partial(_cached_points, grid))(device)


def _is_image_size(value: object) -> bool:
    return isinstance(value, tuple) and [type(side) for side in value] == [int, int] and 0 < value[0] <= value[1]


# The upper bounds are far from use: a weights file cannot ask for more.
RULES: dict[str, Rule] = {
    "num_classes": whole(1, 100_000),
    "backbone": one_of_type(str, "the name of a timm model"),
    "image_size": (
        lambda value: _is_image_size(value) and value[1] <= MAX_SIDE_PX,
        f"the shorter and the longest side in px, up to {MAX_SIDE_PX}",
    ),
    "channels": (
        lambda value: type(value) is int and 0 < value <= 2**14 and value % GROUP_CHANNELS == 0,
        f"a multiple of {GROUP_CHANNELS} (--channels) up to {2**14}",
    ),
    "head_convs": whole(0, 100),
    "frozen_norm": one_of_type(bool, "true or false"),
    "score_threshold": number(0, 1),
    "topk_per_level": whole(1, 1_000_000),
    "nms_iou": number(0, 1),
    "max_detections": whole(1, 1_000_000),
    "assigner": (lambda value: value in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
    "ota": one_of_type(OTAConfig, "settings of the assigner ota"),
}


@dataclass(frozen=True)
class DetectorConfig:
    """Everything that is needed to build the network again.

    image_size      shorter side and longest side (px) that images are resized to for inference
    channels        width of neck and head, a multiple of 8
    head_convs      convolutions per tower
    frozen_norm     the backbone's batch norms are constants
    assigner        name of the label assignment, see model/assigners
    ota             settings of the assigner "ota"
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
    assigner: str = "ota"
    ota: OTAConfig = field(default_factory=OTAConfig)

    def __post_init__(self):
        if flaw := first_flaw(vars(self), RULES):
            raise ValueError(f"DetectorConfig.{flaw}")


class Detections(NamedTuple):
    """What was found in one image, best first; tensors on the CPU."""

    boxes: Tensor  # (n, 4) float32 x1 y1 x2 y2 px of the image as given, upright
    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) int64 in 0..C-1
    names: list[str]  # n class names


class Detector(nn.Module):
    """The contract of torchvision's detection models.

    Input: a list of images (3, H, W) RGB, uint8 in 0..255 or floating point in 0..1, of any sizes; in training
    also a list of targets, one dict an image, with `boxes` (n, 4) float x1 y1 x2 y2 in px and `labels` (n,) integers
    in 0..C-1 (contiguous, no background class), and, where wanted, `ignore` (m, 4): regions such as crowds, whose
    points are no negatives.

    Output in training: a dict of scalar losses `cls`, `box`, `iou`, to be summed, the Assignment and the Predictions
    that it was made from, detached. Images are taken as they are.
    Output in evaluation: a list of dicts `boxes` (n, 4), `scores` (n,), `labels` (n,), best first, in px of the
    images as given. Images are resized to `config.image_size` first; one that has this size already is not touched.

    In training a `Batch` on the detector's device may take the place of both lists. Under torch.autocast the network
    runs in the lower precision, the assignment and the losses in float32; so it does after half() or bfloat16(), and
    detections are float32.

    `predict` takes images of any kind and is all that a user of a trained detector needs. `class_names` and
    `category_ids` are those of the annotation file, by label; load_weights sets them, a new detector has numbers.
    """

    def __init__(self, config: DetectorConfig, pretrained: bool = False):
        super().__init__()
        self.class_names = [str(label) for label in range(config.num_classes)]
        self.category_ids = list(range(config.num_classes))
        self.backbone = Backbone(config.backbone, config.channels, pretrained, config.frozen_norm)
        self.config = replace(config, backbone=self.backbone.name)
        self.head = Head(config.channels, config.head_convs, config.num_classes, STRIDES)
        self.register_buffer("mean", torch.tensor(self.backbone.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.backbone.std).view(3, 1, 1), persistent=False)
        shorter, longest = config.image_size
        size, max_size = ([shorter], longest) if shorter < longest else (None, longest)
        self.resize = v2.Resize(size, max_size=max_size, antialias=True)
        self.use_memory_format(torch.channels_last)

    def use_memory_format(self, memory_format: torch.memory_format) -> None:
        """Of images and weights; most convolutions are faster with channels last."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)

    def forward(self, images: list[Tensor] | Batch, targets: list[dict[str, Tensor]] | None = None):
        if not self.training:
            return self.detect(images)
        if not isinstance(images, Batch):
            if targets is None or len(targets) != len(images):
                raise ValueError("a training step needs one target (boxes, labels) per image")
            images = pack(images, targets).to(self.mean.device)
        return self.losses(images)

    def normalise(self, images: Tensor, sizes: Tensor) -> Tensor:
        """`images` and `sizes` of a Batch to normalised float32, zero outside of every image's own size."""
        mean, std = self.mean.float(), self.std.float()
        scale = (1 if images.is_floating_point() else 1 / 255) / std
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        inside = (rows < sizes[:, :1])[:, :, None] & (columns < sizes[:, 1:])[:, None]
        images = images.to(torch.float32, memory_format=self.memory_format)
        return torch.where(inside[:, None], torch.addcmul(-mean / std, images, scale), 0)

    def batch(self, images: list[Tensor]) -> Tensor:
        """Images of different sizes -> one normalised (B, 3, H, W), padded with zeros to multiples of 32 px."""
        return self.normalise(*(tensor.to(self.mean.device) for tensor in pad_images(images)))

    def predict_raw(self, batch: Tensor) -> tuple[Predictions, PointGrid]:
        features = self.backbone(batch.to(self.head.scales.dtype))  # the network's, after half() or double()
        grid = PointGrid(STRIDES, tuple(tuple(level.shape[-2:]) for level in features))
        return self.head(features, points_of(grid, batch.device)), grid

    def losses(self, batch: Batch) -> tuple[dict[str, Tensor], Assignment, Predictions]:
        predictions, grid = self.predict_raw(self.normalise(batch.images, batch.sizes))
        device = predictions.boxes.device
        with torch.autocast(device.type, enabled=False):
            detached = Predictions(*(tensor.detach() for tensor in predictions))
            inputs = self.assigner_inputs(detached, batch, grid)
            assignment = assign(self.config.assigner, *inputs, config=self.config.ota)
            ignored = None if self.config.assigner == "ota" else assignment.gt_index == NEITHER
            if len(batch.ignore_boxes):
                points = points_of(grid, device)
                inside = points_inside(points, batch.ignore_boxes, batch.ignore_image, len(batch.images))
                ignored = inside if ignored is None else ignored | inside
            losses = detection_losses(predictions, assignment, batch.gt_boxes, batch.gt_labels, ignored)
        return losses, assignment, detached

    def assigner_inputs(self, predictions: Predictions, batch: Batch, grid: PointGrid) -> tuple:
        truth = batch.gt_boxes, batch.gt_labels, batch.gt_offsets
        return predictions.logits, predictions.boxes, *truth, grid

    def statistics(self, predictions: Predictions, batch: Batch) -> dict[str, Tensor]:
        """Numbers about the assignment of a training batch, see model.assigners.statistics_of; waits for the device."""
        grid = PointGrid.for_image(tuple(batch.images.shape[-2:]), STRIDES)
        inputs = self.assigner_inputs(predictions, batch, grid)
        numbers = statistics_of(self.config.assigner, *inputs, config=self.config.ota)
        return {name: value.to(self.mean.device) for name, value in numbers.items()}

    def compile_training(self, mode: str) -> str:
        """Compile a training step in place: all of it where the assignment is an operator, else the network alone.

        Returns what is compiled, in words. `mode` is torch.compile's.
        """
        if HAS_TRITON and self.mean.device.type == "cuda" and self.config.assigner == "ota":
            self.compile(dynamic=False, mode=mode)
            return "backbone, neck and head, assignment and losses"
        for part in (self.backbone, self.head):
            part.compile(dynamic=False, mode=mode)
        return "backbone, neck and head"

    @overload
    def predict(self, images: ImageLike, score: float = 0.0, batch_size: int = 8) -> Detections: ...

    @overload
    def predict(
        self, images: list[ImageLike] | tuple[ImageLike, ...], score: float = 0.0, batch_size: int = 8
    ) -> list[Detections]: ...

    @torch.no_grad()
    def predict(self, images, score=0.0, batch_size=8):
        """Detections of at least `score` in an image, or, for a list or tuple, a list of them.

        images: paths, PIL images, numpy arrays (H, W, 3) uint8, tensors (3, H, W), see images.to_tensor; RGB. A path or
        PIL image with an EXIF orientation is turned upright, and boxes are in px of the upright image.
        score: 0 gives all that the evaluation gets, which starts at `config.score_threshold`.
        batch_size: images that are read at a time; those that pad to the same size go through the network together,
        so that no detection depends on the images beside it.
        Raises ImageError: an image cannot be read. Raises RuntimeError: the detector is in training mode. Raises
        ValueError: `batch_size` is no whole number of at least 1, or `score` is no number.
        """
        if not isinstance(batch_size, Integral) or batch_size < 1:
            raise ValueError(f"batch_size is {batch_size!r}, it must be a whole number of at least 1")
        if not isinstance(score, Real | Tensor) or score != score:  # NaN
            raise ValueError(f"score is {score!r}, it must be a number")
        if self.training:
            raise RuntimeError("the detector is in training mode, in which it predicts nothing; call eval() first")
        if not isinstance(images, list | tuple):
            return self.predict([images], score, batch_size)[0]
        results = [None] * len(images)
        for start in range(0, len(images), batch_size):
            groups = defaultdict(list)
            for i, image in enumerate(images[start : start + batch_size], start):
                image = to_tensor(image)
                try:
                    resized = self.resize(image)
                except RuntimeError as error:
                    raise ImageError(
                        f"an image of {image.shape[2]} x {image.shape[1]} px is too narrow: nothing of it is left once "
                        f"its longest side has {self.config.image_size[1]} px"
                    ) from error
                groups[tuple(map(padded_side, resized.shape[1:]))].append((i, resized, tuple(image.shape[1:])))
            for group in groups.values():
                indices, resized, sizes = zip(*group, strict=True)
                for i, found in zip(indices, self.detect_resized(resized, sizes), strict=True):
                    kept = found["scores"] >= score
                    boxes, scores, labels = (found[name][kept].cpu() for name in ("boxes", "scores", "labels"))
                    results[i] = Detections(boxes, scores, labels, [self.class_names[c] for c in labels.tolist()])
        return results

    def detect(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return self.detect_resized([self.resize(image) for image in images], [i.shape[-2:] for i in images])

    def detect_resized(self, resized: list[Tensor], given: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Of images that have the size for inference; boxes in px of images of the (height, width) `given`."""
        predictions, grid = self.predict_raw(self.batch(resized))
        sizes = [tuple(image.shape[-2:]) for image in resized]
        c = self.config
        detections = postprocess(
            predictions, grid, sizes, c.score_threshold, c.topk_per_level, c.nms_iou, c.max_detections
        )
        scales = [(w / width, h / height) * 2 for (h, w), (height, width) in zip(given, sizes, strict=True)]
        scales = torch.tensor(scales).to(self.mean.device, non_blocking=True)
        for detection, scale in zip(detections, scales, strict=True):
            detection["boxes"] = detection["boxes"] * scale
        return detections
