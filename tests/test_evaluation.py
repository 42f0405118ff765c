"""Metrics: known numbers, ids that pycocotools cannot take; data sets of others."""

from dataclasses import replace

import pytest

import eval as eval_script
from data import CocoDataset, DatasetError, find_splits
from eval import coco_metrics, evaluation_dataset
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


@pytest.mark.parametrize("odd", [{"ids": (0, 1)}, {"images": (2**53, 2**53 + 1)}], ids=str)
def test_odd_ids_give_the_ordinary_numbers(odd):
    results = []
    for truth in (two_boxes(), two_boxes(**odd)):
        first, second = (image["id"] for image in truth["images"])
        results.append(coco_metrics(truth, [detection(first, 1, 40), detection(second, 2, 30)]))
    assert results[0] == results[1] and 0.5 < results[0]["AP"] < 1


# Data sets of others


def test_boxes_in_fractions_are_refused(changed):
    def divide(content: dict) -> None:
        for record in content["annotations"]:
            record["bbox"] = [value / 96 for value in record["bbox"]]

    with pytest.raises(DatasetError, match=r"100% of all \(normalised, fractions.*px\)"):
        CocoDataset(find_splits(changed(divide))[0])


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
    root = changed(lambda content: [a.update(image_id=2 + a["image_id"] // 3 * 2) for a in content["annotations"]])
    dataset = CocoDataset(find_splits(root)[0], first=2)
    assert [image["id"] for image in dataset.images] == [2, 4] and len(dataset) == 2
    assert {a["image_id"] for a in dataset.annotations["annotations"]} == {2, 4}
