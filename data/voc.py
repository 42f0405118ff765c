"""Pascal VOC's form: lists of image names, and an XML file for each image.

ImageSets/Main/train.txt and its like name the images of a split, one a line. Annotations/NAME.xml has an image's file
name, size and objects, with the pixels at the corners, counted from 1: xmin to xmax, both of them inside.
Everingham et al., The PASCAL Visual Object Classes Challenge 2012, Development Kit.
"""

import codecs
import math
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from data.checks import Problems, report
from data.files import IMAGE_SUFFIXES, DatasetError, leaves_folder, near_misses, path_inside
from data.split import Split

LISTS = ("train", "val", "trainval", "test")
DIFFICULT = dict.fromkeys(("", "0", "0.0", "false", "unspecified"), 0) | dict.fromkeys(("1", "1.0", "true"), 1)
SUFFIX = re.compile("(" + "|".join(map(re.escape, (".xml", *IMAGE_SUFFIXES))) + ")$", re.IGNORECASE)


def read_voc(split: Split, digest, look_at_files: bool) -> dict:
    """Return the images, annotations and categories of a COCO file for a list, ImageSets/Main/*.txt.

    An image's id is the number of the first line with its name. Its file is the <filename> of its XML if that is in the
    image folder, else the one named like the line. Classes are those of all four lists, so that they are the same for
    each, in alphabetical order, with ids from 1 on. A box is x = xmin - 1, y = ymin - 1, width = xmax - xmin + 1,
    height = ymax - ymin + 1. An object marked as difficult has iscrowd 1: a region to ignore, not a target.
    Raises DatasetError that names every file which is missing or malformed.
    """
    path, folder = split.annotations, split.annotations.parents[2] / "Annotations"
    problems: Problems = defaultdict(list)
    missing, scenes = [], {}  # name of an image -> its size and objects
    lists = [other for other in (path.with_name(f"{name}.txt") for name in LISTS) if other != path and other.is_file()]
    names = {other: _names(other, folder, digest) for other in (path, *lists)}
    for listed_in, name in ((path, name) for path in names for name in names[path].values()):
        if name not in scenes:
            scenes[name] = None
            try:
                content = path_inside(folder, f"{name}.xml", split.follow_links).read_bytes()
                digest.update(content)
                scenes[name] = _read_scene(content)
            except (OSError, ValueError, ElementTree.ParseError) as error:
                missing += [f"{name}.xml"] if isinstance(error, FileNotFoundError) else []
                line = f"{folder / name}.xml ({listed_in.name}): {error}"
                problems["annotation files that cannot be read"].append(line)
    if problems:
        raise DatasetError(report(path, problems, near_misses(missing, folder)))
    class_names = sorted({record["name"] for _, objects in scenes.values() for record in objects})
    category_id = {name: number for number, name in enumerate(class_names, 1)}
    images, annotations = [], []
    for number, name in names[path].items():
        image, objects = scenes[name]
        images.append(image | {"id": number, "file_name": _image_file(split.images, image["file_name"], name)})
        for record in objects:
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": category_id[record["name"]]}
            annotations.append(record | ids)
    categories = [{"id": number, "name": name} for name, number in category_id.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _names(path: Path, folder: Path, digest) -> dict[int, str]:
    """Return number of the line -> name of the image, each name once.

    A name may have spaces. It is the whole line if that has an XML file in `folder`; else without a suffix, or without
    the -1, 0 or 1 that the lists of one class have.
    """
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    digest.update(content)
    numbers: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if line:
            forms = [line, re.sub(r"\s+(-1|0|1)$", "", line)]
            forms = [form for whole in forms for form in (whole, SUFFIX.sub("", whole))]
            known = (form for form in forms if os.path.isfile(folder / f"{form}.xml"))
            numbers.setdefault(next(known, forms[1]), number)
    return {number: name for name, number in numbers.items()}


def _image_file(images_dir: Path, file_name: str, name: str) -> str:
    """Return the first of these that is in the folder: file_name, `name` with a suffix; else file_name."""
    suffixes = [form for suffix in IMAGE_SUFFIXES for form in (suffix, suffix.upper())]
    options = (file_name, *(name + suffix for suffix in suffixes))
    present = (form for form in options if not leaves_folder(form) and os.path.isfile(images_dir / form))
    return next(present, file_name)


def _read_scene(content: bytes) -> tuple[dict, list[dict]]:
    """Return file_name, width and height of the image; name, bbox and iscrowd of its objects.

    Raises ParseError or a ValueError that describes the mistake.
    """
    root = _parse(content)
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


def _parse(content: bytes) -> ElementTree.Element:
    """Parse XML in an encoding that expat knows (UTF-8, UTF-16, those of one byte), else in one that Python knows."""
    try:
        return ElementTree.fromstring(content)
    except (LookupError, ValueError):
        match = re.search(rb"""encoding\s*=\s*["']([\w.-]+)""", content[:200])
        declared = match[1].decode() if match else "utf-8"
    try:
        encoding = codecs.lookup(declared).name
        encoding = {"gb2312": "gb18030", "gbk": "gb18030"}.get(encoding, encoding)  # the largest of the family
        return ElementTree.fromstring(content.decode(encoding))
    except (LookupError, ValueError) as error:
        raise ValueError(f"the declared encoding {declared!r} is unknown or not that of the text: {error}") from error


def _text(element: ElementTree.Element, path: str) -> str:
    text = (element.findtext(path) or "").strip()
    if not text:
        raise ValueError(f"<{element.tag}> has no <{path}>")
    return text


def _number(element: ElementTree.Element, path: str) -> float:
    text = _text(element, path)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"<{path}> of <{element.tag}> is {text!r}, not a number")
    return number
