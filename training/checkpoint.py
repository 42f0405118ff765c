"""Checkpoints: all that a run needs to continue.

A checkpoint is `checkpoint-<step>.pt`: what torch.save writes, then its SHA-256 (32 bytes, which torch.load ignores).
The two newest are kept, so there is one to continue from while the next is being written.
"""

import contextlib
import hashlib
import io
import json
import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3

from errors import UserError
from model import Detector, write_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

KEPT = 2
DIGEST_BYTES = 32


class CheckpointError(UserError):
    """The run's folder cannot be read, written or used now; the message names it and the remedy."""


@contextlib.contextmanager
def disk_errors_named(folder: Path):
    """Turn an OSError into a CheckpointError that names the folder."""
    try:
        yield
    except OSError as error:
        newest = _newest_first(folder)[:1]
        kept = f"the last checkpoint, {newest[0].name}, is complete" if newest else "there is no checkpoint yet"
        remedy = "Make room there and start the same command again to continue, or name a writable folder with --out"
        raise CheckpointError(f"cannot write to {folder}: {error}; {kept}. {remedy}") from error


def resume(
    folder: Path, identity: dict, detector: Detector, ema: ModelEmaV3 | None, optimizer: torch.optim.Optimizer
) -> tuple[dict | None, bool]:
    """Restore the newest checkpoint on every rank and return it, None for a new run; and whether metrics.json exists.

    The main rank locks the folder until its process ends. `identity`: the settings that decide a run's result, as JSON.
    Raises CheckpointError: the folder cannot be used, or holds a run with other settings.
    """
    received = [None, False]
    if not dist.is_initialized() or dist.get_rank() == 0:
        _lock(folder)
        received = [load_checkpoint(folder), (folder / "metrics.json").exists()]
        _check_identity(folder, identity, received[0])
    if dist.is_initialized():
        dist.broadcast_object_list(received)
    checkpoint, complete = received
    if checkpoint:
        detector.load_state_dict(checkpoint["model"])
        for group, present in zip(checkpoint["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
            group["fused"] = present["fused"]  # the device's, which may be another now
        optimizer.load_state_dict(checkpoint["optimizer"])
        if ema:  # its counter is the step
            ema.module.load_state_dict(checkpoint["ema"])
    return checkpoint, complete


def _lock(folder: Path) -> None:
    """Create the folder and lock it until this process ends. Raises CheckpointError.

    A POSIX record lock: unlike flock's, loader processes do not inherit it, which outlive a killed parent by seconds.
    The descriptor stays open on purpose.
    """
    with disk_errors_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
                remedy = "Wait for that run or end it, or name another folder with --out"
                raise CheckpointError(f"{folder} is in use by {holder}. {remedy}") from error
        else:
            print(f"note: this system has no file locks; start no second run in {folder}", file=sys.stderr)
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for temporary in folder.glob(".*.tmp"):  # left by a kill
            temporary.unlink()


def _check_identity(folder: Path, identity: dict, checkpoint: dict | None) -> None:
    if checkpoint is None:
        if (folder / "log.jsonl").exists() or (folder / "ota.safetensors").exists():
            raise CheckpointError(f"{folder} holds a run already, without a checkpoint; name another folder with --out")
        return
    before = json.loads(checkpoint["identity"])
    names = [name for name in sorted(before.keys() | identity.keys()) if before.get(name) != identity.get(name)]
    if names:
        lines = [f"\n  {n}: was {before.get(n, 'unknown')}, is {identity.get(n, 'unknown')} now" for n in names]
        what = f"{folder} holds step {checkpoint['step']} of a run with other settings:{''.join(lines)}"
        raise CheckpointError(f"{what}\nGive the old ones to continue it, or name another folder with --out.")


def save_checkpoint(folder: Path, state: dict) -> None:
    """`state`: a `step`, and nothing except tensors, numbers, strings, lists and dicts. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    write_file(folder / f"checkpoint-{state['step']:08d}.pt", data + hashlib.sha256(data).digest())
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()


def load_checkpoint(folder: Path) -> dict | None:
    """Return the newest undamaged checkpoint, on the CPU; None where there is none.

    A damaged one is renamed *.damaged, with a warning. Raises CheckpointError: none can be read.
    """
    paths = _newest_first(folder)
    for path in paths:
        try:
            data = path.read_bytes()
            if hashlib.sha256(data[:-DIGEST_BYTES]).digest() != data[-DIGEST_BYTES:]:
                raise ValueError("its checksum does not fit, it was cut off or changed")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        except Exception as error:  # torch.load raises many types
            with disk_errors_named(folder):
                path.rename(path.with_suffix(".damaged"))
            print(f"note: {path} is damaged ({error}); kept as {path.stem}.damaged", file=sys.stderr)
    if paths:
        raise CheckpointError(f"every checkpoint in {folder} is damaged; start afresh with another --out")
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)
