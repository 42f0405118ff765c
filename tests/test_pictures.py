"""Generated shapes and drawn pictures: what they show, and where."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_iou

import data.__main__ as command
from data import CocoDataset, find_splits, generate_shapes
from data.draw import save_contact_sheet
from data.shapes import CLASSES, CROWD_OBJECTS, SPARSE_OBJECTS, Scene, Shape


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "set"
    generate_shapes(root, train_images=40, val_images=1)
    return root


def test_shapes_are_deterministic(shapes, tmp_path):
    """An image depends on the seed, its split and its number, not on the number of images."""
    for name, seed in (("again", 0), ("other", 1)):
        generate_shapes(tmp_path / name, seed=seed, train_images=1, val_images=1)
    for name in ("train/000001.jpg", "val/000001.jpg", "annotations/instances_val.json"):
        content = (shapes / name).read_bytes()
        assert (tmp_path / "again" / name).read_bytes() == content != (tmp_path / "other" / name).read_bytes()
    assert (shapes / "train" / "000001.jpg").read_bytes() != (shapes / "val" / "000001.jpg").read_bytes()


def test_shapes_are_whole_and_crowded(shapes):
    """A single shape, which stands out, reaches all four sides of its box."""
    train = CocoDataset(find_splits(str(shapes))[0])
    assert train.dropped_boxes == 0 and train.class_names == list(CLASSES)
    overlaps, counts, singles = [], [], 0
    for i, (image, target) in enumerate(train):
        boxes = torch.as_tensor(target["boxes"])
        overlaps.append(box_iou(boxes, boxes).triu(1).max().item() if len(boxes) else 0.0)
        counts.append(len(boxes))
        if len(boxes) == 1:
            singles += 1
            scene = Scene(160, np.random.default_rng([0, 0, i]))
            background = scene.canvas.copy()
            scene.fill()
            drawn = (scene.canvas != background).any(2)
            rows, columns = np.flatnonzero(drawn.any(1)), np.flatnonzero(drawn.any(0))
            extent = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            assert np.abs(boxes[0].numpy() - extent).max() < 1.6
            assert np.abs(image.numpy().transpose(1, 2, 0) - background)[drawn].mean() > 25
    overlaps, counts = np.array(overlaps), np.array(counts)
    assert (overlaps > 0.3).mean() > 0.25 and overlaps.max() < 0.75
    assert (counts > SPARSE_OBJECTS[1]).mean() > 0.2 and counts.max() <= CROWD_OBJECTS[1] and singles > 2


def test_ring_has_a_hole():
    coverage = Shape(CLASSES.index("ring"), np.array([20.5, 20.5]), 16.0, 0.0).coverage(0, 0, 41)
    assert [coverage[20, x] for x in (2, 8, 20, 32, 38)] == [0, 1, 0, 1, 0]


def test_command_writes_a_set(tmp_path, call, capsys):
    crowds = tmp_path / "crowds"
    flags = ("--train-images", 3, "--val-images", 1, "--size", 64, "--crowded-share", 1, "--one-class")
    assert f"python train.py --data {crowds}" in call(command, "generate", crowds, *flags)
    train, val = (CocoDataset(split) for split in find_splits(str(crowds))[:2])
    assert (len(train), len(val), train.class_names) == (3, 1, ["shape"]) and train[0][0].shape == (3, 64, 64)
    for args, story in (([crowds], "exists; name another"), ([tmp_path / "x", "--size", 31], "--size between 32 and")):
        with pytest.raises(SystemExit):
            call(command, "generate", *args)
        assert story in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_contact_sheet_has_the_pictures_row_by_row(tmp_path):
    pictures = [torch.full((3, 20 + i, 30), 50 * (i + 1), dtype=torch.uint8) for i in range(3)]
    save_contact_sheet(pictures, tmp_path / "sheet.png", columns=2)
    sheet = pixels(tmp_path / "sheet.png")
    assert [sheet[y, x, 0] for y, x in ((10, 10), (10, 45), (35, 10), (35, 45))] == [50, 100, 150, 0]
