"""Annotation files spoiled at random: each is read into sound images and boxes, or ends in one DatasetError."""

import copy
import json
import math
import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from data import CocoDataset, DatasetError, Split
from eval import coco_metrics
from tests.support.sets import write_scenes

COUNT = 120
VALUES = ["", "a\x1b[2J\n\r\x00\u202e", "\ud800", "自" * 999, "../0.jpg", "/etc/passwd", "NESTED", None, [], {}, [1]]
VALUES += [0, -1, 2.0, True, 10**400, 2**63, 2**63 - 1, 1e308, 5e-324, math.nan, math.inf]
BOXES = [[1, 1, 5], [1e308] * 4, [math.nan] * 4, [True] * 4, [2**70] * 4, [3, 3, -9, 9], [40, 30, 1e-5, 5]]


def places(value: object) -> Iterator[tuple[dict | list, object]]:
    """Yield the container and the key of everything inside of a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def spoil(content: dict, rng: random.Random) -> bytes:
    """Return the annotation file without something in it, with a record twice, or with another value somewhere."""
    content = copy.deepcopy(content)
    container, key = rng.choice([*places(content)])
    way = rng.random()
    if way < 0.1:
        del container[key]
    elif way < 0.2 and isinstance(container, list):
        container.append(container[key])
    else:
        container[key] = rng.choice(BOXES if key == "bbox" else VALUES)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5).replace('"NESTED"', "[" * 100_000 + "]" * 100_000)
    return text.encode("utf-8", "surrogatepass")


def use(split: Split) -> None:
    """Load and evaluate all of a data set, and check what comes out."""
    dataset = CocoDataset(split)
    for image, target in dataset:
        height, width = image.shape[1:]
        boxes = torch.cat([target["boxes"], target["ignore"]]).as_subclass(torch.Tensor)
        assert boxes.isfinite().all() and (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes <= torch.tensor([width, height, width, height])).all()
    found = [{"image_id": i["id"], "category_id": 3, "bbox": [5, 6, 12, 11], "score": 0.5} for i in dataset.images]
    assert -1 <= coco_metrics(dataset.annotations, found)["AP"] <= 1


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_spoiled_files_are_read_or_named(tmp_path, one_thread):
    boxes = [([1, 2, 9, 9], False), ([20, 5, 15, 20], True)]
    split, ended = write_scenes(tmp_path, "coco", {"a": boxes, "b": boxes[:1], "c": []}), Counter()
    content = json.loads(split.annotations.read_text())
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
