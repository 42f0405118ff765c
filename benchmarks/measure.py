"""What one call costs: milliseconds, memory beyond inputs and outputs, launches, waits of the host for the device."""

import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
FLUSH_BYTES = 512 * MIB  # more than any cache of a GPU; writing it takes longer than launching a graph
SYNC_WARNING = "called a synchronizing CUDA operation"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch.profiler tells stderr that it starts and finds no GPU


@dataclass
class Row:
    """One line of the table; None is what cannot be measured on this device, or means nothing for this row."""

    ms_median: float
    ms_quantile_20: float
    ms_quantile_80: float
    calls: int  # that were timed
    peak_mib: float | None  # of tensors, beyond inputs and outputs; on a CPU of the calling thread
    kernel_launches: int | None
    copies_and_memsets: int | None
    host_syncs: int | None


def measure(
    call: Callable[[], Iterable[torch.Tensor]], repeats: int, device: torch.device, *, replay: bool = False
) -> Row:
    """A row; `replay` for a captured graph, whose memory was set aside before and which is timed without its launch."""
    times = torch.tensor(time_ms(call, repeats, device, queued=replay), dtype=torch.float64)
    low, median, high = times.quantile(times.new_tensor([0.2, 0.5, 0.8])).tolist()
    memory = None if replay else peak_mib(call, device)
    return Row(median, low, high, repeats, memory, *launches(call, device), host_syncs(call, device))


def time_ms(call: Callable[[], object], repeats: int, device: torch.device, *, queued: bool = False) -> list[float]:
    """Milliseconds of every one of `repeats` calls, after a tenth as many to warm up.

    On a GPU between two events, the caches flushed before. `queued` launches a call while the device is still
    flushing, which leaves device time; otherwise the device is idle when the call begins, and launching counts.
    """
    for _ in range(1 + repeats // 10):
        call()
    if device.type != "cuda":
        return [_host_ms(call) for _ in range(repeats)]
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    return [_event_ms(call, flush, queued) for _ in range(repeats)]


def _host_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _event_ms(call: Callable[[], object], flush: torch.Tensor, queued: bool) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    if not queued:
        torch.cuda.synchronize(flush.device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def peak_mib(call: Callable[[], Iterable[torch.Tensor]], device: torch.device) -> float:
    """The most MiB that a call's tensors hold at a time, its inputs and outputs left out.

    On a CPU the profiler sees the calling thread only. What a thread of a pool allocates by itself is left out: the
    buffers of the losses' torch backend, 512 KiB a thread, when it has several.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        outputs = call()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        outputs, events = _traced(call, device)
        changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
        peak = max(accumulate(change for _, change in sorted(changes)), default=0)
    return (peak - sum(tensor.nbytes for tensor in outputs)) / MIB


def launches(call: Callable[[], object], device: torch.device) -> tuple[int | None, int | None]:
    """Kernels of a call on a GPU, and its copies and memsets; None where the profiler sees no kernel."""
    if device.type != "cuda":
        return None, None
    kinds = Counter(event.get("cat") for event in _traced(call, device)[1])
    return (kinds["kernel"], kinds["gpu_memcpy"] + kinds["gpu_memset"]) if kinds["kernel"] else (None, None)


def _traced(call: Callable[[], object], device: torch.device) -> tuple[object, list[dict]]:
    """A call's result, and its events: the tensor memory of a CPU, the activities of a GPU."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        with profile(activities=activities, profile_memory=not on_gpu) as profiler:
            outputs = call()
            if on_gpu:
                torch.cuda.synchronize(device)
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return outputs, json.loads(path.read_text(errors="replace"))["traceEvents"]


def host_syncs(call: Callable[[], object], device: torch.device) -> int | None:
    """How often a call makes the host wait for a GPU, as far as PyTorch's sync debug mode notices."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum(SYNC_WARNING in str(warning.message) for warning in caught)
