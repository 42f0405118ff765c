"""What has to hold for an annotation file before anything is trained on it.

`check_annotations` reads the records and the headers of the image files, collects every problem, and
raises one error that lists them by kind. A box is x, y, width, height in px, as COCO has it.
"""

import math
import os
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from images import header_size

OUTSIDE_TOLERANCE_PX = 1
ALL_FILES_UP_TO, FILES_SAMPLED = 5_000, 2_000
CULPRITS_SHOWN = 5
MOST_BOXES = 0.95  # so large a share of them says that the numbers mean something else

Problems = dict[str, list[str]]  # kind -> one line for each culprit


def printable(text: object) -> str:
    """`text` on one line of a terminal: what would act on it (control characters, line breaks, marks of direction) or
    cannot be encoded (lone surrogates) is escaped as in Python."""
    return "".join(repr(c)[1:-1] if _acts(c) else c for c in str(text))


def _acts(character: str) -> bool:
    joiner = character in "\u200c\u200d"  # many languages and emoji are written with these
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not joiner


class DatasetError(ValueError):
    """Something is wrong with the data; the message is the whole story, meant for the user."""


def check_annotations(annotations: dict, images_dir: Path, source: Path, look_at_files: bool = True) -> None:
    """Raise one DatasetError that lists every problem of the parsed file `source`.

    Image files (there, readable, inside `images_dir`, of the size that the record says) are looked at
    by their headers: all of them up to 5,000, above that an evenly spaced 2,000, none with
    `look_at_files` off. Every image is checked again as it is loaded. Degenerate boxes and boxes up to
    1 px outside are no problem here: the dataset drops and clips them.
    """
    problems: Problems = defaultdict(list)
    if not isinstance(annotations, dict):
        raise DatasetError(f"{source}: the top level is a {type(annotations).__name__}, not an object")
    categories = _check_records("categories", annotations, problems)
    images = _check_records("images", annotations, problems)
    objects = _check_records("annotations", annotations, problems)
    _check_names(categories, problems)
    _check_boxes(objects, _ids(annotations, "categories"), _ids(annotations, "images"), images, problems)
    _check_units(objects, problems)
    named_inside = _check_file_names(images, images_dir, problems)
    if look_at_files:
        _check_files(named_inside, images_dir, problems)
    if problems:
        raise DatasetError(report(source, problems))


def image_path(images_dir: Path, file_name: str) -> Path:
    """The file of a record. Raises DatasetError where it lies outside the folder, links followed."""
    folder = images_dir.resolve()
    path = (folder / file_name).resolve()
    if _leaves_folder(file_name) or not path.is_relative_to(folder):
        raise DatasetError(f"file_name {file_name!r} leaves the image folder {folder}")
    return path


def _leaves_folder(file_name: str) -> bool:
    return os.path.isabs(file_name) or os.path.normpath(file_name).split(os.sep)[0] == ".."


def _is_id(value: object) -> bool:
    return type(value) is int


def _is_size(value: object) -> bool:
    return type(value) in (int, float) and value > 0 and value == value // 1


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.strip() != ""


def _is_box(value: object) -> bool:
    return isinstance(value, list) and len(value) == 4 and all(type(v) in (int, float) for v in value)


# What a record must have: field -> (predicate, the wanted thing in words).
Fields = dict[str, tuple[Callable[[object], bool], str]]
_ID = (_is_id, "an integer")
_NAME = (_is_name, "a name")
_SIZE = (_is_size, "a number of pixels")
FIELDS: dict[str, Fields] = {
    "categories": {"id": _ID, "name": _NAME},
    "images": {"id": _ID, "file_name": _NAME, "width": _SIZE, "height": _SIZE},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (_is_box, "four numbers (x, y, width, height)"),
    },
}


def _check_records(key: str, annotations: dict, problems: Problems) -> list[dict]:
    """The well-formed records under a top-level key, each id once."""
    records = annotations.get(key)
    if not isinstance(records, list):
        problems["missing top-level lists"].append(f"{key!r}: a COCO file has images, annotations, categories")
        return []
    if not records and key != "annotations":
        problems["empty top-level lists"].append(f"{key!r} has no records")
    sound: dict[int, dict] = {}
    for row, record in enumerate(records):
        flaw = _flaw(record, FIELDS[key])
        if flaw:
            problems[f"malformed records in {key!r}"].append(f"{_who(record, row)}: {flaw}")
        elif record["id"] in sound:
            problems[f"ids that occur twice in {key!r}"].append(_who(record, row))
        else:
            sound[record["id"]] = record
    return list(sound.values())


def _flaw(record: object, fields: Fields) -> str | None:
    if not isinstance(record, dict):
        return "not an object"
    for name, (is_valid, wanted) in fields.items():
        if name not in record:
            return f"{name} is missing"
        if not is_valid(record[name]):
            return f"{name} is {record[name]!r}, not {wanted}"
    if record.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd is {record['iscrowd']!r}, not 0 or 1"
    return None


def _who(record: object, row: int) -> str:
    """Whatever names the record: its own fields and its position, as any of them may be missing."""
    names = ("id", "image_id", "file_name", "name")
    known = [f"{n} {record[n]!r}" for n in names if n in record] if isinstance(record, dict) else []
    return ", ".join([f"record {row}", *known])


def _check_names(categories: list[dict], problems: Problems) -> None:
    for name, count in Counter(category["name"] for category in categories).items():
        if count > 1:
            problems["category names that occur twice"].append(repr(name))


def _ids(annotations: dict, key: str) -> set:
    """The ids of all records under a key, malformed ones too: what refers to those is not to blame."""
    records = annotations.get(key)
    ids = [record.get("id") for record in records if isinstance(record, dict)] if isinstance(records, list) else []
    return {i for i in ids if _is_id(i)}


def _check_boxes(
    objects: list[dict], category_ids: set[int], image_ids: set[int], images: list[dict], problems: Problems
) -> None:
    sound_images = {image["id"]: image for image in images}
    for record in objects:
        image = sound_images.get(record["image_id"])
        if record["category_id"] not in category_ids:
            culprit = f"{_object(record, image)}: category_id {record['category_id']}"
            problems["annotations of unknown categories"].append(culprit)
        if record["image_id"] not in image_ids:
            problems["annotations of unknown images"].append(_object(record, image))
        elif image and _is_outside(record["bbox"], image["width"], image["height"]):
            culprit = f"{_object(record, image)}: {record['bbox']} in {image['width']} x {image['height']}"
            problems["boxes more than 1 px outside their image (x, y, width, height in px?)"].append(culprit)


def _check_units(objects: list[dict], problems: Problems) -> None:
    """Boxes no larger than a pixel, or within the first of their image, teach nothing; where nearly all are, they are
    in other units."""
    ends = [(record, *record["bbox"]) for record in objects if min(record["bbox"][2:]) > 0]
    tiny = [record for record, x, y, w, h in ends if max(w, h) <= 1 or max(x + w, y + h) <= 1]
    if tiny and len(tiny) >= MOST_BOXES * len(ends):
        kind = (
            f"boxes of a pixel at most, {len(tiny) / len(ends):.0%} of all (fractions of the image's sides? They have"
        )
        problems[f"{kind} to be in px)"] += [f"annotation {record['id']}: {record['bbox']}" for record in tiny]


def _object(record: dict, image: dict | None) -> str:
    file_name = f" ({image['file_name']})" if image else ""
    return f"annotation {record['id']}, image {record['image_id']}{file_name}"


def _is_outside(box: list[float], width: float, height: float) -> bool:
    x, y, w, h = box
    far = OUTSIDE_TOLERANCE_PX
    return (
        (x < -far or y < -far or x + w > width + far or y + h > height + far)
        and (w > 0 and h > 0)
        and math.isfinite(x + y + w + h)
    )


def _check_file_names(images: list[dict], images_dir: Path, problems: Problems) -> list[dict]:
    """One record for each file name that stays in the image folder."""
    if not images_dir.is_dir():
        problems["missing image folder"].append(str(images_dir.absolute()))
        return []
    first_with: dict[str, dict] = {}
    for record in images:
        first = first_with.setdefault(record["file_name"], record)
        if first is not record:
            culprit = f"{record['file_name']}: images {first['id']} and {record['id']}"
            problems["file names that occur twice"].append(culprit)
        if _leaves_folder(record["file_name"]):
            culprit = f"image {record['id']} ({record['file_name']})"
            problems["file names that leave the image folder"].append(culprit)
    return [record for record in first_with.values() if not _leaves_folder(record["file_name"])]


def _check_files(images: list[dict], images_dir: Path, problems: Problems) -> None:
    sample, coverage = images, ""
    if len(images) > ALL_FILES_UP_TO:
        sample = [images[i * len(images) // FILES_SAMPLED] for i in range(FILES_SAMPLED)]
        coverage = f" (in {FILES_SAMPLED} of {len(images)} files looked at)"
    with ThreadPoolExecutor(16) as pool:
        for found in pool.map(lambda record: _file_problem(record, images_dir), sample):
            if found:
                problems[found[0] + coverage].append(found[1])


def _file_problem(record: dict, images_dir: Path) -> tuple[str, str] | None:
    """(kind, culprit) where the file of an image record is not what the record says."""
    culprit = f"image {record['id']} ({record['file_name']})"
    size, kind, remark = size_or_problem(record["file_name"], images_dir)
    if size is None:
        return kind, culprit + remark
    width, height = size
    if (width, height) == (record["width"], record["height"]):
        return None
    sizes = f"{record['width']} x {record['height']} in the record, {width} x {height} in the file"
    return "sizes that disagree with the image (its EXIF orientation applied)", f"{culprit}: {sizes}"


def size_or_problem(file_name: str, images_dir: Path) -> tuple[tuple[int, int] | None, str, str]:
    """(width, height) of an image as displayed, without decoding; or None, the kind of problem, and a remark on it."""
    try:
        return header_size(image_path(images_dir, file_name)), "", ""
    except DatasetError:
        return None, "file names that leave the image folder", " is a link to outside"
    except FileNotFoundError:
        return None, f"image files missing in {images_dir.absolute()}", ""
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        return None, "image files that cannot be read", f": {error}"


def report(source: Path, problems: Problems) -> str:
    """The message of a DatasetError: every kind of problem with its first culprits."""
    total = sum(map(len, problems.values()))
    lines = [f"{source}: {total} problem(s); correct the file or take these records out"]
    for kind, culprits in problems.items():
        lines.append(f"  {kind}: {len(culprits)}")
        lines += [f"    {printable(culprit)}" for culprit in culprits[:CULPRITS_SHOWN]]
        if len(culprits) > CULPRITS_SHOWN:
            lines.append(f"    and {len(culprits) - CULPRITS_SHOWN} more")
    return "\n".join(lines)
