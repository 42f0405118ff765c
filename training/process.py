"""Devices, ranks and signals."""

import atexit
import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from errors import UserError

# In rising precedence: torchrun sends SIGTERM after SIGINT. Windows has no SIGUSR1.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM", "SIGINT") if hasattr(signal, name))
WAIT_S = 0.1  # between two looks at the store
ONE_SIGNAL_S = 1.0  # a terminal's SIGINT reaches a rank twice: as one of the process group, and again from torchrun


def end_children() -> None:
    """Kill loader processes: they ignore SIGTERM, and Python would wait forever if a traceback keeps the loader."""
    for process in multiprocessing.active_children():
        process.kill()


def store_of_this_start() -> tuple[dist.Store, int, int]:
    """Return torchrun's store under a prefix that no earlier start of these ranks has used, rank and world size.
    After a restart the store still holds the addresses of the processes that ended, and a quick rank would use them.
    So rank 0 draws a prefix, and every other rank takes the one under which rank 0 has read the rank's random name."""
    store, rank, world = next(dist.rendezvous("env://"))
    name = prefix = uuid.uuid4().hex
    if rank == 0:
        store.set("start", name)
        store.set(f"{name}/all", "".join(store.get(f"{name}/{other}").decode() for other in range(1, world)))
    while rank and not (store.check([f"{prefix}/all"]) and name in store.get(f"{prefix}/all").decode()):
        prefix = store.get("start").decode()
        store.set(f"{prefix}/{rank}", name)
        time.sleep(WAIT_S)
    return dist.PrefixStore(prefix, store), rank, world


_store: dist.Store | None = None
_waits = itertools.count()


def _wait_for(name: str) -> str:
    # A collective would end with its group's time limit of minutes, and Python handles no signal in it.
    while not _store.check([name]):
        time.sleep(WAIT_S)
    return _store.get(name).decode()


def wait_for_main() -> None:
    """Hold every other rank until rank 0 calls this too."""
    name = f"main has arrived {next(_waits)}"
    if dist.is_initialized():
        _store.set(name, "") if dist.get_rank() == 0 else _wait_for(name)


def from_main(make: Callable[[], Any]) -> Any:
    """Return what `make` returns on the first rank of this machine, its only caller; raise its UserError on all."""
    local, ranks = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if not dist.is_initialized() or ranks == 1:
        return make()
    name = f"from rank {dist.get_rank() - local}, {next(_waits)}"
    if local:
        with open(_wait_for(name), "rb") as file:
            result, error = pickle.load(file)
        _store.add(f"{name}, read", 1)
    else:
        try:
            result, error = make(), None
        except UserError as raised:
            result, error = None, raised
        with tempfile.NamedTemporaryFile() as file:
            pickle.dump((result, error), file, pickle.HIGHEST_PROTOCOL)
            file.flush()
            _store.set(name, file.name)
            while _store.add(f"{name}, read", 0) < ranks - 1:
                time.sleep(WAIT_S)
    if error:
        raise error
    return result


def setup_distributed(device: str | None) -> tuple[torch.device, int, int]:
    """Return device, rank and world size; start the process group under torchrun. Raises UserError."""
    atexit.register(end_children)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
            torch.cuda.set_device(device)
        if device.type not in ("cuda", "cpu", "mps"):
            raise RuntimeError("it has to be one of cuda, cpu, mps")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        remedy = "Start one process per GPU, or pass --device cpu"
        raise UserError(f"rank {rank} cannot use --device {device}: {error}. {remedy}") from error
    if world > 1:
        global _store
        _store, rank, world = store_of_this_start()
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo: without waiting for the GPU
        dist.init_process_group(backend, store=_store, rank=rank, world_size=world)
    return device, rank, world


def ignore_interrupts(_: int) -> None:
    """Ignore signals in a loader process: they go to all processes of a run, and the main one may need its batches."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """End a run by SIGTERM or SIGUSR1 (a scheduler's) after its step, with a checkpoint and status 0; by Ctrl-C the
    same, with the weights and status 130. While `at_once` is true, in an evaluation that follows a checkpoint, a signal
    ends the run immediately. Messages bypass Python's buffers, which may be in use when a signal arrives."""

    def __init__(self, is_main: bool) -> None:
        self.is_main, self.at_once = is_main, False
        self._precedence, self._received_at = 0, 0.0  # place in SIGNALS, from 1
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _) -> None:
        again = number == signal.SIGINT and self._precedence == len(SIGNALS)
        if again and time.monotonic() - self._received_at > ONE_SIGNAL_S:
            raise KeyboardInterrupt
        self._precedence, self._received_at = max(self._precedence, 1 + SIGNALS.index(number)), time.monotonic()
        self.set_at_once(self.at_once)
        if number == signal.SIGINT and self.is_main and not again:
            os.write(2, b"\nstopping after this step; once more to quit at once\n")

    def set_at_once(self, at_once: bool) -> None:
        self.at_once = at_once
        if at_once and self._precedence:
            self.leave("in the evaluation", SIGNALS[self._precedence - 1])

    def agreed(self) -> signal.Signals | None:
        """Return the signal, if one arrived, the same on all ranks; waits for the other ranks, not for a GPU."""
        precedence = torch.tensor(self._precedence)
        if dist.is_initialized():
            dist.all_reduce(precedence, dist.ReduceOp.MAX)
        return SIGNALS[int(precedence) - 1] if precedence else None

    def leave(self, where: str, number: int) -> None:
        if self.is_main:
            os.write(2, f"stopped {where}; the same command continues the run\n".encode())
        sys.exit(130 if number == signal.SIGINT else 0)
