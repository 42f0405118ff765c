"""Forms of annotation files, read to the content of a COCO file: COCO's, CrowdHuman's and Pascal VOC's.

CrowdHuman (Shao et al., arXiv 1805.00123): a line is {"ID": name of Images/ID.jpg, "gtboxes": [...]}. An entry of
gtboxes has a tag, "person" or "mask" (a crowd, a reflection, a picture of a person), and three boxes x, y, width,
height in px: `fbox` of the whole body, hidden parts included, `vbox` of its visible part, `hbox` of the head.
Pascal VOC (Everingham et al., 2012): ImageSets/Main/train.txt and its like name the images of a split, one a line.
Annotations/NAME.xml has file name, size and objects of an image; pixels count from 1, xmin and xmax are both inside.
"""

import codecs
import gc
import json
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from data.checks import BOX, ReadBytes, Records, Split, check_annotations, is_box, read_sizes
from data.files import IMAGE_SUFFIXES, VALUE, DatasetError, decode, leaves_folder, parse_json, path_inside
from data.problems import Problems, raise_problems

# The polygons are most of a large file, and not needed; parsing their numbers takes twice the time of the rest.
POLYGONS = re.compile(r'"segmentation"\s*:\s*\[(?:[^][{}"]|\[[^][{}"]*\])*\]')
BOXES = {"fbox": "person", "vbox": "person", "hbox": "head"}  # kind of CrowdHuman's boxes -> name of the one class
DIFFICULT = dict.fromkeys(("", "0", "0.0", "false", "unspecified"), 0) | dict.fromkeys(("1", "1.0", "true"), 1)
SUFFIX = re.compile("(" + "|".join(map(re.escape, (".xml", *IMAGE_SUFFIXES))) + ")$", re.IGNORECASE)


def read_split(split: Split, look_at_files: bool = True) -> Records:
    """Read and check the annotation files, with `look_at_files` also the images' headers. Raises DatasetError."""
    if not split.images.is_dir():
        folder = split.images.absolute()
        raise DatasetError(f"{split.annotations.absolute()} is there, but its image folder {folder} is not")
    read_bytes = ReadBytes()
    gc.disable()  # its passes over the millions of objects of a large file take a third of the time
    try:
        content = split.form.read(split, read_bytes, look_at_files)
        records = check_annotations(content, split, look_at_files, read_bytes.repairs)
        return records._replace(digest=read_bytes.digest.hexdigest())
    except OSError as error:
        raise DatasetError(f"{error.filename or split.annotations}: cannot be read: {error}") from error
    finally:
        gc.enable()


def read_coco(split: Split, read_bytes: ReadBytes, look_at_files: bool) -> object:
    """Return the content of the file, without polygons."""
    try:
        text = decode(read_bytes(split.annotations))
        try:
            return parse_json(POLYGONS.sub('"segmentation":[]', text))
        except ValueError:
            return parse_json(text)  # for an error at its place in the file
    except ValueError as error:
        cut = isinstance(error.__cause__, json.JSONDecodeError)
        remark = f". The file has {split.annotations.stat().st_size} bytes; is it whole?" if cut else ""
        raise DatasetError(f"{split.annotations}: {error}{remark}") from error


def coco_content(scenes: list[tuple[dict, list[dict]]], names: list[str]) -> dict:
    """Return the content of a COCO file from images and their objects: `name`, one of `names`, `bbox`, `iscrowd`."""
    ids = {name: number for number, name in enumerate(names, 1)}
    rows = enumerate(((image["id"], record) for image, objects in scenes for record in objects), 1)
    annotations = [
        record | {"id": i, "image_id": image, "category_id": ids[record["name"]], "area": math.prod(record["bbox"][2:])}
        for i, (image, record) in rows
    ]
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": [image for image, _ in scenes], "annotations": annotations, "categories": categories}


def read_crowdhuman(split: Split, read_bytes: ReadBytes, look_at_files: bool) -> dict:
    """Return the content of a COCO file; an image's id is the number of its line.

    Regions to ignore have iscrowd 1: `mask` tags, entries whose extra.ignore is set, and, for `hbox`, those whose
    head_attr.ignore is. Boxes are clipped to the image, whose size is in the header of its file. If that cannot be read
    it is an error with `look_at_files`, as malformed lines are; without, the size is the one that the boxes need.
    """
    problems: Problems = defaultdict(list)
    lines = []  # number, file name, boxes
    try:
        texts = decode(read_bytes(split.annotations)).split("\n")
    except ValueError as error:
        raise DatasetError(f"{split.annotations}: cannot be read: {error}") from error
    for number, text in enumerate(texts, 1):
        if text.strip():
            try:
                lines.append((number, *_parse_line(text, split.box)))
            except ValueError as error:
                problems["malformed lines"].append(f"line {number}: {error}")
    named = [(f"line {number} ({file_name})", file_name) for number, file_name, _ in lines]
    sizes, missing = read_sizes(named, split, problems if look_at_files else defaultdict(list))
    raise_problems(split.annotations, problems, missing if look_at_files else [], split.images)
    name, scenes = BOXES[split.box], []
    for (number, file_name, boxes), size in zip(lines, sizes, strict=True):
        w, h = size or _extent(boxes)
        objects = [{"name": name, "bbox": _clipped(box, w, h), "iscrowd": crowd} for box, crowd in boxes]
        scenes.append(({"id": number, "file_name": file_name, "width": w, "height": h}, objects))
    return coco_content(scenes, [name])


def _parse_line(text: str, kind: str) -> tuple[str, list[tuple[list[float], int]]]:
    """Return the file name of a line of CrowdHuman, and each box with its iscrowd. Raises ValueError."""
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
        boxes.append((box, int(tag == "mask" or bool(ignored))))
    return f"{name}.jpg", boxes


def _extent(boxes: list[tuple[list[float], int]]) -> tuple[int, int]:
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


def read_voc(split: Split, read_bytes: ReadBytes, look_at_files: bool) -> dict:
    """Return the content of a COCO file for a list, ImageSets/Main/*.txt.

    An image's id is the number of the first line with its name. Its file is the <filename> of its XML if that is in the
    image folder, else the one named like the line. Classes are those of all four lists, in alphabetical order, with ids
    from 1 on. A difficult object has iscrowd 1: a region to ignore. A DatasetError names missing and malformed files.
    """
    path, folder = split.annotations, split.annotations.parents[2] / "Annotations"
    problems: Problems = defaultdict(list)
    missing, scenes = [], {}  # name of an image -> its size and objects
    lists = dict.fromkeys([path, *(path.with_name(f"{name}.txt") for name in ("train", "val", "trainval", "test"))])
    numbers = {file: _numbers(file, folder, read_bytes) for file in lists if file == path or file.is_file()}
    for listed_in, name in ((path, name) for path, names in numbers.items() for name in names):
        if name not in scenes:
            scenes[name] = None
            try:
                scenes[name] = _read_scene(read_bytes(path_inside(folder, f"{name}.xml", split.follow_links)))
            except (OSError, ValueError, ElementTree.ParseError) as error:
                missing += [f"{name}.xml"] if isinstance(error, FileNotFoundError) else []
                line = f"{folder / name}.xml ({listed_in.name}): {error}"
                problems["annotation files that cannot be read"].append(line)
    raise_problems(path, problems, missing, folder)
    listed = []
    for name, number in numbers[path].items():
        image, objects = scenes[name]
        options = (image["file_name"], *(name + form for suffix in IMAGE_SUFFIXES for form in (suffix, suffix.upper())))
        present = (form for form in options if not leaves_folder(form) and os.path.isfile(split.images / form))
        listed.append((image | {"id": number, "file_name": next(present, image["file_name"])}, objects))
    return coco_content(listed, sorted({record["name"] for _, objects in scenes.values() for record in objects}))


def _numbers(path: Path, folder: Path, read_bytes: ReadBytes) -> dict[str, int]:
    """Return the names of images in a list, each with the number of its first line. A name is the line, or without its
    suffix, without the -1, 0 or 1 in the list of one class, without both: the first that has an XML in `folder`."""
    try:
        lines = read_bytes(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    numbers: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if line:
            bare = re.sub(r"\s+(-1|0|1)$", "", line)
            names = (line, SUFFIX.sub("", line), bare, SUFFIX.sub("", bare))
            known = (name for name in names if os.path.isfile(folder / f"{name}.xml"))
            numbers.setdefault(next(known, names[1]), number)
    return numbers


def _read_scene(content: bytes) -> tuple[dict, list[dict]]:
    """Return an image (file_name, width, height), its objects (name, bbox, iscrowd). Raises ParseError, ValueError."""
    root = _parse_xml(content)
    width, height = (int(_number(root, f"size/{side}")) for side in ("width", "height"))
    objects = []
    for element in root.findall("object"):
        left, top, right, bottom = (_number(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        difficult = element.findtext("difficult", "0").strip()
        if difficult.lower() not in DIFFICULT:
            raise ValueError(f"difficult is {difficult!r}, not 0 or 1")
        bbox = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        objects.append({"name": _text(element, "name"), "bbox": bbox, "iscrowd": DIFFICULT[difficult.lower()]})
    return {"file_name": _text(root, "filename"), "width": width, "height": height}, objects


def _parse_xml(content: bytes) -> ElementTree.Element:
    """Parse XML in an encoding that expat knows (UTF-8, UTF-16, those of one byte), else in one that Python knows."""
    try:
        return ElementTree.fromstring(content)
    except (LookupError, ValueError):
        match = re.search(rb"""encoding\s*=\s*["']([\w.-]+)""", content[:200])
        declared = match[1].decode() if match else "utf-8"
    try:
        chinese = codecs.lookup(declared).name in ("gb2312", "gbk")
        return ElementTree.fromstring(content.decode("gb18030" if chinese else declared))  # the largest of the family
    except (LookupError, ValueError) as error:
        raise ValueError(f"the declared encoding {declared!r} is unknown or not that of the text: {error}") from error


def _text(element: ElementTree.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"<{element.tag}> has no <{path}>")
    return text


def _number(element: ElementTree.Element, path: str) -> float:
    text = _text(element, path)
    with suppress(ValueError):
        if math.isfinite(number := float(text)):
            return number
    raise ValueError(f"<{path}> of <{element.tag}> is {text!r}, not a number")
