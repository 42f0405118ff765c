"""Measure the focal loss, forward and backward, beside torchvision's: parity first, then time, memory and GB/s.

    python -m benchmarks.losses [--out FILE] [--repeats N] [--images N]

16 images of 22,400 points (800 x 1344 px) and 80 classes, one point in a hundred matched. torchvision's loss takes a
one-hot target, filled anew for every batch; that is counted, and so is the gradient in both memories. Useful GB/s: the
logits read for the loss, read and written for its gradient. Reports no cost and exits with status 1 when a sum or a
gradient differs from the float64 reference.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from benchmarks.measure import MIB, line, measure, start, write_report
from kernels import focal_loss
from kernels.assign import HAS_TRITON

POINTS, CLASSES, GROUND_TRUTHS = 22_400, 80, 117
CLASS_PRIOR_LOGIT = -4.6  # 0.01, where training starts
RELATIVE_ERROR = 5e-6  # of the sum, and of the gradient relative to its largest entry
PASSES = 3  # over the logits
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16")}


def make_inputs(num_images: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, N, C), gt_index (B, N) and gt_labels (G,)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_images, POINTS, CLASSES, generator=generator).mul_(1.5).add_(CLASS_PRIOR_LOGIT)
    row = torch.randint(0, GROUND_TRUTHS, (num_images, POINTS), generator=generator)
    gt_index = torch.where(torch.rand(num_images, POINTS, generator=generator) < 0.01, row, -1)
    gt_labels = torch.randint(0, CLASSES, (GROUND_TRUTHS,), generator=generator)
    return logits.to(device, dtype).requires_grad_(), gt_index.to(device), gt_labels.to(device)


def torchvision_loss(logits: Tensor, gt_index: Tensor, gt_labels: Tensor) -> Tensor:
    """The sum as torchvision's RetinaNet and FCOS compute it, in the type of the logits."""
    matched, targets = gt_index >= 0, torch.zeros_like(logits)
    targets[matched, gt_labels[gt_index[matched]]] = 1.0
    return sigmoid_focal_loss(logits, targets, reduction="sum")


def parity_failures(loss: Callable[..., Tensor], logits: Tensor, *matches: Tensor) -> list[str]:
    exact_logits = logits.detach().double().requires_grad_()
    value, exact_value = loss(logits, *matches), torchvision_loss(exact_logits, *matches)
    (gradient,), (exact,) = torch.autograd.grad(value, logits), torch.autograd.grad(exact_value, exact_logits)
    error = float((gradient - exact).abs().max() / exact.abs().max())
    rounding = torch.finfo(gradient.dtype).eps if gradient.dtype != torch.float32 else 0
    texts = {
        f"the gradient is off by {error:.1e} of its largest entry": error <= RELATIVE_ERROR + rounding,
        f"the sum is {value} instead of {exact_value}": abs(value - exact_value) <= RELATIVE_ERROR * exact_value,
    }
    return [text for text, holds in texts.items() if not holds]


def forward_and_backward(loss: Callable[..., Tensor], logits: Tensor, *matches: Tensor) -> tuple[()]:
    """Return nothing, so that the gradient counts as memory of the call."""
    torch.autograd.grad(loss(logits, *matches), logits)
    return ()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=16)
    args, device, about = start(parser, argv, repeats=20)
    losses = {"torchvision": torchvision_loss, "torch": partial(focal_loss, backend="torch")}
    if device.type == "cuda" and HAS_TRITON:
        losses["triton"] = partial(focal_loss, backend="triton")
    inputs = {dtype: make_inputs(args.images, getattr(torch, dtype), device) for dtype in DTYPES[device.type]}
    failures = []
    for dtype, name in product(inputs, losses):
        if (name, dtype) != ("torchvision", "bfloat16"):  # torchvision computes in the type of the logits
            failures += [f"{name}, {dtype}: {text}" for text in parity_failures(losses[name], *inputs[dtype])]
    if failures:
        sys.exit("\n".join(failures))
    results = {dtype: {} for dtype in inputs}
    report = about | {"images": args.images, "points": POINTS, "classes": CLASSES, "results": results}
    for dtype, tensors in inputs.items():
        size = tensors[0].nbytes
        print(f"\n{args.images} x {POINTS:,} x {CLASSES} logits in {dtype}, {size / MIB:.1f} MiB; parity holds")
        print(line("", None, "useful_gb_per_s"))
        for name, loss in losses.items():
            row = measure(partial(forward_and_backward, loss, *tensors), args.repeats, device)
            row["useful_gb_per_s"] = PASSES * size / (row["device_ms"] or row["ms_median"]) / 1e6
            results[dtype][name] = row
            print(line(name, row, "useful_gb_per_s"), flush=True)
            write_report(args.out, report)


if __name__ == "__main__":
    main()
