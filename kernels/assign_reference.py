"""Optimal transport assignment, dense and literal: the documentation, and the oracle of every test.

One image at a time, with m ground truths, n anchor points and C classes (Ge et al., CVPR 2021):

    c_ij    = L_cls(z_j, c_i) + alpha L_reg(b_j, g_i)                 foreground cost   (equation 6)
    c_bg,j  = L_cls(z_j, no class)                                    background cost   (equation 7)
    s_i     = k_i,  s_bg = n - sum_i k_i,  d_j = 1                    supplies, demands (section 3.2)
    v_j     = -eps logsumexp_i((u_i - c_ij) / eps)                    Sinkhorn-Knopp, T times
    u_i     = eps (log s_i - logsumexp_j((v_j - c_ij) / eps))         (equations 10 and 11, log domain)
    pi_ij   = exp((u_i + v_j - c_ij) / eps)

and every point goes to the supplier that sends it most. Works in the floating type of `boxes`, float32 at least.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import EMPTY_SUPPLY, FOCAL_ALPHA, FOCAL_GAMMA, IOU_FLOOR, Assignment, Inputs, OTAConfig
from .grid import INSIDE_MARGIN_PX, UNITS_PER_PX, PointGrid, box_centers, radius_in_units, valid_rows


def classification_loss(logits: Tensor, targets: Tensor, kind: str) -> Tensor:
    """Sigmoid focal loss or binary cross entropy of (n, C) logits, summed over the classes: (n,)."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    if kind == "bce":
        return cross_entropy.sum(1)
    p = logits.sigmoid()
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = FOCAL_ALPHA * targets + (1 - FOCAL_ALPHA) * (1 - targets)
    return (alpha_t * (1 - p_t) ** FOCAL_GAMMA * cross_entropy).sum(1)


def iou_and_giou(gt_boxes: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of (m, 4) and (n, 4) boxes: two (m, n)."""
    g, b = gt_boxes[:, None], boxes[None]
    overlap = (torch.minimum(g[..., 2:], b[..., 2:]) - torch.maximum(g[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area_g = (g[..., 2:] - g[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1)
    union = area_g + area_b - overlap
    hull = (torch.maximum(g[..., 2:], b[..., 2:]) - torch.minimum(g[..., :2], b[..., :2])).prod(-1)
    return overlap / union, overlap / union - (hull - union) / hull


def center_prior(gt_boxes: Tensor, grid: PointGrid, config: OTAConfig) -> Tensor:
    """Candidates (m, n) bool of every ground truth (section 3.3); each has at least one."""
    points = grid.points(gt_boxes.device)
    box, x, y = gt_boxes.float()[:, :, None], points[:, 0], points[:, 1]
    to_sides = torch.stack([x - box[:, 0], y - box[:, 1], box[:, 2] - x, box[:, 3] - y])
    inside = (to_sides > INSIDE_MARGIN_PX).all(0)

    offset = (points * UNITS_PER_PX).long() - box_centers(gt_boxes)[:, None]  # (m, n, 2), exact
    distance = (offset**2).sum(-1)
    if config.center_prior == "closest":
        near = torch.zeros_like(inside)
        for start, end in zip(grid.level_offsets, grid.level_offsets[1:], strict=False):
            closest = distance[:, start:end].argsort(dim=1, stable=True)[:, : int(config.radius) ** 2]
            near.scatter_(1, closest + start, True)
    elif config.center_prior == "radius":
        limit = torch.tensor([radius_in_units(config.radius, s) for s in grid.strides], device=points.device)
        limit = limit.repeat_interleave(torch.tensor([h * w for h, w in grid.sizes], device=points.device))
        near = (offset.abs() < limit[:, None]).all(-1)
    else:
        near = torch.ones_like(inside)

    candidates = inside & near
    nothing = ~candidates.any(1)
    candidates[nothing, distance.argmin(1)[nothing]] = True  # the finest level first: argmin takes the first of equals
    return candidates


def foreground_cost(
    logits: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, strides: Tensor, config: OTAConfig
) -> Tensor:
    """c_ij (m, n), without the center prior."""
    targets = F.one_hot(gt_labels, logits.shape[1]).to(logits)
    cls = torch.stack([classification_loss(logits, target.expand_as(logits), config.cls_cost) for target in targets])
    iou, giou = iou_and_giou(gt_boxes, boxes)
    if config.reg_cost == "iou":
        reg = -iou.clamp(min=IOU_FLOOR).log()
    elif config.reg_cost == "giou":
        reg = 1 - giou
    else:
        difference = (boxes[None] - gt_boxes[:, None]) / strides[:, None]
        reg = F.smooth_l1_loss(difference, torch.zeros_like(difference), reduction="none").sum(-1)
    return cls + config.alpha * reg


def sum_of_best(iou: Tensor, candidates: Tensor, config: OTAConfig) -> Tensor:
    """(m,) sum of the top_q best IoUs among the candidates, or of one in per_q of them if that is fewer."""
    q = torch.ceil(candidates.sum(1) / config.per_q).clamp(max=config.top_q)
    best = iou.masked_fill(~candidates, 0).topk(min(config.top_q, iou.shape[1]), dim=1).values
    return best.masked_fill(torch.arange(best.shape[1], device=q.device) >= q[:, None], 0).sum(1)


def supplies(iou: Tensor, candidates: Tensor, config: OTAConfig) -> Tensor:
    """k_i (m,) int64: fixed, or dynamic from the best IoUs (section 3.3); never more than there are candidates."""
    count = candidates.sum(1)
    if config.fixed_k is not None:
        return count.clamp(max=config.fixed_k)
    return torch.minimum(sum_of_best(iou, candidates, config).floor().long().clamp(min=1), count)


def sinkhorn(cost: Tensor, supply: Tensor, config: OTAConfig) -> Tensor:
    """Transport plan (m + 1, n) for a cost of that shape, supplies (m + 1,) and one unit demanded by each point."""
    u = torch.zeros_like(supply)
    for _ in range(config.iterations):
        v = -config.eps * torch.logsumexp((u[:, None] - cost) / config.eps, dim=0)
        u = config.eps * (supply.log() - torch.logsumexp((v - cost) / config.eps, dim=1))
    return (u[:, None] + v - cost) / config.eps


def decode(log_plan: Tensor, config: OTAConfig) -> Tensor:
    """Supplier (n,) of every point; the last one is background. Ties go to the lowest index."""
    if config.rescale:
        log_plan = log_plan - log_plan.amax(1, keepdim=True)
    return log_plan.argmax(0)


def assign_image(
    logits: Tensor, boxes: Tensor, gt_boxes: Tensor, gt_labels: Tensor, grid: PointGrid, config: OTAConfig
) -> dict[str, Tensor]:
    """Solve one image with m >= 1 valid ground truths; a row without a finite candidate has k = 0 and sends nothing.

    Return `candidates` (m, n), `cost` (m + 1, n) with inf where a pair is no candidate, `k` (m,),
    `log_plan` (m + 1, n), `supplier` (n,) in 0..m with m for background and `iou` (m, n).
    """
    finite = torch.isfinite(logits).T[gt_labels] & torch.isfinite(boxes).all(1)
    candidates = center_prior(gt_boxes, grid, config) & finite
    # A non-finite prediction is no candidate, and its column's other entries are shifted by a constant only.
    logits, boxes = (torch.where(torch.isfinite(t), t, torch.zeros_like(t)) for t in (logits, boxes))

    cost = foreground_cost(logits, boxes, gt_boxes, gt_labels, grid.point_strides(boxes.device).to(boxes), config)
    background = classification_loss(logits, torch.zeros_like(logits), config.cls_cost)
    candidates &= torch.isfinite(cost)  # boxes of 1e19 px overflow in float32
    cost = torch.cat([cost.masked_fill(~candidates, math.inf), background[None]])

    iou = iou_and_giou(gt_boxes, boxes)[0]
    k = supplies(iou, candidates, config)
    supply = torch.cat([k, (grid.num_points - k.sum()).clamp(min=0)[None]]).to(boxes).clamp(min=EMPTY_SUPPLY)
    active = torch.cat([k > 0, torch.ones_like(k[:1], dtype=torch.bool)])
    log_plan = torch.full_like(cost, -math.inf)
    log_plan[active] = sinkhorn(cost[active], supply[active], config)
    supplier = active.nonzero()[:, 0][decode(log_plan[active], config)]
    return dict(candidates=candidates, cost=cost, k=k, log_plan=log_plan, supplier=supplier, iou=iou)


def ota_assign_reference(inputs: Inputs, config: OTAConfig) -> Assignment:
    """The contract of `ota_assign`, image by image."""
    logits, boxes, gt_boxes, gt_labels, gt_offsets, grid = inputs
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    logits, boxes, gt_boxes = logits.to(dtype), boxes.to(dtype), gt_boxes.to(dtype)
    gt_index = torch.full(boxes.shape[:2], -1, device=boxes.device)
    matched_iou = torch.zeros(boxes.shape[:2], dtype=torch.float32, device=boxes.device)
    k = torch.zeros(len(gt_boxes), dtype=torch.int32, device=boxes.device)
    image, valid = valid_rows(gt_boxes, gt_labels, gt_offsets, logits.shape[-1])
    for b in image[valid].unique().tolist():
        rows = (valid & (image == b)).nonzero()[:, 0]
        result = assign_image(logits[b], boxes[b], gt_boxes[rows], gt_labels[rows], grid, config)
        foreground = (result["supplier"] < len(rows)).nonzero()[:, 0]
        supplier = result["supplier"][foreground]
        gt_index[b, foreground] = rows[supplier]
        matched_iou[b, foreground] = result["iou"][supplier, foreground].float()
        k[rows] = result["k"].int()
    return Assignment(gt_index, matched_iou, k)
