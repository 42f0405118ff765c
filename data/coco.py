"""Images and boxes of one split of a data set.

`CocoDataset` takes it in COCO layout, which `Split.read` turns every other form into.
Inside, class ids are contiguous, 0..C-1 in the order of the file's own ids, and boxes are
x1 y1 x2 y2 in px; the file's ids and names stay at hand for the output.
"""

import hashlib
import multiprocessing
import sys
from collections.abc import Callable, Collection
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors

from data.checks import DatasetError, check_annotations
from data.files import path_inside, printable
from data.splits import Split
from data.transforms import resized_size
from images import load_image

IGNORE = -1  # the label of regions that teach nothing, inside the data set and its transform
MAX_BAD_SHARE, MIN_BAD_CAP = 0.01, 10


class CocoDataset(torch.utils.data.Dataset):
    """One split: image i and its boxes, checked at the start (see `check_annotations`).

    class_names    class c -> name
    category_ids   class c -> the file's own id, ascending
    images         id, file_name, width, height of each image, in file order
    grouping       the category that was left out because it only groups the others, None as a rule
    dropped_boxes  boxes left out: width or height <= 0 px after clipping, or not finite
    num_boxes      boxes that are targets
    crowd_boxes    iscrowd regions; these are no targets, but regions to ignore
    """

    def __init__(
        self,
        split: Split,
        transform: Callable | None = None,
        ignore_crowd: bool = True,
        bad_images: str = "stop",
        first: int | None = None,
        known_ids: Collection[int] = (),
    ) -> None:
        """Raises DatasetError.

        transform: a torchvision.transforms.v2 callable on (image, target); the boxes that it is given end with
        the regions to ignore, whose label is IGNORE
        ignore_crowd: targets name crowd regions as `ignore`; otherwise these are background
        bad_images: "stop" raises DatasetError at the first image that cannot be used; "skip" says which one it is and
        takes the next good one in file order, until more than MAX_BAD_SHARE of the images, and MIN_BAD_CAP, were bad
        first: only so many images, the first ones that have boxes
        known_ids: category ids of a detector or of the training part, which are never left out, see `_grouping`
        """
        self.split, self.first = split, first
        self.transform = transform
        if not split.images.is_dir():
            raise DatasetError(
                f"{split.annotations.absolute()} is there, but its image folder {split.images.absolute()} is not"
            )
        content = split.read(look_at_files=bad_images == "stop")
        look_at_files = bad_images == "stop" and not split.is_crowdhuman  # whose headers have just been read
        check_annotations(content, split.images, split.annotations, look_at_files, split.follow_links)
        self.grouping = _grouping(content, known_ids)
        content = self._cut(content)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.class_names = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.images = [{k: i[k] for k in ("id", "file_name", "width", "height")} for i in content["images"]]
        # Loader workers are forks: reading a Python object there counts references, which copies its
        # page into every worker. So what __getitem__ reads lies in a few arrays.
        self._image_ids = np.array([image["id"] for image in self.images], np.int64)
        self._file_names = np.array([image["file_name"] for image in self.images])
        self._sizes = np.array([(image["height"], image["width"]) for image in self.images], np.int64)
        # The images that were skipped, in shared memory: the loader's workers count together.
        self._bad = torch.zeros(len(self.images), dtype=torch.bool).share_memory_() if bad_images == "skip" else None
        self._bad_lock = multiprocessing.Lock() if bad_images == "skip" else None
        targets = [record for record in content["annotations"] if not record.get("iscrowd", 0)]
        crowds = [record for record in content["annotations"] if record.get("iscrowd", 0)]
        self._pack_boxes(targets, crowds if ignore_crowd else [])
        self.crowd_boxes = len(crowds)

    def _pack_boxes(self, targets: list[dict], ignored: list[dict]) -> None:
        """Boxes of all images, one image after the other; image i owns rows _offsets[i] to _offsets[i+1], those
        to ignore last."""
        records = targets + ignored
        image_of = {image_id: i for i, image_id in enumerate(self._image_ids.tolist())}
        class_of = {category_id: c for c, category_id in enumerate(self.category_ids)}
        owner = np.array([image_of[record["image_id"]] for record in records], np.int64)
        labels = np.array([class_of[record["category_id"]] for record in records], np.int64)
        labels[len(targets) :] = IGNORE
        boxes = np.array([record["bbox"] for record in records], np.float64).reshape(-1, 4)

        finite = np.flatnonzero(np.isfinite(boxes).all(1))
        owner, labels, boxes = owner[finite], labels[finite], boxes[finite]
        boxes[:, 2:] += boxes[:, :2]
        height, width = self._sizes[owner].T
        boxes = boxes.clip(0, np.stack([width, height, width, height], 1)).astype(np.float32)
        kept = np.flatnonzero((boxes[:, 2:] > boxes[:, :2]).all(1))

        rows = kept[np.argsort(owner[kept], kind="stable")]
        self._boxes, self._labels = boxes[rows], labels[rows]
        self._offsets = np.searchsorted(owner[rows], np.arange(len(self.images) + 1))
        kept_ids = {records[row]["id"] for row in finite[rows].tolist()}
        self._dropped_ids = {record["id"] for record in targets} - kept_ids
        self.num_boxes, self.dropped_boxes = int((self._labels != IGNORE).sum()), len(self._dropped_ids)

    @property
    def classes(self) -> dict[str, list]:
        return {"class_names": self.class_names, "category_ids": self.category_ids}

    @property
    def digest(self) -> str:
        digest = hashlib.sha256()
        for path in self.split.files():
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def resized_sizes(self, image_size: tuple[int, int]) -> np.ndarray:
        """(len, 2) height and width of every image in px after it was resized for training or evaluation."""
        sizes, which = np.unique(self._sizes, axis=0, return_inverse=True)
        return np.array([resized_size(height, width, image_size) for height, width in sizes.tolist()])[which]

    def share_under(self, side_px: float, image_size: tuple[int, int]) -> float:
        """Share of the targets whose shorter side is under `side_px` once their images are resized."""
        scale = self.resized_sizes(image_size) / self._sizes
        sides = (self._boxes[:, 2:] - self._boxes[:, :2]) * np.repeat(scale[:, ::-1], np.diff(self._offsets), axis=0)
        return float((sides.min(1) < side_px)[self._labels != IGNORE].mean())

    @cached_property
    def annotations(self) -> dict:
        """The file, for pycocotools' ground truth; read again when first asked for, as COCO's polygons
        would cost every training process gigabytes.

        Dropped boxes are no objects here either; a record without `iscrowd` gets 0.
        """
        content = self._cut(self.split.read())
        records = [record for record in content["annotations"] if record["id"] not in self._dropped_ids]
        for record in records:
            record.setdefault("iscrowd", 0)
        return content | {"annotations": records}

    def _cut(self, content: dict) -> dict:
        """A file's content without the grouping category, and with its first images only where that is wanted."""
        categories = [category for category in content["categories"] if category != self.grouping]
        return _first_images(content | {"categories": categories}, self.first)

    @property
    def tall(self) -> list[bool]:
        """Which images are higher than wide."""
        return (self._sizes[:, 0] > self._sizes[:, 1]).tolist()

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, dict]:
        """The uint8 (3, H, W) image and its target, both after the transform:

        boxes (n, 4) float32 BoundingBoxes, labels (n,) int64, ignore (m, 4) float32 BoundingBoxes (crowd
        regions), image_id the file's own, and orig_size (H, W) in px from before the transform.
        Raises DatasetError: the file is missing, broken, outside the folder or of another size; or too many are.
        """
        i, image = self._load(i) if self._bad is None else self._load_next_good(i)
        height, width = self._sizes[i].tolist()
        rows = slice(self._offsets[i], self._offsets[i + 1])
        target = {
            "boxes": tv_tensors.BoundingBoxes(
                torch.from_numpy(self._boxes[rows].copy()), format="XYXY", canvas_size=(height, width)
            ),
            "labels": torch.from_numpy(self._labels[rows].copy()),
            "image_id": int(self._image_ids[i]),
            "orig_size": (height, width),
        }
        image = tv_tensors.Image(image)
        if self.transform:
            image, target = self.transform(image, target)
        return image, _split_ignored(target)

    def _load(self, i: int) -> tuple[int, Tensor]:
        """i and its image. Raises DatasetError."""
        image_id, (height, width) = int(self._image_ids[i]), self._sizes[i].tolist()
        try:
            image = load_image(path_inside(self.split.images, str(self._file_names[i]), self.split.follow_links))
        except (OSError, ValueError) as error:
            raise DatasetError(printable(f"{self.split.annotations}, image {image_id}: {error}")) from error
        if image.shape[1:] != (height, width):
            raise DatasetError(
                f"{self.split.annotations}, image {image_id} ({printable(self._file_names[i])}): {width} x {height} in"
                f" the record, {image.shape[2]} x {image.shape[1]} in the file with its EXIF orientation applied"
            )
        return i, image

    def _load_next_good(self, i: int) -> tuple[int, Tensor]:
        """The first good image from i on, in file order and around its end. Raises DatasetError above the cap."""
        for candidate in chain(range(i, len(self)), range(i)):
            try:
                return self._load(candidate)
            except DatasetError as error:
                self._count_bad(candidate, error)
        raise DatasetError(f"{self.split.annotations}: not one image can be used")

    def _count_bad(self, i: int, error: DatasetError) -> None:
        """Say that image i is skipped, once; raise DatasetError above the cap."""
        with self._bad_lock:
            if self._bad[i]:
                return
            self._bad[i] = True
            count, cap = int(self._bad.sum()), max(MIN_BAD_CAP, int(MAX_BAD_SHARE * len(self)))
            if count <= cap:  # one write, or the lines of two workers mix
                sys.stderr.write(f"skipped bad image {count} (at most {cap}): {error}\n")
                sys.stderr.flush()
                return
        raise DatasetError(
            f"{count} images cannot be used, and --bad-images skip takes {cap} at most; the latest: {error}"
        ) from error


def _grouping(content: dict, known_ids: Collection[int]) -> dict | None:
    """The category that no annotation uses and that all others name as their `supercategory`, as in Roboflow's exports;
    it would be a class that is never learned."""
    used = {record["category_id"] for record in content["annotations"]} | set(known_ids)
    for category in content["categories"]:
        others = [other for other in content["categories"] if other is not category]
        if others and category["id"] not in used and all(o.get("supercategory") == category["name"] for o in others):
            return category
    return None


def _first_images(content: dict, count: int | None) -> dict:
    """A file's content cut down to its first `count` images with boxes; None leaves all."""
    if count is None:
        return content
    with_boxes = {record["image_id"] for record in content["annotations"] if not record.get("iscrowd", 0)}
    images = [image for image in content["images"] if image["id"] in with_boxes][:count]
    kept = {image["id"] for image in images}
    annotations = [record for record in content["annotations"] if record["image_id"] in kept]
    return content | {"images": images, "annotations": annotations}


def _split_ignored(target: dict) -> dict:
    """The target with the boxes labelled IGNORE taken out, as `ignore`."""
    boxes, ignored = target["boxes"], target["labels"] == IGNORE
    return target | {
        "boxes": tv_tensors.wrap(boxes[~ignored], like=boxes),
        "labels": target["labels"][~ignored],
        "ignore": tv_tensors.wrap(boxes[ignored], like=boxes),
    }


def collate(batch: list[tuple[Tensor, dict]]) -> tuple[list[Tensor], list[dict]]:
    """Images (3, H, W) uint8 of different sizes and their targets, as lists of plain tensors."""
    images = [image.as_subclass(Tensor) for image, _ in batch]
    targets = [target | {name: target[name].as_subclass(Tensor) for name in ("boxes", "ignore")} for _, target in batch]
    return images, targets
