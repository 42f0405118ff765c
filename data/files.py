"""Text that others wrote: JSON, and names of files, which may leave their folder or not quite be those on disk."""

import json
import os
import re
import reprlib
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, islice, product, takewhile
from pathlib import Path
from urllib.parse import unquote

from errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FILES_WALKED, WAYS_SHOWN = 200_000, 5

# A value in a message: what is long or nested is cut. Python's repr raises RecursionError where nesting is deep.
VALUE = reprlib.Repr()
VALUE.maxstring = VALUE.maxother = 200


def printable(text: object) -> str:
    """`text` on one line of a terminal: what would act on it (control characters, line breaks, marks of direction) or
    cannot be encoded (lone surrogates) is escaped as in Python."""
    return "".join(repr(c)[1:-1] if _acts(c) else c for c in str(text))


def _acts(character: str) -> bool:
    joiner = character in "\u200c\u200d"  # many languages and emoji are written with these
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and not joiner


class DatasetError(UserError):
    """Something is wrong with the data; the message is the whole story, meant for the user."""


def parse_json(text: str) -> object:
    """Raises ValueError with one sentence for everything that Python's parser may raise, and for a key given twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}") from error
    except RecursionError as error:
        raise ValueError("not usable JSON: lists or objects are nested too deeply") from error
    except KeyError as error:
        raise ValueError(f"not usable JSON: {error.args[0]}") from error
    except ValueError as error:
        raise ValueError("not usable JSON: a number has thousands of digits") from error


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise KeyError(f"the key {VALUE.repr(twice)} is given twice in {VALUE.repr(found)}")
    return found


def json_text(content: bytes) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32. Raises ValueError with one sentence."""
    if not content.strip(b"\0\t\n\r "):
        raise ValueError(f"the file is empty: {len(content)} bytes, all of them blank or NUL")
    encoding = json.detect_encoding(content)
    try:
        return content.decode(encoding, "surrogatepass")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"the file is not text in {encoding.upper()}: byte 0x{content[error.start]:02x} in line {line}. Save it as"
            " UTF-8; it may be in another encoding, such as GBK or Latin-1"
        ) from error


def leaves_folder(name: str) -> bool:
    """Whether `name`, links not looked at, is absolute or leads out by `..`."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == ".."


def path_inside(folder: Path, name: str, follow_links: bool = False) -> Path:
    """The file `name` of a folder, which may itself be a link.

    Raises DatasetError where `name` leaves the folder, by a link only without `follow_links`; FileNotFoundError for a
    link to nothing; ValueError where no file can have this name.
    """
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


def _without_suffix(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    return stem if suffix.lower() in IMAGE_SUFFIXES else path


# How a name and a path on disk may differ, in words, and the form in which they do not. Applied in this order.
CHANGES: dict[str, Callable[[str], str]] = {
    "with %20 and the like decoded": unquote,
    "with / for \\": lambda path: path.replace("\\", "/"),
    "without blanks at the ends": str.strip,
    "in another Unicode form (NFC, NFD)": lambda path: unicodedata.normalize("NFC", path),
    "with upper and lower case changed": str.casefold,
    "with another extension": _without_suffix,
}
HERE, DEEPER, BESIDE = range(3)  # in the same folder, in another inside of the image folder, in one beside it


def near_misses(names: list[str], folder: Path) -> list[str]:
    """One line for each way in which files that are missing in `folder` would be found: how many, and an example.

    A way is any of CHANGES, another folder or both, the fewest of them. Looked for in `folder`, then in the folders
    beside it, among FILES_WALKED files at most; of files of one name, that with the most folders in common counts.
    """
    if not names:
        return []
    wanted = {_parts(name, CHANGES)[0] for name in names}
    paths = [path for path in islice(_walk(folder), FILES_WALKED) if _parts(path, CHANGES)[0] in wanted]
    known = {_parts(path, CHANGES)[0] for path in paths}
    left, found = [name for name in names if _parts(name, CHANGES)[0] in known], defaultdict(list)
    for changes, place in _ways([*left, *paths]):
        there = sorted((_parts(path, changes), path) for path in paths if path.startswith("../") == (place == BESIDE))
        if not there or not left:
            continue
        names_before, left = left, []
        for name in names_before:
            parts = _parts(name, changes)
            row = bisect_left(there, (parts,))  # no other has more parts in common than this one or that before
            common = max(_common(parts, other) for other, _ in there[max(row - 1, 0) : row + 1])
            other, path = there[bisect_left(there, (parts[:common],))]
            if parts == other or (place != HERE and common):
                words = [*changes, *([_moved(name, path, folder, common)] if place != HERE else [])]
                found[" and ".join(words)].append(f"{path} for {name}")
            else:
                left.append(name)
    found.pop("", None)  # there by now
    ways = sorted(found.items(), key=lambda item: -len(item[1]))
    lines = [f"{len(e)} of the {len(names)} missing files would be found {way}: {e[0]}" for way, e in ways[:WAYS_SHOWN]]
    return lines + [f"and {sum(len(e) for _, e in ways[WAYS_SHOWN:])} more in other ways"] * (len(ways) > WAYS_SHOWN)


def _ways(texts: list[str]) -> list[tuple[tuple[str, ...], int]]:
    """Combinations of those CHANGES that change any of the texts, and of a place; of few changes first."""
    useful = []
    for word, change in CHANGES.items():
        before, texts = texts, list(map(change, texts))
        useful += [word] * (before != texts)
    combined = (changes for count in range(len(useful) + 1) for changes in combinations(useful, count))
    ways = product(combined, (HERE, DEEPER, BESIDE))
    return sorted(ways, key=lambda way: (len(way[0]) + way[1], way[1]))


def _walk(folder: Path) -> Iterator[str]:
    """Paths of the files in `folder`, then of those beside it, relative to `folder`, with / on every system."""
    for top in (folder, folder.absolute().parent):
        for place, folders, files in islice(os.walk(top), FILES_WALKED):
            if top != folder:
                folders[:] = [name for name in folders if Path(place, name) != folder.absolute()]
            folders.sort()
            relative = Path(os.path.relpath(place, folder)).as_posix()
            yield from (name if relative == "." else f"{relative}/{name}" for name in sorted(files))


def _parts(path: str, changes: Iterable[str]) -> list[str]:
    """The file's name, then its folders from the innermost on, after the changes."""
    for change in changes:
        path = CHANGES[change](path)
    return path.split("/")[::-1]


def _common(parts: list[str], others: list[str]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False)))


def _moved(name: str, path: str, folder: Path, common: int) -> str:
    """In which folder, for which that the name has."""
    before, after = ("/".join(re.split(r"[\\/]", text)[:-common]) for text in (name, path))
    if not after:
        return f"without the folder {before}"
    return f"in the folder {os.path.normpath(folder / after)}" + (f" in place of {before}" if before else "")
