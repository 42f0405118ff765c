"""Exported files, run by onnxruntime and torch, against the detector: the same detections at any batch and size.

A detection pairs with one of the same label whose box and score are within 1e-4: where scores are as close as that,
any order is right.
"""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.ops import batched_nms
from torchvision.transforms.v2.functional import pil_to_tensor

import export as export_script
from errors import UserError
from export import ExportedDetector
from images import load_image
from model import Detector, DetectorConfig, load, save_weights
from model.batch import pad_images
from model.postprocess import Detections, suppressed

NAMES, IDS = ["cat", "dog", "tuba"], [3, 5, 9]
IMAGE_SIZE = (160, 256)
REAL_SETS = Path(__file__).parents[2] / "shared" / "data"
TOLERANCE = 1e-4  # px, and of scores
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporters, about themselves


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with a detector that finds dozens of objects with scores far apart, many of them overlapping."""
    torch.manual_seed(0)
    config = DetectorConfig(
        num_classes=3, backbone="test_resnet", channels=16, head_convs=0, image_size=IMAGE_SIZE, topk_per_level=300
    )
    detector = Detector(config)
    for parameter in detector.head.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    torch.nn.init.normal_(detector.head.box.weight, std=0.03)
    path = tmp_path_factory.mktemp("weights") / "ota.safetensors"
    save_weights(path, detector, {"class_names": NAMES, "category_ids": IDS})
    return path


@pytest.fixture(scope="module")
def detector(weights):
    return load(weights)


def scenes(batch: int, size: tuple[int, int]) -> list[torch.Tensor]:
    """Generated images of coloured shapes, the last one smaller than `size` (height, width)."""
    generator = torch.Generator().manual_seed(batch)
    images = []
    for i in range(batch):
        height, width = (side - 21 * (i == batch - 1 > 0) for side in size)
        picture = Image.effect_noise((width, height), 40).convert("RGB")
        draw = ImageDraw.Draw(picture)
        for _ in range(12):
            x, y, w, h, *color = (torch.rand(7, generator=generator) * 256).int().tolist()
            draw.ellipse((x, y, x + w / 3 + 8, y + h / 3 + 8), fill=tuple(color))
        images.append(pil_to_tensor(picture))
    return images


def run_onnx(path: Path) -> tuple:
    """A function of images and sizes, and the metadata."""
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}

    def run(images, sizes):
        outputs = session.run(["boxes", "scores", "labels"], {"images": images.numpy(), "sizes": sizes.numpy()})
        return tuple(map(torch.from_numpy, outputs))

    return run, metadata


def run_torch(path: Path) -> tuple:
    files = {"ota.json": ""}
    program = torch.export.load(path, extra_files=files)
    return program.module(), json.loads(files["ota.json"])


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("onnx", True), id="onnx-nms"),
        pytest.param(("onnx", False), id="onnx-candidates", marks=pytest.mark.slow),
        pytest.param(("torch", True), id="torch-nms", marks=pytest.mark.slow),
        pytest.param(("torch", False), id="torch-candidates", marks=pytest.mark.slow),
    ],
)
def exported(call, request, weights, tmp_path_factory):
    """Run function, metadata, and whether NMS is inside, of a file that export.py wrote."""
    kind, nms = request.param
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    path = tmp_path_factory.mktemp("exported") / f"ota.{kind}"
    call(export_script, "--weights", weights, "--format", kind, "--out", path, *(["--nms"] if nms else []))
    return *(run_onnx if kind == "onnx" else run_torch)(path), nms


def detections_of(outputs: tuple, nms: bool, nms_iou: float, limit: int) -> list[Detections]:
    """Per image the rows with a score, of candidates those that survive NMS."""
    detections = []
    for boxes, scores, labels in zip(*outputs, strict=True):
        count = int((scores > 0).sum())
        assert (scores[1:] <= scores[:-1]).all() and (labels[count:] == -1).all() and not boxes[count:].any()
        rows = torch.arange(count)
        if not nms:
            rows = batched_nms(boxes[:count].double(), scores[:count].double(), labels[:count], nms_iou)[:limit]
        detections.append(Detections(boxes[rows], scores[rows], labels[rows], NAMES))
    return detections


def assert_same(found: list[Detections], wanted: list[Detections], at_least: int = 10) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert len(one.scores) == len(other.scores) >= at_least
        apart = (one.boxes[:, None] - other.boxes).abs().amax(-1)
        apart = apart.maximum((one.scores[:, None] - other.scores).abs())
        apart = apart.masked_fill(one.labels[:, None] != other.labels, torch.inf)
        assert apart.amin(0).max() <= TOLERANCE and apart.amin(1).max() <= TOLERANCE


def assert_same_as_detector(detector: Detector, exported: tuple, images: list[torch.Tensor]) -> None:
    run, _, nms = exported
    batch, sizes = pad_images(images)
    config = detector.config
    found = detections_of(run(batch, sizes), nms, config.nms_iou, config.max_detections)
    with torch.no_grad():
        assert_same(found, detector.detect(batch, sizes))


@pytest.mark.parametrize("size", [(160, 256), (320, 192)], ids=["160x256", "320x192"])
@pytest.mark.parametrize("batch", [1, 3], ids=["B1", "B3"])
def test_detections_of_the_file_are_those_of_the_model(detector, exported, batch, size):
    assert_same_as_detector(detector, exported, scenes(batch, size))


@pytest.mark.parametrize("name", ["bccd", "coco128"])
def test_detections_on_real_images(detector, exported, name):
    paths = sorted((REAL_SETS / name).rglob("*.jpg"))[:24:8]
    if not paths:
        pytest.skip(f"no images in {REAL_SETS / name}")
    for path in paths:
        assert_same_as_detector(detector, exported, [detector.resize(load_image(path))])


SLOTS = {  # sizes given for two slots of 160 x 256, and those they stand for
    "over-the-slot": ([[999, 2**40], [161, 200]], [[160, 256], [160, 200]]),
    "one-empty": ([[0, 0], [139, 235]], [[0, 0], [139, 235]]),
    "no-width-no-height": ([[100, 0], [0, 256]], [[0, 0], [0, 0]]),
    "negative": ([[-1, -7], [160, 256]], [[0, 0], [160, 256]]),
    "one-pixel": ([[1, 1], [0, 0]], [[1, 1], [0, 0]]),
}


@pytest.mark.parametrize("name", SLOTS)
def test_sizes_that_do_not_fit_the_slot(exported, name):
    """They are cut to it, and where no pixel is left there is no detection, not even in the whole batch."""
    run, _, _ = exported
    batch, _ = pad_images(scenes(2, (160, 256)))
    given, meant = (torch.tensor(sizes) for sizes in SLOTS[name])
    outputs = run(batch, given)
    assert all(torch.equal(one, other) for one, other in zip(outputs, run(batch, meant), strict=True))
    boxes, scores, labels = outputs
    assert torch.equal((scores > 0).any(1), (meant > 0).all(1))
    assert (boxes <= meant.flip(1).repeat(1, 2)[:, None]).all() and torch.equal(labels == -1, scores == 0)


def test_batch_without_images(exported):
    run, _, _ = exported
    batch, sizes = pad_images(scenes(1, (160, 256)))
    one, none = run(batch, sizes), run(batch[:0], sizes[:0])
    assert [x.shape for x in none] == [(0, *x.shape[1:]) for x in one]
    assert [x.dtype for x in none] == [x.dtype for x in one]


def test_metadata_tell_what_a_program_needs(detector, exported):
    _, metadata, nms = exported
    assert metadata.pop("preprocessing").startswith("RGB, upright, uint8 0..255")
    assert metadata == {
        "class_names": NAMES, "category_ids": IDS, "image_size": list(IMAGE_SIZE), "nms": nms,
        "score_threshold": 0.05, "nms_iou": 0.6, "max_detections": 100,
    }  # fmt: skip


@pytest.mark.parametrize("nms", [True, False], ids=["nms", "candidates"])
@pytest.mark.parametrize("kind", ["scenes", "equal-scores"])
def test_graph_gives_what_the_detector_gives(weights, nms, kind):
    """Before it is exported; a flat image has the same scores at all points away from its border."""
    images = scenes(2, (160, 224)) if kind == "scenes" else [torch.zeros(3, 160, 224, dtype=torch.uint8)] * 2
    graph = ExportedDetector(load(weights), suppressed if nms else None).eval()
    with torch.no_grad():
        assert_same_as_detector(graph.detector, (graph, {}, nms), images)


def test_nothing_found_is_rows_without_a_score(weights):
    graph = ExportedDetector(load(weights), suppressed).eval()
    with torch.no_grad():
        graph.detector.head.cls.bias.fill_(-30)
        boxes, scores, labels = graph(*pad_images(scenes(2, (160, 160))))
    assert boxes.shape == (2, 100, 4) and not boxes.any() and not scores.any() and (labels == -1).all()


def test_packages_that_are_missing_are_named(call, weights, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs onnx and onnxscript: pip install -e "\.\[export\]"'):
        call(export_script, "--weights", weights)


def test_backbone_that_cannot_be_exported_is_named(call, weights, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("constraints violated")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UserError, match="cannot export test_resnet .* any size: constraints violated"):
        call(export_script, "--weights", weights, "--format", "torch")


@pytest.mark.parametrize("out", [None, "sub/x.pt2"], ids=["beside-the-weights", "out"])
def test_where_the_file_goes(call, weights, tmp_path, monkeypatch, out):
    monkeypatch.setattr(export_script, "export_torch", lambda detector, nms: b"exported")
    wanted = tmp_path / out if out else weights.with_suffix(".pt2")
    said = call(export_script, "--weights", weights, "--format", "torch", *(["--out", wanted] if out else []))
    assert wanted.read_bytes() == b"exported" and f"wrote {wanted}" in said
