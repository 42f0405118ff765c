"""CrowdHuman's form: a file whose lines are the JSON records of images.

A line is {"ID": name of Images/ID.jpg, "gtboxes": [...]}. An entry of gtboxes has a tag, "person" or "mask" (a crowd, a
reflection, a picture of a person), and three boxes x, y, width, height in px: `fbox` of the whole body, with its hidden
parts and those outside the image, `vbox` of its visible part, `hbox` of the head.
Shao et al., CrowdHuman: A Benchmark for Detecting Human in a Crowd, arXiv 1805.00123.
"""

import math
from collections import defaultdict

from data.checks import BOX, Problems, is_box, read_sizes, report
from data.files import VALUE, DatasetError, json_text, near_misses, parse_json
from data.split import Split

BOXES = {"fbox": "person", "vbox": "person", "hbox": "head"}  # kind of box -> name of the one class
Boxes = list[tuple[list[float], bool]]  # x, y, width, height in px, and whether it is a region to ignore


def read_crowdhuman(split: Split, digest, look_at_files: bool) -> dict:
    """Return the images, annotations and categories of a COCO file; an image's id is the number of its line.

    Regions to ignore have iscrowd 1: `mask` tags, entries whose extra.ignore is set, and, for `hbox`, those whose
    head_attr.ignore is. Boxes are clipped to the image. The file has no image sizes: they are read from the headers of
    all image files. Without `look_at_files`, an image that cannot be read gets the size that its boxes need.
    Raises DatasetError that names all malformed lines and all image files that are missing or cannot be read.
    """
    problems: Problems = defaultdict(list)
    lines = []  # number, file name, boxes
    try:
        content = split.annotations.read_bytes()
        digest.update(content)
        texts = json_text(content).split("\n")
    except (OSError, ValueError) as error:
        raise DatasetError(f"{split.annotations}: cannot be read: {error}") from error
    for number, text in enumerate(texts, 1):
        if text.strip():
            try:
                lines.append((number, *_parse(text, split.box)))
            except ValueError as error:
                problems["malformed lines"].append(f"line {number}: {error}")
    named = [(f"line {number} ({file_name})", file_name) for number, file_name, _ in lines]
    unreadable = problems if look_at_files else defaultdict(list)
    sizes, missing = read_sizes(named, split.images, split.follow_links, unreadable)
    if problems:
        remarks = near_misses(missing if look_at_files else [], split.images)
        raise DatasetError(report(split.annotations, problems, remarks))
    images, annotations = [], []
    for (number, file_name, boxes), size in zip(lines, sizes, strict=True):
        width, height = size or _extent(boxes)
        images.append({"id": number, "file_name": file_name, "width": width, "height": height})
        for box, ignored in boxes:
            record = {"id": len(annotations) + 1, "image_id": number, "category_id": 1, "iscrowd": int(ignored)}
            annotations.append(record | {"bbox": _clipped(box, width, height)})
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": BOXES[split.box]}]}


def _parse(text: str, kind: str) -> tuple[str, Boxes]:
    """Return the file name and boxes of a line. Raises ValueError that describes the mistake."""
    record = parse_json(text)
    name = record.get("ID") if isinstance(record, dict) else None
    if not isinstance(name, str) or not name:
        raise ValueError(f"ID is {VALUE.repr(name)}, not a name; wanted a record of ID and gtboxes")
    entries = record.get("gtboxes")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"ID {name}: gtboxes is no list of objects")
    boxes = []
    for row, entry in enumerate(entries):
        tag, box = entry.get("tag"), entry.get(kind)
        extra, head = (entry.get(key) or {} for key in ("extra", "head_attr"))
        if tag not in ("person", "mask"):
            raise ValueError(f"ID {name}, gtboxes[{row}]: tag is {VALUE.repr(tag)}, not 'person' or 'mask'")
        if not is_box(box):
            raise ValueError(f"ID {name}, gtboxes[{row}]: {kind} is {VALUE.repr(box)}, not {BOX}")
        if not isinstance(extra, dict) or not isinstance(head, dict):
            raise ValueError(f"ID {name}, gtboxes[{row}]: extra and head_attr have to be objects")
        ignored = extra.get("ignore", 0) or (kind == "hbox" and head.get("ignore", 0))
        boxes.append((box, tag == "mask" or bool(ignored)))
    return f"{name}.jpg", boxes


def _extent(boxes: Boxes) -> tuple[int, int]:
    """Return the width and height that hold the boxes."""
    ends = [(x + w, y + h) for (x, y, w, h), _ in boxes if math.isfinite(x + y + w + h)]
    return tuple(math.ceil(max(side)) for side in zip((1, 1), *ends, strict=True))


def _clipped(box: list[float], width: int, height: int) -> list[float]:
    """Clip a box to the image; outside, its width or height becomes at most 0. A box that is not finite stays."""
    x, y, w, h = box
    if not math.isfinite(x + y + w + h):
        return box
    left, top = max(x, 0), max(y, 0)
    return [left, top, min(x + w, width) - left, min(y + h, height) - top]
