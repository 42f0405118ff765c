"""What hypothesis draws: boxes, grids, scenes and settings of ota_assign, usual and odd."""

import math

from hypothesis import strategies as st

from kernels import OTAConfig, PointGrid
from tests.support.backends import C, scene_of
from tests.support.scenes import Scene

HUGE = 1e5  # px
PX = st.integers(-80 * 64, 200 * 64).map(lambda units: units / 64)  # exact in float32, and so are sums of two
BOXES = st.tuples(PX, PX, PX, PX).map(lambda xywh: (*xywh[:2], xywh[0] + xywh[2], xywh[1] + xywh[3]))
ODD_BOXES = st.tuples(*[st.one_of(PX, st.sampled_from([-HUGE, HUGE, math.nan, math.inf, -math.inf]))] * 4)
CONFIGS = st.builds(
    OTAConfig,
    center_prior=st.sampled_from(["closest", "radius", "none"]),
    cls_cost=st.sampled_from(["focal", "bce"]),
    reg_cost=st.sampled_from(["iou", "giou", "smooth_l1"]),
    fixed_k=st.sampled_from([None, 1, 7]),
    rescale=st.booleans(),
)


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
