"""Annotation files in COCO layout (or generated shapes) to uint8 images and boxes."""

from data.checks import DatasetError, check_annotations
from data.coco import CocoDataset, Split, collate, find_splits
from data.shapes import generate_shapes
from data.transforms import eval_transform, resized_size, train_transform

__all__ = [
    "CocoDataset",
    "DatasetError",
    "Split",
    "check_annotations",
    "collate",
    "eval_transform",
    "find_splits",
    "generate_shapes",
    "resized_size",
    "train_transform",
]
