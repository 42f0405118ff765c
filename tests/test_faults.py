"""Faults that take minutes: kills at every moment, and ranks of torchrun that are killed or told to end.

The same command continues each run, and ends as if nothing had happened. Faults inside one process: test_resume.py.
"""

import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.runs import SWITCHES, TORCHRUN, TWO_RANKS, Run, assert_same_run
from training.folder import load_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed_by_two(shapes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed2") / "out"
    Run(shapes, out, launcher=TWO_RANKS).ends_well()
    return out


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def rank_of(pid: int) -> str | None:
    """Return the rank that torchrun gave a process."""
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return next((entry.removeprefix("RANK=") for entry in entries if entry.startswith("RANK=")), None)


def signal_rank(torchrun: subprocess.Popen, rank: int, number: int) -> None:
    (pid,) = [c for c in children(torchrun.pid) if rank_of(c) == str(rank)]
    os.kill(pid, number)


# A SIGKILL of itself at the n-th sync of the process: {half} leaves half a temporary file behind, else a whole one.
DIES_AT_SYNC = """
syncs, sync = [], os.fsync
def fatal_sync(fd):
    sync(fd)
    syncs.append(fd)
    if len(syncs) == {n}:
        if {half} and os.fstat(fd).st_size > 10_000:
            os.ftruncate(fd, os.fstat(fd).st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fatal_sync
"""


def test_twenty_kills(shapes, tmp_path):
    """Twelve at random moments after a random step, eight while something is being written; one run throughout."""
    chance, one, out = random.Random(0), tmp_path / "one", tmp_path / "out"
    Run(shapes, one, steps=150).ends_well()
    for kill in range(20):
        if kill % 5 < 3:
            run = Run(shapes, out, steps=150, save_every=2, workers=kill % 3).until("step ")
            time.sleep(0.15 * chance.random())
            run.process.kill()
        else:  # a first start writes args.json and a checkpoint, a later one args.json and the log; two syncs a file
            fatal = DIES_AT_SYNC.format(n=chance.randint(3, 12), half=kill % 2)
            run = Run(shapes, out, steps=150, save_every=2, before=fatal)
        assert run.end() == -signal.SIGKILL, run.said
        assert load_checkpoint(out)
    Run(shapes, out, steps=150).ends_well()
    assert_same_run(out, one)


@pytest.mark.parametrize(("rank", "switches"), [(0, ()), (1, SWITCHES)], ids=["rank-0", "rank-1-every-switch"])
def test_rank_killed_under_torchrun(shapes, undisturbed_by_two, tmp_path, rank, switches):
    """The buffers of the averaged weights are rank 0's in an evaluation; four images a step, in two passes a rank."""
    out, one = tmp_path / "out", undisturbed_by_two
    if switches:
        one = tmp_path / "one"
        Run(shapes, one, *switches, launcher=TWO_RANKS).ends_well()
    run = Run(shapes, out, *switches, launcher=[*TWO_RANKS, "--max-restarts", "2"]).until("step 18/")
    signal_rank(run.process, rank, signal.SIGKILL)
    run.until("continuing the run").ends_well()
    assert_same_run(out, one)


def test_signal_to_torchrun(shapes, undisturbed_by_two, tmp_path):
    out = tmp_path / "out"
    launcher = [*TWO_RANKS, "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    run = Run(shapes, out, launcher=launcher, workers=1).until("step 15/")
    run.process.send_signal(signal.SIGUSR1)
    assert run.end() != 0 and "stopped by SIGUSR1 after step" in run.said, run.said
    Run(shapes, out, launcher=TWO_RANKS).ends_well()
    assert_same_run(out, undisturbed_by_two)


def test_two_agents(shapes, undisturbed_by_two, tmp_path):
    """Two nodes, as far as torchrun knows; the rank of the second is killed, both start again."""
    out = tmp_path / "out"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launcher = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two"]  # fmt: skip
    runs = [Run(shapes, out, launcher=launcher) for _ in range(2)]
    rank_of_first, deadline = None, time.time() + 60
    while rank_of_first is None and time.time() < deadline:
        time.sleep(0.2)
        rank_of_first = next(filter(None, map(rank_of, children(runs[0].process.pid))), None)
    main, other = runs if rank_of_first == "0" else runs[::-1]
    main.until("step 12/")
    signal_rank(other.process, 1, signal.SIGKILL)
    codes = [run.end() for run in (main, other)]
    assert codes == [0, 0] and "continuing the run" in main.said + other.said, main.said + other.said
    assert_same_run(out, undisturbed_by_two)


def test_error_that_nobody_foresaw_ends_the_loader_processes_too(shapes, tmp_path):
    """They ignore signals, and Python would wait for them."""
    run = Run(shapes, tmp_path / "out", workers=1, before="from model import Detector; Detector.statistics = None")
    assert run.end(60) == 1 and "TypeError: 'NoneType' object is not callable" in run.said
