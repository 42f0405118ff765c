"""Parity with the float64 reference: the numeric contract of ota_assign, compared image by image.

Supplies and plan entries that lie so close to a decision that rounding may turn it are left open, and counted.
B images, N anchor points over all levels, G ground truths of a batch, P candidate pairs; m, n of one image.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels import Assignment, OTAConfig, ota_assign
from kernels.assign_reference import assign_image, sum_of_best
from kernels.assign_torch import solve as solve_torch
from kernels.config import Plan
from kernels.grid import valid_rows
from tests.support.scenes import Scene

# The numeric contract, against the float64 reference on the same rounded inputs.
COST_TOLERANCE = 1e-5
PLAN_TOLERANCE = 1e-4
IOU_TOLERANCE = 1e-5
IOU_SUM_MARGIN = 1e-4  # k may differ when the sum of IoUs is this close to an integer
SCORE_MARGIN = 1e-3  # a match may differ when the two best plan entries are this close, relatively
EXCLUDED_SHARE = 1e-3  # what the two margins may exclude at most


@dataclass
class Parity:
    """What was compared, how much of it the contract leaves open, and one sentence for every breach."""

    images: int = 0
    ground_truths: int = 0
    ground_truths_excluded: int = 0
    points: int = 0  # points that are a candidate
    points_excluded: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def excluded_share(self) -> float:
        compared = self.ground_truths + self.points
        return (self.ground_truths_excluded + self.points_excluded) / compared if compared else 0.0

    def require(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.failures.append(sentence)


def ambiguous_points(log_plan: Tensor, config: OTAConfig) -> Tensor:
    """Points (n,) whose two best entries of a (rescaled) plan (m + 1, n) are too close to tell apart."""
    score = log_plan - log_plan.amax(1, keepdim=True) if config.rescale else log_plan
    first, second = score.nan_to_num(nan=-math.inf, neginf=-math.inf).topk(2, dim=0).values
    return first - second <= SCORE_MARGIN


def parity(scene: Scene, config: OTAConfig, backend: str, images: list[int] | None = None) -> Parity:
    """Compare a result on the whole batch with the reference on each of `images`; None is all."""
    match, plan = _result(scene, config, backend)
    image, valid = valid_rows(scene.gt_boxes, scene.gt_labels, scene.gt_offsets, scene.logits.shape[-1])
    result = Parity()
    result.require(not match.k[~valid].any(), "a row that takes no part has k > 0")
    for b in range(scene.logits.shape[0]) if images is None else images:
        result.images += 1
        rows = (valid & (image == b)).nonzero()[:, 0]
        if len(rows):
            _compare_image(result, scene, config, match, plan, b, rows)
        else:
            result.require(bool((match.gt_index[b] == -1).all()), f"image {b} has no ground truth but matches")
    return result


def _result(scene: Scene, config: OTAConfig, backend: str) -> tuple[Assignment, Plan | None]:
    """The assignment, and the plan where a backend lets it be looked at."""
    if backend == "torch":
        return solve_torch(scene, config)
    if backend == "triton":
        return _solve_triton(scene, config)
    return ota_assign(*scene, config, backend=backend, check=False), None


def _solve_triton(scene: Scene, config: OTAConfig) -> tuple[Assignment, Plan]:
    from kernels.assign_triton import solve
    from kernels.center_prior_triton import NO_POINT
    from kernels.pairs_triton import cost_scale

    match, pairs, state = solve(scene, config)
    num_points, slot = scene.grid.num_points, (pairs.point != NO_POINT.value).nonzero()[:, 0]
    gt, point, cost = pairs.gt[slot].long(), pairs.point[slot].long(), pairs.cost[slot].double()
    v = state.v[state.first[point // num_points] + state.column[slot].long()]
    log_plan = (state.u[gt] + v - cost) * math.log(2)
    points, inverse = torch.unique(point, return_inverse=True)
    v_of_point = torch.empty_like(points, dtype=v.dtype).scatter_(0, inverse, v)
    log_plan_bg = (state.u_background[points // num_points] + v_of_point) * math.log(2)
    return match, Plan(gt, point, cost / cost_scale(config), pairs.k.long(), log_plan, points, log_plan_bg)


def _compare_image(
    result: Parity, scene: Scene, config: OTAConfig, match: Assignment, plan: Plan | None, b: int, rows: Tensor
) -> None:
    wide = scene.logits[b].double(), scene.boxes[b].double(), scene.gt_boxes[rows].double()
    exact = assign_image(*wide, scene.gt_labels[rows], scene.grid, config)
    candidates, k = exact["candidates"], match.k[rows].long()
    if plan is not None:
        found, cost, log_plan = _dense(plan, b, rows, scene)
        result.require(torch.equal(found, candidates), f"image {b}: candidates differ")
        if not torch.equal(found, candidates):
            return
        relative = (exact["cost"][:-1] - exact["cost"][-1])[candidates]
        close = torch.isclose(cost[candidates], relative, rtol=COST_TOLERANCE, atol=COST_TOLERANCE)
        result.require(bool(close.all()), f"image {b}: {int((~close).sum())} costs differ")

    lowest, highest = _possible_k(exact, config)
    result.ground_truths += len(rows)
    result.ground_truths_excluded += int((lowest != highest).sum())
    wrong = rows[(k < lowest) | (k > highest)].tolist()
    result.require(not wrong, f"image {b}: k differs for ground truths {wrong}")
    active = candidates.any(0)
    result.points += int(active.sum())
    if not torch.equal(k, exact["k"]):
        result.points_excluded += int(active.sum())  # another k is another plan
        return

    if plan is not None:
        sent = torch.cat([candidates, active[None]])
        error = float(torch.where(sent, log_plan.exp() - exact["log_plan"].exp(), 0).abs().max())
        result.require(error <= PLAN_TOLERANCE, f"image {b}: plan differs by {error:.1e}")
    expected = torch.cat([rows, rows.new_tensor([-1])])[exact["supplier"]]
    open_points = ambiguous_points(exact["log_plan"], config)
    result.points_excluded += int((open_points & active).sum())
    same = match.gt_index[b] == expected
    wrong = (~same & ~open_points).nonzero()[:, 0].tolist()
    result.require(not wrong, f"image {b}: points {wrong} are matched otherwise")
    iou = torch.cat([exact["iou"], torch.zeros_like(exact["iou"][:1])]).gather(0, exact["supplier"][None])[0]
    wrong = (same & ((match.iou[b] - iou).abs() > IOU_TOLERANCE)).nonzero()[:, 0].tolist()
    result.require(not wrong, f"image {b}: IoU differs at points {wrong}")


def _possible_k(exact: dict[str, Tensor], config: OTAConfig) -> tuple[Tensor, Tensor]:
    """The supplies (m,) that rounding of the IoU sums may lead to."""
    if config.fixed_k is not None:
        return exact["k"], exact["k"]
    count, total = exact["candidates"].sum(1), sum_of_best(exact["iou"], exact["candidates"], config)
    margins = (-IOU_SUM_MARGIN, IOU_SUM_MARGIN)
    lowest, highest = (((total + margin).floor().long().clamp(min=1)).minimum(count) for margin in margins)
    return lowest, highest


def _dense(plan: Plan, b: int, rows: Tensor, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates (m, n), relative cost (m, n) and log plan (m + 1, n) of image b."""
    num_points = scene.grid.num_points
    cost = torch.full((len(rows), num_points), math.inf, dtype=torch.float64, device=rows.device)
    log_plan = torch.full((len(rows) + 1, num_points), -math.inf, dtype=torch.float64, device=rows.device)
    pair = torch.isin(plan.gt, rows)
    i, j = torch.searchsorted(rows, plan.gt[pair]), plan.flat_point[pair] % num_points
    cost[i, j], log_plan[i, j] = plan.cost[pair].double(), plan.log_plan[pair].double()
    here = plan.points // num_points == b
    log_plan[-1, plan.points[here] % num_points] = plan.log_plan_bg[here].double()
    return torch.isfinite(cost), cost, log_plan
