"""The detector as one graph of tensors, for torch.export and ONNX: no lists, no waiting for the device, fixed results.

What `Detector.detect` finds, in px of the padded batch: its candidates, best first, or, with NMS, its detections.
B images, N points over all levels, C classes, K candidates of an image, D detections of an image at most.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from kernels import PointGrid
from kernels.grid import MAX_SIDE_PX

from .detector import Detector
from .postprocess import move_apart


class ExportedDetector(nn.Module):
    """forward(images, sizes) -> boxes, scores, labels

    images   (B, 3, H, W) uint8 RGB, H and W multiples of 32 px, each image in the upper left corner of its slot
    sizes    (B, 2) int64: height and width of every image, px, at most those of its slot; what lies outside is not
             looked at, and an image without pixels has no detection
    boxes    (B, K, 4) float32 x1 y1 x2 y2 px, clipped to the image
    scores   (B, K) float32, best first; 0 marks a row that is no detection, whose box is 0 and whose label is -1
    labels   (B, K) int64, class 0..C-1

    Without NMS K is the number of levels times `topk_per_level`, with it `max_detections`. `suppress` is the function
    that carries out NMS, see `suppressed`; None leaves it out.
    """

    def __init__(self, detector: Detector, suppress: Callable[..., Tensor] | None = None):
        """Changes the detector's memory format: with channels last, strides of H and W would be compared."""
        super().__init__()
        detector.use_memory_format(torch.contiguous_format)
        self.detector, self.suppress = detector, suppress

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.detector.config
        height, width = images.shape[-2:]
        sizes = torch.stack([sizes[:, 0].clamp(0, height), sizes[:, 1].clamp(0, width)], 1)
        predictions, grid = self.detector.predict_raw(self.detector.normalise(images, sizes))
        scores = (predictions.logits.sigmoid() * predictions.iou_logits.sigmoid()[..., None]).sqrt()
        has_pixels = (sizes > 0).all(1)[:, None, None]
        scores = torch.where(has_pixels & (scores > config.score_threshold), scores, 0)
        scores, places = best_places(scores, grid, config.topk_per_level)
        labels = places % config.num_classes
        limits = sizes.flip(1).repeat(1, 2)[:, None].float()
        boxes = rows_of(predictions.boxes, places // config.num_classes).clamp(min=0).minimum(limits)
        if self.suppress:
            scores = self.suppress(boxes, scores, labels, config.num_classes, config.nms_iou, config.max_detections)
            scores, best = (x[:, : config.max_detections] for x in scores.sort(dim=1, descending=True, stable=True))
            boxes, labels = rows_of(boxes, best), labels.gather(1, best)
        found = scores > 0
        return boxes * found[..., None], scores, torch.where(found, labels, -1)


def rows_of(table: Tensor, rows: Tensor) -> Tensor:
    """table (B, n, d), rows (B, k) -> (B, k, d)"""
    return table.gather(1, rows[..., None].expand(-1, -1, table.shape[2]))


def best_places(scores: Tensor, grid: PointGrid, topk: int) -> tuple[Tensor, Tensor]:
    """Scores (B, N, C) -> scores and places in (N, C), both (B, L * topk): the `topk` best of every level, best first.

    Of equal scores the first in place comes first. A level with fewer of them is filled up with score 0.
    """
    num_classes, best, places = scores.shape[2], [], []
    counts = [rows * columns for rows, columns in grid.sizes]
    for start, level in zip(grid.level_offsets, scores.split(counts, 1), strict=False):
        flat = F.pad(level.flatten(1), (0, topk))
        place = flat.topk(topk).indices.sort(1).values
        best.append(flat.gather(1, place))
        places.append((place + start * num_classes).clamp(max=scores.shape[1] * num_classes - 1))
    best, order = torch.cat(best, 1).sort(dim=1, descending=True, stable=True)
    return best, torch.cat(places, 1).gather(1, order)


def suppressed(
    boxes: Tensor, scores: Tensor, labels: Tensor, num_classes: int, nms_iou: float, max_detections: int
) -> Tensor:
    """Scores (B, K), 0 where greedy NMS among the boxes (B, K, 4) of an image's class takes a candidate out."""
    image, rank = (scores > 0).nonzero(as_tuple=True)
    candidates, own = boxes[image, rank], scores[image, rank]
    extent_px = boxes.new_tensor(MAX_SIDE_PX)  # boxes.max() would need an image
    apart = move_apart(candidates, image * num_classes + labels[image, rank], extent_px)
    # torchvision tells torch.export that nms keeps two boxes at least: two without area, worse than all others, do.
    kept = nms(F.pad(apart, (0, 0, 0, 2)), F.pad(own.double(), (0, 2), value=-1), nms_iou)[:-2]
    return torch.zeros_like(scores).index_put((image[kept], rank[kept]), own[kept])
