"""Predictions -> detections: score sqrt(class * IoU), threshold, top k of each level, NMS of each class.

Tensors of fixed shapes, so that evaluation, prediction and the exported graphs run the same code.
B images, N points over all L levels, C classes, K = L * topk_per_level candidates of an image.
"""

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from errors import UserError
from kernels import PointGrid
from kernels.grid import MAX_SIDE_PX

from .head import Predictions


class Detections(NamedTuple):
    """Objects in one image, best first."""

    boxes: Tensor  # (n, 4) float32 x1 y1 x2 y2 px
    scores: Tensor  # (n,) float32
    labels: Tensor  # (n,) int64 in 0..C-1
    class_names: list[str]  # of all C classes

    @property
    def names(self) -> list[str]:
        return [self.class_names[label] for label in self.labels.tolist()]

    def to_supervision(self):
        """Return supervision.Detections, which track, slice and draw. Raises UserError: the package is missing."""
        try:
            import supervision
        except ImportError as error:
            raise UserError("to_supervision needs supervision: pip install supervision") from error
        columns = {"xyxy": self.boxes, "confidence": self.scores, "class_id": self.labels}
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}
        return supervision.Detections(**arrays, data={"class_name": np.array(self.names, str)})


def suppressed(boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, nms_iou: float, limit: int) -> Tensor:
    """Set scores (B, K) to 0 where greedy NMS among the boxes (B, K, 4) of an image's class removes a candidate.

    `limit`, the most detections of an image, is for ONNX's operator, which replaces this function in export.py.
    """
    image, rank = (scores > 0).nonzero(as_tuple=True)
    candidates = scores[image, rank]
    # Boxes of different groups are moved apart. float64 keeps them to 2^-20 px, float32 would round to 0.1 px.
    groups = image * num_classes + labels[image, rank]
    apart = boxes[image, rank].double() + groups[:, None] * (MAX_SIDE_PX + 1)
    # torchvision declares to torch.export that nms keeps at least two boxes: two empty ones of the lowest score do.
    kept = nms(F.pad(apart, (0, 0, 0, 2)), F.pad(candidates.double(), (0, 2), value=-1), nms_iou)[:-2]
    return torch.zeros_like(scores).index_put((image[kept], rank[kept]), candidates[kept])


@torch.no_grad()
def postprocess(raw: Predictions, grid: PointGrid, sizes: Tensor, config, suppress=suppressed) -> tuple[Tensor, ...]:
    """Return boxes (B, D, 4) float32 px, scores (B, D) float32 and labels (B, D) int64, best first.

    Ties go to the lower index. Rows without a detection come last, with score 0, label -1 and a box of zeros. D is
    `max_detections` of the DetectorConfig, or K if `suppress` is None and candidates are returned. sizes (B, 2):
    height and width of every image, px, to which boxes are clipped. A NaN in a score or a box is no detection.
    """
    if sizes.device.type == "mps":  # has no float64: results are on the CPU
        raw, sizes = [tensor.cpu() for tensor in raw], sizes.cpu()
    logits, boxes, iou_logits = (tensor.float() for tensor in raw)
    num_classes = logits.shape[2]
    scores = (logits.sigmoid() * iou_logits.sigmoid()[..., None]).sqrt()
    usable = (sizes > 0).all(1)[:, None] & ~boxes.isnan().any(2)
    scores = torch.where(usable[..., None] & (scores > config.score_threshold), scores, 0)
    scores, places = best_places(scores, grid, config.topk_per_level)
    limits = sizes.flip(1).repeat(1, 2)[:, None].float()
    boxes, labels = rows_of(boxes, places // num_classes).clamp(min=0).minimum(limits), places % num_classes
    if suppress:
        scores = suppress(boxes, scores, labels, num_classes, config.nms_iou, config.max_detections)
        best = best_first(scores, min(config.max_detections, scores.shape[1]))
        boxes, scores, labels = rows_of(boxes, best), scores.gather(1, best), labels.gather(1, best)
    is_detection = scores > 0
    return torch.where(is_detection[..., None], boxes, 0), scores, torch.where(is_detection, labels, -1)


def unpad(boxes: Tensor, scores: Tensor, labels: Tensor, class_names: list[str]) -> list[Detections]:
    """Detections of each image, from the result of `postprocess`. Waits for the device."""
    rows = zip(boxes, scores, labels, (scores > 0).sum(1).tolist(), strict=True)
    return [Detections(b[:count], s[:count], label[:count], class_names) for b, s, label, count in rows]


def rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """table (B, n, d), rows (B, k) -> (B, k, d); torch.export takes the batch of take_along_dim for a constant."""
    return table.gather(1, rows[..., None].expand(-1, -1, table.shape[2]))


def best_first(scores: Tensor, k: int) -> Tensor:
    """Indices (B, k) of the k best of scores (B, n), best first; ties go to the lower index."""
    # topk does not order ties: the last bits of a float64 make the score at the lower of up to 2^27 indices larger.
    index = torch.arange(scores.shape[1], dtype=torch.float64, device=scores.device)
    return (scores.double() * (1 - index * 2**-51)).topk(k).indices


def best_places(scores: Tensor, grid: PointGrid, topk: int) -> tuple[Tensor, Tensor]:
    """Return the `topk` best scores (B, N, C) of each level, filled up with 0, and their places in (N, C), both (B, K),
    best first."""
    num_classes, best, places = scores.shape[2], [], []
    for start, end in pairwise(grid.level_offsets):
        level = F.pad(scores[:, start:end], (0, 0, 0, topk))
        point = best_first(level.amax(2), topk).sort(1).values  # other points have none of the `topk` best scores
        flat = rows_of(level, point).flatten(1)
        index = best_first(flat, topk)
        best.append(flat.gather(1, index))
        places.append((start + point.gather(1, index // num_classes)) * num_classes + index % num_classes)
    best, places = torch.cat(best, 1), torch.cat(places, 1).clamp(max=scores.shape[1] * num_classes - 1)
    order = best_first(best, best.shape[1])
    return best.gather(1, order), places.gather(1, order)
