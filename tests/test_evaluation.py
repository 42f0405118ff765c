"""Metrics: known numbers, ids and areas that pycocotools cannot take, and batches of evaluation images."""

import json

import pytest

import eval as eval_script
from data import CocoDataset, DatasetError, find_splits
from eval import METRICS, coco_metrics, evaluation_dataset


def same(i: int) -> int:
    return i


def two_boxes(annotation_id=same, image_id=same, category_id=same, area=1600) -> dict:
    """Two images with a box each, of two classes; functions of the ordinary ids 1 and 2."""
    boxes = [{"id": annotation_id(i), "image_id": image_id(i), "category_id": category_id(i)} for i in (1, 2)]
    for i, box in enumerate(boxes, 1):
        box |= {"bbox": [10, 10, 40 * i, 40], "iscrowd": 0} | ({} if area is None else {"area": area})
    images = [{"id": image_id(i), "width": 100, "height": 100} for i in (1, 2)]
    categories = [{"id": category_id(i), "name": f"class {i}"} for i in (1, 2)]
    return {"images": images, "categories": categories, "annotations": boxes}


def detections_of(annotations: dict) -> list[dict]:
    """Return the true boxes as detections."""
    found = annotations["annotations"]
    return [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in found]


def test_known_detections_give_known_numbers():
    truth = two_boxes()
    assert coco_metrics(truth, detections_of(truth))["AP"] == pytest.approx(1)
    assert coco_metrics(truth, [])["AP"] == 0

    # One class, two boxes, one found with IoU 0.75: precision 1 up to recall 0.5 (51 of 101 points), at the six
    # thresholds 0.5 to 0.75.
    truth = two_boxes(image_id=lambda i: 7, category_id=lambda i: 3)
    truth["images"], truth["categories"] = truth["images"][:1], [{"id": 3, "name": "thing"}]
    truth["annotations"][1]["bbox"] = [50, 50, 40, 40]
    metrics = coco_metrics(truth, [{"image_id": 7, "category_id": 3, "bbox": [10, 10, 40, 30], "score": 0.5}])
    assert metrics["AP50"] == pytest.approx(51 / 101)
    assert metrics["AP"] == pytest.approx(0.6 * 51 / 101)
    assert metrics["per_class"]["thing"]["boxes"] == 2 and metrics["APl"] == -1


ODD = {
    "negative-id": {"annotation_id": lambda i: -i},
    "id-2^63": {"annotation_id": lambda i: i + 2**63},
    "image-2^53": {"image_id": lambda i: i + 2**53},
    "area-nan": {"area": float("nan")},
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_odd_ids_and_areas_give_the_ordinary_numbers(odd):
    results = []
    for annotations in (two_boxes(), two_boxes(**odd)):
        found = detections_of(annotations)
        found[1]["bbox"] = [10, 10, 80, 30]  # IoU 0.75
        results.append(coco_metrics(annotations, found))
    ordinary, metrics = results
    assert [metrics[name] for name in METRICS] == [ordinary[name] for name in METRICS]
    assert {name: metrics["per_class"][name] for name in ordinary["per_class"]} == ordinary["per_class"]
    json.dumps(metrics, allow_nan=False)


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
    assert "category 0 things, which groups the others" in eval_script.describe(dataset)
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
