"""PAA (Kim and Lee, ECCV 2020, arXiv 2007.08103): an object claims the candidates with the better losses."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.config import FOCAL_ALPHA

from .claims import Claims, ImageInputs, best_per_level

CANDIDATE_IOU, PER_LEVEL = 0.1, 9
MAX_EM_STEPS, MIN_EM_GAIN, MIN_VARIANCE = 100, 1e-3, 1e-6  # scikit-learn's, which the paper's code uses


def paa_claims(image: ImageInputs) -> Claims:
    """Claim the candidates with the better losses, see `up_to_the_densest` (separation scheme c of figure 3).

    A point in the object's box is a candidate if its square anchor of 8 strides has the highest IoU of all objects with
    this one, and one of at least 0.1 or the object's best; of those, the 9 per level with the least loss. Loss: focal
    loss over all classes + 1 - GIoU. The paper also has candidates outside the box; this detector's boxes contain their
    points.
    """
    anchor_iou, inside, logits = image.anchor_iou(), image.inside(), image.finite_logits()
    _, _, giou, usable = image.all_predictions()
    is_highest = torch.zeros_like(inside).scatter_(0, anchor_iou.argmax(0, keepdim=True), True)
    negative = (1 - FOCAL_ALPHA) * logits.sigmoid() ** 2 * F.softplus(logits)
    positive = FOCAL_ALPHA * (-logits).sigmoid() ** 2 * F.softplus(-logits)
    loss = negative.sum(1) + (positive - negative).T[image.gt_labels] + 1 - giou
    best = anchor_iou.masked_fill(~inside, 0).amax(1, keepdim=True)
    allowed = is_highest & inside & ((anchor_iou >= CANDIDATE_IOU) | (anchor_iou == best)) & usable
    candidates = best_per_level(loss, allowed, image.grid, PER_LEVEL)
    value, point = loss.masked_fill(~candidates, torch.inf).sort(dim=1, stable=True)
    value, point = (x[:, : max(1, int(candidates.sum(1).max()))] for x in (value, point))
    return Claims(torch.zeros_like(candidates).scatter_(1, point, up_to_the_densest(value)), loss)


def up_to_the_densest(value: Tensor) -> Tensor:
    """Fit two Gaussians to each row of the ascending losses (m, n), infinite where a row has ended; return (m, n) bool:
    all up to the one of the better Gaussian where the mixture is densest, or all where none is of the better."""
    density, is_better = fit_two_gaussians(value)
    densest = density.masked_fill(~is_better, -torch.inf).argmax(1, keepdim=True)
    densest = densest.masked_fill(~is_better.any(1, keepdim=True), value.shape[1])
    return value.isfinite() & (torch.arange(value.shape[1], device=value.device) <= densest)


def fit_two_gaussians(value: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log density (m, n) of the mixture, and where the Gaussian that starts at the lowest value is likelier.

    value (m, n), n > 0, ascending, infinite where a row has ended. Expectation maximisation in float64 from the lowest
    and the highest value, variance 1 and equal shares, until a step adds less than 1e-3 to the mean log likelihood of
    the row, as in the paper's code. A single value is the better one's.
    """
    exists = value.isfinite()
    x = value.double().masked_fill(~exists, 0)[..., None]  # (m, n, 1), against two components
    mean = torch.stack([x[:, 0], x.masked_fill(~exists[..., None], -torch.inf).amax(1).nan_to_num(neginf=0)], 2)
    variance, share = torch.ones_like(mean), torch.full_like(mean, 0.5)
    likelihood, running = x.new_full((len(x),), -torch.inf), exists.any(1)
    for step in range(MAX_EM_STEPS + 1):
        log_joint = share.log() - 0.5 * ((x - mean) ** 2 / variance + (2 * math.pi * variance).log())
        if step == MAX_EM_STEPS or not running.any():
            break
        before, likelihood = likelihood, log_joint.logsumexp(-1).masked_fill(~exists, 0).sum(1) / exists.sum(1)
        weight = log_joint.softmax(-1) * exists[..., None]
        total = weight.sum(1, keepdim=True) + 10 * torch.finfo(torch.float64).eps
        new_mean = (weight * x).sum(1, keepdim=True) / total
        new_variance = (weight * (x - new_mean) ** 2).sum(1, keepdim=True) / total + MIN_VARIANCE
        now = running[:, None, None]  # a row's last step counts
        mean, variance = torch.where(now, new_mean, mean), torch.where(now, new_variance, variance)
        share = torch.where(now, total / total.sum(-1, keepdim=True), share)
        running = running & ((likelihood - before).abs() >= MIN_EM_GAIN)
    is_better = (log_joint[..., 0] >= log_joint[..., 1]) & exists
    return log_joint.logsumexp(-1).masked_fill(~exists, -torch.inf), is_better
