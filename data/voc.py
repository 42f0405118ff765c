"""Pascal VOC's annotation files as the content of a file in COCO layout.

ImageSets/Main/train.txt and its like name the images of a split, one a line; Annotations/NAME.xml has an image's file
name, size and objects, with the pixels at the corners, the first of which is 1: xmin to xmax, both of them inside.
Everingham et al., The PASCAL Visual Object Classes Challenge 2012, Development Kit.
"""

import math
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

from data.checks import DatasetError, Problems, report

LISTS = ("train", "val", "trainval", "test")


def read_voc(path: Path) -> dict:
    """The images, annotations and categories of a COCO file for the list `path`, ImageSets/Main/*.txt.

    An image's id is the number of its line. Classes are those of all four lists of the folder, so that they are the
    same for each, in alphabetical order, with ids from 1 on. A box is x = xmin - 1, y = ymin - 1,
    width = xmax - xmin + 1, height = ymax - ymin + 1. An object marked as difficult has iscrowd 1: it is no target, but
    a region to ignore, for which no detection counts as false.
    Raises DatasetError that names every file which is missing or malformed.
    """
    problems: Problems = defaultdict(list)
    scenes = {}  # name of an image -> its size and objects
    for other in dict.fromkeys([path, *(path.with_name(f"{name}.txt") for name in LISTS)]):
        for _, name in _names(other) if other.is_file() or other == path else ():
            if name not in scenes:
                xml = path.parents[2] / "Annotations" / f"{name}.xml"
                try:
                    scenes[name] = _read_scene(xml)
                except (OSError, ValueError, ElementTree.ParseError) as error:
                    scenes[name] = None
                    problems["annotation files that cannot be read"].append(f"{xml} ({other.name}): {error}")
    if problems:
        raise DatasetError(report(path, problems))
    class_names = sorted({record["name"] for _, objects in scenes.values() for record in objects})
    category_id = {name: number for number, name in enumerate(class_names, 1)}
    images, annotations = [], []
    for number, name in _names(path):
        image, objects = scenes[name]
        images.append({"id": number, **image})
        for record in objects:
            ids = {"id": len(annotations) + 1, "image_id": number, "category_id": category_id[record["name"]]}
            annotations.append(ids | {"bbox": record["bbox"], "iscrowd": record["difficult"]})
    categories = [{"id": number, "name": name} for name, number in category_id.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def annotation_files(path: Path) -> list[Path]:
    """The list `path` and the files of its images."""
    return [path, *(path.parents[2] / "Annotations" / f"{name}.xml" for _, name in _names(path))]


def _names(path: Path) -> list[tuple[int, str]]:
    """(number of the line, name of the image)"""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
    return [(number, line.split()[0]) for number, line in enumerate(lines, 1) if line.strip()]


def _read_scene(path: Path) -> tuple[dict, list[dict]]:
    """file_name, width and height of the image; name, bbox and difficult of its objects.

    Raises OSError, ParseError or a ValueError that says what is wrong.
    """
    root = ElementTree.parse(path).getroot()
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
        if difficult not in ("0", "1"):
            raise ValueError(f"difficult is {difficult!r}, not 0 or 1")
        objects.append({"name": _text(element, "name"), "bbox": bbox, "difficult": int(difficult)})
    return image, objects


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
