"""Checks of an annotation file before anything is trained on it. A box is x, y, width, height in px, as COCO has it."""

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.files import VALUE, DatasetError, leaves_folder, path_inside
from data.problems import Problems, raise_problems
from data.repairs import (
    GROUPING,
    NO_SIZE,
    NOT_TURNED,
    TURNED,
    clipped_corners,
    fits_only_as_shown,
    free_ids,
    grouping_category,
    repair_boxes,
    repair_fields,
)
from images import header_size, is_turned

ALL_FILES_UP_TO, FILES_SAMPLED = 5_000, 2_000
MOST_BOXES = 0.95  # of the boxes: such a share of tiny ones means other units, not tiny objects
LEAVING = "file names that leave the image folder"


class ReadBytes:
    """Reads files, whose contents become part of the split's digest; `repairs` is what a reader mended."""

    def __init__(self) -> None:
        self.digest, self.repairs = hashlib.sha256(), defaultdict(list)

    def __call__(self, path: Path) -> bytes:
        content = path.read_bytes()
        self.digest.update(content)
        return content


class Form(NamedTuple):
    """A form of annotations: `read(split, read_bytes, look_at_files)` returns the content of a COCO file."""

    name: str
    read: Callable[["Split", ReadBytes, bool], object]  # raises DatasetError or OSError
    recipe: str | None = None  # its name in train.py
    boxes: tuple[str, ...] = ()  # the kinds to choose from, the default first
    metrics: Callable[[dict, list[dict]], dict[str, float]] | None = None  # of annotations and results, beside COCO's
    image_folder: Callable[[Path, str], Path | None] | None = None  # of annotation file and split, if the file names it


@dataclass(frozen=True)
class Split:
    """One part of a data set: its files and how to read them."""

    name: str  # "train", "val" or "test"
    annotations: Path
    images: Path
    form: Form
    box: str | None = None  # one of the form's kinds
    follow_links: bool = False  # read links to files outside the folders of images and annotations
    strict: bool = False  # repairs are problems


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
    areas: np.ndarray  # (m,) float64, px^2
    digest: str = ""  # SHA-256 of the annotation files, hex
    repairs: Problems = {}  # empty if nothing was repaired

    def first_images(self, count: int) -> "Records":
        """Return the records of the first `count` images that have targets."""
        usable = clipped_corners(self.boxes, self.sizes[self.owners, ::-1])[1]
        rows = np.unique(self.owners[~self.crowd & usable])[:count]
        kept = np.isin(self.owners, rows)
        columns = (*(column[rows] for column in self[1:4]), *(column[kept] for column in self[4:10]))
        records = Records(self.categories, *columns, *self[10:])
        return records._replace(owners=np.searchsorted(rows, self.owners[kept]))


def check_annotations(
    content: object, split: Split, look_at_files: bool = True, repairs: Problems | None = None
) -> Records:
    """Return the records of a parsed file, or raise one DatasetError that lists every problem.

    With `look_at_files` the headers of the image files are read, all up to 5,000, above that an evenly spaced 2,000.
    What is certain is repaired, see data/repairs.py; with `split.strict` it is a problem, as are earlier `repairs`.
    """
    problems: Problems = defaultdict(list)
    repairs = defaultdict(list, repairs or {})
    if not isinstance(content, dict):
        raise DatasetError(f"{split.annotations}: the top level is a {type(content).__name__}, not an object")
    sound = (_sound_records(key, content, split, problems, repairs) for key in FIELDS)
    (categories, images, objects), known = zip(*sound, strict=True)
    records = _columns(categories, images, objects)
    if group := grouping_category(categories, set(records.category_ids.tolist())):
        repairs[GROUPING].append(f"category {group['id']} {VALUE.repr(group['name'])}")
    for name, count in Counter(c["name"] for c in categories if c is not group).items():
        if count > 1:
            problems["category names that occur twice"].append(repr(name))
    turned, missing = _check_files(images, split, look_at_files, problems)
    records = _turn_sizes(records, turned, problems, repairs)
    records = _check_boxes(records, objects, known, problems, repairs)
    if split.strict:
        problems |= {f"{kind} (without --strict)": culprits for kind, culprits in repairs.items()}
    raise_problems(split.annotations, problems, missing, split.images)
    return records._replace(repairs=dict(repairs))


def _is_id(value: object) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(v) is float or _is_id(v) for v in value)


BOX = "four numbers (x, y, width, height) of at most 64 bits"
ID = (_is_id, "an integer of at most 64 bits")
SIZE = (lambda v: type(v) in (int, float) and 0 < v < 2**31 and v == v // 1, "a number of pixels")
NAME = (lambda v: isinstance(v, str) and v.strip() != "", "a name")
FILE_NAME = (lambda v: NAME[0](v) and "\0" not in v and len(v) <= 4096, "the name of a file")
FIELDS = {  # that a record must have: name -> (predicate, the required value in words)
    "categories": {"id": ID, "name": NAME},
    "images": {"id": ID, "file_name": FILE_NAME, "width": SIZE, "height": SIZE},
    "annotations": {"id": ID, "image_id": ID, "category_id": ID, "bbox": (is_box, BOX)},
}


def _sound_records(
    key: str, content: dict, split: Split, problems: Problems, repairs: Problems
) -> tuple[list[dict], list[int]]:
    """Return the well-formed records under a top-level key, each id once, and the ids of all records."""
    records = content.get(key)
    if not isinstance(records, list):
        problems["missing top-level lists"].append(f"{key!r}: a COCO file has images, annotations, categories")
        return [], []
    if not records and key != "annotations":
        problems["empty top-level lists"].append(f"{key!r} has no records")
    rules, sound, malformed_ids = FIELDS[key], {}, []
    id_fields = [name for name, rule in rules.items() if rule is ID]
    free = free_ids(records) if key == "annotations" else None
    for row, record in enumerate(records):
        flaw = _flaw(record, rules)
        if not flaw and sound.setdefault(record["id"], record) is record:
            continue
        names = ("id", "image_id", "file_name", "name") if isinstance(record, dict) else ()
        line = ", ".join([f"record {row}", *(f"{n} {VALUE.repr(record[n])}" for n in names if n in record)])
        changes: dict[str, str] = {}
        if flaw and isinstance(record, dict):
            record, changes = repair_fields(record, id_fields, free)
            if key == "images" and (size := _size_from_file(record, split)):
                record, changes[NO_SIZE] = record | size, "{width} x {height}".format(**size)
            flaw = _flaw(record, rules)
        if flaw:
            problems[f"malformed records in {key!r}"].append(f"{line}: {flaw}")
            malformed_ids += [record["id"]] if isinstance(record, dict) and _is_id(record.get("id")) else []
        elif sound.setdefault(record["id"], record) is not record:
            problems[f"ids that occur twice in {key!r}"].append(line)
        for kind, change in changes.items() if not flaw else ():
            repairs[kind].append(f"{line}: {change}")
    return list(sound.values()), [*sound, *malformed_ids]


def _size_from_file(record: dict, split: Split) -> dict[str, int]:
    """Return width and height of an image whose record has none, or 0; {} if its EXIF orientation turns them."""
    if any(record.get(side) in (None, 0, -1) for side in ("width", "height")):
        with suppress(Exception):  # Pillow's readers raise nearly anything on a broken file
            path = path_inside(split.images, record["file_name"], split.follow_links)
            if not is_turned(path):
                return dict(zip(("width", "height"), header_size(path), strict=True))
    return {}


def _flaw(record: object, fields: dict[str, tuple[Callable[[object], bool], str]]) -> str | None:
    if not isinstance(record, dict):
        return "not an object"
    for name, (is_valid, wanted) in fields.items():
        if name not in record:
            return f"{name} is missing"
        if not is_valid(record[name]):
            return f"{name} is {VALUE.repr(record[name])}, not {wanted}"
    if type(crowd := record.get("iscrowd", 0)) is not int or crowd not in (0, 1):
        return f"iscrowd is {VALUE.repr(crowd)}, not 0 or 1"


def _columns(categories: list[dict], images: list[dict], objects: list[dict]) -> Records:
    """Return well-formed records as arrays; the owner of an annotation without a well-formed image is -1."""
    row_of = {image["id"]: row for row, image in enumerate(images)}
    areas = [a if type(a) is float or _is_id(a) else math.nan for a in (record.get("area") for record in objects)]
    names = np.array([image["file_name"] for image in images], str)
    sizes = np.array([(image["height"], image["width"]) for image in images], np.int64).reshape(-1, 2)
    owners = np.array([row_of.get(record["image_id"], -1) for record in objects], np.int64)
    keys = ((images, "id"), (objects, "id"), (objects, "category_id"))
    image_ids, ids, kinds = (np.array([record[key] for record in some], np.int64) for some, key in keys)
    boxes = np.fromiter(chain.from_iterable(record["bbox"] for record in objects), np.float64).reshape(-1, 4)
    crowd = np.array([record.get("iscrowd", 0) for record in objects], bool)
    return Records(categories, image_ids, names, sizes, ids, owners, kinds, boxes, crowd, np.array(areas, np.float64))


def _turn_sizes(records: Records, turned: list[int], problems: Problems, repairs: Problems) -> Records:
    """Swap width and height of the images with `turned` ids where that is certain."""
    sizes, finite = records.sizes.copy(), np.isfinite(records.boxes).all(1)
    for row in np.flatnonzero(np.isin(records.image_ids, turned)).tolist():
        boxes = records.boxes[finite & (records.owners == row)]
        height, width = sizes[row].tolist()
        certain = fits_only_as_shown(boxes, (width, height))
        kind = TURNED if certain else NOT_TURNED
        who = f"image {records.image_ids[row]} ({records.file_names[row]})"
        line = f"{who}: {width} x {height} in the record, shown as {height} x {width}, {len(boxes)} boxes"
        (repairs if certain else problems)[kind].append(line)
        sizes[row] = (width, height) if certain else (height, width)
    return records._replace(sizes=sizes)


def _check_boxes(
    records: Records, objects: list[dict], known: tuple[list[int], ...], problems: Problems, repairs: Problems
) -> Records:
    """Check that annotations refer to `known` ids (malformed records' too); return records with repaired boxes."""
    owners, sides = records.owners, records.boxes[:, 2:]
    image_ids = np.array([record["image_id"] for record in objects], np.int64)
    limits = np.append(records.sizes[:, ::-1], [(math.inf, math.inf)], axis=0)[owners]  # row -1: no image
    boxes, areas, repaired, unlikely = repair_boxes(records.boxes, records.areas, limits)
    with np.errstate(over="ignore", invalid="ignore"):
        ends, positive = records.boxes[:, :2] + sides, (sides > 0).all(1)
        tiny = positive & ((sides <= 1).all(1) | (ends <= 1).all(1))
    share = tiny.sum() / max(1, positive.sum())
    remedy = "(normalised, fractions of the image's sides? They have to be in px)"
    wrong = {
        "annotations of unknown categories": ~np.isin(records.category_ids, known[0]),
        "annotations of unknown images": ~np.isin(image_ids, known[1]),
        f"boxes of a pixel at most, {share:.0%} of all {remedy}": tiny & (share >= MOST_BOXES),
    }
    for found, kinds in ((problems, wrong | unlikely), (repairs, repaired)):
        for kind, rows in kinds.items():
            for row in np.flatnonzero(rows).tolist():
                found[kind].append(_annotation(records, objects[row], row))
    return records._replace(boxes=boxes, areas=areas)


def _annotation(records: Records, record: dict, row: int) -> str:
    who = f"annotation {record['id']}, image {record['image_id']}"
    if (owner := records.owners[row]) >= 0:
        height, width = records.sizes[owner].tolist()
        who += f" ({records.file_names[owner]}, {width} x {height})"
    area = f", area {VALUE.repr(record['area'])}" if "area" in record else ""
    return f"{who}: category_id {record['category_id']}, bbox {record['bbox']}{area}"


def _check_files(images: list[dict], split: Split, look_at_files: bool, problems: Problems) -> tuple[list, list]:
    """Compare recorded sizes with those in the files' headers. Return the ids of images with the size from before their
    EXIF rotation, none if only some files are looked at, and the names of missing files."""
    first_with: dict[str, dict] = {}
    for record in images:
        name = record["file_name"]
        if (first := first_with.setdefault(name, record)) is not record:
            problems["file names that occur twice"].append(f"{name}: images {first['id']} and {record['id']}")
        if leaves_folder(name):
            problems[LEAVING].append(_image(record))
    missing = [name for name in first_with if leaves_folder(name) and not os.path.exists(split.images / name)]
    sample, coverage = [record for name, record in first_with.items() if not leaves_folder(name)], ""
    if not look_at_files:
        return [], missing
    if len(sample) > ALL_FILES_UP_TO:
        coverage = f" (in {FILES_SAMPLED} of {len(sample)} files looked at)"
        sample = [sample[i * len(sample) // FILES_SAMPLED] for i in range(FILES_SAMPLED)]
    sizes, more = read_sizes([(_image(record), record["file_name"]) for record in sample], split, problems, coverage)
    turned = []
    for record, size in zip(sample, sizes, strict=True):
        recorded = (record["width"], record["height"])
        if not size or size == recorded:
            continue
        if not coverage and size == recorded[::-1] and is_turned(split.images / record["file_name"]):
            turned.append(record["id"])
        else:
            kind = "sizes that disagree with the image (its EXIF orientation applied)" + coverage
            both = f"{recorded[0]} x {recorded[1]} in the record, {size[0]} x {size[1]} in the file"
            problems[kind].append(f"{_image(record)}: {both}")
    return turned, missing + more


def _image(record: dict) -> str:
    return f"image {record['id']} ({record['file_name']})"


def read_sizes(named: list[tuple[str, str]], split: Split, problems: Problems, coverage: str = "") -> tuple[list, list]:
    """Return (width, height) in px or None of images as displayed, from their headers, and names of missing files.

    named: a description of each image, for messages, and its file name. `problems` names images without a size.
    """

    def size_or_problem(file_name: str) -> tuple:  # the size, or None, the kind of problem and a remark
        try:
            return header_size(path_inside(split.images, file_name, split.follow_links)), "", ""
        except DatasetError as error:
            return None, LEAVING, str(error)
        except FileNotFoundError as error:  # the system's error has a number, and repeats the name
            return None, f"image files missing in {split.images.absolute()}", "" if error.errno else str(error)
        except Exception as error:  # Pillow's readers raise nearly anything on a broken file
            return None, "image files that cannot be read", getattr(error, "strerror", None) or str(error)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(size_or_problem, (file_name for _, file_name in named)))
    for (who, _), (size, kind, remark) in zip(named, answers, strict=True):
        if size is None:
            problems[kind + coverage].append(f"{who}: {remark}" if remark else who)
    missing = [name for (_, name), (size, _, remark) in zip(named, answers, strict=True) if not size and not remark]
    return [size for size, _, _ in answers], missing
