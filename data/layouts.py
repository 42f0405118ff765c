"""The table of forms and layouts, and `find_splits`, which finds a data set in one of them."""

import os
import re
from pathlib import Path

from data.checks import Form, Split
from data.crowd_metrics import crowd_metrics
from data.files import DatasetError
from data.forms import BOXES, read_coco, read_crowdhuman, read_voc
from data.shapes import generate_shapes, shapes_folder

COCO = Form("COCO", read_coco)
CROWDHUMAN = Form("CrowdHuman", read_crowdhuman, "crowdhuman", tuple(BOXES), crowd_metrics)
VOC = Form("Pascal VOC", read_voc)

# form, (annotation file, image folder) of train, and of val
LAYOUTS = (
    (COCO, ("annotations/instances_train2017.json", "train2017"), ("annotations/instances_val2017.json", "val2017")),
    (COCO, ("annotations/instances_train.json", "train"), ("annotations/instances_val.json", "val")),
    (COCO, ("train/_annotations.coco.json", "train"), ("valid/_annotations.coco.json", "valid")),
    (CROWDHUMAN, ("annotation_train.odgt", "Images"), ("annotation_val.odgt", "Images")),
    (VOC, ("ImageSets/Main/trainval.txt", "JPEGImages"), ("ImageSets/Main/test.txt", "JPEGImages")),
    (VOC, ("ImageSets/Main/train.txt", "JPEGImages"), ("ImageSets/Main/val.txt", "JPEGImages")),
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


def find_splits(
    data: str, box: str | None = None, follow_links: bool = False, strict: bool = False
) -> tuple[Split | None, Split | None]:
    """Return the train and the val split, one of which may be missing. Raises DatasetError if both are.

    data: "coco" or "crowdhuman" (folders in $OTA_DATA, by default ./datasets), "shapes" (generated there on first use)
    or a folder in one of LAYOUTS: the first of which it has both halves, else the first of which it has one.
    """
    root = _root(data)
    if data == "shapes" and not root.is_dir():
        print(f"generating the shapes data set in {root}: some seconds, once")
        generate_shapes(root)
    halves = _halves(root, box, follow_links, strict)
    if not any(halves):
        raise DatasetError(_missing_message(data, root.absolute()))
    return halves


def find_form(data: str) -> Form:
    """Return the form of `data`, as in `find_splits`; COCO's if the data set is not on this machine."""
    missing = CROWDHUMAN if data == "crowdhuman" else COCO
    return next((split.form for split in _halves(_root(data)) if split), missing)


def _root(data: str) -> Path:
    home = Path(os.environ.get("OTA_DATA", "datasets"))
    named = {"coco": home / "coco", "crowdhuman": home / "crowdhuman", "shapes": home / shapes_folder()}
    return named.get(data, Path(data).expanduser())


def _halves(
    root: Path, box: str | None = None, follow_links: bool = False, strict: bool = False
) -> tuple[Split | None, Split | None]:
    known = []
    for form, *halves in LAYOUTS:
        kind, named = (box or form.boxes[0]) if form.boxes else None, zip(("train", "val"), halves, strict=True)
        how = (form, kind, follow_links, strict)
        splits = [Split(name, root / file, root / images, *how) for name, (file, images) in named]
        known.append(tuple(split if os.path.isfile(split.annotations) else None for split in splits))
    return next(filter(all, known), None) or next(filter(any, known), (None, None))


def _missing_message(data: str, root: Path) -> str:
    if data in ("coco", "crowdhuman"):
        return (NO_COCO if data == "coco" else NO_CROWDHUMAN).format(root=root)
    layouts = "".join(f"\n  {annotations} with images in {images}/" for _, (annotations, images), _ in LAYOUTS)
    if _is_yolo(root):
        state = "is in the form of YOLO, which is not read yet: convert it to COCO layout, the second or third of"
    elif os.path.isfile(root):
        folder = next((folder for folder in root.parents[:3] if any(_halves(folder))), None)
        state = f"is a file; --data takes the folder of a data set{f', here {folder}' if folder else ''}, with one of"
    else:
        state = "has none of" if os.path.isdir(root) else "does not exist; wanted a folder with one of"
    return f'no data set for --data {data} ("coco", "crowdhuman", "shapes" or a folder): {root} {state}{layouts}'


def _is_yolo(root: Path) -> bool:
    """Return whether this is a YOLO data set's data.yaml, or a folder with one, or with boxes in labels/*.txt."""
    try:
        yamls = [root] if root.suffix in (".yaml", ".yml") else [*root.glob("*.yaml"), *root.glob("*.yml")]
        heads = [path.read_text(errors="replace") for path in yamls if path.is_file()]
        labels = any(next(folder.rglob("*.txt"), None) for way in ("labels", "*/labels") for folder in root.glob(way))
    except OSError:
        return False
    return labels or any(re.search(r"^ *(names|train) *:", head, re.MULTILINE) for head in heads)
