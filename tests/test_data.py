"""The data package against small sets built here: layouts, targets, every named problem, shapes."""

import contextlib
import functools
import io
import itertools
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.ops import box_iou

import data.layouts
from data import (
    CocoDataset,
    DatasetError,
    Split,
    check_annotations,
    collate,
    eval_transform,
    find_splits,
    generate_shapes,
    resized_size,
    train_transform,
)
from data.files import path_inside
from data.layouts import COCO as COCO_FORM
from data.shapes import CROWD_OBJECTS, SPARSE_OBJECTS
from eval import coco_metrics

REAL_SETS = Path(__file__).parents[2] / "shared" / "data"
LAYOUTS = {
    "coco-2017": ("annotations/instances_{}2017.json", "{}2017", "val"),
    "plain": ("annotations/instances_{}.json", "{}", "val"),
    "export": ("{}/_annotations.coco.json", "{}", "valid"),
}


def image_record(image_id=1, file_name="a.jpg", width=40, height=30):
    return {"id": image_id, "file_name": file_name, "width": width, "height": height}


def box_record(annotation_id=1, bbox=(5, 6, 10, 12), image_id=1, category_id=3, **more):
    return {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), **more}


def write_split(root, images=None, boxes=(), categories=None, pixels=True, layout="plain", half="train"):
    """Write one half of a data set, grey pictures included; returns its Split."""
    images = [image_record()] if images is None else images
    categories = [{"id": 3, "name": "cat"}] if categories is None else categories
    annotations, folder = (root / part.format(half) for part in LAYOUTS[layout][:2])
    folder.mkdir(parents=True, exist_ok=True)
    annotations.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": list(boxes), "categories": categories}
    annotations.write_text(json.dumps(content))
    for record in images if pixels else ():
        Image.new("RGB", (record["width"], record["height"]), "grey").save(folder / record["file_name"])
    return Split(half, annotations, folder, COCO_FORM)


def dataset_with_image(root, save, width=40, height=30, file_name="a.png"):
    """A data set of one image, whose file `save(path)` writes after the check at the start has passed."""
    split = write_split(root, [image_record(7, file_name, width, height)])
    dataset = CocoDataset(split)
    save(split.images / file_name)
    return dataset


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_found(tmp_path, layout):
    val_half = LAYOUTS[layout][2]
    wanted = [write_split(tmp_path, layout=layout, half=half) for half in ("train", val_half)]
    train, val = find_splits(str(tmp_path))
    assert (train.name, train.annotations, train.images) == ("train", wanted[0].annotations, wanted[0].images)
    assert (val.name, val.annotations, val.images) == ("val", wanted[1].annotations, wanted[1].images)
    assert len(CocoDataset(train)) == 1


@pytest.mark.parametrize("half", ["train", "val"])
def test_missing_half_is_none(tmp_path, half):
    write_split(tmp_path, half=half)
    assert [split and split.name for split in find_splits(str(tmp_path))].count(half) == 1
    assert None in find_splits(str(tmp_path))


def test_missing_coco_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("OTA_DATA", str(tmp_path))
    with pytest.raises(DatasetError) as error:
        find_splits("coco")
    for part in (str(tmp_path / "coco"), "train2017.zip", "val2017.zip", "annotations_trainval2017.zip"):
        assert part in str(error.value)


@pytest.mark.parametrize("folder", ["there", "absent"])
def test_missing_set_lists_layouts(tmp_path, folder):
    (tmp_path / "there").mkdir()
    with pytest.raises(DatasetError, match=r"instances_train2017\.json(.|\n)*_annotations\.coco") as error:
        find_splits(str(tmp_path / folder))
    assert str(tmp_path / folder) in str(error.value) and "zip" not in str(error.value)


@pytest.mark.parametrize(
    ("files", "data", "story"),
    [
        pytest.param({"data.yaml": "train: ../train/images\nnames: ['a']"}, ".", "form of YOLO", id="yolo-yaml-in-it"),
        pytest.param({"data.yaml": "names:\n  0: a"}, "data.yaml", "form of YOLO, which is not read", id="yolo-yaml"),
        pytest.param({"images/a.jpg": "", "labels/a.txt": "0 .5 .5 .1 .1"}, ".", "form of YOLO", id="yolo-labels"),
        pytest.param({"train/labels/a.txt": "", "train/images/a.jpg": ""}, ".", "form of YOLO", id="yolo-halves"),
        pytest.param({"a.json": "{}"}, "a.json", "a.json is a file; --data takes the folder of a data", id="json"),
        pytest.param(
            {"annotations/instances_val.json": ""},
            "annotations/instances_val.json",
            r"is a file; --data takes the folder of a data set, here \S+, with",
            id="json-in-a-set",
        ),
        pytest.param({"a.yaml": "x: 1"}, ".", "has none of", id="other-yaml"),
        pytest.param({}, "x" * 3000, "does not exist", id="long-name"),
    ],
)
def test_data_of_another_form_is_named(tmp_path, files, data, story):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=story):
        find_splits(str(tmp_path / data))


@pytest.mark.parametrize("half", ["train", "val"])
def test_missing_image_folder(tmp_path, half):
    shutil.rmtree(write_split(tmp_path, half=half).images)
    (split,) = filter(None, find_splits(str(tmp_path)))
    with pytest.raises(DatasetError, match=f"instances_{half}.json is there, but its image folder .*{half}"):
        CocoDataset(split)


def test_category_ids_with_gaps(tmp_path):
    categories = [{"id": 90, "name": "z"}, {"id": 2, "name": "b"}, {"id": 17, "name": "m"}]
    boxes = [box_record(1, category_id=90), box_record(2, category_id=2), box_record(3, category_id=17)]
    dataset = CocoDataset(write_split(tmp_path, boxes=boxes, categories=categories))
    assert (dataset.class_names, dataset.category_ids) == (["b", "m", "z"], [2, 17, 90])
    assert dataset[0][1]["labels"].tolist() == [2, 0, 1]


def test_target_of_each_image_in_file_order(tmp_path):
    images = [image_record(9, "b.jpg"), image_record(4, "empty.jpg", 50, 20), image_record(5, "a.jpg")]
    boxes = [
        box_record(1, (1, 2, 3, 4), 5),
        box_record(2, (-0.5, 20, 41, 10.5), 9),
        box_record(3, image_id=5),
    ]
    dataset = CocoDataset(write_split(tmp_path, images, boxes))
    images, targets = collate([dataset[i] for i in range(len(dataset))])
    assert [target["image_id"] for target in targets] == [9, 4, 5]
    assert [target["orig_size"] for target in targets] == [(30, 40), (20, 50), (30, 40)]
    assert targets[0]["boxes"].tolist() == [[0, 20, 40, 30]]  # clipped
    assert targets[1]["boxes"].shape == (0, 4) and targets[1]["labels"].shape == (0,)  # a negative
    assert targets[2]["boxes"].tolist() == [[1, 2, 4, 6], [5, 6, 15, 18]]
    assert all(type(x) is torch.Tensor for x in [*images, *(t["boxes"] for t in targets)])
    assert images[1].shape == (3, 20, 50) and images[1].dtype == torch.uint8


def test_crowd_and_degenerate_boxes_are_no_targets(tmp_path):
    bad = [(5, 5, 0, 9), (5, 5, 9, -1), (5, 5, float("nan"), 9), (5, 5, float("inf"), 9), (40, 5, 0.5, 9)]
    boxes = [box_record(i, box) for i, box in enumerate(bad, 1)]
    boxes += [box_record(10, iscrowd=1), box_record(11, (1, 1, 2, 2), iscrowd=0)]
    dataset = CocoDataset(write_split(tmp_path, boxes=boxes))
    assert (dataset.dropped_boxes, dataset.crowd_boxes) == (5, 1)
    assert dataset[0][1]["boxes"].tolist() == [[1, 1, 3, 3]]
    assert [record["id"] for record in dataset.annotations["annotations"]] == [10, 11]  # the same objects in AP


def test_crowd_regions_go_where_the_boxes_go(tmp_path):
    """Flipped, resized and clipped along; degenerate ones are left out, before and after the transform."""
    crowds = [(30, 20, 15, 15), (0, 6, 10, 12), (5, 5, 0, 9), (5, 5, float("nan"), 9), (20, 20, 0.4, 9)]
    boxes = [box_record(i, box, iscrowd=1) for i, box in enumerate(crowds, 1)]
    boxes += [box_record(10, (0, 6, 10, 12)), box_record(11, (1, 1, 2, 2), image_id=2)]
    boxes[0]["bbox"][2:] = [10.5, 10.5]  # half a pixel outside
    split = write_split(tmp_path, [image_record(), image_record(2, "b.jpg")], boxes)
    dataset = CocoDataset(split, train_transform((60, 100), flip=1.0))
    images, targets = collate([dataset[0], dataset[1]])
    assert targets[0]["ignore"].tolist() == [[0, 40, 20, 60], [60, 12, 80, 36]]
    assert targets[0]["boxes"].tolist() == [[60, 12, 80, 36]] and targets[0]["labels"].tolist() == [0]
    assert targets[1]["ignore"].shape == (0, 4) and targets[1]["labels"].tolist() == [0]
    assert type(targets[0]["ignore"]) is torch.Tensor
    assert (dataset.num_boxes, dataset.dropped_boxes, dataset.crowd_boxes) == (2, 0, 5)
    assert len(dataset.annotations["annotations"]) == 7  # pycocotools knows what to do with crowds
    assert isinstance(CocoDataset(split)[0][1]["ignore"], tv_tensors.BoundingBoxes)


def test_class_names_that_occur_twice_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="category names that occur twice: 1\n    'cell'"):
        CocoDataset(write_split(tmp_path, categories=[{"id": 1, "name": "cell"}, {"id": 4, "name": "cell"}]))


def test_malformed_image_is_the_one_problem(tmp_path):
    """Its annotations are not called those of an unknown image."""
    image = image_record(1, "a.png")
    split = write_split(tmp_path, [image], boxes=[box_record(1), box_record(2)])
    content = json.loads(split.annotations.read_text())
    del content["images"][0]["width"]
    split.annotations.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"1 problem\(s\)(.|\n)*width is missing"):
        CocoDataset(split)


def test_ground_truth_fit_for_evaluators(tmp_path):
    """Without area and iscrowd, and with an annotation 0, a perfect detector still has AP 1."""
    boxes = [box_record(0), box_record(1, (20, 2, 9, 9)) | {"area": None}]
    truth = CocoDataset(write_split(tmp_path, boxes=boxes)).annotations
    assert coco_metrics(truth, [{**record, "score": 0.9} for record in boxes])["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("mode", "colour", "suffix", "wanted"),
    [
        pytest.param("L", 90, "jpg", (90, 90, 90), id="grey"),
        pytest.param("1", 1, "png", (255, 255, 255), id="bilevel"),
        pytest.param("CMYK", (0, 255, 255, 0), "jpg", (254, 0, 0), id="cmyk"),
        pytest.param("RGBA", (10, 200, 30, 128), "png", (10, 200, 30), id="rgba"),
        pytest.param("P", 0, "png", (0, 0, 0), id="palette"),
    ],
)
def test_colour_modes(tmp_path, mode, colour, suffix, wanted):
    split = write_split(tmp_path, [image_record(1, f"a.{suffix}")], pixels=False)
    Image.new(mode, (40, 30), colour).save(split.images / f"a.{suffix}")
    image, _ = CocoDataset(split)[0]
    assert image.shape == (3, 30, 40)
    assert (image[:, 15, 20].int() - torch.tensor(wanted)).abs().max() <= 2


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_rotation(tmp_path, suffix):
    split = write_split(tmp_path, [image_record(1, f"a.{suffix}", 30, 40)], pixels=False)
    stored = np.zeros((30, 40, 3), np.uint8)
    stored[:, :20] = 255  # orientation 6: what is stored on the left is shown on top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(split.images / f"a.{suffix}", exif=exif)
    image, _ = CocoDataset(split)[0]
    assert image.shape == (3, 40, 30) and image[:, :18].min() > 200 and image[:, 22:].max() < 50


def _truncated(path):
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-700])


@pytest.mark.parametrize(
    ("file_name", "save", "story"),
    [
        pytest.param("a.jpg", lambda path: path.write_bytes(b"no image"), "cannot be read", id="corrupt"),
        pytest.param("a.jpg", lambda path: path.write_bytes(b""), "cannot be read", id="empty-file"),
        pytest.param("a.jpg", _truncated, "cannot be read", id="truncated-jpg"),
        pytest.param("a.png", _truncated, "cannot be read", id="truncated-png"),
        pytest.param("a.jpg", lambda path: path.unlink(), "there is no image file", id="missing"),
        pytest.param("a.png", lambda p: Image.new("RGB", (30, 40)).save(p), "40 x 30 .*30 x 40", id="size"),
        pytest.param("a.png", lambda p: Image.new("I;16", (40, 30)).save(p), "more than 8 bits", id="16-bit"),
    ],
)
def test_broken_image_is_named(tmp_path, file_name, save, story):
    dataset = dataset_with_image(tmp_path, save, file_name=file_name)
    with pytest.raises(DatasetError, match=story) as error:
        dataset[0]
    assert "image 7" in str(error.value) and file_name in str(error.value)


def claim_size(path, width, height):
    """Rewrite the size in a JPEG's frame header."""
    content = bytearray(path.read_bytes())
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
    path.write_bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [50_000, 12_000], ids=["beyond-pillows-limit", "beyond-ours"])
def test_image_that_claims_to_be_huge_is_named_and_not_decoded(tmp_path, side):
    split = write_split(tmp_path / "set", [image_record(7, "a.jpg"), image_record(8, "b.jpg")])
    dataset = CocoDataset(split)
    claim_size(split.images / "b.jpg", side, side)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DatasetError, match=r"image 8.*b\.jpg cannot be read: .*(2500000000 pixels|12000 x 12000 px)"):
        dataset[1]
    with pytest.raises(DatasetError, match=r"image files that cannot be read: 1\n    image 8 \(b\.jpg\)"):
        CocoDataset(split)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


BREAKS = {
    "truncated": _truncated,
    "empty": lambda path: path.write_bytes(b""),
    "huge": lambda path: claim_size(path, 50_000, 50_000),
    "missing": lambda path: path.unlink(),
    "size": lambda path: Image.new("RGB", (30, 40)).save(path),
}


def set_with_bad_images(root, count, bad) -> Split:
    """A data set of `count` images; those in `bad` are broken, in every way in turn."""
    split = write_split(root, [image_record(i, f"{i}.jpg") for i in range(count)])
    for i, break_file in zip(bad, itertools.cycle(BREAKS.values()), strict=False):
        break_file(split.images / f"{i}.jpg")
    return split


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_named_once_and_replaced(tmp_path, capfd, workers):
    dataset = CocoDataset(set_with_bad_images(tmp_path, 12, [0, 3, 4, 7, 11]), bad_images="skip")
    loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)
    for _ in range(2):
        ids = [[target["image_id"] for target in targets] for _, targets in loader]
        assert ids == [[1, 1, 2, 5], [5, 5, 6, 8], [8, 9, 10, 1]]
    said = capfd.readouterr().err.splitlines()
    assert sorted(line.split(": ")[0] for line in said) == [f"skipped bad image {n} (at most 10)" for n in range(1, 6)]
    for i in (0, 3, 4, 7, 11):
        assert sum(f"image {i}" in line and f"{i}.jpg" in line for line in said) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_are_an_error_over_all_workers(tmp_path, workers):
    """No worker alone meets eleven."""
    dataset = CocoDataset(set_with_bad_images(tmp_path, 34, range(0, 33, 3)), bad_images="skip")
    loader = DataLoader(dataset, 1, num_workers=workers, collate_fn=collate)
    with pytest.raises(DatasetError, match=r"11 images cannot be used, and --bad-images skip takes 10 at most"):
        list(loader)


def test_set_without_a_good_image_is_an_error(tmp_path):
    dataset = CocoDataset(set_with_bad_images(tmp_path, 3, range(3)), bad_images="skip")
    with pytest.raises(DatasetError, match="instances_train.json: not one image can be used"):
        dataset[1]


def test_skipping_does_not_excuse_a_bad_annotation_file(tmp_path):
    split = write_split(tmp_path, boxes=[box_record(category_id=9)])
    with pytest.raises(DatasetError, match="unknown categories"):
        CocoDataset(split, bad_images="skip")


def test_killed_worker_ends_the_run_with_an_error(tmp_path):
    split = write_split(tmp_path, [image_record(i, f"{i}.jpg") for i in range(40)])
    loader = DataLoader(CocoDataset(split), 2, num_workers=2, collate_fn=collate, persistent_workers=True)
    batches = iter(loader)
    next(batches)
    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*\) (is killed by signal: Killed|exited unexp)"):
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)  # raises whatever the main process does
        time.sleep(1)
        list(batches)


@pytest.mark.parametrize("escape", ["parent", "absolute", "link"])
def test_file_outside_the_folder_is_refused(tmp_path, escape):
    outside = tmp_path / "secret.png"
    Image.new("RGB", (40, 30)).save(outside)
    name = {"parent": "../secret.png", "absolute": str(outside), "link": "link.png"}[escape]
    split = write_split(tmp_path, [image_record(1, name)], pixels=False)
    if escape == "link":
        (split.images / name).symlink_to(outside)
    with pytest.raises(DatasetError, match="file names that leave the image folder: 1"):
        CocoDataset(split)
    with pytest.raises(DatasetError, match="leaves the folder") as error:
        path_inside(split.images, name)
    assert ("--follow-links" in str(error.value)) == (escape == "link")
    if escape != "link":
        with pytest.raises(DatasetError, match="file names that leave the image folder: 1"):
            CocoDataset(replace(split, follow_links=True))


def link_farm(root, kind):
    """A set whose images lie in blobs/ beside it, as Hugging Face's cache, DVC and git-annex lay them out."""
    split = write_split(root / "set", [image_record(i, f"{i}.jpg") for i in (1, 2)], [box_record()])
    if kind == "folder":
        split.images.rename(root / "blobs")
        split.images.symlink_to(root / "blobs")
        return split
    (root / "blobs").mkdir()
    for i in (1, 2):
        image = split.images / f"{i}.jpg"
        image.rename(root / "blobs" / f"{i}")
        image.symlink_to({"file": f"../../blobs/{i}", "broken": f"../../blobs/{i}0", "loop": f"{i}.jpg"}[kind])
    return split


def test_links_to_outside_are_followed_when_asked_for(tmp_path):
    split = link_farm(tmp_path, "file")
    said = rf"1\.jpg.*: a link to {tmp_path}/blobs/1; --follow-links reads it"
    with pytest.raises(DatasetError, match=said):
        CocoDataset(split)
    train, _ = find_splits(str(tmp_path / "set"), follow_links=True)
    dataset = CocoDataset(train)
    assert [len(dataset[i][1]["boxes"]) for i in range(2)] == [1, 0]
    with pytest.raises(DatasetError, match=said):  # each image is looked at again when it is loaded
        dataset.split = split
        dataset[0]


def test_linked_image_folder_is_the_folder(tmp_path):
    assert len(CocoDataset(link_farm(tmp_path, "folder"))) == 2


@pytest.mark.parametrize("follow", [False, True], ids=["refused", "followed"])
@pytest.mark.parametrize(("kind", "story"), [("broken", "is a link to .*/blobs/10, which is not there"),
                                             ("loop", r"1\.jpg.*[Ss]ymbolic links")])  # fmt: skip
def test_links_to_nothing_are_named(tmp_path, kind, story, follow):
    split = replace(link_farm(tmp_path, kind), follow_links=follow)
    with pytest.raises(DatasetError, match=story):
        CocoDataset(split)
    dataset = CocoDataset(split, bad_images="skip")
    with pytest.raises(DatasetError, match="not one image can be used"):
        dataset[0]


@pytest.mark.parametrize(
    ("name", "on_disk", "way"),
    [
        pytest.param("images\\{}.jpg", "images/{}.jpg", "with / for \\", id="backslash"),
        pytest.param("a%20{}.jpg", "a {}.jpg", "with %20 and the like decoded", id="url"),
        pytest.param("a {}.jpg", "a%20{}.jpg", "with %20 and the like decoded", id="url-on-disk"),
        pytest.param("é{}.jpg", "e\u0301{}.jpg", "in another Unicode form (NFC, NFD)", id="nfd"),
        pytest.param("{}.JPG", "{}.jpg", "with upper and lower case changed", id="case"),
        pytest.param("{}", "{}.jpg", "with another extension", id="no-extension"),
        pytest.param("{}.png", "{}.jpeg", "with another extension", id="other-extension"),
        pytest.param("train/{}.jpg", "{}.jpg", "without the folder train", id="folder-dropped"),
        pytest.param("train/a/{}.jpg", "a/{}.jpg", "without the folder train", id="first-folder-dropped"),
        pytest.param("/home/me/set/{}.jpg", "{}.jpg", "without the folder /home/me/set", id="absolute"),
        pytest.param("{}.jpg", "sub/{}.jpg", "in the folder {root}/train/sub", id="folder-added"),
        pytest.param("x/a/{}.jpg", "y/a/{}.jpg", "in the folder {root}/train/y in place of x", id="other-folder"),
        pytest.param("{}.jpg", "../pictures/{}.jpg", "in the folder {root}/pictures", id="beside"),
        pytest.param("C:\\Data\\A%20{}.JPG", "sub/a {}.png", "with %20 and the like decoded and with / for \\ and with"
                     " upper and lower case changed and with another extension and in the folder {root}/train/sub in"
                     " place of C:/Data", id="all"),
    ],
)  # fmt: skip
def test_names_that_are_nearly_those_on_disk(tmp_path, name, on_disk, way):
    """Said with how many and an example, of the fewest changes; nothing is loaded under another name."""
    split = write_split(tmp_path, [image_record(i, name.format(i)) for i in (1, 2, 3)], pixels=False)
    beside = [] if on_disk.startswith("../") else [tmp_path / "val" / on_disk]  # where a file is the last guess
    for path in (str(path).format(i) for path in [split.images / on_disk, *beside] for i in (1, 2)):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(path)
    with pytest.raises(DatasetError) as error:
        CocoDataset(split)
    found = f"{way.format(root=tmp_path)}: {on_disk.format(1)} for {name.format(1)}"
    assert str(error.value).splitlines()[-1] == f"  2 of the 3 missing files would be found {found}"


def test_files_of_one_name_in_many_folders(tmp_path):
    """The one with the most folders in common counts, and many ways are cut short."""
    names = [f"old/cam{i}/01.jpg" for i in range(30)]
    split = write_split(tmp_path, [image_record(i, name) for i, name in enumerate([*names, *"abcdefg"])], pixels=False)
    for i in range(30):
        (split.images / f"new/cam{i}").mkdir(parents=True)
        (split.images / f"new/cam{i}/01.jpg").touch()
    for letter in "abcdefg":
        (split.images / f"{letter * 2}").mkdir()
        (split.images / f"{letter * 2}/{letter}").touch()
    with pytest.raises(DatasetError) as error:
        CocoDataset(split)
    lines = str(error.value).splitlines()[-6:]
    assert lines[0].startswith("  30 of the 37 missing files would be found in the folder")
    assert "train/new in place of old: new/cam0/01.jpg for old/cam0/01.jpg" in lines[0]
    assert lines[5] == "  and 3 more in other ways"


@pytest.mark.parametrize(
    ("name", "story"),
    [
        pytest.param("a" * 5000 + ".jpg", r"file_name is 'aaa.*\.\.\..*, not the name of a file", id="5000"),
        pytest.param("a" * 300 + ".jpg", r"image files that cannot be read: 1\n.*File name too long", id="300"),
        pytest.param("a\0.jpg", r"file_name is 'a\\x00.jpg', not the name of a file", id="nul"),
        pytest.param("a\ud800.jpg", r"cannot be read: 1\n.*surrogates not allowed", id="surrogate"),
    ],
)
def test_names_that_no_file_can_have(tmp_path, name, story):
    with pytest.raises(DatasetError, match=story) as error:
        CocoDataset(write_split(tmp_path, [image_record(1, name)], pixels=False))
    assert max(map(len, str(error.value).splitlines())) < 700


def test_every_problem_in_one_error(tmp_path):
    images = [image_record(1), image_record(1, "b.jpg"), image_record(2), image_record(3, "gone.jpg")]
    images += [image_record(4, "c.jpg", 10, 10), image_record(5, "d.jpg"), {"id": 6, "width": 3, "height": 3}]
    boxes = [box_record(i, (30, 0, 20, 5)) for i in range(1, 9)]
    boxes += [box_record(8), box_record(9, image_id=77), box_record(10, category_id=66), {"id": 11}]
    boxes += [box_record(12, (1, 2, 3)), box_record(13, image_id="1"), box_record(14, iscrowd=2)]
    categories = [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 4}]
    split = write_split(tmp_path, images, boxes, categories, pixels=False)
    for name in ("a.jpg", "c.jpg"):
        Image.new("RGB", (40, 30)).save(split.images / name)
    (split.images / "d.jpg").write_bytes(b"no image")
    with pytest.raises(DatasetError) as error:
        CocoDataset(split)
    for part in (
        str(split.annotations),
        "ids that occur twice in 'images': 1\n    record 1, id 1, file_name 'b.jpg'",
        "malformed records in 'images': 1\n    record 6, id 6: file_name is missing",
        "file names that occur twice: 1\n    a.jpg: images 1 and 2",
        "image 3 (gone.jpg)",
        "image 4 (c.jpg): 10 x 10 in the record, 40 x 30 in the file",
        "image files that cannot be read: 1\n    image 5 (d.jpg)",
        "ids that occur twice in 'annotations': 1",
        "annotations of unknown images: 1\n    annotation 9, image 77",
        "annotations of unknown categories: 1\n    annotation 10, image 1 (a.jpg): category_id 66",
        "malformed records in 'annotations': 4\n    record 11, id 11: image_id is missing",
        "bbox is [1, 2, 3], not four numbers",
        "image_id is '1', not an integer",
        "iscrowd is 2, not 0 or 1",
        "px?): 8\n    annotation 1, image 1 (a.jpg): [30, 0, 20, 5] in 40 x 30",
        "and 3 more",
        "ids that occur twice in 'categories': 1",
        "malformed records in 'categories': 1\n    record 2, id 4: name is missing",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "story"),
    [
        pytest.param('{"images": [\n  1,,', "not valid JSON at line 2, column 5", id="bad-json"),
        pytest.param("[]", "the top level is a list", id="list"),
        pytest.param("{}", "missing top-level lists: 3", id="no-keys"),
        pytest.param('{"images": [], "annotations": [], "categories": []}', "'images' has no", id="empty"),
    ],
)
def test_unusable_annotation_file(tmp_path, text, story):
    split = write_split(tmp_path)
    split.annotations.write_text(text)
    with pytest.raises(DatasetError, match=story) as error:
        CocoDataset(split)
    assert str(split.annotations) in str(error.value)


def spoiled(**values):
    """The text of a sound annotation file with some fields of its one annotation changed."""
    record = box_record() | values
    return json.dumps({"images": [image_record()], "annotations": [record], "categories": [{"id": 3, "name": "é"}]},
                      ensure_ascii=False)  # fmt: skip


@pytest.mark.parametrize(
    ("content", "story"),
    [
        pytest.param(b"", "the file is empty: 0 bytes", id="empty"),
        pytest.param(b"\0" * 5000, "the file is empty: 5000 bytes, all of them blank or NUL", id="nul"),
        pytest.param(b"[" * 100_000, "lists or objects are nested too deeply", id="deep"),
        pytest.param(spoiled(extra=[]).replace("[]", "[" * 900 + "]" * 900), "", id="deep-extra"),
        pytest.param(spoiled(bbox=[]).replace("[]", "[" * 900 + "]" * 900), r"bbox is \[\[\[.*not four", id="deep-box"),
        pytest.param(spoiled(id=0).replace('"id": 0', '"id": ' + "9" * 5000), "thousands of digits", id="5000-digits"),
        pytest.param(spoiled(id=1e9).replace("1000000000.0", "7, \"id\": 8"), r"'id' is given twice in \{", id="twice"),
        pytest.param(spoiled().encode("latin-1"), r"not text in UTF-8: byte 0xe9 in line 1.*Latin-1", id="latin-1"),
        pytest.param(spoiled().replace("é", "自行车").encode("gbk"), "not text in UTF-8.*GBK", id="gbk"),
        pytest.param(spoiled().encode("utf-16"), "", id="utf-16"),
        pytest.param(spoiled().encode("utf-8-sig"), "", id="bom"),
        pytest.param(spoiled(bbox=[10**400, 1, 5, 5]), r"bbox is \[1000.*\.\.\..*most 64 bits", id="bbox-401-digits"),
        pytest.param(spoiled(bbox=[1e308, 1, 1e308, 5]), r"more than 1 px outside", id="bbox-overflows"),
        pytest.param(spoiled(bbox=[True, 1, 5, 5]), r"bbox is \[True, 1, 5, 5\], not four numbers", id="bbox-true"),
        pytest.param(spoiled(id=2**63), "id is 9223372036854775808, not an integer of at most", id="id-2^63"),
        pytest.param(spoiled(id=2**63 - 1), "", id="id-largest"),
        pytest.param(spoiled(id=-(2**63)), "", id="id-smallest"),
        pytest.param(spoiled(id=True), "id is True, not an integer", id="id-true"),
        pytest.param(spoiled(id=[1]), r"id is \[1\], not an integer", id="id-list"),
        pytest.param(spoiled(category_id=3.0), "category_id is 3.0, not an integer", id="category-3.0"),
        pytest.param(spoiled(iscrowd=True), "", id="iscrowd-true"),
        pytest.param(spoiled(iscrowd=None), "iscrowd is None, not 0 or 1", id="iscrowd-null"),
        pytest.param(spoiled(iscrowd=[[1]]), r"iscrowd is \[\[1\]\], not 0 or 1", id="iscrowd-list"),
        pytest.param(spoiled().replace('"width": 40', '"width": 1e400'), "width is inf, not a number of pix", id="inf"),
        pytest.param(spoiled().replace('"width": 40', f'"width": {10**400}'), "width is 1000.*not a num", id="width"),
    ],
)  # fmt: skip
def test_odd_values_are_one_clear_message_or_taken(tmp_path, content, story):
    split = write_split(tmp_path)
    split.annotations.write_bytes(content if isinstance(content, bytes) else content.encode())
    if not story:
        assert len(CocoDataset(split)[0][1]["boxes"]) <= 1
        return
    with pytest.raises(DatasetError, match=story) as error:
        CocoDataset(split)
    assert str(split.annotations) in str(error.value) and len(str(error.value)) < 1500


def test_annotation_file_cut_in_half_is_named(tmp_path):
    split = write_split(tmp_path, boxes=[box_record(i) for i in range(1, 200)])
    content = split.annotations.read_bytes()
    split.annotations.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"not valid JSON at line 1.*has \d+ bytes; is it whole\?") as error:
        CocoDataset(split)
    assert str(split.annotations) in str(error.value)


def test_large_sets_are_sampled(tmp_path):
    images = [image_record(i, f"{i}.jpg") for i in range(5001)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    with pytest.raises(DatasetError, match=r"\(in 2000 of 5001 files looked at\): 2000"):
        check_annotations(content, Split("train", tmp_path / "file.json", tmp_path, COCO_FORM))


@pytest.mark.parametrize("image_size", [(800, 1333), (97, 131), (128, 128), (193, 194)], ids=str)
def test_resized_size_is_that_of_torchvision(image_size):
    sizes = [(37, 91), (91, 37), (50, 50), (123, 45), *np.random.default_rng(0).integers(20, 400, (20, 2)).tolist()]
    for height, width in sizes:
        image = eval_transform(image_size)(tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8)))
        assert tuple(image.shape[-2:]) == resized_size(height, width, image_size)


@pytest.mark.parametrize("image_size", [(800, 600), (0, 10)], ids=str)
def test_image_size_is_checked(image_size):
    with pytest.raises(ValueError, match="image_size"):
        train_transform(image_size)


def test_train_transform_flips_boxes(tmp_path):
    boxes = [box_record(1, (0, 6, 10, 12)), box_record(2, (20, 20, 0.4, 9))]
    split = write_split(tmp_path, boxes=boxes)
    image, target = CocoDataset(split, train_transform((60, 100), flip=1.0))[0]
    assert image.shape == (3, 60, 80) and target["orig_size"] == (30, 40) and target["image_id"] == 1
    assert target["boxes"].tolist() == [[60, 12, 80, 36]]  # the other one is 0.8 px wide by then
    assert target["labels"].tolist() == [0]


def flips(split, seed, workers, epochs=2) -> list[list[bool]]:
    """Which images each epoch flipped."""
    torch.manual_seed(seed)
    dataset = CocoDataset(split, train_transform((30, 50)))
    loader = DataLoader(dataset, 8, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)
    return [[bool(t["boxes"][0, 0] > 10) for _, targets in loader for t in targets] for _ in range(epochs)]


@pytest.mark.parametrize("workers", [0, 2])
def test_flips_follow_the_seed_and_differ_between_epochs_and_workers(tmp_path, workers):
    images = [image_record(i, f"{i}.jpg") for i in range(48)]
    boxes = [box_record(i + 1, (0, 6, 10, 12), image_id=i) for i in range(48)]
    split = write_split(tmp_path, images, boxes)
    first, second = flips(split, 3, workers)
    assert flips(split, 3, workers) == [first, second]
    assert first != second and flips(split, 4, workers)[0] != first
    batches = [first[i : i + 8] for i in range(0, 48, 8)]
    assert batches[::2] != batches[1::2]  # the batches of one worker and of the other
    assert 10 < sum(first) < 38


def test_eval_transform_keeps_every_box(tmp_path):
    boxes = [box_record(1, (0, 6, 10, 12)), box_record(2, (20, 20, 0.4, 9))]
    image, target = CocoDataset(write_split(tmp_path, boxes=boxes), eval_transform((15, 100)))[0]
    assert image.shape == (3, 15, 20) and image.dtype == torch.uint8
    torch.testing.assert_close(torch.as_tensor(target["boxes"]), torch.tensor([[0, 3, 5, 9], [10, 10, 10.2, 14.5]]))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes") / "set"
    generate_shapes(root, train_images=60, val_images=3)
    return root


def test_shapes_are_deterministic(shapes, tmp_path):
    generate_shapes(tmp_path / "again", train_images=60, val_images=3)
    files = sorted(path.relative_to(shapes) for path in shapes.rglob("*") if path.is_file())
    assert len(files) == 65
    assert all((shapes / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    generate_shapes(tmp_path / "other", seed=1, train_images=60, val_images=3)
    name = "annotations/instances_train.json"
    assert (shapes / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


def test_shapes_are_valid_and_crowded(shapes):
    train = CocoDataset(find_splits(str(shapes))[0])
    with contextlib.redirect_stdout(io.StringIO()):
        assert len(COCO(train.split.annotations).getAnnIds()) == len(train.annotations["annotations"])
    boxes = [torch.as_tensor(target["boxes"]) for _, target in train]
    overlap = torch.tensor([box_iou(b, b).triu(1).max().item() if len(b) else 0.0 for b in boxes])
    counts = torch.tensor([len(b) for b in boxes])
    assert (overlap > 0.3).float().mean() > 0.25 and overlap.max() < 0.75
    assert (
        (counts == 0).any() and (counts > SPARSE_OBJECTS[1]).float().mean() > 0.2 and counts.max() <= CROWD_OBJECTS[1]
    )
    sides = torch.cat(boxes)[:, 2:] - torch.cat(boxes)[:, :2]
    assert sides.min() > 8 and sides.max() <= 101
    assert train.dropped_boxes == 0 and len(train.class_names) == 5


def test_shapes_are_generated_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OTA_DATA", str(tmp_path / "home"))
    small = functools.partial(generate_shapes, train_images=2, val_images=1)
    monkeypatch.setattr(data.layouts, "generate_shapes", small)
    train, val = find_splits("shapes")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("*")}
    assert find_splits("shapes") == (train, val) and val is not None
    small(train.annotations.parents[1], seed=5)  # as a second process that came too late
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [path.name for path in (tmp_path / "home").iterdir()] == [data.shapes.shapes_folder()]


@pytest.mark.parametrize("name", ["bccd", "coco128"])
def test_real_set(name):
    if not (REAL_SETS / name).is_dir():
        pytest.skip(f"{REAL_SETS / name} is not on this machine")
    for split in filter(None, find_splits(str(REAL_SETS / name))):
        dataset = CocoDataset(split, train_transform((320, 480)))
        assert dataset.dropped_boxes == 0
        for i in range(0, len(dataset), 25):
            image, target = dataset[i]
            assert tuple(image.shape[-2:]) == resized_size(*target["orig_size"], (320, 480))
