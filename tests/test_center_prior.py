"""Candidates of ground truths, in every backend: paper, section 3.3, in exact fractions."""

from dataclasses import replace
from fractions import Fraction
from itertools import groupby, product

import pytest
import torch

from kernels import OTAConfig, PointGrid
from tests.support.backends import BACKENDS, GRID, assign
from tests.support.scenes import Scene

pytestmark = pytest.mark.usefixtures("one_thread", "poisoned_memory")


@pytest.fixture(params=BACKENDS)
def backend(request) -> str:
    return request.param


def candidates_of(gt_boxes: list, grid: PointGrid, config: OTAConfig, backend: str) -> list[set[int]]:
    """The candidates of every box, whatever the backend: alone in its image, it asks for all of them and gets them.

    One iteration suffices, because background sends next to nothing to points as sure as these.
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


ONE_LEVEL = PointGrid((8,), ((8, 8),))
PLACES = {
    "middle": (GRID, (30.5, 22.25, 95.0, 80.75)),
    "center-outside": (GRID, (-200, 10, 60, 90)),
    "nowhere-near": (GRID, (1000, 2000, 1010, 2010)),
    "tie-of-four": (GRID, (0, 0, 128, 96)),
    "tiny-box": (GRID, (50.25, 49.5, 50.75, 50.0)),
    "margin-0.01-rounded-down": (GRID, (11.99, 11.99, 36.01, 36.01)),
    "margin-missed": (GRID, (11.9901, 11.9901, 36.0099, 36.0099)),
    "level-under-25-points": (PointGrid((8, 64), ((13, 17), (2, 2))), (0, 0, 136, 104)),
    "one-row": (PointGrid((7, 13), ((1, 19), (1, 11))), (20, -50, 100, 60)),
    "tie-across-levels": (PointGrid((8, 16), ((4, 4), (2, 2))), (5.5, 5.5, 6.5, 6.5)),
    "point-at-2.5-strides": (ONE_LEVEL, (-32, -32, 96, 96)),
    "point-within-2.5-strides": (ONE_LEVEL, (-32, -32, 96 - 2**-14, 96)),
}
PRIORS = {
    "closest-5": OTAConfig(),
    "radius-2.5": OTAConfig(center_prior="radius"),
    "radius-0.5": OTAConfig(center_prior="radius", radius=0.5),
    "none": OTAConfig(center_prior="none"),
}


@pytest.mark.parametrize("prior", PRIORS)
def test_candidates(prior, backend):
    """In every place, all boxes of a grid in one batch."""
    config, found, expected = PRIORS[prior], {}, {}
    for grid, places in groupby(PLACES.items(), key=lambda place: place[1][0]):
        boxes = {name: box for name, (_, box) in places}
        found |= zip(boxes, candidates_of(list(boxes.values()), grid, config, backend), strict=True)
        expected |= {name: searched_candidates(box, grid, config) for name, box in boxes.items()}
    assert found == expected


def test_memory_reserved_for_the_pairs_of_one_box_is_enough():
    """A box over everything, with its centre on a point, between two, and between four."""
    most_pairs_per_gt = pytest.importorskip("kernels.pairs_triton").most_pairs_per_gt
    configs = [OTAConfig(radius=radius) for radius in (1, 2, 5)] + [OTAConfig(center_prior="none")]
    configs += [OTAConfig(center_prior="radius", radius=radius) for radius in (0.2, 0.5, 1.3, 2.5)]
    for config, shift in product(configs, (0.0, 4.0, 8.0, 2.5)):
        (found,) = candidates_of([(-500.0, -500.0, 620.0 + shift, 604.0 + shift)], GRID, config, "torch")
        assert 0 < len(found) <= most_pairs_per_gt(GRID, config)
