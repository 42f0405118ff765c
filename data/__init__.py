"""Annotation files in any form of the table in layouts.py (or generated shapes) to uint8 images and boxes."""

# ruff: noqa: F401
from data.checks import Split, check_annotations
from data.dataset import AUGMENTATIONS, CocoDataset, eval_transform, resized_size, train_transform
from data.files import DatasetError, printable
from data.forms import read_split
from data.layouts import BOXES, SPLITS, find_form, find_splits
from data.shapes import generate_shapes
