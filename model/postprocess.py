"""Raw predictions -> detections: score sqrt(class * IoU), threshold, top-k per level, NMS per class."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from kernels import PointGrid

from .head import Predictions


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
    """
    scores = (predictions.logits.sigmoid() * predictions.iou_logits.sigmoid()[..., None]).sqrt()
    num_classes = scores.shape[-1]
    detections = []
    for image_scores, image_boxes, size in zip(scores, predictions.boxes, image_sizes, strict=True):
        kept = []
        for start, end in zip(grid.level_offsets, grid.level_offsets[1:], strict=False):
            flat = image_scores[start:end].flatten()
            above = (flat > score_threshold).nonzero()[:, 0]
            best = flat[above].topk(min(topk_per_level, above.numel())).indices
            kept.append(above[best] + start * num_classes)
        kept = torch.cat(kept)
        kept_scores, labels = image_scores.flatten()[kept], kept % num_classes
        boxes = clip_boxes_to_image(image_boxes[kept // num_classes], size)
        best = batched_nms(boxes, kept_scores, labels, nms_iou)[:max_detections]
        detections.append({"boxes": boxes[best], "scores": kept_scores[best], "labels": labels[best]})
    return detections
