"""The torch and the Triton backend against the float64 reference, under the one numeric contract of parity.py."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings

import kernels
from kernels import Assignment, OTAConfig, PointGrid
from kernels.assign_torch import ota_assign_torch, solve
from tests.support.backends import COMPARED, GRID, C, N, assert_equal, assert_parity, assign, for_interpreter, scene_of
from tests.support.drawn import CONFIGS, HUGE, any_scenes
from tests.support.parity import EXCLUDED_SHARE, parity
from tests.support.scenes import make_scene

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")


@pytest.fixture(params=COMPARED)
def backend(request) -> str:
    return request.param


def for_backend(config: OTAConfig, backend: str) -> OTAConfig:
    """At most 12 iterations for the interpreter, two bursts of the Triton kernel instead of five."""
    return for_interpreter(backend, replace(config, iterations=min(config.iterations, 12)), config)


OVERFULL = PointGrid((32, 64), ((3, 3), (1, 2)))  # 11 points
SCENES = {
    "no-gt": (GRID, (0, 0), C),
    "G1": (GRID, (1,), C),
    "G7-N1023": (PointGrid((8, 16), ((27, 31), (6, 31))), (7,), C),
    "ragged": (GRID, (0, 7, 1, 0, 13), 11),
    "one-class": (GRID, (3, 6), 1),
    "one-level": (PointGrid((11,), ((9, 13),)), (4, 2), C),
    "one-point": (PointGrid((32,), ((1, 1),)), (3, 1), C),
    "odd-strides": (PointGrid((3, 7, 13), ((31, 17), (13, 7), (1, 4))), (5, 9), C),
    "crowded": (GRID, (53,), 1),
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
        assert_parity(scene, for_backend(config, backend), backend)
    else:
        scene = make_scene(grid, counts, num_classes, seed=3, crowded=name == "crowded")
        assert_parity(scene, OTAConfig() if name == "ragged" else for_backend(OTAConfig(), backend), backend)


def test_one_class_of_a_prediction_is_not_finite(backend):
    """The pair with the object of that class is no candidate, pairs with the other object are."""
    scene = scene_of([(20.5, 18, 77.25, 61), (50, 40, 120, 100)], [1, 2])
    scene.logits[0, ::3, 1], scene.boxes[0, 1::7, 2] = torch.nan, torch.inf
    assert_parity(scene, OTAConfig(), backend)


OPTIONS = {
    "radius": OTAConfig(center_prior="radius"),
    "radius-0.3": OTAConfig(center_prior="radius", radius=0.3),
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
    "one-q-for-n": OTAConfig(per_q=N),
    "q-over-n": OTAConfig(top_q=N + 1, center_prior="none"),
    "r1": OTAConfig(radius=1),
    "r-over-level": OTAConfig(radius=9),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option(name, backend):
    """One option at a time."""
    scene = make_scene(GRID, for_interpreter(backend, (2, 0, 4), (5, 0, 9)), C, seed=7)
    assert_parity(scene, for_backend(OPTIONS[name], backend), backend)


def test_every_candidate_is_supplied(backend):
    """A large eps makes what background sends to candidates far less than one unit; other points get all from it.

    A box over the whole image has every point as a candidate, so that no point is left.
    """
    for box, prior in ((20.5, 18, 77.25, 61), "closest"), ((-50, -40, 200, 150), "none"):
        config = OTAConfig(center_prior=prior, fixed_k=N // 2, eps=10.0, iterations=12)
        assert_parity(scene_of([box]), config, backend)


def test_any_scene_with_options_together(backend):
    @settings(max_examples=for_interpreter(backend, 20, 60), deadline=None, derandomize=True)
    @given(scene=any_scenes(), config=CONFIGS)
    def check(scene, config):
        # Costs of thousands, which only sides of 1e5 px lead to, leave a float32 plan fewer than four digits.
        assume(config.reg_cost != "smooth_l1" or not (scene.gt_boxes.abs() == HUGE).any())
        assert_parity(scene, config, backend)

    check()


def test_excluded_share(backend):
    """Over 1,200 ground truths, or 30, what the contract leaves open is less than one in a thousand."""
    counts = for_interpreter(backend, (30,), (60,) * 20)
    scene = make_scene(PointGrid.for_image((232, 312), (8, 16, 32)), counts, C, seed=1)
    result = assert_parity(scene, for_backend(OTAConfig(), backend), backend)
    assert result.ground_truths == sum(counts) and result.points > 8 * sum(counts)
    assert result.ground_truths_excluded < EXCLUDED_SHARE * result.ground_truths
    assert result.points_excluded < EXCLUDED_SHARE * result.points


BREACHES = {
    "gt_index": lambda match: match.gt_index.masked_fill_(match.gt_index == 2, -1),
    "iou": lambda match: match.iou.add_(2e-5),
    "k": lambda match: match.k.sub_(1),
}


@pytest.mark.parametrize("field", BREACHES)
def test_parity_notices_a_breach(field, monkeypatch):
    def broken(*args) -> Assignment:
        match = ota_assign_torch(*args)
        BREACHES[field](match)
        return match

    monkeypatch.setitem(kernels.assign.BACKENDS, "broken", broken)
    assert parity(make_scene(GRID, (3, 4), C), OTAConfig(), "broken").failures


def test_costs_and_plan_alone_are_those_in_a_batch():
    """Bit for bit: where an element lies in a tensor must not decide how it is rounded, or equal boxes do not tie."""
    scene = make_scene(GRID, (7, 1, 23), C, seed=10)
    match, whole = solve(scene, OTAConfig())
    assert_equal(match, assign(*scene, backend="torch"))
    for b, (start, image) in enumerate(zip((0, 7, 8), scene.images(), strict=True)):
        (_, part), of_image = solve(image, OTAConfig()), whole.flat_point // N == b
        assert torch.equal(part.gt + start, whole.gt[of_image])
        assert torch.equal(part.flat_point, whole.flat_point[of_image] % N)
        assert torch.equal(part.cost, whole.cost[of_image]) and torch.equal(part.log_plan, whole.log_plan[of_image])


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.gpu)])
def test_5000_boxes(backend):
    scene = make_scene(PointGrid.for_image((88, 104), (8, 16)), (3, 5000), C, seed=6, size_px=(8, 30))
    config = OTAConfig(iterations=20)
    match, alone = (assign(*s, config, backend=backend) for s in (scene, next(scene.images())))
    assert (match.k >= 1).all() and torch.equal(match.k[:3], alone.k)
    assert torch.equal(match.gt_index[:1], alone.gt_index) and torch.equal(match.iou[:1], alone.iou)
    assert_parity(scene, config, backend)
