"""What ota_assign and its settings refuse, and by which message."""

import math
import re

import numpy as np
import pytest
import torch

from kernels import OTAConfig, PointGrid, ota_assign
from tests.support.backends import ORDINARY, C, N, scene_of

BAD_OPTIONS = [
    (dict(center_prior="centre"), "center_prior is 'centre', choose from closest, radius, none"),
    (dict(cls_cost="softmax"), "cls_cost is 'softmax', choose from focal, bce"),
    (dict(reg_cost="l1"), "reg_cost is 'l1', choose from iou, giou, smooth_l1"),
    (dict(radius=2.5), "radius is 2.5: 'closest' takes radius^2 points, a whole number"),
    (dict(center_prior="radius", radius=0), "radius is 0: 'radius' needs 0 < radius"),
    (dict(eps=0), "needs eps >= 1e-6"),
    (dict(radius=5000), "radius is 5000: 'closest' takes radius^2 points, a whole number to 100"),
    (dict(alpha=-1), "alpha >= 0"),
    (dict(iterations=0), "iterations is 0, it must be at least 1"),
    (dict(fixed_k=2.5), "fixed_k is 2.5, it must be at least 1 and a whole number"),
    (dict(eps=math.nan), "eps is nan, it must be a finite number"),
    (dict(top_q=2**40), "top_q is 1099511627776, it must be a finite number below 2^30"),
    (dict(top_q="20"), "top_q is '20', it must be a number"),
    (dict(alpha=True), "alpha is True, it must be a number"),
    (dict(rescale=1), "rescale is 1, it must be True or False"),
]


def test_bad_options():
    for options, message in BAD_OPTIONS:
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            OTAConfig(**options)
    assert OTAConfig(iterations=np.float32(20)) == OTAConfig(iterations=20)


BAD_INPUTS = {
    "flat-logits": (dict(logits=torch.tensor(0.0)), r"logits has shape \(\), expected \(B, N, C\)"),
    "flat-boxes": (dict(gt_boxes=torch.zeros(4)), r"gt_boxes has shape \(4,\), expected \(G, 4\)"),
    "logits-of-other-grid": (dict(logits=torch.zeros(1, N + 1, C)), "logits has shape"),
    "boxes-of-5": (dict(boxes=torch.zeros(1, N, 5)), "boxes has shape"),
    "offsets-of-B": (dict(gt_offsets=torch.tensor([0])), "gt_offsets has shape"),
    "float-labels": (dict(gt_labels=torch.zeros(1)), "gt_labels is torch.float32, expected torch.int64 or"),
    "uint64-labels": (dict(gt_labels=torch.ones(1).to(torch.uint64)), "gt_labels is torch.uint64, expected"),
    "int-logits": (dict(logits=torch.zeros(1, N, C).int()), "logits is torch.int32, expected torch.float32"),
    "falling-offsets": (dict(gt_offsets=torch.tensor([1, 0])), "gt_offsets must not fall"),
    "offsets-past-G": (dict(gt_offsets=torch.tensor([0, 2])), "lie in 0 to G = 1, not"),
    "other-device": (dict(boxes=torch.zeros(1, N, 4, device="meta")), "boxes is on meta, the predictions on cpu"),
}


def test_bad_inputs():
    """TypeError for a wrong type, ValueError for everything else."""
    for tensors, message in BAD_INPUTS.values():
        with pytest.raises(TypeError if " is torch." in message else ValueError, match=message):
            ota_assign(*scene_of([ORDINARY])._replace(**tensors))
    with pytest.raises(ValueError, match="backend is 'cuda', choose from reference, torch, triton"):
        ota_assign(*scene_of([ORDINARY]), backend="cuda")


def test_bad_grids():
    for strides, sizes, message in (
        ((8, 16), ((4, 4),), r"needs one \(rows, columns\) per stride"),
        ((8,), ((0, 4),), "strides and sizes must be positive"),
        ((8,), ((4, 2049),), "a level spans more than 16384 px"),
    ):
        with pytest.raises(ValueError, match=message):
            PointGrid(strides, sizes)
