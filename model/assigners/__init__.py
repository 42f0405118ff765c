"""Label assignment by name: OTA, and strategies to compare it with, on the same inputs and with the same result.

ota        optimal transport, for all objects of an image at once (kernels/)
fcos       near the centre, on the level of the object's size
retinanet  IoU of an anchor over a fixed threshold
atss       IoU of an anchor over a threshold from the object's statistics
paa        the better of two Gaussians fitted to the losses of an object's candidates
simota     the k cheapest points of each object, k from its IoUs
tal        the 13 points of each object that are best at class and box together
hungarian  one point per object, with the least cost over all objects
"""

import torch
from torch import Tensor

from kernels import Assignment, Inputs, OTAConfig, assignment_statistics, ota_assign

from .atss import atss_claims
from .claims import assign_claims
from .fcos import fcos_claims
from .hungarian import hungarian_claims
from .paa import paa_claims
from .retinanet import retinanet_claims
from .simota import simota_claims
from .tal import tal_claims

FUNCTIONS = fcos_claims, retinanet_claims, atss_claims, paa_claims, simota_claims, tal_claims, hungarian_claims
CLAIMS = {function.__name__.removesuffix("_claims"): function for function in FUNCTIONS}
STRATEGIES = ("ota", *CLAIMS)


@torch.no_grad()
def assign(strategy: str, inputs: Inputs, config: OTAConfig) -> Assignment:
    """Return what `kernels.ota_assign` returns, by any strategy; `config` is OTA's. Strategies other than OTA may give
    gt_index NEITHER to a point that is neither positive nor negative; their `k` counts the points an object claims."""
    return ota_assign(*inputs, config) if strategy == "ota" else assign_claims(CLAIMS[strategy], inputs)[0]


@torch.no_grad()
def assign_with_statistics(strategy: str, inputs: Inputs, config: OTAConfig) -> tuple[Assignment, Tensor, dict]:
    """Return the assignment, the ambiguous points (B, N) bool and numbers, as `kernels.assignment_statistics` does. For
    others these are points that several objects claim, and their share of the claimed points; no residual, no gap."""
    if strategy == "ota":
        return assignment_statistics(inputs, config)
    match, ambiguous = assign_claims(CLAIMS[strategy], inputs)
    positives, num_gts = (match.gt_index >= 0).sum().float(), (inputs.gt_labels >= 0).sum().clamp(min=1).float()
    share = ambiguous.sum() / positives.clamp(min=1)
    numbers = {"positives_per_gt": positives / num_gts, "mean_k": match.k.sum() / num_gts}
    numbers |= {"one_point": (match.k == 1).sum() / num_gts, "ambiguous": share}
    return match, ambiguous, numbers
