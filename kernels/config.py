"""Inputs, settings and results that all backends of ota_assign share."""

from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from .grid import PointGrid

CENTER_PRIORS = ("closest", "radius", "none")
CLS_COSTS = ("focal", "bce")
REG_COSTS = ("iou", "giou", "smooth_l1")
DEFAULT_RADIUS = {"closest": 5, "radius": 2.5, "none": 0}
INTEGER_SETTINGS = ("iterations", "top_q", "per_q", "fixed_k")  # a whole number of another type, as 20.0, is converted

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
GIOU_EPS = 1e-7  # added to both denominators of the GIoU loss, as in torchvision
IOU_FLOOR = 1.1920928955078125e-07  # float32 eps: -log IoU of boxes that do not meet is 15.9
NAMESPACE = __package__.replace(".", "_")  # of torch operators: a process may hold several copies of this folder
EMPTY_SUPPLY = 1e-12  # stands for a background supply of 0, whose logarithm is -inf


class Inputs(NamedTuple):
    """A batch, in the order of `ota_assign`'s parameters."""

    logits: Tensor  # (B, N, C)
    boxes: Tensor  # (B, N, 4)
    gt_boxes: Tensor  # (G, 4)
    gt_labels: Tensor  # (G,)
    gt_offsets: Tensor  # (B + 1,)
    grid: PointGrid

    def to(self, device: torch.device) -> "Inputs":
        return self._make([*(tensor.to(device) for tensor in self[:5]), self.grid])


@dataclass(frozen=True)
class OTAConfig:
    """Settings of optimal transport assignment; the defaults are the paper's (section 4.1), decoded as in its code."""

    alpha: float = 1.5  # weight of the regression cost (equation 6)
    eps: float = 0.1  # entropic regularisation of Sinkhorn-Knopp (equation 9)
    iterations: int = 50  # Sinkhorn iterations T
    top_q: int = 20  # dynamic k: the supply of a ground truth is the floor of the sum of its top_q best IoUs
    per_q: int = 1  # but at most one in per_q of its candidates counts; 1 is the paper's rule
    fixed_k: int | None = None  # the same supply for every ground truth instead; None is dynamic k
    # "closest": the radius^2 points per level closest to the box centre, inside the box (the paper)
    # "radius": points inside the box, closer than radius strides to its centre along x and y
    # "none": all points inside the box
    # An object without a candidate keeps its closest point (the authors' code: its cheapest ones).
    center_prior: str = "closest"
    radius: float | None = None  # None is 5 for "closest", 2.5 for "radius"
    cls_cost: str = "focal"  # "focal" or "bce"
    reg_cost: str = "iou"  # "iou" (-log IoU), "giou" (1 - GIoU) or "smooth_l1" (sides in strides)
    rescale: bool = True  # divide every supplier's row of the plan by its maximum before each point picks its supplier

    def __post_init__(self):
        for name, allowed in (("center_prior", CENTER_PRIORS), ("cls_cost", CLS_COSTS), ("reg_cost", REG_COSTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"OTAConfig.{name} is {getattr(self, name)!r:.40}, choose from {', '.join(allowed)}")
        if not isinstance(self.rescale, bool):
            raise TypeError(f"OTAConfig.rescale is {self.rescale!r:.40}, it must be True or False")
        if self.radius is None:
            object.__setattr__(self, "radius", DEFAULT_RADIUS[self.center_prior])
        for name in ("alpha", "eps", "radius", *INTEGER_SETTINGS):
            value, integer = getattr(self, name), name in INTEGER_SETTINGS
            if value is None and name == "fixed_k":
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise TypeError(f"OTAConfig.{name} is {value!r:.40}, it must be a number")
            if not abs(value) < 2**30:  # kernels add to settings in 32 bits; NaN fails, too
                raise ValueError(f"OTAConfig.{name} is {value!r:.40}, it must be a finite number below 2^30")
            if integer and (value < 1 or value != int(value)):
                raise ValueError(f"OTAConfig.{name} is {value}, it must be at least 1 and a whole number")
            object.__setattr__(self, name, int(value) if integer or isinstance(value, int) else float(value))
        if self.center_prior == "closest" and (not 1 <= self.radius <= 100 or self.radius != int(self.radius)):
            raise ValueError(
                f"OTAConfig.radius is {self.radius}: 'closest' takes radius^2 points, a whole number to 100"
            )
        if self.center_prior == "radius" and not 0 < self.radius < 2**14:
            raise ValueError(f"OTAConfig.radius is {self.radius}: 'radius' needs 0 < radius < {2**14} strides")
        if self.eps < 1e-6 or self.alpha < 0:  # below, cost / eps leaves float32
            raise ValueError(f"OTAConfig needs eps >= 1e-6 and alpha >= 0, not eps={self.eps}, alpha={self.alpha}")


class Assignment(NamedTuple):
    """Labels of a batch."""

    gt_index: Tensor  # (B, N) int64, row in gt_boxes of the matched ground truth, -1 = background
    iou: Tensor  # (B, N) float32, IoU of the predicted and the matched box, 0 for background
    k: Tensor  # (G,) int32, supply of every ground truth, 0 for a row that takes no part


class Plan(NamedTuple):
    """A solved transport problem of a batch, over P candidate pairs (sorted by ground truth) and A candidate points."""

    gt: Tensor  # (P,) row in gt_boxes
    flat_point: Tensor  # (P,) image * N + point
    cost: Tensor  # (P,) D, relative to the background cost of the point
    k: Tensor  # (G,) int64
    log_plan: Tensor  # (P,)
    points: Tensor  # (A,) ascending flat points that are a candidate of some ground truth
    log_plan_bg: Tensor  # (A,)

    @property
    def column(self) -> Tensor:  # (P,) places in `points` of the pairs' points
        return torch.searchsorted(self.points, self.flat_point)
