"""Pascal VOC's form: coordinates from 1, difficult objects, lists and names, encodings, every mistake named."""

import re
import shutil
from pathlib import Path

import pytest

import eval as eval_script
import train
from data import DatasetError
from tests.support.sets import dataset_of, grey, refusal, scene, write_scenes, write_voc
from tests.test_train import TINY

CAT = ("cat", 3, 3, 12, 12, 0)


def test_corners_are_inclusive_and_start_at_1(tmp_path):
    write_voc(tmp_path, {"a": scene("a", ("cat", 1, 1, 40, 30, 0), ("cat", 5, 6, 5, 6, 0))}, val=["a"])
    dataset = dataset_of(tmp_path, 1)
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 40, 30], [4, 5, 5, 6]]
    assert [a["bbox"] for a in dataset.annotations["annotations"]] == [[0, 0, 40, 30], [4, 5, 1, 1]]


def test_forms_of_difficult(tmp_path):
    texts = {"": 0, "0": 0, "0.0": 0, "false": 0, "Unspecified": 0, " 1 ": 1, "1.0": 1, "True": 1}
    write_voc(tmp_path, {"a": scene("a", *(("cat", 3, 3, 12, 12, text) for text in texts))}, train=["a"])
    assert [a["iscrowd"] for a in dataset_of(tmp_path).annotations["annotations"]] == list(texts.values())


def test_classes_are_those_of_all_lists(tmp_path):
    """In alphabetical order, the same for both halves; a difficult object counts, an XML in no list does not."""
    kinds = {"a": ("zebra", 0), "b": ("ant", 1), "c": ("moth", 0)}
    scenes = {name: scene(name, (kind, 3, 3, 12, 12, difficult)) for name, (kind, difficult) in kinds.items()}
    write_voc(tmp_path, scenes, train=["a"], val=["b"])
    train, val = dataset_of(tmp_path, 0), dataset_of(tmp_path, 1)
    assert train.class_names == val.class_names == ["ant", "zebra"]
    assert train.category_ids == [1, 2] and train[0][1]["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("names", "text", "ids"),
    [
        pytest.param(["my pic 1", "my pic 2"], "my pic 1\nmy pic 2\n", [1, 2], id="spaces"),
        pytest.param(["my pic", "my  pic 1"], "my pic  1\r\nmy  pic 1 -1\r\n", [1, 2], id="spaces-and-flags"),
        pytest.param(["a", "b"], "\ufeffa\n\nb\n\n", [1, 3], id="bom-and-blank-lines"),
        pytest.param(["a", "b", "c"], "a.jpg\nb.XML 0\nc.png\n", [1, 2, 3], id="extensions"),
        pytest.param(["a.jpg"], "a.jpg\n", [1], id="extension-of-the-name"),
        pytest.param(["a", "b"], "a\nb\na.jpg\na  1\n", [1, 2], id="twice"),
        pytest.param(["é", "图"], "é\n图\n", [1, 2], id="utf-8"),
    ],
)
def test_lines_of_a_list(tmp_path, names, text, ids):
    write_voc(tmp_path, {name: scene(name) for name in names} | {"c": scene("c", CAT)}, train=[], val=["c"])
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_bytes(text.encode())
    images = [(image["id"], image["file_name"]) for image in dataset_of(tmp_path).images]
    assert images == [(number, f"{name}.jpg") for number, name in zip(ids, names, strict=True)]


def test_image_is_the_filename_or_called_like_the_line(tmp_path):
    said = {"a": "a", "b": "old.jpg", "c": "../images/c.jpg", "d": "/home/me/d.jpg", "e": "other.jpg"}
    found = ["a.jpg", "b.png", "c.JPG", "d.jpeg", "other.jpg"]
    scenes = {name: scene(name, CAT).replace(f"{name}.jpg", file_name) for name, file_name in said.items()}
    write_voc(tmp_path, scenes, None, train=said)
    for file in found:
        grey(tmp_path / "JPEGImages" / file)
    assert [image["file_name"] for image in dataset_of(tmp_path).images] == found


def test_encodings_of_annotation_files(tmp_path):
    """Files that declare GB2312 have characters of its larger relatives."""
    names = {"gb2312": "汽車镕", "big5": "汽車", "euc-jp": "猫", "utf-16": "猫2", "windows-1251": "кот"}
    write_voc(tmp_path, dict.fromkeys(names, ""), train=names)
    for encoding, name in names.items():
        xml = f'<?xml version="1.0" encoding="{encoding.upper()}"?>' + scene(encoding, (name, 3, 3, 12, 12, 0))
        content = xml.encode("gbk" if encoding == "gb2312" else encoding)
        (tmp_path / "Annotations" / f"{encoding}.xml").write_bytes(content)
    assert dataset_of(tmp_path).class_names == sorted(names.values())


GOOD = scene("bad", CAT)
LAUGHS = "".join(f"<!ENTITY a{i + 1} '{f'&a{i};' * 10}'>" for i in range(9))
LAUGHS = f"<!DOCTYPE a [<!ENTITY a0 'x'>{LAUGHS}]><b>&a9;</b>"
REFUSED = {
    "cut": (GOOD[:100], "unclosed token"),
    "number": (GOOD.replace("<xmax>12", "<xmax>wide"), "<bndbox/xmax> of <object> is 'wide', not a number"),
    "side": (GOOD.replace("<ymax>12</ymax>", ""), "<object> has no <bndbox/ymax>"),
    "class": (GOOD.replace("<name>cat</name>", ""), "<object> has no <name>"),
    "difficult": (GOOD.replace("<difficult>0", "<difficult>yes"), "difficult is 'yes', not 0 or 1"),
    "size": (GOOD.replace("<width>40", "<width>inf"), "<size/width> of <annotation> is 'inf', not a number"),
    "file": (GOOD.replace("<filename>bad.jpg</filename>", ""), "<annotation> has no <filename>"),
    "encoding": ('<?xml version="1.0" encoding="nonsense"?>' + GOOD, "encoding 'nonsense' is unknown or"),
    "no-text": ('<?xml version="1.0" encoding="base64"?>' + GOOD, "encoding 'base64' is unknown or"),
    "wrong": ('<?xml version="1.0" encoding="euc-jp"?><!--\xff-->' + GOOD, "'euc-jp' is unknown or not that of"),
    "billion-laughs": (LAUGHS, "amplification"),
    "billion-laughs-in-gbk": ('<?xml version="1.0" encoding="gbk"?>' + LAUGHS, "amplification"),
    "outside-entity": ("<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><b>&e;</b>", "undefined entity"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_annotation_file_is_named(tmp_path, case):
    content, story = REFUSED[case]
    write_voc(tmp_path, {"good": scene("good", CAT)}, train=["good", "bad"])
    xml = tmp_path / "Annotations" / "bad.xml"
    xml.write_bytes(content.encode("latin-1"))
    said = refusal(tmp_path)
    assert "train.txt: 1 problem(s)" in said and f"{xml} (train.txt): " in said and story in said


def test_missing_annotation_file_is_searched_for(tmp_path):
    write_voc(tmp_path, {"A": scene("A", CAT)}, train=["a", "b"])
    said = refusal(tmp_path)
    assert f"{tmp_path}/Annotations/b.xml (train.txt): [Errno 2] No such file" in said
    assert "1 of the 2 missing files would be found with upper and lower case changed: A.xml for a.xml" in said


@pytest.mark.parametrize("line", ["../../outside", "/outside", "link"])
def test_annotations_outside_the_set_are_not_read(tmp_path, line):
    root, outside = tmp_path / "set", tmp_path / "outside.xml"
    outside.write_text(scene("link", ("secret", 3, 3, 12, 12, 0)))
    line = str(outside.with_suffix("")) if line == "/outside" else line
    write_voc(root, {"a": scene("a", CAT)}, train=["a", line])
    if line == "link":
        (root / "Annotations" / "link.xml").symlink_to(outside)
        grey(root / "JPEGImages" / "link.jpg")
        assert dataset_of(root, follow_links=True).class_names == ["cat", "secret"]
    for follow_links in {False, line != "link"}:
        said = refusal(root, follow_links=follow_links)
        assert re.search(rf"1 problem(.|\n)*{line}.xml' leaves the folder {root}/Annotations", said)
        assert ("--follow-links" in said) == (line == "link") and "secret" not in said


def test_training_and_evaluation(tmp_path, call):
    """Links need --follow-links at every start, a weights file cannot choose it; another annotation is another run."""
    data, out = tmp_path / "voc", tmp_path / "out"
    for half in ("train", "val"):
        write_scenes(data, "voc", {f"{half}{i}": [([5, 5, 20, 20], False)] for i in range(4)}, half, size=(96, 96))
    files = ("JPEGImages/train1.jpg", "Annotations/val1.xml", "JPEGImages/val1.jpg")
    for file in files:
        (data / file).rename(tmp_path / Path(file).name)
        (data / file).symlink_to(tmp_path / Path(file).name)
    flags = ["--data", data, *TINY, "--image-size", 96, "--batch-size", 4, "--steps", 1, "--out", out]
    with pytest.raises(DatasetError, match="--follow-links"):
        call(train, *flags)
    said = call(train, *flags, "--follow-links")
    assert "crowd_AP" not in said and "person" in said  # the class in the table of the evaluation
    evaluation = ["--weights", out / "ota.safetensors", *TINY[-4:], "--out", tmp_path / "again"]
    with pytest.raises(DatasetError, match="val1.xml' leaves the folder .*--follow-links"):
        call(eval_script, *evaluation)
    assert str(data / "ImageSets" / "Main" / "val.txt") in call(eval_script, *evaluation, "--follow-links")
    for file in files:
        shutil.move(tmp_path / Path(file).name, data / file)
    assert "is complete" in call(train, *flags)
    xml = data / "Annotations" / "train1.xml"
    xml.write_text(xml.read_text() + "\n")
    with pytest.raises(Exception, match=r"annotation file \(SHA-256\)"):
        call(train, *flags)
