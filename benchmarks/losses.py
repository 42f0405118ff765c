"""Focal loss, forward and backward, beside torchvision's: parity first, then time, memory and bytes moved.

    python -m benchmarks.losses [--out FILE] [--repeats N] [--threads N] [--images N]

16 images of 22,400 points and 80 classes, as of 800 x 1344 px, one point in a hundred matched. torchvision's loss takes
a target of the logits' size, which its users fill anew for every batch; that is counted, and so is the gradient in both
memories. Useful GB/s are the bytes of a loss that reads and writes no more than it has to, by the time taken; on a GPU
that of a captured CUDA graph, without the host's time for launches. Reports no cost, and ends with status 1, when a
gradient or a sum is not that of the float64 reference.
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

from benchmarks.calls import captured
from benchmarks.floor import measure_rates
from benchmarks.measure import MIB, Row, measure
from kernels import focal_loss
from kernels.assign import HAS_TRITON
from training.environment import environment

POINTS, CLASSES, GROUND_TRUTHS = 22_400, 80, 117
CLASS_PRIOR_LOGIT = -4.6  # 0.01, where training starts
RELATIVE_ERROR = 5e-6  # of the sum, and of the gradient relative to its largest entry in the image
GRAPH = "triton graph"
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
        exact = focal_loss(exact_logits, inputs.gt_index[b : b + 1], inputs.gt_labels, backend="torch")
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


def measure_rows(
    losses: dict[str, Callable[..., Tensor]], inputs: Inputs, repeats: int, device: torch.device
) -> dict[str, Row | str]:
    """A row for each loss, on a GPU another for the triton backend as a captured graph, or why there is none."""
    calls = {name: partial(forward_and_backward, loss, inputs) for name, loss in losses.items()}
    rows = {name: measure(call, repeats, device) for name, call in calls.items()}
    if device.type == "cuda" and "triton" in calls:
        replay = captured(calls["triton"])
        rows[GRAPH] = replay if isinstance(replay, str) else measure(replay, repeats, device, replay=True)
    return rows


def useful_gb_per_s(name: str, row: Row, inputs: Inputs, device: torch.device) -> float | None:
    """None where launches set the pace."""
    return PASSES * inputs.logits.nbytes / row.ms_median / 1e6 if device.type == "cpu" or name == GRAPH else None


def print_row(name: str, row: Row | str, first: Row, rate: float | None, copy_gb_per_s: float) -> None:
    if isinstance(row, str):
        print(f"{name:<14}{row}")
        return
    peak = ("-", "-") if row.peak_mib is None else (f"{row.peak_mib:.1f}", f"{row.peak_mib / first.peak_mib:.2f}")
    rates = ("-", "-") if rate is None else (f"{rate:.1f}", f"{rate / copy_gb_per_s:.1%}")
    syncs = "-" if row.host_syncs is None else row.host_syncs
    print(
        f"{name:<14}{row.ms_median:>10.3f}{row.ms_quantile_20:>10.3f}{row.ms_quantile_80:>10.3f}{peak[0]:>10}{syncs:>7}"
        f"{rates[0]:>12}{rates[1]:>9}{first.ms_median / row.ms_median:>9.2f}{peak[1]:>9}"
    )


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
        print(
            f"\n{args.images} x {POINTS:,} x {CLASSES} logits in {kind}, {inputs.logits.nbytes / MIB:.1f} MiB; "
            f"a copy moves {copy_gb_per_s:,.1f} GB/s\n{'':<14}{'ms median':>10}{'20 %':>10}{'80 %':>10}{'peak MiB':>10}"
            f"{'syncs':>7}{'useful GB/s':>12}{'of copy':>9}{'speed-up':>9}{'memory':>9}"
        )
        rows, results[kind] = measure_rows(losses, inputs, args.repeats, device), {}
        for name, row in rows.items():
            rate = None if isinstance(row, str) else useful_gb_per_s(name, row, inputs, device)
            print_row(name, row, rows["torchvision"], rate, copy_gb_per_s)
            found = {"skipped": row} if isinstance(row, str) else asdict(row) | {"useful_gb_per_s": rate}
            results[kind][name] = found
    if args.out:
        shape = {"images": args.images, "points": POINTS, "classes": CLASSES, "copy_gb_per_s": copy_gb_per_s}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(about | shape | {"results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
