"""Measure a call: milliseconds, memory beyond inputs and outputs, kernel launches, host synchronisations.

A row is a dict of COLUMNS for a JSON file, with None for what this device cannot measure; or its `skipped` says why.
"""

import argparse
import json
import os
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import profile

from training.environment import environment

MIB = 2**20
FLUSH_BYTES = 2048 * MIB  # larger than the caches of a GPU; writing it takes longer than launching a few kernels
COLUMNS = "ms_median ms_quantile_20 ms_quantile_80 device_ms peak_mib kernel_launches copies_and_memsets host_syncs"
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of torch.profiler on stderr


def start(parser: argparse.ArgumentParser, argv: list[str] | None, repeats: int) -> tuple:
    """Parse the flags and print what the benchmark runs on: (flags, device, environment)."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file, rewritten after every row")
    parser.add_argument("--repeats", type=int, default=repeats, help="measured calls of a row")
    args, device = parser.parse_args(argv), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = environment(device)
    print(f"{about['device']}, threads {about['threads']}, torch {about['torch']}, triton {about['triton']}")
    return args, device, about


def write_report(path: Path | None, report: dict) -> None:
    """Replace the whole JSON file: a process killed while it writes leaves the previous one."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)


def line(name: str, row: dict | None = None, more: str = "") -> str:
    """A row of the printed table, with `more` columns; without a row its headings."""
    if row and "skipped" in row:
        return f"{name:34}{row['skipped']}"
    cells = {column: row[column] if row else column for column in f"{COLUMNS} {more}".split()}
    texts = {c: "-" if v is None else f"{v:,.3f}" if isinstance(v, float) else f"{v}" for c, v in cells.items()}
    return f"{name:34}" + "".join(f"{text:>{len(column) + 2}}" for column, text in texts.items())


def measure(call: Callable[[], Iterable[Tensor]], repeats: int, device: torch.device) -> dict:
    """The row of a call. `device_ms` leaves out what the host needs to launch the first kernels."""
    row = row_of(time_ms(call, repeats, device), call, device)
    if device.type == "cuda":
        row["device_ms"] = float(torch.tensor(time_ms(call, repeats, device, queued=True)).median())
    return row


def row_of(times_ms: list[float], call: Callable[[], Iterable[Tensor]], device: torch.device) -> dict:
    times = torch.tensor(times_ms, dtype=torch.float64)
    low, median, high = times.quantile(times.new_tensor([0.2, 0.5, 0.8])).tolist()
    counts = peak_mib(call, device), *launches(call, device), host_syncs(call, device)
    return dict(zip(COLUMNS.split(), (median, low, high, None, *counts), strict=True), calls=len(times))


def now(device: torch.device) -> torch.cuda.Event | float:
    """An event in the queue of a GPU; on a CPU the time in seconds."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed_ms(begin: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
    return 1e3 * (end - begin) if isinstance(begin, float) else begin.elapsed_time(end)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_ms(call: Callable[[], object], repeats: int, device: torch.device, *, queued: bool = False) -> list[float]:
    """Milliseconds of `repeats` calls, after a tenth as many to warm up; on a GPU with its caches flushed before each.

    `queued` launches while the device is still flushing; otherwise the device is idle when the call begins.
    """
    for _ in range(1 + repeats // 10):
        call()
    times, flush = [], torch.empty(FLUSH_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    for _ in range(repeats):
        flush.zero_()
        if not queued:
            wait_for(device)
        begin = now(device)
        call()
        end = now(device)
        wait_for(device)
        times.append(elapsed_ms(begin, end))
    return times


def peak_mib(call: Callable[[], Iterable[Tensor]], device: torch.device) -> float:
    """The most MiB that a call's tensors hold at a time, without inputs and outputs; on a CPU of the calling thread."""
    if device.type == "cuda":
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
    """A call's result and its events: the tensor memory of a CPU, the activities of a GPU."""
    with warnings.catch_warnings(), tempfile.NamedTemporaryFile(suffix=".json") as file:
        warnings.filterwarnings("ignore", "Warning: Profiler clears events")
        with profile(profile_memory=device.type != "cuda") as profiler:
            outputs = call()
            wait_for(device)
        profiler.export_chrome_trace(file.name)
        return outputs, json.loads(Path(file.name).read_text(errors="replace"))["traceEvents"]


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
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught)
