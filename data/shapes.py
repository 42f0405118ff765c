"""A generated detection data set in COCO layout: five kinds of shapes, a third of the images crowded.

It has the hard cases of label assignment: rows and clusters of similar shapes whose boxes overlap by an IoU of 0.3 to
0.6, and shapes nested about one centre. A box holds the whole shape, covered or not, inside the image. Lengths in px.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator as Rng
from PIL import Image, ImageDraw
from torchvision.ops import box_iou

from errors import UserError

VERSION = 2  # raise it with any change to the pictures: it is part of the folder's name, like all settings
CLASSES = ("circle", "square", "triangle", "star", "ring")
SIZE_PX, TRAIN_IMAGES, VAL_IMAGES = 160, 1000, 200
EMPTY_SHARE, CROWDED_SHARE = 0.04, 0.35
SPARSE_OBJECTS, CROWD_OBJECTS = (1, 6), (6, 10)
SPARSE_SIZE, CROWD_SIZE = (0.15, 0.50), (0.20, 0.36)  # of the image's side
CROWD_STEP = (0.34, 0.50)  # from neighbour to neighbour, in units of their size
MIN_VISIBLE = 0.5  # share of a shape's own pixels
MAX_IOU, MAX_IOU_SAME_CLASS = 0.7, 0.55  # the second under any sensible NMS threshold
ATTEMPTS_PER_OBJECT, OUTLINE_PX, JPEG_QUALITY = 10, 1.5, 90
BORDER = 0.3  # how far inside the image a centre stays, in units of the shape's size
FRESH_START = 0.08  # chance that the next shape of a crowd starts another row or cluster
NESTED_SHARE = 0.5  # of the crowded images
NEST_START, NEST_SIZE = 0.4, (0.30, 0.50)  # chance that the next shape starts another nest, and the size of its first
NEST_RATIO, NEST_STEP = (0.50, 0.70), 0.08  # size and shift of a shape inside the one before, in units of its size
SETTINGS = tuple(value for name, value in list(globals().items()) if name.isupper())


def shapes_folder() -> str:
    """Return the name of the folder for these settings, so that a change of settings makes a new set."""
    return "shapes-" + hashlib.sha256(repr(SETTINGS).encode()).hexdigest()[:8]


def generate_shapes(
    root: Path,
    *,
    seed: int = 0,
    train_images: int = TRAIN_IMAGES,
    val_images: int = VAL_IMAGES,
    size_px: int = SIZE_PX,
    crowded_share: float = CROWDED_SHARE,
    one_class: bool = False,
) -> None:
    """Write annotations/instances_{train,val}.json, train/ and val/ under `root`; a seed gives the same bytes. With
    `one_class` all shapes are of the class "shape". Several processes may write at once: `root` appears complete.
    Raises UserError if its folder cannot be written."""
    categories = [{"id": c, "name": name} for c, name in enumerate(("shape",) if one_class else CLASSES, 1)]
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        unfinished_folder = tempfile.TemporaryDirectory(dir=root.parent, prefix=f"{root.name}-unfinished-")
    except OSError as error:
        raise UserError(f"the generated shapes cannot be written to {root.absolute()}: {error}") from error
    with unfinished_folder as unfinished:
        made = Path(unfinished) / root.name
        (made / "annotations").mkdir(parents=True)
        for split, (name, count) in enumerate((("train", train_images), ("val", val_images))):
            (made / name).mkdir()
            images, annotations = [], []
            for i in range(1, count + 1):
                scene = Scene(size_px, np.random.default_rng([seed, split, i - 1]))
                scene.fill(crowded_share)
                images.append({"id": i, "file_name": f"{i:06d}.jpg", "width": size_px, "height": size_px})
                picture = Image.fromarray(scene.canvas.clip(0, 255).astype(np.uint8))
                picture.save(made / name / images[-1]["file_name"], quality=JPEG_QUALITY)
                for shape in scene.shapes:
                    x1, y1, x2, y2 = shape.box(size_px).round(2).tolist()
                    w, h = round(x2 - x1, 2), round(y2 - y1, 2)
                    category = 1 if one_class else shape.label + 1
                    ids = {"id": len(annotations) + 1, "image_id": i, "category_id": category, "bbox": [x1, y1, w, h]}
                    annotations.append(ids | {"area": round(w * h, 2), "iscrowd": 0, "segmentation": []})
            content = {"images": images, "annotations": annotations, "categories": categories}
            (made / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
        try:
            os.rename(made, root)
        except OSError:
            if not root.is_dir():  # otherwise another process was first, with the same pictures
                raise


class Shape(NamedTuple):
    """One object, covered or not, in px of the image."""

    label: int  # index into CLASSES
    centre: np.ndarray  # (2,) x and y
    radius: float  # of the circle around it
    angle: float

    def outline(self, inset: float = 0.0) -> np.ndarray:
        """Return (V, 2) vertices around the shape's own centre; `inset` px further in along the radius."""
        kind, radius = CLASSES[self.label], self.radius - inset
        corners = {"square": 4, "triangle": 3, "star": 10}.get(kind, 48)
        turns = self.angle + np.arange(corners) * (2 * np.pi / corners)
        # The inner corners of a star of five lie at 0.45 instead of the pentagram's 0.38: less spiky.
        radii = radius * np.where((kind == "star") & (np.arange(corners) % 2 == 1), 0.45, 1.0)
        return np.stack([radii * np.cos(turns), radii * np.sin(turns)], 1)

    def box(self, size_px: int) -> np.ndarray:
        """Return x1 y1 x2 y2 of the whole shape, clipped to the image."""
        outline = self.outline()
        return np.concatenate([outline.min(0) + self.centre, outline.max(0) + self.centre]).clip(0, size_px)

    def coverage(self, left: int, top: int, side: int, inset: float = 0.0) -> np.ndarray:
        """Return the (side, side) share of each pixel that the shape covers, 0..1, in a window at left, top."""
        centre, patch = self.centre - (left, top), Image.new("L", (2 * side, 2 * side))
        draw = ImageDraw.Draw(patch)
        draw.polygon([tuple(p) for p in 2 * (centre + self.outline(inset)) - 0.5], fill=255)
        if CLASSES[self.label] == "ring":
            (x, y), hole = 2 * centre - 0.5, 2 * (0.5 * self.radius + inset)
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return np.asarray(patch.reduce(2), np.float32) / 255


class Scene:
    """A picture in the making. canvas (H, W, 3) float32, 0..255."""

    def __init__(self, size_px: int, rng: Rng) -> None:
        self.size_px, self.rng = size_px, rng
        self.canvas = _background(size_px, rng)
        self.shapes: list[Shape] = []
        self._topmost = np.full((size_px, size_px), -1)  # index of the topmost shape at each pixel
        self._pixels = self._visible = np.zeros(0, np.int64)  # of each shape: all, and those that no later one covers

    def fill(self, crowded_share: float = CROWDED_SHARE) -> None:
        kind = self.rng.random()
        if kind < EMPTY_SHARE:
            return
        crowded = kind > 1 - crowded_share
        wanted = int(self.rng.integers(*(CROWD_OBJECTS if crowded else SPARSE_OBJECTS), endpoint=True))
        nested = crowded and self.rng.random() < NESTED_SHARE
        proposals = self._nest() if nested else self._crowd() if crowded else self._sparse()
        for _, (label, size, place) in zip(range(ATTEMPTS_PER_OBJECT * wanted), proposals, strict=False):
            self._add(Shape(label, place, float(size / 2), float(self.rng.uniform(0, 2 * np.pi))))
            if len(self.shapes) == wanted:
                return

    def _sparse(self) -> Iterator[tuple[int, float, np.ndarray]]:
        """Propose class, size and centre of the next shape: any size at any place."""
        while True:
            size = self.size_px * np.exp(self.rng.uniform(*np.log(SPARSE_SIZE)))
            yield int(self.rng.integers(len(CLASSES))), size, self._place(size)

    def _crowd(self) -> Iterator[tuple[int, float, np.ndarray]]:
        """Propose a row or a cluster of similar sizes, of one class or of all, each close to an earlier shape."""
        in_row, one_class = self.rng.random(2) < 0.5
        common_size, common_label = self.size_px * self.rng.uniform(*CROWD_SIZE), int(self.rng.integers(len(CLASSES)))
        heading = self.rng.uniform(0, 2 * np.pi)
        while True:
            size = common_size * self.rng.uniform(0.9, 1.1)
            label = common_label if one_class else int(self.rng.integers(len(CLASSES)))
            place = self._place(size)
            if self.shapes and self.rng.random() > FRESH_START:
                parent = self.shapes[-1 if in_row else self.rng.integers(len(self.shapes))]
                turn = heading + self.rng.normal(0, 0.15) if in_row else self.rng.uniform(0, 2 * np.pi)
                place = parent.centre + size * self.rng.uniform(*CROWD_STEP) * np.array([np.cos(turn), np.sin(turn)])
                if ((place < BORDER * size) | (place > self.size_px - BORDER * size)).any():
                    continue
            yield label, size, place

    def _nest(self) -> Iterator[tuple[int, float, np.ndarray]]:
        """Propose shapes inside shapes, about one centre: no fixed region around a centre can tell these apart."""
        while True:
            label = int(self.rng.integers(len(CLASSES)))
            size = self.size_px * self.rng.uniform(*NEST_SIZE)
            place = self._place(size)
            if self.shapes and self.rng.random() > NEST_START:
                parent = self.shapes[-1]
                size = 2 * parent.radius * self.rng.uniform(*NEST_RATIO)
                place = parent.centre + self.rng.uniform(-1, 1, 2) * NEST_STEP * size
                if size < SPARSE_SIZE[0] * self.size_px:
                    continue
            yield label, size, place

    def _place(self, size: float) -> np.ndarray:
        return self.rng.uniform(BORDER * size, self.size_px - BORDER * size, 2)

    def _add(self, shape: Shape) -> None:
        """Draw the shape on top, unless too little of it or of one below is visible then, or it repeats a box."""
        side = int(2 * shape.radius) + 4  # of the window that the shape is drawn in
        left, top = ((shape.centre - shape.radius).astype(int) - 2).tolist()
        window = np.s_[max(top, 0) : top + side, max(left, 0) : left + side]
        seen = np.s_[max(-top, 0) : self.size_px - top, max(-left, 0) : self.size_px - left]  # its part in the image
        coverage = shape.coverage(left, top, side)
        pixels = np.append(self._pixels, (coverage > 0.5).sum())
        coverage, mask = coverage[seen], coverage[seen] > 0.5
        covered = np.bincount(self._topmost[window][mask] + 1, minlength=len(self.shapes) + 1)[1:]
        visible = np.append(self._visible - covered, mask.sum())
        boxes = torch.from_numpy(np.stack([s.box(self.size_px) for s in [*self.shapes, shape]]))
        limits = [MAX_IOU_SAME_CLASS if s.label == shape.label else MAX_IOU for s in self.shapes]
        repeats = box_iou(boxes[-1:], boxes[:-1])[0] > torch.tensor(limits)
        if (visible < MIN_VISIBLE * pixels).any() or repeats.any():
            return
        self._topmost[window][mask] = len(self.shapes)
        self._pixels, self._visible = pixels, visible
        self.shapes.append(shape)
        interior = shape.coverage(left, top, side, inset=OUTLINE_PX)[seen]
        self.canvas[window] = _painted(self.canvas[window], coverage[..., None], interior[..., None], self.rng)


def _background(size_px: int, rng: Rng) -> np.ndarray:
    """Return (size_px, size_px, 3) colour gradients, blotches and pixel noise."""
    canvas = rng.uniform(2, 8) * rng.standard_normal((size_px, size_px, 3), np.float32)
    for cells, contrast in ((2, 55), (5, 25), (16, 12)):
        grid = (128 + rng.normal(0, contrast, (cells, cells, 3))).clip(0, 255).astype(np.uint8)
        canvas += np.asarray(Image.fromarray(grid).resize((size_px, size_px), Image.Resampling.BICUBIC)) - 128.0
    return (canvas + rng.uniform(60, 195, 3)).astype(np.float32)


def _painted(under: np.ndarray, coverage: np.ndarray, interior: np.ndarray, rng: Rng) -> np.ndarray:
    """Return the window `under` (h, w, 3) with a striped, shaded, outlined shape over it."""
    below = (under * coverage).sum((0, 1)) / coverage.sum()
    palette = rng.uniform(20, 235, (4, 3))
    colour = palette[np.abs(palette - below).sum(1).argmax()]  # stands out from what is below
    y, x = np.mgrid[: under.shape[0], : under.shape[1]] / len(under)
    turn, waves, depth = rng.uniform((0, 0.2, 5), (2 * np.pi, 5, 30))
    stripes = depth * np.sin(2 * np.pi * waves * (x * np.cos(turn) + y * np.sin(turn)))
    fill = colour + stripes[..., None] + 6 * rng.standard_normal(under.shape, np.float32)
    edge = colour - 90 if colour.mean() > 110 else colour + 90
    return under + coverage * (interior * fill + (1 - interior) * edge - under)
