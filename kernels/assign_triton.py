"""Optimal transport assignment in Triton: find_pairs, a library sort by point, sinkhorn.

A call launches the copy of a table, six fills (two aranges among them), find_pairs, a stable sort, a searchsorted and
sinkhorn. Nothing waits for the device and no shape depends on data, so a CUDA graph can capture a call of compiled
kernels.
"""

import torch

from .config import Assignment, Inputs, OTAConfig
from .pairs_triton import Pairs, find_pairs
from .sinkhorn_triton import Potentials, sinkhorn


def solve(inputs: Inputs, config: OTAConfig) -> tuple[Assignment, Pairs, Potentials]:
    """The assignment, and the pairs and potentials that it comes from."""
    inputs = Inputs(*(tensor.contiguous() for tensor in inputs[:5]), inputs.grid)
    with torch.cuda.device_of(inputs.boxes):
        pairs = find_pairs(inputs, config)
        match, potentials = sinkhorn(pairs, inputs, config)
    return match, pairs, potentials


def ota_assign_triton(inputs: Inputs, config: OTAConfig) -> Assignment:
    """The contract of `ota_assign`, on a GPU, or on a CPU in Triton's interpreter."""
    return solve(inputs, config)[0]
