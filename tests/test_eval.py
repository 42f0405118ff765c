"""The faster evaluator against pycocotools, on annotations with crowd regions and detections of every quality."""

import random
import sys

import pytest

from eval import METRICS, SettingsError, coco_metrics


def annotations_and_results(images: int, seed: int) -> tuple[dict, list[dict]]:
    """Up to eight boxes of three classes per image, a few of them crowds, and moved copies of them as detections."""
    r = random.Random(seed)
    annotations, results = [], []
    for image_id in range(1, images + 1):
        for _ in range(r.randint(0, 8)):
            x, y, w, h = r.uniform(0, 500), r.uniform(0, 400), r.uniform(4, 200), r.uniform(4, 150)
            category = r.randint(1, 3)
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": image_id, "category_id": category, "area": w * h,
                    "bbox": [x, y, w, h], "iscrowd": int(r.random() < 0.1),
                }
            )  # fmt: skip
            for _ in range(r.randint(0, 3)):
                moved = [x + r.gauss(0, 5), y + r.gauss(0, 5), max(1, w + r.gauss(0, 9)), max(1, h + r.gauss(0, 9))]
                seen_as = category if r.random() < 0.8 else r.randint(1, 3)
                results.append({"image_id": image_id, "category_id": seen_as, "bbox": moved, "score": r.random()})
    categories = [{"id": c, "name": f"class {c}"} for c in range(1, 5)]  # the last one has no boxes
    sizes = [{"id": i, "width": 640, "height": 480} for i in range(1, images + 1)]
    return {"images": sizes, "annotations": annotations, "categories": categories}, results


@pytest.mark.parametrize("with_detections", [True, False], ids=["detections", "none"])
def test_faster_evaluator_gives_the_same_numbers(with_detections):
    annotations, results = annotations_and_results(40, seed=0)
    results = results if with_detections else []
    slow, fast = (coco_metrics(annotations, results, fast=fast) for fast in (False, True))
    assert {name: fast[name] for name in METRICS} == pytest.approx({name: slow[name] for name in METRICS}, abs=1e-12)
    for name, row in slow["per_class"].items():
        assert fast["per_class"][name] == pytest.approx(row, abs=1e-12)
    assert (slow["AP"] > 0.1) == with_detections


def test_faster_evaluator_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(SettingsError, match="--fast-eval needs .* pip install faster-coco-eval"):
        coco_metrics(*annotations_and_results(1, seed=0), fast=True)
