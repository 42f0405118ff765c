"""A tiny detector, random images for it, and the gradients of a training step in several passes."""

import torch
from torch import Tensor

import train
from model import Detector, DetectorConfig
from model.batch import pack


def tiny_detector(backbone: str = "test_resnet", num_classes: int = 3, **settings) -> Detector:
    """Return the same detector at every call."""
    torch.manual_seed(0)
    settings = {"channels": 32, "head_convs": 1, "image_size": (96, 128)} | settings
    return Detector(DetectorConfig(num_classes, backbone, **settings))


def random_images(sizes: list[tuple[int, int]], counts: list[int]) -> tuple[list[Tensor], list[dict]]:
    """Return uint8 images of the given heights and widths, px, and targets with the given numbers of boxes."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    targets = []
    for (height, width), count in zip(sizes, counts, strict=True):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        side = 8 + torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.3
        labels = torch.randint(0, 3, (count,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + side], 1), "labels": labels})
    return images, targets


def step_gradients(detector: Detector, images: list, targets: list, passes: int) -> tuple[dict, list[Tensor]]:
    """Return loss terms and gradients of a step in so many passes."""
    size = len(images) // passes
    parts = [slice(i, i + size) for i in range(0, len(images), size)]
    terms, _ = train.backward(detector, detector, [pack(images[p], targets[p]) for p in parts], bf16=False)
    return terms, [p.grad for p in detector.parameters()]
