"""Weights files from others: whatever a file holds, it loads and predicts, or one UserError names what is wrong."""

import copy
import gzip
import json
import random
import socket
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import model.weights
from errors import UserError
from eval import load_with_data
from kernels import OTAConfig
from model import Detector, DetectorConfig, load, load_weights, save_weights

CLASSES = {"class_names": ["cat", "traffic light"], "category_ids": [3, 7]}
TRAINING = {"data": "shapes", "box": None, "training": {"step": 9, "metrics": {"AP": 0.5}}}

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_detector(backbone: str = "test_resnet") -> Detector:
    torch.manual_seed(0)
    return Detector(DetectorConfig(2, backbone, (64, 107), channels=8, head_convs=1)).eval()


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> tuple[dict, dict[str, torch.Tensor]]:
    """Metadata and tensors of a file that train.py could have written."""
    path = tmp_path_factory.mktemp("valid") / "ota.safetensors"
    save_weights(path, tiny_detector(), CLASSES | TRAINING)
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["ota"]), {name: file.get_tensor(name) for name in file.keys()}


@pytest.fixture
def write(tmp_path, valid):
    """Write a file whose metadata, a text or an object, or tensors are replaced; returns its path."""

    def write(metadata=None, tensors=None):
        metadata = valid[0] if metadata is None else metadata
        text = metadata if isinstance(metadata, str) else json.dumps(metadata)
        save_file(valid[1] if tensors is None else tensors, tmp_path / "x.safetensors", {"ota": text})
        return tmp_path / "x.safetensors"

    return write


def replaced(metadata: dict, path: list[str], value: object) -> dict:
    """Return a copy with another value at a path."""
    parent = metadata = copy.deepcopy(metadata)
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    return metadata


# By chance

ODD = [None, True, 0, -1, 2.5, float("nan"), 2**63, 10**400, "", "\ud800\x1b[2J", [], ["a", "a"], [0.0] * 3, {"a": 1}]


def paths(value: object, path: tuple = ()) -> list[tuple]:
    """Return the paths of everything inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, item in inner for found in [(*path, key), *paths(item, (*path, key))]]


def test_60_spoilt_files_predict_or_are_refused_with_the_name_of_the_field(valid, write):
    rng, refused, image = random.Random(15), 0, torch.rand(3, 40, 64, generator=torch.Generator().manual_seed(0))
    for number in range(60):
        path = rng.choice(paths(valid[0]))
        name = [key for key in path if isinstance(key, str)][-1]
        try:
            detector = load(write(replaced(valid[0], path, rng.choice(ODD))))
        except UserError as error:
            refused, text = refused + 1, str(error)
            assert "does not fit" in text or name in text, (number, name, text)
            assert len(text) < 500 and text.isprintable(), (number, text)
            continue
        found = detector.predict(image, score=0)
        assert found.boxes.isfinite().all() and found.scores.isfinite().all(), (number, name)
        assert {*found.names} <= {*detector.class_names} and len({*detector.class_names}) == 2, (number, name)
    assert 30 < refused < 60


# By name

FLAWS = [
    ("architecture.channels", 33, "channels is 33, not a multiple of 8"),
    ("architecture.score_threshold", float("nan"), "score_threshold is nan"),
    ("architecture.image_size", [64, 16385], r"\(64, 16385\), not .* 16384"),
    ("architecture.assigner", [], r"assigner is \[\], not one of ota"),
    ("architecture.surprise", 5, "architecture has the unknown field 'surprise'"),
    ("architecture.ota.top_q", "x", "architecture.ota: "),
    ("normalisation.std", [0.1, 0.0, 0.1], "normalisation.std is .* from 0.001"),
    ("class_names", ["a", "a"], "class_names is .* distinct"),
    ("cuts", [0.5, 1.5], "cuts is .* from 0 to 1"),
    ("cuts", [0.5], "1 cuts for 2 classes"),
    ("training.metrics", {"AP": "0.5"}, "training.metrics.AP is '0.5'"),
    ("format", "ota-triton/2", "format is 'ota-triton/2', not 'ota-triton/1'"),
]


@pytest.mark.parametrize(("field", "value", "message"), FLAWS, ids=[f"{name}={value}" for name, value, _ in FLAWS])
def test_field_of_the_wrong_type_or_range_is_named(valid, write, field, value, message):
    with pytest.raises(UserError, match=message):
        load(write(replaced(valid[0], field.split("."), value)))


def test_metadata_that_are_no_object_are_refused(write):
    for text, message in (("[" * 100_000, "recursion"), ("9" * 5000, "digits"), ("{", "line 1")):
        with pytest.raises(UserError, match=f"metadata that this version cannot read: .*{message}"):
            load(write(text))


def test_tensor_that_does_not_fit_is_named(valid, write):
    name, variance = "head.cls.weight", "backbone.body.bn1.running_var"
    weight, others = valid[1][name], {n: tensor for n, tensor in valid[1].items() if n != name}
    unfit = [
        ({}, rf"1 tensors differ, '{name}' first: missing, needed: \[2, 8, 3, 3\] float"),
        ({name: weight, "x": weight.clone()}, r"'x' first: \[2, 8, 3, 3\] float, needed: none"),
        ({name: weight[0]}, r"first: \[8, 3, 3\] float, needed"),
        ({name: weight.int()}, r"first: \[2, 8, 3, 3\] torch.int32, needed"),
        ({name: weight + torch.nan}, f"'{name}' that are NaN"),
        ({name: weight, variance: -valid[1][variance]}, f"{variance}.*negative variance"),
    ]
    for change, message in unfit:
        with pytest.raises(UserError, match=message):
            load(write(tensors=others | change))


def test_file_chooses_no_address(valid, write, monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: asked.append(args))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: asked.append(args))
    for backbone in ("hf-hub:someone/repo", "local-dir:/tmp/resnet18", "https://example.com/resnet18", "resnet18.tag"):
        with pytest.raises(UserError, match=r"architecture.backbone is|resnet18.*\(--backbone\)"):
            load(write(replaced(valid[0], ["architecture", "backbone"], backbone)))
    assert not asked


def test_file_chooses_no_memory(valid, write, monkeypatch):
    """Only the network of the first comparison, which takes no memory, is built."""
    built = []
    monkeypatch.setattr(model.weights, "Detector", lambda config: built.append(config) or Detector(config))
    large = valid[0]["architecture"] | {"channels": 2**14, "head_convs": 100, "backbone": "resnet152"}
    with pytest.raises(UserError, match="does not fit"):
        load(write(valid[0] | {"architecture": large}))
    assert len(built) == 1


# Sound files


@torch.no_grad()
def test_buffers_that_no_file_holds_come_back(tmp_path):
    """Such as the indices of attention biases."""
    detector = tiny_detector("efficientformerv2_s0")
    save_weights(tmp_path / "ota.safetensors", detector, CLASSES)
    loaded, batch = load(tmp_path / "ota.safetensors"), torch.rand(1, 3, 224, 224)
    assert torch.equal(loaded.predict_raw(batch)[0].logits, detector.predict_raw(batch)[0].logits)
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[n], value) for n, value in detector.named_buffers())


def test_file_of_the_first_version_loads(valid, write):
    """Fewer fields of the architecture: "ota" was called "assigner", and "assigner" "strategy"."""
    metadata = {name: valid[0][name] for name in ("format", "architecture", "normalisation")}
    architecture = {n: v for n, v in metadata["architecture"].items() if n not in ("frozen_norm", "assigner", "ota")}
    detector, _ = load_weights(write(metadata | {"architecture": architecture | {"assigner": {"top_q": 7}}}))
    assert detector.config == DetectorConfig(2, "test_resnet", (64, 107), 8, 1, ota=OTAConfig(top_q=7))
    assert detector.class_names == ["0", "1"]


# The first 4 of the 20 detections of commit c1da3ae, and their labels.
DETECTIONS_OF_C1DA3AE = [
    [10.877, 12.795, 57.357, 52.111, 0.90364, 0],
    [70.628, 31.838, 107.865, 90.296, 0.89026, 1],
    [110.82, 6.343, 140.392, 39.503, 0.82744, 2],
    [91.618, 16.045, 133.026, 60.816, 0.47242, 2],
]


def test_file_written_by_c1da3ae_gives_its_detections(tmp_path):
    """A pruned test_efficientnet with frozen norms, trained on rectangles by SimOTA and saved by that commit."""
    path = tmp_path / "ota.safetensors"
    path.write_bytes(gzip.decompress((Path(__file__).parent / "data" / "c1da3ae.safetensors.gz").read_bytes()))
    detector, metadata = load_weights(path)
    ota = OTAConfig(center_prior="radius", radius=2.0, top_q=10, per_q=3)
    assert detector.config == DetectorConfig(
        3, "test_efficientnet", (64, 96), 8, 1, True, 0.1, nms_iou=0.5, max_detections=20, assigner="simota", ota=ota
    )
    assert metadata["data"] == "rectangles" and detector.class_names == ["red", "green", "blue"]
    image = torch.full((3, 100, 150), 110, dtype=torch.uint8)
    for channel, (x1, y1, x2, y2) in enumerate([(10, 12, 58, 52), (70, 30, 110, 90), (112, 8, 140, 40)]):
        image[:, y1:y2, x1:x2] = 20
        image[channel, y1:y2, x1:x2] = 230
    result, expected = detector.predict(image, score=0), torch.tensor(DETECTIONS_OF_C1DA3AE)
    torch.testing.assert_close(result.boxes[:4], expected[:, :4], rtol=0, atol=0.02)
    torch.testing.assert_close(result.scores[:4], expected[:, 4], rtol=0, atol=1e-4)
    assert result.labels[:4].tolist() == expected[:, 5].tolist() and len(result.labels) == 20


def test_model_of_the_hub_is_saved_by_its_architecture_if_a_name_describes_it(tmp_path, monkeypatch):
    """A hub whose one repository holds a test_resnet with a normalisation of its own."""
    about, changes = {"source": "hf-hub", "hf_hub_id": "someone/repo", "mean": (0.25,) * 3}, {}
    monkeypatch.setattr("timm.models.load_model_config_from_hf", lambda name: (about, "test_resnet", changes))
    expected = tiny_detector().backbone.body.state_dict()
    weights = timm.create_model("test_resnet").state_dict() | expected
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(weights))
    torch.manual_seed(1)
    config = DetectorConfig(2, "hf-hub:someone/repo", (64, 107), channels=8, head_convs=1)
    detector = Detector(config, pretrained=True).eval()
    assert all(torch.equal(value, expected[name]) for name, value in detector.backbone.body.state_dict().items())
    save_weights(tmp_path / "ota.safetensors", detector, CLASSES)
    changes["act_layer"] = "gelu"
    with pytest.raises(UserError, match="someone/repo.*'test_resnet' with changed settings.*gelu"):
        Detector(config)
    monkeypatch.undo()
    loaded = load(tmp_path / "ota.safetensors")
    assert loaded.config == detector.config and loaded.config.backbone == "test_resnet"
    assert loaded.mean.flatten().tolist() == [0.25] * 3


def test_evaluation_of_weights_without_a_data_set_names_the_flag(valid, write):
    path = write({name: value for name, value in valid[0].items() if name != "data"})
    with pytest.raises(UserError, match="name the data set with --data"):
        load_with_data(path, None)
