"""CrowdHuman's own metrics, all in [0, 1]: AP, the log-average miss rate MR^-2 (less is better), the Jaccard index JI.

A detection overlaps a real box by IoU, intersection over union, and a region to ignore by IoA, intersection over the
detection's own area. All boxes are clipped to the image first. AP and MR^-2 are those of the Caltech benchmark as the
set's authors compute them (Shao et al., arXiv 1805.00123; Dollar et al., Pedestrian Detection, PAMI 2012), JI is that
of Chu et al., Detection in Crowded Scenes, arXiv 2003.09163. `crowd_metrics` says what is done at their edges.
In an image: n detections, best score first and in the order of the results where scores are equal; m real boxes.
"""

from collections import defaultdict

import numpy as np

MIN_OVERLAP = 0.5
# 10^-2 to 10^0, evenly spaced in log and rounded as in the authors' code
FPPI_POINTS = (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0)
JI_THRESHOLDS = tuple(i / 10 for i in range(10))


def crowd_metrics(annotations: dict, results: list[dict]) -> dict[str, float]:
    """`crowd_AP`, `crowd_MR` and `crowd_JI`, and in `crowd_JI_score` the score threshold that gives this JI.

    annotations: the content of a file in COCO layout, whose iscrowd boxes are the regions to ignore; results: COCO
    result format. Categories are not looked at.

    Matching for AP and MR: each detection of an image, best first, takes of the real boxes that are left the one of
    the highest IoU over 0.5, the first of equal ones. One that finds none and has an IoA over 0.5 with a region to
    ignore is left out; else it is false. A second detection of a real box is false.
    AP: trapezoids under precision over recall, from the first to the last detection of all images, with nothing before
    the first and no interpolation. So a detector without a fault has 1 - 1/m, and no detections are AP 0.
    MR: geometric mean of the miss rate at nine numbers of false positives per image (FPPI), each the miss rate of the
    first detection at which the FPPI is reached. A curve that ends before counts with its last miss rate; without
    detections, that is 1. One miss rate of 0 makes MR 0.
    JI: in an image the detections over a score threshold and the real boxes are matched one to one where their IoU is
    at least 0.5, as many as possible. What stays unmatched with an IoA over 0.5 with a region to ignore is taken out,
    real boxes too; of several largest matchings, one that leaves out most. JI = matched / (detections + real boxes -
    matched), averaged over the images with anything left, 0 where that is none, at the best of the thresholds 0, 0.1
    to 0.9, the lowest of equal ones. It may read above published scripts, by up to 0.022 where there are regions to
    ignore.
    Without any real box all four are -1.
    """
    real, ignored, found = (defaultdict(list) for _ in range(3))
    for record in annotations["annotations"]:
        (ignored if record.get("iscrowd", 0) else real)[record["image_id"]].append(record["bbox"])
    for record in results:
        found[record["image_id"]].append([*record["bbox"], record["score"]])
    num_real = sum(map(len, real.values()))
    if not num_real:
        return dict.fromkeys(("crowd_AP", "crowd_MR", "crowd_JI", "crowd_JI_score"), -1.0)

    scores, hits, jaccard = [], [], []
    for image in annotations["images"]:
        rows = np.array(found[image["id"]], np.float64).reshape(-1, 5)
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        detections = _corners(rows[:, :4], image)
        truth, regions = (_corners(boxes[image["id"]], image) for boxes in (real, ignored))
        iou = overlaps(detections, truth)
        covered = _covered(detections, regions)
        hit = match_greedily(iou, covered)
        scores.append(rows[hit >= 0, 4])
        hits.append(hit[hit >= 0])
        counts = (rows[:, 4, None] > np.array(JI_THRESHOLDS)).sum(0)
        jaccard.append(jaccard_indices(iou, covered, _covered(truth, regions), counts))

    hits = np.concatenate(hits)[np.argsort(-np.concatenate(scores), kind="stable")]
    found_real = hits.cumsum()
    recall, precision = found_real / num_real, found_real / np.arange(1, len(hits) + 1)
    fppi = (1 - hits).cumsum() / len(annotations["images"])
    ji = _means_of_counted(np.array(jaccard))
    return {
        "crowd_AP": float(((precision[1:] + precision[:-1]) / 2 * np.diff(recall)).sum()),
        "crowd_MR": log_average_miss_rate(fppi, 1 - recall),
        "crowd_JI": float(ji.max()),
        "crowd_JI_score": JI_THRESHOLDS[int(ji.argmax())],
    }


def _corners(boxes: list | np.ndarray, image: dict) -> np.ndarray:
    """x, y, width, height -> x1 y1 x2 y2 inside the image; like the authors' code, a box begins 1 px before its end."""
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    width, height = image["width"], image["height"]
    return boxes.clip(0, [width - 1, height - 1, width, height])


def overlaps(boxes: np.ndarray, others: np.ndarray, of_union: bool = True) -> np.ndarray:
    """(n, m) IoU of boxes (n, 4) and others (m, 4), or intersection over the areas of `boxes`; 0 where these are 0."""
    sides = np.minimum(boxes[:, None, 2:], others[:, 2:]) - np.maximum(boxes[:, None, :2], others[:, :2])
    intersection = sides.clip(0).prod(2)
    area, other_area = ((b[:, 2:] - b[:, :2]).clip(0).prod(1) for b in (boxes, others))
    whole = (
        area[:, None] + other_area - intersection if of_union else np.broadcast_to(area[:, None], intersection.shape)
    )
    return np.divide(intersection, whole, out=np.zeros_like(intersection), where=whole > 0)


def _covered(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """(n,) whether a region to ignore covers more than half of a box."""
    return (overlaps(boxes, regions, of_union=False) > MIN_OVERLAP).any(1)


def match_greedily(iou: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """(n,) from the IoU (n, m): 1 for a detection with a real box of its own; others 0, or -1 where `covered`."""
    hit = np.where(covered, -1, 0)
    free = np.ones(iou.shape[1], bool)
    for i in np.flatnonzero((iou > MIN_OVERLAP).any(1)):
        best = int(np.where(free, iou[i], 0).argmax())
        if free[best] and iou[i, best] > MIN_OVERLAP:
            hit[i], free[best] = 1, False
    return hit


def log_average_miss_rate(fppi: np.ndarray, miss_rate: np.ndarray) -> float:
    """From the curve, detection by detection."""
    if not len(fppi):
        return 1.0
    places = np.searchsorted(fppi, FPPI_POINTS).clip(max=len(fppi) - 1)
    with np.errstate(divide="ignore"):  # a miss rate of 0
        return float(np.exp(np.log(miss_rate[places]).mean()))


def jaccard_indices(iou: np.ndarray, covered: np.ndarray, truth_covered: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(T,) the Jaccard index of the best `counts` (T,) detections of an image; NaN where nothing is left.

    iou (n, m); covered (n,) and truth_covered (m,): what is taken out where it stays unmatched. The largest matchings
    of all detections that are not covered match k' of them. A largest matching of all can hold as many (the matched
    sets are the bases of a matroid), so of its k detections k - k' are covered, and all others that are covered
    are taken out. The same goes for the real boxes, and one matching reaches both (Mendelsohn and Dulmage 1958).
    """
    edges = iou >= MIN_OVERLAP
    matched = matching_sizes(edges)[counts]
    matched_bare, bare_matched = matched, matched
    if covered.any() or truth_covered.any():
        matched_bare = matching_sizes(edges & ~covered[:, None])[counts]
        bare_matched = matching_sizes(edges & ~truth_covered)[counts]
    bare = np.concatenate([[0], (~covered).cumsum()])[counts]
    left = bare + matched - matched_bare
    truth_left = (~truth_covered).sum() + matched - bare_matched
    union = left + truth_left - matched
    return np.divide(matched, union, out=np.full(len(counts), np.nan), where=union > 0)


def matching_sizes(edges: np.ndarray) -> np.ndarray:
    """(n + 1,) the size of the largest matching of the first 0, 1 to n detections; edges (n, m) bool.

    Augmenting paths, found breadth first, from one detection after the other: where there is none at its turn, there
    is none later.
    """
    places, boxes = np.nonzero(edges)
    neighbours = [row.tolist() for row in np.split(boxes, np.searchsorted(places, np.arange(1, len(edges))))]
    sizes = np.zeros(len(edges) + 1, np.int64)
    owner: dict[int, int] = {}  # real box -> its detection
    owned: dict[int, int] = {}
    for new in range(len(edges)):
        sizes[new + 1] = sizes[new]
        if not neighbours[new]:
            continue
        reached: dict[int, int] = {}  # real box -> the detection that it was reached from
        queue = [new]
        for detection in queue:
            fresh = [box for box in neighbours[detection] if box not in reached]
            reached |= dict.fromkeys(fresh, detection)
            end = next((box for box in fresh if box not in owner), None)
            if end is not None:
                while end is not None:  # back along the path, each box goes to the detection before it
                    taker = reached[end]
                    owner[end], owned[taker], end = taker, end, owned.get(taker)
                sizes[new + 1] += 1
                break
            queue += [owner[box] for box in fresh]
    return sizes


def _means_of_counted(values: np.ndarray) -> np.ndarray:
    """(T,) means over the rows of (images, T), NaN left out; 0 where all are."""
    counted = ~np.isnan(values)
    return np.where(counted, values, 0).sum(0) / counted.sum(0).clip(1)
