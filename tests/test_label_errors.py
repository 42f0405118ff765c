"""Label errors: prices of annotations, suspects with their reasons, and a data set that is spoilt on purpose."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from data import CocoDataset, eval_transform, find_splits, generate_shapes
from data.report import write_coco
from errors import UserError
from kernels import OTAConfig, PointGrid
from kernels.assign_reference import assign_image
from model import save_weights
from studies import label_errors, spoilt
from studies.label_errors import BOX_WEIGHT, find_suspects, prices
from studies.predictions import overlaps
from studies.spoilt import KINDS, shares_found, spoil
from tests.support.detectors import tiny_detector
from tests.support.scenes import make_scene

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> list[CocoDataset]:
    root = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(root, train_images=30, val_images=2, size_px=96, seed=2)
    return [CocoDataset(split, eval_transform((96, 160))) for split in find_splits(str(root)) if split]


def test_prices_are_those_of_the_dense_plan():
    grid, config = PointGrid.for_image((96, 128)), OTAConfig(top_q=10)
    scene = make_scene(grid, (6,), num_classes=3, seed=1)
    solved = assign_image(
        scene.logits[0].double(), scene.boxes[0].double(), scene.gt_boxes.double(), scene.gt_labels, grid,
        replace(config, alpha=BOX_WEIGHT * config.alpha),
    )  # fmt: skip
    cost = solved["cost"].where(solved["cost"].isfinite(), 0)
    expected = (solved["log_plan"].exp() * cost)[:-1].sum(1) / solved["k"]
    torch.testing.assert_close(prices(scene, config), expected, rtol=1e-5, atol=1e-6)


def test_suspects_have_the_reason_that_detections_give(halves):
    """One image, four boxes side by side: found as another class, found with another box, not found, not labelled."""
    dataset = halves[0]
    detector = tiny_detector(num_classes=5, image_size=(96, 160)).eval()
    detector.class_names, detector.category_ids = dataset.class_names, dataset.category_ids
    image, (first, second, *_) = dataset.images[0]["id"], dataset.category_ids
    rows = [([0, 0, 20, 20], first), ([0, 30, 20, 20], first), ([0, 60, 20, 20], second)]
    truth = [{"id": i, "image_id": image, "bbox": b, "category_id": c, "iscrowd": 0} for i, (b, c) in enumerate(rows)]
    found = [([0, 0, 20, 19], second, 0.9), ([8, 30, 20, 20], first, 0.8), ([60, 60, 20, 20], first, 0.7)]
    found += [([30, 0, 9, 9], first, 0.2)]  # not confident
    results = [{"image_id": image, "bbox": b, "category_id": c, "score": s} for b, c, s in found]

    class OneImage(CocoDataset):
        images, annotations = dataset.images[:1], {"annotations": truth}

    one = OneImage(dataset.split, dataset.transform)
    one._labels, one._boxes = np.array([0, 0, 1]), np.array([[0, 0, 20, 20], [0, 30, 20, 50], [0, 60, 20, 80]], "f4")
    one._offsets = np.array([0, 3])
    suspects = find_suspects(detector, one, results)
    names = dataset.class_names
    reasons = {s["id"]: s["reason"] for s in suspects["annotations"]}
    expected = {0: f"{names[0]}: found as {names[1]}", 1: f"{names[0]}: found with an IoU of 0.43"}
    assert reasons == expected | {2: f"{names[1]}: nothing found there"}
    assert [s["price"] for s in suspects["annotations"]] == sorted(s["price"] for s in suspects["annotations"])[::-1]
    assert [(s["bbox"], s["reason"]) for s in suspects["missing"]] == [(found[2][0], f"not labelled: {names[0]}")]


def test_lists_and_crops_are_written(halves, tmp_path, figures, capsys):
    path = tmp_path / "ota.safetensors"
    about = halves[0].classes | {"data": str(halves[0].split.annotations.parents[1])}
    detector = tiny_detector(num_classes=5, image_size=(96, 160))
    detector.cuts = [0.02] * 5
    save_weights(path, detector, about)
    label_errors.main(["--weights", str(path), "--most", "7", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "suspects.json").read_text())
    assert len(report["annotations"]) == 7 and {"file_name", "price", "reason"} <= report["annotations"][0].keys()
    assert (tmp_path / "suspects.png").read_bytes().startswith(b"\x89PNG")
    assert len([axis for axis in figures[0].axes if axis.images]) == 16 + 8
    assert "suspects.png" in capsys.readouterr().out


def test_errors_are_what_they_say(halves):
    truth = halves[0].annotations
    wrong, errors = spoil(truth, 0.1, seed=0)
    assert (wrong, errors) == spoil(truth, 0.1, seed=0) and errors != spoil(truth, 0.1, seed=1)[1]
    count = round(0.1 * len(truth["annotations"]))
    assert Counter(e["kind"] for e in errors) == dict.fromkeys(KINDS, count)
    before, after = ({a["id"]: a for a in part["annotations"]} for part in (truth, wrong))
    by_kind = {kind: [e for e in errors if e["kind"] == kind] for kind in KINDS}
    for error in by_kind["class"]:
        assert after[error["id"]]["category_id"] != before[error["id"]]["category_id"]
    for error in by_kind["box"]:
        assert 0.3 <= overlaps([after[error["id"]]], [before[error["id"]]]) <= 0.6
    for error in by_kind["extra"]:
        others = [a for i, a in after.items() if a["image_id"] == error["image_id"] and i != error["id"]]
        assert error["id"] not in before and (not others or overlaps([error], others).max() < 0.6)
    gone = before.keys() - after.keys()
    assert {(e["image_id"], *e["bbox"]) for e in by_kind["missing"]} == {
        (before[i]["image_id"], *before[i]["bbox"]) for i in gone
    }
    touched = {e["id"] for e in errors}
    assert all(after[i] == before[i] for i in before.keys() - gone - touched)


def test_shares_found():
    errors = [{"id": 1, "kind": "class"}, {"id": 2, "kind": "box"}]
    errors = [e | {"image_id": 5, "bbox": [0, 0, 9, 9]} for e in errors]
    ranked = [{"id": i} for i in (7, 1, 8, 9, 9, 2)]
    assert shares_found(ranked, errors) == {"first 1x": 0.5, "first 2x": 0.5, "first 3x": 1, "class": 1, "box": 1}
    missing = [{"id": None, "kind": "missing", "image_id": 5, "bbox": [0, 0, 9, 9]}]
    near, far = ({"id": 0, "image_id": 5, "bbox": [x, 0, 9, 9]} for x in (2, 6))
    assert shares_found([far, near], missing) == {"first 1x": 0, "first 2x": 1, "first 3x": 1, "missing": 1}


def test_protocol(halves, tmp_path, monkeypatch):
    """With detectors that are not trained."""
    pytest.importorskip("hotcoco")

    def untrained(assigner, seed, data, out, more, threads):
        torch.manual_seed(seed)
        detector = tiny_detector(num_classes=5, image_size=(96, 160))
        detector.cuts = [0.02] * 5
        save_weights(out / "ota.safetensors", detector, halves[0].classes | {"data": data})
        return out

    monkeypatch.setattr(spoilt, "train", untrained)
    write_coco(halves, tmp_path / "set")
    spoilt.main(["--data", str(tmp_path / "set"), "--seeds", "1", "--share", "0.1", "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "spoilt.json").read_text())["rows"]
    assert {"annotations: price", "annotations: loss", "missing: hotcoco", "missing: score"} <= rows.keys()
    assert all(0 <= row[0]["first 1x"] <= row[0]["first 3x"] <= 1 for row in rows.values())


def test_what_cannot_be_searched_is_refused(halves, tmp_path):
    path = tmp_path / "ota.safetensors"
    save_weights(path, tiny_detector(num_classes=5, image_size=(96, 160)), halves[0].classes)
    with pytest.raises(UserError, match="ota.safetensors names no data set; name the data set with --data"):
        label_errors.main(["--weights", str(path)])
    write_coco(halves[1:], tmp_path / "validation-only")
    with pytest.raises(UserError, match="has no train split, only val"):
        label_errors.main(["--weights", str(path), "--data", str(tmp_path / "validation-only")])
