"""Pascal VOC's form: the same scenes in it and in COCO layout, difficult objects, every mistake named."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import eval as eval_script
import train
from data import CocoDataset, DatasetError, find_splits, generate_shapes
from eval import coco_metrics
from tests.test_train import TINY

OBJECT = """<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def scene(name: str, *objects: tuple, size: tuple[int, int] = (40, 30)) -> str:
    """The XML of an image with objects of (class, xmin, ymin, xmax, ymax, difficult or not)."""
    parts = [OBJECT.format(*corners, name=kind, difficult=difficult) for kind, *corners, difficult in objects]
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{''.join(parts)}</annotation>"


def write_voc(
    root: Path, scenes: dict[str, str], pixels: tuple[int, int] | None = (40, 30), **lists: list[str]
) -> Path:
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, xml in scenes.items():
        (root / "Annotations" / f"{name}.xml").write_text(xml)
        if pixels:
            Image.new("RGB", pixels, "grey").save(root / "JPEGImages" / f"{name}.jpg")
    for name, images in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{image}\n" for image in images))
    return root


def from_shapes(shapes: Path, root: Path) -> Path:
    """A generated set in VOC's form, boxes rounded to whole pixels in both."""
    for half in ("train", "val"):
        path = shapes / "annotations" / f"instances_{half}.json"
        content, scenes = json.loads(path.read_text()), {}
        names = {c["id"]: c["name"] for c in content["categories"]}
        for record in content["annotations"]:
            record["bbox"] = [round(v) for v in record["bbox"]]
        for image in content["images"]:
            boxes = [
                (names[a["category_id"]], *a["bbox"]) for a in content["annotations"] if a["image_id"] == image["id"]
            ]
            objects = [(name, x + 1, y + 1, x + w, y + h, 0) for name, x, y, w, h in boxes]
            name = f"{half}_{image['id']:06d}"
            scenes[name] = scene(name, *objects, size=(image["width"], image["height"]))
            (root / "JPEGImages").mkdir(parents=True, exist_ok=True)
            shutil.copy(shapes / half / image["file_name"], root / "JPEGImages" / f"{name}.jpg")
        write_voc(root, scenes, pixels=None, **{half: list(scenes)})
        path.write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def both_forms(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("sets")
    generate_shapes(root / "shapes", train_images=16, val_images=8, size_px=96)
    return root / "shapes", from_shapes(root / "shapes", root / "voc")


@pytest.mark.parametrize("half", [0, 1], ids=["train", "val"])
def test_same_scenes_as_in_coco_layout(both_forms, half):
    coco, voc = (CocoDataset(find_splits(str(root))[half]) for root in both_forms)
    assert voc.class_names == sorted(coco.class_names) and voc.category_ids == [1, 2, 3, 4, 5]
    assert len(voc) == len(coco) and voc.num_boxes == coco.num_boxes > 10
    for (image, target), (other, expected) in zip(voc, coco, strict=True):
        assert (image == other).all() and (target["boxes"] == expected["boxes"]).all()
        names = [[data.class_names[c] for c in t["labels"]] for data, t in ((voc, target), (coco, expected))]
        assert names[0] == names[1] and target["image_id"] == expected["image_id"]


def test_corners_are_inclusive_and_start_at_1(tmp_path):
    write_voc(tmp_path, {"a": scene("a", ("cat", 1, 1, 40, 30, 0), ("cat", 5, 6, 5, 6, 0))}, val=["a"])
    dataset = CocoDataset(find_splits(str(tmp_path))[1])
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 40, 30], [4, 5, 5, 6]]
    assert [a["bbox"] for a in dataset.annotations["annotations"]] == [[0, 0, 40, 30], [4, 5, 1, 1]]


def test_difficult_objects_are_regions_to_ignore(tmp_path):
    """No target and no negative in training, neither found nor false in evaluation; their class counts as one."""
    objects = [("dog", 3, 3, 12, 12, 0), ("cat", 21, 3, 30, 12, 1)]
    write_voc(tmp_path, {"a": scene("a", *objects)}, train=["a"], val=["a"])
    dataset = CocoDataset(find_splits(str(tmp_path))[1])
    assert dataset.class_names == ["cat", "dog"] and (dataset.num_boxes, dataset.crowd_boxes) == (1, 1)
    target = dataset[0][1]
    assert target["boxes"].tolist() == [[2, 2, 12, 12]] and target["ignore"].tolist() == [[20, 2, 30, 12]]
    box = {"image_id": 1, "category_id": 1, "bbox": [20, 2, 10, 10], "score": 0.9}
    found = [box, box | {"category_id": 2, "bbox": [2, 2, 10, 10], "score": 0.8}]
    assert coco_metrics(dataset.annotations, found)["AP"] == pytest.approx(1)


def test_classes_are_those_of_all_lists(tmp_path):
    names = {"a": "zebra", "b": "ant", "c": "moth"}
    scenes = {name: scene(name, (kind, 3, 3, 12, 12, 0)) for name, kind in names.items()}
    write_voc(tmp_path, scenes, train=["a"], val=["b"])
    train, val = (CocoDataset(split) for split in find_splits(str(tmp_path)))
    assert train.class_names == val.class_names == ["ant", "zebra"]
    assert (train[0][1]["labels"].tolist(), val[0][1]["labels"].tolist()) == ([1], [0])


@pytest.mark.parametrize(
    "lists, wanted",
    [
        (["train", "val", "trainval", "test"], ["trainval", "test"]),
        (["train", "val", "trainval"], ["train", "val"]),
        (["trainval"], ["trainval", None]),
        (["test"], [None, "test"]),
    ],
    ids=["voc2007", "voc2012", "trainval-alone", "test-alone"],
)
def test_lists_that_are_taken(tmp_path, lists, wanted):
    write_voc(tmp_path, {"a": scene("a")}, **{name: ["a"] for name in lists})
    assert [split and split.annotations.stem for split in find_splits(str(tmp_path))] == wanted


def test_every_bad_file_is_named(tmp_path):
    good = scene("good", ("cat", 3, 3, 12, 12, 0))
    scenes = {
        "cut": good[:100],
        "number": good.replace("<xmax>12", "<xmax>wide"),
        "side": good.replace("<ymax>12</ymax>", ""),
        "class": good.replace("<name>cat</name>", ""),
        "hard": good.replace("<difficult>0", "<difficult>yes"),
        "size": good.replace("<width>40", "<width>inf"),
        "file": good.replace("<filename>good.jpg</filename>", ""),
    }
    expected = {
        "cut": "unclosed token", "number": "<bndbox/xmax> of <object> is 'wide', not a number",
        "side": "<object> has no <bndbox/ymax>", "class": "<object> has no <name>", "missing": "No such file",
        "hard": "difficult is 'yes', not 0 or 1", "size": "<size/width> of <annotation> is 'inf', not a number",
        "file": "<annotation> has no <filename>",
    }  # fmt: skip
    for name, reason in expected.items():
        root = tmp_path / name
        write_voc(root, {"good": good, **({name: scenes[name]} if name in scenes else {})}, train=["good", name])
        with pytest.raises(DatasetError) as error:
            CocoDataset(find_splits(str(root))[0])
        assert str(root / "Annotations" / f"{name}.xml") in str(error.value) and reason in str(error.value), name
        assert "1 problem" in str(error.value) and "train.txt" in str(error.value)


def test_image_that_is_not_as_its_file_says(tmp_path):
    wrong = scene("a", size=(41, 30)), scene("b").replace("b.jpg", "c.jpg"), scene("d", ("cat", 3, 3, 60, 12, 0))
    write_voc(tmp_path, dict(zip("abd", wrong, strict=True)), train=["a", "b", "d"])
    (tmp_path / "JPEGImages" / "b.jpg").unlink()
    with pytest.raises(DatasetError) as error:
        CocoDataset(find_splits(str(tmp_path))[0])
    said = str(error.value)
    assert "image 1 (a.jpg): 41 x 30 in the record, 40 x 30 in the file" in said
    assert "image 2 (c.jpg)" in said and "annotation 1, image 3 (d.jpg): [2.0, 2.0, 58.0, 10.0] in 40 x 30" in said


def test_lines_with_more_than_a_name(tmp_path):
    """Lists of one class have a second column, and some end with blank lines."""
    write_voc(tmp_path, {"a": scene("a", ("cat", 1, 1, 9, 9, 0))}, train=["", "a  1", ""])
    assert [image["id"] for image in CocoDataset(find_splits(str(tmp_path))[0]).images] == [2]


@pytest.mark.parametrize(
    "names, text, ids",
    [
        pytest.param(["my pic 1", "my pic 2"], "my pic 1\nmy pic 2\n", [1, 2], id="spaces"),
        pytest.param(["my pic", "my  pic 1"], "my pic  1\r\nmy  pic 1 -1\r\n", [1, 2], id="spaces-and-flags"),
        pytest.param(["a", "b"], "\ufeffa\n\nb\n", [1, 3], id="bom-and-blank-line"),
        pytest.param(["a", "b", "c"], "a.jpg\nb.XML 0\nc.png\n", [1, 2, 3], id="extensions"),
        pytest.param(["a.jpg"], "a.jpg\n", [1], id="extension-of-the-name"),
        pytest.param(["a", "b"], "a\nb\na.jpg\na  1\n", [1, 2], id="twice"),
        pytest.param(["é", "图"], "é\n图\n", [1, 2], id="utf-8"),
    ],
)
def test_lines_of_a_list(tmp_path, names, text, ids):
    write_voc(tmp_path, {name: scene(name) for name in names}, train=[])
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(text.encode())
    images = write_one_class(tmp_path).images
    assert [(image["id"], image["file_name"]) for image in images] == [
        (number, f"{name}.jpg") for number, name in zip(ids, names, strict=True)
    ]


def write_one_class(root: Path) -> CocoDataset:
    """The training part, after an object in a further list has given it a class."""
    write_voc(root, {"class": scene("class", ("cat", 3, 3, 12, 12, 0))}, val=["class"])
    return CocoDataset(find_splits(str(root))[0])


@pytest.mark.parametrize(
    "file_name, on_disk, wanted",
    [
        pytest.param("a", "a.jpg", "a.jpg", id="no-extension"),
        pytest.param("old.jpg", "a.png", "a.png", id="stale"),
        pytest.param("../images/a.jpg", "a.JPG", "a.JPG", id="path"),
        pytest.param("/home/me/a.jpg", "a.jpeg", "a.jpeg", id="absolute"),
        pytest.param("b.jpg", "b.jpg", "b.jpg", id="as-it-says"),
    ],
)
def test_image_is_the_filename_or_called_like_the_line(tmp_path, file_name, on_disk, wanted):
    write_voc(tmp_path, {"a": scene("a").replace("a.jpg", file_name)}, pixels=None, train=["a"])
    Image.new("RGB", (40, 30)).save(tmp_path / "JPEGImages" / on_disk)
    assert write_one_class(tmp_path).images[0]["file_name"] == wanted


@pytest.mark.parametrize("line", ["../../outside", "/outside", "link"])
def test_annotations_outside_the_set_are_not_read(tmp_path, line):
    root, outside = tmp_path / "set", tmp_path / "outside.xml"
    outside.write_text(scene("a", ("secret", 3, 3, 12, 12, 0)))
    line = str(outside.with_suffix("")) if line == "/outside" else line
    write_voc(root, {"a": scene("a", ("cat", 3, 3, 12, 12, 0))}, train=["a", line])
    if line == "link":
        (root / "Annotations" / "link.xml").symlink_to(outside)
    Image.new("RGB", (40, 30)).save(root / "JPEGImages" / "link.jpg")
    for follow_links in (False, True):
        split, _ = find_splits(str(root), follow_links=follow_links)
        if follow_links and line == "link":
            outside.write_text(scene("link", ("dog", 3, 3, 12, 12, 0)))
            assert CocoDataset(split).class_names == ["cat", "dog"]
            continue
        with pytest.raises(DatasetError, match=rf"1 problem(.|\n)*{line}.xml' leaves the folder {root}/Anno") as error:
            CocoDataset(split)
        assert ("--follow-links" in str(error.value)) == (line == "link") and "secret" not in str(error.value)


def test_annotation_file_in_other_case_is_found(tmp_path):
    write_voc(tmp_path, {"A": scene("A")}, train=["a"])
    with pytest.raises(DatasetError, match="1 of the 1 missing files would be found with upper.*: A.xml for a.xml"):
        CocoDataset(find_splits(str(tmp_path))[0])


@pytest.mark.parametrize("declared, used", [("GB2312", "gbk"), ("gbk", "gbk"), ("big5", "big5"), ("EUC-JP", "euc_jp"),
                                            ("UTF-16", "utf-16"), ("windows-1251", "windows-1251")])  # fmt: skip
def test_encodings_of_annotation_files(tmp_path, declared, used):
    name = {"gbk": "汽車镕", "big5": "汽車", "windows-1251": "кот"}.get(used, "猫")
    xml = f'<?xml version="1.0" encoding="{declared}"?>' + scene("a", (name, 3, 3, 12, 12, 0))
    write_voc(tmp_path, {"a": ""}, train=["a"])
    (tmp_path / "Annotations" / "a.xml").write_bytes(xml.encode(used))
    assert CocoDataset(find_splits(str(tmp_path))[0]).class_names == [name]


LAUGHS = "".join(f"<!ENTITY a{i + 1} '{f'&a{i};' * 10}'>" for i in range(9))
LAUGHS = f"<!DOCTYPE a [<!ENTITY a0 'x'>{LAUGHS}]><b>&a9;</b>"


@pytest.mark.parametrize(
    "head, story",
    [
        pytest.param('<?xml version="1.0" encoding="nonsense"?>', "encoding 'nonsense' is unknown or", id="unknown"),
        pytest.param('<?xml version="1.0" encoding="base64"?>', "encoding 'base64' is unknown or", id="no-text"),
        pytest.param('<?xml version="1.0" encoding="euc-jp"?><!--\xff-->', "'euc-jp' is unknown or not", id="wrong"),
        pytest.param(LAUGHS, "amplification", id="billion-laughs"),
        pytest.param('<?xml version="1.0" encoding="gbk"?>' + LAUGHS, "amplification", id="billion-laughs-in-gbk"),
        pytest.param("<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><b>&e;</b>", "undefined entity", id="file"),
    ],
)  # fmt: skip
def test_annotation_files_that_expat_refuses_are_named(tmp_path, head, story):
    write_voc(tmp_path, {"a": ""}, train=["a"])
    xml = tmp_path / "Annotations" / "a.xml"
    xml.write_bytes((head + scene("a") * ("DOCTYPE" not in head)).encode("latin-1"))
    with pytest.raises(DatasetError, match=rf"{xml} \(train.txt\): .*({story})"):
        CocoDataset(find_splits(str(tmp_path))[0])


@pytest.mark.parametrize(
    "text, ignored",
    [("", 0), ("0", 0), ("0.0", 0), ("false", 0), ("Unspecified", 0), (" 1 ", 1), ("1.0", 1), ("True", 1)],
    ids=["empty", "0", "0.0", "false", "unspecified", "1", "1.0", "true"],
)
def test_forms_of_difficult(tmp_path, text, ignored):
    write_voc(tmp_path, {"a": scene("a", ("cat", 3, 3, 12, 12, text))}, train=["a"])
    dataset = CocoDataset(find_splits(str(tmp_path))[0])
    assert (dataset.crowd_boxes, dataset.num_boxes) == (ignored, 1 - ignored)


def test_flag_to_follow_links(both_forms, tmp_path, call):
    """For training, going on and evaluation; a weights file cannot choose it."""
    data, out = tmp_path / "voc", tmp_path / "out"
    shutil.copytree(both_forms[1], data)
    files = ("JPEGImages/train_000001.jpg", "Annotations/val_000001.xml", "JPEGImages/val_000001.jpg")
    for file in files:
        (data / file).rename(tmp_path / Path(file).name)
        (data / file).symlink_to(tmp_path / Path(file).name)
    flags = ["--data", data, *TINY, "--image-size", 96, "--batch-size", 4, "--steps", 1, "--out", out]
    with pytest.raises(DatasetError, match="--follow-links"):
        call(train, *flags)
    call(train, *flags, "--follow-links")
    evaluation = ["--weights", out / "ota.safetensors", *TINY[-4:], "--out", tmp_path / "again"]
    with pytest.raises(DatasetError, match="val_000001.xml' leaves the folder .*--follow-links"):
        call(eval_script, *evaluation)
    call(eval_script, *evaluation, "--follow-links")
    for file in files:
        shutil.move(tmp_path / Path(file).name, data / file)
    assert "is complete" in call(train, *flags)


def test_training_and_evaluation(both_forms, tmp_path, call):
    """A few steps; the run goes on where it was, but not with another annotation."""
    out, data = tmp_path / "out", tmp_path / "voc"
    shutil.copytree(both_forms[1], data)
    flags = ["--data", data, *TINY, "--image-size", 96, "--batch-size", 4, "--steps", 8, "--out", out]
    said = call(train, *flags)
    said += call(eval_script, "--weights", out / "ota.safetensors", *TINY[-4:], "--out", tmp_path / "again")
    metrics = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert metrics["images"] == 8 and metrics["data"] == str(data / "ImageSets" / "Main" / "val.txt")
    assert "crowd_AP" not in metrics and "CrowdHuman" not in said and "triangle" in said
    call(train, *flags)  # is complete
    xml = data / "Annotations" / "train_000001.xml"
    xml.write_text(xml.read_text() + "\n")
    with pytest.raises(Exception, match=r"annotation file \(SHA-256\)"):
        call(train, *flags)
