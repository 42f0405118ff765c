"""Sigmoid focal loss in Triton, straight from the matched rows: the sum in one kernel, its gradient in another.

Of a class with logit z (alpha 1/4, gamma 2), with p = sigmoid(s), q = sigmoid(-s):

    s = z, w = 3/4   or, for the target's class,   s = -z, w = 1/4
    loss = w p^2 softplus(s)      d loss / d s = w p (p^2 + 2 p q softplus(s))

A program owns a block of the B N points and walks their C classes; each logit is read once, nothing is kept for the
gradient but the inputs. Every program has a partial sum of its own, so the order of addition is always the same. Where
nothing is loaded s is -inf, which adds exactly 0 to both.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import FOCAL_ALPHA

_ALPHA = tl.constexpr(FOCAL_ALPHA)
_SHIFT = tl.constexpr(1.5 * 2**17)  # float32 keeps multiples of 1/64 when this has been added
_LOG_2, _LOG_2_REST = tl.constexpr(355 / 512), tl.constexpr(math.log(2) - 355 / 512)
_TILE = 1024  # logits that a program looks at together
_WARPS = 4
# Numbers that change from batch to batch: no kernel is compiled anew because one of them is 1 or a multiple of 16.
_VARYING = ["num_points", "G"]


@triton.jit
def _exp(x):
    """exp(x) of x <= 0, to the last digit: 2^t exp(r), where t is so short that t * _LOG_2 is exact.

    tl.exp is 2^(x log2 e) on a GPU, and what rounds the product is |x| 2^-25 of the result: too much for p^3.
    """
    x = tl.where(x < -120.0, -120.0, x)  # 2^t is 0 from there on, and -inf would leave NaN
    t = (x * 1.4426950408889634 + _SHIFT) - _SHIFT
    r = (x - t * _LOG_2) - t * _LOG_2_REST  # less than 0.006
    e = tl.exp2(t)
    return e + e * (r * (1.0 + 0.5 * r))


@triton.jit
def sigmoid_softplus(s):
    """sigmoid(s), sigmoid(s) sigmoid(-s) and softplus(s), all from one exponential and one logarithm."""
    e = _exp(-tl.abs(s))
    total = 1.0 + e
    inverse = 1.0 / total
    log1p = tl.log(total) + (e - (total - 1.0)) * inverse  # what rounding took from 1 + e, added again
    p = tl.where(s >= 0.0, inverse, e * inverse)
    return p, e * inverse * inverse, tl.maximum(s, 0.0) + log1p


@triton.jit
def _points(table, num_points, C, POINTS: tl.constexpr):
    """This program's points, whether they exist, and where they begin in a table (points, C)."""
    first = tl.program_id(0).to(tl.int64) * POINTS
    point = first + tl.arange(0, POINTS)
    return point, point < num_points, table + first * C


@triton.jit
def _target_class(gt_index, gt_labels, ignored, point, here, G):
    """Class that each point should have, -1 for none, and whether it takes part."""
    gt = tl.load(gt_index + point, mask=here, other=-1)
    matched = (gt >= 0) & (gt < G)
    takes_part = here
    if ignored is not None:
        takes_part = here & (matched | (tl.load(ignored + point, mask=here, other=0) == 0))
    return tl.load(gt_labels + gt, mask=matched, other=-1), takes_part


@triton.jit
def _tile_terms(logits, offset, mask, is_target):
    """Weight and terms of a tile of logits."""
    z = tl.load(logits + offset, mask=mask, other=float("-inf")).to(tl.float32)
    p, pq, softplus = sigmoid_softplus(tl.where(is_target & mask, -z, z))
    return tl.where(is_target, _ALPHA, 1.0 - _ALPHA), p, pq, softplus


@triton.jit(do_not_specialize=_VARYING)
def _focal_loss_kernel(
    partial, logits, gt_index, gt_labels, ignored, num_points, G, C, POINTS: tl.constexpr, CLASSES: tl.constexpr
):
    point, here, logits = _points(logits, num_points, C, POINTS)
    label, takes_part = _target_class(gt_index, gt_labels, ignored, point, here, G)
    total = tl.zeros([POINTS, CLASSES], tl.float32)
    for first in range(0, C, CLASSES):
        c = first + tl.arange(0, CLASSES)
        mask = takes_part[:, None] & (c < C)[None, :]
        offset = tl.arange(0, POINTS)[:, None] * C + c[None, :]
        weight, p, _, softplus = _tile_terms(logits, offset, mask, label[:, None] == c[None, :])
        total += weight * (p * p * softplus)
    tl.store(partial + tl.program_id(0), tl.sum(tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=_VARYING)
def _focal_gradient_kernel(
    gradient, logits, upstream, gt_index, gt_labels, ignored, num_points, G, C,
    POINTS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    point, here, logits = _points(logits, num_points, C, POINTS)
    _, _, gradient = _points(gradient, num_points, C, POINTS)
    label, takes_part = _target_class(gt_index, gt_labels, ignored, point, here, G)
    scale = tl.load(upstream)
    for first in range(0, C, CLASSES):
        c = first + tl.arange(0, CLASSES)
        mask = takes_part[:, None] & (c < C)[None, :]
        offset = tl.arange(0, POINTS)[:, None] * C + c[None, :]
        is_target = label[:, None] == c[None, :]
        weight, p, pq, softplus = _tile_terms(logits, offset, mask, is_target)
        slope = scale * weight * (p * (p * p + 2.0 * pq * softplus))
        slope = tl.where(is_target, -slope, slope).to(gradient.dtype.element_ty)
        tl.store(gradient + offset, slope, mask=here[:, None] & (c < C)[None, :])


def _tile(num_classes: int) -> dict[str, int]:
    """Points and classes of a tile: the widest that wastes the fewest lanes on classes that do not exist."""
    widths = [2**n for n in range(8) if 2**n < 2 * num_classes and 2**n >= min(16, num_classes)]
    classes = min(reversed(widths), key=lambda width: -(-num_classes // width) * width)
    return {"POINTS": _TILE // classes, "CLASSES": classes}


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def keep_inputs(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


# The operators' names say which copy of this folder they belong to, for a process may hold two.
NAMESPACE = __package__.replace(".", "_")


@torch.library.custom_op(
    f"ota_triton::focal_sum_{NAMESPACE}",
    mutates_args=(),
    schema="(Tensor logits, Tensor gt_index, Tensor gt_labels, Tensor? ignored) -> Tensor",
)
def focal_sum(logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None) -> Tensor:
    (B, N, C), G = logits.shape, len(gt_labels)
    if logits.numel() == 0:
        return logits.new_zeros((), dtype=torch.float32)
    tile = _tile(C)
    programs = triton.cdiv(B * N, tile["POINTS"])
    partial = torch.empty(programs, dtype=torch.float32, device=logits.device)
    with torch.cuda.device_of(logits):
        _focal_loss_kernel[(programs,)](
            partial, *contiguous(logits, gt_index, gt_labels, ignored), B * N, G, C, **tile, num_warps=_WARPS
        )
    return partial.sum()


@torch.library.custom_op(
    f"ota_triton::focal_gradient_{NAMESPACE}",
    mutates_args=(),
    schema="(Tensor upstream, Tensor logits, Tensor gt_index, Tensor gt_labels, Tensor? ignored) -> Tensor",
)
def focal_gradient(
    upstream: Tensor, logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None
) -> Tensor:
    (B, N, C), G = logits.shape, len(gt_labels)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if logits.numel() == 0:
        return gradient
    tile = _tile(C)
    with torch.cuda.device_of(logits):
        _focal_gradient_kernel[(triton.cdiv(B * N, tile["POINTS"]),)](
            gradient, *contiguous(logits, upstream, gt_index, gt_labels, ignored), B * N, G, C,
            **tile, num_warps=_WARPS,
        )  # fmt: skip
    return gradient


@focal_sum.register_fake
def _(logits: Tensor, *_) -> Tensor:
    return logits.new_empty((), dtype=torch.float32)


@focal_gradient.register_fake
def _(upstream: Tensor, logits: Tensor, *_) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _backward(ctx, upstream: Tensor):
    return focal_gradient(upstream, *ctx.saved_tensors), None, None, None


focal_sum.register_autograd(_backward, setup_context=keep_inputs)


def focal_loss_triton(logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None) -> Tensor:
    """The contract of `focal_loss`, on a GPU, or on a CPU in Triton's interpreter."""
    return focal_sum(logits, gt_index, gt_labels, ignored)
