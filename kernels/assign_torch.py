"""Optimal transport assignment over candidate pairs, in vectorised PyTorch: no loop over images or boxes.

Two exact identities shrink the (m + 1) x n problem of assign_reference.py:
1. A constant added to a column of the cost changes nothing, for v_j absorbs it. Subtract c_bg,j: background
   costs 0, all classes but c_i cancel, and a foreground entry is
       D_ij = l(z_j,c_i ; 1) - l(z_j,c_i ; 0) + alpha L_reg(b_j, g_i).
2. A point that is nobody's candidate has background as its one supplier, so v_j = -u_bg. All n_0 of them in an
   image are one column that counts n_0 times.

A sparse bipartite graph is left: suppliers (G ground truths, then B backgrounds), points (A candidates, then one column
per image for all others) and edges (P candidate pairs, then one background edge per point). A Sinkhorn iteration sums
the plan over each point's edges, then over each supplier's, in a fixed order, so results are repeatable bit for bit.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .center_prior_torch import candidate_pairs
from .config import EMPTY_SUPPLY, FOCAL_ALPHA, IOU_FLOOR, Assignment, Inputs, OTAConfig, Plan
from .grid import PointGrid, valid_rows

ABSORB_EVERY = 10  # Sinkhorn iterations between two passes through the log domain
_point_strides = lru_cache(maxsize=32)(PointGrid.point_strides)


def pair_iou_giou(gt_boxes: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    gx1, gy1, gx2, gy2 = gt_boxes.unbind(-1)
    bx1, by1, bx2, by2 = boxes.unbind(-1)
    width = (torch.minimum(gx2, bx2) - torch.maximum(gx1, bx1)).clamp(min=0)
    overlap = width * (torch.minimum(gy2, by2) - torch.maximum(gy1, by1)).clamp(min=0)
    area_b = (bx2 - bx1).clamp(min=0) * (by2 - by1).clamp(min=0)
    union = (gx2 - gx1) * (gy2 - gy1) + area_b - overlap
    hull = (torch.maximum(gx2, bx2) - torch.minimum(gx1, bx1)) * (torch.maximum(gy2, by2) - torch.minimum(gy1, by1))
    iou = overlap / union
    return iou, iou - (hull - union) / hull


def _pair_cost(
    logit: Tensor, boxes: Tensor, gt_boxes: Tensor, stride: Tensor, config: OTAConfig
) -> tuple[Tensor, Tensor]:
    """Relative cost D and IoU of P pairs; boxes (P, 4), logit of the ground truth's class and stride px (P,)."""
    if config.cls_cost == "focal":
        # Only exp and log1p: on a CPU sigmoid and softplus round the last few elements of a tensor differently, so
        # identical boxes would not tie and a result would depend on the batch.
        log1p_small = (-logit.abs()).exp().log1p()
        log_p, log_q = logit.clamp(max=0) - log1p_small, (-logit).clamp(max=0) - log1p_small
        cls = (1 - FOCAL_ALPHA) * (2 * log_p).exp() * log_q - FOCAL_ALPHA * (2 * log_q).exp() * log_p
    else:
        cls = -logit
    iou, giou = pair_iou_giou(gt_boxes, boxes)
    if config.reg_cost == "iou":
        reg = -iou.clamp(min=IOU_FLOOR).log()
    elif config.reg_cost == "giou":
        reg = 1 - giou
    else:
        difference = (boxes - gt_boxes) / stride[:, None]
        reg = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none").sum(1)
    return cls + config.alpha * reg, iou


def supplies(gt: Tensor, iou: Tensor, num_rows: int, config: OTAConfig) -> Tensor:
    """k (G,) int64 of P pairs: row of the ground truth (P,), ascending, and IoU (P,); 0 without a pair."""
    count = torch.bincount(gt, minlength=num_rows)
    if config.fixed_k is not None:
        return count.clamp(max=config.fixed_k)
    # One sort orders by ground truth and then by falling IoU: bits of a float >= 0 sort like the float.
    key = (gt << 32) + (0x7FFFFFFF - iou.view(torch.int32))
    key, order = key.sort(stable=True)
    rank = torch.arange(gt.numel(), device=gt.device) - (count.cumsum(0) - count)[gt]
    most = torch.clamp((count + config.per_q - 1) // config.per_q, max=config.top_q)
    best = torch.where(rank < most[gt], iou[order], 0)
    total = torch.segment_reduce(best, "sum", lengths=count, unsafe=True)
    return torch.minimum(total.floor().long().clamp(min=1), count)


class _Segments(NamedTuple):
    """Edges grouped by supplier or by point."""

    of_edge: Tensor  # (E,) segment of every edge
    edge: Tensor  # (E,) edge at every position, sorted by segment
    segment: Tensor  # (E,) segment of every position
    lengths: Tensor  # (segments,)

    @classmethod
    def by(cls, of_edge: Tensor, count: int) -> "_Segments":
        segment, edge = of_edge.sort(stable=True)
        return cls(of_edge, edge, segment, torch.bincount(segment, minlength=count))

    def reduce(self, x: Tensor, how: str) -> Tensor:
        return torch.segment_reduce(x, how, lengths=self.lengths, unsafe=True)

    def logsumexp(self, x: Tensor) -> Tensor:
        peak = self.reduce(x, "max")
        return peak + self.reduce((x - peak[self.segment]).exp(), "sum").log()


def _sinkhorn(
    cost: Tensor, log_count: Tensor, supply: Tensor, by_supplier: _Segments, by_point: _Segments, iterations: int
) -> tuple[Tensor, Tensor]:
    """Potentials u of the suppliers and v of the points, both in units of eps, as is the cost (E,).

    A point counts exp(log_count) times for its suppliers. After the first iteration, in the log domain, every row of
    the plan sums to its supply s and no column to less than min(1, s) / N, whatever the cost. So an iteration changes
    no entry by more than a factor of N / EMPTY_SUPPLY, and ABSORB_EVERY of them fit float64; then u and v absorb them.
    """
    supplier_p, receiver_p, cost_p = by_supplier.of_edge[by_point.edge], by_point.segment, cost[by_point.edge]
    supplier_s, receiver_s = by_supplier.segment, by_point.of_edge[by_supplier.edge]
    cost_s = (cost - log_count)[by_supplier.edge]

    v = -by_point.logsumexp(-cost_p)
    u = supply.log() - by_supplier.logsumexp(v[receiver_s] - cost_s)
    for done in range(1, iterations, ABSORB_EVERY):
        plan_p = (u[supplier_p] + v[receiver_p] - cost_p).exp()
        plan_s = (u[supplier_s] + v[receiver_s] - cost_s).exp()
        row_factor = torch.ones_like(u)
        for _ in range(min(ABSORB_EVERY, iterations - done)):
            column_factor = by_point.reduce(row_factor.index_select(0, supplier_p).mul_(plan_p), "sum").reciprocal_()
            row_factor = supply / by_supplier.reduce(column_factor.index_select(0, receiver_s).mul_(plan_s), "sum")
        u, v = u + row_factor.log(), v + column_factor.log()
    return u, v


def solve(inputs: Inputs, config: OTAConfig) -> tuple[Assignment, Plan]:
    """The assignment of all images at once, and the plan that it comes from."""
    logits, boxes, gt_boxes, gt_labels, gt_offsets, grid = inputs
    (num_images, num_points, num_classes), num_rows, device = logits.shape, len(gt_boxes), boxes.device

    image_of_row, valid = valid_rows(gt_boxes, gt_labels, gt_offsets, num_classes)
    gt, point = candidate_pairs(gt_boxes, valid, grid, config)
    image = image_of_row[gt]
    logit, predicted = logits[image, point, gt_labels[gt]].float(), boxes[image, point].float()
    cost, iou = _pair_cost(logit, predicted, gt_boxes[gt].float(), _point_strides(grid, device)[point], config)
    finite = torch.isfinite(logit) & torch.isfinite(predicted).all(1) & torch.isfinite(cost / config.eps)
    if not finite.all():
        gt, image, point, cost, iou = gt[finite], image[finite], point[finite], cost[finite], iou[finite]

    k = supplies(gt, iou, num_rows, config)
    flat_point = image * num_points + point
    points, column = torch.unique(flat_point, return_inverse=True)
    num_pairs, num_active = gt.numel(), points.numel()
    active_per_image = torch.bincount(points // num_points, minlength=num_images)
    supplied = k.new_zeros(max(num_images, 1)).index_add_(0, image_of_row, k)  # rows outside all images have k = 0
    supply = torch.cat([k, (num_points - supplied[:num_images]).clamp(min=0)]).double().clamp(min=EMPTY_SUPPLY)

    # Edges: candidate pairs, background to every active point, background to the rest of each image.
    background = torch.arange(num_rows, num_rows + num_images, device=device)
    supplier = torch.cat([gt, background[points // num_points], background])
    receiver = torch.cat([column, torch.arange(num_active + num_images, device=device)])
    scaled_cost = F.pad(cost.double() / config.eps, (0, num_active + num_images))
    log_count = F.pad((num_points - active_per_image).double().log(), (num_pairs + num_active, 0))
    by_point = _Segments.by(receiver, num_active + num_images)
    by_supplier = _Segments.by(supplier, num_rows + num_images)
    u, v = _sinkhorn(scaled_cost, log_count, supply, by_supplier, by_point, config.iterations)

    sent = v[receiver] - scaled_cost  # log plan without its supplier's factor
    score = log_plan = u[supplier] + sent
    if config.rescale:
        peak = by_supplier.reduce(sent.masked_fill(torch.isneginf(log_count), -torch.inf)[by_supplier.edge], "max")
        score = sent - peak[supplier]
    parts = [num_pairs, num_active, num_images]
    (log_plan, log_plan_bg, _), (score, score_bg, _) = log_plan.split(parts), score.split(parts)

    # Every point goes to the supplier with the best score; the lowest row wins a tie, background loses it.
    best = score_bg.scatter_reduce(0, column, score, "amax")
    pair = torch.where(score >= best[column], torch.arange(num_pairs, device=device), num_pairs)
    winner = torch.full_like(points, num_pairs).scatter_reduce_(0, column, pair, "amin")
    foreground = winner < num_pairs
    winner, matched = winner[foreground], points[foreground]
    gt_index = torch.full((num_images, num_points), -1, device=device)
    matched_iou = torch.zeros_like(gt_index, dtype=torch.float32)
    gt_index.view(-1)[matched], matched_iou.view(-1)[matched] = gt[winner], iou[winner]
    return Assignment(gt_index, matched_iou, k.int()), Plan(gt, flat_point, cost, k, log_plan, points, log_plan_bg)


def ota_assign_torch(inputs: Inputs, config: OTAConfig) -> Assignment:
    """The contract of `ota_assign`."""
    return solve(inputs, config)[0]
