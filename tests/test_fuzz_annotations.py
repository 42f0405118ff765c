"""Annotation files spoiled at random: each is read into sound images and boxes, or ends in one DatasetError."""

import copy
import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from data import CocoDataset, DatasetError, Split, collate, train_transform
from eval import coco_metrics
from model.batch import pack
from tests.support.sets import box_record, image_record, write_coco

COUNT = 300
TEXTS = [
    "",
    " ",
    "1",
    "a\x1b[2J\n\r\x00\u202e",
    "\ud800",
    "自行车" * 400,
    "../0.jpg",
    "/etc/passwd",
    "0.jpg",
    ".",
    "\\0.jpg",
]
TEXTS += ["a" * 300, "a" * 5000]
NUMBERS = [0, -1, 2, 2.0, 0.5, -3.25, True, False, 10**400, -(10**30), 2**63, 2**63 - 1, -(2**63), 2**53 + 1]
NUMBERS += [1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]
BOXES = [[1, 1, 5, 5], [1, 1, 5], [1e308] * 4, [math.nan] * 4, [True] * 4, [2**70] * 4, [-5, -5, 90, 90]]
BOXES += [[-0.5, 0, 9, 9], [3, 3, 0, 9], [3, 3, -9, 9], [0.0, 0.0, 1e-9, 1e-9], [40, 30, 1e-5, 5]]
VALUES = [*TEXTS, *NUMBERS, *BOXES, None, [], {}, [1], [[1], "x"], {"id": 1}, "NESTED-50", "NESTED-100000"]
PLAUSIBLE = {"bbox": BOXES, "iscrowd": [0, 1, True, False, 1.0], "name": TEXTS, "supercategory": TEXTS, "area": NUMBERS}
SHIFTS = [-1, -100, 1000, 2**40, 2**62, -(2**63)]
ENCODINGS = ["utf-16", "utf-32", "utf-8-sig", "gbk", "latin-1", "cp037"]
INSERTS = [b"\0" * 9, b"9" * 5000, b"\xff\xfe", b"\n\n", b'"id": 1, ', b"e999"]


def write_sound(root: Path) -> tuple[Split, dict]:
    """Write a small data set with two or three boxes an image, a crowd region and ids with gaps."""
    rng = random.Random(0)
    categories = [{"id": 4, "name": "disc", "supercategory": "shape"}, {"id": 9, "name": "bar"}]
    images = [image_record(3 * i, f"{i}.jpg", 48 - i, 40 + i) | {"license": 1} for i in range(6)]
    owners, boxes = [i for i in range(6) for _ in range(2 + i % 2)], []
    for i in owners:
        x, y, w, h = rng.randrange(20), rng.randrange(20), rng.randrange(5, 20), rng.randrange(5, 20)
        more = {"area": w * h, "iscrowd": int(i == 5), "segmentation": [[x, y, x + w, y]]}
        boxes.append(box_record(len(boxes), (x, y, w, h), 3 * i, rng.choice((4, 9)), **more))
    split = write_coco(root, images, boxes, categories)
    return split, {"info": {"year": 2024}} | json.loads(split.annotations.read_text())


def spoil(content: dict, rng: random.Random) -> bytes:
    """Return the annotation file with a fault or more, of its records and fields, of all ids, or of its bytes."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        spoil_records(content, rng)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    for depth in (50, 100_000):
        text = text.replace(f'"NESTED-{depth}"', "[" * depth + "]" * depth)
    data, fault = bytearray(text.encode("utf-8", "surrogatepass")), rng.randrange(25)
    if fault == 0:
        del data[rng.randrange(len(data)) :]
    elif fault in (1, 2):
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif fault == 3:
        place = rng.randrange(len(data))
        data[place:place] = rng.choice(INSERTS)
    elif fault == 4:
        return text.encode(rng.choice(ENCODINGS), "replace")
    return bytes(data)


def spoil_records(content: dict, rng: random.Random) -> None:
    key = rng.choice(["images", "annotations", "annotations", "categories"])
    records = content.get(key)
    if not isinstance(records, list) or not records or rng.random() < 0.05:
        content[rng.choice([*content, "licenses"])] = any_of(VALUES, rng)
        return
    row, fault = rng.randrange(len(records)), rng.choice(["drop", "twice", "record", "shift", *["field"] * 9])
    if fault == "drop":
        records.pop(row)
    elif fault == "twice":
        records.append(records[row])
    elif fault == "shift":
        shift_ids(content, key, rng.choice(SHIFTS))
    elif fault == "record" or not isinstance(records[row], dict) or not records[row]:
        records[row] = any_of(VALUES, rng)
    else:
        spoil_field(records, row, rng)


def any_of(values: list, rng: random.Random) -> object:
    return copy.deepcopy(rng.choice(values))  # what is spoiled twice is changed in place


def shift_ids(content: dict, key: str, shift: int) -> None:
    """Shift the ids of all records under a key, and the references to them."""
    reference = {"images": "image_id", "categories": "category_id"}.get(key)
    for name, field in ((key, "id"), ("annotations", reference)):
        for record in content[name] if isinstance(content.get(name), list) else ():
            if isinstance(record, dict) and type(record.get(field)) is int:
                record[field] += shift


def spoil_field(records: list, row: int, rng: random.Random) -> None:
    """Spoil a field of one record, or of all that have it, as a faulty export does."""
    field, way = rng.choice(list(records[row])), rng.random()
    value = any_of(PLAUSIBLE.get(field, VALUES) if rng.random() < 0.6 else VALUES, rng)
    for record in records if way < 0.15 else records[row : row + 1]:
        if not isinstance(record, dict) or field not in record:
            continue
        if 0.15 < way < 0.4 and isinstance(record[field], list) and len(record[field]) > 1:
            record[field] = [value, *record[field][1:]]
        elif 0.4 <= way < 0.5:
            del record[field]
        else:
            record[field] = value


def use(split: Split) -> None:
    """Load, pack and evaluate all of a data set, and check what comes out."""
    dataset = CocoDataset(split, train_transform((48, 64), flip=0.5))
    samples = [dataset[i] for i in range(len(dataset))]
    for image, target in samples:
        height, width = image.shape[1:]
        boxes = torch.cat([target["boxes"], target["ignore"]]).as_subclass(torch.Tensor)
        assert boxes.isfinite().all() and (boxes >= 0).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((0 <= target["labels"]) & (target["labels"] < len(dataset.class_names))).all()
    batch = pack(*collate(samples))
    assert all(value.isfinite().all() for value in batch if isinstance(value, torch.Tensor))
    pairs = [(image["id"], category_id) for image in dataset.images for category_id in dataset.category_ids]
    found = [{"image_id": i, "category_id": c, "bbox": [5, 6, 12, 11], "score": 0.5} for i, c in pairs]
    metrics = coco_metrics(dataset.annotations, found)
    numbers = [v for v in metrics.values() if isinstance(v, float)]
    numbers += [row[name] for row in metrics["per_class"].values() for name in ("AP", "AP50")]
    assert len(numbers) >= 12 and all(math.isfinite(v) and -1 <= v <= 1 for v in numbers), metrics


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_spoiled_files_are_read_or_named(tmp_path, one_thread):
    split, content = write_sound(tmp_path)
    use(split)
    ended = Counter()
    for seed in range(COUNT):
        split.annotations.write_bytes(spoiled := spoil(content, random.Random(seed)))
        try:
            use(split)
            ended["read"] += 1
        except DatasetError as error:
            assert str(split.annotations) in str(error) and len(str(error)) < 10_000, f"seed {seed}: {error}"
            ended["error"] += 1
        except Exception as error:
            error.add_note(f"seed {seed}: {spoiled[:3000]!r}")
            raise
    assert min(ended["read"], ended["error"]) > COUNT // 10, ended
