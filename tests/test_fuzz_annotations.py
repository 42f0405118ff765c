"""Annotation files spoiled at random: each is read into sound images and boxes, or ends in one DatasetError."""

import copy
import json
import math
import random
from collections import Counter

import pytest
import torch
from PIL import Image, ImageDraw

from data import CocoDataset, DatasetError, Split, collate, train_transform
from data.layouts import COCO
from eval import coco_metrics
from model.batch import pack

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


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> tuple[Split, dict]:
    """A small data set with two or three boxes an image, a crowd region and ids with gaps."""
    root, rng = tmp_path_factory.mktemp("sound"), random.Random(0)
    (root / "train").mkdir()
    content = {
        "info": {"year": 2024},
        "images": [],
        "annotations": [],
        "categories": [{"id": 4, "name": "disc", "supercategory": "shape"}, {"id": 9, "name": "bar"}],
    }
    for i in range(6):
        width, height = 48 - i, 40 + i
        picture = Image.new("RGB", (width, height), "grey")
        content["images"].append({"id": 3 * i, "file_name": f"{i}.jpg", "width": width, "height": height, "license": 1})
        for _ in range(2 + i % 2):
            x, y, w, h = rng.randrange(20), rng.randrange(20), rng.randrange(5, 20), rng.randrange(5, 20)
            ImageDraw.Draw(picture).ellipse((x, y, x + w, y + h), fill="red")
            record = {"id": len(content["annotations"]), "image_id": 3 * i, "category_id": rng.choice((4, 9))}
            record |= {"bbox": [x, y, w, h], "area": w * h, "iscrowd": int(i == 5), "segmentation": [[x, y, x + w, y]]}
            content["annotations"].append(record)
        picture.save(root / "train" / f"{i}.jpg")
    return Split("train", root / "instances_train.json", root / "train", COCO), content


def spoil(content: dict, rng: random.Random) -> bytes:
    """The annotation file with a fault or more, of its records and fields, of all ids, or of its bytes."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        key = rng.choice(["images", "annotations", "annotations", "categories"])
        records = content.get(key)
        if not isinstance(records, list) or not records or rng.random() < 0.05:
            content[rng.choice([*content, "licenses"])] = _any(VALUES, rng)
            continue
        row, fault = rng.randrange(len(records)), rng.choice(["drop", "twice", "record", "shift", *["field"] * 9])
        if fault == "drop":
            records.pop(row)
        elif fault == "twice":
            records.append(records[row])
        elif fault == "shift":
            _shift_ids(content, key, rng.choice(SHIFTS))
        elif fault == "record" or not isinstance(records[row], dict) or not records[row]:
            records[row] = _any(VALUES, rng)
        else:
            _spoil_field(records, row, rng)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    for depth in (50, 100_000):
        text = text.replace(f'"NESTED-{depth}"', "[" * depth + "]" * depth)
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    fault = rng.choice(["none"] * 20 + ["cut", "bytes", "bytes", "insert", "encoding"])
    if fault == "cut":
        del data[rng.randrange(len(data)) :]
    elif fault == "bytes":
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif fault == "insert":
        place = rng.randrange(len(data))
        data[place:place] = rng.choice([b"\0" * 9, b"9" * 5000, b"\xff\xfe", b"\n\n", b'"id": 1, ', b"e999"])
    elif fault == "encoding":
        encoding = rng.choice(["utf-16", "utf-32", "utf-8-sig", "gbk", "latin-1", "cp037"])
        return text.encode(encoding, "replace")
    return bytes(data)


def _any(values: list, rng: random.Random) -> object:
    """A copy of one, as what is spoiled twice is changed in place."""
    return copy.deepcopy(rng.choice(values))


def _shift_ids(content: dict, key: str, shift: int) -> None:
    """Of all records under a key, and where they are referred to."""
    reference = {"images": "image_id", "categories": "category_id"}.get(key)
    for name, field in ((key, "id"), ("annotations", reference)):
        for record in content[name] if isinstance(content.get(name), list) else ():
            if isinstance(record, dict) and type(record.get(field)) is int:
                record[field] += shift


def _spoil_field(records: list, row: int, rng: random.Random) -> None:
    """Of one record, or of all that have it, as an export's fault is."""
    field, way = rng.choice(list(records[row])), rng.random()
    value = _any(PLAUSIBLE.get(field, VALUES) if rng.random() < 0.6 else VALUES, rng)
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
        limits = torch.tensor([width, height, width, height])
        assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes <= limits).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert ((0 <= target["labels"]) & (target["labels"] < len(dataset.class_names))).all()
    batch = pack(*collate(samples))
    assert all(value.isfinite().all() for value in batch if isinstance(value, torch.Tensor))
    truth = dataset.annotations
    found = [
        {"image_id": image["id"], "category_id": category_id, "bbox": [5, 6, 12, 11], "score": 0.5}
        for image in dataset.images
        for category_id in dataset.category_ids
    ]
    metrics = coco_metrics(truth, found)
    numbers = [v for v in metrics.values() if isinstance(v, float)]
    numbers += [row[name] for row in metrics["per_class"].values() for name in ("AP", "AP50")]
    assert len(numbers) >= 12 and all(math.isfinite(v) and -1 <= v <= 1 for v in numbers), metrics


def outcome(content: bytes, split: Split) -> str:
    split.annotations.write_bytes(content)
    try:
        use(split)
    except DatasetError as error:
        assert str(split.annotations) in str(error) and 0 < len(str(error)) < 10_000, str(error)
        return "error"
    return "read"


def test_sound_file_is_read(sound):
    split, content = sound
    assert outcome(json.dumps(content).encode(), split) == "read"


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_spoiled_files_are_read_or_named(sound, one_thread):
    split, content = sound
    ended = Counter()
    for seed in range(COUNT):
        spoiled = spoil(content, random.Random(seed))
        try:
            ended[outcome(spoiled, split)] += 1
        except Exception as error:
            error.add_note(f"seed {seed}: {spoiled[:3000]!r}")
            raise
    assert min(ended["read"], ended["error"]) > COUNT // 10, ended
