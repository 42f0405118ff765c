"""Raw predictions -> detections: score sqrt(class * IoU), threshold, top-k per level, NMS per class.

The whole batch at once: how often the host waits for the device does not depend on the number of images.

A candidate, one class of one point, is one int64 key: the bits of its float32 score, which order like the score as
that is not negative, and below them how far its place in (N, C) is from the last. Keys are unique and the largest is
the best, of equal scores the first in place; key 0 is no candidate.
B images, N points over all levels, C classes, K candidates of an image, padded with 0 to the most in the batch.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torchvision.ops import batched_nms, nms

from kernels import PointGrid

from .head import Predictions

LAST_PLACE = 2**32 - 1
NMS_STEP = 512  # candidates of an image that NMS takes at a time, which bounds its memory


@torch.no_grad()
def postprocess(
    predictions: Predictions,
    grid: PointGrid,
    image_sizes: list[tuple[int, int]],
    score_threshold: float,
    topk_per_level: int,
    nms_iou: float,
    max_detections: int,
) -> list[dict[str, Tensor]]:
    """Per image `boxes` (n, 4) in px of the network's input, `scores` (n,), `labels` (n,), best first.

    image_sizes: (height, width) of every image inside the padded batch; boxes are clipped to them.
    Predictions of any float type; boxes and scores are float32, labels int64. A score that is NaN is no candidate.
    """
    limits = torch.tensor([(w, h, w, h) for h, w in image_sizes], dtype=torch.float32)
    limits = limits.to(predictions.boxes.device, non_blocking=True)
    keys = best_candidates(predictions, grid, score_threshold, topk_per_level)
    keys, counts = suppress(keys, predictions, limits, nms_iou, max_detections)
    image = torch.arange(len(keys), device=keys.device)[:, None]
    boxes, scores, labels = read(keys, image, predictions, limits)
    return [
        {"boxes": boxes[b, :count], "scores": scores[b, :count], "labels": labels[b, :count]}
        for b, count in enumerate(counts)
    ]


def best_candidates(predictions: Predictions, grid: PointGrid, score_threshold: float, topk: int) -> Tensor:
    """(B, K) keys, best first: of every level the `topk` best scores above the threshold.

    They belong to the `topk` points with the best scores in any class, of equal ones the first in place, so only those
    points' classes are scored.
    """
    logits, quality = predictions.logits, predictions.iou_logits.float().sigmoid()
    image, classes = (torch.arange(n, device=logits.device) for n in (logits.shape[0], logits.shape[2]))
    best = score(logits.amax(-1), quality)
    # A little below the threshold, as the last bit of a sigmoid need not follow the order of the logits. A point with
    # a NaN in any class counts as above, and sorts before all others, so it comes on top of the `topk`.
    above = ~(best <= score_threshold * (1 - 1e-6))
    rank = key(best.nan_to_num(2.0), torch.arange(best.shape[1], device=best.device))
    levels = [slice(*ends) for ends in pairwise(grid.level_offsets)]
    counts = torch.stack([above[:, level].sum(1, dtype=torch.int32) for level in levels])
    counts = counts.minimum(topk + best.isnan().sum(1, dtype=torch.int32))
    sizes = counts.amax(1).tolist()  # waits for the device
    candidates = []
    for level, size, own in zip(levels, sizes, counts, strict=True):
        points = level.start + rank[:, level].topk(size).indices
        scores = score(logits[image[:, None], points], quality.gather(1, points)[..., None])
        keys = key(scores, points[..., None] * len(classes) + classes)
        taken = torch.arange(size, device=own.device) < own[:, None]  # other images may need more points
        keys = torch.where((scores > score_threshold) & taken[..., None], keys, 0).flatten(1)
        candidates.append(keys.topk(min(topk, keys.shape[1])).values)
    return torch.cat(candidates, 1).sort(descending=True).values


def score(logits: Tensor, quality: Tensor) -> Tensor:
    return logits.float().sigmoid().mul_(quality).sqrt_()


def key(scores: Tensor, places: Tensor) -> Tensor:
    return torch.add(LAST_PLACE - places, scores.view(torch.int32), alpha=LAST_PLACE + 1)


def read(keys: Tensor, image: Tensor, predictions: Predictions, limits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (..., 4) clipped to the `limits` (B, 4) of their image, scores (...), labels (...); of key 0 anything."""
    places = torch.where(keys > 0, LAST_PLACE - (keys & LAST_PLACE), 0)
    num_classes = predictions.logits.shape[-1]
    boxes = predictions.boxes[image, places // num_classes].float().clamp(min=0).minimum(limits[image])
    return boxes, (keys >> 32).int().view(torch.float32), places % num_classes


def suppress(
    keys: Tensor, predictions: Predictions, limits: Tensor, nms_iou: float, max_detections: int
) -> tuple[Tensor, list[int]]:
    """Keys (B, at most max_detections) that survive greedy NMS, best first, and how many of them each image has.

    In steps down the list of candidates: the survivors of a step come first in the next, and suppress as they would
    have in one. It ends when every image has enough detections or no more candidates, as a rule after one step.
    """
    keys, counts = keys.clone(), [0] * len(keys)
    for end in range(NMS_STEP, keys.shape[1] + NMS_STEP, NMS_STEP):
        image, rank = keys[:, :end].nonzero(as_tuple=True)
        boxes, scores, labels = read(keys[image, rank], image, predictions, limits)
        groups = image * predictions.logits.shape[-1] + labels
        kept = nms_per_group(boxes, scores, groups, image, limits.max(), nms_iou)
        survives = torch.zeros_like(keys[:, :end], dtype=torch.bool)
        survives[image[kept], rank[kept]] = True
        keys[:, :end] *= survives
        survivors = survives.sum(1)
        keys[:, end:] *= (survivors < max_detections)[:, None]
        counts, undecided = torch.stack([survivors, keys[:, end:].count_nonzero(1)]).tolist()
        if not any(undecided):
            break
    return keys.topk(min(max_detections, keys.shape[1])).values, [min(count, max_detections) for count in counts]


def nms_per_group(
    boxes: Tensor, scores: Tensor, groups: Tensor, image: Tensor, extent_px: Tensor, nms_iou: float
) -> Tensor:
    """Indices of the boxes (n, 4) that survive greedy NMS among those of their group, a class of an image.

    All boxes are looked at together, but on a CPU, where batched_nms takes one image after the other if there are many.
    Elsewhere n^2 bits are needed. A box with a NaN neither suppresses nor is suppressed.
    """
    device = boxes.device
    if device.type == "mps":  # has no float64
        boxes, scores, groups, image, extent_px = (x.cpu() for x in (boxes, scores, groups, image, extent_px))
    apart, scores = move_apart(boxes, groups, extent_px), scores.double()
    if apart.device.type == "cpu":
        return batched_nms(apart, scores, image, nms_iou).to(device)
    return nms(apart, scores, nms_iou)


def move_apart(boxes: Tensor, groups: Tensor, extent_px: Tensor) -> Tensor:
    """Boxes (n, 4) of different groups (n,) do not touch any more; float64, which keeps coordinates to 2^-20 px, where
    float32 would round them to 0.1 px."""
    boxes = boxes.masked_fill(boxes.isnan().any(1, keepdim=True), 0).double()  # no area: its IoU is 0, or NaN
    return boxes + (groups * (extent_px.double() + 1))[:, None]
