"""YOLO's form: data.yaml names the classes and the images of each split, and a text file beside an image has its boxes.

The label file of .../images/a.jpg is .../labels/a.txt: of several folders `images` the last one counts; without one,
both are in one folder. A row is `class cx cy w h`, or a class and the corners of a polygon `x1 y1 x2 y2 x3 y3 ...`, in
fractions of the image's width and height as displayed. data.yaml is read as Ultralytics reads it and Roboflow writes it
(https://docs.ultralytics.com/datasets/detect).
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path, PurePosixPath

import yaml

from data.checks import LEAVING, ReadBytes, Split, read_sizes
from data.files import IMAGE_SUFFIXES, VALUE, DatasetError, decode, path_inside
from data.forms import coco_content
from data.problems import Problems, raise_problems

YAML_SUFFIXES = (".yaml", ".yml")
# Name of a split -> its keys in data.yaml.
KEYS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
TOLERANCE = 0.01  # outside of 0..1, for what rounding does in label files of two decimals
DIGITS = 6  # of boxes in px: those that had whole numbers before they were divided have them again
Row = tuple[int, tuple[float, ...]]  # class, and left, top, width and height in fractions of the image


def image_folder(source: Path, name: str) -> Path | None:
    """Return the folder that holds images and label files of a split, None if data.yaml does not name the split."""
    places = _places(source, _read_yaml(source, Path.read_bytes), name)
    folders = [_above_images(place) if place.is_dir() else base for base, place in places]
    return Path(os.path.commonpath(folders)) if folders else None


def read_yolo(split: Split, read_bytes: ReadBytes, look_at_files: bool) -> dict:
    """Return the content of a COCO file; an image's id is its number in the order of the names, class c has id c + 1.

    Malformed rows are named by label file and line. An image whose size cannot be read is an error with
    `look_at_files`, as malformed rows are; without, it has 1 x 1 px. Raises DatasetError.
    """
    source, problems = split.annotations, defaultdict(list)
    content = _read_yaml(source, read_bytes)
    names = _class_names(source, content)
    columns = 5 if "kpt_shape" in content else None  # keypoints follow a box
    parse = partial(_parse_row, classes=len(names), columns=columns)
    places = _places(source, content, split.name)
    files = _image_files(split, places, read_bytes)
    labels = [_read_rows(split, file, read_bytes, parse, problems) for file in files]
    if all(rows is None for rows in labels):
        missing = [f"{split.images / file}: there is no {split.images / _label_file(file)}" for file in files]
        problems["images without a label file, which are all (images/a.jpg has labels/a.txt)"] = missing
    named = [(f"image {number} ({file})", file) for number, file in enumerate(files, 1)]
    sizes, missing = read_sizes(named, split, problems if look_at_files else defaultdict(list))
    if all(place.is_dir() for _, place in places) and (lonely := _lonely_label_files(split.images, files)):
        read_bytes.repairs["label files without an image (or one of an unknown extension), left out"] = lonely
    if LEAVING in problems:
        problems[f"{LEAVING} (make `path` in {source.name} a folder that has all)"] = problems.pop(LEAVING)
    raise_problems(source, problems, missing, split.images)
    scenes = []
    for number, (file, rows, size) in enumerate(zip(files, labels, sizes, strict=True), 1):
        w, h = size or (1, 1)
        objects = [{"name": names[c], "bbox": _scaled(box, (w, h, w, h))} for c, box in rows or ()]
        scenes.append(({"id": number, "file_name": file, "width": w, "height": h}, objects))
    return coco_content(scenes, names)


def _read_yaml(source: Path, read: Callable[[Path], bytes]) -> dict:
    """Return the keys and values of data.yaml, none if it has another form. Raises DatasetError."""
    try:
        content = yaml.safe_load(decode(read(source)))
    except (OSError, RecursionError, ValueError, yaml.YAMLError) as error:
        raise DatasetError(f"{source}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    return content if isinstance(content, dict) else {}


def _class_names(source: Path, content: dict) -> list[str]:
    """Return `names`, or 0 to `nc` - 1 if there are none. Raises DatasetError."""
    names, count = content.get("names"), content.get("nc")
    if names is None and type(count) is int:
        names = list(range(count))
    if isinstance(names, dict) and names.keys() == set(range(len(names))):
        names = [names[c] for c in range(len(names))]
    if not isinstance(names, list) or not names or not all(type(name) in (str, int) for name in names):
        wanted = "a list of names, or one for each number from 0 on; words such as no, yes and null need quotes"
        raise DatasetError(f"{source}: names is {VALUE.repr(names)}, not {wanted}")
    if count not in (None, len(names)):
        raise DatasetError(f"{source}: nc is {VALUE.repr(count)}, but names has {len(names)} classes")
    if twice := [name for name, times in Counter(map(str, names)).items() if times > 1]:
        raise DatasetError(f"{source}: names has {', '.join(map(VALUE.repr, twice))} twice")
    return [str(name) for name in names]


def _places(source: Path, content: dict, name: str) -> list[tuple[Path, Path]]:
    """Return base folder and path of each folder or text file that data.yaml names for a split. Raises DatasetError."""
    key = next((key for key in KEYS[name] if content.get(key)), None)
    if key is None:
        return []
    entries = content[key] if isinstance(content[key], list) else [content[key]]
    path = content.get("path") or "."
    if wrong := [value for value in (path, *entries) if not isinstance(value, str)]:
        raise DatasetError(
            f"{source}: {VALUE.repr(wrong[0])} in path or {key} is not the name of a folder or text file"
        )
    bases = [base for base in (source.parent / path, source.parent) if base.is_dir()]  # `path` of another machine: none
    places = []
    for entry in entries:
        # Roboflow writes ../train/images where train/ is beside data.yaml.
        options = [(base, base / e) for base in bases for e in (entry, entry.removeprefix("../"))]
        options = [tuple(Path(os.path.abspath(path)) for path in option) for option in options]
        place = next((option for option in options if option[1].exists()), None)
        if place is None and name == "test":  # which Roboflow writes for sets without one, too
            return []
        if place is None:
            looked = ", ".join(dict.fromkeys(str(path) for _, path in options))
            raise DatasetError(f"{source}: {key}: {entry} is not there (looked for {looked}); correct or remove it")
        places.append(place)
    return places


def _above_images(folder: Path) -> Path:
    """Return the folder that has both images/ and labels/ of a folder with images."""
    above, images, _ = f"{folder.as_posix()}/".rpartition("/images/")
    return Path(f"{above}/") if images else folder


def _image_files(split: Split, places: list[tuple[Path, Path]], read_bytes: ReadBytes) -> list[str]:
    """Return the names of all images relative to the split's folder, sorted. Raises DatasetError if there are none."""
    paths = []
    for base, place in places:
        if place.is_dir():
            for folder, folders, files in os.walk(place, followlinks=True):  # links are refused when they are read
                folders[:] = [name for name in folders if not name.startswith(".")]
                images = (name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
                paths += [os.path.join(folder, name) for name in images]
        else:
            try:
                lines = [line.strip() for line in decode(read_bytes(place)).splitlines()]
            except ValueError as error:
                raise DatasetError(f"{place}: cannot be read: {error}") from error
            for line in filter(None, lines):
                options = [os.path.join(folder, line) for folder in (place.parent, base)]
                paths.append(next(filter(os.path.exists, options), options[0]))
    if not paths:
        searched = ", ".join(str(place) for _, place in places)
        raise DatasetError(
            f"{split.annotations}: no images ({' '.join(IMAGE_SUFFIXES)}) for {split.name} in {searched}"
        )
    return sorted(PurePosixPath(os.path.relpath(path, split.images)).as_posix() for path in paths)


def _label_file(image_file: str) -> str:
    path = "/labels/".join(f"/{image_file}".rsplit("/images/", 1))[1:]
    return os.path.splitext(path)[0] + ".txt"


def _lonely_label_files(root: Path, files: list[str]) -> list[str]:
    """Return the label files that are beside those of `files`, but of none of them."""
    known = {_label_file(file) for file in files}
    folders = {os.path.dirname(label) for label in known} - {os.path.dirname(file) for file in files}
    present = (path.relative_to(root).as_posix() for folder in folders for path in (root / folder).glob("*.txt"))
    return sorted(path for path in present if path not in known and not path.endswith("/classes.txt"))


def _read_rows(
    split: Split, file: str, read_bytes: ReadBytes, parse: Callable[[list[str]], Row], problems: Problems
) -> list[Row] | None:
    """Return the rows of an image's label file, None if there is none. `problems` names what cannot be read."""
    label_file = _label_file(file)
    path = split.images / label_file
    read_bytes.digest.update(os.fsencode(file))  # the images' order, and which label file is whose
    try:
        content = read_bytes(path_inside(split.images, label_file, split.follow_links))
        lines = decode(content).splitlines() if content.strip() else []
    except (OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError) and error.errno:  # a link to nothing has no errno
            return None
        problems["label files that cannot be read"].append(f"{path}: {error}")
        lines = []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [parse(line.split())] if line.strip() else []
        except ValueError as error:
            problems[str(error)].append(f"{path}, line {number}: {line}")
    return rows


def _parse_row(tokens: list[str], classes: int, columns: int | None) -> Row:
    """Return the row without what follows `columns`. Raises ValueError with the kind of problem."""
    try:
        kind, *numbers = map(float, tokens[:columns])
    except ValueError:
        numbers = []
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise ValueError("rows that are not `class cx cy w h` or a polygon `class x1 y1 x2 y2 x3 y3 ...` in numbers")
    if not (0 <= kind < classes and kind == int(kind)):
        raise ValueError(f"rows whose class is not a whole number from 0 to {classes - 1}")
    if not all(-TOLERANCE <= number <= 1 + TOLERANCE for number in numbers):
        raise ValueError("rows with numbers outside of 0 to 1 (in px? Wanted are fractions of the image's sides)")
    if len(numbers) == 4:
        x, y, w, h = numbers
        return int(kind), (x - w / 2, y - h / 2, w, h)
    left, top = min(numbers[::2]), min(numbers[1::2])
    return int(kind), (left, top, max(numbers[::2]) - left, max(numbers[1::2]) - top)


def _scaled(box: tuple[float, ...], sides: tuple[int, ...]) -> list[float]:
    return [round(share * side, DIGITS) for share, side in zip(box, sides, strict=True)]
