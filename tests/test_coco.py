"""Checks of a COCO file: every problem is one clear message, missing files are searched for."""

import json
import re
from dataclasses import replace

import pytest

from data import DatasetError, Split, check_annotations
from data.layouts import COCO
from tests.support.sets import box_record, grey, image_record, refusal, write_coco


def spoiled(**values) -> str:
    """Return the text of a sound annotation file, some fields of its one annotation changed."""
    categories = [{"id": 3, "name": "cat"}]
    return json.dumps({"images": [image_record()], "annotations": [box_record() | values], "categories": categories})


REFUSED = {
    "bad-json": ('{"images": [\n  1,,', r"not valid JSON at line 2, column 5.*has 18 bytes; is it whole\?"),
    "list": ("[]", "the top level is a list"),
    "number": ('{"images": [7], "annotations": [], "categories": []}', "record 0: not an object"),
    "no-keys": ("{}", "missing top-level lists: 3"),
    "deep": ("[" * 100_000, "lists or objects are nested too deeply"),
    "5000-digits": (spoiled(id=0).replace('"id": 0', '"id": ' + "9" * 5000), "a number has thousands of digits"),
    "key-twice": (spoiled(id=7).replace('"id": 7', '"id": 7, "id": 8'), r"'id' is given twice in \{"),
    "bbox-401-digits": (spoiled(bbox=[10**400, 1, 5, 5]), r"bbox is \[1000.*\.\.\..*most 64 bits"),
    "width-inf": (spoiled().replace('"width": 40', '"width": 1e400'), "width is inf, not a number of pixels"),
    "id-rounded": (spoiled(id=2.0**60), r"id is 1.15\d+e\+18, not an integer"),
    "id-true": (spoiled(image_id=True), "image_id is True, not an integer"),
    "fractions": (spoiled(bbox=[0.1, 0.2, 0.5, 0.5]), r"a pixel at most, 100% of all \(normalised, fractions of"),
    "fractions-outside": (spoiled(bbox=[-0.3, -0.2, 1.25, 1.1]), r"a pixel at most, 100% of all \(normalised"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_odd_content_is_one_clear_message(tmp_path, case):
    content, story = REFUSED[case]
    split = write_coco(tmp_path)
    split.annotations.write_text(content)
    said = refusal(split)
    assert re.search(story, said) and str(split.annotations) in said and len(said) < 1500


def test_every_problem_in_one_error(tmp_path):
    images = [image_record(1), image_record(1, "b.jpg"), image_record(2), image_record(3, "gone.jpg")]
    images += [image_record(4, "c.jpg", 10, 10), image_record(5, "d.jpg"), {"id": 6, "width": 3, "height": 3}]
    boxes = [box_record(i, (30, 0, 20, 5)) for i in range(1, 9)]
    boxes += [box_record(8), box_record(9, image_id=77), box_record(10, category_id=66), {"id": 11}]
    boxes += [box_record(12, (1, 2, 3)), box_record(13, image_id="1"), box_record(14, iscrowd=2)]
    boxes += [box_record(15, image_id=6)]  # whose image is malformed, not unknown
    categories = [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 4}, {"id": 5, "name": "cat"}]
    split = write_coco(tmp_path, images, boxes, categories, pixels=False)
    grey(split.images / "a.jpg")
    grey(split.images / "c.jpg")
    (split.images / "d.jpg").write_bytes(b"no image")
    said = refusal(split)
    for part in (
        f"{split.annotations}: 16 problem(s)",
        "ids that occur twice in 'images': 1\n    record 1, id 1, file_name 'b.jpg'",
        "malformed records in 'images': 1\n    record 6, id 6: file_name is missing",
        "file names that occur twice: 1\n    a.jpg: images 1 and 2",
        f"image files missing in {split.images}: 1\n    image 3 (gone.jpg)",
        "image 4 (c.jpg): 10 x 10 in the record, 40 x 30 in the file",
        "image files that cannot be read: 1\n    image 5 (d.jpg)",
        "ids that occur twice in 'annotations': 1",
        "annotations of unknown images: 1\n    annotation 9, image 77",
        "annotations of unknown categories: 1\n    annotation 10, image 1 (a.jpg, 40 x 30): category_id 66",
        "malformed records in 'annotations': 4\n    record 11, id 11: image_id is missing",
        "bbox is [1, 2, 3], not four numbers",
        "image_id is '1', not an integer",
        "iscrowd is 2, not 0 or 1",
        "ids that occur twice in 'categories': 1",
        "malformed records in 'categories': 1\n    record 2, id 4: name is missing",
        "category names that occur twice: 1\n    'cat'",
    ):
        assert part in said
    assert "annotations of unknown categories" in refusal(split, bad_images="skip")  # which excuses images alone
    said = refusal(replace(split, strict=True))
    assert f"{split.annotations}: 35 problem(s)" in said
    assert "clipped (without --strict): 8\n    annotation 1, image 1 (a.jpg, 40 x 30): category_id 3, bbox [30," in said
    assert "and 3 more" in said and "wholly outside" not in said  # nothing is outside of an unknown image


def test_large_sets_are_sampled(tmp_path):
    images = [image_record(i, f"{i}.jpg") for i in range(5001)]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    with pytest.raises(DatasetError, match=r"\(in 2000 of 5001 files looked at\): 2000"):
        check_annotations(content, Split("train", tmp_path / "file.json", tmp_path, COCO))


@pytest.mark.parametrize(
    ("name", "on_disk", "way"),
    [
        pytest.param("/home/me/set/{}.jpg", "{}.jpg", "without the folder /home/me/set", id="absolute"),
        pytest.param("images/{}.jpg", "{}.jpg", "without the folder images", id="first-folder"),
        pytest.param("{}.jpg", "{}.png", "with another extension", id="extension"),
        pytest.param("A{}.JPG", "a{}.jpg", "with upper and lower case changed", id="case"),
        pytest.param("sub\\{}.jpg", "sub/{}.jpg", "with / for \\", id="backslash"),
        pytest.param("a%20{}.jpg", "a {}.jpg", "with %20 and the like decoded", id="url"),
        pytest.param("{}.jpg", "sub/{}.jpg", "in the folder {root}/train/sub", id="folder-added"),
        pytest.param("{}.jpg", "../pictures/{}.jpg", "in the folder {root}/pictures", id="beside"),
        pytest.param("C:\\Data\\A%20{}.JPG", "sub/a {}.png", "with %20 and the like decoded and with / for \\ and with"
                     " upper and lower case changed and with another extension and in the folder {root}/train/sub in"
                     " place of C:/Data", id="all"),
    ],
)  # fmt: skip
def test_names_that_are_nearly_those_on_disk(tmp_path, name, on_disk, way):
    """The error has the number, the fewest changes and an example."""
    split = write_coco(tmp_path, [image_record(i, name.format(i)) for i in (1, 2, 3)], pixels=False)
    for i in (1, 2):
        grey(split.images / on_disk.format(i))
    found = f"{way.format(root=tmp_path)}: {on_disk.format(1)} for {name.format(1)}"
    assert refusal(split).splitlines()[-1] == f"  2 of the 3 missing files would be found {found}"
