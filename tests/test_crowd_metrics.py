"""CrowdHuman's metrics: cases worked out by hand."""

import numpy as np
import pytest

from data.crowd_metrics import FPPI_POINTS, crowd_metrics

A, B, FAR = [0, 0, 10, 10], [20, 0, 10, 10], [70, 70, 10, 10]
DOWN_2, DOWN_3, DOWN_4 = ([0, y, 10, 10] for y in (2, 3, 4))


def content(*images: tuple[list, list]) -> dict:
    """Return annotations with the real boxes and the regions to ignore of each image, of 100 x 100 px."""
    records = [
        {"image_id": i, "bbox": box, "iscrowd": crowd}
        for i, image in enumerate(images)
        for crowd, boxes in enumerate(image)
        for box in boxes
    ]
    return {"images": [{"id": i, "width": 100, "height": 100} for i in range(len(images))], "annotations": records}


def detected(*images: list[tuple[list, float]]) -> list[dict]:
    return [{"image_id": i, "bbox": b, "score": score} for i, boxes in enumerate(images) for b, score in boxes]


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
    # A false detection in an image without people: its Jaccard index is 0, over 0.5 the image counts no longer.
    "false-in-empty-image": ([([], []), ([A], [])], [[(FAR, 0.45)], [(A, 0.9)]],
                             {"crowd_AP": 0, "crowd_MR": 0, "crowd_JI": 1, "crowd_JI_score": 0.5}),
    # Only a score over a threshold counts: over 0.1 the two right ones.
    "score-at-threshold": ([([A, B], [])], [[(A, 0.5), (B, 0.3), (FAR, 0.1), (FAR, 0.05)]],
                           {"crowd_JI": 1, "crowd_JI_score": 0.1}),
    # A detection between two boxes takes the first; one that only the first would do for is then false.
    "equal-overlaps": ([([A, DOWN_4], [])], [[(DOWN_2, 0.9), (A, 0.8)]], {"crowd_AP": 0}),
    # Of equal scores the first image's comes first.
    "equal-scores-false-first": ([([A], [])] * 2, [[(FAR, 0.5)], [(A, 0.5)]], {"crowd_AP": 0.5 * (0 + 0.5) / 2}),
    "equal-scores-hit-first": ([([A], [])] * 2, [[(A, 0.5)], [(FAR, 0.5)]], {"crowd_AP": 0}),
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


@pytest.mark.parametrize("images", [[], [([], [A])]], ids=["no-images", "region"])
def test_without_real_boxes_there_is_no_number(images):
    assert set(crowd_metrics(content(*images), []).values()) == {-1.0}
