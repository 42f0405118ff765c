"""Exported files, run by onnxruntime and torch, against the detector: the same detections at any batch and size.

A detection pairs with one of the same label whose box and score are within 1e-4: where scores are as close as that,
any order is right.
"""

import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torchvision.ops import batched_nms

import export as export_script
from errors import UserError
from model import Detections, DetectorConfig, load
from model.batch import pad_images
from tests.support.detectors import IDS, NAMES, random_batch

TOLERANCE = 1e-4  # px, and of scores
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporters, about themselves


@pytest.fixture
def weights(exported) -> Path:
    return exported / "ota.safetensors"


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


def assert_same(outputs: tuple, wanted: list[Detections], nms: bool, config: DetectorConfig) -> None:
    for boxes, scores, labels, other in zip(*outputs, wanted, strict=True):
        count = int((scores > 0).sum())
        assert (scores[1:] <= scores[:-1]).all() and (labels[count:] == -1).all() and not boxes[count:].any()
        rows = torch.arange(count)
        if not nms:  # candidates for it
            rows = batched_nms(boxes[:count].double(), scores[:count].double(), labels[:count], config.nms_iou)
        rows = rows[: config.max_detections]
        assert len(rows) == len(other.scores) >= 10
        apart = (boxes[rows, None] - other.boxes).abs().amax(-1)
        apart = apart.maximum((scores[rows, None] - other.scores).abs())
        apart = apart.masked_fill(labels[rows, None] != other.labels, torch.inf)
        assert apart.amin(0).max() <= TOLERANCE and apart.amin(1).max() <= TOLERANCE


@pytest.mark.parametrize(
    "kind, nms",
    [
        pytest.param("onnx", True, id="onnx-nms"),
        pytest.param("onnx", False, id="onnx-candidates", marks=pytest.mark.slow),
        pytest.param("torch", True, id="torch-nms", marks=pytest.mark.slow),
        pytest.param("torch", False, id="torch-candidates", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_file_detects_what_the_detector_detects(call, exported, weights, tmp_path, kind, nms):
    """At any batch and size, and metadata say what it is."""
    if kind == "onnx":
        pytest.importorskip("onnxscript")
    path, detector = exported / "ota.onnx", load(weights)
    if not (kind == "onnx" and nms):
        path = tmp_path / f"ota.{kind}"
        call(export_script, "--weights", weights, "--format", kind, "--out", path, *(["--nms"] if nms else []))
    run, metadata = (run_onnx if kind == "onnx" else run_torch)(path)
    for image_sizes in ([(160, 256)], [(320, 192), (320, 192), (299, 171)]):
        batch, sizes = pad_images(random_batch(image_sizes)[0])
        one = run(batch, sizes)
        assert_same(one, detector.detect(batch, sizes), nms, detector.config)
        none = run(batch[:0], sizes[:0])
        assert [(x.shape, x.dtype) for x in none] == [((0, *x.shape[1:]), x.dtype) for x in one]

    # Sizes are cut to the slot, and where no pixel is left there is no detection.
    batch, _ = pad_images(random_batch([(160, 256)] * 2)[0])
    for given, meant in (([[999, 2**40], [139, 0]], [[160, 256], [0, 0]]), ([[-1, -7], [0, 256]], [[0, 0], [0, 0]])):
        meant = torch.tensor(meant)
        outputs = run(batch, torch.tensor(given))
        assert all(torch.equal(one, other) for one, other in zip(outputs, run(batch, meant), strict=True))
        boxes, scores, labels = outputs
        assert torch.equal((scores > 0).any(1), (meant > 0).all(1)) and torch.equal(labels == -1, scores == 0)
        assert (boxes <= meant.flip(1).repeat(1, 2)[:, None]).all()

    assert metadata.pop("preprocessing").startswith("RGB, upright, uint8 0..255")
    assert metadata == {
        "class_names": NAMES, "category_ids": IDS, "cuts": [0.5] * len(NAMES), "image_size": [160, 256], "nms": nms,
        "score_threshold": 0.05, "nms_iou": 0.6, "max_detections": 100,
    }  # fmt: skip


def test_where_the_file_goes(call, weights, tmp_path, monkeypatch):
    """Beside the weights, into the current folder for a file of the hub, or where --out says."""
    monkeypatch.setattr(export_script, "export_torch", lambda detector, nms: b"exported")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_: str(weights))
    monkeypatch.chdir(tmp_path)
    beside, out = weights.with_suffix(".pt2"), ("--out", "sub/x.pt2")
    for name, wanted, flags in ((weights, beside, ()), ("hf://a/b", "ota.pt2", ()), (weights, "sub/x.pt2", out)):
        said = call(export_script, "--weights", name, "--format", "torch", *flags)
        assert Path(wanted).read_bytes() == b"exported" and f"wrote {wanted}" in said
    with pytest.raises(UserError, match="ota.pt2 cannot be written: .*; name another folder with --out"):
        call(export_script, "--weights", weights, "--format", "torch", "--out", "ota.pt2/x.pt2")


def test_what_cannot_be_exported_is_named(call, weights, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("constraints violated")

    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(UserError, match="cannot export test_resnet .* any size: constraints violated"):
        call(export_script, "--weights", weights, "--format", "torch")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'needs onnx and onnxscript: pip install -e "\.\[export\]"'):
        call(export_script, "--weights", weights)
