"""Post-processing of a batch: the detections of the image-by-image loop first, then what both cost.

    python -m benchmarks.postprocess [--out FILE] [--repeats N] [--threads N]

Predictions of 800 x 1344 px with 50, 300 or 2,000 scores above the threshold in an image, several for an object, and
those of an untrained network, all of whose scores are above it. Reports no cost, and ends with status 1, when the
detections differ.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from benchmarks.measure import measure
from kernels import PointGrid
from model.head import CLASS_PRIOR, Predictions
from model.postprocess import postprocess
from training.environment import environment

IMAGE_SIZE = (800, 1344)
IMAGES, CLASSES, CANDIDATES = (8, 16), (80, 1), (50, 300, 2000, None)
SETTINGS = {"score_threshold": 0.05, "topk_per_level": 1000, "nms_iou": 0.6, "max_detections": 100}
CANDIDATES_PER_OBJECT = 12
SCORE_TOLERANCE = 1e-6  # on a CPU the last bit of a sigmoid depends on the place in its tensor


def postprocess_one_by_one(
    predictions: Predictions,
    grid: PointGrid,
    image_sizes: list[tuple[int, int]],
    score_threshold: float,
    topk_per_level: int,
    nms_iou: float,
    max_detections: int,
) -> list[dict[str, Tensor]]:
    """What `postprocess` does, written as a loop over images and levels; float32 predictions."""
    scores = (predictions.logits.sigmoid() * predictions.iou_logits.sigmoid()[..., None]).sqrt()
    num_classes = scores.shape[-1]
    detections = []
    for image_scores, image_boxes, size in zip(scores, predictions.boxes, image_sizes, strict=True):
        kept = []
        for start, end in zip(grid.level_offsets, grid.level_offsets[1:], strict=False):
            flat = image_scores[start:end].flatten()
            above = (flat > score_threshold).nonzero()[:, 0]
            best = flat[above].sort(stable=True, descending=True).indices[:topk_per_level]
            kept.append(above[best] + start * num_classes)
        kept = torch.cat(kept)
        kept_scores, labels = image_scores.flatten()[kept], kept % num_classes
        boxes = clip_boxes_to_image(image_boxes[kept // num_classes], size)
        # batched_nms may move classes apart by 100,000 px, where float32 leaves no more than 1/128 px
        best = batched_nms(boxes.double(), kept_scores.double(), labels, nms_iou)[:max_detections]
        detections.append({"boxes": boxes[best], "scores": kept_scores[best], "labels": labels[best]})
    return detections


def make_predictions(
    grid: PointGrid, images: int, classes: int, candidates: int | None, generator: torch.Generator
) -> Predictions:
    """About `candidates` scores above 0.05 in an image, around a twelfth as many objects; None: untrained."""
    rows, columns = grid.sizes[0]
    extent = torch.tensor([columns, rows]) * float(grid.strides[0])
    shape = (images, grid.num_points)
    background = -math.log(1 / CLASS_PRIOR - 1) if candidates is None else -12.0
    logits = background + torch.randn(*shape, classes, generator=generator)
    half = 3 * grid.point_strides()[:, None] * (0.3 * torch.randn(*shape, 2, generator=generator)).exp()
    boxes = torch.cat([grid.points() - half, grid.points() + half], -1)
    for image_logits, image_boxes in zip(logits, boxes, strict=True):
        if candidates is None:
            continue
        objects = -(-candidates // CANDIDATES_PER_OBJECT)
        center = torch.rand(objects, 2, generator=generator) * extent
        size = 20 + 200 * torch.rand(objects, 2, generator=generator)
        label = torch.randint(classes, (objects,), generator=generator)
        point = torch.randperm(grid.num_points, generator=generator)[:candidates]
        of = torch.randint(objects, (candidates,), generator=generator)
        center = center[of] + 0.08 * size[of] * torch.randn(candidates, 2, generator=generator)
        half = size[of] / 2 * (0.08 * torch.randn(candidates, 2, generator=generator)).exp()
        image_boxes[point] = torch.cat([center - half, center + half], 1)
        image_logits[point, label[of]] = -1 + 1.5 * torch.randn(candidates, generator=generator)
    return Predictions(logits, boxes, torch.randn(shape, generator=generator))


def same_detections(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    """Boxes, labels and order are equal, scores but for their last bit."""
    return len(one) == len(other) and all(
        torch.equal(a["boxes"], b["boxes"])
        and torch.equal(a["labels"], b["labels"])
        and torch.allclose(a["scores"], b["scores"], rtol=SCORE_TOLERANCE, atol=0)
        for a, b in zip(one, other, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    grid = PointGrid.for_image(IMAGE_SIZE)
    generator = torch.Generator().manual_seed(0)

    rows = []
    print(f"{'':36}{'one by one':>30}  {'batched':>30}")
    costs = f"{'ms':>8}{'MiB':>7}{'kernels':>9}{'syncs':>6}"
    print(f"{'images  classes  above  detections':36}{costs}  {costs}")
    for classes, images, candidates in product(CLASSES, IMAGES, CANDIDATES):
        predictions = make_predictions(grid, images, classes, candidates, generator)
        predictions = Predictions(*(tensor.to(device) for tensor in predictions))
        calls = {
            function.__name__: partial(function, predictions, grid, [IMAGE_SIZE] * images, **SETTINGS)
            for function in (postprocess_one_by_one, postprocess)
        }
        found, expected = calls["postprocess"](), calls["postprocess_one_by_one"]()
        if not same_detections(found, expected):
            sys.exit(
                f"{images} images, {classes} classes, {candidates} candidates: detections differ, so no cost is told"
            )
        detections = sum(len(d["scores"]) for d in found) / images
        cost = {name: measure(partial(tensors, call), args.repeats, device) for name, call in calls.items()}
        about = {"images": images, "classes": classes, "above_threshold": candidates, "detections": detections}
        rows.append(about | {name: asdict(row) for name, row in cost.items()})
        print(f"{images:6d}{classes:9d}{candidates or 'all':>7}{detections:12.1f}  ", end="")
        for row in cost.values():
            gpu = [str(x) if x is not None else "-" for x in (row.kernel_launches, row.host_syncs)]
            print(f"{row.ms_median:8.2f}{row.peak_mib:7.1f}{gpu[0]:>9}{gpu[1]:>6}", end="  ")
        print(flush=True)
    if args.out:
        about = environment(device) | {"image_size_px": IMAGE_SIZE, "points": grid.num_points} | SETTINGS
        args.out.write_text(json.dumps(about | {"repeats": args.repeats, "loads": rows}, indent=1) + "\n")


def tensors(call: Callable[[], list[dict[str, Tensor]]]) -> list[Tensor]:
    return [tensor for detection in call() for tensor in detection.values()]


if __name__ == "__main__":
    main()
