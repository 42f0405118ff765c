"""A training step of this project and one of torchvision's FCOS, on equal terms, for benchmarks/train_step.py.

Equal: weights of backbone and neck (random ones, no download), all of the backbone's convolutions trained and its batch
norms frozen, as both recipes do with pretrained weights; head of two towers of four 3 x 3 convolutions and GroupNorm;
images, boxes and labels, on the device before the step; precision, the losses in float32; SGD with momentum.
Not equal: torchvision assigns by center sampling and size, image by image, weighs its three losses alike, learns
centerness in place of the IoU, normalises and pads image by image and asks the device whether the boxes are valid;
ours has a learned scale per level, in-place ReLUs in the towers and, like its weights, images with channels last.
The weights are untrained and hardly move, so the labels are those of a first step and differ in number.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.detection.fcos import FCOS
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import train
from kernels import PointGrid
from model import Detector, DetectorConfig, assigners, detector
from model.batch import Batch, pack
from tests.support.scenes import COCO_SIZES_PX, COCO_STRIDES, WORKLOADS, ragged_counts, random_boxes

COCO = WORKLOADS["coco"]
CHANNELS = 256
OPTIMIZER = argparse.Namespace(optimizer="sgd", lr=1e-6, weight_decay=1e-4)  # so slow that the labels stay
PHASES = ("forward", "assignment", "losses", "backward", "optimizer")
MERGED_PHASES = ("forward, assignment and losses", "backward", "optimizer")  # of one compiled region


class Case(NamedTuple):
    backbone: str
    image_size: tuple[int, int]
    images: int


def make_batch(case: Case) -> Batch:
    """Noise as uint8 images of one size; with the image size and number of `coco`, that workload's ground truths.

    On the host, so that it takes memory of a device only while it is needed there.
    """
    generator = torch.Generator().manual_seed(0)
    grid = PointGrid.for_image(case.image_size, COCO_STRIDES)
    sizes_px = tuple(px * case.image_size[0] / COCO.image_size[0] for px in COCO_SIZES_PX)
    counts = ragged_counts(case.images, round(sum(COCO.counts) / len(COCO.counts) * case.images))
    boxes = [random_boxes(grid, count, sizes_px, False, generator) for count in counts]
    labels = torch.randint(COCO.num_classes, (sum(counts),), generator=generator).split(counts)
    images = [torch.randint(256, (3, *case.image_size), dtype=torch.uint8, generator=generator) for _ in counts]
    targets = [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]
    return pack(images, targets)


def targets_of(batch: Batch) -> list[dict[str, Tensor]]:
    counts = batch.gt_offsets.diff().tolist()
    rows = zip(batch.gt_boxes.split(counts), batch.gt_labels.split(counts), strict=True)
    return [{"boxes": boxes, "labels": labels} for boxes, labels in rows]


class Contestant:
    """A model in training. `moments` are when its latest step began and when each of its `phases` ended.

    compile   has torch.compile take the model from here on
    backward  computes the gradients and returns the loss terms, detached
    matched   (N,) or (B, N), below 0 for background: the labels of the latest step
    pyramid   the feature maps of the first image, in float32
    """

    compile: Callable[[], None]
    backward: Callable[[], dict[str, Tensor]]
    matched: Callable[[], Tensor]
    pyramid: Callable[[], list[Tensor]]

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model, self.device, self.moments, self.phases = model.to(device).train(), device, [], PHASES
        self.optimizer = train.create_optimizer(model, OPTIMIZER)

    def step(self) -> dict[str, Tensor]:
        self.moments = []
        self.mark()
        losses = self.backward()
        self.mark()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.mark()
        return losses

    def mark(self) -> None:
        """An event in the device's queue, which nobody waits for; the time on a CPU."""
        if self.device.type == "cuda":
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def marking(self, call: Callable, *, before: bool, after: bool) -> Callable:
        """`call`, with a moment where it begins, where it ends or both."""

        def marked(*args, **kwargs):
            if before:
                self.mark()
            result = call(*args, **kwargs)
            if after:
                self.mark()
            return result

        return marked

    def phases_ms(self, moments: list) -> list[float]:
        """Of a step whose moments have passed."""
        pairs = zip(moments, moments[1:], strict=False)
        if self.device.type == "cuda":
            return [begin.elapsed_time(end) for begin, end in pairs]
        return [1e3 * (end - begin) for begin, end in pairs]


@dataclass
class Sanity:
    """A first pass over the batch, without an update."""

    parameters: int
    points: int
    positives: int
    losses: dict[str, float]
    gradient_norm: float
    tflop: float | None  # of all matrix products and convolutions, forward and backward; None when compiled

    def failures(self) -> list[str]:
        conditions = {
            f"the losses are not finite: {self.losses}": all(map(math.isfinite, self.losses.values())),
            f"the gradient's norm is {self.gradient_norm:g}": 0 < self.gradient_norm < math.inf,
            "no point is matched": self.positives > 0,
        }
        return [text for text, holds in conditions.items() if not holds]


def check(contestant: Contestant, *, count_flops: bool) -> Sanity:
    with FlopCounterMode(display=False) if count_flops else nullcontext() as counter:
        losses = contestant.backward()
    parameters = list(contestant.model.parameters())
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    contestant.optimizer.zero_grad(set_to_none=True)
    matched = contestant.matched()
    return Sanity(
        sum(p.numel() for p in parameters if p.requires_grad),
        matched.numel(),
        int((matched >= 0).sum()),
        {name: value.item() for name, value in losses.items()},
        norm.item(),
        counter.get_total_flops() / 1e12 if counter else None,
    )


def pyramid_difference(maps: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(maps, others, strict=True))


def torchvision_backbone(name: str) -> BackboneWithFPN:
    """That of fcos_resnet50_fpn, frozen norms and all, but for five trained layers instead of three."""
    torch.manual_seed(0)
    return resnet_fpn_backbone(
        backbone_name=name,
        weights=None,
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(CHANNELS, CHANNELS),
    )


@contextmanager
def ours(case: Case, batch: Batch, bf16: bool) -> Iterator[Contestant]:
    weights = torchvision_backbone(case.backbone)
    model = Detector(DetectorConfig(COCO.num_classes, case.backbone, channels=CHANNELS, frozen_norm=True))
    model.backbone.body.load_state_dict(weights.body.state_dict())
    model.backbone.neck.load_state_dict(weights.fpn.state_dict())
    contestant, batches, marks = Contestant(model, batch.images.device), [batch], ExitStack()
    latest = []

    def step(call: Callable) -> Callable:
        def remember(batch: Batch) -> tuple:
            latest[:] = call(batch)
            return tuple(latest)

        return lambda: train.backward(remember, model, batches, bf16)

    contestant.backward = step(model)
    contestant.matched = lambda: latest[1].gt_index
    contestant.pyramid = lambda: model.backbone(model.normalise(batch.images[:1], batch.sizes[:1]))

    def compile() -> None:
        """As train.py does with --compile, rows of padding in the batch and all."""
        padded = pack(list(batch.images), targets_of(batch), tuple(sorted(case.image_size)))
        batches[0] = padded.to(batch.images.device)._replace(images=batch.images)  # not in memory twice
        batches[0].mark_ragged()
        if "losses" in model.compile_training("default"):  # one region, in which no moment can be marked
            marks.close()
            contestant.backward = step(contestant.marking(model, before=False, after=True))
            contestant.phases = MERGED_PHASES

    contestant.compile = compile
    assign = contestant.marking(assigners.ota_assign, before=True, after=True)
    losses = contestant.marking(detector.detection_losses, before=False, after=True)
    with marks:
        marks.enter_context(patch.object(assigners, "ota_assign", assign))
        marks.enter_context(patch.object(detector, "detection_losses", losses))
        yield contestant


@contextmanager
def torchvision(
    case: Case, batch: Batch, bf16: bool, memory_format: torch.memory_format = torch.contiguous_format
) -> Iterator[Contestant]:
    """fcos_resnet50_fpn, or that on another ResNet, without its resizing."""
    model = FCOS(torchvision_backbone(case.backbone), COCO.num_classes, _skip_resize=True)
    contestant = Contestant(model.to(memory_format=memory_format), batch.images.device)
    # It would round anchors and boxes to bfloat16, to 8 px at the right border, and compute its losses from that.
    model.head.register_forward_hook(lambda _, __, outputs: {name: value.float() for name, value in outputs.items()})
    model.anchor_generator.register_forward_pre_hook(
        lambda _, inputs: (inputs[0], [torch.empty((), device=f.device).expand(f.shape) for f in inputs[1]])
    )
    targets = targets_of(batch)

    def images() -> list[Tensor]:
        return list(batch.images.float() / 255)  # it takes float images only

    def backward() -> dict[str, Tensor]:
        with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=bf16):
            losses = model(images(), targets)
        sum(losses.values()).backward()
        return {name: value.detach() for name, value in losses.items()}

    def compile() -> None:
        for part in (model.backbone, model.head):
            part.compile(dynamic=False)

    matched = []

    def head_losses(targets: list, outputs: dict, anchors: list, indices: list[Tensor], losses_of: Callable) -> dict:
        matched[:] = indices
        return losses_of(targets, outputs, anchors, indices)

    contestant.compile = compile
    contestant.backward = backward
    contestant.matched = lambda: torch.stack(matched)
    contestant.pyramid = lambda: list(model.backbone(model.transform(images()[:1])[0].tensors).values())
    keeping = partial(head_losses, losses_of=model.head.compute_loss)
    model.head.compute_loss = contestant.marking(keeping, before=True, after=True)
    model.compute_loss = contestant.marking(model.compute_loss, before=True, after=False)
    yield contestant


CONTESTANTS = {
    "ours": ours,
    "torchvision": torchvision,
    "torchvision, channels last": partial(torchvision, memory_format=torch.channels_last),
}
