"""Pascal VOC's annotation files as the content of a file in COCO layout.

ImageSets/Main/train.txt and its like name the images of a split, one a line; Annotations/NAME.xml has an image's file
name, size and objects, with the pixels at the corners, the first of which is 1: xmin to xmax, both of them inside.
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

LISTS = ("train", "val", "trainval", "test")
DIFFICULT = dict.fromkeys(("", "0", "0.0", "false", "unspecified"), 0) | dict.fromkeys(("1", "1.0", "true"), 1)
SUFFIX = re.compile("(" + "|".join(map(re.escape, (".xml", *IMAGE_SUFFIXES))) + ")$", re.IGNORECASE)


def read_voc(path: Path, images_dir: Path, follow_links: bool = False) -> dict:
    """The images, annotations and categories of a COCO file for the list `path`, ImageSets/Main/*.txt.

    An image's id is the number of the first line with its name. Its file is the <filename> of its XML where that is
    in `images_dir`, else the one called like the line. Classes are those of all four lists of the folder, so that they
    are the same for each, in alphabetical order, with ids from 1 on. A box is x = xmin - 1, y = ymin - 1,
    width = xmax - xmin + 1, height = ymax - ymin + 1. An object marked as difficult has iscrowd 1: it is no target, but
    a region to ignore, for which no detection counts as false.
    Raises DatasetError that names every file which is missing or malformed.
    """
    problems: Problems = defaultdict(list)
    missing, scenes = [], {}  # name of an image -> its size and objects
    for other in dict.fromkeys([path, *(path.with_name(f"{name}.txt") for name in LISTS)]):
        for _, name in _names(other) if other.is_file() or other == path else ():
            if name not in scenes:
                try:
                    scenes[name] = _read_scene(_xml(path, name, follow_links))
                except (OSError, ValueError, ElementTree.ParseError) as error:
                    scenes[name] = None
                    missing += [f"{name}.xml"] * isinstance(error, FileNotFoundError)
                    xml = _annotations(path) / f"{name}.xml"
                    problems["annotation files that cannot be read"].append(f"{xml} ({other.name}): {error}")
    if problems:
        raise DatasetError(report(path, problems, near_misses(missing, _annotations(path))))
    class_names = sorted({record["name"] for _, objects in scenes.values() for record in objects})
    category_id = {name: number for number, name in enumerate(class_names, 1)}
    images, annotations = [], []
    for number, name in _names(path):
        image, objects = scenes[name]
        images.append({"id": number, **image, "file_name": _image_file(images_dir, image["file_name"], name)})
        for record in objects:
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": category_id[record["name"]]}
            annotations.append(ids | {"bbox": record["bbox"], "iscrowd": record["difficult"]})
    categories = [{"id": number, "name": name} for name, number in category_id.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def annotation_files(path: Path, follow_links: bool = False) -> list[Path]:
    """The list `path` and the files of its images."""
    return [path, *(_xml(path, name, follow_links) for _, name in _names(path))]


def _annotations(path: Path) -> Path:
    return path.parents[2] / "Annotations"


def _xml(path: Path, name: str, follow_links: bool) -> Path:
    return path_inside(_annotations(path), f"{name}.xml", follow_links)


def _names(path: Path) -> list[tuple[int, str]]:
    """(number of the line, name of the image), each name once.

    A name may have spaces. It is the whole line where that has an XML file; else a suffix goes, then the -1, 0 or 1
    that the lists of one class have.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    numbers: dict[str, int] = {}
    for number, line in enumerate(map(str.strip, lines), 1):
        if line:
            forms = [line, re.sub(r"\s+(-1|0|1)$", "", line)]
            forms = [form for whole in forms for form in (whole, re.sub(SUFFIX, "", whole))]
            known = (form for form in forms if os.path.isfile(_annotations(path) / f"{form}.xml"))
            numbers.setdefault(next(known, forms[1]), number)
    return [(number, name) for name, number in numbers.items()]


def _image_file(images_dir: Path, file_name: str, name: str) -> str:
    """The first of these that is in the folder: file_name, `name` with a suffix; else file_name."""
    suffixes = [form for suffix in IMAGE_SUFFIXES for form in (suffix, suffix.upper())]
    options = (file_name, *(name + suffix for suffix in suffixes))
    there = (form for form in options if not leaves_folder(form) and os.path.isfile(images_dir / form))
    return next(there, file_name)


def _read_scene(path: Path) -> tuple[dict, list[dict]]:
    """file_name, width and height of the image; name, bbox and difficult of its objects.

    Raises OSError, ParseError or a ValueError that says what is wrong.
    """
    root = _parse(path.read_bytes())
    image = {
        "file_name": _text(root, "filename"),
        "width": int(_number(root, "size/width")),
        "height": int(_number(root, "size/height")),
    }
    objects = []
    for element in root.findall("object"):
        left, top, right, bottom = (_number(element, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax"))
        bbox = [left - 1, top - 1, right - left + 1, bottom - top + 1]
        difficult = element.findtext("difficult", "0").strip()
        if difficult.lower() not in DIFFICULT:
            raise ValueError(f"difficult is {difficult!r}, not 0 or 1")
        objects.append({"name": _text(element, "name"), "bbox": bbox, "difficult": DIFFICULT[difficult.lower()]})
    return image, objects


def _parse(content: bytes) -> ElementTree.Element:
    """expat knows UTF-8, UTF-16 and encodings of one byte; text in another is decoded by Python before."""
    try:
        return ElementTree.fromstring(content)
    except (LookupError, ValueError):
        found = re.search(rb"""encoding\s*=\s*["']([\w.-]+)""", content[:200])
        declared = found[1].decode() if found else "utf-8"
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
