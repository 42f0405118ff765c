"""Annotation files in COCO layout, CrowdHuman's or Pascal VOC's (or generated shapes) to uint8 images and boxes."""

from data.checks import DatasetError, check_annotations
from data.coco import CocoDataset, collate
from data.crowd_metrics import crowd_metrics
from data.files import printable
from data.shapes import generate_shapes
from data.splits import Split, find_splits, is_crowdhuman
from data.transforms import eval_transform, resized_size, train_transform

__all__ = [
    "CocoDataset",
    "DatasetError",
    "Split",
    "check_annotations",
    "collate",
    "crowd_metrics",
    "eval_transform",
    "find_splits",
    "generate_shapes",
    "is_crowdhuman",
    "printable",
    "resized_size",
    "train_transform",
]
