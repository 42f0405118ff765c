"""The rows of the table: every way to call ota_assign that a machine offers, or in a few words why it does not."""

import textwrap
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from kernels import Assignment, OTAConfig, ota_assign
from kernels.assign import HAS_TRITON
from tests.support.scenes import Scene

Call = Callable[[], Assignment]


class DenseLimits(NamedTuple):
    """Ground truths x points up to which the dense reference is run; float64 takes about 80 bytes of each."""

    image: int  # one image, for parity
    compared: int  # the images compared for parity together
    batch: int  # one batch, for time


DENSE_LIMITS = {
    "cpu": DenseLimits(10_000_000, 20_000_000, 500_000),
    "cuda": DenseLimits(50_000_000, 150_000_000, 50_000_000),
}


def calls_of(scene: Scene, config: OTAConfig) -> dict[str, Call | str]:
    """A call by the name of its row, or the reason why there is none."""
    plain = partial(ota_assign, *scene, config)
    device = scene.boxes.device
    fits = len(scene.gt_boxes) * scene.grid.num_points <= DENSE_LIMITS[device.type].batch
    calls = {
        "reference": partial(plain, backend="reference") if fits else "too large here",
        "torch": partial(plain, backend="torch"),
    }
    if device.type == "cuda":
        calls["triton"] = partial(plain, backend="triton") if HAS_TRITON else "triton is not installed"
        calls["triton graph"] = captured(calls["triton"]) if HAS_TRITON else "triton is not installed"
    return calls


def captured(call: Call) -> Call | str:
    """A replay of the call from a CUDA graph; its result is overwritten by the next replay."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            match = call()
    except RuntimeError as error:
        return f"cannot be captured: {_in_short(error)}"

    def replay() -> Assignment:
        graph.replay()
        return match

    return replay


def _in_short(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 90, placeholder=" ...")
