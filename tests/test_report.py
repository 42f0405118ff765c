"""python -m data check: its tables, problems, written sets and pictures."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.__main__ as command
from data import CocoDataset, train_transform
from data.dataset import SeededDataset
from data.repairs import GROUPING
from data.report import most_points
from data.shapes import CLASSES
from kernels import OTAConfig, PointGrid, ota_assign
from kernels.assign_reference import center_prior
from tests.support.sets import box_record, dataset_of, image_record, write_coco, write_scenes, write_yolo
from tests.test_repairs import REPAIRED


@pytest.fixture
def check(call, tmp_path, capsys):
    """Return a function: the exit status of a check, and what it printed."""

    def check(root: Path, *flags) -> tuple[int, str]:
        try:
            return 0, call(command, "check", root, "--sheet", tmp_path / "check.jpg", "--image-size", 96, *flags)
        except SystemExit as stop:
            return stop.code, "".join(capsys.readouterr())

    return check


def rows_of(said: str) -> dict[str, list[str]]:
    """Return the cells of the tables, by the name of their row."""
    found = re.findall(r"^(\S.*?) {2,}(\d.*)$", said, re.MULTILINE)
    return {name: re.split(r" {2,}", cells) for name, cells in found}


def test_counts_sizes_and_points(tmp_path, check):
    """Images twice as large at 160 px. Then the first box has two points, which count as one with the recipe's per_q=3;
    the second lies between the points, the third has one."""
    boxes = [(1, 1, 3, 7), (2.25, 2.25, 1.5, 1.5), (4.5, 4.5, 3, 3), (10, 10, 40, 5), (0, 0, 80, 80), (20, 20, 0, 5)]
    records = [box_record(i, box) for i, box in enumerate(boxes, 1)] + [box_record(9, (5, 5, 20, 20), iscrowd=1)]
    categories = [{"id": 3, "name": "cat"}, {"id": 4, "name": "dog"}]
    write_coco(tmp_path, [image_record(i, f"{i}.png", 80 + i, 80) for i in (1, 2)], records, categories)
    status, said = check(tmp_path, "--image-size", 160, 200)
    rows = rows_of(said)
    totals = ("images", "images without boxes", "boxes", "dropped boxes", "regions to ignore")
    assert status == 0 and [rows[name] for name in totals] == [["2"], ["1"], ["5"], ["1"], ["1"]]
    assert rows["cat"] == ["5", "100.0%"] and rows["dog"] == ["0", "0.0%"]
    assert [rows[name][0] for name in ("under 1", "1 to 2", "2 to 4", "16 to 32")] == ["3", "1", "0", "1"]
    points = ("none inside: the closest", "one", "more")
    assert [rows[name] for name in points] == [["1", "20.0%"], ["2", "40.0%"], ["2", "40.0%"]]
    assert "val: none" in said and "no problems" in said
    rows = rows_of(check(tmp_path, "--image-size", 160, 200, "--ota", "per_q=1")[1])
    assert [rows[name][0] for name in points] == ["1", "1", "3"]


@pytest.mark.parametrize("settings", [{}, {"per_q": 3}, {"center_prior": "radius", "top_q": 4}], ids=str)
def test_points_of_a_box_are_the_assignments(settings):
    """For predictions that are the box itself, one box an image; 0 where no point lies inside."""
    config, generator = OTAConfig(**settings), torch.Generator().manual_seed(0)
    start = 120 * torch.rand(40, 2, generator=generator)
    boxes = torch.cat([start, start + 40 * torch.rand(40, 2, generator=generator) ** 2 + 0.5], 1).clamp(max=128)
    grid = PointGrid.for_image((128, 128))
    predicted = boxes[:, None].expand(-1, grid.num_points, -1)
    k = ota_assign(predicted[..., :1] * 0, predicted, boxes, torch.zeros(40).long(), torch.arange(41), grid, config).k
    low, high = boxes[:, None].split(2, 2)
    inside = (center_prior(boxes, grid, config) & ((grid.points() > low) & (grid.points() < high)).all(2)).any(1)
    found = most_points(boxes.numpy(), 128, config)
    assert found.tolist() == torch.where(inside, k, 0).tolist() and {0, 1, 2} <= {*found.tolist()}


def test_images_that_occur_twice_are_problems(changed, check):
    """A file of the same size with other bytes is none."""
    root = changed()
    train, val = root / "train", root / "val"
    shutil.copy(train / "000001.jpg", val / "000002.jpg")
    shutil.copy(train / "000002.jpg", train / "000003.jpg")
    size = (train / "000002.jpg").stat().st_size
    other = (train / "000004.jpg").read_bytes()
    (train / "000004.jpg").write_bytes(other + bytes(max(0, size - len(other))))
    status, said = check(root)
    assert status == 1 and "in train and val (same bytes): 1\n    train image 1 (000001.jpg) = val image 2 (" in said
    assert "more than once in train (same bytes): 1\n    train image 2 (000002.jpg) = train image 3 (" in said
    assert said.count(" = ") == 2


def test_image_that_cannot_be_loaded_is_a_problem_and_the_test_split_is_checked(changed, check, monkeypatch):
    root = changed()
    shutil.copytree(root / "val", root / "test")
    shutil.copy(root / "annotations" / "instances_val.json", root / "annotations" / "instances_test.json")
    broken = root / "test" / "000002.jpg"
    broken.write_bytes(broken.read_bytes()[:-200])
    monkeypatch.setattr("data.checks.ALL_FILES_UP_TO", 0)
    monkeypatch.setattr("data.checks.FILES_SAMPLED", 1)
    Image.new("RGB", (7, 5)).save(root / "train" / "000003.jpg")
    status, said = check(root)
    assert status == 1 and re.search(r"cannot be loaded: 2\n    \S+_train.json, image 3 .* in the record, 7 x 5", said)
    assert re.search(r"_test.json, image 2: image file \S+ cannot be read: .*truncated", said)
    assert "images in test and val (same bytes): 1\n    val image 1 (000001.jpg) = test image 1 (" in said
    assert rows_of(said)["images"] == ["4", "2", "2"]


def test_class_in_one_half_only_is_marked(changed, check):
    def leave_out(content: dict) -> None:
        if len(content["images"]) == 2:
            content["annotations"] = [a for a in content["annotations"] if a["category_id"] != 3]

    status, said = check(changed(leave_out))
    lonely = [line.split()[0] for line in said.splitlines() if line.endswith("not in every split")]
    assert status == 0 and "triangle" in lonely and {*lonely} <= {*CLASSES}
    assert rows_of(said)["triangle"][2] == "0"


def test_both_halves_are_read_though_one_cannot_be(changed, check):
    """Nothing is written then."""

    def spoil(content: dict) -> None:
        content["annotations"][0]["category_id"] = 77

    root = changed(spoil)
    status, said = check(root, "--write", root / "out")
    assert status == 1 and said.count("category_id 77") == 2 and not (root / "out").exists()
    assert "--write" in said and "not written" in said


def test_half_without_boxes_or_images_to_learn_from_is_a_problem(changed, check):
    root = changed(lambda content: content["annotations"].clear())
    status, said = check(root)
    assert status == 1 and all(f"instances_{half}.json has no boxes" in said for half in ("train", "val"))
    (root / "annotations" / "instances_train.json").unlink()
    status, said = check(root)
    assert status == 1 and "no training split" in said and rows_of(said)["images"] == ["2"]


def test_other_classes_of_a_half_are_a_problem(changed, check):
    def rename(content: dict) -> None:
        if len(content["images"]) == 2:
            content["categories"][0]["name"] = "disc"

    status, said = check(changed(rename))
    assert status == 1 and "the classes do not fit" in said and rows_of(said)["disc"][0] == "0"


def test_class_that_groups_others_is_kept_in_validation_where_training_uses_it(changed, check):
    def group(content: dict) -> None:
        for category in content["categories"]:
            category["supercategory"] = "shape"
        content["categories"].append({"id": 9, "name": "shape"})
        if len(content["images"]) == 4:
            content["annotations"][0]["category_id"] = 9

    status, said = check(changed(group))
    assert status == 0 and rows_of(said)["shape"][2:] == ["0", "0.0%", "not in every split"]


@pytest.mark.parametrize("form", ["coco", "crowdhuman", "voc", "yolo"])
def test_written_set_is_read_alike_and_has_nothing_to_repair(tmp_path, check, form):
    """A box that sticks out, one without area, one to be ignored, and an image without boxes."""
    boxes = [([-0.5, 6, 10, 12], False), ([5, 5, 30, 9], True), ([20, 2, 8, 8], False), ([30, 3, 0, 5], False)]
    if form == "yolo":
        rows = {"train/images/a.jpg": "0 0.1 0.4 0.2 0.3\n", "train/images/b.jpg": None}
        write_yolo(tmp_path / "set", rows, train="../train/images", names=["person"])
    else:
        write_scenes(tmp_path / "set", form, {"a": boxes, "b": []}, size=(41, 30))
    out = tmp_path / "out"
    assert "wrote" in check(tmp_path / "set", "--write", out)[1]
    before, after = dataset_of(tmp_path / "set"), dataset_of(out)
    for (image, target), (other_image, other) in zip(before, after, strict=True):
        assert torch.equal(image, other_image) and torch.equal(target["labels"], other["labels"])
        assert torch.equal(target["boxes"], other["boxes"]) and torch.equal(target["ignore"], other["ignore"])
    assert not after.repairs and after.dropped_boxes == 0 and after.class_names == before.class_names
    content = (out / "annotations" / "instances_train.json").read_bytes()
    status, said = check(tmp_path / "set", "--write", out)
    assert status == 2 and "exists; name another folder" in said
    assert (out / "annotations" / "instances_train.json").read_bytes() == content


@pytest.mark.parametrize("augment", ["none", "flip"])
def test_sheet_shows_what_the_training_sees(tmp_path, check, augment):
    """One image in 24 epochs, flipped in those in which a training with this seed flips it: a box on its left in red,
    and a region to ignore in white."""
    split = write_coco(tmp_path, boxes=[box_record(), box_record(2, (25, 20, 10, 8), iscrowd=1)])
    flags = ("--seed", 5, "--augment", augment, "--image-size", 480, "--sheet", tmp_path / "check.png")
    assert "check.png" in check(tmp_path, *flags)[1]
    sheet = np.asarray(Image.open(tmp_path / "check.png"))
    cells = [(2 + 362 * row, 2 + 482 * column) for row in range(6) for column in range(4)]
    left_and_right = [(sheet[:, x + 61], sheet[:, x + 301], y) for y, x in cells]
    red = [[side[y + 150].tolist() == [255, 38, 38] for side in sides] for *sides, y in left_and_right]
    white = [[side[y + 300].tolist() == [255, 255, 255] for side in sides] for *sides, y in left_and_right]
    samples = SeededDataset(CocoDataset(split, train_transform((480, 800), augment)), seed=5)
    left = [bool(samples[epoch, 0][1]["boxes"][0, 0] < 240) for epoch in range(24)]
    assert red == [[x, not x] for x in left] == [pair[::-1] for pair in white]
    assert len({*left}) == (1 if augment == "none" else 2)


def test_repairs_are_listed_and_the_written_set_needs_none(tmp_path, check):
    categories = [{"id": 0, "name": "pets"}, {"id": 3, "name": "cat", "supercategory": "pets"}]
    records = [box_record(10 + i, area=60) | fields for i, (fields, *_) in enumerate(REPAIRED.values())]
    write_coco(tmp_path / "set", boxes=records, categories=categories)
    status, said = check(tmp_path / "set", "--write", tmp_path / "out")
    assert status == 0 and all(kind in said for kind in (GROUPING, *(kind for _, kind, _ in REPAIRED.values())))
    status, said = check(tmp_path / "out", "--strict")
    assert status == 0 and "nothing to repair" in said
    assert dataset_of(tmp_path / "out").annotations == dataset_of(tmp_path / "set").annotations
    status, said = check(tmp_path / "set", "--strict")
    assert status == 1 and GROUPING in said


def test_sheet_that_cannot_be_written_or_drawn_is_a_problem(tmp_path, check):
    split = write_coco(tmp_path, boxes=[box_record()])
    status, said = check(tmp_path, "--sheet", tmp_path / "sheet.xyz")
    assert status == 1 and "--sheet" in said.split("problems:")[1]
    cut_off = split.images / "a.jpg"
    cut_off.write_bytes(cut_off.read_bytes()[:-20])
    status, said = check(tmp_path)
    assert status == 1 and "a.jpg cannot be read" in said.split("problems:")[1]
