"""Small data sets in COCO layout and the forms of CrowdHuman, Pascal VOC and YOLO, with grey pictures of 40 x 30 px."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from data import CocoDataset, DatasetError, Split, find_splits, generate_shapes
from data.layouts import COCO, CROWDHUMAN, VOC

SIZE = (40, 30)  # width and height of a picture in px
Scenes = dict[str, list[tuple[list[float], bool]]]  # name of an image -> boxes x, y, w, h, each to be ignored or not


def grey(path: Path, size: tuple[int, int] = SIZE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "grey").save(path)


def dataset_of(root: Path, half: int = 0, **options) -> CocoDataset:
    """Return the training half (0) or the validation half (1) of the data set in a folder."""
    return CocoDataset(find_splits(str(root), **options)[half])


def collate(samples: list[tuple]) -> tuple[tuple, tuple]:
    """Return images and targets."""
    return tuple(zip(*samples, strict=True))


def refusal(source: Split | Path, **options) -> str:
    """Return the message of the DatasetError that a split, or the training half of a folder, ends in."""
    with pytest.raises(DatasetError) as error:
        CocoDataset(source, **options) if isinstance(source, Split) else dataset_of(source, **options)
    return str(error.value)


def image_record(image_id=1, file_name="a.jpg", width=SIZE[0], height=SIZE[1]) -> dict:
    return {"id": image_id, "file_name": file_name, "width": width, "height": height}


def box_record(annotation_id=1, bbox=(5, 6, 10, 12), image_id=1, category_id=3, **more) -> dict:
    return {"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": list(bbox), **more}


def write_coco(root: Path, images=None, boxes=(), categories=None, pixels=True) -> Split:
    """Write the training half in COCO layout; pictures have the recorded sizes."""
    images = [image_record()] if images is None else images
    categories = [{"id": 3, "name": "cat"}] if categories is None else categories
    split = Split("train", root / "annotations" / "instances_train.json", root / "train", COCO)
    for folder in (split.annotations.parent, split.images):
        folder.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annotations": list(boxes), "categories": categories}
    split.annotations.write_text(json.dumps(content))
    for record in images if pixels else ():
        grey(split.images / record["file_name"], (record["width"], record["height"]))
    return split


def person(fbox, tag="person", vbox=None, hbox=None, **more) -> dict:
    return {"tag": tag, "fbox": fbox, "vbox": vbox or fbox, "hbox": hbox or fbox, "head_attr": {}, "extra": {}} | more


def write_crowdhuman(root: Path, lines: Iterable, half: str = "train", size: tuple[int, int] | None = SIZE) -> Split:
    """Write lines, as records or text, and with `size` a picture for every record."""
    split = Split(half, root / f"annotation_{half}.odgt", root / "Images", CROWDHUMAN, "fbox")
    split.images.mkdir(parents=True, exist_ok=True)
    for line in lines if size else ():
        if isinstance(line, dict):
            grey(split.images / f"{line['ID']}.jpg", size)
    split.annotations.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return split


OBJECT = """<object><name>{name}</name><pose>Left</pose><difficult>{difficult}</difficult>
<bndbox><xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part></object>"""


def scene(name: str, *objects: tuple, size: tuple[int, int] = SIZE) -> str:
    """Return the XML of an image with objects of (class, xmin, ymin, xmax, ymax, difficult)."""
    parts = [OBJECT.format(*corners, name=kind, difficult=difficult) for kind, *corners, difficult in objects]
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{name}.jpg</filename>{size}{''.join(parts)}</annotation>"


def write_voc(root: Path, scenes: dict[str, str], size: tuple[int, int] | None = SIZE, **lists: Iterable[str]) -> Path:
    """Write XML files by name of image, with `size` their pictures, and lists of names such as train=["a", "b"]."""
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, xml in scenes.items():
        (root / "Annotations" / f"{name}.xml").write_text(xml)
        if size:
            grey(root / "JPEGImages" / f"{name}.jpg", size)
    for name, images in lists.items():
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{image}\n" for image in images))
    return root


def write_scenes(root: Path, form: str, scenes: Scenes, half: str = "train", size: tuple[int, int] = SIZE) -> Split:
    """Write one half with the same scenes in the form "coco", "crowdhuman" or "voc"; all objects are persons."""
    if form == "coco":
        images = [image_record(i, f"{name}.jpg", *size) for i, name in enumerate(scenes, 1)]
        flat = [(i, *entry) for i, boxes in enumerate(scenes.values(), 1) for entry in boxes]
        areas = [box[2] * box[3] for _, box, _ in flat]
        records = [
            box_record(n, box, i, iscrowd=int(ignored), area=area)
            for n, ((i, box, ignored), area) in enumerate(zip(flat, areas, strict=True), 1)
        ]
        return write_coco(root, images, records, [{"id": 3, "name": "person"}])
    if form == "crowdhuman":
        entries = {n: [person(box, extra={"ignore": int(ignored)}) for box, ignored in b] for n, b in scenes.items()}
        return write_crowdhuman(root, [{"ID": n, "gtboxes": boxes} for n, boxes in entries.items()], half, size)
    corners = {n: [("person", x + 1, y + 1, x + w, y + h, int(i)) for (x, y, w, h), i in b] for n, b in scenes.items()}
    write_voc(root, {n: scene(n, *objects, size=size) for n, objects in corners.items()}, size, **{half: scenes})
    return Split(half, root / "ImageSets" / "Main" / f"{half}.txt", root / "JPEGImages", VOC)


def generate_crowds(root: Path, size_px: int) -> Path:
    """Generated shapes as people, every twelfth to be ignored, full boxes 2 px larger on each side than the shapes."""
    generate_shapes(root / "shapes", train_images=16, val_images=8, size_px=size_px, one_class=True)
    for half in ("train", "val"):
        dataset, scenes = dataset_of(root / "shapes", half == "val"), {}
        for image in dataset.images:
            shapes = [a for a in dataset.annotations["annotations"] if a["image_id"] == image["id"]]
            boxes = [(np.add(shape["bbox"], (-2, -2, 4, 4)).tolist(), shape["id"] % 12 == 0) for shape in shapes]
            scenes[f"{half},{image['id']:04d}"] = boxes
        split = write_scenes(root, "crowdhuman", scenes, half)
        for name, image in zip(scenes, dataset.images, strict=True):
            shutil.copy(dataset.split.images / image["file_name"], split.images / f"{name}.jpg")
    return root


def write_yolo(root: Path, labels: dict[str, str | None], size: tuple[int, int] | None = SIZE, **keys) -> Path:
    """Write data.yaml with `keys` and, by name of an image such as "train/images/a.jpg", its label file's text (None:
    no file) and with `size` its picture; return the folder."""
    for name, text in labels.items():
        path = Path("/labels/".join(f"{root}/{name}".rsplit("/images/", 1))).with_suffix(".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        if text is not None:
            path.write_text(text)
        if size:
            grey(root / name, size)
    root.mkdir(exist_ok=True)
    (root / "data.yaml").write_text(yaml.safe_dump(keys))
    return root


def copy_as_yolo(source: Path, root: Path, lists: bool = False) -> Path:
    """Copy a data set into YOLO's form as Roboflow writes it, or with `lists` as text files of images; return `root`.
    A class is the category's place in the order of ids."""
    labels, splits, names = {}, {"train": "../train/images", "val": "../valid/images", "test": "../test/images"}, []
    for half, folder in enumerate(("train", "valid")):
        dataset = dataset_of(source, half)
        images, names = {image["id"]: image for image in dataset.images}, dataset.class_names
        files = {i: f"{folder}/images/{image['file_name']}" for i, image in images.items()}
        labels |= dict.fromkeys(files.values(), "")
        for record in dataset.annotations["annotations"]:
            (x, y, w, h), image = record["bbox"], images[record["image_id"]]
            row = np.divide([x + w / 2, y + h / 2, w, h], [image["width"], image["height"]] * 2)
            row = [dataset.category_ids.index(record["category_id"]), *(f"{share:.17g}" for share in row)]
            labels[files[record["image_id"]]] += f"{' '.join(map(str, row))}\n"
        (root / folder / "images").mkdir(parents=True)
        for i, file in files.items():
            shutil.copy(dataset.split.images / images[i]["file_name"], root / file)
        (root / f"{folder}.txt").write_text("".join(f"./{file}\n" for file in files.values()))
    (root / "README.dataset.txt").write_text("Exported by roboflow.com")
    splits = {"train": "train.txt", "val": "valid.txt", "test": "test.txt"} if lists else splits
    return write_yolo(root, labels, None, **splits, nc=len(names), names=names)
