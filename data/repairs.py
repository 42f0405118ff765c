"""Repairs of the content of a COCO file, only where its meaning is certain. A box is x, y, width, height in px.

m annotations, n images. Nothing is repaired in silence: each function returns the rows or fields that it changed.
"""

from collections.abc import Collection, Iterator
from itertools import count

import numpy as np

OUTSIDE_TOLERANCE_PX = 1  # rounding: boxes up to so far outside are clipped in training, and not reported
MOST_LOST, FEWEST_LOST = 0.2, 5  # so many boxes with less than half of them in their image: other units, not borders
FAR_OVER = 1.05  # of a side: further than a box drawn carelessly over the border
LEAST_COVER = 1e-3  # of its box, by an object: a line of one pixel through a box of 640 x 640 px covers twice as much
WHOLE_FLOATS = 2**53  # beyond it, neighbouring integers are the same float

# Kinds of repairs, with what is done; NOT_TURNED and UNITS are of problems.
FLOAT_ID = "ids that are whole numbers in another type, taken as integers"
NO_ID = "missing annotation ids, numbered"
NO_SIZE = "sizes of images that are missing or 0, taken from their files"
ISCROWD = "iscrowd in another type, taken as 0 or 1"
TURNED = "sizes from before the EXIF rotation, boxes from after it or none, width and height swapped"
NOT_TURNED = (
    "sizes from before the EXIF rotation, and boxes perhaps too (if so, remove the orientation from the files with "
    "exiftool -Orientation= FILE; if not, swap width and height in these records)"
)
CLIPPED = f"boxes more than {OUTSIDE_TOLERANCE_PX} px outside their image, clipped"
OUTSIDE = "boxes wholly outside their image, dropped"
EMPTY = "boxes without width or height, or with numbers that are not finite, dropped"
UNITS = "x, y, width, height in px of the recorded size? Two corners, or another size, would give this"
AREA = "areas that are missing or cannot be those of their boxes, computed from the boxes"
GROUPING = "categories that only group the others, left out unless the detector has them"
ABSENT = "categories of the training that the file lacks, added"


def free_ids(records: list) -> Iterator[int]:
    """Yield the integers from 1 on that no record has as its id."""
    ids = (record.get("id") for record in records if isinstance(record, dict))
    taken = {value for value in ids if isinstance(value, int | float)}
    yield from (number for number in count(1) if number not in taken)


def repair_fields(record: dict, id_fields: Collection[str], free: Iterator[int] | None) -> tuple[dict, dict[str, str]]:
    """Return the record with ids and `iscrowd` as integers, an id of `free` where it has none, and for each kind of
    repair what was done. A string is not repaired: "7" and "007" may be two ids."""
    done = {}
    if free and record.get("id") is None:
        record = record | {"id": next(free)}
        done[NO_ID] = f"id {record['id']}"
    if floats := {name: int(value) for name in id_fields if _is_whole(value := record.get(name))}:
        record = record | floats
        done[FLOAT_ID] = ", ".join(f"{name} {value}" for name, value in floats.items())
    crowd = record.get("iscrowd", 0)
    if crowd is None or (type(crowd) is not int and crowd in (0, 1)):
        record = record | {"iscrowd": int(crowd or 0)}
        done[ISCROWD] = f"iscrowd {crowd} is {record['iscrowd']}"
    return record, done


def _is_whole(value: object) -> bool:
    return type(value) is float and value.is_integer() and abs(value) <= WHOLE_FLOATS


def fits_only_as_shown(boxes: np.ndarray, stored: tuple[int, int]) -> bool:
    """Return whether an image whose EXIF orientation turns `stored` width and height is certain to have its boxes
    (k, 4), finite, in the image as it is shown: there are none, or all fit that, and one reaches far over `stored`.

    Both occur: labelme2coco (its pull request 9) wrote the stored size beside boxes in the image as shown, others have
    boxes in the image as stored (detectron2, issue 5366), or scaled by the wrong sides (Label Studio, issue 6608).
    So a box that fits both ways tells nothing.
    """
    with np.errstate(over="ignore"):
        ends = boxes[:, :2] + boxes[:, 2:]
    inside = (ends <= np.array(stored[::-1]) + OUTSIDE_TOLERANCE_PX).all()
    return not len(boxes) or bool(inside and (ends > FAR_OVER * np.array(stored)).any())


def grouping_category(categories: list[dict], used_ids: Collection[int]) -> dict | None:
    """Return the category that nothing uses and all others name as `supercategory`, as in Roboflow's exports."""
    for category in (category for category in categories if category["id"] not in used_ids):
        groups = [other.get("supercategory") for other in categories if other is not category]
        if groups and groups == [category["name"]] * len(groups):
            return category


def absent_categories(categories: list[dict], known: dict[int, str]) -> list[dict]:
    """Return the `known` categories, id -> name, that `categories` lacks, none if it has others than these."""
    own = {(category["id"], category["name"]) for category in categories}
    return [{"id": i, "name": name} for i, name in sorted(known.items() - own)] if own <= known.items() else []


def clipped_corners(boxes: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (m, 4) float32 x1 y1 x2 y2 clipped to images of `limits` (m, 2) width and height, and (m,) whether a box
    is finite and has an area there."""
    corners = boxes.copy()
    with np.errstate(over="ignore", invalid="ignore"):
        corners[:, 2:] += corners[:, :2]
        corners = corners.clip(0, np.tile(limits, 2), out=corners).astype(np.float32)
    return corners, np.isfinite(boxes).all(1) & (corners[:, 2:] > corners[:, :2]).all(1)


def repair_boxes(boxes: np.ndarray, areas: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict, dict]:
    """Return boxes and areas repaired, and the rows (m,) bool of each kind of repair, and of each kind of problem.

    boxes (m, 4), areas (m,), limits (m, 2) width and height of the images in px. Boxes to be dropped stay as they are.
    """
    starts, sides = boxes[:, :2], boxes[:, 2:]
    usable, real = clipped_corners(boxes, limits)[1], np.isfinite(boxes).all(1) & (sides > 0).all(1)
    with np.errstate(over="ignore", invalid="ignore"):
        ends, sizes = starts + sides, sides.prod(1)
        first, last = starts.clip(0, limits), ends.clip(0, limits)
        inside = (last - first).prod(1)
        sticking_out = real & ((starts < -OUTSIDE_TOLERANCE_PX) | (ends > limits + OUTSIDE_TOLERANCE_PX)).any(1)
        lost = sticking_out & (inside < 0.5 * sizes)
        wholly_outside = real & ((ends <= 0) | (starts >= limits)).any(1)
        fits = (areas >= LEAST_COVER * sizes) & (areas <= (sides + 1).prod(1))  # False for NaN
    clipped, wrong_area = sticking_out & usable, usable & ~fits
    rows = {CLIPPED: clipped, OUTSIDE: wholly_outside, EMPTY: ~usable & ~wholly_outside, AREA: wrong_area}
    share = lost.sum() / max(1, real.sum())
    too_many = lost.sum() >= FEWEST_LOST and share >= MOST_LOST
    problems = {f"boxes with less than half inside their image, {share:.0%} of all ({UNITS})": lost & too_many}
    boxes = np.where(clipped[:, None], np.concatenate([first, last - first], 1), boxes)
    sizes = np.where(clipped, inside, sizes)
    areas = np.where(wrong_area | (clipped & (areas > sizes)), sizes, areas)
    return boxes, areas, rows, problems
