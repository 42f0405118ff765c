"""CrowdHuman's form: what is read, what is said about mistakes, recipe, and a training on generated crowds."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
import train
from data import CocoDataset, DatasetError, Split, collate, find_splits, generate_shapes
from data.crowd_metrics import crowd_metrics
from data.layouts import CROWDHUMAN, find_form
from errors import UserError
from kernels import PointGrid
from model import load_weights
from model.losses import points_inside
from tests.test_crowd_metrics import slow_metrics
from tests.test_train import TINY, run
from training.settings import detector_config, parse_args

CROWD_RECIPE = {
    "image_size": [800, 1400], "steps": 30_000, "epochs": None, "batch_size": 16, "optimizer": "sgd", "lr": 0.01,
    "schedule": "step", "backbone": "resnet50", "max_detections": 500, "box": "fbox",
}  # fmt: skip


def person(fbox, tag="person", vbox=None, hbox=None, **more) -> dict:
    return {"tag": tag, "fbox": fbox, "vbox": vbox or fbox, "hbox": hbox or fbox, "head_attr": {}, "extra": {}} | more


def write_crowd(root: Path, lines: list, half: str = "val", size: tuple[int, int] = (40, 30)) -> Split:
    """An annotation file of records or bare text, with a grey picture for every record."""
    (root / "Images").mkdir(parents=True, exist_ok=True)
    path = root / f"annotation_{half}.odgt"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    for line in lines:
        if isinstance(line, dict) and isinstance(line.get("ID"), str):
            Image.new("RGB", size, "grey").save(root / "Images" / f"{line['ID']}.jpg")
    return Split(half, path, root / "Images", CROWDHUMAN, "fbox")


def generate_crowds(root: Path, train_images: int, val_images: int, size_px: int) -> Path:
    """Generated shapes as people: all of one class, full boxes a little larger than the shapes, so that some reach
    beyond the image; every twelfth is to be ignored, and a tenth of the images have a `mask` in a corner."""
    shapes = root / "shapes"
    generate_shapes(shapes, train_images=train_images, val_images=val_images, size_px=size_px)
    for half in ("train", "val"):
        content = json.loads((shapes / "annotations" / f"instances_{half}.json").read_text())
        lines = []
        for image in content["images"]:
            name = f"{half},{image['id']:04d}"
            (root / "Images").mkdir(exist_ok=True)
            shutil.copy(shapes / half / image["file_name"], root / "Images" / f"{name}.jpg")
            boxes = [person([size_px - 20, size_px - 15, 30, 30], "mask")] if image["id"] % 10 == 0 else []
            for record in content["annotations"]:
                if record["image_id"] == image["id"]:
                    x, y, w, h = record["bbox"]
                    full = [round(x - 2), round(y - 2), round(w + 4), round(h + 4)]
                    boxes.append(person(full, extra={"ignore": int(record["id"] % 12 == 0)}))
            lines.append({"ID": name, "gtboxes": boxes})
        (root / f"annotation_{half}.odgt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(shapes)
    return root


def test_boxes_and_regions(tmp_path):
    """Boxes are cut at the image; three ways to be ignored; ids are the numbers of the lines."""
    boxes = [
        person([-4, 5, 14, 50]),
        person([20, 5, 10, 10], "mask"),
        person([5, 5, 6, 6], extra={"box_id": 3, "ignore": 1}),
        person([7, 7, 6, 6], head_attr={"ignore": 1}, extra={"ignore": 0}),
        person([50, 5, 10, 10]),
    ]
    lines = [{"ID": "273271,c9db000d5146c15", "gtboxes": boxes}, "", {"ID": "b", "gtboxes": []}]
    dataset = CocoDataset(write_crowd(tmp_path, lines))
    assert [(i["id"], i["file_name"]) for i in dataset.images] == [(1, "273271,c9db000d5146c15.jpg"), (3, "b.jpg")]
    assert (dataset.class_names, dataset.category_ids) == (["person"], [1])
    assert (dataset.num_boxes, dataset.dropped_boxes, dataset.crowd_boxes) == (2, 1, 2)
    target = dataset[0][1]
    assert target["boxes"].tolist() == [[0, 5, 10, 30], [7, 7, 13, 13]] and target["orig_size"] == (30, 40)
    assert target["ignore"].tolist() == [[20, 5, 30, 15], [5, 5, 11, 11]]
    assert dataset[1][1]["boxes"].shape == (0, 4)
    known = dataset.annotations["annotations"]
    assert [(a["bbox"], a["iscrowd"]) for a in known[:2]] == [
        ([0, 5, 10, 25], 0),
        ([20, 5, 10, 10], 1),
    ]


@pytest.mark.parametrize(
    "box, name, corners",
    [("fbox", "person", 1), ("vbox", "person", 2), ("hbox", "head", 3)],
    ids=["full", "visible", "head"],
)
def test_kind_of_box(tmp_path, box, name, corners):
    """Where the head is to be ignored, only `hbox` does so."""
    one = person([1, 1, 9, 9], vbox=[2, 2, 9, 9], hbox=[3, 3, 9, 9])
    write_crowd(tmp_path, [{"ID": "a", "gtboxes": [one, one | {"head_attr": {"ignore": 1}}]}])
    _, split = find_splits(str(tmp_path), box)
    dataset = CocoDataset(split)
    assert dataset.class_names == [name] and dataset[0][1]["boxes"][0].tolist() == [corners] * 2 + [corners + 9] * 2
    assert dataset.crowd_boxes == (box == "hbox")


def test_points_of_regions_are_no_negatives(tmp_path):
    """All points inside of a mask or of an ignored person are left out, beside those of people."""
    boxes = [person([0, 0, 16, 30]), person([16, 0, 8, 30], "mask"), person([24, 0, 8, 30], extra={"ignore": 1})]
    split = write_crowd(tmp_path, [{"ID": "a", "gtboxes": boxes}])
    _, (target,) = collate([CocoDataset(split)[0]])
    points = PointGrid.for_image((32, 40), (8,)).points(torch.device("cpu"))
    ignored = points_inside(points, target["ignore"], torch.zeros(2, dtype=torch.int64), 1)[0]
    assert sorted(set(points[ignored][:, 0].tolist())) == [20, 28]


def test_every_malformed_line_is_named(tmp_path):
    box = person([1, 1, 5, 5])
    lines = [
        {"ID": "good", "gtboxes": [box]},
        '{"ID": "cut off", "gtboxes": [',
        "[1, 2]",
        {"gtboxes": []},
        {"ID": "no-boxes"},
        {"ID": "tag", "gtboxes": [box, box | {"tag": "dog"}]},
        {"ID": "three", "gtboxes": [box | {"fbox": [1, 2, 3]}]},
        {"ID": "extra", "gtboxes": [box | {"extra": [1]}]},
    ]
    split = write_crowd(tmp_path, lines)
    with pytest.raises(DatasetError, match="7 problem") as error:
        CocoDataset(split)
    said = str(error.value)
    assert "annotation_val.odgt" in said and "line 2: not valid JSON" in said and "line 3: ID is None" in said
    assert "ID no-boxes: gtboxes is no list of objects" in said and "and 2 more" in said
    split = write_crowd(tmp_path, lines[-3:])
    with pytest.raises(DatasetError) as error:
        CocoDataset(split)
    assert "line 1: ID tag, gtboxes[1]: tag is 'dog', not 'person' or 'mask'" in str(error.value)
    assert "line 2: ID three, gtboxes[0]: fbox is [1, 2, 3], not four numbers" in str(error.value)
    assert "line 3: ID extra, gtboxes[0]: extra and head_attr have to be objects" in str(error.value)


def test_bad_images_are_named(tmp_path):
    lines = [{"ID": name, "gtboxes": [person([1, 1, 5, 5])]} for name in ("good", "missing", "broken", "../out")]
    (tmp_path / "out.jpg").touch()
    split = write_crowd(tmp_path, lines)
    (split.images / "missing.jpg").unlink()
    (split.images / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(DatasetError) as error:
        CocoDataset(split)
    said = str(error.value)
    assert "line 2 (missing.jpg)" in said and "line 3 (broken.jpg): cannot identify" in said
    assert "leave the image folder" in said and "line 4 (../out.jpg)" in said
    assert f"image files missing in {split.images}: 1" in said


def test_bad_images_are_skipped(tmp_path, capfd):
    """Without a size for it, an image that cannot be read keeps its place."""
    lines = [{"ID": name, "gtboxes": [person([1, 1, 5, 50])]} for name in ("missing", "broken", "good")]
    split = write_crowd(tmp_path, lines)
    (split.images / "missing.jpg").unlink()
    (split.images / "broken.jpg").write_bytes(b"no picture")
    dataset = CocoDataset(split, bad_images="skip")
    assert [dataset[i][1]["image_id"] for i in range(3)] == [3, 3, 3]
    assert (dataset.images[0]["width"], dataset.images[0]["height"]) == (6, 51)
    assert "skipped bad image 1 (at most 10)" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "story"),
    [
        pytest.param(b"[" * 100_000, "line 1: .*nested too deeply", id="deep"),
        pytest.param(b'{"ID": ' + b"9" * 5000 + b"}", "line 1: .*a number has thousands of digits", id="5000-digits"),
        pytest.param(b'{"ID": "a", "ID": "b", "gtboxes": []}', "line 1: .*'ID' is given twice", id="twice"),
        pytest.param('{"ID": "自", "gtboxes": []}'.encode("gbk"), "not text in UTF-8: byte .* in line 1", id="gbk"),
        pytest.param(b"", "the file is empty: 0 bytes", id="empty"),
        pytest.param(b'{"ID": "a", "gtboxes": [{"tag": "person", "fbox": [1' + b"0" * 400 + b", 1, 5, 5]}]}",
                     r"line 1: ID a, gtboxes\[0\]: fbox is \[1000.*\.\.\..*of at most 64 bits", id="401-digits"),
        pytest.param(b'{"ID": ["a"], "gtboxes": []}', r"line 1: ID is \['a'\], not a name", id="list"),
        pytest.param(b'{"ID": "A", "gtboxes": []}', r"1 of the 1 missing files would be found with upper", id="case"),
        pytest.param(b'{"ID": "a\\u0000", "gtboxes": []}', r"line 1 .*embedded null", id="nul"),
        pytest.param(b'{"ID": "' + b"a" * 5000 + b'", "gtboxes": []}', r"line 1 .*File name too long", id="long"),
    ],
)  # fmt: skip
def test_odd_lines_are_one_clear_message(tmp_path, line, story):
    split = write_crowd(tmp_path, [{"ID": "a", "gtboxes": []}])
    split.annotations.write_bytes(line)
    with pytest.raises(DatasetError, match=story) as error:
        CocoDataset(split)
    assert str(split.annotations) in str(error.value) and len(str(error.value)) < 1500


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_with_a_mark(tmp_path, encoding):
    split = write_crowd(tmp_path, [{"ID": "a", "gtboxes": []}, {"ID": "b", "gtboxes": []}])
    split.annotations.write_text(split.annotations.read_text(), encoding=encoding)
    assert len(CocoDataset(split)) == 2


def test_links_are_followed_when_asked_for(tmp_path):
    split = write_crowd(tmp_path / "set", [{"ID": "a", "gtboxes": []}])
    (split.images / "a.jpg").rename(tmp_path / "a.jpg")
    (split.images / "a.jpg").symlink_to(tmp_path / "a.jpg")
    with pytest.raises(DatasetError, match=r"line 1 \(a.jpg\): .*--follow-links reads it"):
        CocoDataset(split)
    assert CocoDataset(find_splits(str(tmp_path / "set"), follow_links=True)[1])[0][0].shape == (3, 30, 40)


def test_id_that_occurs_twice(tmp_path):
    with pytest.raises(DatasetError, match="file names that occur twice(.|\n)*a.jpg: images 1 and 3"):
        CocoDataset(write_crowd(tmp_path, [{"ID": name, "gtboxes": []} for name in "aba"]))


def test_box_that_is_not_finite_is_dropped(tmp_path):
    line = (
        '{"ID": "a", "gtboxes": [{"tag": "person", "fbox": [NaN, 1, 5, 5]}, {"tag": "person", "fbox": [1, 1, 5, 5]}]}'
    )
    split = write_crowd(tmp_path, [{"ID": "a", "gtboxes": []}])
    split.annotations.write_text(line)
    dataset = CocoDataset(split)
    assert (dataset.num_boxes, dataset.dropped_boxes, len(dataset.annotations["annotations"])) == (1, 1, 1)


def test_missing_set_says_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setenv("OTA_DATA", str(tmp_path))
    with pytest.raises(DatasetError) as error:
        find_splits("crowdhuman")
    for part in (
        str(tmp_path / "crowdhuman" / "Images"),
        "CrowdHuman_train03.zip",
        "annotation_val.odgt",
        "crowdhuman.org",
    ):
        assert part in str(error.value)


def settings(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    return parse_args()


@pytest.mark.parametrize("by", ["name", "path"])
def test_recipe(tmp_path, monkeypatch, by):
    write_crowd(tmp_path, [])
    args = settings(monkeypatch, "--data", "crowdhuman" if by == "name" else tmp_path)
    assert {name: getattr(args, name) for name in CROWD_RECIPE} == CROWD_RECIPE
    assert find_form(args.data) is CROWDHUMAN
    assert detector_config(args, 1).max_detections == 500
    args = settings(monkeypatch, "--data", tmp_path, "--box", "hbox", "--epochs", 3)
    assert (args.box, args.steps, detector_config(args, 1).max_detections) == ("hbox", None, 500)


def test_other_data_has_one_kind_of_boxes(tmp_path, monkeypatch, capsys):
    assert find_form("coco").recipe is None and settings(monkeypatch, "--data", "coco").max_detections == 100
    with pytest.raises(SystemExit):
        settings(monkeypatch, "--data", "coco", "--box", "vbox")
    assert "--box vbox is for CrowdHuman; --data coco has one kind of boxes" in capsys.readouterr().err


@pytest.fixture(scope="module")
def crowds(tmp_path_factory) -> Path:
    return generate_crowds(tmp_path_factory.mktemp("crowds"), train_images=32, val_images=24, size_px=96)


SMALL = [*TINY, "--image-size", 96, "--ota", "radius=3", "top_q=10", "--eval-every", 1000, "--steps", 60]


@pytest.fixture(scope="module")
def trained(crowds, tmp_path_factory) -> tuple[Path, str]:
    """The folder of a run on generated crowds, and what it said."""
    out = tmp_path_factory.mktemp("run") / "out"
    said = run("train.py", "--data", crowds, *SMALL, "--batch-size", 8, "--optimizer", "adamw", "--lr", 8e-3,
               "--warmup", 20, "--schedule", "cosine", "--out", out)  # fmt: skip
    return out, said


def test_training_gives_the_numbers_of_the_slow_implementation(trained, crowds, tmp_path, call):
    out, said = trained
    call(eval_script, "--weights", out / "ota.safetensors", "--out", tmp_path, *TINY[-4:])
    trained_metrics, metrics = (json.loads((d / "metrics.json").read_text()) for d in (out, tmp_path))
    results = json.loads((tmp_path / "detections.json").read_text())
    dataset = CocoDataset(find_splits(str(crowds))[1])
    assert dataset.crowd_boxes > 3
    assert len(results) > 100 and metrics["images"] == 24
    slow = slow_metrics(dataset.annotations, results)
    assert 0.02 < slow["crowd_AP"] < 1 and 0 < slow["crowd_MR"] < 1 and 0.02 < slow["crowd_JI"] < 1
    for name, value in slow.items():
        assert metrics[name] == pytest.approx(value, abs=1e-9), name
        assert trained_metrics[name] == pytest.approx(value, abs=1e-6), name
    line = "  ".join(f"crowd_{name} {slow['crowd_' + name]:.3f}" for name in ("AP", "MR", "JI"))
    assert line in said
    logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert logged[-1]["crowd_MR"] == trained_metrics["crowd_MR"]


def test_weights_know_their_boxes_and_number_of_detections(trained, crowds):
    detector, metadata = load_weights(trained[0] / "ota.safetensors")
    assert detector.config.max_detections == 500 and metadata["box"] == "fbox"
    assert metadata["data"] == str(crowds) and metadata["class_names"] == ["person"]


def test_other_boxes_have_to_be_asked_for(trained, crowds, tmp_path, call):
    weights = ["--weights", trained[0] / "ota.safetensors", "--out", tmp_path, *TINY[-4:]]
    call(eval_script, *weights, "--box", "vbox")
    assert json.loads((tmp_path / "metrics.json").read_text())["crowd_JI"] > 0
    with pytest.raises(Exception, match="classes do not fit: only in .*1 person; only in .*1 head"):
        call(eval_script, *weights, "--box", "hbox")
    generate_shapes(tmp_path / "shapes", train_images=1, val_images=1, size_px=96)
    with pytest.raises(UserError, match="--box vbox is for CrowdHuman"):
        call(eval_script, *weights, "--box", "vbox", "--data", tmp_path / "shapes")


def test_other_boxes_or_annotations_are_another_run(trained, crowds, tmp_path, call):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    same = ["--data", crowds, *SMALL, "--batch-size", 8, "--optimizer", "adamw", "--lr", 8e-3, "--warmup", 20]
    same += ["--schedule", "cosine", "--out", out]
    call(train, *same)  # is complete
    with pytest.raises(Exception, match="--box: was fbox, is vbox now"):
        call(train, *same, "--box", "vbox")
    moved = tmp_path / "crowds"
    shutil.copytree(crowds, moved)
    with open(moved / "annotation_train.odgt", "a") as file:
        file.write("\n")
    with pytest.raises(Exception, match=r"annotation file \(SHA-256\)"):
        call(train, *same, "--data", moved)


def test_crowd_of_hundreds_is_found_whole(tmp_path):
    """More real boxes in an image than COCO's 100 detections."""
    boxes = [[20 * x, 20 * y, 18, 18] for x in range(20) for y in range(20)]
    split = write_crowd(tmp_path, [{"ID": "a", "gtboxes": [person(box) for box in boxes]}], size=(400, 400))
    results = [{"image_id": 1, "category_id": 1, "bbox": box, "score": 0.9} for box in boxes]
    dataset = CocoDataset(split)
    metrics = crowd_metrics(dataset.annotations, results)
    assert metrics["crowd_AP"] == pytest.approx(399 / 400) and metrics["crowd_JI"] == 1 and metrics["crowd_MR"] == 0
    assert eval_script.coco_metrics(dataset.annotations, results)["AR100"] == pytest.approx(0.25)
    assert np.isfinite(list(metrics.values())).all()
