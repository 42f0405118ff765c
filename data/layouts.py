"""The table of forms and layouts, and `find_splits`, which finds a data set in one of them."""

import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data.checks import Form, Split
from data.crowd_metrics import crowd_metrics
from data.files import DatasetError
from data.forms import BOXES, read_coco, read_crowdhuman, read_voc
from data.shapes import generate_shapes, shapes_folder
from data.yolo import YAML_SUFFIXES, image_folder, read_yolo

COCO = Form("COCO", read_coco)
CROWDHUMAN = Form("CrowdHuman", read_crowdhuman, "crowdhuman", tuple(BOXES), crowd_metrics)
VOC = Form("Pascal VOC", read_voc)
YOLO = Form("YOLO", read_yolo, image_folder=image_folder)


class Splits(NamedTuple):
    """The splits of a data set, None for those that it does not have."""

    train: Split | None = None
    val: Split | None = None
    test: Split | None = None


SPLITS = Splits._fields

# form, annotation file, image folder, and what {} in both is for train, for val, and for test
LAYOUTS = (
    (COCO, "annotations/instances_{}.json", "{}", ("train2017", "val2017")),
    (COCO, "annotations/instances_{}.json", "{}", ("train", "val", "test")),
    (COCO, "{}/_annotations.coco.json", "{}", ("train", "valid", "test")),
    (CROWDHUMAN, "annotation_{}.odgt", "Images", ("train", "val")),
    (VOC, "ImageSets/Main/{}.txt", "JPEGImages", ("trainval", "test")),
    (VOC, "ImageSets/Main/{}.txt", "JPEGImages", ("train", "val", "test")),
    (YOLO, "data.yaml", "", SPLITS),  # which names the folders
)
NO_COCO = """COCO is not in {root}: no annotations/instances_train2017.json there. Unzip these three into that folder \
(or set OTA_DATA to the folder that holds coco/):
  http://images.cocodataset.org/zips/train2017.zip
  http://images.cocodataset.org/zips/val2017.zip
  http://images.cocodataset.org/annotations/annotations_trainval2017.zip"""
NO_CROWDHUMAN = """CrowdHuman is not in {root}: no annotation_train.odgt there. Its images may not be passed on, so \
download annotation_train.odgt, annotation_val.odgt, CrowdHuman_val.zip, CrowdHuman_train01.zip, \
CrowdHuman_train02.zip, CrowdHuman_train03.zip from https://www.crowdhuman.org/download.html into that folder (or set \
OTA_DATA to the folder that holds crowdhuman/) and unzip them: all images go into {root}/Images"""


def find_splits(data: str, box: str | None = None, follow_links: bool = False, strict: bool = False) -> Splits:
    """Return the splits of a data set. Raises DatasetError if it has none.

    data: "coco" or "crowdhuman" (folders in $OTA_DATA, by default ./datasets), "shapes" (generated there on first use)
    or a folder in one of LAYOUTS: the first of which it has train and val, else the first of which it has any split.
    The YAML file of a YOLO data set stands for its folder, and may have any name.
    """
    root = _root(data)
    if data == "shapes" and not root.is_dir():
        print(f"generating the shapes data set in {root}: some seconds, once")
        generate_shapes(root)
    splits = _splits(root, box, follow_links, strict)
    if not any(splits):
        raise DatasetError(_missing_message(data, root.absolute()))
    return splits


def find_form(data: str) -> Form:
    """Return the form of `data`, as in `find_splits`; COCO's if the data set is not on this machine."""
    missing = CROWDHUMAN if data == "crowdhuman" else COCO
    return next((split.form for split in _splits(_root(data)) if split), missing)


def data_name(data: str) -> str:
    """Return the name of `data` in the names of folders: the last part, of a YAML file the last two."""
    path = Path(data).resolve()
    return f"{path.parent.name}-{path.stem}" if path.suffix in YAML_SUFFIXES else path.name


def _root(data: str) -> Path:
    home = Path(os.environ.get("OTA_DATA", "datasets"))
    named = {"coco": home / "coco", "crowdhuman": home / "crowdhuman", "shapes": home / shapes_folder()}
    return named.get(data, Path(data).expanduser())


def _splits(root: Path, box: str | None = None, follow_links: bool = False, strict: bool = False) -> Splits:
    known, is_yaml = [], root.suffix in YAML_SUFFIXES and os.path.isfile(root)
    for form, file, images, names in [(YOLO, "", "", SPLITS)] if is_yaml else LAYOUTS:
        how = (form, (box or form.boxes[0]) if form.boxes else None, follow_links, strict)
        places = [(root / file.format(name), root / images.format(name)) for name in names]
        splits = [Split(name, *place, *how) for name, place in zip(SPLITS, places, strict=False)]
        known.append(Splits(*map(_present, splits)))
        if all(known[-1][:2]):
            return known[-1]
    return next(filter(any, known), Splits())


def _present(split: Split) -> Split | None:
    """Return the split, with the image folder that its annotation file names, or None if it is not there."""
    if not os.path.isfile(split.annotations):
        return None
    if split.form.image_folder is None:
        return split
    folder = split.form.image_folder(split.annotations, split.name)
    return replace(split, images=folder) if folder else None


def _missing_message(data: str, root: Path) -> str:
    if data in ("coco", "crowdhuman"):
        return (NO_COCO if data == "coco" else NO_CROWDHUMAN).format(root=root)
    trains = [[part.format(names[0]) for part in parts] for _, *parts, names in LAYOUTS]
    layouts = "".join(f"\n  {file} with images in {folder or 'folders it names'}/" for file, folder in trains)
    if root.suffix in YAML_SUFFIXES and os.path.isfile(root):
        state = "names neither train nor val. Wanted a YAML file that does, or a folder with one of"
    elif os.path.isfile(root):
        folder = next((folder for folder in root.parents[:3] if any(_splits(folder))), None)
        state = f"is a file; --data takes the folder of a data set{f', here {folder}' if folder else ''}, with one of"
    elif any(next(folder.rglob("*.txt"), None) for way in ("labels", "*/labels") for folder in root.glob(way)):
        state = "has label files of YOLO, but no data.yaml with train, val and names. Wanted one of"
    elif yaml := next((path for suffix in YAML_SUFFIXES for path in root.glob(f"*{suffix}")), None):
        state = f"has none of these; if {yaml} is the file of a YOLO data set, pass it with --data"
    else:
        state = "has none of" if os.path.isdir(root) else "does not exist; wanted a folder with one of"
    return f'no data set for --data {data} ("coco", "crowdhuman", "shapes" or a folder): {root} {state}{layouts}'
