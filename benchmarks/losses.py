"""Focal loss, forward and backward, beside torchvision's: parity first, then time, memory and bytes moved.

    python -m benchmarks.losses [--out FILE] [--repeats N] [--threads N] [--images N]

16 images of 22,400 points and 80 classes, as of 800 x 1344 px, one point in a hundred matched. torchvision's loss takes
a target of the logits' size, which its users fill anew for every batch; that is counted, and so is the gradient in both
memories. Reports no cost, and ends with status 1, when a gradient or a sum is not that of the float64 reference.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from benchmarks import environment
from benchmarks.floor import measure_rates
from benchmarks.measure import MIB, Row, measure
from kernels import focal_loss
from kernels.assign import HAS_TRITON

POINTS, CLASSES, GROUND_TRUTHS = 22_400, 80, 117
CLASS_PRIOR_LOGIT = -4.6  # 0.01, where training starts
RELATIVE_ERROR = 5e-6  # of the sum, and of the gradient relative to its largest entry in the image
PASSES = 3  # over the logits, at least: read for the loss, read and written for the gradient


class Inputs(NamedTuple):
    logits: Tensor  # (B, N, C)
    gt_index: Tensor  # (B, N)
    gt_labels: Tensor  # (G,)


def make_inputs(num_images: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_images, POINTS, CLASSES, generator=generator).mul_(1.5).add_(CLASS_PRIOR_LOGIT)
    row = torch.randint(0, GROUND_TRUTHS, (num_images, POINTS), generator=generator)
    gt_index = torch.where(torch.rand(num_images, POINTS, generator=generator) < 0.01, row, -1)
    gt_labels = torch.randint(0, CLASSES, (GROUND_TRUTHS,), generator=generator)
    return Inputs(logits.to(device, dtype).requires_grad_(), gt_index.to(device), gt_labels.to(device))


def torchvision_loss(logits: Tensor, gt_index: Tensor, gt_labels: Tensor) -> Tensor:
    """As torchvision's own RetinaNet and FCOS call it."""
    matched = gt_index >= 0
    targets = torch.zeros_like(logits)
    targets[matched, gt_labels[gt_index[matched]]] = 1.0
    return sigmoid_focal_loss(logits, targets, reduction="sum")


def losses_on(device: torch.device) -> dict[str, Callable[..., Tensor]]:
    losses = {"torchvision": torchvision_loss, "torch": partial(focal_loss, backend="torch")}
    if device.type == "cuda" and HAS_TRITON:
        losses["triton"] = partial(focal_loss, backend="triton")
    return losses


def broken_parity(loss: Callable[..., Tensor], inputs: Inputs) -> list[str]:
    """What differs from the float64 reference, image by image, in sentences."""
    value = loss(*inputs)
    (gradient,) = torch.autograd.grad(value, inputs.logits)
    rounding = torch.finfo(gradient.dtype).eps if gradient.dtype != torch.float32 else 0
    exact_value, wrong = 0.0, []
    for b, logits in enumerate(inputs.logits):
        exact_logits = logits.detach().double()[None].requires_grad_()
        exact = focal_loss(exact_logits, inputs.gt_index[b : b + 1], inputs.gt_labels, backend="reference")
        (exact_gradient,) = torch.autograd.grad(exact, exact_logits)
        exact_value += exact.item()
        error = ((gradient[b] - exact_gradient[0]).abs().max() / exact_gradient.abs().max()).item()
        if not error <= RELATIVE_ERROR + rounding:
            wrong.append(f"the gradient of image {b} is off by {error:.1e} of its largest entry")
    if not abs(value.item() - exact_value) <= RELATIVE_ERROR * exact_value:
        wrong.append(f"the sum is {value.item()} instead of {exact_value}")
    return wrong


def forward_and_backward(loss: Callable[..., Tensor], inputs: Inputs) -> tuple[()]:
    """Returns nothing, so that the gradient counts as memory of the call."""
    torch.autograd.grad(loss(*inputs), inputs.logits)
    return ()


def print_row(name: str, row: Row, first: Row, moved: int, copy_gb_per_s: float) -> float:
    """A line, and GB/s: the bytes of one loss that reads and writes no more than it has to, by the time taken."""
    rate = moved / row.ms_median / 1e6
    syncs = "-" if row.host_syncs is None else row.host_syncs
    print(
        f"{name:<12}{row.ms_median:>10.3f}{row.ms_quantile_20:>10.3f}{row.ms_quantile_80:>10.3f}{row.peak_mib:>10.1f}"
        f"{syncs:>7}{rate:>9.1f}{rate / copy_gb_per_s:>9.1%}"
        f"{first.ms_median / row.ms_median:>9.2f}{row.peak_mib / first.peak_mib:>9.2f}"
    )
    return rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="write what was measured, and on what, as JSON")
    parser.add_argument("--repeats", type=int, default=20, help="calls per row")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--images", type=int, default=16)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sys.stdout.reconfigure(line_buffering=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about, losses = environment(device), losses_on(device)
    print(f"{about['device']}, threads {about['threads']}, torch {about['torch']}, triton {about['triton']}")

    dtypes = {"float32": torch.float32} | ({"bfloat16": torch.bfloat16} if device.type == "cuda" else {})
    failures = []
    for kind, dtype in dtypes.items():
        inputs = make_inputs(args.images, dtype, device)
        for name, loss in losses.items():
            if name == "torchvision" and dtype != torch.float32:
                continue  # it computes in the type of the logits
            wrong = broken_parity(loss, inputs)
            failures += [f"{name}, {kind}: {text}" for text in wrong]
            print(f"parity of {name} with the float64 reference, {kind}: {'BROKEN' if wrong else 'holds'}")
    if failures:
        print("\n".join(failures), file=sys.stderr)
        return 1

    copy_gb_per_s, results = measure_rates(device).copy_gb_per_s, {}
    for kind, dtype in dtypes.items():
        inputs = make_inputs(args.images, dtype, device)
        moved = PASSES * inputs.logits.nbytes
        print(
            f"\n{args.images} x {POINTS:,} x {CLASSES} logits in {kind}, {inputs.logits.nbytes / MIB:.1f} MiB; "
            f"a copy moves {copy_gb_per_s:,.1f} GB/s\n{'':<12}{'ms median':>10}{'20 %':>10}{'80 %':>10}{'peak MiB':>10}"
            f"{'syncs':>7}{'GB/s':>9}{'of copy':>9}{'speed-up':>9}{'memory':>9}"
        )
        rows = {name: measure(partial(forward_and_backward, loss, inputs), args.repeats, device)
                for name, loss in losses.items()}  # fmt: skip
        results[kind] = {
            name: asdict(row) | {"gb_per_s": print_row(name, row, rows["torchvision"], moved, copy_gb_per_s)}
            for name, row in rows.items()
        }
    if args.out:
        shape = {"images": args.images, "points": POINTS, "classes": CLASSES, "copy_gb_per_s": copy_gb_per_s}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about | shape | {"results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
