"""The folder of a run: checkpoints, log, weights, curves, TensorBoard events, and the trace of --profile.

A checkpoint, `checkpoint-<step>.pt`, is what torch.save writes, then its SHA-256, which torch.load ignores.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile, schedule
from tqdm import tqdm

from data import CocoDataset
from data.draw import draw_curves, draw_detections, save_contact_sheet
from errors import UserError
from model import Detector, save_weights, write_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

DIGEST_BYTES = 32
SAMPLES = 8  # pictures in samples.png
REDRAW_S = 60  # between two drawings of the curves, which take a second
WARMUP_STEPS = 5  # before a trace: compiling, choosing algorithms, filling the allocator's cache
LOWER_LR = "A lower --lr or a longer --warmup is the usual remedy."


@contextlib.contextmanager
def disk_errors_named(folder: Path):
    """Turn an OSError into a UserError that names the folder."""
    try:
        yield
    except OSError as error:
        newest = _newest_first(folder)[:1]
        kept = f"the last checkpoint, {newest[0].name}, is complete" if newest else "there is no checkpoint yet"
        remedy = "Make room there and start the same command again to continue, or name a writable folder with --out"
        raise UserError(f"cannot write to {folder}: {error}; {kept}. {remedy}") from error


def resume(folder: Path, identity: dict, parts: dict[str, nn.Module | Optimizer]) -> tuple[dict | None, bool]:
    """Restore `parts` on every rank. Return the newest checkpoint, None for a new run, and whether metrics.json exists.
    The main rank locks the folder until its process ends. Raises UserError: the folder cannot be used, or holds a run
    with another `identity` (the settings that decide the result, as JSON)."""
    received = [None, False]
    if not dist.is_initialized() or dist.get_rank() == 0:
        _lock(folder)
        received = [load_checkpoint(folder), (folder / "metrics.json").exists()]
        _check_identity(folder, identity, received[0])
    if dist.is_initialized():
        dist.broadcast_object_list(received)
    checkpoint, complete = received
    if checkpoint:
        saved, present = checkpoint["optimizer"]["param_groups"], parts["optimizer"].param_groups
        for group, now in zip(saved, present, strict=True):
            group["fused"] = now["fused"]  # the device's, which may be another now
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    return checkpoint, complete


def _lock(folder: Path) -> None:
    # A POSIX record lock, not flock's: loader processes, which outlive a killed parent by seconds, do not inherit it.
    with disk_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)  # open until the process ends
        if fcntl:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
                remedy = "Wait for that run or end it, or name another folder with --out"
                raise UserError(f"{folder} is in use by {holder}. {remedy}") from error
        else:
            print(f"note: this system has no file locks; start no second run in {folder}", file=sys.stderr)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for temporary in folder.glob(".*.tmp"):  # left by a kill
            temporary.unlink()


def _check_identity(folder: Path, identity: dict, checkpoint: dict | None) -> None:
    if checkpoint is None and any((folder / name).exists() for name in ("log.jsonl", "ota.safetensors")):
        raise UserError(f"{folder} holds a run already, without a checkpoint; name another folder with --out")
    before = json.loads(checkpoint["identity"]) if checkpoint else identity
    names = [name for name in sorted(before.keys() | identity.keys()) if before.get(name) != identity.get(name)]
    if names:
        lines = [f"\n  {n}: was {before.get(n, 'unknown')}, is {identity.get(n, 'unknown')} now" for n in names]
        what = f"{folder} holds step {checkpoint['step']} of a run with other settings:{''.join(lines)}"
        raise UserError(f"{what}\nGive the old ones to continue it, or name another folder with --out.")


def save_checkpoint(folder: Path, state: dict) -> None:
    """`state`: a `step`, and nothing except tensors, numbers, strings, lists and dicts. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_file(folder / f"checkpoint-{state['step']:08d}.pt", data + hashlib.sha256(data).digest())
    for old in _newest_first(folder)[2:]:  # the second newest is complete while the next one is written
        old.unlink()


def load_checkpoint(folder: Path) -> dict | None:
    """Return the newest checkpoint, on the CPU, or None; rename damaged ones. Raises UserError: none can be read."""
    for path in (paths := _newest_first(folder)):
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
                raise ValueError("its checksum does not fit, it was cut off or changed")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}") from error
        except Exception as error:  # torch.load raises many types
            with disk_errors_named(folder):
                path.rename(path.with_suffix(".damaged"))
            print(f"note: {path} is damaged ({error}); kept as {path.stem}.damaged", file=sys.stderr)
    if paths:
        raise UserError(f"every checkpoint in {folder} is damaged; start afresh with another --out")
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)


@dataclass
class RunFolder:
    """The files of a run, which the main rank writes. Every method raises UserError when it cannot write."""

    path: Path
    settings: dict  # the command, its flags, versions and dates, as JSON
    identity: dict  # those of them that decide the result, to be compared when the run is continued
    metadata: dict  # class names, ids and the data set, for weights files
    steps: int
    step: int  # after which the run continues
    log: list[dict]  # lines of log.jsonl up to `step`

    def __post_init__(self) -> None:
        self._drawn_at, self._events = time.monotonic(), None
        with disk_errors_named(self.path):
            write_file(self.path / "args.json", json.dumps(self.settings, indent=1).encode())
            if (self.path / "log.jsonl").exists():
                write_file(self.path / "log.jsonl", self._log_text().encode())
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                return
            self._events = SummaryWriter(self.path / "tensorboard", purge_step=self.step + 1)

    def _log_text(self) -> str:
        return "".join(json.dumps(line) + "\n" for line in self.log)

    def write_line(self, line: dict) -> None:
        """Add a line to the log, its numbers to TensorBoard, and now and then draw the curves."""
        self.log.append(line)
        with disk_errors_named(self.path):
            with open(self.path / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if self._events:
                group = "evaluation" if "AP" in line else "training"
                for name, value in line.items():
                    if isinstance(value, int | float):
                        self._events.add_scalar(f"{group}/{name}", value, line["step"])
                self._events.flush()
            if time.monotonic() - self._drawn_at > REDRAW_S:
                draw_curves(self.log, self.path / "curves.png")
                self._drawn_at = time.monotonic()

    def write_step(self, line: dict, bar: tqdm, seconds_left: float) -> None:
        """Add a line and show it: behind the bar, or, without a terminal, on a new line."""
        self.write_line(line)
        losses = "loss {loss:.3f} (cls {cls:.3f} box {box:.3f} iou {iou:.3f})  pos/gt {positives_per_gt:.1f}"
        text = f"{losses.format(**line)}  {line['images_per_s']:.1f} img/s  wait {line['data_wait']:.0%}"
        bar.set_postfix_str(text)
        if bar.disable:
            print(f"step {line['step']}/{self.steps}  {text}  eta {tqdm.format_interval(seconds_left)}", flush=True)

    def save_weights(self, detector: Detector, step: int, metrics: dict | None, name: str = "ota.safetensors") -> None:
        training = {"step": step, "steps": self.steps, "metrics": metrics, **self.settings}
        with disk_errors_named(self.path):
            save_weights(self.path / name, detector, {**self.metadata, "training": training})

    def write_evaluation(self, detector: Detector, step: int, metrics: dict, split: str) -> None:
        """Write weights with their metrics, also as best.safetensors where no evaluation before gave as high an AP."""
        self.save_weights(detector, step, metrics)
        best_ap = max((line["AP"] for line in self.log if "AP" in line), default=-math.inf)
        if metrics["AP"] > best_ap:
            self.save_weights(detector, step, metrics, "best.safetensors")
        self.write_line({"step": step, "split": split, **metrics})
        remark = ", the best so far" if metrics["AP"] > best_ap > -math.inf else ""
        crowd = f"  CrowdHuman's MR^-2 {metrics['crowd_MR']:.4f}" if "crowd_MR" in metrics else ""
        tqdm.write(f"step {step}: AP {metrics['AP']:.4f}  AP50 {metrics['AP50']:.4f}{crowd} ({split}{remark})")

    def save_checkpoint(self, step: int, window: list[dict], parts: dict[str, nn.Module | Optimizer]) -> None:
        """Save the states of `parts`, the losses since the last line of the log, log and settings; no random states, as
        every step and sample is seeded. Raises UserError for weights that are not finite."""
        if broken := [name for name, p in parts["model"].named_parameters() if not torch.isfinite(p).all()]:
            what = f"step {step}: parameters that are not finite: {len(broken)}, {broken[0]} first"
            raise UserError(f"{what}; so no checkpoint is written; the one before is in {self.path}. {LOWER_LR}")
        about = {"step": step, "identity": json.dumps(self.identity), "settings": json.dumps(self.settings)}
        about |= {"log": self._log_text(), "window": window}
        with disk_errors_named(self.path):
            save_checkpoint(self.path, about | {name: part.state_dict() for name, part in parts.items()})

    @torch.no_grad()
    def finish(self, detector: Detector, dataset: CocoDataset, metrics: dict, seconds: float) -> None:
        """Write metrics.json, with which a run is complete, and pictures with the detections that `predict` gives."""
        about = {"data": str(dataset.split.annotations), "images": len(dataset), "total_s": round(seconds)}
        with disk_errors_named(self.path):
            write_file(self.path / "metrics.json", json.dumps(about | metrics, indent=1).encode())
            samples = (dataset[i] for i in range(0, len(dataset), -(-len(dataset) // SAMPLES)))
            pictures = [draw_detections(x, t["boxes"], *detector.eval().predict(x)) for x, t in samples]
            save_contact_sheet(pictures, self.path / "samples.png")
            draw_curves(self.log, self.path / "curves.png")
        print(f"wrote {self.path}: ota.safetensors, best.safetensors, log.jsonl, metrics.json, curves.png, samples.png")


def start_trace(steps: int, path: Path, device: torch.device) -> profile:
    """Return a profiler whose `step()` follows every step; after the last it writes `path` and prints a table."""

    def write(trace: profile) -> None:
        trace.export_chrome_trace(str(path))
        by = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
        print(trace.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=50))
        print(f"wrote {path}: {steps} steps after {WARMUP_STEPS}, for ui.perfetto.dev or chrome://tracing")

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # silences the profiler's notes on stderr
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    plan = schedule(wait=0, warmup=WARMUP_STEPS, active=steps, repeat=1)
    trace = profile(activities=activities, schedule=plan, on_trace_ready=write)
    trace.start()
    return trace
