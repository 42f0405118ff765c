"""What has to hold for an annotation file before anything is trained on it.

`check_annotations` reads the records and the headers of the image files, collects every problem, and
raises one error that lists them by kind. A box is x, y, width, height in px, as COCO has it.
"""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data.files import VALUE, DatasetError, leaves_folder, near_misses, path_inside, printable
from images import header_size

OUTSIDE_TOLERANCE_PX = 1
ALL_FILES_UP_TO, FILES_SAMPLED = 5_000, 2_000
CULPRITS_SHOWN, CULPRIT_LENGTH = 5, 400
MOST_BOXES = 0.95  # so large a share of them says that the numbers mean something else
LEAVING = "file names that leave the image folder"

Problems = dict[str, list[str]]  # kind -> one line for each culprit


def check_annotations(
    annotations: dict, images_dir: Path, source: Path, look_at_files: bool = True, follow_links: bool = False
) -> None:
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
    inside, missing = _check_file_names(images, images_dir, problems)
    if look_at_files:
        missing += _check_files(inside, images_dir, follow_links, problems)
    if problems:
        raise DatasetError(report(source, problems, near_misses(missing, images_dir)))


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


# What a record must have: field -> (predicate, the wanted thing in words).
Fields = dict[str, tuple[Callable[[object], bool], str]]
_ID = (_is_id, "an integer of at most 64 bits")
_NAME = (_is_name, "a name")
_FILE_NAME = (_is_file_name, "the name of a file")
_SIZE = (_is_size, "a number of pixels")
BOX = "four numbers (x, y, width, height) of at most 64 bits"
FIELDS: dict[str, Fields] = {
    "categories": {"id": _ID, "name": _NAME},
    "images": {"id": _ID, "file_name": _FILE_NAME, "width": _SIZE, "height": _SIZE},
    "annotations": {
        "id": _ID,
        "image_id": _ID,
        "category_id": _ID,
        "bbox": (is_box, BOX),
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
            return f"{name} is {VALUE.repr(record[name])}, not {wanted}"
    if record.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd is {VALUE.repr(record['iscrowd'])}, not 0 or 1"
    return None


def _who(record: object, row: int) -> str:
    """Whatever names the record: its own fields and its position, as any of them may be missing."""
    names = ("id", "image_id", "file_name", "name")
    known = [f"{n} {VALUE.repr(record[n])}" for n in names if n in record] if isinstance(record, dict) else []
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
        share = f"{len(tiny) / len(ends):.0%} of all"
        kind = f"boxes of a pixel at most, {share} (normalised, fractions of the image's sides? They have to be in px)"
        problems[kind] += [f"annotation {record['id']}: {record['bbox']}" for record in tiny]


def _object(record: dict, image: dict | None) -> str:
    file_name = f" ({image['file_name']})" if image else ""
    return f"annotation {record['id']}, image {record['image_id']}{file_name}"


def _is_outside(box: list[float], width: float, height: float) -> bool:
    x, y, w, h = box
    far = OUTSIDE_TOLERANCE_PX
    return (
        (x < -far or y < -far or x + w > width + far or y + h > height + far)
        and (w > 0 and h > 0)
        and all(map(math.isfinite, box))
    )


def _check_file_names(images: list[dict], images_dir: Path, problems: Problems) -> tuple[list[dict], list[str]]:
    """One record for each file name that stays in the image folder; the other names, where no file has them."""
    if not images_dir.is_dir():
        problems["missing image folder"].append(str(images_dir.absolute()))
        return [], []
    first_with: dict[str, dict] = {}
    for record in images:
        first = first_with.setdefault(record["file_name"], record)
        if first is not record:
            culprit = f"{record['file_name']}: images {first['id']} and {record['id']}"
            problems["file names that occur twice"].append(culprit)
        if leaves_folder(record["file_name"]):
            problems[LEAVING].append(_image(record))
    inside = [record for name, record in first_with.items() if not leaves_folder(name)]
    return inside, [name for name in first_with if leaves_folder(name) and not os.path.exists(images_dir / name)]


def _image(record: dict) -> str:
    return f"image {record['id']} ({record['file_name']})"


def _check_files(images: list[dict], images_dir: Path, follow_links: bool, problems: Problems) -> list[str]:
    """The names of missing files."""
    sample, coverage = images, ""
    if len(images) > ALL_FILES_UP_TO:
        sample = [images[i * len(images) // FILES_SAMPLED] for i in range(FILES_SAMPLED)]
        coverage = f" (in {FILES_SAMPLED} of {len(images)} files looked at)"
    named = [(_image(record), record["file_name"]) for record in sample]
    sizes, missing = read_sizes(named, images_dir, follow_links, problems, coverage)
    for record, (width, height) in ((r, s) for r, s in zip(sample, sizes, strict=True) if s):
        if (width, height) != (record["width"], record["height"]):
            sizes_of = f"{record['width']} x {record['height']} in the record, {width} x {height} in the file"
            kind = "sizes that disagree with the image (its EXIF orientation applied)" + coverage
            problems[kind].append(f"{_image(record)}: {sizes_of}")
    return missing


def read_sizes(
    named: list[tuple[str, str]], images_dir: Path, follow_links: bool, problems: Problems, coverage: str = ""
) -> tuple[list[tuple[int, int] | None], list[str]]:
    """(width, height) of images as displayed, without decoding; and the names of those that are missing.

    named: who names the image, in words, and its file name. One that gives no size is None, and goes into `problems`.
    """
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda pair: _size_or_problem(pair[1], images_dir, follow_links), named))
    missing = []
    for (who, file_name), (size, kind, remark) in zip(named, found, strict=True):
        if size is None:
            problems[kind + coverage].append(f"{who}{remark and ': '}{remark}")
            missing += [file_name] * (not remark)
    return [size for size, _, _ in found], missing


def _size_or_problem(file_name: str, images_dir: Path, follow_links: bool) -> tuple[tuple[int, int] | None, str, str]:
    """The size; or None, the kind of problem, and a remark on it."""
    try:
        return header_size(path_inside(images_dir, file_name, follow_links)), "", ""
    except DatasetError as error:
        return None, LEAVING, str(error)
    except FileNotFoundError as error:  # the system's own has a number, and repeats the name
        return None, f"image files missing in {images_dir.absolute()}", "" if error.errno else str(error)
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        return None, "image files that cannot be read", getattr(error, "strerror", None) or str(error)


def report(source: Path, problems: Problems, remarks: Sequence[str] = ()) -> str:
    """The message of a DatasetError: every kind of problem with its first culprits, then the remarks."""
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
