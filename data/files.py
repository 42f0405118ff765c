"""JSON, and names of files, which may lead out of their folder or differ a little from the names on the disk."""

import json
import os
import re
import reprlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from urllib.parse import unquote

from errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".mpo", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif")
FILES_WALKED, WAYS_SHOWN = 200_000, 5

VALUE = reprlib.Repr()  # cuts values for messages; repr() itself raises RecursionError where nesting is deep
VALUE.maxstring = VALUE.maxother = 200


def printable(text: object) -> str:
    """Return `text` with escapes for what acts on a terminal (control characters, line breaks) or cannot be encoded."""
    unsafe, joiners = ("Cc", "Cf", "Cs", "Zl", "Zp"), "\u200c\u200d"  # many languages and emoji need the joiners
    return "".join(repr(c)[1:-1] if unicodedata.category(c) in unsafe and c not in joiners else c for c in str(text))


class DatasetError(UserError):
    """Something is wrong with the data; the message names the file, the record and the remedy."""


def parse_json(text: str) -> object:
    """Return the value of a JSON text. Raises ValueError with one sentence for any fault, also a key given twice."""

    def make_object(pairs: list[tuple[str, object]]) -> dict:
        made = dict(pairs)
        if len(made) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise KeyError(f"the key {VALUE.repr(twice)} is given twice in {VALUE.repr(made)}")
        return made

    try:
        return json.loads(text, object_pairs_hook=make_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except (KeyError, RecursionError, ValueError) as error:
        why = {RecursionError: "lists or objects are nested too deeply", ValueError: "a number has thousands of digits"}
        raise ValueError(f"not usable JSON: {why.get(type(error), error.args[0])}") from error


def decode(content: bytes) -> str:
    """Return the text of a file in UTF-8, UTF-16 or UTF-32. Raises ValueError with one sentence."""
    if not content.strip(b"\0\t\n\r "):
        raise ValueError(f"the file is empty: {len(content)} bytes, all of them blank or NUL")
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = f"byte 0x{content[error.start]:02x} in line {line}"
        remedy = "Save it as UTF-8; it may be in another encoding, such as GBK or Latin-1"
        raise ValueError(f"the file is not text in {encoding.upper()}: {byte}. {remedy}") from error


def leaves_folder(name: str) -> bool:
    """Return whether `name` is absolute or leads out by `..`; links are not followed."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == ".."


def path_inside(folder: Path, name: str, follow_links: bool = False) -> Path:
    """Return the path of file `name` in a folder, which may itself be a link. Raises FileNotFoundError for a link to
    nothing, ValueError for NUL, DatasetError if `name` leaves the folder, by a link only without `follow_links`."""
    if leaves_folder(name):
        raise DatasetError(f"{name!r} leaves the folder {folder}")
    real = os.path.realpath(folder)
    path = os.path.join(real, os.path.normpath(name))
    target = os.path.realpath(path)
    if target != path and not os.path.exists(target):
        raise FileNotFoundError(f"{name!r} is a link to {target}, which is not there")
    if not follow_links and not Path(target).is_relative_to(real):
        raise DatasetError(f"{name!r} leaves the folder {folder}: a link to {target}; --follow-links reads it")
    return Path(path)


SUFFIX = re.compile(f"(?<=[^/])({'|'.join(map(re.escape, IMAGE_SUFFIXES))})$", re.IGNORECASE)
# How a missing name may differ from a path on disk, in words, and a form in which both agree. Applied in this order.
CHANGES: dict[str, Callable[[str], str]] = {
    "with %20 and the like decoded": unquote,
    "with / for \\": lambda path: path.replace("\\", "/"),
    "without blanks at the ends": str.strip,
    "in another Unicode form (NFC, NFD)": lambda path: unicodedata.normalize("NFC", path),
    "with upper and lower case changed": str.casefold,
    "with another extension": lambda path: SUFFIX.sub("", path),
}


def near_misses(names: list[str], folder: Path) -> list[str]:
    """Return a line for each way (some of CHANGES, another folder) in which files missing in `folder` would be found.

    Of FILES_WALKED files in `folder` and then beside it, the one that shares the most trailing parts of a name counts.
    """
    file_names, known = {_parts(name)[0] for name in names}, {}
    for path in islice(_walk(folder), FILES_WALKED) if names else ():
        parts = _parts(path)
        for count in range(1, len(parts) + 1) if parts[0] in file_names else ():
            known.setdefault(parts[:count], path)
    ways = defaultdict(list)
    for name, parts in zip(names, map(_parts, names), strict=True):
        if shared := next((count for count in range(len(parts), 0, -1) if parts[:count] in known), 0):
            path = known[parts[:shared]]
            ways[_way(name, path, shared, folder)].append(f"{path} for {name}")
    ways.pop("", None)  # the file has appeared since
    ranked = sorted(ways.items(), key=lambda item: -len(item[1]))
    lines = [f"{len(e)} of the {len(names)} missing files would be found {w}: {e[0]}" for w, e in ranked[:WAYS_SHOWN]]
    more = sum(len(examples) for _, examples in ranked[WAYS_SHOWN:])
    return lines + [f"and {more} more in other ways"] * (more > 0)


def _walk(folder: Path) -> Iterator[str]:
    """Yield paths of files in `folder`, then of those beside it, relative to `folder`, with / on every system."""
    for top in (folder, folder.absolute().parent):
        for place, folders, files in islice(os.walk(top), FILES_WALKED):
            folders[:] = sorted(n for n in folders if top == folder or Path(place, n) != folder.absolute())
            relative = Path(os.path.relpath(place, folder)).as_posix()
            yield from (name if relative == "." else f"{relative}/{name}" for name in sorted(files))


def _parts(path: str, changes: Iterable[str] = CHANGES) -> tuple[str, ...]:
    """Return the file's name, its folders from the innermost on, and "" for the start, after the changes."""
    for change in changes:
        path = CHANGES[change](path)
    return (*path.split("/")[::-1], "")


def _way(name: str, path: str, shared: int, folder: Path) -> str:
    """Describe the changes that `name` needs to agree with `path` in its `shared` trailing parts, and the folder."""
    changes = list(CHANGES)
    for change in reversed(CHANGES):
        fewer = [other for other in changes if other != change]
        if _parts(name, fewer)[:shared] == _parts(path, fewer)[:shared]:
            changes = fewer
    before, after = ("/".join(["", *re.split(r"[\\/]", text)][1:-shared]) for text in (name, path))
    if after:
        changes += [f"in the folder {os.path.normpath(folder / after)}" + (f" in place of {before}" if before else "")]
    elif before:
        changes += [f"without the folder {before}"]
    return " and ".join(changes)
