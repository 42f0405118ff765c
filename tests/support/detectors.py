"""Small detectors with random weights, and images and targets for them."""

from pathlib import Path

import torch

from model import Detector, DetectorConfig, save_weights

NAMES, IDS = ["cat", "dog", "tuba"], [3, 5, 9]
EXPORT_FLAGS = ("--weights", "ota.safetensors", "--format", "onnx", "--nms")  # as in docs/export.md


def tiny_detector(backbone: str = "test_resnet", **settings) -> Detector:
    torch.manual_seed(0)
    settings = {"num_classes": 3, "channels": 32, "head_convs": 1, "image_size": (96, 128)} | settings
    return Detector(DetectorConfig(backbone=backbone, **settings))


def save_lively_detector(path: Path, class_std: float, box_std: float, **settings) -> Path:
    """Save weights of a detector that finds something everywhere: its head has larger weights than at the start."""
    detector = tiny_detector(**settings)
    for parameter in detector.head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=class_std)
    torch.nn.init.normal_(detector.head.box.weight, std=box_std)
    save_weights(path, detector, {"class_names": NAMES, "category_ids": IDS})
    return path


def random_batch(sizes: list[tuple[int, int]], counts: list[int] | None = None) -> tuple[list, list]:
    """Images of (height, width) px and targets with so many boxes (3 by default), lists as a Detector takes them."""
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    targets = []
    for (height, width), count in zip(sizes, counts or [3] * len(sizes), strict=True):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.6
        side = 8 + torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 0.3
        labels = torch.randint(0, 3, (count,), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + side], 1), "labels": labels})
    return images, targets
