"""Images and boxes of one split of a data set: their transforms, and their order in training.

Class ids are contiguous, 0..C-1, boxes x1 y1 x2 y2 in px. An image size is (shorter side, longest side at most) in px:
the shorter side becomes the first number, unless the longer one would then pass the second. Small images are enlarged.
Training data depends on seed and step alone: a run continues at any step, with any number of ranks and loaders.
"""

import hashlib
import multiprocessing
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from data.checks import Records, Split
from data.files import DatasetError, path_inside, printable
from data.forms import read_split
from data.repairs import ABSENT, absent_categories, clipped_corners, grouping_category
from images import load_image

IGNORE = -1  # label of the regions to ignore, inside the data set and its transform
MAX_BAD_SHARE, MIN_BAD_CAP = 0.01, 10  # more bad images than both are an error
AUGMENTATIONS = {
    "none": "resizing only",
    "flip": "horizontal flip",
    "light": "flip, colour jitter and scale jitter",
    "strong": "light's, zoom-out and IoU crop",
}
JITTERED = ("light", "strong")
SCALE_JITTER = 0.8, 1.25  # of the shorter side
COLOUR_JITTER = 0.125, 0.5, 0.5, 0.05  # brightness, contrast, saturation, hue: SSD's without its swapped channels
ZOOM_OUT, MEAN_COLOUR = (1.0, 2.0), (124, 116, 104)  # sides of the canvas; ImageNet's mean, nearly 0 once normalised


class CocoDataset(torch.utils.data.Dataset):
    """One split: image i and its boxes, checked at the start (see `check_annotations`). Raises DatasetError.

    class_names    class c -> name
    category_ids   class c -> the file's own id, ascending; `classes` has both
    tall           whether each image is higher than wide
    grouping       the category that was left out because it only groups the others, None as a rule
    num_boxes      boxes that are targets
    crowd_boxes    iscrowd boxes: regions to ignore, not targets
    dropped_boxes  boxes left out: width or height <= 0 px after clipping, or not finite
    repairs        kind of repair of the annotation file -> one line for each culprit
    """

    def __init__(
        self,
        split: Split,
        transform: Callable | None = None,  # of torchvision's v2, on (image, target), regions to ignore labelled IGNORE
        bad_images: str = "stop",  # or "skip": report images that cannot be used, and take the next good ones instead
        first: int | None = None,  # only so many images, the first ones that have boxes
        known: dict | None = None,  # class_names and category_ids of a detector or the training split
        records: Records | None = None,  # of the split, if it was read before
    ) -> None:
        self.split, self.transform = split, transform
        records = read_split(split, bad_images == "stop") if records is None else records
        names = dict(zip(known["category_ids"], known["class_names"], strict=True)) if known else {}
        self.grouping = grouping_category(records.categories, {*np.unique(records.category_ids).tolist(), *names})
        categories = [category for category in records.categories if category != self.grouping]
        absent = [] if split.strict else absent_categories(categories, names)
        lines = [f"category {category['id']} {printable(category['name'])}" for category in absent]
        self.digest, self.repairs = records.digest, records.repairs | ({ABSENT: lines} if lines else {})
        records = self._used = records if first is None else records.first_images(first)
        self.categories = sorted(categories + absent, key=lambda category: category["id"])
        self.class_names = [category["name"] for category in self.categories]
        self.category_ids = [category["id"] for category in self.categories]
        self.classes = {"class_names": self.class_names, "category_ids": self.category_ids}
        # Loader workers are forks, where counting references to Python objects copies pages: __getitem__ reads arrays.
        self._image_ids, self._file_names, self._sizes = records.image_ids, records.file_names, records.sizes
        self.tall = (self._sizes[:, 0] > self._sizes[:, 1]).tolist()
        self._bad = None
        if bad_images == "skip":  # the images that were skipped, in shared memory: the loader's workers count together
            self._bad = torch.zeros(len(self), dtype=torch.bool).share_memory_()
            self._bad_lock = multiprocessing.Lock()

        # Image i has rows _offsets[i] to _offsets[i+1] of _boxes and _labels, the regions to ignore last.
        boxes, self._valid = clipped_corners(records.boxes, self._sizes[records.owners, ::-1])
        labels = np.where(records.crowd, IGNORE, np.searchsorted(self.category_ids, records.category_ids))
        rows = np.lexsort((records.crowd, records.owners))
        rows = rows[self._valid[rows]]
        self._boxes, self._labels = boxes[rows], labels[rows]
        self._offsets = np.searchsorted(records.owners[rows], np.arange(len(self) + 1))
        self.num_boxes, self.crowd_boxes = int((self._labels != IGNORE).sum()), int(records.crowd.sum())
        self.dropped_boxes = int((~self._valid & ~records.crowd).sum())

    @property
    def class_counts(self) -> list[int]:
        """Class c -> number of its boxes that are targets."""
        return np.bincount(self._labels[self._labels != IGNORE], minlength=len(self.class_names)).tolist()

    def resized_sizes(self, image_size: tuple[int, int]) -> np.ndarray:
        """Return (len, 2) height and width of every image in px, resized for training or evaluation."""
        sizes, which = np.unique(self._sizes, axis=0, return_inverse=True)
        return np.array([resized_size(*size, tuple(image_size)) for size in sizes.tolist()])[which]

    def share_under(self, side_px: float, image_size: tuple[int, int]) -> float:
        """Return the share of the targets whose shorter side is under `side_px` in the resized images."""
        boxes = self.targets(image_size)[1]
        return float(((boxes[:, 2:] - boxes[:, :2]).min(1) < side_px).mean())

    def targets(self, image_size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Return image index (num_boxes,) and box (num_boxes, 4) in px of the resized image of all targets."""
        images = np.repeat(np.arange(len(self)), np.diff(self._offsets))
        scale = (self.resized_sizes(image_size) / self._sizes)[images][:, [1, 0, 1, 0]]
        kept = self._labels != IGNORE
        return images[kept], (self._boxes * scale)[kept]

    @cached_property
    def images(self) -> list[dict]:
        columns = (self._image_ids.tolist(), self._file_names.tolist(), self._sizes.tolist())
        return [{"id": i, "file_name": name, "width": w, "height": h} for i, name, (h, w) in zip(*columns, strict=True)]

    @cached_property
    def annotations(self) -> dict:
        """The content of a COCO file for evaluation: regions to ignore have iscrowd 1, dropped boxes are left out."""
        used, kept = self._used, np.flatnonzero(self._valid)
        fields = {"id": used.ids, "image_id": used.image_ids[used.owners], "category_id": used.category_ids}
        fields |= {"bbox": used.boxes, "area": used.areas, "iscrowd": used.crowd.astype(int)}
        rows = zip(*(column[kept].tolist() for column in fields.values()), strict=True)
        annotations = [dict(zip(fields, row, strict=True)) for row in rows]
        return {"images": self.images, "annotations": annotations, "categories": self.categories}

    def require_classes(self, classes: dict) -> None:
        """Raise DatasetError unless the classes are those in `classes`: class_names, category_ids, and their source."""
        theirs, ours = ({*zip(c["category_ids"], c["class_names"], strict=True)} for c in (classes, self.classes))
        sides = {classes["source"]: theirs - ours, self.split.annotations: ours - theirs}
        examples = {file: [f"{i} {printable(name)}" for i, name in sorted(only)[:5]] for file, only in sides.items()}
        if differences := "; ".join(f"only in {file}: {', '.join(e)}" for file, e in examples.items() if e):
            remedy = "Training and evaluation need the same classes: pass the fitting data set with --data."
            raise DatasetError(f"the classes do not fit: {differences}. {remedy}")

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, i: int) -> tuple[tv_tensors.Image, dict]:
        """Return the uint8 (3, H, W) image and its target, both after the transform. Raises DatasetError.

        boxes (n, 4) float32 BoundingBoxes, labels (n,) int64, ignore (m, 4) float32 BoundingBoxes (regions to ignore),
        image_id the file's own, and orig_size (H, W) in px from before the transform.
        """
        return self._sample(i) if self._bad is None else self._next_good_sample(i)

    def _sample(self, i: int) -> tuple[tv_tensors.Image, dict]:
        image = self.load(i)
        size, rows = tuple(self._sizes[i].tolist()), slice(self._offsets[i], self._offsets[i + 1])
        boxes, labels = (torch.from_numpy(column[rows].copy()) for column in (self._boxes, self._labels))
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size)
        target = {"boxes": boxes, "labels": labels, "image_id": int(self._image_ids[i]), "orig_size": size}
        image = tv_tensors.Image(image)
        if self.transform:
            try:
                image, target = self.transform(image, target)
            except RuntimeError as error:  # such as that of a long thin image, resized to a side of 0 px
                raise DatasetError(f"{self.split.annotations}, image {target['image_id']}: {error}") from error
        boxes, ignored = target["boxes"], target["labels"] == IGNORE
        target["ignore"] = tv_tensors.wrap(boxes[ignored], like=boxes)
        target["boxes"], target["labels"] = tv_tensors.wrap(boxes[~ignored], like=boxes), target["labels"][~ignored]
        return image, target

    def load(self, i: int) -> Tensor:
        """Return image i before the transform. Raises DatasetError, also if the record has another size."""
        source = f"{self.split.annotations}, image {int(self._image_ids[i])}"
        height, width = self._sizes[i].tolist()
        try:
            image = load_image(path_inside(self.split.images, str(self._file_names[i]), self.split.follow_links))
        except (OSError, ValueError) as error:
            raise DatasetError(printable(f"{source}: {error}")) from error
        if image.shape[1:] != (height, width):
            sizes = f"{width} x {height} in the record, {image.shape[2]} x {image.shape[1]} in the file"
            source += f" ({printable(self._file_names[i])})"
            raise DatasetError(f"{source}: {sizes} with its EXIF orientation applied")
        return image

    def _next_good_sample(self, i: int) -> tuple[tv_tensors.Image, dict]:
        """Return the first good sample from i on, around the end of the file; report others once, up to a cap."""
        for candidate in chain(range(i, len(self)), range(i)):
            try:
                return self._sample(candidate)
            except DatasetError as error:
                with self._bad_lock:
                    known = bool(self._bad[candidate])
                    self._bad[candidate] = True
                    count, cap = int(self._bad.sum()), max(MIN_BAD_CAP, int(MAX_BAD_SHARE * len(self)))
                    if not known and count > cap:
                        cause = f"{count} images cannot be used, and --bad-images skip takes {cap} at most"
                        raise DatasetError(f"{cause}; the latest: {error}") from error
                    if not known:  # one write, or the lines of two workers mix
                        sys.stderr.write(f"skipped bad image {count} (at most {cap}): {error}\n")
                        sys.stderr.flush()
        raise DatasetError(f"{self.split.annotations}: not one image can be used")


def train_transform(
    image_size: tuple[int, int], augment: str = "light", sides: Collection[int] | None = None
) -> v2.Transform:
    """Return a transform that resizes, clips, and drops boxes under 1 px a side; `augment` is one of AUGMENTATIONS.

    The shorter side becomes one of `sides` (px) at random, by default of `training_sides`. A crop is made before
    resizing; colours are distorted after it, so that a large photo takes no longer than a small one."""
    sides = training_sides(image_size, augment, sides)
    resize = eval_transform(image_size)
    if sides != [image_size[0]]:
        resize = v2.RandomShortestSize(sides, image_size[1], antialias=True)
    steps = [v2.RandomHorizontalFlip(0.0 if augment == "none" else 0.5), resize]
    if augment in JITTERED:
        steps.append(v2.RandomApply([v2.ColorJitter(*COLOUR_JITTER)]))
    if augment == "strong":
        steps = [v2.RandomZoomOut(MEAN_COLOUR, ZOOM_OUT), Crop(), *steps]
    return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1.0)])


def training_sides(image_size: tuple[int, int], augment: str, sides: Collection[int] | None = None) -> list[int]:
    """Return the shorter sides in px that training draws from: `sides`, or the image size's, or those around it."""
    shorter, longest = image_size
    low, high = SCALE_JITTER if augment in JITTERED else (1, 1)
    return [*(sides or range(round(low * shorter), min(round(high * shorter), longest) + 1))]


class Crop(v2.RandomIoUCrop):
    """SSD's crop. An object stays if its centre, hence a quarter of its area or more, is inside; what is left of any
    other one becomes a region to ignore, as it is neither a target nor background. Regions to ignore are clipped."""

    def forward(self, image: tv_tensors.Image, target: dict) -> tuple[tv_tensors.Image, dict]:
        if not (params := self.make_params([image, target["boxes"]])):
            return image, target
        labels = target["labels"].where(params["is_within_crop_area"], IGNORE)
        params["is_within_crop_area"] = torch.ones_like(labels, dtype=torch.bool)  # torchvision's crop empties others
        boxes = self.transform(target["boxes"], params)
        return self.transform(image, params), target | {"boxes": boxes, "labels": labels}


def eval_transform(image_size: tuple[int, int]) -> v2.Transform:
    """Resize only: every box stays."""
    shorter, longest = image_size
    if not 0 < shorter <= longest:
        raise ValueError(f"image_size {image_size}: wanted (shorter side, longest side), 0 < shorter <= longest")
    # With equal sides only the longest one can bind, and torchvision wants size=None for that.
    return v2.Resize(None if shorter == longest else [shorter], max_size=longest, antialias=True)


def resized_size(height: int, width: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) in px of an image of height x width px after either transform."""
    canvas = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(height, width))
    return tuple(eval_transform(image_size)(canvas).canvas_size)


def seed_of(*parts: int | str) -> int:
    """Return an integer of 32 bits for torch.manual_seed; neighbouring parts give unrelated ones."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest())


def batches_from(
    step: int, steps: int, tall: Sequence[bool], batch_size: int, seed: int, rank: int = 0, world: int = 1
) -> Iterator[list[tuple[int, int]]]:
    """Yield (epoch, image index) of this rank's share of every batch from `step` to the last one.

    An epoch is a permutation of the images without the remainder that fills no batch. To be padded less, its batches,
    except the last one, have only images that are `tall` or only others. `batch_size` counts over all ranks.
    """
    share, epoch_steps = batch_size // world, len(tall) // batch_size
    for s in range(step, steps):
        epoch, position = divmod(s, epoch_steps)
        if s == step or position == 0:
            generator = torch.Generator().manual_seed(seed_of(seed, "order", epoch))
            drawn = torch.randperm(len(tall), generator=generator).tolist()
            order, filling = [], {True: [], False: []}
            # The remainder goes before grouping, or it would always be the rare orientation's.
            for i in drawn[: epoch_steps * batch_size]:
                batch = filling[bool(tall[i])]
                batch.append(i)
                if len(batch) == batch_size:
                    order += batch
                    batch.clear()
            order += filling[True] + filling[False]
        first = position * batch_size + rank * share
        yield [(epoch, i) for i in order[first : first + share]]


class SeededDataset(torch.utils.data.Dataset):
    """Sample (epoch, i): image i, transformed by seed, epoch and i alone. Reseeds the process's global generator."""

    def __init__(self, dataset: CocoDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, key: tuple[int, int]):
        torch.manual_seed(seed_of(self.seed, "sample", *key))
        return self.dataset[key[1]]
