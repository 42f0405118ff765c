"""CrowdHuman's annotation files as the content of a file in COCO layout.

A line is the JSON record of an image, {"ID": name of Images/ID.jpg, "gtboxes": [...]}. An entry of gtboxes has a tag,
"person" or "mask" (a crowd, a reflection, a picture of a person), and three boxes x, y, width, height in px: `fbox`
of the whole body, which reaches as far as the hidden parts and those outside the image do, `vbox` of what is visible
of it, `hbox` of the head. Shao et al., CrowdHuman: A Benchmark for Detecting Human in a Crowd, arXiv 1805.00123.
"""

import math
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from data.checks import BOX, Problems, is_box, read_sizes, report
from data.files import VALUE, DatasetError, json_text, near_misses, parse_json

BOXES = {"fbox": "person", "vbox": "person", "hbox": "head"}  # kind of box -> name of the one class
CATEGORY_ID = 1


class Line(NamedTuple):
    number: int  # from 1 on
    file_name: str
    boxes: list[list[float]]
    ignored: list[bool]


def read_crowdhuman(
    path: Path, images_dir: Path, box: str = "fbox", look_at_files: bool = True, follow_links: bool = False
) -> dict:
    """The images, annotations and categories of a COCO file; an image's id is the number of its line.

    Regions to ignore have iscrowd 1: `mask` tags, entries whose extra.ignore is set, and, for `hbox`, those whose
    head_attr.ignore is. Boxes are clipped to the image. Sizes of images are not in the file, so they are read from the
    headers of all image files, by 16 threads, whenever it is read; without `look_at_files`, an image that has none
    that can be read is as large as its boxes need, and loading it will tell.
    Raises DatasetError: lines that are malformed, or image files that are missing or cannot be read; names all of them.
    """
    problems: Problems = defaultdict(list)
    lines = _read_lines(path, box, problems)
    named = [(f"line {line.number} ({line.file_name})", line.file_name) for line in lines]
    sizes, missing = read_sizes(named, images_dir, follow_links, problems if look_at_files else defaultdict(list))
    if problems:
        raise DatasetError(report(path, problems, near_misses(missing if look_at_files else [], images_dir)))
    images, annotations = [], []
    for line, size in zip(lines, sizes, strict=True):
        width, height = size or _extent(line.boxes)
        images.append({"id": line.number, "file_name": line.file_name, "width": width, "height": height})
        for bbox, ignored in zip(line.boxes, line.ignored, strict=True):
            ids = {"id": len(annotations) + 1, "image_id": line.number, "category_id": CATEGORY_ID}
            annotations.append(ids | {"bbox": _clipped(bbox, width, height), "iscrowd": int(ignored)})
    return {"images": images, "annotations": annotations, "categories": [{"id": CATEGORY_ID, "name": BOXES[box]}]}


def _read_lines(path: Path, box: str, problems: Problems) -> list[Line]:
    try:
        content = json_text(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    lines = []
    for number, text in enumerate(content.split("\n"), 1):
        if text.strip():
            try:
                lines.append(_parse(number, text, box))
            except ValueError as error:
                problems["malformed lines"].append(f"line {number}: {error}")
    return lines


def _parse(number: int, text: str, box: str) -> Line:
    """Raises ValueError that says what is wrong with the line."""
    record = parse_json(text)
    name = record.get("ID") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"ID is {VALUE.repr(name)}, not a name; wanted a record of ID and gtboxes")
    entries = record.get("gtboxes")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"ID {name}: gtboxes is no list of objects")
    boxes, ignored = [], []
    for row, entry in enumerate(entries):
        tag, bbox = entry.get("tag"), entry.get(box)
        if tag not in ("person", "mask"):
            raise ValueError(f"ID {name}, gtboxes[{row}]: tag is {VALUE.repr(tag)}, not 'person' or 'mask'")
        if not is_box(bbox):
            raise ValueError(f"ID {name}, gtboxes[{row}]: {box} is {VALUE.repr(bbox)}, not {BOX}")
        marks = [entry.get(key) or {} for key in ("extra", "head_attr")]
        if not all(isinstance(mark, dict) for mark in marks):
            raise ValueError(f"ID {name}, gtboxes[{row}]: extra and head_attr have to be objects")
        extra, head = (bool(mark.get("ignore", 0)) for mark in marks)
        boxes.append(bbox)
        ignored.append(tag == "mask" or extra or (box == "hbox" and head))
    return Line(number, f"{name}.jpg", boxes, ignored)


def _extent(boxes: list[list[float]]) -> tuple[int, int]:
    """Width and height that hold the boxes."""
    ends = [(x + w, y + h) for x, y, w, h in boxes if math.isfinite(x + y + w + h)]
    return tuple(math.ceil(max(side)) for side in zip((1, 1), *ends, strict=True))


def _clipped(box: list[float], width: int, height: int) -> list[float]:
    """One that lies outside gets a width or height of at most 0; what is not finite stays so."""
    x, y, w, h = box
    if not math.isfinite(x + y + w + h):
        return box
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]
