"""Label assignment: the backends against the float64 reference, the reference against arithmetic done by hand."""

import ast
import json
import math
import re
import sys
from dataclasses import asdict, fields, replace
from fractions import Fraction
from importlib import import_module
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

import kernels
from kernels import Assignment, OTAConfig, PointGrid, ota_assign
from kernels.assign_reference import assign_image, decode, sinkhorn
from kernels.assign_torch import ota_assign_torch, solve
from kernels.grid import valid_rows
from tests.support.parity import EXCLUDED_SHARE, ambiguous_points, parity
from tests.support.scenes import Scene, make_scene, trained_predictions

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")
ON_GPU = pytest.mark.gpu if torch.cuda.is_available() else ()
COMPARED = ("torch", pytest.param("triton", marks=ON_GPU))  # against the reference
BACKENDS = ("reference", *COMPARED)
INTERPRETED = not torch.cuda.is_available()
GRID = PointGrid.for_image((104, 136), (8, 16, 32))
N = GRID.num_points
C = 3
HUGE = 1e5  # px


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def scene_of(
    gt_boxes: list, gt_labels: list[int] | None = None, offsets: list[int] | None = None, *, grid=GRID, seed=0
) -> Scene:
    """Ground truths given by hand, all in one image unless offsets say more, under predictions that suit them."""
    boxes = torch.tensor(gt_boxes, dtype=torch.float32).reshape(-1, 4)
    labels = torch.tensor([0] * len(boxes) if gt_labels is None else gt_labels, dtype=torch.int64)
    offsets = torch.tensor([0, len(boxes)] if offsets is None else offsets)
    image, valid = valid_rows(boxes, labels, offsets, C)
    generator = torch.Generator().manual_seed(seed)
    rows = [valid & (image == b) for b in range(len(offsets) - 1)]
    predictions = [trained_predictions(grid, boxes[row], labels[row], C, generator) for row in rows]
    logits, predicted = (torch.stack(tensors) for tensors in zip(*predictions, strict=True))
    return Scene(logits, predicted, boxes, labels, offsets, grid)


def interpreted(backend: str) -> bool:
    """Triton without a GPU: some hundred times slower, so for fewer boxes."""
    return backend == "triton" and INTERPRETED


def fewer(counts: tuple[int, ...], backend: str) -> tuple[int, ...]:
    """Ground truths per image; for the interpreter at most 9, still more than a Triton program looks at together."""
    return tuple(min(count, 9) for count in counts) if interpreted(backend) else counts


def drawn(backend: str) -> settings:
    return settings(max_examples=20 if interpreted(backend) else 60, deadline=None, derandomize=True)


def device_of(backend: str) -> torch.device:
    return torch.device("cuda" if backend == "triton" and not INTERPRETED else "cpu")


def assign(*inputs, backend: str, check: bool = True) -> Assignment:
    """ota_assign on the device that the backend is tested on, back on the CPU."""
    moved = (x.to(device_of(backend)) if isinstance(x, torch.Tensor) else x for x in inputs)
    return Assignment(*(tensor.cpu() for tensor in ota_assign(*moved, backend=backend, check=check)))


def assert_equal(one: Assignment, other: Assignment) -> None:
    """The same, bit for bit."""
    for name, a, b in zip(Assignment._fields, one, other, strict=True):
        assert torch.equal(a, b), f"{name} differs at {(a != b).nonzero()[:8].tolist()}"


def assert_parity(scene: Scene, config: OTAConfig, backend: str) -> None:
    result = parity(scene.to(device_of(backend)), config, backend)
    assert not result.failures, "\n".join(result.failures)


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
}


def test_default_type_changes_nothing(backend):
    scene = make_scene(GRID, (3, 0, 2), C)
    expected = assign(*scene, backend=backend)
    torch.set_default_dtype(torch.float64)
    try:
        match = assign(*scene, backend=backend)
    finally:
        torch.set_default_dtype(torch.float32)
    assert match.iou.dtype == torch.float32
    assert_equal(match, expected)


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("name", SCENES)
def test_parity(name, backend):
    grid, counts, num_classes = SCENES[name]
    scene = make_scene(grid, counts, num_classes, seed=3, crowded=name == "crowded")
    assert_parity(scene, OTAConfig(), backend)


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("rescale", [True, False], ids=["rescale", "plain"])
@pytest.mark.parametrize("fixed_k", [None, 4], ids=["dynamic-k", "fixed-k"])
@pytest.mark.parametrize("reg_cost", ["iou", "giou", "smooth_l1"])
@pytest.mark.parametrize("cls_cost", ["focal", "bce"])
@pytest.mark.parametrize("center_prior", ["closest", "radius", "none"])
def test_parity_of_every_option(center_prior, cls_cost, reg_cost, fixed_k, rescale, backend):
    config = OTAConfig(
        center_prior=center_prior, cls_cost=cls_cost, reg_cost=reg_cost, fixed_k=fixed_k, rescale=rescale
    )
    assert_parity(make_scene(GRID, (2, 0, 4) if interpreted(backend) else (5, 0, 9), C, seed=7), config, backend)


SETTINGS = {
    "alpha-0": OTAConfig(alpha=0),
    "eps-1": OTAConfig(eps=1.0),
    "T1": OTAConfig(iterations=1),
    "q1": OTAConfig(top_q=1),
    "one-q-for-3": OTAConfig(per_q=3),
    "one-q-for-n": OTAConfig(per_q=N),
    "q-over-n": OTAConfig(top_q=N + 1, center_prior="none"),
    "r1": OTAConfig(radius=1),
    "r-over-level": OTAConfig(radius=9),
    "radius-0.3": OTAConfig(center_prior="radius", radius=0.3),
}


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("name", SETTINGS)
def test_parity_of_unusual_settings(name, backend):
    assert_parity(make_scene(GRID, (3, 2) if interpreted(backend) else (6, 3), C, seed=11), SETTINGS[name], backend)


@pytest.mark.parametrize("backend", COMPARED)
def test_parity_where_every_point_is_a_candidate(backend):
    """Then no column stands for the rest; a large eps makes what background sends at most far less than one unit."""
    config = OTAConfig(center_prior="none", fixed_k=N // 2, eps=10.0)
    assert_parity(scene_of([(-50, -40, 200, 150)]), config, backend)


@pytest.mark.parametrize("backend", COMPARED)
@pytest.mark.parametrize("prior", ["closest", "radius", "none"])
def test_what_is_compared_is_what_ota_assign_gives(prior, backend):
    """Parity is that of `solve`, which gives the plan, too."""
    scene = make_scene(GRID, (2, 0, 1) if interpreted(backend) else (5, 0, 2), C, seed=7)
    config = OTAConfig(center_prior=prior, rescale=prior != "radius")
    solve_it = import_module(f"kernels.assign_{backend}").solve
    match, _ = solve_it(scene.to(device_of(backend)), config)
    assert_equal(Assignment(*(tensor.cpu() for tensor in match)), assign(*scene, config, backend=backend))


BREACHES = {
    "gt_index": lambda match: match.gt_index.masked_fill_(match.gt_index == 2, -1),
    "iou": lambda match: match.iou.add_(2e-5),
    "k": lambda match: match.k.sub_(1),
}


@pytest.mark.parametrize("what", BREACHES)
def test_parity_notices_a_breach(what, monkeypatch):
    def broken(*args) -> Assignment:
        match = ota_assign_torch(*args)
        BREACHES[what](match)
        return match

    monkeypatch.setitem(kernels.assign.BACKENDS, "broken", broken)
    assert parity(make_scene(GRID, (3, 4), C), OTAConfig(), "broken").failures


@pytest.mark.parametrize("backend", COMPARED)
def test_excluded_share(backend):
    """Over 1,200 ground truths, or 60, what the contract leaves open is less than one in a thousand."""
    images = 1 if interpreted(backend) else 20
    scene = make_scene(PointGrid.for_image((232, 312), (8, 16, 32)), (60,) * images, C, seed=1)
    result = parity(scene.to(device_of(backend)), OTAConfig(), backend)
    assert not result.failures, "\n".join(result.failures)
    assert result.ground_truths == 60 * images and result.points > 500 * images
    assert result.ground_truths_excluded < EXCLUDED_SHARE * result.ground_truths
    assert result.points_excluded < EXCLUDED_SHARE * result.points


PX = st.integers(-80 * 64, 200 * 64).map(lambda units: units / 64)  # exact in float32, and so are sums of two
BOXES = st.tuples(PX, PX, PX, PX).map(lambda xywh: (*xywh[:2], xywh[0] + xywh[2], xywh[1] + xywh[3]))
ODD_BOXES = st.tuples(*[st.one_of(PX, st.sampled_from([-HUGE, HUGE, math.nan, math.inf, -math.inf]))] * 4)


@st.composite
def grids(draw) -> PointGrid:
    strides = sorted(draw(st.sets(st.integers(1, 33), min_size=1, max_size=3)))
    sides = st.integers(1, 9)
    return PointGrid(tuple(strides), tuple((draw(sides), draw(sides)) for _ in strides))


@st.composite
def any_scenes(draw) -> Scene:
    """Boxes of any kind, labels that include -1, offsets that may leave rows to no image, a few broken predictions."""
    grid, images = draw(grids()), draw(st.integers(1, 3))
    rows = draw(st.lists(st.one_of(BOXES, BOXES, ODD_BOXES), max_size=8))
    labels = draw(st.lists(st.integers(-1, C - 1), min_size=len(rows), max_size=len(rows)))
    offsets = sorted(draw(st.lists(st.integers(0, len(rows)), min_size=images + 1, max_size=images + 1)))
    scene = scene_of(rows, labels, offsets, grid=grid, seed=draw(st.integers(0, 99)))
    for broken in draw(st.lists(st.integers(0, images * grid.num_points - 1), max_size=3)):
        b, j = divmod(broken, grid.num_points)
        scene.logits[b, j, j % C], scene.boxes[b, -j, j % 4] = math.nan, math.inf
    return scene


CONFIGS = st.builds(
    OTAConfig,
    center_prior=st.sampled_from(["closest", "radius", "none"]),
    cls_cost=st.sampled_from(["focal", "bce"]),
    reg_cost=st.sampled_from(["iou", "giou", "smooth_l1"]),
    fixed_k=st.sampled_from([None, 1, 7]),
    rescale=st.booleans(),
)


@pytest.mark.parametrize("backend", COMPARED)
def test_parity_of_any_scene(backend):
    @drawn(backend)
    @given(scene=any_scenes(), config=CONFIGS)
    def check(scene, config):
        # Costs of thousands, which only sides of 1e5 px lead to, leave a float32 plan fewer than four digits.
        assume(config.reg_cost != "smooth_l1" or not (scene.gt_boxes.abs() == HUGE).any())
        assert_parity(scene, config, backend)

    check()


def candidates_of(gt_boxes: list, grid: PointGrid, config: OTAConfig, backend: str) -> list[set[int]]:
    """The candidates of every box, whatever the backend: alone in its image, it asks for all of them and gets them.

    One iteration suffices, for background sends next to nothing to points as sure as these.
    """
    boxes = torch.tensor(gt_boxes, dtype=torch.float32)
    count, n = len(boxes), grid.num_points
    logits, labels = torch.full((count, n, 1), 10.0), torch.zeros(count, dtype=torch.int64)
    scene = Scene(logits, boxes[:, None].expand(-1, n, -1), boxes, labels, torch.arange(count + 1), grid)
    match = assign(*scene, replace(config, fixed_k=n, iterations=1), backend=backend)
    found = [set(row.nonzero()[:, 0].tolist()) for row in match.gt_index >= 0]
    assert match.k.tolist() == [len(points) for points in found]
    return found


def searched_candidates(box: tuple, grid: PointGrid, config: OTAConfig) -> set[int]:
    """Section 3.3 of the paper in fractions, point by point; centres are those of sides rounded to 2^-15 px."""
    x1, y1, x2, y2 = sides = [Fraction(side) for side in torch.tensor(box, dtype=torch.float32).tolist()]
    center_x, center_y = (
        Fraction(round(2**15 * a) + round(2**15 * b), 2**16) for a, b in zip(sides[:2], sides[2:], strict=True)
    )
    index, found, closest = 0, set(), []
    for stride, (rows, columns) in zip(grid.strides, grid.sizes, strict=True):
        level = []
        for y, x in product(range(rows), range(columns)):
            px, py = (x + Fraction(1, 2)) * stride, (y + Fraction(1, 2)) * stride
            dx, dy = abs(px - center_x), abs(py - center_y)
            inside = min(px - x1, py - y1, x2 - px, y2 - py) > Fraction(1, 100)
            near = config.center_prior != "radius" or max(dx, dy) < Fraction(config.radius) * stride
            level.append((dx * dx + dy * dy, index, inside and near))
            index += 1
        level.sort()
        closest.append(level[0][:2])
        if config.center_prior == "closest":
            level = level[: config.radius**2]
        found |= {j for _, j, candidate in level if candidate}
    return found or {min(closest)[1]}


ONE_ROW = PointGrid((7, 13), ((1, 19), (1, 11)))
PLACES = {
    "middle": (GRID, (30.5, 22.25, 95.0, 80.75)),
    "whole-image": (GRID, (0, 0, 136, 104)),
    "level-under-25-points": (PointGrid((8, 64), ((13, 17), (2, 2))), (0, 0, 136, 104)),
    "partly-outside": (GRID, (-60, -31, 41, 57)),
    "center-outside": (GRID, (-200, 10, 60, 90)),
    "center-past-the-corner": (GRID, (90, 70, 400, 300)),
    "nowhere-near": (GRID, (1000, 2000, 1010, 2010)),
    "one-row": (ONE_ROW, (20, -50, 100, 60)),
    "tie-of-four": (GRID, (0, 0, 128, 96)),
    "tie-of-two": (GRID, (8, 8, 64, 60)),
    "tie-across-levels": (PointGrid((8, 16), ((4, 4), (2, 2))), (5.5, 5.5, 6.5, 6.5)),
    "tiny-box": (GRID, (50.25, 49.5, 50.75, 50.0)),
    "thin-box": (GRID, (3, 40.5, 130, 41.5)),
    "margin-held": (GRID, (11.98, 11.98, 20.02, 20.02)),
    "margin-0.01-rounded-down": (GRID, (11.99, 11.99, 36.01, 36.01)),
    "margin-missed": (GRID, (11.9901, 11.9901, 36.0099, 36.0099)),
}
GEOMETRIES = {
    "closest-5": OTAConfig(),
    "closest-2": OTAConfig(radius=2),
    "radius-2.5": OTAConfig(center_prior="radius"),
    "radius-0.5": OTAConfig(center_prior="radius", radius=0.5),
    "none": OTAConfig(center_prior="none"),
}


@pytest.mark.parametrize("prior", GEOMETRIES)
@pytest.mark.parametrize("place", PLACES)
def test_candidates(place, prior, backend):
    grid, box = PLACES[place]
    config = GEOMETRIES[prior]
    assert candidates_of([box], grid, config, backend) == [searched_candidates(box, grid, config)]


def test_candidates_of_any_box(backend):
    priors = st.sampled_from(["closest", "closest", "radius", "none"])

    @drawn(backend)
    @given(grid=grids(), boxes=st.lists(BOXES, min_size=1, max_size=9), radius=st.integers(1, 4), prior=priors)
    def check(grid, boxes, radius, prior):
        boxes = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
        assume(boxes)
        config = OTAConfig(center_prior=prior, radius=radius)
        assert candidates_of(boxes, grid, config, backend) == [searched_candidates(box, grid, config) for box in boxes]

    check()


def test_radius_excludes_its_boundary(backend):
    """Stride 8: the points of row and column 1 lie at 12 px, 2.5 strides from a centre at 32 px."""
    grid, config = PointGrid((8,), ((8, 8),)), OTAConfig(center_prior="radius")
    at, beyond = (-32.0, -32.0, 96.0, 96.0), (-32.0, -32.0, 96.0 - 2**-14, 96.0)
    assert candidates_of([at], grid, config, backend) == [{8 * y + x for y in range(2, 6) for x in range(2, 6)}]
    assert candidates_of([beyond], grid, config, backend) == [{8 * y + x for y in range(2, 6) for x in range(1, 6)}]


def test_tie_across_levels_goes_to_the_finest(backend):
    grid, box = PLACES["tie-across-levels"]
    assert candidates_of([box], grid, OTAConfig(), backend) == [{0}]


def in_pixels(match: Assignment, image: int = 0) -> list[set[int]]:
    """Points matched to every ground truth."""
    return [set((match.gt_index[image] == row).nonzero()[:, 0].tolist()) for row in range(len(match.k))]


def without_rows(scene: Scene, config: OTAConfig, keep: list[int], backend: str) -> Assignment:
    """The result for a one-image scene that has only the rows `keep`, in the numbering of the scene."""
    offsets = torch.tensor([0, len(keep)])
    kept = scene._replace(gt_boxes=scene.gt_boxes[keep], gt_labels=scene.gt_labels[keep], gt_offsets=offsets)
    match = assign(*kept, config, backend=backend)
    k = match.k.new_zeros(len(scene.gt_boxes)).index_copy(0, torch.tensor(keep), match.k)
    return match._replace(gt_index=torch.tensor([*keep, -1])[match.gt_index], k=k)


ORDINARY = (20.5, 18.0, 77.25, 61.0)
NOTHING = {
    "no-gt-in-any-image": scene_of([], [], [0, 0, 0]),
    "only-ignored-rows": scene_of([ORDINARY, ORDINARY], [-1, -1]),
    "only-padding": scene_of([ORDINARY, ORDINARY], [1, 0], [0, 0]),
    "only-degenerate": scene_of([(5, 5, 5, 30), (9, 9, 4, 20), (1, 2, math.nan, 9)]),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_match(name, backend):
    match = assign(*NOTHING[name], backend=backend)
    assert (match.gt_index == -1).all() and not match.iou.any() and not match.k.any()


def test_no_gt_in_one_image(backend):
    match = assign(*make_scene(GRID, (3, 0, 2), C, seed=5), backend=backend)
    assert (match.gt_index[1] == -1).all() and not match.iou[1].any()
    assert (match.gt_index[0] >= 0).any() and (match.gt_index[2] >= 3).any()


IGNORED_ROWS = {
    "zero-width": ((30, 30, 30, 60), 0),
    "zero-height": ((30, 30, 60, 30), 0),
    "negative-width": ((60, 30, 30, 60), 0),
    "nan": ((30, math.nan, 60, 60), 0),
    "inf": ((30, 30, math.inf, 60), 0),
    "minus-inf": ((-math.inf, 30, 60, 60), 0),
    "label-minus-1": ((30, 30, 60, 60), -1),
}


@pytest.mark.parametrize("name", IGNORED_ROWS)
def test_row_is_ignored(name, backend):
    box, label = IGNORED_ROWS[name]
    scene = scene_of([ORDINARY, box, (50, 40, 120, 100)], [1, label, 2])
    match = assign(*scene, backend=backend)
    assert match.k[1] == 0
    assert_equal(match, without_rows(scene, OTAConfig(), [0, 2], backend))


def test_rows_after_the_last_offset_are_padding(backend):
    scene = scene_of([ORDINARY, (50, 40, 120, 100), (1, 1, 40, 40), (0, 0, 0, 0)], [1, 2, 0, 77], [0, 2])
    match = assign(*scene, backend=backend, check=False)
    assert_equal(match, without_rows(scene, OTAConfig(), [0, 1], backend))


def test_rows_before_the_first_offset_are_padding(backend):
    scene = scene_of([ORDINARY, (50, 40, 120, 100), (1, 1, 40, 40)], [1, 2, 0], [1, 3])
    assert_equal(assign(*scene, backend=backend), without_rows(scene, OTAConfig(), [1, 2], backend))


def test_tiny_box_keeps_the_closest_point(backend):
    """The centre (50.5, 49.75) is 1.5 and 6.25 px from the point (52, 52) of stride 8, in column 6 of row 6."""
    match = assign(*scene_of([(50.25, 49.5, 50.75, 50.0), ORDINARY]), backend=backend)
    assert match.k[0] == 1 and in_pixels(match)[0] == {6 * 17 + 6}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("part", ["logit", "box"])
def test_non_finite_prediction_is_no_candidate(part, value, backend):
    clean = make_scene(GRID, (2, 1) if interpreted(backend) else (4, 3), C, seed=2)
    before = assign(*clean, backend=backend)
    j = int((before.gt_index[0] == 0).nonzero()[0])
    broken = clean._replace(logits=clean.logits.clone(), boxes=clean.boxes.clone())
    if part == "logit":
        broken.logits[0, j, clean.gt_labels[0]] = value
    else:
        broken.boxes[0, j, 2] = value
    after = assign(*broken, backend=backend)
    assert after.gt_index[0, j] != 0
    assert after.iou.isfinite().all() and (after.k > 0).all()
    assert torch.equal(after.gt_index[1], before.gt_index[1])
    if backend != "reference":
        assert_parity(broken, OTAConfig(), backend)


def test_non_finite_prediction_outside_every_box_changes_nothing(backend):
    clean = scene_of([ORDINARY])
    broken = clean._replace(logits=clean.logits.clone(), boxes=clean.boxes.clone())
    broken.logits[0, 0], broken.boxes[0, 0], broken.logits[0, 40, 2] = math.nan, math.inf, math.nan
    assert_equal(assign(*broken, backend=backend), assign(*clean, backend=backend))


def test_image_of_non_finite_predictions(backend):
    clean = make_scene(GRID, (4, 3), C, seed=2)
    broken = clean._replace(logits=clean.logits.clone())
    broken.logits[0] = math.nan
    after, before = (assign(*scene, backend=backend) for scene in (broken, clean))
    assert (after.gt_index[0] == -1).all() and not after.k[:4].any()
    assert torch.equal(after.gt_index[1], before.gt_index[1]) and torch.equal(after.k[4:], before.k[4:])


OVERFULL = PointGrid((32, 64), ((3, 3), (1, 2)))
SUM_K = {"sum-k-over-n": 16, "sum-k-is-n": 11}


@pytest.mark.parametrize("name", SUM_K)
def test_more_supply_than_points(name, backend):
    scene = make_scene(OVERFULL, (SUM_K[name], 1), C, seed=4, size_px=(20, 60))
    config = OTAConfig(fixed_k=1)
    match = assign(*scene, config, backend=backend)
    assert match.k[:-1].sum() >= OVERFULL.num_points
    assert (match.gt_index[0] >= 0).any() and match.iou.isfinite().all()
    if backend != "reference":
        assert_parity(scene, config, backend)


@pytest.mark.parametrize("rescale", [True, False], ids=["rescale", "plain"])
def test_identical_boxes_go_to_the_lowest_index(rescale, backend):
    """Nine of them: more than a Triton program looks at together."""
    scene = scene_of([(1, 1, 30, 30)] + [ORDINARY] * 9, [2] + [1] * 9)
    match = assign(*scene, OTAConfig(rescale=rescale), backend=backend)
    matched = in_pixels(match)
    assert matched[1] and not any(matched[2:])
    assert len(set(match.k[1:].tolist())) == 1 and match.k[1] > 0


@pytest.mark.parametrize("label", [C, -2, 2**40, -(2**40)])
def test_label_out_of_range(label, backend):
    scene = scene_of([ORDINARY, (50, 40, 120, 100)], [1, 0])
    scene.gt_labels[1] = label
    with pytest.raises(ValueError, match=rf"gt_labels\[1\] is {label}, expected 0..{C - 1}, or -1"):
        assign(*scene, backend=backend, check=True)
    match = assign(*scene, backend=backend, check=False)
    assert_equal(match, without_rows(scene, OTAConfig(), [0], backend))


def test_5000_boxes(backend):
    boxes = 20 if interpreted(backend) else 5000
    scene = make_scene(PointGrid.for_image((88, 104), (8, 16)), (3, boxes), C, seed=6, size_px=(8, 30))
    config = OTAConfig(iterations=20)
    match = assign(*scene, config, backend=backend)
    assert (match.k >= 1).all() and match.iou.isfinite().all()
    assert_equal(alone(scene, 0, match), assign(*next(scene.images()), config, backend=backend))
    if backend != "reference":
        assert_parity(scene, config, backend)


def test_same_input_twice(backend):
    scene = make_scene(GRID, (3, 0, 9) if interpreted(backend) else (9, 0, 23), C, seed=8, crowded=True)
    assert_equal(assign(*scene, backend=backend), assign(*scene, backend=backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_loaded_as_it_is(dtype, backend):
    scene = make_scene(GRID, (2, 1) if interpreted(backend) else (5, 2), C, seed=9)
    half = scene._replace(logits=scene.logits.to(dtype), boxes=scene.boxes.to(dtype))
    rounded = scene._replace(logits=half.logits.float(), boxes=half.boxes.float())
    assert_equal(assign(*half, backend=backend), assign(*rounded, backend=backend))


def test_strided_inputs(backend):
    scene = make_scene(GRID, (2, 1) if interpreted(backend) else (5, 2), C, seed=9)
    strided = scene._replace(
        logits=scene.logits.transpose(1, 2).contiguous().transpose(1, 2),
        boxes=torch.stack([scene.boxes, scene.boxes + 1], -1)[..., 0],
        gt_boxes=scene.gt_boxes.T.contiguous().T,
        gt_labels=scene.gt_labels.repeat_interleave(2)[::2],
        gt_offsets=scene.gt_offsets.repeat_interleave(3)[::3],
    )
    assert not any(tensor.is_contiguous() for tensor in strided[:5])
    assert_equal(assign(*strided, backend=backend), assign(*scene, backend=backend))


def test_many_images(backend):
    counts = (1, *[0] * 27) * 5 if interpreted(backend) else (1, 0) * 70
    scene = make_scene(PointGrid((8,), ((3, 3),)), counts, 2, size_px=(6, 20))
    match, expected = (assign(*scene, OTAConfig(iterations=2), backend=name) for name in (backend, "torch"))
    assert torch.equal(match.k, expected.k) and torch.equal(match.gt_index, expected.gt_index)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_labels_and_offsets_of_any_integer_type(dtype, backend):
    """300 classes: more than a byte can count."""
    scene = make_scene(GRID, (2, 1) if interpreted(backend) else (5, 2), 300, seed=9)
    scene = scene._replace(gt_labels=scene.gt_labels % 100)
    scene.gt_labels[0] = 255 if dtype == torch.uint8 else -1
    narrow = scene._replace(gt_labels=scene.gt_labels.to(dtype), gt_offsets=scene.gt_offsets.to(dtype))
    match = assign(*scene, OTAConfig(iterations=2), backend=backend)
    assert_equal(assign(*narrow, OTAConfig(iterations=2), backend=backend), match)
    assert (match.k[0] > 0) == (dtype == torch.uint8)
    statistics = [kernels.assignment_statistics(s, OTAConfig())[2] for s in (scene, narrow)]
    assert statistics[0] == statistics[1]


@pytest.mark.parametrize("rows", [0, 2], ids=["no-gt", "padding"])
def test_no_image(rows, backend):
    scene = scene_of([ORDINARY] * rows, offsets=[0, rows])
    none = scene._replace(logits=scene.logits[:0], boxes=scene.boxes[:0], gt_offsets=scene.gt_offsets[:1])
    match = assign(*none, backend=backend)
    assert match.gt_index.shape == match.iou.shape == (0, N) and match.k.tolist() == [0] * rows


def alone(scene: Scene, b: int, match: Assignment) -> Assignment:
    """Image b of a batch's result, numbered as if it had been alone."""
    start, end = scene.gt_offsets[b : b + 2].tolist()
    gt_index = match.gt_index[b : b + 1]
    return Assignment((gt_index - start).where(gt_index >= 0, -1), match.iou[b : b + 1], match.k[start:end])


@pytest.mark.parametrize("counts", [(7, 1, 23), (0, 7), (7, 0), (5, 0, 0, 3)], ids=str)
def test_image_alone_is_image_in_a_batch(counts, backend):
    scene = make_scene(GRID, fewer(counts, backend), C, seed=10)
    match = assign(*scene, backend=backend)
    for b, image in enumerate(scene.images()):
        assert_equal(alone(scene, b, match), assign(*image, backend=backend))


def test_costs_and_plan_alone_are_those_in_a_batch():
    """Bit for bit: where an element lies in a tensor must not decide how it is rounded, or equal boxes do not tie."""
    scene = make_scene(GRID, (7, 1, 23), C, seed=10)
    _, whole = solve(scene, OTAConfig())
    for b, (start, image) in enumerate(zip((0, 7, 8), scene.images(), strict=True)):
        (_, part), here = solve(image, OTAConfig()), whole.flat_point // N == b
        assert torch.equal(part.gt + start, whole.gt[here]) and torch.equal(part.flat_point, whole.flat_point[here] % N)
        assert torch.equal(part.cost, whole.cost[here]) and torch.equal(part.log_plan, whole.log_plan[here])


@pytest.mark.parametrize("crowded", [False, True], ids=["spread", "crowded"])
def test_permuted_boxes_give_the_permuted_result(crowded, backend):
    scene = make_scene(GRID, (count := 12 if interpreted(backend) else 37,), C, seed=12, crowded=crowded)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    permuted = scene._replace(gt_boxes=scene.gt_boxes[order], gt_labels=scene.gt_labels[order])
    match, other = (assign(*s, backend=backend) for s in (scene, permuted))
    assert torch.equal(other.k, match.k[order])
    image = (scene.logits[0].double(), scene.boxes[0].double(), scene.gt_boxes.double(), scene.gt_labels)
    clear = ~ambiguous_points(assign_image(*image, GRID, OTAConfig())["log_plan"], OTAConfig())
    renamed = torch.cat([order, torch.tensor([-1])])[other.gt_index]
    assert torch.equal(renamed[:, clear], match.gt_index[:, clear])


def random_problem(m: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cost (m + 1, n) and balanced integer supplies (m + 1,) in float64."""
    cost = 3 * torch.rand(m + 1, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = torch.arange(m, dtype=torch.float64) % 3 + 1
    return cost, torch.cat([k, n - k.sum()[None]])


def test_constant_added_to_a_column_changes_nothing():
    cost, supply = random_problem(5, 31)
    constant = 7 * torch.randn(31, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plan, shifted = (sinkhorn(c, supply, OTAConfig()).exp() for c in (cost, cost + constant))
    torch.testing.assert_close(shifted, plan, rtol=0, atol=1e-9)


def test_one_iteration_by_hand():
    """One ground truth that supplies 1, background that supplies 3, four points, eps = 1 and c = -log K with

        K = 2 1 1 1    columns sum to 5 5 10 10, so after v the shares are  4/10 2/10 1/10 1/10   sum 8/10
            3 4 9 9                                                         6/10 8/10 9/10 9/10   sum 32/10

    u multiplies the first row by 1 / (8/10) = 5/4 and the second by 3 / (32/10) = 15/16. Each point takes the larger
    entry of its column, and that is background everywhere (1/2 < 9/16): the ground truth is left with nothing.
    Rows divided by their maxima, 1/2 and 27/32, are 1 1/2 1/4 1/4 and 2/3 8/9 1 1: it keeps its best point.
    """
    cost = -torch.tensor([[2, 1, 1, 1], [3, 4, 9, 9]], dtype=torch.float64).log()
    supply = torch.tensor([1, 3], dtype=torch.float64)
    log_plan = sinkhorn(cost, supply, OTAConfig(eps=1.0, iterations=1))
    expected = [[1 / 2, 1 / 4, 1 / 8, 1 / 8], [9 / 16, 3 / 4, 27 / 32, 27 / 32]]
    torch.testing.assert_close(log_plan.exp(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert decode(log_plan, OTAConfig(rescale=False)).tolist() == [1, 1, 1, 1]
    assert decode(log_plan, OTAConfig(rescale=True)).tolist() == [0, 1, 1, 1]


def test_marginals():
    cost, supply = random_problem(6, 45)
    for iterations in (1, 7, 50, 2000):
        plan = sinkhorn(cost, supply, OTAConfig(iterations=iterations)).exp()
        torch.testing.assert_close(plan.sum(1), supply, rtol=1e-6, atol=0)
    torch.testing.assert_close(plan.sum(0), torch.ones(45, dtype=torch.float64), rtol=1e-6, atol=0)


def test_marginals_over_candidate_pairs():
    counts, config = (3, 0, 5), OTAConfig(fixed_k=4, iterations=1000)
    scene = make_scene(GRID, counts, C, seed=13, size_px=(40, 90))
    _, plan = solve(scene, config)
    sent, sent_bg = plan.log_plan.double().exp(), plan.log_plan_bg.double().exp()
    supplied = sent.new_zeros(8).index_add(0, plan.gt, sent)
    torch.testing.assert_close(supplied, plan.k.double(), rtol=1e-4, atol=0)
    received = sent_bg.index_add(0, torch.searchsorted(plan.points, plan.flat_point), sent)
    torch.testing.assert_close(received, torch.ones_like(received), rtol=1e-4, atol=0)
    for b, k in enumerate(plan.k.split(counts)):
        here = plan.points // N == b
        elsewhere = N - int(here.sum())  # points with background as their one supplier: each gets its unit from there
        assert float(sent_bg[here].sum()) + elsewhere == pytest.approx(N - int(k.sum()), abs=1e-3)


def test_linear_program_is_a_lower_bound_that_falling_eps_approaches():
    cost, supply = random_problem(3, 14)
    rows, columns = cost.shape
    equal = torch.cat([torch.eye(rows).repeat_interleave(columns, 1), torch.eye(columns).repeat(1, rows)])
    demand = torch.cat([supply, torch.ones(columns, dtype=torch.float64)])
    least = linprog(cost.flatten().numpy(), A_eq=equal.numpy(), b_eq=demand.numpy(), method="highs").fun
    gaps = [
        float((sinkhorn(cost, supply, OTAConfig(eps=eps, iterations=3000)).exp() * cost).sum()) - least
        for eps in (1.0, 0.3, 0.1, 0.03)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert -1e-6 < gaps[-1] < 0.01 * gaps[0]


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
    "per-q-0": (dict(per_q=0), "per_q is 0, it must be at least 1"),
    "q0": (dict(top_q=0), "top_q is 0, it must be at least 1"),
    "k0": (dict(fixed_k=0), "fixed_k is 0, it must be at least 1"),
    "k-2.5": (dict(fixed_k=2.5), "OTAConfig.fixed_k is 2.5, it must be at least 1 and a whole number"),
    "q-20.5": (dict(top_q=np.float32(20.5)), "OTAConfig.top_q is 20.5, it must be at least 1 and a whole number"),
    "T-400-digits": (dict(iterations=10**400), "OTAConfig.iterations is 10{39}, it must be a finite number below"),
    "eps-nan": (dict(eps=math.nan), "OTAConfig.eps is nan, it must be a finite number"),
    "alpha-inf": (dict(alpha=math.inf), "OTAConfig.alpha is inf, it must be a finite number"),
    "radius-nan": (dict(center_prior="none", radius=math.nan), "OTAConfig.radius is nan, it must be a finite number"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option(name):
    options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        OTAConfig(**options)


@pytest.mark.parametrize("value", [True, np.True_, None, "20", [20], 20j], ids=repr)
@pytest.mark.parametrize("name", [field.name for field in fields(OTAConfig)])
def test_option_of_another_type(name, value):
    if (name, value) in (("rescale", True), ("fixed_k", None), ("radius", None)) and value is not np.True_:
        OTAConfig(**{name: value})
        return
    with pytest.raises((TypeError, ValueError), match=rf"OTAConfig\.{name} is {re.escape(repr(value))}"):
        OTAConfig(**{name: value})


@pytest.mark.parametrize("number", [20.0, np.int64(20), np.float32(20), Fraction(20)], ids=repr)
def test_whole_numbers_of_any_type(number):
    names = ("iterations", "top_q", "per_q", "fixed_k", "radius", "alpha", "eps")
    config = OTAConfig(**dict.fromkeys(names, number))
    assert config == OTAConfig(**dict.fromkeys(names, 20)) and {type(getattr(config, n)) for n in names[:4]} == {int}
    json.dumps(asdict(config))


BAD_INPUTS = {
    "logits-of-other-grid": (dict(logits=torch.zeros(1, N + 1, C)), ValueError, "logits has shape"),
    "boxes-of-5": (dict(boxes=torch.zeros(1, N, 5)), ValueError, "boxes has shape"),
    "boxes-of-other-batch": (dict(boxes=torch.zeros(2, N, 4)), ValueError, "boxes has shape"),
    "gt-boxes-of-5": (dict(gt_boxes=torch.zeros(1, 5)), ValueError, "gt_boxes has shape"),
    "two-labels": (dict(gt_labels=torch.zeros(2, dtype=torch.int64)), ValueError, "gt_labels has shape"),
    "offsets-of-B": (dict(gt_offsets=torch.tensor([0])), ValueError, "gt_offsets has shape"),
    "float-labels": (
        dict(gt_labels=torch.zeros(1)),
        TypeError,
        "gt_labels is torch.float32, expected torch.int64 or",
    ),
    "float-offsets": (dict(gt_offsets=torch.zeros(2)), TypeError, "gt_offsets is torch.float32, expected torch.int64"),
    "bool-labels": (dict(gt_labels=torch.ones(1) > 0), TypeError, "gt_labels is torch.bool, expected torch.int64"),
    "uint64-labels": (dict(gt_labels=torch.ones(1).to(torch.uint64)), TypeError, "gt_labels is torch.uint64, expected"),
    "int-logits": (dict(logits=torch.zeros(1, N, C).int()), TypeError, "logits is torch.int32, expected torch.float32"),
    "int-gt-boxes": (
        dict(gt_boxes=torch.ones(1, 4).long()),
        TypeError,
        "gt_boxes is torch.int64, expected torch.f",
    ),
    "falling-offsets": (dict(gt_offsets=torch.tensor([1, 0])), ValueError, "gt_offsets must rise"),
    "negative-offset": (dict(gt_offsets=torch.tensor([-1, 1])), ValueError, "gt_offsets must rise"),
    "offsets-past-G": (dict(gt_offsets=torch.tensor([0, 2])), ValueError, "at most G = 1, not"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input(name, backend):
    tensors, error, message = BAD_INPUTS[name]
    with pytest.raises(error, match=message):
        assign(*scene_of([ORDINARY])._replace(**tensors), backend=backend)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend is 'cuda', choose from reference, torch, triton"):
        assign(*scene_of([ORDINARY]), backend="cuda")


@pytest.mark.parametrize("path", sorted(Path(kernels.__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_kernels_need_only_torch_and_triton(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        for name in names:
            assert name.partition(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, (
                f"{path.name} imports {name}"
            )
