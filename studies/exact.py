"""The transport problem of label assignment, solved exactly by a linear program.

    min_x  sum_p D_p x_p    so that   sum of x_p over the pairs of ground truth i = k_i
                                      sum of x_p over the pairs of point j       <= 1,   x >= 0

over the P candidate pairs of a `Plan`; D is relative to the background cost of the point. Background costs 0 and takes
what is left of a point's unit, which meets its supply n - sum k_i, so it needs no row. Such constraints are totally
unimodular: with integer supplies every vertex is a plan of zeros and ones, and the simplex method ends at a vertex. So
the exact plan is a labelling.
"""

import numpy as np
import torch
from torch import Tensor

from errors import UserError
from kernels.config import Plan

INFEASIBLE = 2  # scipy's status
INTEGER_TOLERANCE = 1e-6
DUAL_TOLERANCE = 1e-7  # HiGHS's, of reduced costs: its plan costs at most this much too much for each point


class NoPlanError(UserError):
    """The ground truths together supply more units than their candidate points can take."""


def highs():
    """scipy's linprog and csr_array. Raises UserError where scipy is missing."""
    try:
        from scipy.optimize import linprog
        from scipy.sparse import csr_array
    except ImportError as error:
        raise UserError('the exact solver needs the package scipy: pip install -e ".[test]"') from error
    return linprog, csr_array


def exact_units(plan: Plan, supplies: Tensor) -> Tensor:
    """Units (P,) of the least cost that send `supplies` (G,); of `plan` only costs are read. Raises as exact_pairs."""
    linprog, csr_array = highs()
    num_pairs, num_rows, num_points = len(plan.gt), len(plan.k), len(plan.points)
    if num_pairs == 0:
        return torch.zeros(0)
    pair, ones = np.arange(num_pairs), np.ones(num_pairs)
    result = linprog(
        plan.cost.double().numpy(),
        A_eq=csr_array((ones, (plan.gt.numpy(), pair)), shape=(num_rows, num_pairs)),
        b_eq=supplies.double().numpy(),
        A_ub=csr_array((ones, (plan.column.numpy(), pair)), shape=(num_points, num_pairs)),
        b_ub=np.ones(num_points),
        method="highs-ds",
    )
    if result.status == INFEASIBLE:
        raise NoPlanError(f"{supplies.sum():g} units of {num_rows} ground truths do not fit their {num_points} points")
    if not result.success:
        raise RuntimeError(f"HiGHS did not solve the linear program: {result.message}")
    return torch.from_numpy(result.x)


def exact_pairs(plan: Plan) -> Tensor:
    """The candidate pairs (P,) bool that the exact plan uses; of `plan` only costs and supplies are read.

    If several plans cost the same, as with two equal boxes, one of them. Images do not share points, so the plan of
    several is that of each. Raises NoPlanError, and UserError where scipy is missing.
    """
    sent = exact_units(plan, plan.k)
    if len(sent) and (sent - sent.round()).abs().max() > INTEGER_TOLERANCE:
        raise RuntimeError("HiGHS ended at a plan that is not integral, so not at a vertex")
    return sent > 0.5


def exact_labels(plan: Plan, pairs: Tensor) -> Tensor:
    """Row in gt_boxes of every candidate point (A,), -1 for background; `pairs` (P,) bool is the exact plan."""
    labels = torch.full_like(plan.points, -1)
    labels[torch.searchsorted(plan.points, plan.flat_point[pairs])] = plan.gt[pairs]
    return labels
