"""Measure a training step beside torchvision's FCOS: images per second, memory, launches.

    python -m benchmarks.train_step [--case resnet50 resnet18] [--compile] [--out FILE] [--repeats N]

In bfloat16 on a GPU, where launches set the pace of resnet18; on a CPU small versions in float32. Reports no cost and
exits with status 1 when a loss or a gradient is 0 or not finite.

Equal: random weights of backbone and neck, frozen batch norms; a head of two towers of four convolutions; images, boxes
and labels, on the device before the step; precision, losses in float32; SGD with momentum. Not equal: torchvision
assigns by center sampling and size, learns centerness instead of the IoU, and normalises, pads and checks the boxes
image by image; this detector has a learned scale per level and channels-last weights and images.
"""

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.fcos import FCOS
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from benchmarks.measure import elapsed_ms, line, now, row_of, start, wait_for, write_report
from kernels import PointGrid
from model import Detector, DetectorConfig
from model.batch import pack
from tests.support.scenes import COCO_SIZES_PX, COCO_STRIDES, WORKLOADS, ragged_counts, random_boxes

CHANNELS, CLASSES, LR = 256, WORKLOADS["coco"].num_classes, 1e-6  # so slow that the labels stay those of a first step
MORE = "images_per_s tflop_per_s"
WARMUP_STEPS, LEAST_STEPS, ROW_S = 3, 5, 5.0


class Case(NamedTuple):
    backbone: str
    image_size: tuple[int, int]
    images: int


CASES = {
    "cuda": {"resnet50": Case("resnet50", (800, 1344), 16), "resnet18": Case("resnet18", (320, 320), 32)},
    "cpu": {"resnet50": Case("resnet50", (256, 320), 2), "resnet18": Case("resnet18", (160, 160), 4)},
}


def make_samples(case: Case) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """uint8 noise, with boxes like those of the workload coco scaled to the image size."""
    generator, coco = torch.Generator().manual_seed(0), WORKLOADS["coco"]
    grid = PointGrid.for_image(case.image_size, COCO_STRIDES)
    sizes_px = tuple(px * case.image_size[0] / coco.image_size[0] for px in COCO_SIZES_PX)
    counts = ragged_counts(case.images, round(sum(coco.counts) / len(coco.counts) * case.images))
    boxes = [random_boxes(grid, count, sizes_px, False, generator) for count in counts]
    labels = [torch.randint(CLASSES, (count,), generator=generator) for count in counts]
    images = [torch.randint(256, (3, *case.image_size), dtype=torch.uint8, generator=generator) for _ in counts]
    return images, [{"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True)]


def torchvision_fcos(backbone: str) -> FCOS:
    """fcos_resnet50_fpn, or the same on another ResNet, with all layers trained and without its resizing."""
    torch.manual_seed(0)
    layers = {"trainable_layers": 5, "returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(CHANNELS, CHANNELS)}
    return FCOS(resnet_fpn_backbone(backbone_name=backbone, weights=None, **layers), CLASSES, _skip_resize=True)


class Contestant:
    """A model in training. `forward() -> dict[str, Tensor]` returns the losses of its batch."""

    def __init__(self, model: nn.Module, forward: Callable, device: torch.device, compiled: bool) -> None:
        self.model, self.forward, self.device, self.compiled = model.to(device).train(), forward, device, compiled
        fused = device.type == "cuda"
        self.optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=1e-4, fused=fused)
        self.moments = {}  # of the latest step: its start and the ends of its phases
        if not compiled:
            model.head.register_forward_hook(lambda *_: self.moments.update(network=now(device)))

    def backward(self) -> dict[str, Tensor]:
        self.moments = {"start": now(self.device)}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device)):
            losses = self.forward()
        self.moments["forward" if self.compiled else "assignment and losses"] = now(self.device)
        sum(losses.values()).backward()
        self.moments["backward"] = now(self.device)
        return {name: value.detach() for name, value in losses.items()}

    def step(self) -> list[Tensor]:
        losses = self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.moments["optimizer"] = now(self.device)
        return list(losses.values())


def ours(case: Case, device: torch.device, compiled: bool) -> Contestant:
    """This detector; `compiled` compiles the step, and pads the batch for it, as train.py does."""
    weights = torchvision_fcos(case.backbone).backbone
    detector = Detector(DetectorConfig(CLASSES, case.backbone, channels=CHANNELS, frozen_norm=True))
    detector.backbone.body.load_state_dict(weights.body.state_dict())
    detector.backbone.neck.load_state_dict(weights.fpn.state_dict())
    batch = pack(*make_samples(case), tuple(sorted(case.image_size)) if compiled else ()).to(device)
    contestant = Contestant(detector, lambda: detector(batch)[0], device, compiled)
    if compiled:
        batch.mark_ragged()
        detector.compile_training("default")
    return contestant


def torchvision(case: Case, device: torch.device, compiled: bool, memory_format=torch.contiguous_format) -> Contestant:
    model = torchvision_fcos(case.backbone).to(memory_format=memory_format)
    samples, boxes_and_labels = make_samples(case)
    images = torch.stack(samples).to(device)
    targets = [{name: value.to(device) for name, value in target.items()} for target in boxes_and_labels]
    contestant = Contestant(model, lambda: model(list(images.float() / 255), targets), device, compiled)
    # Under autocast FCOS rounds anchors and boxes to bfloat16, to 8 px at the right border.
    model.head.register_forward_hook(lambda _, __, outputs: {name: v.float() for name, v in outputs.items()})
    model.anchor_generator.register_forward_pre_hook(
        lambda _, inputs: (inputs[0], [torch.empty((), device=f.device).expand(f.shape) for f in inputs[1]])
    )
    if compiled:
        model.backbone.compile(dynamic=False)
        model.head.compile(dynamic=False)
    return contestant


CONTESTANTS = {"ours": ours, "torchvision": torchvision}
CONTESTANTS["torchvision, channels last"] = partial(torchvision, memory_format=torch.channels_last)


def has_bf16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def check(contestant: Contestant) -> dict:
    """Facts of a first pass without an update; `failure` is why it learns nothing, None if it does."""
    with FlopCounterMode(display=False) as counter:
        losses = {name: value.item() for name, value in contestant.backward().items()}
    gradients = [p.grad for p in contestant.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    learns = all(0 < value < math.inf for value in (*losses.values(), norm))
    facts = {"parameters": sum(g.numel() for g in gradients), "losses": losses, "gradient_norm": norm}
    failure = None if learns else f"a loss or the gradient is 0 or not finite: {facts}"
    return facts | {"tflop": counter.get_total_flops() / 1e12, "failure": failure}


def measure_row(contestant: Contestant, images: int, tflop: float, repeats: int) -> dict:
    """The row of up to `repeats` steps, for some seconds."""
    device, steps = contestant.device, []
    for _ in range(WARMUP_STEPS):
        contestant.step()
    started = time.perf_counter()
    while len(steps) < repeats and (len(steps) < LEAST_STEPS or time.perf_counter() - started < ROW_S):
        contestant.step()
        steps.append(contestant.moments)
        if device.type == "cuda" and len(steps) > 1:
            steps[-2]["optimizer"].synchronize()  # as in train.py, the host is one step ahead at most
    wait_for(device)
    row = row_of([elapsed_ms(step["start"], step["optimizer"]) for step in steps], contestant.step, device)
    row |= {"images_per_s": images / row["ms_median"] * 1e3, "tflop_per_s": tflop / row["ms_median"] * 1e3}
    phases = pairwise(steps[0])
    return row | {"phase_ms": {b: median(elapsed_ms(step[a], step[b]) for step in steps) for a, b in phases}}


def attempt(name: str, case: Case, device: torch.device, compiled: bool, use: Callable[[Contestant], dict]) -> dict:
    """Use a contestant, the only one in memory. A compiler's failure or too little memory costs its row alone."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()  # recompilations of the previous contestants count towards a limit
    torch.backends.cudnn.benchmark = compiled  # as in train.py
    try:
        return use(CONTESTANTS[name](case, device, compiled))
    except Exception as error:
        if compiled or isinstance(error, torch.OutOfMemoryError):
            return {"skipped": f"{type(error).__name__}: {error}".partition("\n")[0][:200]}
        raise


def main(argv: list[str] | None = None) -> None:
    cases = CASES["cuda" if torch.cuda.is_available() else "cpu"]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs="+", choices=cases, default=list(cases))
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    args, device, about = start(parser, argv, repeats=50)
    torch.set_float32_matmul_precision("high")  # as train.py does
    reports = {name: {"about": cases[name]._asdict(), "sanity": {}, "rows": {}} for name in args.case}
    report = about | {"precision": "bfloat16" if has_bf16(device) else "float32", "cases": reports}
    for name, title in product(args.case, CONTESTANTS):
        reports[name]["sanity"][title] = facts = attempt(title, cases[name], device, False, check)
        print(f"{name}, {title}: {facts}")
        if facts.get("failure"):
            sys.exit(f"{name}, {title}: {facts['failure']}")

    print(f"\n{line('', None, MORE)}")
    for compiled, name, title in product((False, True)[: 1 + args.compile], args.case, CONTESTANTS):
        row, case = reports[name]["sanity"][title], cases[name]
        if "skipped" not in row:
            use = partial(measure_row, images=case.images, tflop=row["tflop"], repeats=args.repeats)
            row = attempt(title, case, device, compiled, use)
        reports[name]["rows"][title + ", compiled" * compiled] = row
        print(line(f"{name}: {title}" + ", compiled" * compiled, row, MORE), flush=True)
        write_report(args.out, report)


if __name__ == "__main__":
    main()
