"""How long one program's warps take to hand values to one another: store, barrier, load, nothing to overlap it with.

An iteration of Sinkhorn has two phases, and each needs what all warps of the last one have stored.
"""

from statistics import median

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.measure import time_ms

WARPS = 16
STEPS = (2**12, 2**15)  # two loop lengths: what a launch costs cancels in their difference


@triton.jit
def _round_trip_kernel(buffer, out, steps, LANES: tl.constexpr, WARP: tl.constexpr):
    """Hand lane numbers on from warp to warp; the two halves of the buffer (2 * LANES,) take turns."""
    lane = tl.arange(0, LANES)
    before = (lane + LANES - WARP) % LANES
    value = lane
    for step in range(steps):
        half = buffer + step % 2 * LANES
        tl.store(half + lane, value)
        tl.debug_barrier()
        value = tl.load(half + before)
    tl.store(out + lane, value)


def hand_on(steps: int, device: torch.device, warp_size: int) -> Tensor:
    """(lanes,) int32: the lane whose number has reached each lane, `steps` warps earlier in a ring of WARPS."""
    lanes = WARPS * warp_size
    buffer = torch.empty(2 * lanes, dtype=torch.int32, device=device)
    out = torch.empty(lanes, dtype=torch.int32, device=device)
    _round_trip_kernel[(1,)](buffer, out, steps, LANES=lanes, WARP=warp_size, num_warps=WARPS, num_stages=1)
    return out


def round_trip_us(device: torch.device, repeats: int = 20) -> float | None:
    """Microseconds per step, from the median times of two loop lengths; None where the values do not arrive."""
    warp_size = torch.cuda.get_device_properties(device).warp_size
    short, long = STEPS
    expected = (torch.arange(WARPS * warp_size, device=device) - (long - 1) * warp_size) % (WARPS * warp_size)
    if not torch.equal(hand_on(long - 1, device, warp_size).long(), expected):
        print("the round trip kernel hands on wrong values here, so its time would mean nothing: no chain")
        return None
    short_ms, long_ms = (
        median(time_ms(lambda n=steps: hand_on(n, device, warp_size), repeats, device, queued=True)) for steps in STEPS
    )
    return 1e3 * (long_ms - short_ms) / (long - short)
