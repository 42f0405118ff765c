"""Repairs of annotation files, what is refused instead, and files with fields spoiled at random."""

import functools
import json
import math
import random
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from PIL import ExifTags, Image

import data.checks
import eval as eval_script
import train
from data import CocoDataset, DatasetError, generate_shapes, read_split
from data.dataset import SeededDataset
from data.repairs import ABSENT, AREA, CLIPPED, EMPTY, FLOAT_ID, ISCROWD, NO_ID, NO_SIZE, NOT_TURNED, OUTSIDE, TURNED
from errors import UserError
from eval import coco_metrics
from tests.support.detectors import tiny_detector
from tests.support.runs import CPU, DETECTOR
from tests.support.sets import box_record, grey, image_record, refusal, write_coco, write_scenes

SMALL = (*DETECTOR, *CPU, "--image-size", 64, "--batch-size", 2, "--steps", 1)


def perfect_ap(dataset: CocoDataset) -> float:
    """Return the AP of detections that are the true boxes."""
    truth = dataset.annotations
    return coco_metrics(truth, [a | {"score": 0.9} for a in truth["annotations"] if not a["iscrowd"]])["AP"]


OTHER = box_record(2, (20, 2, 9, 9), area=60)  # beside the annotation to be repaired: id 1, bbox (5, 6, 10, 12)
REPAIRED = {  # fields of annotation 1 -> kind of repair, fields in the evaluation, None if it is dropped
    "two-px-out": ({"bbox": [30, 20, 12, 10], "area": 90.0}, CLIPPED, {"bbox": [30, 20, 10, 10], "area": 90}),
    "far-out": ({"bbox": [-900, -4, 905, 10], "area": 9000}, CLIPPED, {"bbox": [0, 0, 5, 6], "area": 30}),
    "wholly-outside": ({"bbox": [41.5, 5, 9, 9], "area": 81}, OUTSIDE, None),
    "wholly-above": ({"bbox": [5, -20, 9, 9], "area": 81}, OUTSIDE, None),
    "no-width": ({"bbox": [5, 5, 0, 9], "area": 0}, EMPTY, None),
    "nan": ({"bbox": [5, math.nan, 5, 9], "area": math.nan}, EMPTY, None),
    "crowd-outside": ({"bbox": [5, 50, 9, 9], "area": 81, "iscrowd": 1}, OUTSIDE, None),
    "no-id": ({"id": None}, NO_ID, {"id": 1}),
    "id": ({"id": 1.0}, FLOAT_ID, {"id": 1}),
    "image-id": ({"image_id": 1.0}, FLOAT_ID, {"image_id": 1}),
    "category-id": ({"category_id": 3.0}, FLOAT_ID, {"category_id": 3}),
    "iscrowd-null": ({"iscrowd": None}, ISCROWD, {"iscrowd": 0}),
    "iscrowd-true": ({"iscrowd": True}, ISCROWD, {"iscrowd": 1}),
    "iscrowd-0.0": ({"iscrowd": 0.0}, ISCROWD, {"iscrowd": 0}),
    **{f"area-{a}": ({"area": a}, AREA, {"area": 120}) for a in (None, "9", -1, 0.1, 1e11, math.nan, math.inf)},
}


@pytest.mark.parametrize("case", REPAIRED)
def test_certain_flaw_is_repaired_and_listed_and_refused_by_strict(tmp_path, case):
    fields, kind, repaired = REPAIRED[case]
    split = write_coco(tmp_path, boxes=[box_record(area=60) | fields, OTHER])
    dataset = CocoDataset(split)
    ((found, (line,)),) = dataset.repairs.items()
    records = {record["id"]: record for record in dataset.annotations["annotations"]}
    assert found == kind and records.keys() == ({1, 2} if repaired else {2})
    assert records.get(1, {}).items() >= (repaired or {}).items()
    assert perfect_ap(dataset) == pytest.approx(1)
    said = refusal(replace(split, strict=True))
    assert "1 problem(s)" in said and f"{kind} (without --strict): 1\n    {line}" in said


def test_missing_ids_are_free_numbers_in_file_order(tmp_path):
    boxes = [box_record(i, area=60) for i in (2, None, 1.0, 0, 5)]
    del boxes[3]["id"]
    dataset = CocoDataset(write_coco(tmp_path, boxes=boxes))
    assert [record["id"] for record in dataset.annotations["annotations"]] == [2, 3, 1, 4, 5]
    boxes[0]["id"] = 5.0
    assert "ids that occur twice in 'annotations': 1\n    record 4, id 5" in refusal(write_coco(tmp_path, boxes=boxes))


def test_grouping_category_may_have_the_name_of_its_only_class(tmp_path):
    """As in Roboflow's exports of a project with one class."""
    categories = [{"id": 0, "name": "cat", "supercategory": "none"}, {"id": 3, "name": "cat", "supercategory": "cat"}]
    assert CocoDataset(write_coco(tmp_path, boxes=[box_record()], categories=categories)).categories == categories[1:]
    both = [box_record(), box_record(2, category_id=0)]
    assert "names that occur twice: 1\n    'cat'" in refusal(write_coco(tmp_path, boxes=both, categories=categories))


def test_categories_of_the_training_that_a_file_lacks_are_added(tmp_path):
    """As in files that a program writes for each split, from the objects in it."""
    split = write_coco(tmp_path, boxes=[box_record(area=120)])
    known = {"class_names": ["bird", "cat"], "category_ids": [1, 3]}
    dataset = CocoDataset(split, known=known)
    assert dataset.classes == known and dataset.repairs == {ABSENT: ["category 1 bird"]}
    assert dataset[0][1]["labels"].tolist() == [1] and perfect_ap(dataset) == pytest.approx(1)
    dataset.require_classes(known | {"source": "weights"})
    other = known | {"class_names": ["bird", "dog"]}
    for strict, classes, told in (
        (False, other, "only in weights: 1 bird, 3 dog; only in .*instances_train.json: 3 cat"),
        (True, known, "only in weights: 1 bird. Training"),
    ):
        with pytest.raises(DatasetError, match=told):
            CocoDataset(replace(split, strict=strict), known=classes).require_classes(classes | {"source": "weights"})


def test_sizes_that_records_lack_are_those_of_the_files(tmp_path):
    """CVAT writes 0 where it does not have the images (datumaro, issue 775); other programs write none."""
    images = [image_record(1) | {"width": 0, "height": 0}, {"id": 2.0, "file_name": "b.jpg"}, image_record(3, "c.jpg")]
    split = write_coco(tmp_path, images, pixels=False)
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        grey(split.images / name)
    dataset = CocoDataset(split)
    assert dataset.images == [image_record(i, f"{name}.jpg") for i, name in enumerate("abc", 1)]
    lines = ["record 0, id 1, file_name 'a.jpg': 40 x 30", "record 1, id 2.0, file_name 'b.jpg': 40 x 30"]
    assert dataset.repairs[NO_SIZE] == lines and "without --strict" in refusal(replace(split, strict=True))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 30)).save(split.images / "a.jpg", exif=exif)
    (split.images / "b.jpg").unlink()
    said = refusal(split)
    assert "'a.jpg': width is 0, not a number of pixels" in said and "'b.jpg': width is missing" in said


@pytest.mark.parametrize("form", ["coco", "crowdhuman", "voc"])
def test_sound_file_is_not_repaired(tmp_path, form):
    """A box half a pixel outside is rounding; its truth stays as it is in the file."""
    split = write_scenes(tmp_path, form, {"a": [([31, 20, 9.5, 10], False), ([5, 5, 9, 6], True)], "b": []})
    dataset = CocoDataset(replace(split, strict=True))
    assert not dataset.repairs
    if form != "crowdhuman":  # whose boxes are clipped as they are read
        assert dataset.annotations["annotations"][0]["bbox"] == [31, 20, 9.5, 10]


def test_other_forms_have_the_same_repairs(tmp_path):
    split = write_scenes(tmp_path, "voc", {"a": [([30, 20, 15, 20], False), ([50, 5, 9, 6], False)]})
    dataset = CocoDataset(split)
    assert read_split(split).first_images(1).repairs == dataset.repairs
    assert {kind: len(lines) for kind, lines in dataset.repairs.items()} == {CLIPPED: 1, OUTSIDE: 1}
    assert dataset.annotations["annotations"][0]["bbox"] == [30, 20, 10, 10]


CORNERS = [(x, y, x + 12, y + 9) for x in (2, 12, 25) for y in (1, 8, 15, 20)]
MANY_BOXES = {  # boxes -> how many are clipped, None if they are refused
    "corners": (CORNERS, None),
    "twice-the-size": ([(2 * x, 2 * y, 24, 18) for x, y, *_ in CORNERS], None),
    "borders": ([(x, y, 12, 9) for x, y, *_ in CORNERS] * 3 + [(35, 5, 30, 9)] * 6, 6),
    "few": ([(35, 5, 30, 9)] * 4, 4),
}


@pytest.mark.parametrize("case", MANY_BOXES)
def test_many_boxes_with_little_in_their_image_are_in_other_units(tmp_path, case):
    boxes, clipped = MANY_BOXES[case]
    split = write_coco(tmp_path, boxes=[box_record(i, box, area=box[2] * box[3]) for i, box in enumerate(boxes)])
    if clipped:
        assert {kind: len(lines) for kind, lines in CocoDataset(split).repairs.items()} == {CLIPPED: clipped}
    else:
        assert "boxes with less than half inside their image, " in (said := refusal(split)) and "Two corners" in said


TURNS = {  # boxes in a record of 40 x 30 px, of a file that is shown as 30 x 40 -> whether the size is swapped
    "as-shown": ([(5, 6, 10, 12), (5, 25, 10, 14), (math.nan, 1, 2, 3)], True),
    "no-box": ([], True),
    "fits-both": ([(5, 6, 10, 12)], False),
    "as-stored": ([(25, 6, 14, 12)], False),
    "a-pixel-over": ([(5, 6, 10, 25)], False),
    "neither": ([(5, 25, 10, 14), (25, 6, 14, 12)], False),
}


@pytest.mark.parametrize("case", TURNS)
def test_size_from_before_the_exif_rotation(tmp_path, monkeypatch, case):
    """Beside an image that is not rotated. Where only some files are looked at, every one is refused."""
    boxes, swapped = TURNS[case]
    records = [box_record(i, box, area=60) for i, box in enumerate(boxes)]
    records.append(box_record(9, (25, 6, 14, 12), 2, area=60))
    split, exif = write_coco(tmp_path, [image_record(), image_record(2, "b.jpg")], records), Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(split.images / "a.jpg", exif=exif)
    if swapped:
        dataset = CocoDataset(split)
        assert len(dataset.repairs[TURNED]) == 1 and dataset[0][0].shape == (3, 40, 30)
        assert [(i["width"], i["height"]) for i in dataset.annotations["images"]] == [(30, 40), (40, 30)]
        assert dataset.num_boxes == len(records) - dataset.dropped_boxes and CLIPPED not in dataset.repairs
    else:
        said = refusal(split)
        assert NOT_TURNED in said and "40 x 30 in the record, shown as 30 x 40" in said
    monkeypatch.setattr(data.checks, "ALL_FILES_UP_TO", 1)
    assert "(in 2000 of 2 files looked at): 1000\n    image 1 (a.jpg): 40 x 30" in refusal(split)
    monkeypatch.undo()
    grey(split.images / "a.jpg", (30, 40))  # without a rotation: another picture
    assert "sizes that disagree with the image (its EXIF orientation applied): 1\n" in refusal(split)


def test_runs_print_repairs_and_strict_stops_them(call, changed, tmp_path):
    def spoil(content: dict) -> None:
        for record in content["annotations"][:5]:
            record["area"] = -1
        content["annotations"][0]["iscrowd"] = None

    root, out = changed(spoil), tmp_path / "out"
    evaluation = ("--weights", out / "ota.safetensors", *CPU)
    for script, flags in ((train, ("--data", root, *SMALL)), (eval_script, evaluation)):
        said = call(script, *flags, "--out", out)
        assert f"repaired: {AREA}: 5; annotation 1" in said and "; and 2 more\n" in said
        assert f"repaired: {ISCROWD}: 1; record 0, id 1" in said
        with pytest.raises(DatasetError, match=r"6 problem(.|\n)*without --strict\): 5"):
            call(script, *flags, "--out", tmp_path / "other", "--strict")


def test_run_may_be_continued_with_strict(call, shapes, tmp_path):
    flags = (train, *SMALL, "--data", shapes, "--out", tmp_path)
    call(*flags)
    assert "is complete" in call(*flags, "--strict")


# Fields spoiled at random

VALUES = (None, True, -1, 0, 1, 2.0, 0.5, 10**6, -(10**19), 1e308, math.nan, -math.inf, "", "1", "x\0y", "../a", [], {},
          [1, 2], [[1]], {"id": 1}, [5, 5, 50, 50], [-9.0, 3, 20, 20], [math.nan, 1, 2, 3])  # fmt: skip
FACTORS = (-1, 0, 0.01, 0.5, 1.0, 1.2, 3, 1e300)


def places(value: object) -> Iterator[tuple]:
    """Yield every list and object with every index or key in it."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def spoil(content: dict, chance: random.Random) -> None:
    """Take out, multiply or replace one or two values."""
    for _ in range(chance.randint(1, 2)):
        container, key = chance.choice([*places(content)])
        if chance.random() < 0.15:
            del container[key]
        elif isinstance(container[key], int | float) and chance.random() < 0.6:
            container[key] *= chance.choice(FACTORS)
        else:
            container[key] = chance.choice(VALUES)


@functools.cache
def detector_of(num_classes: int):
    return tiny_detector(num_classes=num_classes, image_size=(64, 107))


@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("one_thread")
def test_two_hundred_spoiled_files_train_or_are_one_clear_message(tmp_path, monkeypatch):
    root = tmp_path / "set"
    generate_shapes(root, train_images=3, val_images=0, size_px=64)
    (root / "annotations" / "instances_val.json").unlink()
    path, chance, messages = root / "annotations" / "instances_train.json", random.Random(0), []
    text = path.read_text()
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(root), *map(str, SMALL)])
    args = train.parse_args()
    for _ in range(200):
        content = json.loads(text)
        spoil(content, chance)
        path.write_text(json.dumps(content))
        try:
            dataset, val_dataset = train.load_data(args, lambda *_: None)
        except UserError as error:
            messages.append(str(error))
            continue
        step_of(dataset)
        assert perfect_ap(val_dataset) == pytest.approx(1), content
    assert 50 < len(messages) < 150
    assert all(str(path) in message and "Traceback" not in message and len(message) < 4000 for message in messages)


def step_of(dataset: CocoDataset) -> None:
    """Compute losses and gradients of all images; both have to be finite."""
    samples = [SeededDataset(dataset, seed=0)[0, i] for i in range(len(dataset))]
    passes, image_ids = train.pack_passes(samples, 1, ())
    detector = detector_of(len(dataset.class_names)).train()
    detector.zero_grad()
    values, _ = train.backward(detector, detector, passes, bf16=False)
    train.read_losses([(0, image_ids, torch.stack(list(values.values())))], list(values), dataset.split.annotations)
    assert all(p.grad is None or p.grad.isfinite().all() for p in detector.parameters())
