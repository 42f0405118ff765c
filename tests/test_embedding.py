"""docs/embedding.md in detectors that others wrote: torchvision's FCOS and RetinaNet, and Ultralytics' YOLO."""

import json
import re
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_convert

from data import CocoDataset, find_splits, generate_shapes
from kernels import OTAConfig, PointGrid, ota_assign
from studies import torchvision_fcos
from studies.torchvision_fcos import metrics_of, train
from tests.support.backends import BACKENDS, ORDINARY, OTHER, assert_equal, assign, scene_of
from tests.support.embedding import PAGE, SIZE_PX, gradients, names_of, save_gradients_of_rank, torchvision_detector
from tests.support.scenes import make_scene

pytestmark = pytest.mark.usefixtures("one_thread")
TORCHVISION = ("OTAFCOS", "OTARetinaNet")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    """Two images, with 2 and 5 objects of one class."""
    root = tmp_path_factory.mktemp("embedding") / "shapes"
    generate_shapes(root, train_images=2, val_images=0, size_px=SIZE_PX, crowded_share=0, one_class=True)
    return CocoDataset(find_splits(str(root))[0])


@pytest.fixture
def batch(dataset) -> tuple[list, list]:
    images, targets = zip(*dataset, strict=True)
    return [image / 255 for image in images], list(targets)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_detector_learns_two_images(name, dataset):
    model = torchvision_detector(name)
    train(model, dataset, steps=100, batch_size=2, seed=0)
    assert metrics_of(model, dataset)["AP"] > 0.9


def test_study_of_torchvision_labels(shapes, tmp_path):
    torchvision_fcos.main(["--data", str(shapes), "--seeds", "0", "--steps", "1", "--out", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert {name: len(seeds) for name, seeds in rows.items()} == dict.fromkeys(torchvision_fcos.PER_Q, 1)


def test_two_ranks_have_the_mean_gradient(batch, tmp_path):
    """The second image is without objects."""
    batch[1][1] |= {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    torch.multiprocessing.spawn(save_gradients_of_rank, (tmp_path, batch), nprocs=2)
    for name in TORCHVISION:
        first, second = (gradients(torchvision_detector(name), *([part[i]] for part in batch)) for i in (0, 1))
        mean = {key: (first[key] + second[key]) / 2 for key in first}
        torch.testing.assert_close(torch.load(tmp_path / name), mean)


@pytest.fixture
def yolo(monkeypatch, tmp_path):
    """Ultralytics' smallest model, and its loss with OTA's labels."""
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path))  # importing ultralytics writes settings
    tasks, cfg = (pytest.importorskip(f"ultralytics.{module}") for module in ("nn.tasks", "cfg"))
    torch.manual_seed(0)
    model = tasks.DetectionModel("yolo11n.yaml", nc=3, verbose=False)
    model.args = cfg.get_cfg()
    model.criterion = model.init_criterion()
    model.criterion.assigner = names_of("OTAAssigner")["OTAAssigner"](model.stride)
    return model


def yolo_batch(images: list, targets: list) -> dict:
    boxes = torch.cat([torch.as_tensor(target["boxes"]) for target in targets])
    image = torch.arange(len(images)).repeat_interleave(torch.tensor([len(target["boxes"]) for target in targets]))
    labels = torch.cat([target["labels"] for target in targets])
    boxes = box_convert(boxes, "xyxy", "cxcywh") / SIZE_PX
    return {"img": torch.stack(images), "batch_idx": image, "cls": labels[:, None], "bboxes": boxes}


def test_ultralytics_loss_falls(yolo, batch):
    optimizer, losses = torch.optim.AdamW(yolo.parameters(), 2e-3), []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(yolo.loss(yolo_batch(*batch))[0].sum())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2


def test_ultralytics_labels_are_those_of_ota_assign(yolo, batch):
    """Rows are padded, as the images have 2 and 5 objects; a batch without objects has no rows."""
    for target in batch[1]:
        target["labels"] = torch.arange(len(target["labels"])) % 3
    calls, assigner, predictions = [], yolo.criterion.assigner, yolo(torch.stack(batch[0]))
    yolo.criterion.assigner = lambda *inputs: calls.append((inputs, assigner(*inputs))) or calls[-1][1]
    yolo.criterion(predictions, yolo_batch(*batch))
    (_, boxes, _, gt_labels, gt_boxes, is_gt), (labels, targets, scores, matched, row) = calls[0]
    kept, offsets = is_gt[..., 0] > 0, torch.tensor([0, 2, 7])
    grid = PointGrid.for_image((SIZE_PX, SIZE_PX), (8, 16, 32))
    truth = gt_boxes[kept], gt_labels[kept][:, 0].long(), offsets
    match = ota_assign(predictions["scores"].mT, boxes, *truth, grid)
    assert torch.equal(matched, match.gt_index >= 0) and matched.any(1).all()
    assert torch.equal(row[matched], (match.gt_index - offsets[:-1, None])[matched])
    assert torch.equal(targets[matched], truth[0][match.gt_index[matched]])
    assert torch.equal(labels[matched], truth[1][match.gt_index[matched]])
    assert torch.equal(scores.sum(2), match.iou) and torch.equal(scores[matched, labels[matched]], match.iou[matched])
    nothing = [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}] * 2
    assert yolo.criterion(predictions, yolo_batch(batch[0], nothing))[0].isfinite().all()


def test_order_of_another_head():
    """Two anchors per cell, cell by cell, are two levels of the grid."""
    scene = make_scene(PointGrid((8, 8, 16), ((9, 12), (9, 12), (5, 6))), (4, 2), 3)
    order = torch.cat([torch.arange(0, 216, 2), torch.arange(1, 216, 2), torch.arange(216, 246)])
    logits, boxes = torch.empty_like(scene.logits), torch.empty_like(scene.boxes)
    logits[:, order], boxes[:, order] = scene.logits, scene.boxes
    match = names_of("def assign_ordered(")["assign_ordered"](order, logits, boxes, *scene[2:])
    expected = ota_assign(*scene)
    assert torch.equal(match.gt_index[:, order], expected.gt_index) and torch.equal(match.iou[:, order], expected.iou)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_int32_labels(backend):
    """Neither changes the labels, and labels have no gradient."""
    scene, quick = scene_of([ORDINARY, OTHER], [0, 1]), OTAConfig(iterations=2)
    logits, boxes = (tensor.clone().requires_grad_() for tensor in scene[:2])
    narrow = (tensor.int() for tensor in scene[3:5])
    match = assign(logits, boxes, scene.gt_boxes, *narrow, scene.grid, quick, backend=backend)
    assert_equal(match, assign(*scene, quick, backend=backend))
    assert not match.iou.requires_grad


def test_tests_that_the_page_names_exist():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", PAGE.read_text())
    assert named and not [name for name in named if f"def {name}(" not in tests]
