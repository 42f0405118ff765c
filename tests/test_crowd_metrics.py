"""CrowdHuman's metrics: cases worked out by hand, a slow implementation of its own, matchings by brute force."""

import itertools
import math

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching

from data.crowd_metrics import FPPI_POINTS, JI_THRESHOLDS, crowd_metrics, matching_sizes, overlaps

A, B, FAR = [0, 0, 10, 10], [20, 0, 10, 10], [70, 70, 10, 10]


def content(*images: tuple[list, list], size: int = 100) -> dict:
    """Real boxes and regions to ignore of each image."""
    annotations = [
        {"id": 0, "image_id": i, "category_id": 1, "bbox": box, "iscrowd": crowd}
        for i, image in enumerate(images, 1)
        for crowd, boxes in enumerate(image)
        for box in boxes
    ]
    sizes = [{"id": i, "width": size, "height": size} for i in range(1, len(images) + 1)]
    return {"images": sizes, "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}


def detected(*images: list[tuple[list, float]]) -> list[dict]:
    return [
        {"image_id": i, "category_id": 1, "bbox": box, "score": score}
        for i, boxes in enumerate(images, 1)
        for box, score in boxes
    ]


# From here on the slow implementation: one box at a time, from the definitions, sharing nothing with the other.
def slow_box(box: list, image: dict) -> tuple:
    x, y, w, h = box
    x1, y1 = min(max(x, 0), image["width"] - 1), min(max(y, 0), image["height"] - 1)
    return x1, y1, max(min(x + w, image["width"]), 0), max(min(y + h, image["height"]), 0)


def slow_area(box: tuple) -> float:
    return max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def slow_intersection(a: tuple, b: tuple) -> float:
    return slow_area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))


def slow_iou(a: tuple, b: tuple) -> float:
    common = slow_intersection(a, b)
    whole = slow_area(a) + slow_area(b) - common
    return common / whole if whole else 0.0


def slow_inside(box: tuple, regions: list) -> bool:
    return any(slow_area(box) and slow_intersection(box, region) / slow_area(box) > 0.5 for region in regions)


def slow_scenes(annotations: dict, results: list[dict]) -> list[tuple]:
    scenes = []
    for image in annotations["images"]:
        records = [a for a in annotations["annotations"] if a["image_id"] == image["id"]]
        real, regions = (
            [slow_box(a["bbox"], image) for a in records if bool(a["iscrowd"]) == c] for c in (False, True)
        )
        own = [(slow_box(r["bbox"], image), r["score"]) for r in results if r["image_id"] == image["id"]]
        scenes.append((sorted(own, key=lambda d: d[1], reverse=True), real, regions))
    return scenes


def slow_verdicts(scenes: list[tuple]) -> list[bool]:
    """Whether each detection that counts is a hit, best first."""
    verdicts = []
    for detections, real, regions in scenes:
        left = list(real)
        for box, score in detections:
            ious = [slow_iou(box, other) for other in left]
            if ious and max(ious) > 0.5:
                left.pop(ious.index(max(ious)))
                verdicts.append((score, True))
            elif not slow_inside(box, regions):
                verdicts.append((score, False))
    return [hit for _, hit in sorted(verdicts, key=lambda v: v[0], reverse=True)]


def slow_matchings(detections: list, real: list):
    """Every one-to-one matching, as pairs of indices."""
    if not detections:
        yield ()
        return
    *others, last = detections
    for matching in slow_matchings(others, real):
        yield matching
        for j, box in enumerate(real):
            if slow_iou(last, box) >= 0.5 and j not in [m[1] for m in matching]:
                yield (*matching, (len(others), j))


def exhaustive_jaccard(detections: list, real: list, regions: list) -> float | None:
    """The best over the largest matchings, all of which are tried; None where nothing is left."""
    matchings = list(slow_matchings(detections, real))
    size, found = max(map(len, matchings)), []
    for matching in matchings:
        if len(matching) < size:
            continue
        taken, taken_real = ({pair[side] for pair in matching} for side in (0, 1))
        n = sum(i in taken or not slow_inside(box, regions) for i, box in enumerate(detections))
        m = sum(j in taken_real or not slow_inside(box, regions) for j, box in enumerate(real))
        found.append(size / (n + m - size) if n or m else None)
    return max(found, key=lambda value: -1 if value is None else value)


def slow_jaccard(detections: list, real: list, regions: list) -> float | None:
    """The same by the assignment of the largest value, for scenes of any size: a pair of a detection and a real box is
    worth much, and a little more for either of them that could not be taken out."""
    inside, inside_real = ([slow_inside(box, regions) for box in boxes] for boxes in (detections, real))
    value = np.zeros((len(detections), len(real)))
    for i, j in itertools.product(range(len(detections)), range(len(real))):
        if slow_iou(detections[i], real[j]) >= 0.5:
            value[i, j] = 10_000 + (not inside[i]) + (not inside_real[j])
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(value, maximize=True), strict=True) if value[i, j]]
    n = sum(not hidden for hidden in inside) + sum(inside[i] for i, _ in pairs)
    m = sum(not hidden for hidden in inside_real) + sum(inside_real[j] for _, j in pairs)
    return len(pairs) / (n + m - len(pairs)) if n or m else None


def slow_metrics(annotations: dict, results: list[dict], jaccard=slow_jaccard) -> dict:
    scenes = slow_scenes(annotations, results)
    total = sum(len(real) for _, real, _ in scenes)
    curve, hits, misses = [], 0, 0
    for hit in slow_verdicts(scenes):
        hits, misses = hits + hit, misses + (not hit)
        curve.append((hits / total, hits / (hits + misses), misses / len(scenes)))
    ap = sum((r2 - r1) * (p1 + p2) / 2 for (r1, p1, _), (r2, p2, _) in itertools.pairwise(curve))
    rates = []
    for point in FPPI_POINTS:
        reached = [1 - recall for recall, _, fppi in curve if fppi >= point]
        rates.append(reached[0] if reached else 1 - curve[-1][0] if curve else 1.0)
    mr = math.exp(sum(map(math.log, rates)) / 9) if all(rates) else 0.0
    means = []
    for threshold in JI_THRESHOLDS:
        values = [jaccard([b for b, s in found if s > threshold], *truth) for found, *truth in scenes]
        counted = [value for value in values if value is not None]
        means.append(sum(counted) / len(counted) if counted else 0.0)
    best = max(means)
    return {"crowd_AP": ap, "crowd_MR": mr, "crowd_JI": best, "crowd_JI_score": JI_THRESHOLDS[means.index(best)]}


def both(annotations: dict, results: list[dict]) -> dict:
    """The metrics, after making sure that the slow ones are the same."""
    metrics = crowd_metrics(annotations, results)
    for jaccard in (slow_jaccard, exhaustive_jaccard):
        assert metrics == pytest.approx(slow_metrics(annotations, results, jaccard), abs=1e-12)
    return metrics


MISSED_HALF = {"crowd_AP": 0.0, "crowd_MR": 0.5}
HAND = {
    # Recall 1/2 at precision 1, then 1: one trapezoid of width 1/2. Nothing is missed at the end of the curve.
    "perfect": ([([A, B], [])], [[(A, 0.9), (B, 0.8)]], {"crowd_AP": 0.5, "crowd_MR": 0, "crowd_JI": 1}),
    "one-of-two": ([([A, B], [])], [[(A, 0.9)]], MISSED_HALF | {"crowd_JI": 0.5, "crowd_JI_score": 0}),
    "no-detections": ([([A, B], [])], [[]], {"crowd_AP": 0, "crowd_MR": 1, "crowd_JI": 0, "crowd_JI_score": 0}),
    "nothing-overlaps": ([([A], [])], [[(FAR, 0.9)]], {"crowd_AP": 0, "crowd_MR": 1, "crowd_JI": 0}),
    # Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: (1/2 + 2/3) / 2 * 1/2. One false detection in one image reaches every
    # FPPI point, with half of the boxes missed.
    "false-between": (
        [([A, B], [])],
        [[(A, 0.9), (FAR, 0.8), (B, 0.7)]],
        {"crowd_AP": 7 / 24, "crowd_MR": 0.5, "crowd_JI": 2 / 3, "crowd_JI_score": 0},
    ),
    "duplicate-is-false": (
        [([A, B], [])],
        [[(A, 0.9), (A, 0.8)]],
        MISSED_HALF | {"crowd_JI": 0.5, "crowd_JI_score": 0.8},
    ),
    # Three tenths of a detection outside of the region are no matter, and the second one is absorbed as well.
    "region-absorbs-several": (
        [([A, B], [FAR])],
        [[(A, 0.9), ([67, 70, 10, 10], 0.8), (FAR, 0.7), (FAR, 0.65), (B, 0.6)]],
        {"crowd_AP": 0.5, "crowd_MR": 0, "crowd_JI": 1},
    ),
    "half-in-region-is-false": (
        [([A, B], [FAR])],
        [[([65, 70, 10, 10], 0.95), (A, 0.9)]],
        {"crowd_AP": 0.5 * (0 + 1 / 2) / 2, "crowd_MR": 1, "crowd_JI": 1 / 3},
    ),
    "small-in-large-region": ([([A], [[50, 50, 50, 50]])], [[(A, 0.9), (FAR, 0.8)]], {"crowd_MR": 0, "crowd_JI": 1}),
    # A region over a person: the first detection is the person's, its duplicate the region's.
    "real-box-before-region": (
        [([A], [A])],
        [[(A, 0.9), (A, 0.8)]],
        {"crowd_MR": 0, "crowd_JI": 1, "crowd_JI_score": 0},
    ),
    # A person inside a region whom nobody finds: missed for AP and MR, taken out for JI.
    "missed-in-region": ([([A, B], [B])], [[(A, 0.9)]], MISSED_HALF | {"crowd_JI": 1}),
    # The better detection takes A, which it overlaps best, and the other is left with nothing over 0.5.
    "greedy-against-matching": (
        [([[0, 0, 10, 10], [0, 3, 10, 10]], [])],
        [[([0, 1, 10, 10], 0.9), ([0, -1, 10, 10], 0.8)]],
        {"crowd_AP": 0, "crowd_MR": 0.5, "crowd_JI": 1},
    ),
    # The boxes outside are cut: what is left of A is the right half, and so is what is left of the detection.
    "clipped": ([([[-5, 0, 10, 10], B], [])], [[([-50, 0, 55, 10], 0.9), (B, 0.8)]], {"crowd_AP": 0.5, "crowd_JI": 1}),
    "half-iou-counts-for-ji-only": ([([A], [])], [[([0, 0, 10, 5], 0.9)]], {"crowd_MR": 1, "crowd_JI": 1}),
    "region-alone": ([([], [FAR]), ([A], [])], [[(FAR, 0.9)], [(A, 0.8)]], {"crowd_MR": 0, "crowd_JI": 1}),
    "empty-image": ([([], []), ([A], [])], [[], [(A, 0.9)]], {"crowd_AP": 0, "crowd_MR": 0, "crowd_JI": 1}),
    # A false detection in an image without people: its Jaccard index is 0, over 0.5 the image counts no longer.
    "false-in-empty-image": (
        [([], []), ([A], [])],
        [[(FAR, 0.45)], [(A, 0.9)]],
        {"crowd_AP": 0, "crowd_MR": 0, "crowd_JI": 1, "crowd_JI_score": 0.5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HAND)
def test_by_hand(case):
    images, detections, expected = HAND[case]
    metrics = both(content(*images), detected(*detections))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)


def test_fppi_points():
    """Ten images with a person each. False detections come after the first, the fourth and the seventh person found,
    so the FPPI is 0.1 with 1 found, 0.2 with 4, 0.3 with 7, and stays there until 8 are found. The points up to 0.1 are
    reached with 0.9 missed, 0.1778 with 0.6, and 0.3162 and those after it never: they get the last miss rate, 0.2."""
    found = [[(A, 0.99 - 0.1 * i)] for i in range(8)] + [[], []]
    for i in (0, 3, 6):
        found[i].append((FAR, 0.98 - 0.1 * i))
    metrics = both(content(*[([A], [])] * 10), detected(*found))
    assert metrics["crowd_MR"] == pytest.approx((0.9**5 * 0.6 * 0.2**3) ** (1 / 9))
    assert np.allclose(FPPI_POINTS, np.logspace(-2, 0, 9), atol=1e-4)


def test_equal_scores_keep_the_order_of_the_images():
    """The false detection of the first image comes before the hit of the second one."""
    images, false, hit = [([A], []), ([A], [])], (FAR, 0.5), (A, 0.5)
    assert both(content(*images), detected([false], [hit]))["crowd_AP"] == pytest.approx(0.5 * (0 + 0.5) / 2)
    assert both(content(*images), detected([hit], [false]))["crowd_AP"] == 0
    assert both(content(*images), detected([hit, false], [hit]))["crowd_AP"] == pytest.approx(0.5 * (1 / 2 + 2 / 3) / 2)


def test_equal_overlaps_go_to_the_first_box():
    """A detection between two boxes takes the first; one that only the first would do for is then false."""
    boxes = [[0, 0, 10, 10], [0, 4, 10, 10]]
    for order, ap in ((boxes, 0), (boxes[::-1], 0.5)):
        found = [[([0, 2, 10, 10], 0.9), (boxes[0], 0.8)]]
        assert both(content((order, [])), detected(*found))["crowd_AP"] == ap


def test_score_at_the_threshold_is_not_over_it():
    metrics = both(content(([A, B], [])), detected([(A, 0.5), (B, 0.3), (FAR, 0.1), (FAR, 0.05)]))
    assert (metrics["crowd_JI"], metrics["crowd_JI_score"]) == (1, 0.1)


@pytest.mark.parametrize("detections", [[], [[(A, 0.5)]]], ids=["no-detections", "detections"])
@pytest.mark.parametrize("images", [[], [([], [])], [([], [A])]], ids=["no-images", "empty", "region"])
def test_without_real_boxes_there_is_no_number(images, detections):
    assert set(crowd_metrics(content(*images), detected(*detections)).values()) == {-1.0}


def test_boxes_without_area_match_nothing():
    images, found = [([A, [5, 5, 0, 0]], [[30, 30, 0, 5]])], [[(A, 0.9), ([5, 5, 0, 0], 0.8), ([30, 30, 0, 5], 0.7)]]
    assert both(content(*images), detected(*found))["crowd_MR"] == pytest.approx(0.5)
    assert not np.isnan(overlaps(np.zeros((2, 4)), np.zeros((3, 4)))).any()


def test_detections_come_back_unchanged_in_any_order():
    """The order of results across images is no matter, and nothing is written into them."""
    annotations, results = random_scenes(3)
    before = [dict(r) for r in results]
    shuffled = sorted(results, key=lambda r: -r["image_id"])
    assert crowd_metrics(annotations, shuffled) == crowd_metrics(annotations, results) and results == before


def random_scenes(seed: int, images: int = 5) -> tuple[dict, list[dict]]:
    """Up to five people that overlap, regions over some of them, detections near both; half of the sets on a grid, so
    that overlaps and scores are often equal, and often exactly 0.5."""
    rng = np.random.default_rng(seed)
    step = 5 if seed % 2 else 0.25
    scenes, found = [], []
    for _ in range(images):
        real = [rng.uniform((-10, -10, 10, 10), (35, 35, 35, 35)) for _ in range(rng.integers(0, 6))]
        regions = [rng.uniform((-10, -10, 10, 10), (30, 30, 40, 40)) for _ in range(rng.integers(0, 3))]
        near = [box + rng.normal(0, 3, 4) for box in real + regions for _ in range(rng.integers(0, 3))][:7]
        boxes = [[(np.round(b / step) * step).tolist() for b in group] for group in (real, regions, near)]
        scenes.append((boxes[0], boxes[1]))
        scores = rng.integers(1, 20, len(near)) / 20 if seed % 2 else rng.uniform(0, 1, len(near))
        found.append([(box[:2] + [max(s, 0) for s in box[2:]], s) for box, s in zip(boxes[2], scores, strict=True)])
    return content(*scenes, size=50), detected(*found)


@pytest.mark.parametrize("jaccard", [slow_jaccard, exhaustive_jaccard], ids=["assignment", "exhaustive"])
@pytest.mark.parametrize("seed", range(40))
def test_slow_implementation_agrees(seed, jaccard):
    annotations, results = random_scenes(seed)
    assert crowd_metrics(annotations, results) == pytest.approx(slow_metrics(annotations, results, jaccard), abs=1e-9)


@pytest.mark.parametrize("density", [0.15, 0.3, 0.6])
def test_matching_is_the_largest(density):
    """Of every prefix, against all subsets of edges, and against scipy on larger graphs."""
    rng = np.random.default_rng(int(100 * density))
    for _ in range(40):
        edges = rng.random(rng.integers(0, 6, 2)) < density
        sizes = [max(matchings_of(edges[:n].tolist())) for n in range(len(edges) + 1)]
        assert matching_sizes(edges).tolist() == sizes
    for _ in range(20):
        edges = rng.random((60, 50)) < density / 10
        largest = maximum_bipartite_matching(csr_matrix(edges), perm_type="column")
        assert matching_sizes(edges)[-1] == (largest >= 0).sum()


def matchings_of(rows: list[list[bool]], taken: frozenset = frozenset()) -> list[int]:
    """Sizes of all matchings."""
    if not rows:
        return [len(taken)]
    free = [j for j, edge in enumerate(rows[0]) if edge and j not in taken]
    return [size for j in [None, *free] for size in matchings_of(rows[1:], taken if j is None else taken | {j})]


def test_long_alternating_path():
    """Each detection overlaps its box and the next; the last one moves all others on by one."""
    edges = np.eye(3000, dtype=bool) | np.eye(3000, k=1, dtype=bool)
    edges = np.vstack([edges[:-1], np.eye(3000, dtype=bool)[:1]])
    assert matching_sizes(edges).tolist() == list(range(3001))
