"""A report on a data set before anything is trained on it: counts, sizes, problems, and pictures of samples."""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms import v2
from tqdm import tqdm

from data.dataset import CocoDataset, SeededDataset, batches_from
from data.draw import draw_boxes, save_contact_sheet
from data.files import DatasetError, path_inside, printable
from data.layouts import Splits
from data.problems import Problems
from kernels import OTAConfig, PointGrid
from kernels.assign_torch import supplies
from kernels.center_prior_torch import pairs_inside

CLASSES = "boxes of a class"
STRIDE_PX = 8  # of the finest level
SIDES = (0, 1, 2, 4, 8, 16, 32, math.inf)  # of boxes, in strides: bounds of the table's rows
BOXES_AT_ONCE = 10_000  # so that their candidate pairs fit in memory
SAMPLES, SAMPLE_PX = 24, 480  # pictures of the contact sheet, and the longer side of each


def open_splits(splits: Splits, transform: Callable) -> tuple[list[CocoDataset], list[str]]:
    """Return the splits that can be read, and messages: why another cannot, or why a training would not start."""
    datasets, messages = [], [] if splits.train else ["there is no training split"]
    for split in filter(None, splits):
        try:
            dataset = CocoDataset(split, transform, known=datasets[0].classes if datasets else None)
            datasets.append(dataset)
            dataset.require_classes(datasets[0].classes | {"source": datasets[0].split.annotations})
            if not dataset.num_boxes:
                messages.append(f"{split.annotations} has no boxes to learn from or to find")
        except DatasetError as error:
            messages.append(str(error))
    return datasets, messages


def print_tables(datasets: list[CocoDataset], image_size: tuple[int, int], config: OTAConfig) -> None:
    """Print counts of images and boxes, with a column for each split; boxes have their size at `image_size`."""
    tables = [counts_of(dataset, image_size, config) for dataset in datasets]
    width = max(len(text) for table in tables for title, rows in table.items() for text in (title, *rows))
    for title in tables[0]:
        print(f"\n{title:{width}}" + "".join(f"{dataset.split.name:>10}{'':8}" for dataset in datasets).rstrip())
        columns = [table[title] for table in tables]
        for row in dict.fromkeys(chain(*columns)):
            counts = [column.get(row, 0) for column in columns]
            shares = [f"{n / max(1, sum(column.values())):8.1%}" for n, column in zip(counts, columns, strict=True)]
            cells = "".join(f"{n:10d}{share if title else '':8}" for n, share in zip(counts, shares, strict=True))
            mark = "  not in every split" if title == CLASSES and 0 in counts and any(counts) else ""
            print(f"{row:{width}}{cells}{mark}".rstrip())


def counts_of(dataset: CocoDataset, image_size: tuple[int, int], config: OTAConfig) -> dict[str, dict[str, int]]:
    """Return title of a table -> name of a row -> count."""
    images, boxes = dataset.targets(image_size)
    totals = {
        "images": len(dataset),
        "images without boxes": len(dataset) - len(np.unique(images)),
        "boxes": dataset.num_boxes,
        "dropped boxes": dataset.dropped_boxes,
        "regions to ignore": dataset.crowd_boxes,
    }
    sides = np.histogram((boxes[:, 2:] - boxes[:, :2]).min(1) / STRIDE_PX, SIDES)[0].tolist()
    ranges = ["under 1", *(f"{low} to {high}" for low, high in pairwise(SIDES[1:-1])), f"{SIDES[-2]} and more"]
    points = np.bincount(most_points(boxes, max(image_size), config).clip(max=2), minlength=3).tolist()
    return {
        "": totals,
        CLASSES: dict(zip(map(printable, dataset.class_names), dataset.class_counts, strict=True)),
        f"shorter side in strides of {STRIDE_PX} px": dict(zip(ranges, sides, strict=True)),
        "points that a box gets at most": dict(zip(("none inside: the closest", "one", "more"), points, strict=True)),
    }


def most_points(boxes: np.ndarray, longest_px: int, config: OTAConfig) -> np.ndarray:
    """Return (n,) the supply of each box in px for predictions that fit exactly; 0 without a candidate inside the box,
    which then gets the closest point. On a grid as large as the largest image's."""
    grid, found = PointGrid.for_image((longest_px, longest_px)), []
    for part in torch.from_numpy(boxes).float().split(BOXES_AT_ONCE):
        row, _ = pairs_inside(part, grid, config)
        found.append(supplies(row, torch.ones(len(row)), len(part), config))
    return torch.cat(found).numpy()


def unusable_images(datasets: list[CocoDataset]) -> Problems:
    """Return the images that a training could not load, found by loading all of them."""

    def fault_of(dataset: CocoDataset, i: int) -> str | None:
        try:
            dataset.load(i)
        except DatasetError as error:
            return str(error)

    images = [(dataset, i) for dataset in datasets for i in range(len(dataset))]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        faults = pool.map(fault_of, *zip(*images, strict=True))
        faults = [*filter(None, tqdm(faults, "load", len(images), leave=False, disable=None))]
    return {"images that cannot be loaded": faults} if faults else {}


def repeated_images(datasets: list[CocoDataset]) -> Problems:
    """Return the images whose files have the same bytes, across the splits and in one. Only files of one size are read,
    and those that can be."""
    problems, same_size, same_bytes = defaultdict(list), defaultdict(list), defaultdict(list)
    for split, image in ((dataset.split, image) for dataset in datasets for image in dataset.images):
        with suppress(OSError, ValueError):
            path = path_inside(split.images, image["file_name"], split.follow_links)
            same_size[path.stat().st_size].append((split.name, image, path))
    for name, image, path in (entry for entries in same_size.values() if len(entries) > 1 for entry in entries):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        same_bytes[digest].append((name, f"{name} image {image['id']} ({image['file_name']})"))
    for entries in same_bytes.values():
        names = {name for name, _ in entries}
        if len(entries) > 1:
            kind = f"in {' and '.join(sorted(names))}" if len(names) > 1 else f"more than once in {entries[0][0]}"
            problems[f"images {kind} (same bytes)"].append(" = ".join(name for _, name in entries))
    return problems


def save_samples(dataset: CocoDataset, seed: int, path: Path) -> None:
    """Save a contact sheet of samples as the training with `seed` sees them: boxes in the colour of their class,
    regions to ignore in white. A small set is seen in several epochs."""
    samples, shrink = SeededDataset(dataset, seed), v2.Resize(None, max_size=SAMPLE_PX, antialias=True)
    pictures = []
    for (key,) in batches_from(0, SAMPLES, dataset.tall, 1, seed):
        image, target = shrink(*samples[key])
        shown = target["ignore"], target["boxes"], target["labels"]
        pictures.append(draw_boxes(image, *shown, dataset.class_names))
    try:
        save_contact_sheet(pictures, path)
    except (OSError, ValueError) as error:  # Pillow's, for an unknown extension
        raise DatasetError(f"--sheet {path}: cannot be written: {error}") from error


def write_coco(datasets: list[CocoDataset], root: Path) -> None:
    """Write the splits as read to a new folder in COCO layout, whose image folders are links to their own."""
    (root / "annotations").mkdir(parents=True)
    for dataset in datasets:
        name = dataset.split.name
        (root / name).symlink_to(dataset.split.images.absolute(), target_is_directory=True)
        (root / "annotations" / f"instances_{name}.json").write_text(json.dumps(dataset.annotations))
