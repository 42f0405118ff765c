"""Measure the assignment strategies on one image, beside torchvision's matching of its FCOS and RetinaNet.

    python -m benchmarks.strategies [--out FILE] [--repeats N] [--boxes N ...]

800 x 1344 px, 22,400 points, 80 classes; some of the boxes overlap. torchvision's code is called as its detectors call
it, up to the index of the matched box of every point.
"""

import argparse
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection._utils import Matcher

from benchmarks.measure import line, measure, start, write_report
from kernels import OTAConfig, PointGrid
from model.assigners import STRATEGIES, assign
from tests.support.scenes import COCO_SIZES_PX, COCO_STRIDES, Scene, make_scene

GRID = PointGrid.for_image((800, 1344), COCO_STRIDES)
CENTER_RADIUS, IOUS = 1.5, (0.5, 0.4)  # torchvision's defaults


def torchvision_calls(scene: Scene) -> dict[str, Callable[[], list[Tensor]]]:
    """The part of each detector's loss that matches, as a call: its head only returns what it gets."""
    points, half = GRID.points(scene.boxes.device), GRID.point_strides(scene.boxes.device)[:, None] / 2
    targets = [{"boxes": scene.gt_boxes, "labels": scene.gt_labels}]
    head = SimpleNamespace(compute_loss=lambda targets, outputs, anchors, matched: matched)
    fcos = SimpleNamespace(center_sampling_radius=CENTER_RADIUS, head=head)
    retinanet = SimpleNamespace(proposal_matcher=Matcher(*IOUS, allow_low_quality_matches=True), head=head)
    cells, anchors = (torch.cat([points - r, points + r], 1) for r in (half, 8 * half))
    levels = [rows * columns for rows, columns in GRID.sizes]
    return {
        "torchvision's FCOS": partial(FCOS.compute_loss, fcos, targets, {}, [cells], levels),
        "torchvision's RetinaNet": partial(RetinaNet.compute_loss, retinanet, targets, {}, [anchors]),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, nargs="+", default=[7, 20, 100, 400], metavar="N")
    args, device, about = start(parser, argv, repeats=20)
    results = {}
    for count in args.boxes:
        scene = make_scene(GRID, (count,), num_classes=80, seed=count, size_px=COCO_SIZES_PX).to(device)
        calls = {name: partial(assign, name, scene, OTAConfig()) for name in STRATEGIES} | torchvision_calls(scene)
        print(f"\n{line(f'{count} boxes')}")
        rows = results[f"{count} boxes"] = {}
        for name, call in calls.items():
            rows[name] = measure(call, args.repeats, device)
            print(line(name, rows[name]), flush=True)
            write_report(args.out, about | {"points": GRID.num_points, "classes": 80, "results": results})


if __name__ == "__main__":
    main()
