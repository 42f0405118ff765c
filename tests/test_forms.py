"""The contract of the three annotation forms; how a data set is found; what is said where none is."""

import re
from dataclasses import replace
from functools import partial

import pytest

import data.layouts
from data import CocoDataset, DatasetError, find_splits, generate_shapes
from errors import UserError
from eval import coco_metrics
from tests.support.sets import collate, grey, refusal, write_coco, write_scenes

BOX = ([1, 1, 9, 9], False)
each_form = pytest.mark.parametrize("form", ["coco", "crowdhuman", "voc"])


@each_form
def test_targets_regions_and_counts(tmp_path, form):
    """A box up to the border, a region to ignore (iscrowd, extra.ignore, difficult), a box without width, no box."""
    scenes = {"a": [([30, 20, 10, 10], False), ([5, 5, 9, 6], True), ([7, 7, 0, 9], False)], "b": []}
    dataset = CocoDataset(write_scenes(tmp_path, form, scenes))
    assert (dataset.num_boxes, dataset.crowd_boxes, dataset.dropped_boxes) == (1, 1, 1)
    assert (dataset.class_names, [i["file_name"] for i in dataset.images]) == (["person"], ["a.jpg", "b.jpg"])
    images, (target, empty) = collate([dataset[0], dataset[1]])
    assert target["boxes"].tolist() == [[30, 20, 40, 30]] and target["labels"].tolist() == [0]
    assert target["ignore"].tolist() == [[5, 5, 14, 11]]
    assert (target["orig_size"], target["image_id"], empty["image_id"]) == ((30, 40), 1, 2)
    assert [empty[name].shape for name in ("boxes", "ignore", "labels")] == [(0, 4), (0, 4), (0,)]
    truth = dataset.annotations
    assert [(a["bbox"], a["iscrowd"]) for a in truth["annotations"]] == [([30, 20, 10, 10], 0), ([5, 5, 9, 6], 1)]
    # In evaluation, a detection inside the region is neither found nor false.
    found = {"image_id": 1, "category_id": dataset.category_ids[0], "bbox": [30, 20, 10, 10], "score": 0.8}
    in_region = found | {"bbox": [5, 5, 8, 6], "score": 0.9}
    assert coco_metrics(truth, [found, in_region])["AP"] == pytest.approx(1)


@each_form
def test_bad_image_files_are_named_with_their_records(tmp_path, form):
    names = ("good", "case", "broken", "link", "nothing", "size")
    split = write_scenes(tmp_path / "set", form, {name: [BOX] for name in names})
    dataset, images = CocoDataset(split), {name: split.images / f"{name}.jpg" for name in names}
    images["case"].rename(split.images / "CASE.jpg")
    images["broken"].write_bytes(b"no picture")
    images["link"].rename(tmp_path / "blob")
    images["link"].symlink_to(tmp_path / "blob")
    images["nothing"].unlink()
    images["nothing"].symlink_to("gone.jpg")
    grey(images["size"], (41, 30))
    said = refusal(split)
    for story in (
        rf"{split.annotations}: {4 if form == 'crowdhuman' else 5} problem\(s\)",
        rf"image files missing in {split.images}: 2\n    \S+ 2 \(case.jpg\)",
        r"\S+ 5 \(nothing.jpg\): .* is a link to \S+/gone.jpg, which is not there",
        r"image files that cannot be read: 1\n    \S+ 3 \(broken.jpg\): cannot identify",
        r"names that leave the image folder: 1\n    \S+ 4 \(link.jpg\): .*--follow-links reads it",
        "1 of the 1 missing files would be found with upper and lower case changed: CASE.jpg for case.jpg",
        "" if form == "crowdhuman" else r"image 6 \(size.jpg\): 40 x 30 in the record, 41 x 30 in the file",
    ):
        assert re.search(story, said), story
    with pytest.raises(
        DatasetError, match="--follow-links reads it"
    ):  # each image is looked at again when it is loaded
        dataset[3]
    followed = CocoDataset(replace(split, follow_links=True), bad_images="skip")
    assert followed[3][1]["image_id"] == 4


@each_form
def test_name_that_leaves_the_folder_is_refused(tmp_path, form):
    """Also where the file is there, and links are followed."""
    for name in ("../../secret", "a/../../../secret", str(tmp_path / "secret")):
        split = write_scenes(tmp_path / "set", form, {"a" if form == "voc" else name: []})
        grey(tmp_path / "secret.jpg")
        if form == "voc":
            xml = tmp_path / "set" / "Annotations" / "a.xml"
            xml.write_text(xml.read_text().replace("a.jpg", f"{name}.jpg"))
            (split.images / "a.jpg").unlink()
        for follow_links in (False, True):
            said = refusal(replace(split, follow_links=follow_links))
            assert re.search(r"names that leave the image folder: 1\n.*secret.jpg", said)


@each_form
def test_file_that_a_crash_or_a_wrong_encoding_left(tmp_path, form):
    split = write_scenes(tmp_path, form, {"a": [BOX]})
    path = tmp_path / "Annotations" / "a.xml" if form == "voc" else split.annotations
    content = path.read_bytes()
    for spoiled, story in (
        (b"\0" * len(content), r"not well-formed|the file is empty: \d+ bytes"),
        (content[: len(content) // 2], r"not valid JSON at line 1, column \d+|no element found"),
        (content.replace(b"a", b"\xe9", 1), "not text in UTF-8: byte 0xe9 in line 1|not well-formed"),
    ):
        path.write_bytes(spoiled)
        said = refusal(split)
        assert re.search(story, said) and str(path) in said
    split.annotations.unlink()
    assert f"{split.annotations}: cannot be read: [Errno 2]" in refusal(split)


@each_form
def test_digest_is_that_of_all_annotation_files(tmp_path, form):
    split = write_scenes(tmp_path, form, {"a": [BOX]})
    path = tmp_path / "Annotations" / "a.xml" if form == "voc" else split.annotations
    content, digest = path.read_bytes(), CocoDataset(split).digest
    path.write_bytes(content + b"\n")
    assert CocoDataset(split).digest != digest
    path.write_bytes(content)
    assert CocoDataset(split).digest == digest


def test_image_folder_may_be_a_link_and_must_exist(tmp_path):
    split = write_coco(tmp_path / "set")
    split.images.rename(tmp_path / "elsewhere")
    assert f"{split.annotations} is there, but its image folder {split.images} is not" in refusal(split)
    split.images.symlink_to(tmp_path / "elsewhere")
    assert CocoDataset(split)[0][0].shape == (3, 30, 40)


LAYOUTS = {  # annotation file, image folder, names of the splits
    "coco-2017": ("annotations/instances_{}2017.json", "{}2017", ("train", "val")),
    "coco": ("annotations/instances_{}.json", "{}", ("train", "val", "test")),
    "roboflow": ("{}/_annotations.coco.json", "{}", ("train", "valid", "test")),
    "crowdhuman": ("annotation_{}.odgt", "Images", ("train", "val")),
    "voc-2007": ("ImageSets/Main/{}.txt", "JPEGImages", ("trainval", "test")),
    "voc-2012": ("ImageSets/Main/{}.txt", "JPEGImages", ("train", "val", "test")),
}


@pytest.mark.parametrize(("file", "folder", "names"), LAYOUTS.values(), ids=LAYOUTS)
def test_layout_is_found(tmp_path, file, folder, names):
    """With all splits, beside one of another layout that would come first, and with train or val alone."""
    paths = [tmp_path / file.format(name) for name in names]
    for path in (*paths, tmp_path / "annotations" / "instances_train2017.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "data.yaml").write_text("[ of another program")
    splits = find_splits(str(tmp_path))
    (tmp_path / "data.yaml").unlink()
    found = [split for split in splits if split]
    assert [(s.name, s.annotations) for s in found] == [*zip(("train", "val", "test"), paths, strict=False)]
    assert [split.images for split in found] == [tmp_path / folder.format(name) for name in names]
    (tmp_path / "annotations" / "instances_train2017.json").unlink()
    paths[0].touch()
    for path in paths[1:]:
        path.unlink()
    assert find_splits(str(tmp_path)) == (splits.train, None, None)
    paths[0].rename(paths[1])
    assert find_splits(str(tmp_path)) == (None, splits.val, None)


def test_missing_set_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("OTA_DATA", str(tmp_path))
    for name, file in (("coco", "annotations_trainval2017.zip"), ("crowdhuman", "CrowdHuman_train03.zip")):
        with pytest.raises(DatasetError, match=rf"{tmp_path}/{name}(.|\n)*{file}"):
            find_splits(name)


OTHER_FORMS = {  # files, --data, message
    "yolo-labels": ({"train/labels/a.txt": "", "train/images/a.jpg": ""}, ".", "label files of YOLO, but no data.yaml"),
    "json": ({"train/_annotations.coco.json": ""}, "train/_annotations.coco.json", r"is a file; .* here \S+, with"),
    "other-yaml": ({"a.yaml": "train: a"}, ".", r"has none of these; if \S+a.yaml is(.|\n)*2017.json(.|\n)*data.yaml"),
    "nothing": ({"a.txt": ""}, ".", r"has none of\n(.|\n)*2017.json(.|\n)*_annotations"),
}


@pytest.mark.parametrize(("files", "data", "story"), OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_data_of_another_form_is_named(tmp_path, files, data, story):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=story):
        find_splits(str(tmp_path / data))


def test_shapes_need_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/shapes: "):
        generate_shapes(tmp_path / "file" / "shapes")


def test_shapes_are_generated_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OTA_DATA", str(tmp_path / "home"))
    small = partial(generate_shapes, train_images=2, val_images=1)
    monkeypatch.setattr(data.layouts, "generate_shapes", small)
    train, val, _ = find_splits("shapes")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("*")}
    assert find_splits("shapes") == (train, val, None) and val is not None
    small(train.annotations.parents[1], seed=5)  # as a second process that came too late
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("*")} == before
