"""Images and targets of a data set, bad images, transforms, their order in training, and the size of COCO in memory."""

import gc
import itertools
import resource
import time
import tracemalloc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from data import CocoDataset, DatasetError, Split, eval_transform, find_splits, resized_size, train_transform
from data.dataset import IGNORE, Crop, SeededDataset, training_sides
from data.layouts import COCO
from eval import coco_metrics
from model.batch import pack
from tests.support.sets import box_record, collate, dataset_of, image_record, refusal, write_coco

REAL_SETS = Path(__file__).parents[2] / "shared" / "data"
pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")


def test_classes_and_targets_in_file_order(tmp_path):
    """Classes are contiguous in the order of the file's ids; images keep the file's order, ids and sizes."""
    images = [image_record(9, "b.jpg"), image_record(4, "empty.jpg", 50, 20), image_record(5, "a.jpg")]
    boxes = [box_record(1, (1, 2, 3, 4), 5, 90), box_record(2, (-0.5, 20, 41, 10.5), 9, 2), box_record(3, image_id=5)]
    categories = [{"id": 90, "name": "z"}, {"id": 2, "name": "b"}, {"id": 3, "name": "m"}]
    dataset = CocoDataset(write_coco(tmp_path, images, boxes, categories))
    assert (dataset.class_names, dataset.category_ids) == (["b", "m", "z"], [2, 3, 90])
    pictures, targets = collate([dataset[i] for i in range(len(dataset))])
    assert [target["image_id"] for target in targets] == [9, 4, 5]
    assert [target["orig_size"] for target in targets] == [(30, 40), (20, 50), (30, 40)]
    assert targets[0]["boxes"].tolist() == [[0, 20, 40, 30]]  # clipped
    assert targets[2]["boxes"].tolist() == [[1, 2, 4, 6], [5, 6, 15, 18]] and targets[2]["labels"].tolist() == [2, 1]
    assert all(type(tensor) is torch.Tensor for tensor in pack(pictures, targets))
    assert pictures[1].shape == (3, 20, 50) and pictures[1].dtype == torch.uint8


def test_degenerate_boxes_are_neither_targets_nor_truth(tmp_path):
    """Without area and iscrowd, and with an annotation 0, a perfect detector has AP 1."""
    bad = [(5, 5, 0, 9), (5, 5, 9, -1), (5, 5, float("nan"), 9), (5, 5, float("inf"), 9), (40, 5, 0.5, 9)]
    good = [box_record(0, (9, 9, 1, 1)), box_record(1, (20, 2, 9, 9)) | {"area": None}]
    dataset = CocoDataset(write_coco(tmp_path, boxes=[*good, *(box_record(i, box) for i, box in enumerate(bad, 2))]))
    assert (dataset.num_boxes, dataset.dropped_boxes) == (2, 5)
    assert dataset[0][1]["boxes"].tolist() == [[9, 9, 10, 10], [20, 2, 29, 11]]
    assert [record["id"] for record in dataset.annotations["annotations"]] == [0, 1]
    assert coco_metrics(dataset.annotations, [r | {"score": 0.9} for r in good])["AP"] == pytest.approx(1.0)


def test_exif_rotation(tmp_path):
    """What is stored on the left is shown on top, and the record has the size that is shown."""
    split = write_coco(tmp_path, [image_record(1, "a.jpg", 30, 40)], pixels=False)
    stored, exif = np.zeros((30, 40, 3), np.uint8), Image.Exif()
    stored[:, :20] = 255
    exif[0x0112] = 6
    Image.fromarray(stored).save(split.images / "a.jpg", exif=exif)
    image, _ = CocoDataset(split)[0]
    assert image.shape == (3, 40, 30) and image[:, :18].min() > 200 and image[:, 22:].max() < 50


BREAKS = {  # name of an image -> what breaks it, and what is said then
    "no-image.jpg": (lambda path: path.write_bytes(b"no image"), "cannot be read"),
    "cut-off.jpg": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "cannot be read: .*truncated"),
    "missing.jpg": (Path.unlink, "there is no image file"),
    "size.jpg": (lambda path: Image.new("RGB", (30, 40)).save(path), "40 x 30 .*30 x 40"),
    "huge.jpg": (lambda path: Image.new("1", (12_000, 12_000)).save(path, "png"), "cannot be read: .*12000 x 12000 px"),
}


def test_broken_or_huge_image_is_named(tmp_path):
    """Also where the check at the start has not seen the fault."""
    split = write_coco(tmp_path, [image_record(i, name) for i, name in enumerate(BREAKS)])
    dataset = CocoDataset(split)
    for i, (name, (break_image, story)) in enumerate(BREAKS.items()):
        break_image(split.images / name)
        with pytest.raises(DatasetError, match=rf"instances_train.json, image {i}\b.*{story}") as error:
            dataset[i]
        assert name in str(error.value)
    assert "image 4 (huge.jpg): " in refusal(split)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_named_once_and_replaced(tmp_path, capfd, workers):
    """Loader processes count together."""
    split, bad = write_coco(tmp_path, [image_record(i, f"{i}.jpg") for i in range(15)]), (0, 3, 4, 7, 8, 9, 14)
    for i, (break_image, _) in zip(bad, itertools.cycle(BREAKS.values()), strict=False):
        break_image(split.images / f"{i}.jpg")
    dataset = CocoDataset(split, bad_images="skip")
    loader = DataLoader(dataset, 4, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0)
    for _ in range(2):
        ids = [[target["image_id"] for target in targets] for _, targets in loader]
        assert ids == [[1, 1, 2, 5], [5, 5, 6, 10], [10, 10, 10, 11], [12, 13, 1]]
    said = capfd.readouterr().err.splitlines()
    assert sorted(line.split(": ")[0] for line in said) == [f"skipped bad image {n} (at most 10)" for n in range(1, 8)]
    assert all(sum(f"image {i}" in line and f"{i}.jpg" in line for line in said) == 1 for i in bad)


@pytest.mark.parametrize(
    ("images", "story"),
    [(1, "instances_train.json: not one image can be used"), (11, "11 images.* skip takes 10 at most"),
     (1200, "13 images cannot be used, and --bad-images skip takes 12 at most")],
)  # fmt: skip
def test_too_many_bad_images_are_an_error(tmp_path, images, story):
    split = write_coco(tmp_path, [image_record(i, f"{i}.jpg") for i in range(images)], pixels=False)
    with pytest.raises(DatasetError, match=story):
        CocoDataset(split, bad_images="skip")[0]


def test_flip_and_resizing_take_boxes_and_regions_along(tmp_path):
    """Each is clipped, and left out under 1 px, before and after the transform."""
    crowds = [(30, 20, 10.5, 10.5), (0, 6, 10, 12), (5, 5, 0, 9), (20, 20, 0.4, 9)]
    boxes = [box_record(i, box, iscrowd=1) for i, box in enumerate(crowds, 1)]
    boxes += [box_record(10, (0, 6, 10, 12)), box_record(11, (20, 20, 0.4, 9))]
    split = write_coco(tmp_path, boxes=boxes)
    half = np.repeat(np.uint8([[0] * 20 + [255] * 20]), 30, 0)
    Image.fromarray(half).save(split.images / "a.jpg")
    dataset = CocoDataset(split, train_transform((60, 100), "flip"))
    torch.manual_seed(0)  # which flips
    image, target = dataset[0]
    assert image.shape == (3, 60, 80) and target["orig_size"] == (30, 40)
    assert image[:, :, :38].min() > 200 and image[:, :, 42:].max() < 50
    assert target["boxes"].tolist() == [[60, 12, 80, 36]] and target["labels"].tolist() == [0]
    assert target["ignore"].tolist() == [[0, 40, 20, 60], [60, 12, 80, 36]]
    assert (dataset.num_boxes, dataset.dropped_boxes, dataset.crowd_boxes) == (2, 0, 4)


def test_eval_transform_keeps_every_box(tmp_path):
    boxes = [box_record(1, (0, 6, 10, 12)), box_record(2, (20, 20, 0.4, 9))]
    image, target = CocoDataset(write_coco(tmp_path, boxes=boxes), eval_transform((15, 100)))[0]
    assert image.shape == (3, 15, 20) and image.dtype == torch.uint8
    torch.testing.assert_close(torch.as_tensor(target["boxes"]), torch.tensor([[0, 3, 5, 9], [10, 10, 10.2, 14.5]]))


def test_resized_size_is_that_of_the_transform_and_within_the_limits():
    sizes = [(37, 91), (91, 37), (50, 50), (123, 45), (222, 223), (399, 20)]
    for image_size, (height, width) in itertools.product([(200, 333), (97, 131), (128, 128)], sizes):
        image = eval_transform(image_size)(tv_tensors.Image(torch.zeros(3, height, width, dtype=torch.uint8)))
        assert (size := tuple(image.shape[-2:])) == resized_size(height, width, image_size)
        assert min(size) == image_size[0] or max(size) == image_size[1] >= max(size)


def test_size_and_flip_follow_seed_epoch_and_image_alone(tmp_path):
    """Not the number of loader processes, nor what was drawn before."""
    images = [image_record(i, f"{i}.jpg") for i in range(24)]
    split = write_coco(tmp_path, images, [box_record(i + 1, (0, 6, 10, 12), i) for i in range(24)])
    dataset = CocoDataset(split, train_transform((30, 80), "flip", sides=[15, 30, 60]))

    def drawn(seed: int, keys: list[tuple[int, int]], workers: int = 0) -> list[tuple[int, bool]]:
        loader = DataLoader(SeededDataset(dataset, seed), 4, sampler=keys, num_workers=workers, collate_fn=collate)
        samples = [pair for images, targets in loader for pair in zip(images, targets, strict=True)]
        return [(image.shape[1], bool(target["boxes"][0, 0] > 0)) for image, target in samples]

    keys = [(epoch, i) for epoch in range(2) for i in range(24)]
    first = drawn(3, keys)
    assert {side for side, _ in first} == {15, 30, 60} and 12 < sum(flipped for _, flipped in first) < 36
    torch.manual_seed(99)
    assert drawn(3, keys[::-1], workers=2) == first[::-1]
    assert first[:24] != first[24:] and drawn(4, keys) != first


@pytest.mark.parametrize(
    ("augment", "sides"),
    {"none": {60}, "flip": {60}, "light": {*range(48, 71)}, "strong": {*range(48, 71)}}.items(),
)
def test_augmented_samples_keep_the_longest_side_and_follow_seed_epoch_and_image(shapes, augment, sides):
    dataset = dataset_of(shapes)
    dataset.transform = train_transform((60, 70), augment)
    keys = [(epoch, i) for epoch in range(4) for i in range(21)]
    loader = partial(DataLoader, SeededDataset(dataset, 0), batch_size=None, sampler=keys)
    samples = list(loader())
    torch.manual_seed(99)
    for (image, target), (again, same) in zip(samples, loader(num_workers=2), strict=True):
        boxes = torch.cat([target["boxes"], target["ignore"]])
        assert image.dtype == torch.uint8 and max(image.shape) <= 70
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all() and (boxes >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor(image.shape[:0:-1])).all()
        assert torch.equal(image, again) and all(torch.equal(target[k], same[k]) for k in ("boxes", "labels", "ignore"))
    drawn = {min(image.shape[1:]) for image, _ in samples}
    assert set(training_sides((60, 70), augment)) == sides
    assert drawn == sides if len(sides) == 1 else len(drawn & sides) > 10
    assert (augment == "strong") == any(len(target["ignore"]) for _, target in samples)


@pytest.mark.parametrize(
    ("augment", "recoloured", "zoomed_out"), [("flip", False, False), ("light", True, False), ("strong", True, True)]
)
def test_light_distorts_colours_and_strong_zooms_out(augment, recoloured, zoomed_out):
    """Of an image of one colour; a canvas around it has another."""
    image = tv_tensors.Image(torch.tensor([10, 200, 30], dtype=torch.uint8)[:, None, None].expand(3, 30, 40))
    boxes = tv_tensors.BoundingBoxes([[5.0, 5, 20, 20]], format="XYXY", canvas_size=(30, 40))
    corners = []
    for seed in range(20):
        torch.manual_seed(seed)
        picture, _ = train_transform((30, 50), augment)(image, {"boxes": boxes, "labels": torch.tensor([0])})
        corners.append(picture[:, (0, 0, -1, -1), (0, -1, 0, -1)])
    assert any((corner != image[:, 0, :4]).any() for corner in corners) == recoloured
    assert any((corner != corner[:, :1]).any() for corner in corners) == zoomed_out


def test_crop_keeps_objects_by_their_centre_and_ignores_what_it_leaves_of_others():
    """The pixels hold their own places. Without a box, and for regions to ignore alone, the same holds."""
    y, x = torch.meshgrid(torch.arange(120), torch.arange(160), indexing="ij")
    image = tv_tensors.Image(torch.stack([x, y, y]).to(torch.uint8))
    boxes = torch.tensor([[10.0, 10, 50, 40], [60, 50, 140, 110], [0, 0, 160, 60], [100, 5, 104, 9]])
    cut = 0
    for seed, (rows, labels) in enumerate(30 * [(4, [0, 1, IGNORE, 2]), (1, [IGNORE]), (0, [])]):
        torch.manual_seed(seed)
        truth = tv_tensors.BoundingBoxes(boxes[4 - rows :], format="XYXY", canvas_size=(120, 160))
        cropped, target = Crop()(image, {"boxes": truth, "labels": torch.tensor(labels, dtype=torch.int64)})
        (left, top), (height, width) = cropped[:2, 0, 0].tolist(), cropped.shape[1:]
        limits = torch.tensor([width, height] * 2)
        moved = torch.minimum((truth - torch.tensor([left, top] * 2)).clamp(min=0), limits)
        centres = (truth[:, :2] + truth[:, 2:]) / 2 - torch.tensor([left, top])
        inside = ((centres > 0) & (centres < limits[:2])).all(1)
        assert torch.equal(target["boxes"].as_subclass(torch.Tensor), moved.as_subclass(torch.Tensor))
        assert target["labels"].tolist() == [c if i else IGNORE for c, i in zip(labels, inside, strict=True)]
        assert rows or cropped.shape == image.shape
        cut += int((~inside).sum())
    assert cut > 20


def test_image_that_resizing_would_make_empty_is_named_or_skipped(tmp_path, capfd):
    images = [image_record(1, "a.png", 2000, 1), image_record(2, "b.png")]
    split, transform = write_coco(tmp_path, images, [box_record(1, (3, 0, 9, 1))]), eval_transform((160, 267))
    with pytest.raises(DatasetError, match="instances_train.json, image 1: .*W: 267"):
        CocoDataset(split, transform)[0]
    assert CocoDataset(split, transform, bad_images="skip")[0][1]["image_id"] == 2
    assert "skipped bad image 1 (at most 10)" in capfd.readouterr().err


def write_large(root: Path, images: int, boxes: int) -> Split:
    """An annotation file of COCO's kind, polygons included, without pictures."""
    polygon = ",".join(f"{i}.25" for i in range(40))
    files = (f'{{"id":{i},"file_name":"{i:012d}.jpg","width":640,"height":480}}' for i in range(images))
    records = (
        f'{{"segmentation":[[{polygon}]],"area":400.5,"iscrowd":{int(k % 85 == 0)},"image_id":{k * 7919 % images},'
        f'"bbox":[{k % 500}.25,{k % 400}.5,{20 + k % 100}.5,{20 + k % 50}.75],"category_id":{1 + k % 80},"id":{k}}}'
        for k in range(boxes)
    )
    kinds = (f'{{"supercategory":"thing","id":{c},"name":"class {c}"}}' for c in range(1, 81))
    split = Split("train", root / "instances_train.json", root / "train", COCO)
    split.images.mkdir()
    with open(split.annotations, "w") as file:
        for start, rows in (('{"images":[', files), ('],"annotations":[', records), ('],"categories":[', kinds)):
            file.write(start + next(rows))
            file.writelines(f",{row}" for row in rows)
        file.write("]}")
    return split


def test_bytes_per_image_and_box(tmp_path):
    """The arrays alone stay: no dict or list of a record, which would be 500 bytes and more."""
    images, boxes = 1_500, 10_000
    split = write_large(tmp_path, images, boxes)
    CocoDataset(write_coco(tmp_path / "first"), bad_images="skip")  # loads modules
    gc.collect()
    tracemalloc.start()
    dataset = CocoDataset(split, bad_images="skip")
    gc.collect()
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 110 * images + 95 * boxes + 100_000
    assert peak < 4 * split.annotations.stat().st_size
    assert len(dataset) == images and dataset.num_boxes + dataset.crowd_boxes == boxes


@pytest.mark.slow
def test_start_with_a_set_of_the_size_of_coco(tmp_path):
    """118,287 images and 860,001 boxes: 12 s of CPU time and 1.0 GB where this was written."""
    split = write_large(tmp_path, 118_287, 860_001)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    dataset = CocoDataset(split, bad_images="skip")
    seconds, grown = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert (len(dataset), dataset.num_boxes, dataset.crowd_boxes) == (118_287, 849_883, 10_118)
    assert seconds < 60 and grown < 2_000_000  # KiB


@pytest.mark.parametrize(
    ("name", "counts"), {"bccd": [(205, 2804, 3), (87, 1137, 3)], "coco128": [(128, 929, 80)]}.items()
)
def test_real_set(name, counts):
    """Images, boxes and classes are those of the set's own description, and every box is usable."""
    if not (REAL_SETS / name).is_dir():
        pytest.skip(f"{REAL_SETS / name} is not on this machine")
    datasets = [CocoDataset(split) for split in find_splits(str(REAL_SETS / name)) if split]
    assert [(len(d), d.num_boxes, len(d.class_names)) for d in datasets] == counts
    assert not any(d.dropped_boxes for d in datasets) and datasets[0][0][0].dtype == torch.uint8
