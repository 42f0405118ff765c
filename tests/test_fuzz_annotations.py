"""Annotation files spoiled at random: each is read into sound images and boxes, or ends in one DatasetError."""

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from data import CocoDataset, DatasetError, Split, collate, train_transform
from eval import coco_metrics
from tests.support.sets import box_record, image_record, write_coco

COUNT = 120
TEXTS = ["", " ", "1", "a\x1b[2J\n\r\x00\u202e", "\ud800", "自行车" * 400, "../0.jpg", "/etc/passwd", "0.jpg", "."]
NUMBERS = [0, -1, 2, 2.0, 0.5, True, False, 10**400, 2**63, 2**63 - 1, -(2**63), 1e308, 5e-324, math.nan, math.inf]
BOXES = [[1, 1, 5, 5], [1, 1, 5], [1e308] * 4, [math.nan] * 4, [True] * 4, [2**70] * 4, [-5, -5, 90, 90]]
BOXES += [[-0.5, 0, 9, 9], [3, 3, 0, 9], [3, 3, -9, 9], [0.0, 0.0, 1e-9, 1e-9], [40, 30, 1e-5, 5]]
VALUES = [*TEXTS, *NUMBERS, *BOXES, None, [], {}, [1], [[1], "x"], {"id": 1}, "NESTED"]
PLAUSIBLE = {"bbox": BOXES, "iscrowd": [0, 1, True, False, 1.0], "name": TEXTS, "area": NUMBERS}


def write_sound(root: Path) -> tuple[Split, dict]:
    """Write a small data set with two or three boxes an image, a crowd region and ids with gaps."""
    rng = random.Random(0)
    categories = [{"id": 4, "name": "disc", "supercategory": "shape"}, {"id": 9, "name": "bar"}]
    images = [image_record(3 * i, f"{i}.jpg", 48 - i, 40 + i) for i in range(6)]
    boxes = []
    for i in [i for i in range(6) for _ in range(2 + i % 2)]:
        x, y, w, h = rng.randrange(20), rng.randrange(20), rng.randrange(5, 20), rng.randrange(5, 20)
        more = {"area": w * h, "iscrowd": int(i == 5), "segmentation": [[x, y, x + w, y]]}
        boxes.append(box_record(len(boxes), (x, y, w, h), 3 * i, rng.choice((4, 9)), **more))
    split = write_coco(root, images, boxes, categories)
    return split, json.loads(split.annotations.read_text())


def places(value: object) -> Iterator[tuple[dict | list, object]]:
    """Yield the container and the key of everything inside of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def spoil(content: dict, rng: random.Random) -> bytes:
    """Return the annotation file with one to three faults."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        container, key = rng.choice([*places(content)])
        way, likely = rng.random(), rng.random() < 0.6
        value = rng.choice(PLAUSIBLE.get(key, VALUES) if likely else VALUES)
        if way < 0.1:
            del container[key]
        elif way < 0.2 and isinstance(container, list):
            container.append(container[key])
        else:  # here, or in all records, as a faulty export does
            alike = [c for c, k in places(content) if k == key and isinstance(c, dict)] if way > 0.85 else [container]
            for container in alike:
                container[key] = copy.deepcopy(value)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5).replace('"NESTED"', "[" * 100_000 + "]" * 100_000)
    return text.encode("utf-8", "surrogatepass")


def use(split: Split) -> None:
    """Load and evaluate all of a data set, and check what comes out."""
    dataset = CocoDataset(split, train_transform((48, 64), flip=0.5))
    for image, target in zip(*collate([dataset[i] for i in range(len(dataset))]), strict=True):
        height, width = image.shape[1:]
        boxes = torch.cat([target["boxes"], target["ignore"]])
        assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
        assert ((0 <= target["labels"]) & (target["labels"] < len(dataset.class_names))).all()
    pairs = [(image["id"], category_id) for image in dataset.images for category_id in dataset.category_ids]
    found = [{"image_id": i, "category_id": c, "bbox": [5, 6, 12, 11], "score": 0.5} for i, c in pairs]
    metrics = coco_metrics(dataset.annotations, found)
    numbers = [value for value in metrics.values() if isinstance(value, float)]
    assert len(numbers) >= 12 and all(-1 <= value <= 1 for value in numbers), metrics


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
