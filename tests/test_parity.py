"""The torch and the Triton backend against the float64 reference, under the one numeric contract of parity.py."""

from dataclasses import replace

import pytest
import torch

from kernels import OTAConfig, PointGrid
from tests.support.backends import COMPARED, GRID, C, N, assert_parity, assign, for_interpreter, scene_of
from tests.support.parity import EXCLUDED_SHARE
from tests.support.scenes import make_scene

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")


@pytest.fixture(params=COMPARED)
def backend(request) -> str:
    return request.param


def for_backend(config: OTAConfig, backend: str) -> OTAConfig:
    """At most 20 iterations for the interpreter, several bursts of the Triton kernel among them."""
    return for_interpreter(backend, replace(config, iterations=min(config.iterations, 20)), config)


OVERFULL = PointGrid((32, 64), ((3, 3), (1, 2)))  # 11 points
SCENES = {
    "G1": (GRID, (1,), C),
    "ragged": (GRID, (0, 7, 1, 0, 3), 11),
    "one-point": (PointGrid((32,), ((1, 1),)), (3, 1), C),
    "odd-strides": (PointGrid((3, 7, 13), ((31, 17), (13, 7), (1, 4))), (5,), 1),
    "crowded": (PointGrid((8, 16), ((9, 11), (5, 6))), (23,), 1),
    "sum-k-over-n": (OVERFULL, (16, 1), C),
    "sum-k-is-n": (OVERFULL, (11, 1), C),
}


@pytest.mark.parametrize("name", SCENES)
def test_scene(name, backend):
    grid, counts, num_classes = SCENES[name]
    if grid is OVERFULL:
        scene, config = make_scene(grid, counts, num_classes, seed=4, size_px=(20, 60)), OTAConfig(fixed_k=1)
        match = assign(*scene, replace(config, iterations=1), backend=backend)
        assert match.k[:-1].sum() >= grid.num_points and (match.gt_index[0] >= 0).any()
    else:
        scene = make_scene(grid, counts, num_classes, seed=3, crowded=name == "crowded")
        config = OTAConfig(rescale=name != "one-point")  # which would make all suppliers of the one point equal
    result = assert_parity(scene, for_backend(config, backend), backend)
    assert result.points_excluded <= result.points / 2, "too little is compared"


def test_one_class_of_a_prediction_is_not_finite(backend):
    """The pair with the object of that class is no candidate, pairs with the other object are."""
    scene = scene_of([(20.5, 18, 77.25, 61), (50, 40, 120, 100)], [1, 2])
    scene.logits[0, ::3, 1], scene.boxes[0, 1::7, 2] = torch.nan, torch.inf
    assert_parity(scene, for_backend(OTAConfig(), backend), backend)


OPTIONS = {
    "radius": OTAConfig(center_prior="radius"),
    "no-prior": OTAConfig(center_prior="none"),
    "bce": OTAConfig(cls_cost="bce"),
    "giou": OTAConfig(reg_cost="giou"),
    "smooth-l1": OTAConfig(reg_cost="smooth_l1"),
    "fixed-k": OTAConfig(fixed_k=4),
    "no-rescale": OTAConfig(rescale=False),
    "alpha-0": OTAConfig(alpha=0),
    "eps-1": OTAConfig(eps=1.0),
    "T1": OTAConfig(iterations=1),
    "q1": OTAConfig(top_q=1),
    "one-q-for-3": OTAConfig(per_q=3),
    "q-over-n": OTAConfig(top_q=N + 1, center_prior="none"),
    "r-over-level": OTAConfig(radius=9),
    "together": OTAConfig(center_prior="radius", cls_cost="bce", reg_cost="smooth_l1", fixed_k=7, rescale=False),
    "others-together": OTAConfig(center_prior="none", cls_cost="bce", reg_cost="giou", per_q=2, radius=1),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, backend):
    scene = make_scene(GRID, for_interpreter(backend, (1, 2), (5, 0, 9)), C, seed=7)
    assert_parity(scene, for_backend(OPTIONS[name], backend), backend)


def test_every_candidate_is_supplied(backend):
    """A large eps makes what background sends to candidates far less than one unit; other points get all from it.

    A box over the whole image has every point as a candidate, so that no point is left.
    """
    for box, prior in ((20.5, 18, 77.25, 61), "closest"), ((-50, -40, 200, 150), "none"):
        config = OTAConfig(center_prior=prior, fixed_k=N // 2, eps=10.0, iterations=12)
        assert_parity(scene_of([box]), config, backend)


def test_excluded_share():
    """Over 600 ground truths, what the contract leaves open is less than one in a thousand."""
    scene = make_scene(PointGrid.for_image((232, 312), (8, 16, 32)), (60,) * 10, C, seed=1)
    result = assert_parity(scene, OTAConfig(), "torch")
    assert result.ground_truths == 600 and result.points > 4800
    assert result.ground_truths_excluded < EXCLUDED_SHARE * result.ground_truths
    assert result.points_excluded < EXCLUDED_SHARE * result.points


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_5000_boxes(backend):
    scene = make_scene(PointGrid.for_image((88, 104), (8, 16)), (3, 5000), C, seed=6, size_px=(8, 30))
    config = OTAConfig(iterations=5)
    match, alone = (assign(*s, config, backend=backend) for s in (scene, next(scene.images())))
    assert (match.k >= 1).all() and torch.equal(match.k[:3], alone.k)
    assert torch.equal(match.gt_index[:1], alone.gt_index) and torch.equal(match.iou[:1], alone.iou)
    assert_parity(scene, config, backend)
