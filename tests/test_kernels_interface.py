"""What ota_assign and its settings refuse, and by which message; what the folder kernels/ imports."""

import ast
import json
import math
import re
import sys
from dataclasses import asdict, fields
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import kernels
from kernels import OTAConfig, PointGrid, ota_assign
from tests.support.backends import ORDINARY, C, N, scene_of

BAD_OPTIONS = {
    "center-prior": (dict(center_prior="centre"), "center_prior is 'centre', choose from closest, radius, none"),
    "cls-cost": (dict(cls_cost="softmax"), "cls_cost is 'softmax', choose from focal, bce"),
    "reg-cost": (dict(reg_cost="l1"), "reg_cost is 'l1', choose from iou, giou, smooth_l1"),
    "closest-2.5": (dict(radius=2.5), "radius is 2.5: 'closest' takes radius\\^2 points, a whole number"),
    "closest-0": (dict(radius=0), "radius is 0: 'closest'"),
    "radius-0": (dict(center_prior="radius", radius=0), "radius is 0: 'radius' needs 0 < radius"),
    "radius-huge": (dict(center_prior="radius", radius=1e9), "'radius' needs 0 < radius < 16384"),
    "eps-0": (dict(eps=0), "needs eps > 0"),
    "alpha-negative": (dict(alpha=-1), "alpha >= 0"),
    "T0": (dict(iterations=0), "iterations is 0, it must be at least 1"),
    "k-2.5": (dict(fixed_k=2.5), "OTAConfig.fixed_k is 2.5, it must be at least 1 and a whole number"),
    "T-400-digits": (dict(iterations=10**400), "OTAConfig.iterations is 10{39}, it must be a finite number below"),
    "eps-nan": (dict(eps=math.nan), "OTAConfig.eps is nan, it must be a finite number"),
}


def test_bad_options():
    for options, message in BAD_OPTIONS.values():
        with pytest.raises(ValueError, match=message):
            OTAConfig(**options)


@pytest.mark.parametrize("name", [field.name for field in fields(OTAConfig)])
def test_option_of_another_type(name):
    for value in (True, np.True_, None, "20", [20], 20j):
        if (name, value) in (("rescale", True), ("fixed_k", None), ("radius", None)) and value is not np.True_:
            OTAConfig(**{name: value})
        else:
            with pytest.raises((TypeError, ValueError), match=rf"OTAConfig\.{name} is {re.escape(repr(value))}"):
                OTAConfig(**{name: value})


def test_whole_numbers_of_any_type():
    names = ("iterations", "top_q", "per_q", "fixed_k", "radius", "alpha", "eps")
    for number in (20.0, np.int64(20), np.float32(20), Fraction(20)):
        config = OTAConfig(**dict.fromkeys(names, number))
        assert config == OTAConfig(**dict.fromkeys(names, 20))
        assert {type(getattr(config, name)) for name in names[:4]} == {int}
        json.dumps(asdict(config))


BAD_INPUTS = {
    "logits-of-other-grid": (dict(logits=torch.zeros(1, N + 1, C)), "logits has shape"),
    "boxes-of-5": (dict(boxes=torch.zeros(1, N, 5)), "boxes has shape"),
    "gt-boxes-of-5": (dict(gt_boxes=torch.zeros(1, 5)), "gt_boxes has shape"),
    "two-labels": (dict(gt_labels=torch.zeros(2, dtype=torch.int64)), "gt_labels has shape"),
    "offsets-of-B": (dict(gt_offsets=torch.tensor([0])), "gt_offsets has shape"),
    "float-labels": (dict(gt_labels=torch.zeros(1)), "gt_labels is torch.float32, expected torch.int64 or"),
    "float-offsets": (dict(gt_offsets=torch.zeros(2)), "gt_offsets is torch.float32, expected torch.int64"),
    "uint64-labels": (dict(gt_labels=torch.ones(1).to(torch.uint64)), "gt_labels is torch.uint64, expected"),
    "int-logits": (dict(logits=torch.zeros(1, N, C).int()), "logits is torch.int32, expected torch.float32"),
    "int-gt-boxes": (dict(gt_boxes=torch.ones(1, 4).long()), "gt_boxes is torch.int64, expected torch.f"),
    "falling-offsets": (dict(gt_offsets=torch.tensor([1, 0])), "gt_offsets must rise"),
    "negative-offset": (dict(gt_offsets=torch.tensor([-1, 1])), "gt_offsets must rise"),
    "offsets-past-G": (dict(gt_offsets=torch.tensor([0, 2])), "at most G = 1, not"),
    "other-device": (dict(boxes=torch.zeros(1, N, 4, device="meta")), "boxes is on meta, the predictions on cpu"),
}


def test_bad_inputs():
    """TypeError for a wrong type, ValueError for everything else."""
    for tensors, message in BAD_INPUTS.values():
        with pytest.raises(TypeError if " is torch." in message else ValueError, match=message):
            ota_assign(*scene_of([ORDINARY])._replace(**tensors))


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'cuda', choose from reference, torch, triton"):
        ota_assign(*scene_of([ORDINARY]), backend="cuda")


def test_bad_grids():
    for strides, sizes, message in (
        ((8, 16), ((4, 4),), r"needs one \(rows, columns\) per stride"),
        ((), (), r"needs one \(rows, columns\) per stride"),
        ((8,), ((0, 4),), "strides and sizes must be positive"),
        ((0,), ((4, 4),), "strides and sizes must be positive"),
        ((8,), ((4, 2049),), "a level spans more than 16384 px"),
    ):
        with pytest.raises(ValueError, match=message):
            PointGrid(strides, sizes)


def test_kernels_need_only_torch_and_triton():
    for path in sorted(Path(kernels.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            else:
                continue
            packages = {name.partition(".")[0] for name in names}
            assert packages <= {"torch", "triton", *sys.stdlib_module_names}, f"{path.name} imports {names}"
