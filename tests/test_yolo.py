"""YOLO's form: what data.yaml may say, label files, every mistake named, and the same AP as in COCO layout."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval as eval_script
import predict as predict_script
import train
from data import CocoDataset, DatasetError, eval_transform, find_form, find_splits, generate_shapes
from errors import UserError
from eval import coco_metrics, evaluate
from tests.support.detectors import tiny_detector
from tests.support.runs import CPU, DETECTOR, metrics_of
from tests.support.sets import SIZE, copy_as_yolo, dataset_of, grey, refusal, write_yolo

BCCD = Path(__file__).parents[2] / "shared" / "data" / "bccd"
CLASSES = {"nc": 2, "names": ["cat", "dog"]}
SPLITS = {"train": "train/images", "val": "valid/images"}
BOX = "1 0.5 0.5 0.5 0.2\n"  # of SIZE: 10, 12 to 30, 18

WAYS = {  # what data.yaml says, in which ROOT is the folder, and text files
    "roboflow": ({"train": "../train/images", "val": "../valid/images", "test": "../test/images", **CLASSES}, {}),
    "path": ({"path": "../set", "train": "train", "valid": "valid/", "names": {1: "dog", 0: "cat"}}, {}),
    "absolute": ({"path": "ROOT", "train": "ROOT/train/images", "validation": "valid", "names": ["cat", "dog"]}, {}),
    "path-of-another-machine": ({"path": "/content/set", **SPLITS, **CLASSES}, {}),
    "list-of-folders": ({"train": ["train/images/b", "train/images/a"], "val": ["valid"], **CLASSES}, {}),
    "text-files": (
        {"train": "lists/train.txt", "val": "val.txt", **CLASSES},
        {"lists/train.txt": "../train/images/b/1.jpg\r\n\ntrain/images/a/2.jpg\n", "val.txt": "./valid/images/3.jpg"},
    ),
    "path-above": (
        {"path": "..", "train": "set/train.txt", "val": "set/valid", **CLASSES},
        {"train.txt": "ROOT/train/images/b/1.jpg\nset/train/images/a/2.jpg"},
    ),
    "absolute-names": (
        {"train": "train.txt", "val": "valid", **CLASSES},
        {"train.txt": "ROOT/train/images/b/1.jpg\nROOT/train/images/a/2.jpg"},
    ),
}


@pytest.mark.parametrize(("keys", "files"), WAYS.values(), ids=WAYS)
def test_images_of_a_split(tmp_path, keys, files):
    """In the order of their names, with ids from 1 on; a folder counts with those below it."""
    root = tmp_path / "set"
    keys = {key: value.replace("ROOT", str(root)) if isinstance(value, str) else value for key, value in keys.items()}
    pictures = ("train/images/b/1.jpg", "train/images/a/2.jpg", "valid/images/3.jpg")
    write_yolo(root, dict.fromkeys(pictures, BOX), **keys)
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text.replace("ROOT", str(root)))
    grey(root / "train" / "images" / ".hidden.jpg")
    for half, wanted in ((0, ["train/images/a/2.jpg", "train/images/b/1.jpg"]), (1, ["valid/images/3.jpg"])):
        dataset = dataset_of(root, half)
        assert [dataset.split.images / image["file_name"] for image in dataset.images] == [root / w for w in wanted]
        assert [image["id"] for image in dataset.images] == list(range(1, len(wanted) + 1))
        assert dataset.classes == {"class_names": ["cat", "dog"], "category_ids": [1, 2]}
        assert all(dataset[i][1]["boxes"].tolist() == [[10, 12, 30, 18]] for i in range(len(wanted)))
        assert all(dataset[i][1]["labels"].tolist() == [1] for i in range(len(wanted)))
    assert find_splits(str(root / "data.yaml")) == find_splits(str(root)) and find_form(str(root)).name == "YOLO"


def test_folders_outside_and_splits_that_are_missing(tmp_path):
    """../train/images is beside the folder of data.yaml if it is there; names are the numbers of the classes."""
    write_yolo(tmp_path, {"train/images/a.jpg": BOX})
    folders = ["../train/images", "images"]
    other = write_yolo(tmp_path / "set", {"images/b.jpg": BOX}, train=folders, test="../train/images", nc=2)
    train_split, val_split, _ = find_splits(str((other / "data.yaml").rename(other / "my.yml")))
    assert val_split is None and CocoDataset(train_split).class_names == ["0", "1"]
    assert CocoDataset(train_split).num_boxes == 2


ROWS = {  # text of a label file -> boxes x1 y1 x2 y2 in a picture of 40 x 30 px
    "no-file": (None, []),
    "empty": (b"", []),
    "blank": (b" \r\n\n", []),
    "polygon": (b"0 0.25 0.2 0.5 0.1 0.75 0.6", [[10, 3, 30, 18]]),
    "spaces-bom-crlf": (
        b"\xef\xbb\xbf1.0\t0.5  0.5 0.5 0.2 \r\n\r\n0 .1 .2 .2 .4\r\n",
        [[10, 12, 30, 18], [0, 0, 8, 12]],
    ),
    "utf-16": (BOX.encode("utf-16"), [[10, 12, 30, 18]]),
    "thirds": (b"0 0.3333333333333333 0.5 0.6666666666666666 1", [[0, 0, 26.666666, 30]]),
    "rounded": (b"0 0.5 0.5 1.0001 1.004", [[0, 0, 40, 30]]),
}


@pytest.mark.parametrize(("text", "boxes"), ROWS.values(), ids=ROWS)
def test_label_files(tmp_path, text, boxes):
    """They are in labels/ beside the last folder images/ of the path."""
    root = write_yolo(
        tmp_path, {"images/x/images/a.jpg": None, "images/x/images/b.jpg": BOX}, train=".", val=None, nc=2
    )
    if text is not None:
        (root / "images" / "x" / "labels" / "a.txt").write_bytes(text)
    dataset = dataset_of(root)
    torch.testing.assert_close(
        torch.as_tensor(dataset[0][1]["boxes"]), torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    )
    assert dataset[1][1]["boxes"].tolist() == [[10, 12, 30, 18]]


def test_fractions_are_those_of_the_image_as_displayed_and_a_box_precedes_keypoints(tmp_path):
    """Images and labels in one folder, too."""
    root = write_yolo(
        tmp_path, {"train/a.jpg": f"{BOX.strip()} 0.1 0.2 2 0.3 0.4 1"}, None, train="train", nc=2, kpt_shape=[2, 3]
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", SIZE[::-1]).save(root / "train" / "a.jpg", exif=exif)
    assert dataset_of(root)[0][1]["boxes"].tolist() == [[10, 12, 30, 18]]


def test_label_files_without_an_image_are_named(tmp_path):
    """Their image may have an unknown extension; classes.txt is labelImg's. A text file may leave images out."""
    root = write_yolo(tmp_path, {"train/images/[a].jpg": BOX, "train/images/b.jpg": BOX}, train="train", nc=2)
    (root / "train" / "images" / "b.jpg").rename(root / "train" / "images" / "b.heic")
    (root / "train" / "labels" / "classes.txt").write_text("cat")
    assert [*dataset_of(root).repairs.values()] == [["labels/b.txt"]]
    assert re.search(r"left out \(without --strict\): 1\n    labels/b.txt", refusal(root, strict=True))
    (root / "train.txt").write_text("train/images/[a].jpg")
    write_yolo(root, {}, train="train.txt", nc=2)
    assert not dataset_of(root).repairs


MALFORMED = {  # kind of problem -> rows
    r"rows that are not `class cx .* in numbers: 5": (
        "0 0.5 0.5 0.5", "0 0.5 0.5 0.5 wide", "0", "0 .1 .2 .3 .4 .9", "0 .1 .2 .3 .4 .5 .6 .7",
    ),
    r"rows whose class is not a whole number from 0 to 1: 4": (
        "2 0.5 0.5 0.1 0.1", "-1 0.5 0.5 0.1 0.1", "0.5 0.5 0.5 0.1 0.1", "nan 0.5 0.5 0.1 0.1",
    ),
    r"rows with numbers outside of 0 to 1 .*: 4": (
        "0 20 15 8 6", "0 0.5 0.5 -0.1 0.1", "0 nan 0.5 0.1 0.1", "0 0.1 0.2 inf 0.5 0.1 0.1",
    ),
}  # fmt: skip


def test_malformed_rows_are_all_named_by_file_and_line(tmp_path):
    labels = {f"train/images/{i}.jpg": "\n".join([BOX, *rows, ""]) for i, rows in enumerate(MALFORMED.values())}
    root = write_yolo(tmp_path, labels | {"train/images/3.jpg": "\0\0"}, train="train", nc=2)
    (root / "train" / "images" / "0.jpg").write_bytes(b"no picture")
    said = refusal(root)
    assert f"{root / 'data.yaml'}: 15 problem(s)" in said
    for i, (kind, rows) in enumerate(MALFORMED.items()):
        assert re.search(kind, said)
        assert all(f"{root}/train/labels/{i}.txt, line {n}: {row}\n" in said for n, row in enumerate(rows, 3))
    assert f"label files that cannot be read: 1\n    {root}/train/labels/3.txt: the file is empty: 2 bytes" in said
    assert "image files that cannot be read: 1\n    image 1 (images/0.jpg): cannot identify" in said


YAMLS = {  # keys -> the message
    "no-names": ({"train": "train"}, "names is None, not a list of names"),
    "names-with-no": ({"train": "train", "names": ["yes", False]}, r"names is \['yes', False\].* need quotes"),
    "names-with-a-gap": ({"train": "train", "names": {0: "a", 2: "b"}}, "names is {.*one for each number from 0 on"),
    "names-twice": ({"train": "train", "names": ["a", "b", "a"]}, "names has 'a' twice"),
    "nc": ({"train": "train", "names": ["a", "b"], "nc": 3}, "nc is 3, but names has 2 classes"),
    "no-folder": ({"train": "train", "val": "../val", "nc": 2}, r"val: ../val is not there \(.*/val, .*set/val\)"),
    "number": ({"train": ["train", 7], "nc": 2}, "7 in path or train is not the name of a folder"),
    "no-images": ({"train": "empty", "nc": 2}, r"no images \(.jpg .*\) for train in \S+/empty"),
    "no-labels": ({"train": "photos", "nc": 2}, r"without a label file, .*: 1\n.*b.jpg: there is no \S+/photos/b.txt"),
    "outside": ({"train": "outside.txt", "nc": 2}, r"that leave .*make `path` .*: 2\n.*passwd(.|\n)*secret.jpg"),
    "missing": ({"train": "missing.txt", "nc": 2}, r"image files missing(.|\n)*case changed: train/images/a.jpg for"),
    "empty-list": ({"train": "empty.txt", "nc": 2}, r"empty.txt: cannot be read: the file is empty"),
    "neither": ({"names": ["a"]}, "no data.yaml with train, val and names"),
}  # fmt: skip


@pytest.mark.parametrize(("keys", "story"), YAMLS.values(), ids=YAMLS)
def test_what_data_yaml_gets_wrong_is_named(tmp_path, keys, story):
    root = write_yolo(tmp_path / "set", {"train/images/a.jpg": BOX, "photos/b.jpg": None}, **keys)
    grey(tmp_path / "secret.jpg")
    (root / "empty").mkdir()
    for name, text in {"outside": "../secret.jpg\n/etc/passwd", "missing": "train/images/A.jpg", "empty": ""}.items():
        (root / f"{name}.txt").write_text(text)
    assert re.search(story, refusal(root))


def test_data_yaml_that_is_not_yaml_or_not_yolos(tmp_path):
    path = tmp_path / "data.yaml"
    for text, story in (
        ("train: [a", "data.yaml: cannot be read as YAML: .*line 1"),
        ("[1, 2]", "names neither train"),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=story):
            find_splits(str(path))


def test_links_are_followed_only_with_the_flag(tmp_path):
    """Label files that are links to other folders are not shown, and a link to nothing is not an image without any."""
    root = write_yolo(tmp_path / "set", {f"train/images/{name}.jpg": None for name in "abc"}, train="train", nc=2)
    (tmp_path / "secret.txt").write_text("secret")
    (root / "train" / "labels" / "a.txt").symlink_to(tmp_path / "secret.txt")
    (root / "train" / "labels" / "b.txt").symlink_to("gone.txt")
    (root / "train" / "images" / "c.jpg").rename(tmp_path / "c.jpg")
    (root / "train" / "images" / "c.jpg").symlink_to(tmp_path / "c.jpg")
    grey(tmp_path / "more" / "d.jpg")
    (root / "train" / "images" / "more").symlink_to(tmp_path / "more")
    said = refusal(root)
    assert "secret\n" not in said and len(re.findall("--follow-links reads it", said)) == 3
    assert "b.txt: 'labels/b.txt' is a link to" in said
    (tmp_path / "secret.txt").write_text(BOX)
    (root / "train" / "labels" / "b.txt").unlink()
    dataset = dataset_of(root, follow_links=True)
    assert (len(dataset), dataset.num_boxes) == (4, 1)


def test_digest_knows_which_label_file_is_whose(tmp_path):
    root = write_yolo(tmp_path, {"train/images/a.jpg": BOX, "train/images/b.jpg": None}, train="train", nc=2)
    digest, label = dataset_of(root).digest, root / "train" / "labels" / "a.txt"
    assert dataset_of(root).digest == digest
    label.rename(label.with_stem("b"))
    assert dataset_of(root).digest != digest


@pytest.mark.parametrize("lists", [False, True], ids=["roboflow", "text-files"])
def test_set_trains_evaluates_and_predicts(call, tmp_path, lists):
    """As its COCO layout does; with an image that cannot be used."""
    generate_shapes(tmp_path / "shapes", train_images=8, val_images=4, size_px=96)
    root, out = copy_as_yolo(tmp_path / "shapes", tmp_path / "yolo", lists), tmp_path / "out"
    (root / "train" / "images" / "000001.jpg").write_bytes(b"no picture")
    flags = (*DETECTOR, *CPU, "--image-size", 64, "--batch-size", 4, "--steps", 3, "--bad-images", "skip")
    call(train, "--data", root / "data.yaml", *flags, "--out", out)
    assert "AP" in metrics_of(out) and "is complete" in call(train, "--data", root, *flags, "--out", out)
    weights, metrics = ("--weights", out / "ota.safetensors"), []
    for data, name in ((root / "data.yaml", "eval-yolo-data"), (tmp_path / "shapes", "eval-shapes")):
        call(eval_script, *weights, "--data", data, *CPU)
        metrics.append(metrics_of(out / name) | {"data": None})
    assert metrics[0] == metrics[1]
    with pytest.raises(UserError, match="has no test split, only train and val"):
        call(eval_script, *weights, "--data", root, "--split", "test", *CPU)
    shutil.copytree(root / "valid", root / "test")
    (root / "test.txt").write_text((root / "valid.txt").read_text().replace("valid", "test"))
    call(eval_script, *weights, "--data", root, "--split", "test", *CPU)
    assert metrics_of(out / "eval-yolo-test") | {"data": None} == metrics[0]
    found = call(predict_script, *weights, "--device", "cpu", "--out", tmp_path / "found", root / "valid" / "images")
    assert "4 pictures" in found


def moved(dataset: CocoDataset) -> list[dict]:
    """Return the true boxes as detections, a few px off, with random scores."""
    moves = torch.randn(dataset.num_boxes, 5, generator=torch.Generator().manual_seed(0)).tolist()
    truth = zip(dataset.annotations["annotations"], moves, strict=True)
    return [
        a | {"bbox": [x + 4 * m for x, m in zip(a["bbox"], move, strict=False)], "score": move[4]} for a, move in truth
    ]


def test_real_set_has_the_boxes_and_the_ap_of_its_coco_layout(tmp_path, one_thread):
    """To the last digit: of a detector, and of its true boxes moved at random."""
    if not BCCD.is_dir():
        pytest.skip(f"{BCCD} is not on this machine")
    root, detector = copy_as_yolo(BCCD, tmp_path / "yolo"), tiny_detector(max_detections=20)
    for half in (0, 1):
        pair = [CocoDataset(find_splits(str(folder))[half], eval_transform((96, 128))) for folder in (BCCD, root)]
        assert pair[0].classes == pair[1].classes and len(pair[0]) == len(pair[1])
        boxes, same = ([a["bbox"] for a in dataset.annotations["annotations"]] for dataset in pair)
        assert boxes == same
    detector.class_names, detector.category_ids = pair[0].class_names, pair[0].category_ids
    one, other = (evaluate(detector, dataset, workers=0)[0] for dataset in pair)
    assert one == other
    one, other = (coco_metrics(dataset.annotations, moved(dataset)) for dataset in pair)
    assert one == other and 0.3 < one["AP"] < 0.9
