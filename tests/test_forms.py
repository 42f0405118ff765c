"""The contract of the three annotation forms; how a data set is found; what is said where none is."""

import shutil
from dataclasses import replace
from functools import partial

import pytest

import data.layouts
from data import CocoDataset, DatasetError, collate, find_splits, generate_shapes
from data.files import path_inside
from eval import coco_metrics
from tests.support.sets import dataset_of, grey, write_coco, write_crowdhuman, write_scenes, write_voc

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
    found = [
        {"image_id": 1, "category_id": dataset.category_ids[0], "bbox": b} for b in ([5, 5, 8, 6], [30, 20, 10, 10])
    ]
    scored = [box | {"score": score} for box, score in zip(found, (0.9, 0.8), strict=True)]
    assert coco_metrics(truth, scored)["AP"] == pytest.approx(1)


@each_form
@pytest.mark.parametrize(
    ("fault", "story"),
    [
        ("missing", r"image files missing in {folder}: 1\n    \S+ 2 \(b.jpg\)$"),
        ("broken", r"image files that cannot be read: 1\n    \S+ 2 \(b.jpg\): cannot identify"),
        ("case", r"1 of the 1 missing files would be found with upper and lower case changed: B.jpg for b.jpg"),
        ("link", r"names that leave the image folder: 1\n    \S+ 2 \(b.jpg\): .*--follow-links reads it"),
    ],
    ids=lambda value: value if "\\" not in value and " " not in value else "",
)
def test_bad_image_file_is_named_with_its_record(tmp_path, form, fault, story):
    split = write_scenes(tmp_path / "set", form, {"a": [([1, 1, 9, 9], False)], "b": []})
    image = split.images / "b.jpg"
    content = image.read_bytes()
    image.unlink()
    if fault == "broken":
        image.write_bytes(b"no picture")
    elif fault == "case":
        image.with_name("B.jpg").write_bytes(content)
    elif fault == "link":
        (tmp_path / "blob").write_bytes(content)
        image.symlink_to(tmp_path / "blob")
    with pytest.raises(DatasetError, match="(?m)" + story.format(folder=split.images)) as error:
        CocoDataset(split)
    assert f"{split.annotations}: 1 problem(s)" in str(error.value)
    if fault == "link":
        assert dataset_of(tmp_path / "set", follow_links=True)[1][0].shape == (3, 30, 40)
        strict = CocoDataset(replace(split, follow_links=True))
        strict.split = split  # each image is looked at again when it is loaded
        with pytest.raises(DatasetError, match="--follow-links reads it"):
            strict[1]


@pytest.mark.parametrize("form", ["coco", "voc"])
def test_size_that_disagrees_with_the_image_is_named(tmp_path, form):
    """CrowdHuman records no sizes."""
    split = write_scenes(tmp_path, form, {"a": [([1, 1, 9, 9], False)], "b": []}, size=(41, 30))
    for name in "ab":
        grey(split.images / f"{name}.jpg", (41 if name == "b" else 40, 30))
    with pytest.raises(DatasetError, match=r"image 1 \(a.jpg\): 41 x 30 in the record, 40 x 30 in the file"):
        CocoDataset(split)


@each_form
@pytest.mark.parametrize("escape", ["parent", "absolute"])
def test_name_that_leaves_the_folder_is_refused(tmp_path, form, escape):
    """Also where the file is there, and links are followed."""
    name = {"parent": "../secret", "absolute": str(tmp_path / "set" / "secret")}[escape]
    grey(tmp_path / "set" / "secret.jpg")
    if form == "voc":
        split = write_scenes(tmp_path / "set", form, {"a": [([1, 1, 9, 9], False)]})
        xml = tmp_path / "set" / "Annotations" / "a.xml"
        xml.write_text(xml.read_text().replace("a.jpg", f"{name}.jpg"))
        (split.images / "a.jpg").unlink()
    else:
        split = write_scenes(tmp_path / "set", form, {name: []})
    for follow_links in (False, True):
        with pytest.raises(DatasetError, match=r"names that leave the image folder: 1\n.*secret.jpg"):
            CocoDataset(replace(split, follow_links=follow_links))
    with pytest.raises(DatasetError, match="leaves the folder"):
        path_inside(split.images, f"{name}.jpg", follow_links=True)


@each_form
@pytest.mark.parametrize(
    ("change", "story"),
    [
        (lambda content: b"\0" * len(content), r"cannot be read|the file is empty: \d+ bytes"),
        (lambda content: content[: len(content) // 2], r"not valid JSON at line 1, column \d+|no element found"),
        (lambda content: content.replace(b"a", b"\xe9", 1), "not text in UTF-8: byte 0xe9 in line 1|not well-formed"),
    ],
    ids=["nul", "cut", "no-text"],
)
def test_file_that_a_crash_or_a_wrong_encoding_left(tmp_path, form, change, story):
    split = write_scenes(tmp_path, form, {"a": [([1, 1, 9, 9], False)]})
    path = tmp_path / "Annotations" / "a.xml" if form == "voc" else split.annotations
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DatasetError, match=story) as error:
        CocoDataset(split)
    assert str(path) in str(error.value)


@each_form
def test_digest_is_that_of_all_annotation_files(tmp_path, form):
    split = write_scenes(tmp_path, form, {"a": [([1, 1, 9, 9], False)]})
    before = CocoDataset(split).digest
    assert len(before) == 64 and CocoDataset(split).digest == before
    path = tmp_path / "Annotations" / "a.xml" if form == "voc" else split.annotations
    path.write_text(path.read_text() + "\n")
    assert CocoDataset(split).digest != before


@each_form
def test_missing_image_folder_is_named(tmp_path, form):
    split = write_scenes(tmp_path, form, {"a": []})
    shutil.rmtree(split.images)
    with pytest.raises(DatasetError, match=f"{split.annotations} is there, but its image folder {split.images} is not"):
        CocoDataset(split)


def test_linked_image_folder_is_the_folder(tmp_path):
    split = write_coco(tmp_path / "set")
    split.images.rename(tmp_path / "elsewhere")
    split.images.symlink_to(tmp_path / "elsewhere")
    assert CocoDataset(split)[0][0].shape == (3, 30, 40)


@pytest.mark.parametrize("follow", [False, True], ids=["refused", "followed"])
@pytest.mark.parametrize(
    ("target", "story"),
    [("gone", r"is a link to \S+/gone, which is not there"), ("a.jpg", r"a\.jpg.*[Ss]ymbolic link")],
)
def test_link_to_nothing_is_named(tmp_path, target, story, follow):
    split = replace(write_coco(tmp_path, pixels=False), follow_links=follow)
    (split.images / "a.jpg").symlink_to(target)
    with pytest.raises(DatasetError, match=story):
        CocoDataset(split)
    with pytest.raises(DatasetError, match="not one image can be used"):
        CocoDataset(split, bad_images="skip")[0]


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        pytest.param({"annotations/instances_{}2017.json": "{}2017"}, ("train", "val"), id="coco-2017"),
        pytest.param({"annotations/instances_{}.json": "{}"}, ("train", "val"), id="coco"),
        pytest.param({"{}/_annotations.coco.json": "{}"}, ("train", "valid"), id="roboflow"),
        pytest.param({"annotation_{}.odgt": "Images"}, ("train", "val"), id="crowdhuman"),
        pytest.param({"ImageSets/Main/{}.txt": "JPEGImages"}, ("trainval", "test"), id="voc-2007"),
        pytest.param({"ImageSets/Main/{}.txt": "JPEGImages"}, ("train", "val"), id="voc-2012"),
    ],
)
def test_layout_is_found(tmp_path, files, wanted):
    """With both halves, then with each one alone."""
    ((pattern, folder),) = files.items()
    paths = [tmp_path / pattern.format(half) for half in wanted]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    splits = find_splits(str(tmp_path))
    assert [split.name for split in splits] == ["train", "val"]
    assert [split.annotations for split in splits] == paths
    assert [split.images for split in splits] == [tmp_path / folder.format(half) for half in wanted]
    for half in (0, 1):
        paths[half].unlink()
        assert [split is None for split in find_splits(str(tmp_path))] == [half == 0, half == 1]
        paths[half].touch()


def test_layout_with_both_halves_comes_before_one_with_a_half(tmp_path):
    write_voc(tmp_path, {}, train=[], val=[], trainval=[])
    write_crowdhuman(tmp_path, [])
    assert [split.annotations.name for split in find_splits(str(tmp_path))] == ["train.txt", "val.txt"]


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("coco", ["{root}/coco", "train2017.zip", "val2017.zip", "annotations_trainval2017.zip"]),
        ("crowdhuman", ["{root}/crowdhuman/Images", "CrowdHuman_train03.zip", "annotation_val.odgt", "crowdhuman.org"]),
        ("{root}/absent", ["{root}/absent does not exist", "instances_train2017.json", "_annotations.coco.json"]),
    ],
    ids=["coco", "crowdhuman", "folder"],
)
def test_missing_set_says_where_and_how(tmp_path, monkeypatch, data, parts):
    monkeypatch.setenv("OTA_DATA", str(tmp_path))
    with pytest.raises(DatasetError) as error:
        find_splits(data.format(root=tmp_path))
    assert [part for part in parts if part.format(root=tmp_path) not in str(error.value)] == []


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
        pytest.param({"a.yaml": "x: 1"}, ".", "has none of", id="other-yaml"),
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
