"""Metrics: known numbers, ids that pycocotools cannot take, both evaluators alike; data sets of others."""

from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import eval as eval_script
from data import CocoDataset, find_splits
from eval import coco_evaluation, coco_metrics, evaluation_dataset
from tests.support.sets import refusal


def two_boxes(ids=(1, 2), images=(1, 2)) -> dict:
    """Two images of two classes with a box each."""
    box = {"bbox": [10, 10, 40, 40], "area": 1600, "iscrowd": 0}
    return {
        "images": [{"id": i, "width": 100, "height": 100} for i in images],
        "categories": [{"id": c, "name": f"class {c}"} for c in (1, 2)],
        "annotations": [box | {"id": ids[i], "image_id": images[i], "category_id": i + 1} for i in (0, 1)],
    }


def detection(image_id: int, category_id: int, height: int) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": [10, 10, 40, height], "score": 0.5}


def test_known_detections_give_known_numbers():
    """Of two boxes of a class one is found with IoU 0.75: precision 1 up to recall 0.5 (51 of 101 points), at the six
    thresholds 0.5 to 0.75."""
    truth = two_boxes()
    assert coco_metrics(truth, [detection(1, 1, 40), detection(2, 2, 40)])["AP"] == pytest.approx(1)
    assert coco_metrics(truth, [])["AP"] == 0
    for annotation in truth["annotations"]:
        annotation["category_id"] = 1
    metrics = coco_metrics(truth, [detection(1, 1, 30)])
    assert metrics["AP50"] == pytest.approx(51 / 101) and metrics["AP"] == pytest.approx(0.6 * 51 / 101)
    assert metrics["per_class"]["class 1"]["boxes"] == 2 and metrics["per_class"]["class 2"]["AP"] == -1


def test_score_with_the_best_f1():
    """Two boxes, found at 0.9 and 0.6, and false detections at 0.7 and 0.4: from these scores down F1 is 2/3, 1/2, 4/5,
    2/3."""
    truth, far = two_boxes(), {"bbox": [0, 0, 3, 3]}
    for annotation in truth["annotations"]:
        annotation["category_id"] = 1
    found = [detection(1, 1, 40) | {"score": 0.9}, detection(2, 1, 40) | {"score": 0.6}]
    results = [*found, detection(1, 1, 40) | far | {"score": 0.7}, detection(1, 1, 40) | far | {"score": 0.4}]
    first, other = coco_metrics(truth, results)["per_class"].values()
    assert first["F1"] == pytest.approx(0.8) and first["score"] == 0.6
    assert (other["F1"], other["score"]) == (-1, 0.5)  # a class without boxes
    assert coco_metrics(truth, [])["per_class"]["class 1"]["score"] == 0.5


@pytest.mark.parametrize("odd", [{"ids": (0, 1)}, {"images": (-2, -1)}, {"images": (2**53, 2**53 + 1)}], ids=str)
def test_odd_ids_give_the_ordinary_numbers(odd):
    results = []
    for truth in (two_boxes(), two_boxes(**odd)):
        first, second = (image["id"] for image in truth["images"])
        results.append(coco_metrics(truth, [detection(first, 1, 40), detection(second, 2, 30)]))
    assert results[0] == results[1] and 0.5 < results[0]["AP"] < 1


def awkward_set(first_id=1, objects=6, crowd=0.1, detections=3, copies=1, scores=None) -> tuple[dict, list[dict]]:
    """Eight images of three classes, of which every fourth has no objects; detections lie around objects, with scores
    drawn from `scores`, and some in images without."""
    random, annotations, results = np.random.default_rng(0), [], []
    images, classes = ([first_id + i for i in range(count)] for count in (8, 3))
    for image in images:
        for _ in range(objects):
            place = {"image_id": image, "category_id": int(random.choice(classes))}
            box = np.concatenate([random.uniform(0, 300, 2), np.exp(random.uniform(2, 5, 2))])
            shape = {"bbox": box.tolist(), "area": float(box[2] * box[3]), "iscrowd": int(random.random() < crowd)}
            if image % 4:
                annotations.append({"id": first_id + len(annotations), **place, **shape})
            for _ in range(detections):
                moved = (box + random.normal(0, 0.1, 4) * box[[2, 3, 2, 3]]).tolist()
                score = float(random.choice(scores) if scores else random.random())
                results += [place | {"bbox": moved, "score": score}] * copies
    records = [{"id": i} for i in images], [{"id": i, "name": str(i)} for i in classes]
    return dict(zip(("images", "categories"), records, strict=True), annotations=annotations), results


AWKWARD = {
    "ties": {"scores": (0.3, 0.5)},
    "over-100-in-an-image": {"detections": 80},
    "crowd-regions": {"crowd": 0.5},
    "crowd-regions-only": {"crowd": 1},
    "no-objects": {"objects": 0},
    "no-detections": {"detections": 0},
    "id-0": {"first_id": 0},
    "negative-ids": {"first_id": -3},
    "huge-ids": {"first_id": 2**53 - 2},
    "largest-ids": {"first_id": 2**63 - 200},
    "duplicated-detections": {"copies": 3},
}


@pytest.mark.parametrize("case", AWKWARD)
def test_both_evaluators_agree_bit_for_bit(case, monkeypatch):
    pytest.importorskip("hotcoco", reason="hotcoco is not installed: pip install hotcoco")
    truth, results = awkward_set(**AWKWARD[case])
    fast = coco_evaluation(truth, results)
    monkeypatch.setattr(eval_script, "COCO", COCO)
    monkeypatch.setattr(eval_script, "COCOeval", COCOeval)
    slow = coco_evaluation(truth, results)
    assert type(fast) is not type(slow)
    assert (slow.stats[0] <= 0) == (case in ("crowd-regions-only", "no-objects", "no-detections"))
    assert np.asarray(fast.stats[:12]).tobytes() == np.asarray(slow.stats[:12]).tobytes()
    for name in ("precision", "recall", "scores"):
        assert fast.eval[name].tobytes() == slow.eval[name].tobytes()


# Data sets of others


def group(content: dict) -> None:
    """As Roboflow exports: a category 0 that all others name, and that nothing is."""
    for category in content["categories"]:
        category["supercategory"] = "things"
    content["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})


def test_category_that_only_groups_the_others_is_left_out(changed):
    dataset = CocoDataset(find_splits(changed(group))[0])
    assert [c["name"] for c in dataset.annotations["categories"]] == dataset.class_names
    left_out = "only group the others, left out unless the detector has them: 1; category 0 'things'"
    assert left_out in eval_script.describe(dataset)
    assert left_out[:40] in refusal(replace(dataset.split, strict=True))
    ids, names = [0, *dataset.category_ids], ["things", *dataset.class_names]
    classes = {"source": "old.safetensors", "category_ids": ids, "class_names": names}  # has the class
    assert evaluation_dataset(dataset.split, (64, 107), classes).category_ids[0] == 0

    used = changed(lambda content: content["annotations"][0].update(category_id=0))
    assert CocoDataset(find_splits(used)[0]).category_ids[0] == 0


def test_first_images_are_those_with_boxes(changed):
    def move(content: dict) -> None:
        for record in content["annotations"]:
            record.update(image_id=2 + record["image_id"] // 3 * 2)
        content["annotations"] += [record | {"id": 999, "image_id": 1, "bbox": [5, 5, 0, 9]}]

    root = changed(move)
    dataset = CocoDataset(find_splits(root)[0], first=2)
    assert [image["id"] for image in dataset.images] == [2, 4] and len(dataset) == 2
    assert {a["image_id"] for a in dataset.annotations["annotations"]} == {2, 4}
