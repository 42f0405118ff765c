"""A profile of a few training steps, for --profile."""

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler tells stderr that it starts, and finds no GPU
WARMUP_STEPS = 5  # compiling, choosing algorithms, filling the allocator's cache


class StepTrace:
    """Call `done()` at the beginning of every step; it is true once `steps` of them are in `path` and on screen.

    With a `path` of None, on ranks that are not profiled, it is true at the same step.
    """

    def __init__(self, steps: int, path: Path | None, device: torch.device) -> None:
        self.steps, self.path, self.device, self.seen = steps, path, device, 0
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profiler = profile(activities=activities)

    def done(self) -> bool:
        if self.seen == WARMUP_STEPS and self.path:
            self.profiler.start()
        self.seen += 1
        if self.seen <= WARMUP_STEPS + self.steps:
            return False
        if not self.path:
            return True
        self.profiler.stop()
        self.profiler.export_chrome_trace(str(self.path))
        device = "cuda" if self.device.type == "cuda" else "cpu"
        averages = self.profiler.key_averages()
        print(averages.table(sort_by=f"self_{device}_time_total", row_limit=25, max_name_column_width=50))
        print(f"wrote {self.path}: {self.steps} steps after {WARMUP_STEPS}, for ui.perfetto.dev or chrome://tracing")
        return True
