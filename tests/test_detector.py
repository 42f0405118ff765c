"""The network and its file of weights, without any data set."""

import copy
import math

import pytest
import timm
import torch
from safetensors.torch import save_file

from errors import UserError
from kernels import PointGrid
from model import load_weights, save_weights
from model.backbone import STRIDES, Backbone, FrozenNorm, freeze_norms
from model.batch import pad_images
from model.head import Head
from tests.support.detectors import random_batch, tiny_detector


@pytest.mark.parametrize(
    "name, size",
    [("test_resnet", (224, 352)), ("test_mambaout", (96, 160)), ("swin_tiny_patch4_window7_224", (96, 160))],
    ids=["cnn", "channels-last", "transformer"],
)
def test_backbone_gives_the_five_levels_of_the_grid(name, size):
    """At odd multiples of 32 px too."""
    features = Backbone(name, 32)(torch.zeros(2, 3, *size))
    assert [tuple(f.shape) for f in features] == [(2, 32, *hw) for hw in PointGrid.for_image(size, STRIDES).sizes]


def test_backbone_that_cannot_be_had_is_refused_with_the_flag(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    for name, pretrained, message in (
        ("resnet18x", False, "no backbone 'resnet18x'.*--backbone"),
        ("test_vit", False, r"strides \[16.*not at \[8, 32\]"),
        ("test_resnet", True, "cannot reach the hub(.|\n)*--no-pretrained"),
    ):
        with pytest.raises(UserError, match=message):
            Backbone(name, 32, pretrained=pretrained)


def test_pretrained_weights_are_timms(monkeypatch):
    full = timm.create_model("test_resnet").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(full))
    body = Backbone("test_resnet", 32, pretrained=True).body
    assert torch.equal(body.state_dict()["conv1.0.weight"], full["conv1.0.weight"])


@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet"], ids=["norm-then-act", "norm-act"])
def test_frozen_norms_are_batch_norms_in_evaluation(name):
    """Values and gradients."""
    torch.manual_seed(0)
    body = timm.create_model(name, features_only=True).eval()
    norms = [m for m in body.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
            tensor.uniform_(0.5, 1.5)
    frozen, images = copy.deepcopy(body), torch.rand(2, 3, 64, 64)
    freeze_norms(frozen)
    assert sum(isinstance(m, FrozenNorm) for m in frozen.modules()) == len(norms) > 5
    outputs = [network(images)[-1] for network in (body, frozen)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        (output**2).sum().backward()
    parameters = dict(body.named_parameters())
    for name, parameter in frozen.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad, rtol=1e-3, atol=1e-4)


def test_frozen_norms_and_the_head_stay_in_bfloat16():
    """A norm that gave float32 would double what everything after it reads and writes."""
    detector, types = tiny_detector("test_efficientnet", frozen_norm=True).train(), set()
    for module in detector.modules():
        assert not isinstance(module, torch.nn.BatchNorm2d)
        if isinstance(module, FrozenNorm | torch.nn.GroupNorm):
            module.register_forward_hook(lambda _, __, output: types.add(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        losses, _, predictions = detector(*random_batch([(64, 96)]))
    assert types == {predictions.logits.dtype} == {torch.bfloat16} and predictions.boxes.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in losses.values())
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())


@torch.no_grad()
def test_head_starts_at_the_class_prior_and_has_boxes_in_strides_times_the_learned_scale():
    grid = PointGrid((8, 16), ((2, 3), (1, 2)))
    head, points = Head(16, 1, 3, (8, 16)), grid.points()
    zeros = [torch.zeros(1, 16, *size) for size in grid.sizes]
    logits, boxes, _ = head(zeros, points)
    torch.testing.assert_close(logits.sigmoid(), torch.full((1, 8, 3), 0.01))
    distance = torch.tensor([8.0] * 6 + [16.0] * 2)[:, None]
    assert torch.equal(boxes[0], torch.cat([points - distance, points + distance], 1))
    head.scales.copy_(torch.tensor([0.5, 3.0]))
    head.box.bias.copy_(torch.tensor([1.0, -1, 2, -2]))  # left, top, right, bottom: none is negative
    distance *= torch.tensor([0.5] * 6 + [3.0] * 2)[:, None]
    assert torch.equal(head(zeros, points).boxes[0] - points.repeat(1, 2), distance * torch.tensor([-1.0, 0, 2, 0]))


def test_images_are_normalised_with_the_backbones_own_statistics():
    detector = tiny_detector("resnet10t")
    mean, std = (torch.tensor(detector.backbone.body.pretrained_cfg[name]) for name in ("mean", "std"))
    image = torch.full((3, 30, 40), 51, dtype=torch.uint8)
    batch = detector.normalise(*pad_images([image, image[:, :20, :33]]))
    assert batch.shape == (2, 3, 32, 64)
    torch.testing.assert_close(batch[0, :, 29, 39], (0.2 - mean) / std)
    assert not batch[1, :, 20:].any() and not batch[1, :, :, 33:].any()
    torch.testing.assert_close(detector.normalise(*pad_images([image.float() / 255])), batch[:1])


def test_training_gives_three_losses_and_gradients_everywhere():
    detector = tiny_detector().train()
    losses, assignment, predictions = detector(*random_batch([(90, 130), (64, 100)]))
    assert set(losses) == {"cls", "box", "iou"}
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())
    assert (assignment.gt_index >= 0).any() and not any(tensor.requires_grad for tensor in predictions)
    with pytest.raises(ValueError, match="one target"):
        detector([torch.zeros(3, 64, 64)])

    losses, *_ = detector(*random_batch([(64, 64), (64, 96)], [0, 0]))
    assert 0 < losses["cls"] < math.inf and losses["box"] == 0 and losses["iou"] == 0
    detector.zero_grad()
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in detector.parameters())


def test_labels_of_any_integer_type():
    detector, (images, targets) = tiny_detector(frozen_norm=True).train(), random_batch([(64, 96)])
    bytes_, floats = ([targets[0] | {"labels": targets[0]["labels"].to(t)}] for t in (torch.uint8, torch.float32))
    assert detector(images, bytes_)[0] == detector(images, targets)[0]
    with pytest.raises(TypeError, match="gt_labels is torch.float32, expected torch.int64"):
        detector(images, floats)


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(monkeypatch):
    """On a CPU backbone, neck and head are compiled; here up to the compiler's graphs, which then run as they are."""
    graphs, compile_with = [], torch.compile

    def without_code(function, *, dynamic, mode):
        return compile_with(function, dynamic=dynamic, backend=lambda graph, _: graphs.append(graph) or graph)

    monkeypatch.setattr(torch, "compile", without_code)
    torch._dynamo.reset()
    batch, detector = random_batch([(64, 96)]), tiny_detector(frozen_norm=True).train()
    expected = detector(*batch)[0]
    assert detector.compile_training("default") == "backbone, neck and head"
    losses = detector(*batch)[0]
    torch.testing.assert_close(losses, expected)
    sum(losses.values()).backward()
    assert len(graphs) == 2 and all(p.grad is not None for p in detector.parameters())


def test_file_that_holds_no_detector_is_named(tmp_path):
    path = tmp_path / "ota.safetensors"
    with pytest.raises(UserError, match=f"no weights file {path}"):
        load_weights(path)
    save_weights(path, tiny_detector(), {})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"{path} is no safetensors file, or it is truncated"):
        load_weights(path)
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(UserError, match=f"{path} holds tensors, but no detector"):
        load_weights(path)
