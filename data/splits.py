"""Where the halves of a data set lie, in any of the forms that are known, and what their files hold, in COCO layout.

`find_splits` turns "coco", "crowdhuman", "shapes" or a folder into the files of its splits.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from data import voc
from data.crowdhuman import read_crowdhuman
from data.files import DatasetError, json_text, parse_json
from data.shapes import generate_shapes, shapes_folder

# (annotation file, image folder) of train, then of val
LAYOUTS = (
    (
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_val2017.json", "val2017"),
    ),
    (("annotations/instances_train.json", "train"), ("annotations/instances_val.json", "val")),
    (("train/_annotations.coco.json", "train"), ("valid/_annotations.coco.json", "valid")),
    (("annotation_train.odgt", "Images"), ("annotation_val.odgt", "Images")),
    (("ImageSets/Main/trainval.txt", "JPEGImages"), ("ImageSets/Main/test.txt", "JPEGImages")),
    (("ImageSets/Main/train.txt", "JPEGImages"), ("ImageSets/Main/val.txt", "JPEGImages")),
)
COCO_ZIPS = ("zips/train2017.zip", "zips/val2017.zip", "annotations/annotations_trainval2017.zip")
CROWDHUMAN_FILES = (
    *("annotation_train.odgt", "annotation_val.odgt", "CrowdHuman_val.zip"),
    *("CrowdHuman_train01.zip", "CrowdHuman_train02.zip", "CrowdHuman_train03.zip"),
)


@dataclass(frozen=True)
class Split:
    """Where one half of a data set lies; name is "train" or "val", box which of CrowdHuman's boxes are wanted.

    follow_links: links to files outside the folders of images, and of VOC's XML files, are read, not refused.
    """

    name: str
    annotations: Path
    images: Path
    box: str = "fbox"
    follow_links: bool = False

    @property
    def is_crowdhuman(self) -> bool:
        return self.annotations.suffix == ".odgt"

    @property
    def is_voc(self) -> bool:
        return self.annotations.suffix == ".txt"

    def read(self, look_at_files: bool = True) -> dict:
        """The content of a file in COCO layout. Raises DatasetError."""
        if self.is_crowdhuman:
            return read_crowdhuman(self.annotations, self.images, self.box, look_at_files, self.follow_links)
        if self.is_voc:
            return voc.read_voc(self.annotations, self.images, self.follow_links)
        return _read_json(self.annotations)

    def files(self) -> list[Path]:
        """All that `read` depends on, but for the images."""
        return voc.annotation_files(self.annotations, self.follow_links) if self.is_voc else [self.annotations]


def _root(data: str) -> Path:
    home = Path(os.environ.get("OTA_DATA", "datasets"))
    named = {"coco": home / "coco", "crowdhuman": home / "crowdhuman", "shapes": home / shapes_folder()}
    return named.get(data, Path(data).expanduser())


def _halves(root: Path, box: str = "fbox", follow_links: bool = False) -> tuple[Split | None, Split | None]:
    found = [
        tuple(
            Split(name, root / annotations, root / images, box, follow_links)
            if os.path.isfile(root / annotations)
            else None
            for name, (annotations, images) in zip(("train", "val"), layout, strict=True)
        )
        for layout in LAYOUTS
    ]
    return next(filter(all, found), None) or next(filter(any, found), (None, None))


def is_crowdhuman(data: str) -> bool:
    """Whether `data`, as in `find_splits`, means the data set CrowdHuman or a folder in its form."""
    return data == "crowdhuman" or any(split and split.is_crowdhuman for split in _halves(_root(data)))


def find_splits(data: str, box: str = "fbox", follow_links: bool = False) -> tuple[Split | None, Split | None]:
    """The train and the val split; one of them may be missing.

    data: "coco" ($OTA_DATA/coco), "crowdhuman" ($OTA_DATA/crowdhuman), "shapes" (generated under $OTA_DATA on first
    use) or a folder in one of LAYOUTS: the first that it has both halves of, else the first that it has one of.
    OTA_DATA is ./datasets where it is not set.
    Raises DatasetError: neither split is there.
    """
    root = _root(data)
    if data == "shapes" and not root.is_dir():
        print(f"generating the shapes data set in {root}: some seconds, once")
        generate_shapes(root)
    halves = _halves(root, box, follow_links)
    if not any(halves):
        raise DatasetError(_missing_message(data, root.absolute()))
    return halves


def _missing_message(data: str, root: Path) -> str:
    if data == "coco":
        urls = "".join(f"\n  http://images.cocodataset.org/{name}" for name in COCO_ZIPS)
        return (
            f"COCO is not in {root}: no {LAYOUTS[0][0][0]} there. Unzip these three into that folder"
            f" (or set OTA_DATA to the folder that holds coco/):{urls}"
        )
    if data == "crowdhuman":
        return (
            f"CrowdHuman is not in {root}: no annotation_train.odgt there. Its images may not be passed on, so download"
            f" {', '.join(CROWDHUMAN_FILES)} from https://www.crowdhuman.org/download.html into that folder (or set"
            f" OTA_DATA to the folder that holds crowdhuman/) and unzip them: all images go into {root / 'Images'}"
        )
    layouts = "".join(f"\n  {annotations} with images in {images}/" for (annotations, images), _ in LAYOUTS)
    there = "does not exist; wanted a folder with one of"
    if _is_yolo(root):
        there = "is in the form of YOLO, which is not read yet: convert it to COCO layout, the second or third of"
    elif os.path.isfile(root):
        folder = next((folder for folder in root.parents[:3] if any(_halves(folder))), None)
        there = f"is a file; --data takes the folder of a data set{f', here {folder}' if folder else ''}, with one of"
    elif os.path.isdir(root):
        there = "has none of"
    return f'no data set for --data {data} ("coco", "crowdhuman", "shapes" or a folder): {root} {there}{layouts}'


def _is_yolo(root: Path) -> bool:
    """Whether this is a YOLO data set's data.yaml, or a folder with one, or with boxes in labels/*.txt."""
    try:
        yamls = [root] if root.suffix in (".yaml", ".yml") else [*root.glob("*.yaml"), *root.glob("*.yml")]
        heads = [path.read_text(errors="replace") for path in yamls if path.is_file()]
        labels = any(next(folder.rglob("*.txt"), None) for way in ("labels", "*/labels") for folder in root.glob(way))
    except OSError:
        return False
    return labels or any(re.search(r"^ *(names|train) *:", head, re.MULTILINE) for head in heads)


def _read_json(path: Path) -> dict:
    try:
        content = path.read_bytes()
        return parse_json(json_text(content))
    except ValueError as error:
        cut = isinstance(error.__cause__, json.JSONDecodeError)
        whole = f". The file has {len(content)} bytes; is it whole?" if cut else ""
        raise DatasetError(f"{path}: {error}{whole}") from error
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error}") from error
