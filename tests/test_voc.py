"""Pascal VOC's form: coordinates from 1, lists and names, encodings, every mistake named."""

import re

import pytest

from tests.support.sets import dataset_of, grey, refusal, scene, write_voc

CAT = ("cat", 3, 3, 12, 12, 0)


def test_corners_are_inclusive_and_start_at_1(tmp_path):
    write_voc(tmp_path, {"a": scene("a", ("cat", 1, 1, 40, 30, 0), ("cat", 5, 6, 5, 6, 0))}, train=["a"])
    assert dataset_of(tmp_path)[0][1]["boxes"].tolist() == [[0, 0, 40, 30], [4, 5, 5, 6]]


def test_classes_are_those_of_all_lists(tmp_path):
    """In alphabetical order, the same for both halves; a difficult object counts, an XML in no list does not."""
    kinds = {"a": ("zebra", 0), "b": ("ant", 1), "c": ("moth", 0)}
    scenes = {name: scene(name, (kind, 3, 3, 12, 12, difficult)) for name, (kind, difficult) in kinds.items()}
    write_voc(tmp_path, scenes, train=["a"], val=["b"])
    train, val = dataset_of(tmp_path, 0), dataset_of(tmp_path, 1)
    assert train.class_names == val.class_names == ["ant", "zebra"] and train[0][1]["labels"].tolist() == [1]


@pytest.mark.parametrize(
    ("names", "text", "ids"),
    [
        pytest.param(["my pic", "my  pic 1"], "my pic  1\r\nmy  pic 1 -1\r\n", [1, 2], id="spaces-and-flags"),
        pytest.param(["é", "图"], "\ufeffé\n\n图\n\n", [1, 3], id="bom-and-blank-lines"),
        pytest.param(["a", "b", "c"], "a.jpg\nb.XML 0\nc.png\n", [1, 2, 3], id="extensions"),
        pytest.param(["a", "b"], "a\nb\na.jpg\na  1\n", [1, 2], id="twice"),
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
    names = {"gb2312": "汽車镕", "euc-jp": "猫", "utf-16": "猫2"}
    write_voc(tmp_path, dict.fromkeys(names, ""), train=names)
    for encoding, name in names.items():
        xml = f'<?xml version="1.0" encoding="{encoding}"?>' + scene(encoding, (name, 3, 3, 12, 12, 0))
        path = tmp_path / "Annotations" / f"{encoding}.xml"
        path.write_bytes(xml.encode("gbk" if encoding == "gb2312" else encoding))
    assert dataset_of(tmp_path).class_names == sorted(names.values())


GOOD = scene("bad", CAT)
LAUGHS = "".join(f"<!ENTITY a{i + 1} '{f'&a{i};' * 10}'>" for i in range(9))
REFUSED = {
    "number": (GOOD.replace("<xmax>12", "<xmax>wide"), "<bndbox/xmax> of <object> is 'wide', not a number"),
    "side": (GOOD.replace("<ymax>12</ymax>", ""), "<object> has no <bndbox/ymax>"),
    "difficult": (GOOD.replace("<difficult>0", "<difficult>yes"), "difficult is 'yes', not 0 or 1"),
    "file": (GOOD.replace("<filename>bad.jpg</filename>", ""), "<annotation> has no <filename>"),
    "encoding": ('<?xml version="1.0" encoding="nonsense"?>' + GOOD, "encoding 'nonsense' is unknown or"),
    "billion-laughs": (f"<!DOCTYPE a [<!ENTITY a0 'x'>{LAUGHS}]><b>&a9;</b>", "amplification"),
    "outside-entity": ("<!DOCTYPE a [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><b>&e;</b>", "undefined entity"),
}


def test_bad_annotation_files_are_named(tmp_path):
    """One by one, and a missing one with the name that is nearly its own."""
    write_voc(tmp_path, {"good": scene("good", CAT)}, train=["good", "bad"])
    xml = tmp_path / "Annotations" / "bad.xml"
    for content, story in REFUSED.values():
        xml.write_text(content)
        said = refusal(tmp_path)
        assert "train.txt: 1 problem(s)" in said and f"{xml} (train.txt): " in said and story in said
    xml.rename(xml.with_name("BAD.xml"))
    said = refusal(tmp_path)
    assert f"{xml} (train.txt): [Errno 2] No such file" in said
    assert "would be found with upper and lower case changed: BAD.xml for bad.xml" in said


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
    said = refusal(root, follow_links=line != "link")
    assert re.search(rf"1 problem(.|\n)*{line}.xml' leaves the folder {root}/Annotations", said)
    assert ("--follow-links" in said) == (line == "link") and "secret" not in said
