"""Predictions of a trained detector on its data, one image at a time, and lists of boxes in COCO format."""

from collections import Counter, defaultdict

import torch
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from data import CocoDataset, DatasetError
from model import Detector
from model.batch import pack
from tests.support.scenes import Scene


@torch.no_grad()
def predicted_scene(detector: Detector, dataset: CocoDataset, i: int) -> tuple[Tensor, Scene]:
    """Image i, uint8 (3, H, W) without padding, and the arguments of ota_assign for it alone.

    The network runs in evaluation mode, in float32 on the CPU. If its batch norms learn, its predictions differ from
    those in training.
    """
    image, target = dataset[i]
    batch = pack([image], [target])
    predictions, grid = detector.predict_raw(detector.normalise(batch.images, batch.sizes))
    truth = batch.gt_boxes, batch.gt_labels, batch.gt_offsets
    return image, Scene(predictions.logits, predictions.boxes, *truth, grid)


def find_image(dataset: CocoDataset, wanted: str | None) -> int:
    """The index of an image given by index or file name; None is the one with the most objects. Raises DatasetError."""
    if wanted is None:
        counts = Counter(a["image_id"] for a in dataset.annotations["annotations"] if not a["iscrowd"])
        return max(range(len(dataset)), key=lambda i: counts[dataset.images[i]["id"]])
    names = [image["file_name"] for image in dataset.images]
    if wanted in names:
        return names.index(wanted)
    if wanted.isdecimal() and int(wanted) < len(dataset):
        return int(wanted)
    options = f"a file name in {dataset.split.annotations} nor an index in 0..{len(dataset) - 1}"
    raise DatasetError(f"--image {wanted} is neither {options}")


def by_image(records: list[dict]) -> dict[int, list[dict]]:
    """Return image id -> annotations or results in COCO format; regions to ignore are left out."""
    groups = defaultdict(list)
    for record in records:
        if not record.get("iscrowd"):
            groups[record["image_id"]].append(record)
    return groups


def overlaps(some: list[dict], others: list[dict]) -> Tensor:
    """Return the IoU (len(some), len(others)) of the boxes of two lists in COCO format."""
    boxes = (torch.tensor([r["bbox"] for r in rows], dtype=torch.float64).reshape(-1, 4) for rows in (some, others))
    return box_iou(*(box_convert(b, "xywh", "xyxy") for b in boxes))
