"""CrowdHuman's own metrics, all in [0, 1]: AP, the log-average miss rate MR^-2 (less is better), the Jaccard index JI.

AP and MR^-2 follow the code of the set's authors (Shao et al., arXiv 1805.00123; Dollar et al., Pedestrian Detection,
PAMI 2012), JI follows Chu et al., arXiv 2003.09163. IoA is intersection over the detection's area.
An image, to which boxes are clipped, has n detections, best first (ties in the results' order), and m real boxes.
"""

from collections import defaultdict

import numpy as np

MIN_OVERLAP = 0.5
FPPI_POINTS = (0.01, 0.0178, 0.0316, 0.0562, 0.1, 0.1778, 0.3162, 0.5623, 1.0)  # 10^-2 to 1, as the authors round them
JI_THRESHOLDS = tuple(i / 10 for i in range(10))


def crowd_metrics(annotations: dict, results: list[dict]) -> dict[str, float]:
    """Return `crowd_AP`, `crowd_MR`, `crowd_JI`, and `crowd_JI_score`, the threshold of this JI; -1 without real boxes.

    annotations: the content of a COCO file, whose iscrowd boxes are the regions to ignore; results: COCO result format.
    AP, MR: each detection, best first, takes the free real box with the highest IoU over 0.5 (ties: the first). Without
    one it is left out if its IoA with a region to ignore is over 0.5, and else false.
    AP: trapezoids under precision over recall, from the first to the last detection, without interpolation.
    MR: geometric mean of the miss rates at nine numbers of false positives per image (FPPI), each that of the first
    detection that reaches the FPPI; a shorter curve counts with its last miss rate.
    JI: per image, detections over a threshold and real boxes are matched one to one at an IoU of at least 0.5, as many
    as possible; unmatched ones with an IoA over 0.5 are left out. JI = matched / (detections + real boxes - matched),
    averaged over the images with anything left, at the best of the thresholds 0, 0.1 to 0.9 (ties: the lowest).
    Published scripts give up to 0.022 less where there are regions to ignore. Categories play no part.
    """
    real, ignored, detected = (defaultdict(list) for _ in range(3))
    for record in annotations["annotations"]:
        (ignored if record.get("iscrowd", 0) else real)[record["image_id"]].append(record["bbox"])
    for record in results:
        detected[record["image_id"]].append([*record["bbox"], record["score"]])
    num_real = sum(map(len, real.values()))
    if not num_real:
        return dict.fromkeys(("crowd_AP", "crowd_MR", "crowd_JI", "crowd_JI_score"), -1.0)

    scores, hits, jaccard = [], [], []
    for image in annotations["images"]:
        rows = np.array(detected[image["id"]], np.float64).reshape(-1, 5)
        rows = rows[np.argsort(-rows[:, 4], kind="stable")]
        all_boxes = (rows[:, :4], real[image["id"]], ignored[image["id"]])
        detections, truth, regions = (_corners(boxes, image) for boxes in all_boxes)
        iou, covered = overlaps(detections, truth), _covered(detections, regions)
        hit = match_greedily(iou, covered)
        scores.append(rows[hit >= 0, 4])
        hits.append(hit[hit >= 0])
        counts = (rows[:, 4, None] > np.array(JI_THRESHOLDS)).sum(0)
        jaccard.append(jaccard_indices(iou, covered, _covered(truth, regions), counts))

    hits = np.concatenate(hits)[np.argsort(-np.concatenate(scores), kind="stable")]
    recall, precision = hits.cumsum() / num_real, hits.cumsum() / np.arange(1, len(hits) + 1)
    fppi = (1 - hits).cumsum() / len(annotations["images"])
    at_fppi = np.searchsorted(fppi, FPPI_POINTS).clip(max=len(fppi) - 1)
    miss_rates = 1 - recall[at_fppi] if len(hits) else np.ones(1)
    ji = np.nansum(jaccard, 0) / np.isfinite(jaccard).sum(0).clip(1)
    ap = float(((precision[1:] + precision[:-1]) / 2 * np.diff(recall)).sum())
    with np.errstate(divide="ignore"):  # a miss rate of 0
        mr = float(np.exp(np.log(miss_rates).mean()))
    best = int(ji.argmax())
    return {"crowd_AP": ap, "crowd_MR": mr, "crowd_JI": float(ji[best]), "crowd_JI_score": JI_THRESHOLDS[best]}


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
    total = area[:, None] + (other_area - intersection if of_union else 0 * intersection)
    return np.divide(intersection, total, out=np.zeros_like(intersection), where=total > 0)


def _covered(boxes: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """(n,) whether a region to ignore covers more than half of a box."""
    return (overlaps(boxes, regions, of_union=False) > MIN_OVERLAP).any(1)


def match_greedily(iou: np.ndarray, covered: np.ndarray) -> np.ndarray:
    """(n,) from the IoU (n, m): 1 for a detection that takes a real box; others 0, or -1 where `covered`."""
    hit, free = np.where(covered, -1, 0), np.ones(iou.shape[1], bool)
    for i in np.flatnonzero((iou > MIN_OVERLAP).any(1)):
        best = int(np.where(free, iou[i], 0).argmax())
        if free[best] and iou[i, best] > MIN_OVERLAP:
            hit[i], free[best] = 1, False
    return hit


def jaccard_indices(iou: np.ndarray, covered: np.ndarray, truth_covered: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(T,) the Jaccard index of the best `counts` (T,) detections of an image; NaN where nothing is left.

    iou (n, m); covered (n,) and truth_covered (m,) are left out where unmatched. A largest matching of the detections
    that are not covered extends to one of all, so the sizes of both show how many covered ones are matched; likewise
    for the real boxes, at once (Mendelsohn and Dulmage 1958).
    """
    edges = iou >= MIN_OVERLAP
    matched = matched_bare = bare_matched = matching_sizes(edges)[counts]
    if covered.any() or truth_covered.any():
        matched_bare = matching_sizes(edges & ~covered[:, None])[counts]
        bare_matched = matching_sizes(edges & ~truth_covered)[counts]
    bare = np.append(0, (~covered).cumsum())[counts]
    union = bare + matched - matched_bare + (~truth_covered).sum() - bare_matched  # both sides' rest, less `matched`
    return np.divide(matched, union, out=np.full(len(counts), np.nan), where=union > 0)


def matching_sizes(edges: np.ndarray) -> np.ndarray:
    """(n + 1,) size of the largest matching of the first 0 to n detections, by augmenting paths; edges (n, m) bool."""
    sizes, owner = [0], {}  # real box -> its detection
    for new in range(len(edges)):
        reached, queue = set(), [(new, None)]  # detections that need a box, and the path of (box, taker) to each
        for detection, path in queue:
            if detection is None:  # the last box of the path is free
                while path:
                    box, taker, path = path
                    owner[box] = taker
                break
            fresh = [box for box in np.flatnonzero(edges[detection]).tolist() if box not in reached]
            reached.update(fresh)
            queue += [(owner.get(box), (box, detection, path)) for box in fresh]
        sizes.append(len(owner))
    return np.array(sizes)
