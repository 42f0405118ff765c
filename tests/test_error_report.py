"""The page of eval.py --report: its numbers and pictures, names escaped, and what it needs."""

import base64
import html
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageColor
from pycocotools.cocoeval import COCOeval

import eval as eval_script
from errors import UserError
from model import save_weights
from report import COLOURS
from tests.support.detectors import tiny_detector
from tests.support.sets import box_record, image_record, write_coco

NAMES, IDS = ["<b>", "dog"], [3, 5]
IMAGES = [image_record(7, "a&b.jpg"), image_record(2, "other.jpg"), image_record(4, "empty.jpg")]
OBJECTS = [
    box_record(1, (5, 6, 10, 12), 7, 3, area=120),
    box_record(2, (20, 5, 10, 10), 7, 5, area=100),
    box_record(3, (0, 0, 20, 20), 2, 3, area=400, iscrowd=1),
    box_record(4, (5, 15, 10, 10), 2, 5, area=100),
]
DETECTIONS = [  # of the first object, in the region to ignore, false, of the last, and below the score with the best F1
    {"image_id": 7, "category_id": 3, "bbox": [5, 6, 10, 12], "score": 0.9},
    {"image_id": 2, "category_id": 3, "bbox": [2, 2, 6, 6], "score": 0.95},
    {"image_id": 2, "category_id": 5, "bbox": [25, 15, 10, 10], "score": 0.8},
    {"image_id": 2, "category_id": 5, "bbox": [5, 15, 10, 10], "score": 0.6},
    {"image_id": 7, "category_id": 3, "bbox": [25, 18, 10, 10], "score": 0.1},
]
PICTURES, NEEDED = ("report-missed-1.png", "report-false-1.png"), "hotcoco is not installed: pip install hotcoco"


@pytest.fixture
def report(tmp_path, monkeypatch, call) -> Callable[[list[dict], list[dict]], Path]:
    """Return a function: evaluate objects and detections with --report; return the folder of the page."""
    categories = [{"id": i, "name": name} for i, name in zip(IDS, NAMES, strict=True)]
    classes = {"class_names": NAMES, "category_ids": IDS}
    save_weights(tmp_path / "ota.safetensors", tiny_detector(num_classes=2), classes)

    def report(objects: list[dict], detections: list[dict]) -> Path:
        write_coco(tmp_path / "set", IMAGES, objects, categories)
        monkeypatch.setattr(eval_script, "detect_dataset", lambda *_: detections)
        files = ("--weights", tmp_path / "ota.safetensors", "--data", tmp_path / "set", "--out", tmp_path)
        call(eval_script, *files, "--device", "cpu", "--report")
        return tmp_path

    return report


def test_page_shows_what_was_found(report):
    """AP50 of dogs is 0.5 at 51 of 101 recalls; without the false detection 1 there, without the missed dog 0.5 at all.
    Half of a gain is the mean's over the classes."""
    pytest.importorskip("hotcoco", reason=NEEDED)
    out = report(OBJECTS, DETECTIONS)
    page = (out / "report.html").read_text("utf-8")
    rows = [re.findall("<t[hd]>(.*?)</t[hd]>", row) for row in re.findall("<tr>(.*?)</tr>", page)]
    rows = [[html.unescape(re.sub("<.*?>", "", cell)) for cell in row] for row in rows]
    assert ["<b>", "1", "1.000", "1.000", "1.000", "-", "-", "1.000", "0.900"] in rows
    confusion = rows.index(["", "<b>", "dog", "missed"])
    assert rows[confusion + 1 :][:3] == [["<b>", "1", "", ""], ["dog", "", "1", "1"], ["nothing there", "", "1", ""]]
    errors = {name.split(":")[0]: [*cells] for name, *cells in rows[-8:]}
    gains = {"Bkg": ["2", f"{51 / 404:.3f}"], "Miss": ["1", f"{(0.5 - 51 / 202) / 2:.3f}"]}
    assert {name: errors[name] for name in gains} == gains and errors["Dupe"] == ["0", "0.000"]

    assert "a&amp;b.jpg<br>right: 1 &lt;b&gt;<br>false: none<br>missed: 1 dog<" in page
    pictures = [f"data:image/png;base64,{base64.b64encode((out / name).read_bytes()).decode()}" for name in PICTURES]
    assert re.findall(r"(?:src|href)=\"(.*?)\"", page) == pictures and not re.search(r"<b\b|url\(|@import", page)
    in_missed = {(321, 160): "missed", (81, 192): "right", (400, 352): "below the score"}
    in_false = {(401, 320): "false", (81, 320): "right", (33, 80): "in the region to ignore"}
    for name, points in zip(PICTURES, (in_missed, in_false), strict=True):
        found = {point: Image.open(out / name).getpixel(point) for point in points}
        assert found == {at: ImageColor.getrgb(COLOURS.get(kind, "grey")) for at, kind in points.items()}


def test_page_of_no_objects_and_no_detections(report):
    pytest.importorskip("hotcoco", reason=NEEDED)
    assert (report([], []) / "report.html").read_text("utf-8").count(">None.<") == 2


def test_without_hotcoco_nothing_is_evaluated(report, monkeypatch):
    monkeypatch.setattr(eval_script, "COCOeval", COCOeval)
    with pytest.raises(UserError, match=r'--report needs hotcoco: pip install -e "\.\[report\]"'):
        report([], None)
