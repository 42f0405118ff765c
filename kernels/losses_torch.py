"""The detection losses in vectorised PyTorch: no shape depends on data, and nothing waits for a device.

Focal loss of the logit z of a class (alpha 1/4, gamma 2), with p = sigmoid(s), q = sigmoid(-s):

    s = z, w = 3/4   or, for the target's class,   s = -z, w = 1/4
    loss = w p^2 softplus(s)      d loss / d s = w p^2 (p + 2 q softplus(s))

Points that take no part have s = -inf, which adds exactly 0 to both. A chunk of points is computed with the other
classes' w, and the one entry a point that has a target is corrected by the ratio of both.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import FOCAL_ALPHA
from .losses_reference import giou_loss

# Logits that a CPU thread works on at a time. Four buffers of them, 512 KiB, stay in its L2 cache, and PyTorch does not
# spread operations of this size over further threads.
_CHUNK = 2**15
_MOST_THREADS = 8  # measured on 2 threads only; with many, sharing out the points would take longer than the points
_TARGET_WEIGHT = FOCAL_ALPHA / (1 - FOCAL_ALPHA)  # of the target's class, relative to that of the others


def _terms(s: Tensor, p: Tensor, q: Tensor, log: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """sigmoid(s), sigmoid(-s) and softplus(s), which overwrite p, q and s; `log` is memory to work in.

    softplus(s) = max(s, 0) + log(1 + exp(-|s|)), and 1 / (1 + exp(-|s|)) = sigmoid(|s|) = 1 - min(p, q), which costs
    no further exponential and loses no digit, for min(p, q) is at most a half.
    """
    torch.sigmoid(s, out=p)
    torch.sigmoid(torch.neg(s, out=q), out=q)
    torch.minimum(p, q, out=log).neg_().log1p_()
    return p, q, s.clamp_(min=0).sub_(log)


def _loss(p: Tensor, q: Tensor, softplus: Tensor) -> Tensor:
    """p^2 softplus(s), in place of softplus(s)."""
    return softplus.mul_(p).mul_(p)


def _slope(p: Tensor, q: Tensor, softplus: Tensor) -> Tensor:
    """Derivative of p^2 softplus(s) by s, in place of softplus(s)."""
    return torch.add(p, softplus.mul_(q), alpha=2, out=softplus).mul_(p).mul_(p)


def _targets(logits: Tensor, gt_index: Tensor, gt_labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Class of every point and whether it has one, (points, 1) both; and who is matched (points,)."""
    G, gt_index = len(gt_labels), gt_index.reshape(-1)
    matched = (gt_index >= 0) & (gt_index < G)
    labels = F.pad(gt_labels, (0, 1), value=-1)  # background has a row of its own, so that G may be 0
    label = labels[torch.where(matched, gt_index, G)]
    has_class = (label >= 0) & (label < logits.shape[1])
    return torch.where(has_class, label, 0)[:, None], has_class[:, None], matched


def _over_chunks(
    function: Callable[..., Tensor],
    target_weight: float,
    finish: Callable[[slice, Tensor], Tensor],
    logits: Tensor,
    gt_index: Tensor,
    gt_labels: Tensor,
    ignored: Tensor | None,
) -> list[Tensor]:
    """`finish` of slices of the points and `function` of their terms (points, C), in the points' order.

    `target_weight` multiplies the entries of the targets' classes. On a CPU each thread has its own share of the
    points. Were every operation spread over the threads, they would wait for one another after each, and for long where
    other processes want the cores, too.
    """
    num_points, num_classes = logits.shape
    label, has_class, matched = _targets(logits, gt_index, gt_labels)
    out = None if ignored is None else (ignored.reshape(-1) & ~matched)[:, None]
    own = logits.gather(1, label).float()
    own = torch.where(has_class, -own, own)
    weight = torch.ones_like(own).masked_fill_(has_class, target_weight)
    rows, share = num_points, num_points
    if logits.device.type == "cpu":
        rows = max(1, _CHUNK // num_classes)
        share = rows * -(-num_points // (rows * min(torch.get_num_threads(), _MOST_THREADS)))

    def work(first_point: int) -> list[Tensor]:
        results, end_point = [], min(first_point + share, num_points)
        # Allocated in the thread that writes it: what inference mode makes cannot be changed in others.
        size = (4, min(rows, end_point - first_point), num_classes)
        memory = torch.empty(size, dtype=torch.float32, device=logits.device)
        for first in range(first_point, end_point, rows):
            here = slice(first, min(first + rows, end_point))
            s, p, q, log = memory[:, : here.stop - first]
            s.copy_(logits[here]).scatter_(1, label[here], own[here])
            if out is not None:
                s.masked_fill_(out[here], -torch.inf)
            value = function(*_terms(s, p, q, log))
            value.scatter_(1, label[here], value.gather(1, label[here]).mul_(weight[here]))
            results.append(finish(here, value))
        return results

    shares = range(0, num_points, share)
    if len(shares) == 1:
        return work(0)
    with ThreadPoolExecutor(len(shares)) as threads:
        return list(chain.from_iterable(threads.map(torch.no_grad()(work), shares)))


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None) -> Tensor:
        ctx.save_for_backward(logits, gt_index, gt_labels, ignored)
        if logits.numel() == 0:
            return logits.new_zeros((), dtype=torch.float32)
        logits = logits.reshape(-1, logits.shape[-1])
        sums = _over_chunks(_loss, _TARGET_WEIGHT, lambda _, loss: loss.sum(), logits, gt_index, gt_labels, ignored)
        return (1 - FOCAL_ALPHA) * torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor):
        logits, gt_index, gt_labels, ignored = ctx.saved_tensors
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if logits.numel() == 0:
            return gradient, None, None, None
        logits, rows = logits.reshape(-1, logits.shape[-1]), gradient.view(-1, logits.shape[-1])
        weight = (1 - FOCAL_ALPHA) * upstream
        _over_chunks(
            _slope, -_TARGET_WEIGHT, lambda here, slope: torch.mul(slope, weight, out=rows[here]),
            logits, gt_index, gt_labels, ignored,
        )  # fmt: skip
        return gradient, None, None, None


def _plain(logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None) -> Tensor:
    """The same without chunks, for torch.compile, which fuses the passes, and those of the gradient, by itself."""
    logits = logits.reshape(-1, logits.shape[-1]).float()
    label, has_class, matched = _targets(logits, gt_index, gt_labels)
    is_target = has_class & (label == torch.arange(logits.shape[1], device=logits.device))
    s = torch.where(is_target, -logits, logits)
    if ignored is not None:
        s = s.masked_fill((ignored.reshape(-1) & ~matched)[:, None], -torch.inf)
    weight = torch.where(is_target, FOCAL_ALPHA, 1 - FOCAL_ALPHA)
    return (weight * s.sigmoid() ** 2 * F.softplus(s)).sum()


def focal_loss_torch(logits: Tensor, gt_index: Tensor, gt_labels: Tensor, ignored: Tensor | None) -> Tensor:
    """The contract of `focal_loss`."""
    if torch.compiler.is_compiling():
        return _plain(logits, gt_index, gt_labels, ignored)
    return _FocalLoss.apply(logits, gt_index, gt_labels, ignored)


def box_loss_torch(
    boxes: Tensor, iou_logits: Tensor, gt_index: Tensor, iou: Tensor, gt_boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """The contract of `box_loss`."""
    G = len(gt_boxes)
    matched = (gt_index >= 0) & (gt_index < G)
    # Background has a row of its own, so that G may be 0, and predictions that agree with it: all gradients are finite.
    target = F.pad(gt_boxes.float(), (0, 0, 0, 1))[torch.where(matched, gt_index, G)]
    predicted = boxes.float().masked_fill(~matched[..., None], 0)
    giou = giou_loss(predicted, target).masked_fill(~matched, 0)
    logit = iou_logits.float().masked_fill(~matched, 0)
    entropy = F.binary_cross_entropy_with_logits(logit, iou.float(), reduction="none").masked_fill(~matched, 0)
    return giou.sum(), entropy.sum()
