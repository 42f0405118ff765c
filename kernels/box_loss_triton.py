"""GIoU loss of matched boxes and cross entropy of their IoU logits in Triton: a kernel for the sums, one for gradients.

With predicted box b and ground truth g, overlap I, areas A and A_g, union U = A + A_g - I, hull H and a small eps:

    giou = 1 - I / (U + eps) + (H - U) / (H + eps)
    d giou / d A = I / (U + eps)^2 - 1 / (H + eps),  d giou / d I = -1 / (U + eps) - d giou / d A
    d giou / d H = (U + eps) / (H + eps)^2
    bce  = softplus(z) - z t,  d bce / d z = sigmoid(z) - t,  z the IoU logit and t the IoU

A program owns a block of the B N points and reads predictions of the matched ones only. Where two sides are equal each
box has half of the derivative of minimum and maximum, as in PyTorch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .center_prior_triton import load_boxes
from .config import GIOU_EPS, NAMESPACE
from .focal_triton import contiguous, keep_inputs, sigmoid_softplus

_EPS = tl.constexpr(GIOU_EPS)
_POINTS = tl.constexpr(128)
_VARYING = ["num_points", "G"]  # change from batch to batch: Triton must not recompile for 1 or multiples of 16
_INPUTS = "Tensor boxes, Tensor iou_logits, Tensor gt_index, Tensor iou, Tensor gt_boxes"


@triton.jit
def _load(inputs, num_points, G):
    """This program's points, whether they exist and are matched, both boxes, IoU logits and their targets."""
    boxes, iou_logits, gt_index, iou, gt_boxes = inputs
    point = tl.program_id(0).to(tl.int64) * _POINTS + tl.arange(0, _POINTS)
    exists = point < num_points
    gt = tl.load(gt_index + point, mask=exists, other=-1)
    matched = (gt >= 0) & (gt < G)
    z = tl.load(iou_logits + point, mask=matched, other=0.0).to(tl.float32)
    target = tl.load(iou + point, mask=matched, other=0.0).to(tl.float32)
    box, gt_box = load_boxes(boxes + point * 4, matched), load_boxes(gt_boxes + gt * 4, matched)
    return point, exists, matched, box, gt_box, z, target


@triton.jit
def _sides(box, gt_box):
    """Width and height of the overlap, 0 where there is none, and of the hull."""
    x1, y1, x2, y2 = box
    gx1, gy1, gx2, gy2 = gt_box
    width, height = tl.minimum(x2, gx2) - tl.maximum(x1, gx1), tl.minimum(y2, gy2) - tl.maximum(y1, gy1)
    meet = (width > 0.0) & (height > 0.0)
    hull_width, hull_height = tl.maximum(x2, gx2) - tl.minimum(x1, gx1), tl.maximum(y2, gy2) - tl.minimum(y1, gy1)
    return tl.where(meet, width, 0.0), tl.where(meet, height, 0.0), hull_width, hull_height


@triton.jit
def _area(box):
    x1, y1, x2, y2 = box
    return (x2 - x1) * (y2 - y1)


@triton.jit
def _share(side, other):
    """Derivative of max(side, other) by side."""
    return tl.where(side > other, 1.0, tl.where(side == other, 0.5, 0.0))


@triton.jit(do_not_specialize=_VARYING)
def _box_loss_kernel(partial, inputs, num_points, G):
    _, _, matched, box, gt_box, z, target = _load(inputs, num_points, G)
    width, height, hull_width, hull_height = _sides(box, gt_box)
    overlap, hull = width * height, hull_width * hull_height
    union = _area(box) + _area(gt_box) - overlap
    giou = 1.0 - tl.div_rn(overlap, union + _EPS) + tl.div_rn(hull - union, hull + _EPS)
    _, _, softplus = sigmoid_softplus(z)
    partial += tl.program_id(0)
    tl.store(partial, tl.sum(tl.where(matched, giou, 0.0), 0))
    tl.store(partial + tl.num_programs(0), tl.sum(tl.where(matched, softplus - z * target, 0.0), 0))


@triton.jit(do_not_specialize=_VARYING)
def _box_gradient_kernel(box_gradient, logit_gradient, upstream, inputs, num_points, G):
    point, exists, matched, box, gt_box, z, target = _load(inputs, num_points, G)
    x1, y1, x2, y2 = box
    gx1, gy1, gx2, gy2 = gt_box
    width, height, hull_width, hull_height = _sides(box, gt_box)
    overlap, hull = width * height, hull_width * hull_height + _EPS
    union = _area(box) + _area(gt_box) - overlap + _EPS
    giou_scale, entropy_scale = tl.load(upstream), tl.load(upstream + 1)
    # The terms cancel, so quotients are rounded as in IEEE 754; the operator / is off by up to two units.
    by_area = tl.div_rn(tl.div_rn(overlap, union), union) - tl.div_rn(1.0, hull)
    by_overlap = giou_scale * (-tl.div_rn(1.0, union) - by_area)
    by_hull = giou_scale * tl.div_rn(tl.div_rn(union, hull), hull)
    by_area *= giou_scale
    # Overlap and area grow with x2 and y2 and shrink with x1 and y1; the outer sides of both boxes bound the hull.
    by_x1 = -by_overlap * height * _share(x1, gx1) - by_area * (y2 - y1) - by_hull * hull_height * _share(gx1, x1)
    by_y1 = -by_overlap * width * _share(y1, gy1) - by_area * (x2 - x1) - by_hull * hull_width * _share(gy1, y1)
    by_x2 = by_overlap * height * _share(gx2, x2) + by_area * (y2 - y1) + by_hull * hull_height * _share(x2, gx2)
    by_y2 = by_overlap * width * _share(gy2, y2) + by_area * (x2 - x1) + by_hull * hull_width * _share(y2, gy2)
    kind = box_gradient.dtype.element_ty
    side = box_gradient + point * 4
    tl.store(side, tl.where(matched, by_x1, 0.0).to(kind), mask=exists)
    tl.store(side + 1, tl.where(matched, by_y1, 0.0).to(kind), mask=exists)
    tl.store(side + 2, tl.where(matched, by_x2, 0.0).to(kind), mask=exists)
    tl.store(side + 3, tl.where(matched, by_y2, 0.0).to(kind), mask=exists)
    p, _, _ = sigmoid_softplus(z)
    by_logit = tl.where(matched, entropy_scale * (p - target), 0.0)
    tl.store(logit_gradient + point, by_logit.to(logit_gradient.dtype.element_ty), mask=exists)


@torch.library.custom_op(f"{NAMESPACE}::box_sums", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def box_sums(*inputs: Tensor) -> Tensor:
    """Both results of `box_loss` (2,), on a GPU, or on a CPU in Triton's interpreter."""
    boxes, _, gt_index, _, gt_boxes = inputs
    num_points = gt_index.numel()
    programs = triton.cdiv(num_points, _POINTS.value)
    partial = boxes.new_empty(2, programs, dtype=torch.float32)
    if num_points > 0:
        with torch.cuda.device_of(boxes):
            _box_loss_kernel[(programs,)](partial, contiguous(*inputs), num_points, len(gt_boxes))
    return partial.sum(1)


@torch.library.custom_op(
    f"{NAMESPACE}::box_gradient", mutates_args=(), schema=f"(Tensor upstream, {_INPUTS}) -> (Tensor, Tensor)"
)
def box_gradient(upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    boxes, _, gt_index, _, gt_boxes = inputs
    num_points, gradients = gt_index.numel(), _empty_gradients(upstream, *inputs)
    if num_points > 0:
        programs = (triton.cdiv(num_points, _POINTS.value),)
        arguments = *gradients, upstream.contiguous(), contiguous(*inputs), num_points, len(gt_boxes)
        with torch.cuda.device_of(boxes):
            _box_gradient_kernel[programs](*arguments)
    return gradients


@box_gradient.register_fake
def _empty_gradients(upstream: Tensor, boxes: Tensor, iou_logits: Tensor, *_) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (boxes, iou_logits))


def _backward(ctx, upstream: Tensor):
    return *box_gradient(upstream, *ctx.saved_tensors), None, None, None


box_sums.register_fake(lambda boxes, *_: boxes.new_empty(2, dtype=torch.float32))
box_sums.register_autograd(_backward, setup_context=keep_inputs)
