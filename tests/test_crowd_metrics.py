"""CrowdHuman's metrics: cases worked out by hand, pycocotools and scipy as judges, and properties."""

import contextlib

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_convert

from data.crowd_metrics import (
    FPPI_POINTS,
    JI_THRESHOLDS,
    crowd_metrics,
    jaccard_indices,
    match_greedily,
    matching_sizes,
    overlaps,
)

A, B, FAR = [0, 0, 10, 10], [20, 0, 10, 10], [70, 70, 10, 10]
DOWN_2, DOWN_3, DOWN_4 = ([0, y, 10, 10] for y in (2, 3, 4))


def content(*images: tuple[list, list], size: int = 100) -> dict:
    """Return annotations with the real boxes and the regions to ignore of each image."""
    flat = [(i, b, c) for i, image in enumerate(images, 1) for c, boxes in enumerate(image) for b in boxes]
    records = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": box, "iscrowd": crowd, "area": box[2] * box[3]}
        for n, (i, box, crowd) in enumerate(flat, 1)
    ]
    sizes = [{"id": i, "width": size, "height": size} for i in range(1, len(images) + 1)]
    return {"images": sizes, "annotations": records, "categories": [{"id": 1, "name": "person"}]}


def detected(*images: list[tuple[list, float]]) -> list[dict]:
    rows = [(i, *detection) for i, boxes in enumerate(images, 1) for detection in boxes]
    return [{"image_id": i, "category_id": 1, "bbox": box, "score": score} for i, box, score in rows]


MISSED_HALF = {"crowd_AP": 0.0, "crowd_MR": 0.5}
HAND = {  # real boxes and regions to ignore of each image, detections, metrics
    # Recall 1/2 at precision 1, then 1: one trapezoid of width 1/2. Nothing is missed at the end of the curve.
    "perfect": ([([A, B], [])], [[(A, 0.9), (B, 0.8)]], {"crowd_AP": 0.5, "crowd_MR": 0, "crowd_JI": 1}),
    "one-of-two": ([([A, B], [])], [[(A, 0.9)]], MISSED_HALF | {"crowd_JI": 0.5, "crowd_JI_score": 0}),
    "no-detections": ([([A, B], [])], [[]], {"crowd_AP": 0, "crowd_MR": 1, "crowd_JI": 0, "crowd_JI_score": 0}),
    # Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1: (1/2 + 2/3) / 2 * 1/2. One false detection in one image reaches every
    # FPPI point, with half of the boxes missed.
    "false-between": ([([A, B], [])], [[(A, 0.9), (FAR, 0.8), (B, 0.7)]],
                      {"crowd_AP": 7 / 24, "crowd_MR": 0.5, "crowd_JI": 2 / 3, "crowd_JI_score": 0}),
    "duplicate-is-false": ([([A, B], [])], [[(A, 0.9), (A, 0.8)]],
                           MISSED_HALF | {"crowd_JI": 0.5, "crowd_JI_score": 0.8}),
    # Three tenths of a detection outside of the region are no matter, and the second one is absorbed as well.
    "region-absorbs-several": ([([A, B], [FAR])],
                               [[(A, 0.9), ([67, 70, 10, 10], 0.8), (FAR, 0.7), (FAR, 0.65), (B, 0.6)]],
                               {"crowd_AP": 0.5, "crowd_MR": 0, "crowd_JI": 1}),
    "half-in-region-is-false": ([([A, B], [FAR])], [[([65, 70, 10, 10], 0.95), (A, 0.9)]],
                                {"crowd_AP": 0.5 * (0 + 1 / 2) / 2, "crowd_MR": 1, "crowd_JI": 1 / 3}),
    # A region over a person: the first detection is the person's, its duplicate the region's.
    "real-box-before-region": ([([A], [A])], [[(A, 0.9), (A, 0.8)]],
                               {"crowd_MR": 0, "crowd_JI": 1, "crowd_JI_score": 0}),
    # A person inside a region whom nobody finds: missed for AP and MR, taken out for JI.
    "missed-in-region": ([([A, B], [B])], [[(A, 0.9)]], MISSED_HALF | {"crowd_JI": 1}),
    # The better detection takes A, which it overlaps best, and the other is left with nothing over 0.5.
    "greedy-against-matching": ([([A, DOWN_3], [])], [[([0, 1, 10, 10], 0.9), ([0, -1, 10, 10], 0.8)]],
                                {"crowd_AP": 0, "crowd_MR": 0.5, "crowd_JI": 1}),
    # The boxes outside are cut: what is left of A is the right half, and so is what is left of the detection.
    "clipped": ([([[-5, 0, 10, 10], B], [])], [[([-50, 0, 55, 10], 0.9), (B, 0.8)]], {"crowd_AP": 0.5, "crowd_JI": 1}),
    # Like in the authors' code, what lies beyond the right side becomes the last column of pixels.
    "beyond-the-right": ([([[120, 0, 10, 10]], [])], [[([150, 0, 9, 10], 0.9)]], {"crowd_MR": 0, "crowd_JI": 1}),
    "half-iou-counts-for-ji-only": ([([A], [])], [[([0, 0, 10, 5], 0.9)]], {"crowd_MR": 1, "crowd_JI": 1}),
    "empty-image": ([([], []), ([A], [])], [[], [(A, 0.9)]], {"crowd_AP": 0, "crowd_MR": 0, "crowd_JI": 1}),
    # A false detection in an image without people: its Jaccard index is 0, over 0.5 the image counts no longer.
    "false-in-empty-image": ([([], []), ([A], [])], [[(FAR, 0.45)], [(A, 0.9)]],
                             {"crowd_AP": 0, "crowd_MR": 0, "crowd_JI": 1, "crowd_JI_score": 0.5}),
    # Only a score over a threshold counts: over 0.1 the two right ones.
    "score-at-threshold": ([([A, B], [])], [[(A, 0.5), (B, 0.3), (FAR, 0.1), (FAR, 0.05)]],
                           {"crowd_JI": 1, "crowd_JI_score": 0.1}),
    "no-area": ([([A, [5, 5, 0, 0]], [[30, 30, 0, 5]])],
                [[(A, 0.9), ([5, 5, 0, 0], 0.8), ([30, 30, 0, 5], 0.7)]], {"crowd_AP": 0, "crowd_MR": 0.5}),
    # A detection between two boxes takes the first; one that only the first would do for is then false.
    "equal-overlaps": ([([A, DOWN_4], [])], [[(DOWN_2, 0.9), (A, 0.8)]], {"crowd_AP": 0}),
    "equal-overlaps-turned": ([([DOWN_4, A], [])], [[(DOWN_2, 0.9), (A, 0.8)]], {"crowd_AP": 0.5}),
    # Of equal scores the first image's comes first, and in an image the one given first.
    "equal-scores-false-first": ([([A], [])] * 2, [[(FAR, 0.5)], [(A, 0.5)]], {"crowd_AP": 0.5 * (0 + 0.5) / 2}),
    "equal-scores-hit-first": ([([A], [])] * 2, [[(A, 0.5)], [(FAR, 0.5)]], {"crowd_AP": 0}),
    "equal-scores": ([([A], [])] * 2, [[(A, 0.5), (FAR, 0.5)], [(A, 0.5)]], {"crowd_AP": 0.5 * (1 / 2 + 2 / 3) / 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", HAND)
def test_by_hand(case):
    images, detections, expected = HAND[case]
    metrics = crowd_metrics(content(*images), detected(*detections))
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    assert np.isfinite(list(metrics.values())).all()


def test_fppi_points():
    """Ten images with a person each. False detections come after the first, the fourth and the seventh person found,
    so the FPPI is 0.1 with 1 found, 0.2 with 4, 0.3 with 7, and stays there until 8 are found. The points up to 0.1 are
    reached with 0.9 missed, 0.1778 with 0.6, and 0.3162 and those after it never: they get the last miss rate, 0.2."""
    found = [[(A, 0.99 - 0.1 * i)] for i in range(8)] + [[], []]
    for i in (0, 3, 6):
        found[i].append((FAR, 0.98 - 0.1 * i))
    metrics = crowd_metrics(content(*[([A], [])] * 10), detected(*found))
    assert metrics["crowd_MR"] == pytest.approx((0.9**5 * 0.6 * 0.2**3) ** (1 / 9))
    assert np.allclose(FPPI_POINTS, np.logspace(-2, 0, 9), atol=1e-4)


def test_more_boxes_than_coco_counts():
    """Which takes the best 100 detections of an image."""
    boxes = [[20 * x, 20 * y, 18, 18] for x in range(15) for y in range(15)]
    metrics = crowd_metrics(content((boxes, []), size=300), detected([(box, 0.9) for box in boxes]))
    assert metrics["crowd_AP"] == pytest.approx(224 / 225) and metrics["crowd_MR"] == 0 and metrics["crowd_JI"] == 1


@pytest.mark.parametrize("images", [[], [([], [])], [([], [A])]], ids=["no-images", "empty", "region"])
def test_without_real_boxes_there_is_no_number(images):
    for detections in ([], [[(A, 0.5)]]):
        assert set(crowd_metrics(content(*images), detected(*detections)).values()) == {-1.0}


def random_scenes(seed: int, images: int = 12) -> tuple[dict, list[dict]]:
    """Return up to five people in each image, regions over some of them, and detections near both."""
    rng = np.random.default_rng(seed)
    scenes, found = [], []
    for _ in range(images):
        real = rng.uniform((1, 1, 10, 10), (45, 45, 35, 35), (rng.integers(1, 6), 4))
        regions = rng.uniform((1, 1, 10, 10), (40, 40, 40, 40), (rng.integers(0, 3), 4))
        near = np.repeat(np.concatenate([real, regions]), 2, 0)
        near = (near + rng.normal(0, 2.5, near.shape))[rng.random(len(near)) < 0.7].clip(0.5)
        scenes.append((real.tolist(), regions.tolist()))
        found.append(list(zip(near.tolist(), rng.uniform(0, 1, len(near)).tolist(), strict=True)))
    return content(*scenes, size=90), detected(*found)


@pytest.mark.parametrize("seed", range(3))
def test_hits_and_what_regions_absorb_are_those_of_pycocotools(seed):
    """COCO's rule at an IoU of 0.5 is the same: its crowds are the regions to ignore."""
    annotations, results = random_scenes(seed)
    with contextlib.redirect_stdout(None):
        truth = COCO()
        truth.dataset = annotations
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "bbox")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
    verdicts = set()
    for image, theirs in zip(annotations["images"], evaluation.evalImgs[: len(annotations["images"])], strict=True):
        found = sorted((r for r in results if r["image_id"] == image["id"]), key=lambda r: -r["score"])
        records = [a for a in annotations["annotations"] if a["image_id"] == image["id"]]
        groups = (found, [a for a in records if not a["iscrowd"]], [a for a in records if a["iscrowd"]])
        boxes = (torch.tensor([r["bbox"] for r in group]).view(-1, 4) for group in groups)
        detections, real, regions = (box_convert(b, "xywh", "xyxy").double().numpy() for b in boxes)
        covered = (overlaps(detections, regions, of_union=False) > 0.5).any(1)
        hits = match_greedily(overlaps(detections, real), covered).tolist()
        pairs = zip(theirs["dtIgnore"][0], theirs["dtMatches"][0] > 0, strict=True) if theirs else ()
        assert hits == [-1 if ignored else int(matched) for ignored, matched in pairs]
        verdicts.update(hits)
    assert verdicts == {-1, 0, 1}


def assigned_jaccard(edges: np.ndarray, covered: np.ndarray, truth_covered: np.ndarray) -> float:
    """The Jaccard index by the assignment of the largest value: a pair is worth much, and a little more for either
    side that could not be left out."""
    values = np.where(edges, 1000 + (~covered[:, None]) + (~truth_covered), 0)
    pairs = [(i, j) for i, j in zip(*linear_sum_assignment(values, maximize=True), strict=True) if edges[i, j]]
    taken, truth_taken = (np.isin(np.arange(n), [p[side] for p in pairs]) for side, n in enumerate(edges.shape))
    counted = (taken | ~covered).sum() + (truth_taken | ~truth_covered).sum() - len(pairs)
    return len(pairs) / counted if counted else np.nan


def test_jaccard_index_is_that_of_the_best_assignment():
    rng = np.random.default_rng(0)
    for _ in range(150):
        iou = rng.random(rng.integers(0, 12, 2)) * rng.choice((0.55, 0.6, 0.8))
        covered, truth_covered = (rng.random(n) < 0.4 for n in iou.shape)
        counts = np.arange(len(iou) + 1)
        wanted = [assigned_jaccard(iou[:n] >= 0.5, covered[:n], truth_covered) for n in counts]
        np.testing.assert_allclose(jaccard_indices(iou, covered, truth_covered, counts), wanted)


def test_long_alternating_path():
    """Each detection overlaps its box and the next; the last one moves all others on by one."""
    edges = np.eye(3000, dtype=bool) | np.eye(3000, k=1, dtype=bool)
    edges = np.vstack([edges[:-1], np.eye(3000, dtype=bool)[:1]])
    assert matching_sizes(edges).tolist() == list(range(3001))


@pytest.mark.parametrize("seed", range(3))
def test_properties(seed):
    annotations, results = random_scenes(seed)
    before = [dict(r) for r in results]
    metrics = crowd_metrics(annotations, results)
    assert 0 < metrics["crowd_AP"] < 1 and 0 < metrics["crowd_MR"] < 1 and 0 < metrics["crowd_JI"] < 1
    assert metrics["crowd_JI_score"] in JI_THRESHOLDS
    # The order of the results across images plays no part, and nothing is written into them.
    assert crowd_metrics(annotations, sorted(results, key=lambda r: -r["image_id"])) == metrics and results == before
    # Other scores in the same order give the same AP and miss rate.
    squared = crowd_metrics(annotations, [r | {"score": r["score"] ** 2} for r in results])
    assert [squared[name] for name in ("crowd_AP", "crowd_MR")] == [metrics[name] for name in ("crowd_AP", "crowd_MR")]
    # A false detection never helps; under all others, after the last hit, it changes no AP.
    false = {"image_id": 1, "category_id": 1, "bbox": [86, 86, 3, 3]}
    last, first = (crowd_metrics(annotations, [*results, false | {"score": score}]) for score in (0.0, 1.0))
    assert last["crowd_AP"] == pytest.approx(metrics["crowd_AP"]) and last["crowd_MR"] <= metrics["crowd_MR"]
    assert first["crowd_AP"] < metrics["crowd_AP"] and first["crowd_MR"] > metrics["crowd_MR"]
    assert first["crowd_JI"] < metrics["crowd_JI"] and last["crowd_JI"] <= metrics["crowd_JI"]
    # Perfect detections: the first trapezoid has no left side.
    real = [a for a in annotations["annotations"] if not a["iscrowd"]]
    perfect = crowd_metrics(annotations, [a | {"score": 0.95} for a in real])
    expected = {"crowd_AP": 1 - 1 / len(real), "crowd_MR": 0, "crowd_JI": 1, "crowd_JI_score": 0}
    assert perfect == pytest.approx(expected)
