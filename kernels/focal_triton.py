"""Sigmoid focal loss in Triton, straight from the matched rows: the sum in one kernel, its gradient in another.

For a class with logit z (alpha 1/4, gamma 2), with p = sigmoid(s), q = sigmoid(-s):

    s = z, w = 3/4   or, for the target's class,   s = -z, w = 1/4
    loss = w p^2 softplus(s)      d loss / d s = w p (p^2 + 2 p q softplus(s))

A program owns a block of the B N points and walks their C classes. Each logit is read once, and only the inputs are
kept for the gradient. Every program writes its own partial sum, so the order of addition is fixed. Where nothing is
loaded s is -inf, which adds exactly 0 to both.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import FOCAL_ALPHA, NAMESPACE

_ALPHA = tl.constexpr(FOCAL_ALPHA)
_SHIFT = tl.constexpr(1.5 * 2**17)  # adding it rounds a float32 to a multiple of 1/64
_LOG_2, _LOG_2_REST = tl.constexpr(355 / 512), tl.constexpr(math.log(2) - 355 / 512)
_TILE = 1024  # logits that a program handles at once
_VARYING = ["num_points", "G"]  # change from batch to batch: Triton must not recompile for 1 or multiples of 16
_INPUTS = "Tensor logits, Tensor gt_index, Tensor gt_labels, Tensor? ignored"


@triton.jit
def _exp(x):
    """exp(x) of x <= 0, to the last digit: 2^t exp(r), where t has so few digits that t * _LOG_2 is exact.

    tl.exp is 2^(x log2 e) on a GPU; rounding the product is a relative error of |x| 2^-25, too much for p^3.
    """
    x = tl.where(x < -120.0, -120.0, x)  # below, 2^t is 0; -inf would give NaN
    t = (x * 1.4426950408889634 + _SHIFT) - _SHIFT
    r = (x - t * _LOG_2) - t * _LOG_2_REST  # less than 0.006
    e = tl.exp2(t)
    return e + e * (r * (1.0 + 0.5 * r))


@triton.jit
def sigmoid_softplus(s):
    """sigmoid(s), sigmoid(s) sigmoid(-s) and softplus(s) from one exponential and one logarithm."""
    e = _exp(-tl.abs(s))
    total = 1.0 + e
    inverse = 1.0 / total
    log1p = tl.log(total) + (e - (total - 1.0)) * inverse  # adds what rounding took from 1 + e
    p = tl.where(s >= 0.0, inverse, e * inverse)
    return p, e * inverse * inverse, tl.maximum(s, 0.0) + log1p


@triton.jit
def _targets(gt_index, gt_labels, ignored, num_points, G, POINTS: tl.constexpr):
    """This program's first point, whether its points exist and take part, and their classes (-1 for none)."""
    first = tl.program_id(0).to(tl.int64) * POINTS
    point = first + tl.arange(0, POINTS)
    exists = point < num_points
    gt = tl.load(gt_index + point, mask=exists, other=-1)
    matched = (gt >= 0) & (gt < G)
    takes_part = exists
    if ignored is not None:
        takes_part = exists & (matched | (tl.load(ignored + point, mask=exists, other=0) == 0))
    return first, exists[:, None], takes_part[:, None], tl.load(gt_labels + gt, mask=matched, other=-1)[:, None]


@triton.jit
def _tile_terms(logits, first_class, takes_part, label, C, POINTS: tl.constexpr, CLASSES: tl.constexpr):
    """Offsets in (points, C), whether the classes exist, which are targets, and the weight and terms of a tile."""
    c = first_class + tl.arange(0, CLASSES)[None, :]
    offset = tl.arange(0, POINTS)[:, None] * C + c
    mask = takes_part & (c < C)
    is_target = label == c
    z = tl.load(logits + offset, mask=mask, other=float("-inf")).to(tl.float32)
    p, pq, softplus = sigmoid_softplus(tl.where(is_target & mask, -z, z))
    return offset, c < C, is_target, tl.where(is_target, _ALPHA, 1.0 - _ALPHA), p, pq, softplus


@triton.jit(do_not_specialize=_VARYING)
def _focal_loss_kernel(partial, inputs, num_points, G, C, POINTS: tl.constexpr, CLASSES: tl.constexpr):
    logits, gt_index, gt_labels, ignored = inputs
    first, exists, takes_part, label = _targets(gt_index, gt_labels, ignored, num_points, G, POINTS)
    logits += first * C
    total = tl.zeros([POINTS, CLASSES], tl.float32)
    for c in range(0, C, CLASSES):
        _, _, _, weight, p, _, softplus = _tile_terms(logits, c, takes_part, label, C, POINTS, CLASSES)
        total += weight * (p * p * softplus)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=_VARYING)
def _focal_gradient_kernel(gradient, upstream, inputs, num_points, G, C, POINTS: tl.constexpr, CLASSES: tl.constexpr):
    logits, gt_index, gt_labels, ignored = inputs
    first, exists, takes_part, label = _targets(gt_index, gt_labels, ignored, num_points, G, POINTS)
    logits += first * C
    gradient += first * C
    scale = tl.load(upstream)
    for c in range(0, C, CLASSES):
        offset, is_class, is_target, weight, p, pq, softplus = _tile_terms(
            logits, c, takes_part, label, C, POINTS, CLASSES
        )
        slope = scale * weight * (p * (p * p + 2.0 * pq * softplus))
        slope = tl.where(is_target, -slope, slope).to(gradient.dtype.element_ty)
        tl.store(gradient + offset, slope, mask=exists & is_class)


def _launch(logits: Tensor, num_rows: int) -> tuple[tuple[int], tuple[int, int, int, int, int]]:
    """Grid of programs, then numbers of points, rows and classes, and points and classes of a tile."""
    num_points, num_classes = logits.shape[:2].numel(), logits.shape[2]
    widths = [2**n for n in range(8) if 2**n < 2 * num_classes and 2**n >= min(16, num_classes)]
    # The widest range of classes that wastes the fewest lanes on classes that do not exist.
    classes = min(reversed(widths), key=lambda width: -(-num_classes // width) * width)
    points = _TILE // classes
    return (triton.cdiv(num_points, points),), (num_points, num_rows, num_classes, points, classes)


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def keep_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@torch.library.custom_op(f"{NAMESPACE}::focal_sum", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def focal_sum(logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None) -> Tensor:
    """The contract of `focal_loss`, on a GPU, or on a CPU in Triton's interpreter."""
    if logits.numel() == 0:
        return logits.new_zeros((), dtype=torch.float32)
    programs, sizes = _launch(logits, len(gt_labels))
    partial = logits.new_empty(programs, dtype=torch.float32)
    with torch.cuda.device_of(logits):
        _focal_loss_kernel[programs](partial, contiguous(logits, gt_index, gt_labels, ignored), *sizes)
    return partial.sum()


@torch.library.custom_op(
    f"{NAMESPACE}::focal_gradient", mutates_args=(), schema=f"(Tensor upstream, {_INPUTS}) -> Tensor"
)
def focal_gradient(upstream: Tensor, *inputs: Tensor | None) -> Tensor:
    logits, _, gt_labels, _ = inputs
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if logits.numel() > 0:
        programs, sizes = _launch(logits, len(gt_labels))
        with torch.cuda.device_of(logits):
            _focal_gradient_kernel[programs](gradient, upstream, contiguous(*inputs), *sizes)
    return gradient


def _backward(ctx, upstream: Tensor):
    return focal_gradient(upstream, *ctx.saved_tensors), None, None, None


focal_sum.register_fake(lambda logits, *_: logits.new_empty((), dtype=torch.float32))
focal_gradient.register_fake(lambda _, x, *__: torch.empty_like(x, memory_format=torch.contiguous_format))
focal_sum.register_autograd(_backward, setup_context=keep_inputs)
