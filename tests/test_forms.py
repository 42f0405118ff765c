"""The contract of the three annotation forms; how a data set is found; what is said where none is."""

import re
from dataclasses import replace
from functools import partial

import pytest

import data.layouts
from data import CocoDataset, DatasetError, collate, find_splits, generate_shapes
from data.files import path_inside
from eval import coco_metrics
from tests.support.sets import dataset_of, grey, refusal, write_coco, write_scenes

FORMS = ("coco", "crowdhuman", "voc")
each_form = pytest.mark.parametrize("form", FORMS)


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
    # In evaluation, what lies in the region is neither found nor false.
    found = {"image_id": 1, "category_id": dataset.category_ids[0], "bbox": [30, 20, 10, 10], "score": 0.8}
    in_region = found | {"bbox": [5, 5, 8, 6], "score": 0.9}
    assert coco_metrics(truth, [found, in_region])["AP"] == pytest.approx(1)


@each_form
@pytest.mark.parametrize(
    ("fault", "story"),
    [
        ("missing", r"image files missing in {folder}: 1\n    \S+ 2 \(b.jpg\)$"),
        ("broken", r"image files that cannot be read: 1\n    \S+ 2 \(b.jpg\): cannot identify"),
        ("case", "1 of the 1 missing files would be found with upper and lower case changed: B.jpg for b.jpg"),
        ("link", r"names that leave the image folder: 1\n    \S+ 2 \(b.jpg\): .*--follow-links reads it"),
    ],
    ids=["missing", "broken", "case", "link"],
)
def test_bad_image_file_is_named_with_its_record(tmp_path, form, fault, story):
    split = write_scenes(tmp_path / "set", form, {"a": [([1, 1, 9, 9], False)], "b": []})
    image = split.images / "b.jpg"
    image.rename(split.images / "B.jpg" if fault == "case" else tmp_path / "blob")
    if fault == "broken":
        image.write_bytes(b"no picture")
    elif fault == "link":
        image.symlink_to(tmp_path / "blob")
    said = refusal(split)
    assert re.search("(?m)" + story.format(folder=split.images), said) and f"{split.annotations}: 1 problem(s)" in said
    if fault == "link":
        dataset = dataset_of(tmp_path / "set", follow_links=True)
        assert dataset[1][0].shape == (3, 30, 40)
        dataset.split = split  # each image is looked at again when it is loaded
        with pytest.raises(DatasetError, match="--follow-links reads it"):
            dataset[1]


@pytest.mark.parametrize("form", ["coco", "voc"])
def test_size_that_disagrees_with_the_image_is_named(tmp_path, form):
    """CrowdHuman records no sizes."""
    split = write_scenes(tmp_path, form, {"a": [([1, 1, 9, 9], False)], "b": []}, size=(41, 30))
    grey(split.images / "a.jpg", (40, 30))
    assert "1\n    image 1 (a.jpg): 41 x 30 in the record, 40 x 30 in the file" in refusal(split)


@each_form
def test_name_that_leaves_the_folder_is_refused(tmp_path, form):
    """Also where the file is there, and links are followed."""
    grey(tmp_path / "secret.jpg")
    for name in ("../../secret", str(tmp_path / "secret")):
        if form == "voc":
            split = write_scenes(tmp_path / "set", form, {"a": [([1, 1, 9, 9], False)]})
            xml = tmp_path / "set" / "Annotations" / "a.xml"
            xml.write_text(xml.read_text().replace("a.jpg", f"{name}.jpg"))
            (split.images / "a.jpg").unlink()
        else:
            split = write_scenes(tmp_path / "set", form, {name: []})
        for follow_links in (False, True):
            said = refusal(replace(split, follow_links=follow_links))
            assert re.search(r"names that leave the image folder: 1\n.*secret.jpg", said)
            for path in (f"{name}.jpg", "a/../../secret.jpg"):
                with pytest.raises(DatasetError, match="leaves the folder"):
                    path_inside(split.images, path, follow_links)


@each_form
def test_file_that_a_crash_or_a_wrong_encoding_left(tmp_path, form):
    split = write_scenes(tmp_path, form, {"a": [([1, 1, 9, 9], False)]})
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
    split.annotations.write_bytes(b"\xe9\n")
    assert re.search("cannot be read: 'utf-8' codec|not text in UTF-8: byte 0xe9", refusal(split))
    split.annotations.unlink()
    assert f"{split.annotations}: cannot be read: [Errno 2]" in refusal(split)


@each_form
def test_digest_is_that_of_all_annotation_files(tmp_path, form):
    split = write_scenes(tmp_path, form, {"a": [([1, 1, 9, 9], False)]})
    path = tmp_path / "Annotations" / "a.xml" if form == "voc" else split.annotations
    digest = CocoDataset(split).digest
    path.write_bytes(path.read_bytes() + b"\n")
    assert CocoDataset(split).digest != digest
    path.write_bytes(path.read_bytes()[:-1])
    assert CocoDataset(split).digest == digest and len(digest) == 64


def test_image_folder_may_be_a_link_and_must_exist(tmp_path):
    split = write_coco(tmp_path / "set")
    split.images.rename(tmp_path / "elsewhere")
    assert f"{split.annotations} is there, but its image folder {split.images} is not" in refusal(split)
    split.images.symlink_to(tmp_path / "elsewhere")
    assert CocoDataset(split)[0][0].shape == (3, 30, 40)


@pytest.mark.parametrize("target", ["gone", "a.jpg"], ids=["broken", "loop"])
def test_link_to_nothing_is_named(tmp_path, target):
    split = write_coco(tmp_path, pixels=False)
    (split.images / "a.jpg").symlink_to(target)
    story = r"is a link to \S+/gone, which is not there" if target == "gone" else r"a\.jpg.*[Ss]ymbolic link"
    for follow_links in (False, True):
        split = replace(split, follow_links=follow_links)
        assert re.search(story, refusal(split))
        with pytest.raises(DatasetError, match="instances_train.json: not one image can be used"):
            CocoDataset(split, bad_images="skip")[0]


@pytest.mark.parametrize(
    ("file", "folder", "halves"),
    [
        pytest.param("annotations/instances_{}2017.json", "{}2017", ("train", "val"), id="coco-2017"),
        pytest.param("annotations/instances_{}.json", "{}", ("train", "val"), id="coco"),
        pytest.param("{}/_annotations.coco.json", "{}", ("train", "valid"), id="roboflow"),
        pytest.param("annotation_{}.odgt", "Images", ("train", "val"), id="crowdhuman"),
        pytest.param("ImageSets/Main/{}.txt", "JPEGImages", ("trainval", "test"), id="voc-2007"),
        pytest.param("ImageSets/Main/{}.txt", "JPEGImages", ("train", "val"), id="voc-2012"),
    ],
)
def test_layout_is_found(tmp_path, file, folder, halves):
    """With both halves, beside a half of another layout that would come first, and with each half alone."""
    paths = [tmp_path / file.format(half) for half in halves]
    for path in (*paths, tmp_path / "annotations" / "instances_train2017.json"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    splits = find_splits(str(tmp_path))
    assert [split.name for split in splits] == ["train", "val"]
    assert [split.annotations for split in splits] == paths
    assert [split.images for split in splits] == [tmp_path / folder.format(half) for half in halves]
    (tmp_path / "annotations" / "instances_train2017.json").unlink()
    for half in (0, 1):
        paths[half].unlink(missing_ok=True)
        assert [split and split.annotations for split in find_splits(str(tmp_path))] == [
            None if i == half else path for i, path in enumerate(paths)
        ]
        paths[half].touch()


def test_missing_set_says_where_and_how(tmp_path, monkeypatch):
    monkeypatch.setenv("OTA_DATA", str(tmp_path))
    zips = ["{}/coco", "train2017.zip", "val2017.zip", "annotations_trainval2017.zip"]
    files = ["{}/crowdhuman/Images", "CrowdHuman_train03.zip", "annotation_val.odgt", "crowdhuman.org"]
    for name, parts in (("coco", zips), ("crowdhuman", files)):
        with pytest.raises(DatasetError) as error:
            find_splits(name)
        assert all(part.format(tmp_path) in str(error.value) for part in parts)


@pytest.mark.parametrize(
    ("files", "data", "story"),
    [
        pytest.param({"data.yaml": "train: ../images\nnames: ['a']"}, ".", "form of YOLO, which is not", id="yolo"),
        pytest.param({"data.yaml": "names:\n  0: a"}, "data.yaml", "form of YOLO", id="yolo-yaml"),
        pytest.param({"images/a.jpg": "", "labels/a.txt": "0 .5 .5 .1 .1"}, ".", "form of YOLO", id="yolo-labels"),
        pytest.param({"train/labels/a.txt": "", "train/images/a.jpg": ""}, ".", "form of YOLO", id="yolo-halves"),
        pytest.param({"a.json": "{}"}, "a.json", "a.json is a file; --data takes the folder of a data", id="json"),
        pytest.param({"annotations/instances_val.json": ""}, "annotations/instances_val.json",
                     r"is a file; --data takes the folder of a data set, here \S+, with", id="json-in-a-set"),
        pytest.param({"a.yaml": "x: 1"}, ".", r"has none of(.|\n)*2017.json(.|\n)*_annotations", id="other-yaml"),
        pytest.param({}, "x" * 3000, "does not exist", id="long-name"),
    ],
)  # fmt: skip
def test_data_of_another_form_is_named(tmp_path, files, data, story):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=story):
        find_splits(str(tmp_path / data))


def test_shapes_are_generated_once(tmp_path, monkeypatch):
    monkeypatch.setenv("OTA_DATA", str(tmp_path / "home"))
    small = partial(generate_shapes, train_images=2, val_images=1)
    monkeypatch.setattr(data.layouts, "generate_shapes", small)
    train, val = find_splits("shapes")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "home").rglob("*")}
    assert find_splits("shapes") == (train, val) and val is not None
    small(train.annotations.parents[1], seed=5)  # as a second process that came too late
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [path.name for path in (tmp_path / "home").iterdir()] == [data.shapes.shapes_folder()]
