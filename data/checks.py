"""Checks of an annotation file before anything is trained on it.

`check_annotations` reads the records and the headers of the image files, collects every problem, and raises one error
that lists them by kind. A box is x, y, width, height in px, as COCO has it.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import VALUE, DatasetError, leaves_folder, near_misses, path_inside, printable
from images import header_size

OUTSIDE_TOLERANCE_PX = 1
ALL_FILES_UP_TO, FILES_SAMPLED = 5_000, 2_000
CULPRITS_SHOWN, CULPRIT_LENGTH = 5, 400
MOST_BOXES = 0.95  # of the boxes: such a share of tiny ones means other units, not tiny objects
LEAVING = "file names that leave the image folder"

Problems = dict[str, list[str]]  # kind -> one line for each culprit


class Records(NamedTuple):
    """The records of an annotation file as arrays: n images and m annotations, in file order."""

    categories: list[dict]  # id, name and the rest of each
    image_ids: np.ndarray  # (n,) int64
    file_names: np.ndarray  # (n,) str
    sizes: np.ndarray  # (n, 2) int64, height and width in px
    ids: np.ndarray  # (m,) int64
    owners: np.ndarray  # (m,) row of the image
    category_ids: np.ndarray  # (m,) int64
    boxes: np.ndarray  # (m, 4) float64
    crowd: np.ndarray  # (m,) bool, iscrowd
    areas: np.ndarray  # (m,) float64, px^2; NaN if the file has none
    digest: str = ""  # SHA-256 of the annotation files, hex

    def first_images(self, count: int) -> "Records":
        """Return the records of the first `count` images that have boxes."""
        rows = np.unique(self.owners[~self.crowd])[:count]
        kept = np.isin(self.owners, rows)
        images = {name: getattr(self, name)[rows] for name in ("image_ids", "file_names", "sizes")}
        columns = ("ids", "category_ids", "boxes", "crowd", "areas")
        objects = {name: getattr(self, name)[kept] for name in columns}
        return self._replace(**images, **objects, owners=np.searchsorted(rows, self.owners[kept]))


def check_annotations(
    content: object, images_dir: Path, source: Path, look_at_files: bool = True, follow_links: bool = False
) -> Records:
    """Return the records of the parsed file `source`, or raise one DatasetError that lists every problem.

    Image files (present, readable, inside `images_dir`, of the recorded size) are checked by their headers: all of them
    up to 5,000, above that an evenly spaced 2,000, none without `look_at_files`. Every image is checked again when it
    is loaded. Degenerate boxes and boxes up to 1 px outside pass: the dataset drops and clips them.
    """
    problems: Problems = defaultdict(list)
    if not isinstance(content, dict):
        raise DatasetError(f"{source}: the top level is a {type(content).__name__}, not an object")
    categories, images, objects = (_sound_records(key, content, problems) for key in FIELDS)
    for name, count in Counter(category["name"] for category in categories).items():
        if count > 1:
            problems["category names that occur twice"].append(repr(name))
    records = _columns(categories, images, objects)
    known = {key: _ids(content.get(key)) for key in ("categories", "images")}
    _check_boxes(records, objects, images, known, problems)
    inside, missing = _check_file_names(images, images_dir, problems)
    if look_at_files:
        missing += _check_files(inside, images_dir, follow_links, problems)
    if problems:
        raise DatasetError(report(source, problems, near_misses(missing, images_dir)))
    return records


def _is_id(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _is_size(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 2**31 and value == value // 1


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_file_name(value: object) -> bool:
    return _is_name(value) and "\0" not in value and len(value) <= 4096


def is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(v) is float or _is_id(v) for v in value)


# The fields that a record must have: name -> (predicate, the required value in words).
Fields = dict[str, tuple[Callable[[object], bool], str]]
_ID = (_is_id, "an integer of at most 64 bits")
_SIZE = (_is_size, "a number of pixels")
BOX = "four numbers (x, y, width, height) of at most 64 bits"
FIELDS: dict[str, Fields] = {
    "categories": {"id": _ID, "name": (_is_name, "a name")},
    "images": {"id": _ID, "file_name": (_is_file_name, "the name of a file"), "width": _SIZE, "height": _SIZE},
    "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": (is_box, BOX)},
}


def _sound_records(key: str, content: dict, problems: Problems) -> list[dict]:
    """Return the well-formed records under a top-level key, each id once."""
    records = content.get(key)
    if not isinstance(records, list):
        problems["missing top-level lists"].append(f"{key!r}: a COCO file has images, annotations, categories")
        return []
    if not records and key != "annotations":
        problems["empty top-level lists"].append(f"{key!r} has no records")
    sound: dict[int, dict] = {}
    for row, record in enumerate(records):
        flaw = _flaw(record, FIELDS[key])
        if flaw is None and record["id"] not in sound:
            sound[record["id"]] = record
            continue
        names = ("id", "image_id", "file_name", "name") if isinstance(record, dict) else ()
        line = ", ".join([f"record {row}", *(f"{n} {VALUE.repr(record[n])}" for n in names if n in record)])
        if flaw:
            problems[f"malformed records in {key!r}"].append(f"{line}: {flaw}")
        else:
            problems[f"ids that occur twice in {key!r}"].append(line)
    return list(sound.values())


def _flaw(record: object, fields: Fields) -> str | None:
    if not isinstance(record, dict):
        return "not an object"
    for name, (is_valid, wanted) in fields.items():
        if name not in record:
            return f"{name} is missing"
        if not is_valid(record[name]):
            return f"{name} is {VALUE.repr(record[name])}, not {wanted}"
    if record.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd is {VALUE.repr(record['iscrowd'])}, not 0 or 1"
    return None


def _ids(records: object) -> list[int]:
    """Return the ids of all records, malformed ones too, as a reference to those is no mistake."""
    records = records if isinstance(records, list) else []
    return [record["id"] for record in records if isinstance(record, dict) and _is_id(record.get("id"))]


def _columns(categories: list[dict], images: list[dict], objects: list[dict]) -> Records:
    """Return well-formed records as arrays; the owner of an annotation without a well-formed image is -1."""
    row_of = {image["id"]: row for row, image in enumerate(images)}
    areas = (record.get("area") for record in objects)
    areas = [area if type(area) is float or _is_id(area) else math.nan for area in areas]
    return Records(
        categories,
        np.array([image["id"] for image in images], np.int64),
        np.array([image["file_name"] for image in images], str),
        np.array([(image["height"], image["width"]) for image in images], np.int64).reshape(-1, 2),
        np.array([record["id"] for record in objects], np.int64),
        np.array([row_of.get(record["image_id"], -1) for record in objects], np.int64),
        np.array([record["category_id"] for record in objects], np.int64),
        np.fromiter(chain.from_iterable(record["bbox"] for record in objects), np.float64).reshape(-1, 4),
        np.array([record.get("iscrowd", 0) for record in objects], bool),
        np.array(areas, np.float64),
    )


def _check_boxes(
    records: Records, objects: list[dict], images: list[dict], known: dict[str, list[int]], problems: Problems
) -> None:
    """Check references of annotations to `known` ids, that boxes lie in their images, and that they are in px."""
    owners, starts, sides = records.owners, records.boxes[:, :2], records.boxes[:, 2:]
    image_ids = np.array([record["image_id"] for record in objects], np.int64)
    sizes = np.append(records.sizes, [(0, 0)], axis=0)[owners]  # row -1: no image
    with np.errstate(over="ignore", invalid="ignore"):
        ends, positive = starts + sides, (sides > 0).all(1)
        far = (starts < -OUTSIDE_TOLERANCE_PX) | (ends > sizes[:, ::-1] + OUTSIDE_TOLERANCE_PX)
        outside = far.any(1) & positive & np.isfinite(records.boxes).all(1) & (owners >= 0)
        tiny = positive & ((sides <= 1).all(1) | (ends <= 1).all(1))
    share = tiny.sum() / max(1, positive.sum())
    tiny &= share >= MOST_BOXES
    remedy = "(normalised, fractions of the image's sides? They have to be in px)"
    for kind, wrong, remark in (
        ("annotations of unknown categories", ~np.isin(records.category_ids, known["categories"]), ": category_id {c}"),
        ("annotations of unknown images", ~np.isin(image_ids, known["images"]), ""),
        ("boxes more than 1 px outside their image (x, y, width, height in px?)", outside, ": {box} in {w} x {h}"),
        (f"boxes of a pixel at most, {share:.0%} of all {remedy}", tiny, ": {box}"),
    ):
        for row in np.flatnonzero(wrong).tolist():
            file_name = f" ({images[owners[row]]['file_name']})" if owners[row] >= 0 else ""
            (h, w), c, box = sizes[row], records.category_ids[row], objects[row]["bbox"]
            line = f"annotation {records.ids[row]}, image {image_ids[row]}{file_name}"
            problems[kind].append(line + remark.format(c=c, box=box, w=w, h=h))


def _check_file_names(images: list[dict], images_dir: Path, problems: Problems) -> tuple[list[dict], list[str]]:
    """Return one record for each file name inside the image folder, and the other names that no file has."""
    first_with: dict[str, dict] = {}
    for record in images:
        name = record["file_name"]
        first = first_with.setdefault(name, record)
        if first is not record:
            problems["file names that occur twice"].append(f"{name}: images {first['id']} and {record['id']}")
        if leaves_folder(name):
            problems[LEAVING].append(_image(record))
    inside = [record for name, record in first_with.items() if not leaves_folder(name)]
    return inside, [name for name in first_with if leaves_folder(name) and not os.path.exists(images_dir / name)]


def _image(record: dict) -> str:
    return f"image {record['id']} ({record['file_name']})"


def _check_files(images: list[dict], images_dir: Path, follow_links: bool, problems: Problems) -> list[str]:
    """Compare recorded sizes with those in the files' headers; return the names of missing files."""
    sample, coverage = images, ""
    if len(images) > ALL_FILES_UP_TO:
        sample = [images[i * len(images) // FILES_SAMPLED] for i in range(FILES_SAMPLED)]
        coverage = f" (in {FILES_SAMPLED} of {len(images)} files looked at)"
    named = [(_image(record), record["file_name"]) for record in sample]
    sizes, missing = read_sizes(named, images_dir, follow_links, problems, coverage)
    for record, size in zip(sample, sizes, strict=True):
        if size and size != (record["width"], record["height"]):
            both = f"{record['width']} x {record['height']} in the record, {size[0]} x {size[1]} in the file"
            kind = "sizes that disagree with the image (its EXIF orientation applied)" + coverage
            problems[kind].append(f"{_image(record)}: {both}")
    return missing


def read_sizes(
    named: list[tuple[str, str]], images_dir: Path, follow_links: bool, problems: Problems, coverage: str = ""
) -> tuple[list[tuple[int, int] | None], list[str]]:
    """Return (width, height) of images as displayed, from their headers, and the names of missing files.

    named: a description of each image, for messages, and its file name. The size of an image that cannot be read is
    None, and `problems` names the image.
    """

    def size_or_problem(file_name: str) -> tuple[tuple[int, int] | None, str, str]:
        """Return the size; or None, the kind of problem, and a remark on it."""
        try:
            return header_size(path_inside(images_dir, file_name, follow_links)), "", ""
        except DatasetError as error:
            return None, LEAVING, str(error)
        except FileNotFoundError as error:  # the system's error has a number, and repeats the name
            return None, f"image files missing in {images_dir.absolute()}", "" if error.errno else str(error)
        except Exception as error:  # Pillow's readers raise nearly anything on a broken file
            return None, "image files that cannot be read", getattr(error, "strerror", None) or str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(size_or_problem, (file_name for _, file_name in named)))
    missing = []
    for (who, file_name), (size, kind, remark) in zip(named, answers, strict=True):
        if size is None:
            problems[kind + coverage].append(f"{who}: {remark}" if remark else who)
            missing += [] if remark else [file_name]
    return [size for size, _, _ in answers], missing


def report(source: Path, problems: Problems, remarks: Sequence[str] = ()) -> str:
    """Return the message of a DatasetError: every kind of problem with its first culprits, then the remarks."""
    total = sum(map(len, problems.values()))
    lines = [f"{source}: {total} problem(s); correct the file or take these records out"]
    for kind, culprits in problems.items():
        lines.append(f"  {kind}: {len(culprits)}")
        lines += [f"    {_shortened(culprit)}" for culprit in culprits[:CULPRITS_SHOWN]]
        if len(culprits) > CULPRITS_SHOWN:
            lines.append(f"    and {len(culprits) - CULPRITS_SHOWN} more")
    return "\n".join(lines + [f"  {_shortened(remark)}" for remark in remarks])


def _shortened(line: str) -> str:
    half, line = CULPRIT_LENGTH // 2, printable(line)
    return line if len(line) <= 3 * half else f"{line[:half]} [...] {line[-half:]}"
