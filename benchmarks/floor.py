"""What no implementation of ota_assign can beat on a device: the bytes it has to move, and its chain of iterations.

    bytes  = P logit + A box + ground truths + outputs
    chain  = 2 T round trips

P candidate pairs, one logit each; A distinct candidate points, one predicted box (4 values) each; boxes, labels and
offsets of the ground truths, read once; gt_index (B, N) int64, iou (B, N) float32 and k (G,) int32, written once. The
bytes move at the measured rate of a large copy. T Sinkhorn iterations are 2 T phases, each of which needs what the
phase before has stored: at least one store, barrier and load within a program, on a GPU.
"""

from dataclasses import dataclass
from statistics import median

import torch

from benchmarks.measure import MIB, time_ms
from kernels import OTAConfig
from kernels.assign import HAS_TRITON
from kernels.assign_torch import solve
from tests.support.scenes import Scene

COPY_BYTES = {"cpu": 256 * MIB, "cuda": 1024 * MIB}
INDEX_BYTES, IOU_BYTES, K_BYTES = 8, 4, 4


@dataclass
class Rates:
    """What the floor of every workload is computed from, measured once."""

    copy_gb_per_s: float  # read and written bytes together, 1e9 of them a GB
    round_trip_us: float | None  # None without a GPU or without Triton


@dataclass
class Floor:
    candidate_pairs: int
    candidate_points: int
    bytes: int
    bytes_ms: float
    chain_ms: float | None  # None where the round trip was not measured

    @property
    def ms(self) -> float:
        return self.bytes_ms + (self.chain_ms or 0.0)


def measure_rates(device: torch.device) -> Rates:
    source = torch.rand(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    copy_ms = median(time_ms(lambda: target.copy_(source), 20, device, queued=True))
    round_trip = None
    if device.type == "cuda" and HAS_TRITON:
        from benchmarks.round_trip import round_trip_us

        round_trip = round_trip_us(device)
    return Rates(2 * source.nbytes / copy_ms / 1e6, round_trip)


def floor_of(scene: Scene, config: OTAConfig, rates: Rates) -> Floor:
    _, plan = solve(scene, config)
    pairs, points = plan.gt.numel(), plan.points.numel()
    num_images, num_points = scene.boxes.shape[:2]
    moved = pairs * scene.logits.itemsize + points * 4 * scene.boxes.itemsize
    moved += scene.gt_boxes.nbytes + scene.gt_labels.nbytes + scene.gt_offsets.nbytes
    moved += num_images * num_points * (INDEX_BYTES + IOU_BYTES) + len(scene.gt_boxes) * K_BYTES
    chain_ms = None if rates.round_trip_us is None else 2 * config.iterations * rates.round_trip_us / 1e3
    return Floor(pairs, points, moved, moved / rates.copy_gb_per_s / 1e6, chain_ms)
