"""CrowdHuman's form: what is read, what is said about mistakes, the recipe, and a run with its metrics."""

import json
import sys

import pytest

import eval as eval_script
import train
from data import CocoDataset, DatasetError
from data.crowd_metrics import crowd_metrics
from model import load_weights
from tests.support.runs import CPU, DETECTOR
from tests.support.sets import dataset_of, generate_crowds, person, refusal, write_crowdhuman
from training.settings import detector_config, parse_args

CROWD_RECIPE = {
    "image_size": [800, 1400], "steps": 30_000, "epochs": None, "batch_size": 16, "optimizer": "sgd", "lr": 0.01,
    "schedule": "step", "backbone": "resnet50", "max_detections": 500, "box": "fbox",
}  # fmt: skip


def test_boxes_and_regions(tmp_path):
    """Boxes are cut at the image; ids are the numbers of the lines; head_attr.ignore is for `hbox` alone."""
    boxes = [
        person([-4, 5, 14, 50]),
        person([20, 5, 10, 10], "mask"),
        person([5, 5, 6, 6], extra={"box_id": 3, "ignore": 1}),
        person([7, 7, 6, 6], head_attr={"ignore": 1}, extra={"ignore": 0}),
        person([50, 5, 10, 10]),
        person([float("nan"), 5, 10, 10]),
    ]
    lines = [{"ID": "273271,c9db000d5146c15", "gtboxes": boxes}, "", {"ID": "b", "gtboxes": []}]
    dataset = CocoDataset(write_crowdhuman(tmp_path, lines))
    assert [(i["id"], i["file_name"]) for i in dataset.images] == [(1, "273271,c9db000d5146c15.jpg"), (3, "b.jpg")]
    assert (dataset.num_boxes, dataset.dropped_boxes, dataset.crowd_boxes) == (2, 2, 2)
    target = dataset[0][1]
    assert target["boxes"].tolist() == [[0, 5, 10, 30], [7, 7, 13, 13]] and target["orig_size"] == (30, 40)
    assert target["ignore"].tolist() == [[20, 5, 30, 15], [5, 5, 11, 11]]
    assert dataset.annotations["annotations"][0]["bbox"] == [0, 5, 10, 25]


@pytest.mark.parametrize(("box", "name", "corner"), [("fbox", "person", 1), ("vbox", "person", 2), ("hbox", "head", 3)])
def test_kind_of_box(tmp_path, box, name, corner):
    one = person([1, 1, 9, 9], vbox=[2, 2, 9, 9], hbox=[3, 3, 9, 9])
    write_crowdhuman(tmp_path, [{"ID": "a", "gtboxes": [one, one | {"head_attr": {"ignore": 1}}]}])
    dataset = dataset_of(tmp_path, box=box)
    assert dataset.class_names == [name] and dataset.crowd_boxes == (box == "hbox")
    assert dataset[0][1]["boxes"][0].tolist() == [corner, corner, corner + 9, corner + 9]


BOX = person([1, 1, 5, 5])
REFUSED = {
    "cut": ('{"ID": "cut off", "gtboxes": [', "not valid JSON at line 1, column 31"),
    "no-id": ({"gtboxes": []}, "ID is None, not a name"),
    "no-boxes": ({"ID": "a"}, "ID a: gtboxes is no list of objects"),
    "tag": ({"ID": "a", "gtboxes": [BOX, BOX | {"tag": "dog"}]}, "ID a, gtboxes[1]: tag is 'dog', not 'person' or"),
    "three": ({"ID": "a", "gtboxes": [BOX | {"fbox": [1, 2, 3]}]}, "ID a, gtboxes[0]: fbox is [1, 2, 3], not four"),
}


def test_every_malformed_line_is_named(tmp_path):
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _ in REFUSED.values()]
    said = refusal(write_crowdhuman(tmp_path, [{"ID": "good", "gtboxes": [BOX]}, *lines]))
    assert "annotation_train.odgt: 5 problem(s)" in said
    for number, (_, story) in enumerate(REFUSED.values(), 2):
        assert f"    line {number}: " in said and story in said


def test_bad_images_are_skipped(tmp_path, capfd):
    """An image that cannot be read keeps its place, with the size that its boxes need."""
    lines = [{"ID": name, "gtboxes": [person([1, 1, 5, 50])]} for name in ("broken", "good")]
    split = write_crowdhuman(tmp_path, lines)
    (split.images / "broken.jpg").write_bytes(b"no picture")
    dataset = CocoDataset(split, bad_images="skip")
    assert [dataset[i][1]["image_id"] for i in range(2)] == [2, 2]
    assert (dataset.images[0]["width"], dataset.images[0]["height"]) == (6, 51)
    assert "skipped bad image 1 (at most 10)" in capfd.readouterr().err


def test_recipe(tmp_path, monkeypatch, capsys):
    """By name or folder; other data has one kind of boxes."""

    def settings(*args):
        monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
        return parse_args()

    write_crowdhuman(tmp_path, [])
    for data in ("crowdhuman", tmp_path):
        assert CROWD_RECIPE.items() <= vars(settings("--data", data)).items()
    args = settings("--data", tmp_path, "--box", "hbox", "--epochs", 3)
    assert (args.box, args.steps, detector_config(args, 1).max_detections) == ("hbox", None, 500)
    with pytest.raises(SystemExit):
        settings("--data", "coco", "--box", "vbox")
    assert "--box vbox is for CrowdHuman; --data coco has one kind of boxes" in capsys.readouterr().err


def test_training_and_evaluation(tmp_path, call):
    """One run: its metrics, what its weights know, and other boxes, which are another run.

    Links need --follow-links at every start: a weights file cannot choose it.
    """
    data, out, again = generate_crowds(tmp_path / "crowds", 64), tmp_path / "out", tmp_path / "again"
    (data / "Images").rename(tmp_path / "store")
    (data / "Images").mkdir()
    for path in (tmp_path / "store").iterdir():
        (data / "Images" / path.name).symlink_to(path)
    flags = ["--data", data, *DETECTOR, *CPU, "--image-size", 64, "--ota", "radius=3", "top_q=10", "--eval-every", 1000,
             "--steps", 24, "--batch-size", 8, "--optimizer", "adamw", "--lr", 8e-3, "--warmup", 10,
             "--schedule", "cosine", "--out", out]  # fmt: skip
    with pytest.raises(DatasetError, match="--follow-links"):
        call(train, *flags)
    said = call(train, *flags, "--follow-links")
    metrics = json.loads((out / "metrics.json").read_text())
    evaluation = ["--weights", out / "ota.safetensors", "--out", again, *CPU]
    with pytest.raises(DatasetError, match="--follow-links"):
        call(eval_script, *evaluation)
    evaluation += ["--follow-links"]
    call(eval_script, *evaluation)
    evaluated, results = (json.loads((again / name).read_text()) for name in ("metrics.json", "detections.json"))
    dataset = dataset_of(data, 1, follow_links=True)
    wanted = crowd_metrics(dataset.annotations, results)
    assert dataset.crowd_boxes > 0 and 0 < wanted["crowd_AP"] < 1 and 0 < wanted["crowd_JI"] < 1
    assert wanted.items() <= evaluated.items()
    assert {name: metrics[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert f"crowd_AP {wanted['crowd_AP']:.3f}  crowd_MR" in said

    detector, metadata = load_weights(out / "ota.safetensors")
    assert detector.config.max_detections == 500
    assert metadata.items() >= {"box": "fbox", "data": str(data), "class_names": ["person"]}.items()
    call(eval_script, *evaluation, "--box", "vbox")
    with pytest.raises(Exception, match="classes do not fit: only in .*1 person; only in .*1 head"):
        call(eval_script, *evaluation, "--box", "hbox")
    with pytest.raises(Exception, match="--box: was fbox, is vbox now"):
        call(train, *flags, "--follow-links", "--box", "vbox")
