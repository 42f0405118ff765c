"""What data, systems and command lines of others are like: an example for each kind of fault that was found in use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval as eval_script
import predict
import train
from data import CocoDataset, DatasetError, find_splits, generate_shapes, printable
from errors import UserError
from eval import METRICS, coco_metrics, evaluation_dataset
from model import Detector, DetectorConfig
from training import environment

ROOT = Path(__file__).parent.parent
SMALL = (
    *("--backbone", "test_resnet", "--no-pretrained", "--channels", 8, "--head-convs", 1, "--image-size", 64),
    *("--batch-size", 2, "--steps", 2, "--workers", 0, "--device", "cpu"),
)
NAMES = ["自行车", "lone \ud800", "\x1b[31mred\x1b[0m", "two\nlines", "\u202eright to left"]


@pytest.fixture
def changed(tmp_path):
    """A generated data set whose annotation files `change` has altered."""

    def changed(change) -> Path:
        root = tmp_path / "set"
        generate_shapes(root, train_images=4, val_images=2, size_px=96)
        for path in (root / "annotations").glob("*.json"):
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        return root

    return changed


def name_categories(content: dict) -> None:
    for category, name in zip(content["categories"], NAMES, strict=True):
        category["name"] = name


def test_names_that_a_terminal_cannot_take(call, changed, tmp_path):
    """Training, evaluation and prediction end well where stdout is ASCII, and pass nothing on that acts on a terminal;
    the files have the names as they are."""
    root, out = changed(name_categories), tmp_path / "out"
    command = [sys.executable, "train.py", "--data", root, *SMALL, "--out", out]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, timeout=300,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"two\\nlines" in done.stdout and b"\\u81ea" in done.stdout and b"\x1b[31m" not in done.stdout
    assert set(json.loads((out / "metrics.json").read_text())["per_class"]) == set(NAMES)

    weights = out / "ota.safetensors"
    assert "two\\nlines" in call(eval_script, "--weights", weights, "--out", tmp_path / "eval")
    pictures = tmp_path / "pictures"
    call(predict, "--weights", weights, "--score", 0, root / "val", "--out", pictures, "--device", "cpu")
    found = json.loads((pictures / "detections.json").read_text())
    assert len(list(pictures.glob("*.jpg"))) == 2 and {row["category_name"] for row in found} <= set(NAMES)


@pytest.mark.parametrize("script", ["train", "eval"])
def test_results_are_on_disk_before_they_are_printed(call, changed, tmp_path, monkeypatch, script):
    root, out = changed(lambda content: None), tmp_path / "out"
    args = ("--data", root, *SMALL, "--out", out)

    def fail(*_):
        raise BrokenPipeError("nobody reads this")

    if script == "eval":
        call(train, *args)
        args, out = ("--weights", out / "ota.safetensors", "--out", tmp_path / "eval"), tmp_path / "eval"
    module = {"train": train, "eval": eval_script}[script]
    monkeypatch.setattr(module, "print_table", fail)
    with pytest.raises(BrokenPipeError):
        call(module, *args)
    assert json.loads((out / "metrics.json").read_text())["images"] == 2
    assert (out / ("samples.png" if script == "train" else "detections.json")).exists()


def test_printable_text():
    assert printable("自行车 नमस्ते 👩‍👧 é \u00a0") == "自行车 नमस्ते 👩‍👧 é \u00a0"
    assert printable("a\nb\r\t\x1b[2J\u202e\u2028\ud800\x7f") == r"a\nb\r\t\x1b[2J\u202e\u2028\ud800\x7f"


def fractions(content: dict) -> None:
    for record in content["annotations"]:
        record["bbox"] = [value / 96 for value in record["bbox"]]


def test_boxes_in_fractions_are_refused(changed):
    with pytest.raises(DatasetError, match=r"100% of all \(normalised, fractions.*px\)"):
        CocoDataset(find_splits(str(changed(fractions)))[0])


def shrink(content: dict) -> None:
    for record in content["annotations"]:
        record["bbox"] = [5, 5, 1.5, 30] if record["id"] % 2 else [5, 5, 30, 30]


def test_small_boxes_are_reported_with_their_share(call, changed, tmp_path):
    said = call(train, "--data", changed(shrink), *SMALL, "--out", tmp_path / "out")
    assert "% of the boxes are under 2 px wide or high at --image-size 64 107" in said


def ids_and_areas(annotation_id, image_id, category_id, area) -> dict:
    """Two images with a box each, of two classes; functions of the ordinary ids 1 and 2."""
    return {
        "images": [{"id": image_id(i), "width": 100, "height": 100} for i in (1, 2)],
        "categories": [{"id": category_id(i), "name": f"class {i}"} for i in (1, 2)],
        "annotations": [
            {"id": annotation_id(i), "image_id": image_id(i), "category_id": category_id(i), "iscrowd": 0,
             "bbox": [10, 10, 40 * i, 40], **({} if area is None else {"area": area})}
            for i in (1, 2)
        ],
    }  # fmt: skip


def same(i: int) -> int:
    return i


@pytest.mark.parametrize(
    "odd",
    [
        (lambda i: -i, same, same, 1600), (lambda i: i - 1, same, same, 1600), (lambda i: i + 2**63, same, same, 1600),
        (same, lambda i: i + 2**53, same, 1600), (same, lambda i: i - 2, same, 1600), (same, same, lambda i: -i, 1600),
        (same, same, same, None), (same, same, same, -1600), (same, same, same, 1e11), (same, same, same, float("nan")),
    ],
    ids=["negative-id", "id-0", "id-2^63", "image-2^53", "image-0", "negative-category", "no-area", "negative-area",
         "area-1e11", "area-nan"],
)  # fmt: skip
def test_evaluators_see_ordinary_ids_and_areas(odd):
    results = []
    for annotations in (ids_and_areas(same, same, same, 1600), ids_and_areas(*odd)):
        found = [
            {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in annotations["annotations"]
        ]
        found[1]["bbox"] = [10, 10, 80, 30]  # IoU 0.75
        results.append(coco_metrics(annotations, found))
    ordinary, metrics = results
    assert [metrics[name] for name in METRICS] == [ordinary[name] for name in METRICS]
    assert {name: metrics["per_class"][name] for name in ordinary["per_class"]} == ordinary["per_class"]
    json.dumps(metrics, allow_nan=False)


def group(content: dict) -> None:
    """As Roboflow exports: a category 0 that all others name, and that nothing is."""
    for category in content["categories"]:
        category["supercategory"] = "things"
    content["categories"].insert(0, {"id": 0, "name": "things", "supercategory": "none"})


def test_category_that_only_groups_the_others_is_left_out(changed):
    root = changed(group)
    dataset = CocoDataset(find_splits(str(root))[0])
    assert 0 not in dataset.category_ids and "things" not in dataset.class_names
    assert [c["name"] for c in dataset.annotations["categories"]] == dataset.class_names
    assert "category 0 things, which groups the others" in eval_script.describe(dataset)
    ids, names = [0, *dataset.category_ids], ["things", *dataset.class_names]
    classes = {"source": "old.safetensors", "category_ids": ids, "class_names": names}  # has the class
    known = evaluation_dataset(dataset.split, (64, 107), classes)
    assert known.category_ids[0] == 0 and known.grouping is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda content: content["annotations"][0].update(category_id=0), "it is used"),
        (lambda content: content["categories"][2].update(supercategory="others"), "one is of another group"),
    ],
    ids=["used", "not-of-all"],
)
def test_category_that_may_be_meant_stays(changed, change, why):
    def grouped_but(content: dict) -> None:
        group(content)
        change(content)

    assert CocoDataset(find_splits(str(changed(grouped_but)))[0]).category_ids[0] == 0, why


@pytest.mark.parametrize(
    "args",
    [
        ("--lr", "nan"), ("--weight-decay", "nan"), ("--weight-decay", "inf"), 
        ("--ema", "nan"), ("--clip-norm", "inf"), ("--seed", str(10**20)), ("--steps", str(10**30)),
        ("--image-size", "20000"), ("--image-size", "0"), ("--multi-scale", "20000"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_numbers_that_no_run_can_use_are_refused_by_flag(monkeypatch, capsys, args):
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as stop:
        train.parse_args()
    assert stop.value.code == 2 and args[0] in capsys.readouterr().err


@pytest.mark.parametrize("device", ["meta", "xla", "nonsense", "cpu:x"])
def test_device_that_cannot_train(call, device):
    with pytest.raises(UserError, match=f"--device {device}"):
        call(train, "--data", "shapes", "--device", device)


def test_memory_of_a_step_is_compared_with_what_there_is(call, changed, tmp_path, monkeypatch):
    root = changed(lambda content: None)
    assert "GiB" not in call(train, "--data", root, *SMALL, "--out", tmp_path / "out")
    monkeypatch.setattr(environment, "available_bytes", lambda *_: 2**20)
    said = call(train, "--data", root, *SMALL, "--out", tmp_path / "other")
    assert "warning: a step of 2 images of up to 64 x 64 px" in said and "--image-size" in said


def test_memory_follows_pixels_and_parameters():
    detector = Detector(DetectorConfig(3, "test_resnet", (64, 64), 32, 1))
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    small, large = (environment.step_bytes(detector, pixels, "adamw", False) for pixels in (64**2, 2 * 64**2))
    weights = sum(p.numel() for p in detector.parameters()) * 4 * 4  # themselves, gradients and two moments
    assert large - small == pytest.approx(small - weights, rel=1e-3) and small > weights
    assert detector.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())


WINDOWS = """
import os, signal, sys
sys.modules["fcntl"] = None
del signal.SIGUSR1, os.O_DIRECTORY
sys.argv = ["train.py", *sys.argv[1:]]
import eval, export, predict, train
from model import load
train.main()
"""


def test_system_without_locks_and_signals_of_posix(changed, tmp_path):
    """Windows has neither fcntl nor SIGUSR1, and opens no folders."""
    command = [
        sys.executable,
        "-c",
        WINDOWS,
        "--data",
        changed(lambda content: None),
        *SMALL,
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("this system has no file locks") == 1 and (tmp_path / "out" / "metrics.json").exists()
