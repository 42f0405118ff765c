"""A profile of a few training steps, for --profile."""

import os
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's notes on stderr
WARMUP_STEPS = 5  # compiling, choosing algorithms, filling the allocator's cache


def start_trace(steps: int, path: Path, device: torch.device) -> profile:
    """A profiler to call `step()` on after every step; after the last one `path` and a table on screen are written."""

    def write(trace: profile) -> None:
        trace.export_chrome_trace(str(path))
        by = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
        print(trace.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=50))
        print(f"wrote {path}: {steps} steps after {WARMUP_STEPS}, for ui.perfetto.dev or chrome://tracing")

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    plan = schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1)
    trace = profile(activities=activities, schedule=plan, on_trace_ready=write)
    trace.start()
    return trace
