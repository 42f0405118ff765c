"""Runs that are killed, told to stop or robbed of their disk, and what the same command makes of them afterwards.

The full list of faults takes minutes: pytest -m slow -s tests/test_resume.py says what happened in each.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from data import generate_shapes
from data.dataset import SeededDataset, batches_from
from errors import UserError
from model import load_weights
from training.folder import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
STEPS = 30
SMALL = (
    *("--backbone", "test_resnet", "--no-pretrained", "--channels", 32, "--head-convs", 1, "--device", "cpu"),
    *("--image-size", 64, "--batch-size", 4, "--lr", 4e-3, "--warmup", 5, "--log-every", 3, "--eval-every", 4),
)
TORCHRUN = ["-m", "torch.distributed.run"]
TWO_RANKS = [*TORCHRUN, "--standalone", "--nproc_per_node", "2"]
TIMES = ("images_per_s", "data_wait")
# Wider than 64 px, so that level 6 is wider than a point: torch 2.11 and 2.14 have, with bfloat16 on some CPUs, garbage
# for the weights' gradient of a 3 x 3 convolution with stride 2 over a single column.
BF16_SIZES = (72, 88, 104)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resume") / "shapes"
    generate_shapes(root, train_images=21, val_images=4, size_px=96)  # 5 steps an epoch, one image left over
    return root


def flags_of(shapes: Path, out: Path, *args, save_every: int = 4, workers: int = 0, steps: int = STEPS) -> list:
    return ["--data", shapes, *SMALL, "--steps", steps, "--save-every", save_every, "--workers", workers, "--out", out,
            *args]  # fmt: skip


class Run:
    """One start of train.py, small; `before` is code that breaks something in it, `launcher` a torchrun."""

    def __init__(self, shapes, out, *args, launcher=(), before="", save_every=4, workers=0, steps=STEPS, **popen):
        script = ROOT / "train.py"
        if before:
            script = out.with_suffix(".faulty.py")
            script.write_text(
                f"import os, runpy, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\n{before}\n"
                f"sys.argv[0] = 'train.py'\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
            )
        flags = flags_of(shapes, out, *args, save_every=save_every, workers=workers, steps=steps)
        command = [sys.executable, *launcher, script, *flags]
        popen = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}} | popen
        self.process = subprocess.Popen(
            [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **popen
        )
        self.said = ""

    def until(self, start_of_line: str) -> "Run":
        """Reads on until a line begins so; fails where the run ends before."""
        for line in self.process.stdout:
            self.said += line
            if line.startswith(start_of_line):
                return self
        raise AssertionError(f"never said {start_of_line!r}:\n{self.said}")

    def end(self, timeout: float = 120) -> int:
        self.said += self.process.communicate(timeout=timeout)[0]
        return self.process.returncode

    def ends_well(self) -> "Run":
        assert self.end() == 0, self.said
        return self


@pytest.fixture(scope="module")
def undisturbed(call, shapes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    call(train, *flags_of(shapes, out))
    return out


def log_of(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def assert_same_run(out: Path, other: Path) -> None:
    """Log (all but times), metrics and weights, bit for bit."""
    assert log_of(out) == log_of(other)
    one, two = (load_file(d / "ota.safetensors") for d in (out, other))
    assert one.keys() == two.keys() and not [name for name in one if not torch.equal(one[name], two[name])]
    metrics = [json.loads((d / "metrics.json").read_text()) | {"total_s": 0} for d in (out, other)]
    assert metrics[0] == metrics[1]


def test_run_that_is_ended_again_and_again_continues_bit_for_bit(call, shapes, undisturbed, tmp_path):
    """Killed before and after its first checkpoint, and told to stop by every signal, which leaves a checkpoint."""
    out = tmp_path / "out"
    for number, step, workers, save_every in (
        (signal.SIGKILL, 3, 0, 1000),  # leaves log lines, but no later checkpoint
        (signal.SIGTERM, 6, 1, 1000),
        (signal.SIGUSR1, 12, 1, 1000),
        (signal.SIGKILL, 18, 2, 4),
        (signal.SIGINT, 24, 1, 1000),
    ):
        run = Run(shapes, out, workers=workers, save_every=save_every, start_new_session=True).until(f"step {step}/")
        signalled = time.perf_counter()
        if number == signal.SIGKILL:
            run.process.kill()  # and the next start, at once, finds the folder free
            run.end()
            continue
        os.killpg(run.process.pid, number)  # as schedulers and terminals do: to the loader processes, too
        code = run.end()
        assert time.perf_counter() - signalled < 10 and code == (130 if number == signal.SIGINT else 0), run.said
        assert "stopped" in run.said and "continues the run" in run.said and "Traceback" not in run.said
        stopped_at = load_checkpoint(out)["step"]
        assert step <= stopped_at < step + 9
        if number == signal.SIGINT:
            assert "interrupted after step" in run.said
            assert load_weights(out / "ota.safetensors")[1]["training"]["step"] == stopped_at
    last = Run(shapes, out).ends_well()
    assert "continuing the run" in last.said and f"of {STEPS}" in last.said
    assert_same_run(out, undisturbed)
    assert len(list(out.glob("checkpoint-*.pt"))) == 2 and not list(out.glob(".*"))

    assert f"is complete, all {STEPS} steps" in call(train, *flags_of(shapes, out))
    assert_same_run(out, undisturbed)


def test_killed_run_with_every_switch_continues_bit_for_bit(call, shapes, tmp_path):
    """The moving average of the weights, passes, clipping, sizes drawn at random, batches by orientation."""
    switches = ["--ema", 0.9, "--accumulate", 2, "--clip-norm", 0.5, "--multi-scale", *BF16_SIZES, "--bf16",
                "--optimizer", "sgd", "--lr", 0.05]  # fmt: skip
    one, out = tmp_path / "one", tmp_path / "out"
    call(train, *flags_of(shapes, one, *switches, steps=14))
    run = Run(shapes, out, *switches, steps=14, workers=1).until("step 9/")
    run.process.kill()
    run.end()
    assert load_checkpoint(out)["step"] >= 4
    Run(shapes, out, *switches, steps=14).ends_well()
    assert_same_run(out, one)
    averaged, last = load_file(out / "ota.safetensors"), load_checkpoint(out)["model"]
    assert not torch.equal(averaged["head.cls.weight"], last["head.cls.weight"])
    assert all("grad_norm" in line for line in log_of(out) if "loss" in line)


def test_batches_are_a_function_of_the_step():
    tall = [i % 3 == 0 for i in range(21)]
    whole = list(batches_from(0, 12, tall, 4, seed=1))
    assert list(batches_from(7, 12, tall, 4, seed=1)) == whole[7:]
    ranks = [list(batches_from(0, 12, tall, 4, 1, rank, 2)) for rank in (0, 1)]
    assert [one + two for one, two in zip(*ranks, strict=True)] == whole
    epochs = [[i for batch in whole[e : e + 5] for _, i in batch] for e in (0, 5)]
    assert all(len(set(epoch)) == 20 for epoch in epochs) and epochs[0] != epochs[1]
    assert list(batches_from(0, 12, tall, 4, seed=2)) != whole


def test_random_transforms_are_a_function_of_seed_epoch_and_image():
    class Draws(torch.utils.data.Dataset):
        def __getitem__(self, i):
            return torch.rand(1).item()

    keys = [(epoch, i) for epoch in range(10) for i in range(50)]
    drawn = [SeededDataset(Draws(), 0)[key] for key in keys]
    torch.manual_seed(5)
    assert [SeededDataset(Draws(), 0)[key] for key in reversed(keys)] == drawn[::-1]
    assert len(set(drawn)) > 495 and 0.45 < sum(drawn) / len(drawn) < 0.55
    assert SeededDataset(Draws(), 1)[keys[0]] != drawn[0]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"step": step, "model": {"w": torch.full((50,), float(step))}})
    newest = tmp_path / "checkpoint-00000003.pt"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes({"cut": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    assert load_checkpoint(tmp_path)["model"]["w"].unique().tolist() == [2]
    assert "checkpoint-00000003.pt is damaged" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000002.pt", "checkpoint-00000003.damaged"]
    (tmp_path / "checkpoint-00000002.pt").write_bytes(b"nothing")
    with pytest.raises(UserError, match="every checkpoint.*--out"):
        load_checkpoint(tmp_path)


def test_checkpoint_runs_no_code(tmp_path, capsys):
    save_checkpoint(tmp_path, {"step": 1, "model": Path("x")})
    with pytest.raises(UserError):
        load_checkpoint(tmp_path)
    assert "weights_only" in capsys.readouterr().err.lower().replace("weights only", "weights_only")


def test_elastic_restarts_need_a_name(monkeypatch, capsys, shapes):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(shapes)])
    with pytest.raises(SystemExit):
        train.main()
    assert "--max-restarts needs --out" in capsys.readouterr().err


# The full list of faults. What each says goes to the screen with -s.


def tell(fault: str, what: str) -> None:
    print(f"\n{fault}: {what}", flush=True)


def children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def kill_rank(torchrun: subprocess.Popen, rank: int) -> None:
    (pid,) = [c for c in children(torchrun.pid) if environment_of(c).get("RANK") == str(rank)]
    os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def undisturbed_by_two(shapes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed2") / "out"
    Run(shapes, out, launcher=TWO_RANKS).ends_well()
    return out


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


@pytest.mark.slow
def test_twenty_kills(shapes, tmp_path):
    """Twelve at random moments after a random step, eight while something is being written; one run throughout."""
    steps, chance, reached = 150, random.Random(0), []
    one, out = tmp_path / "one", tmp_path / "out"
    Run(shapes, one, steps=steps).ends_well()
    for kill in range(20):
        if kill % 5 < 3:
            run = Run(shapes, out, steps=steps, save_every=2, workers=kill % 3).until("step ")
            time.sleep(0.15 * chance.random())
            run.process.kill()
        else:  # a first start writes args.json and a checkpoint, a later one args.json and the log; two syncs a file
            fatal = DIES_AT_SYNC.format(n=chance.randint(3, 12), half=kill % 2)
            run = Run(shapes, out, steps=steps, save_every=2, before=fatal)
        assert run.end() == -signal.SIGKILL, run.said
        reached.append(load_checkpoint(out)["step"])
    Run(shapes, out, steps=steps).ends_well()
    assert_same_run(out, one)
    tell("20 kills", f"same log, metrics and weights as undisturbed; newest checkpoint after each kill: {reached}")


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1], ids=["before-rename", "torn"])
def test_kill_in_a_checkpoint(shapes, undisturbed, tmp_path, half):
    out = tmp_path / "out"
    run = Run(shapes, out, before=DIES_AT_SYNC.format(n=7, half=half))  # 1, 2 args.json; 3 to 6 checkpoints 0 and 4
    assert run.end() == -signal.SIGKILL
    before = sorted(p.name for p in out.iterdir())
    assert load_checkpoint(out)["step"] == 4 and any(name.startswith(".checkpoint-00000008") for name in before)
    Run(shapes, out).ends_well()
    assert_same_run(out, undisturbed)
    tell(f"killed in the checkpoint of step 8 (half a file: {bool(half)})", f"{before}; went on from step 4, same end")


@pytest.mark.slow
def test_full_disk(shapes, undisturbed, tmp_path):
    """No file may pass 3 MB: the checkpoint of step 0 fits, those with the optimizer's state do not."""
    out = tmp_path / "out"
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (3_000_000, resource.RLIM_INFINITY))"
    run = Run(shapes, out, before=limit)
    assert run.end() == 1 and f"cannot write to {out}" in run.said and "00000000.pt, is complete" in run.said, run.said
    assert "Traceback" not in run.said and load_checkpoint(out)["step"] == 0 and not list(out.glob(".*"))
    tell("file size limit", run.said.splitlines()[-1])
    Run(shapes, out).ends_well()
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_full_tmpfs(shapes, undisturbed, tmp_path):
    """A real one, of 14 MB; three checkpoints of 5.5 MB, one of which is being written, do not fit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=14m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        out = disk / "out"
        run = Run(shapes, out)
        assert run.end() == 1 and "No space left" in run.said and "Traceback" not in run.said, run.said
        tell("full disk", run.said.splitlines()[-1])
        kept = load_checkpoint(out)["step"]
        subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
        last = Run(shapes, out).ends_well()
        assert f"after step {kept} " in last.said
        assert_same_run(out, undisturbed)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
def test_truncated_checkpoint(shapes, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = Run(shapes, out).until("step 18/")
    run.process.kill()
    run.end()
    before, newest = sorted(out.glob("checkpoint-*.pt"))
    os.truncate(newest, newest.stat().st_size - 1000)
    last = Run(shapes, out).ends_well()
    assert f"{newest} is damaged" in last.said and f"after step {int(before.stem[-8:])} " in last.said
    assert_same_run(out, undisturbed)
    tell("truncated checkpoint", next(line for line in last.said.splitlines() if "damaged" in line))


@pytest.mark.slow
def test_two_runs_on_one_folder(shapes, undisturbed, tmp_path):
    out = tmp_path / "out"
    first = Run(shapes, out, workers=2).until("step 3/")
    first.process.send_signal(signal.SIGSTOP)  # so that it is there for the whole of the other's life
    second = Run(shapes, out)
    assert second.end() == 1 and f"process {first.process.pid}" in second.said and "Traceback" not in second.said
    tell("two runs on one folder", second.said.splitlines()[-1])
    first.process.send_signal(signal.SIGCONT)
    first.ends_well()
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_read_only_folder(shapes, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    is_root = os.geteuid() == 0  # who may write anywhere but on a disk that is mounted so
    if is_root and subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", out], capture_output=True).returncode:
        pytest.skip("root, but without the right to mount")
    out.chmod(0o555) if not is_root else None
    try:
        run = Run(shapes, out)
        code = run.end()
        left = list(out.iterdir())
    finally:
        subprocess.run(["umount", out], check=True) if is_root else out.chmod(0o755)
    assert code == 1 and f"cannot write to {out}" in run.said and "--out" in run.said, run.said
    assert "Traceback" not in run.said and not left
    tell("read-only folder", run.said.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_rank_killed_under_torchrun(shapes, undisturbed_by_two, tmp_path, rank):
    out = tmp_path / "out"
    run = Run(shapes, out, launcher=[*TWO_RANKS, "--max-restarts", "2"]).until("step 18/")
    started = time.perf_counter()
    kill_rank(run.process, rank)
    run.until("continuing the run")
    seconds = time.perf_counter() - started
    run.ends_well()
    assert_same_run(out, undisturbed_by_two)
    tell(
        f"rank {rank} of 2 killed",
        f"{run.said.split('continuing')[1].splitlines()[0]}, {seconds:.0f} s later, same end",
    )


@pytest.mark.slow
def test_two_ranks_stop_and_one_continues(tmp_path):
    """Four images, learned by heart. The signal reaches one rank only; both stop at one step."""
    four = tmp_path / "four"
    generate_shapes(four, train_images=4, val_images=0, size_px=128)
    (four / "annotations" / "instances_val.json").unlink()
    long = ["--image-size", 128, "--channels", 64, "--head-convs", 2, "--lr", 8e-3, "--warmup", 20, "--ota", "radius=3",
            "top_q=10", "--eval-every", 1000]  # fmt: skip
    ap = {}
    for name, launcher in (("1 rank", ()), ("2 ranks", TWO_RANKS)):
        Run(four, tmp_path / name, *long, launcher=launcher, steps=250).ends_well()
        ap[name] = json.loads((tmp_path / name / "metrics.json").read_text())["AP"]
    out = tmp_path / "out"
    run = Run(four, out, *long, launcher=TWO_RANKS, steps=250).until("step 120/")
    (one,) = [c for c in children(run.process.pid) if environment_of(c).get("RANK") == "1"]
    os.kill(one, signal.SIGTERM)
    run.ends_well()
    assert "stopped by SIGTERM after step" in run.said
    last = Run(four, out, *long, steps=250).ends_well()
    ap["2, then 1"] = json.loads((out / "metrics.json").read_text())["AP"]
    said = next(line for line in last.said.splitlines() if "continuing" in line)
    tell("2 ranks to 1", f"{said}; AP {ap}")
    assert min(ap.values()) > 0.85 and max(ap.values()) - min(ap.values()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_signal_to_torchrun(shapes, undisturbed_by_two, tmp_path, number):
    out = tmp_path / "out"
    signals = ["--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1"]
    run = Run(shapes, out, launcher=[*TWO_RANKS, *signals]).until("step 15/")
    started = time.perf_counter()
    run.process.send_signal(number)
    code, seconds = run.end(), time.perf_counter() - started
    assert f"stopped by {number.name} after step" in run.said, run.said
    Run(shapes, out, launcher=TWO_RANKS).ends_well()
    assert_same_run(out, undisturbed_by_two)
    tell(f"{number.name} to torchrun", f"all ended within {seconds:.1f} s, torchrun's status {code}; same end")


@pytest.mark.slow
def test_two_agents(shapes, undisturbed_by_two, tmp_path):
    """Two nodes, as far as torchrun knows; the rank of the second is killed, both start again."""
    out = tmp_path / "out"
    launcher = [*TORCHRUN, "--nnodes", "2", "--nproc_per_node", "1", "--max-restarts", "3", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "two"]  # fmt: skip
    runs = [Run(shapes, out, launcher=launcher, steps=STEPS) for _ in range(2)]
    rank_of_first, deadline = None, time.time() + 60
    while rank_of_first is None and time.time() < deadline:
        time.sleep(0.2)
        ranks = [environment_of(c).get("RANK") for c in children(runs[0].process.pid)]
        rank_of_first = next((r for r in ranks if r), None)
    main, other = runs if rank_of_first == "0" else runs[::-1]
    main.until("step 12/")
    os.kill(next(c for c in children(other.process.pid) if "RANK" in environment_of(c)), signal.SIGKILL)
    codes = [run.end() for run in (main, other)]
    said = main.said + other.said
    assert codes == [0, 0] and "continuing the run" in said, said
    assert_same_run(out, undisturbed_by_two)
    tell("two agents, a rank killed", f"{said.split('continuing')[1].splitlines()[0]}, same end")


@pytest.mark.slow
def test_two_ranks_with_every_switch_continue_bit_for_bit(shapes, tmp_path):
    """The buffers of the averaged weights are rank 0's in an evaluation; four images a step, in two passes a rank."""
    switches = ["--ema", 0.9, "--accumulate", 2, "--clip-norm", 0.5, "--multi-scale", *BF16_SIZES, "--bf16"]
    one, out = tmp_path / "one", tmp_path / "out"
    Run(shapes, one, *switches, launcher=TWO_RANKS).ends_well()
    run = Run(shapes, out, *switches, launcher=TWO_RANKS).until("step 18/")
    kill_rank(run.process, 1)
    assert run.end() == 1
    run = Run(shapes, out, *switches, launcher=TWO_RANKS).ends_well()
    assert_same_run(out, one)
    tell("two ranks with every switch, rank 1 killed", f"{run.said.split('continuing')[1].splitlines()[0]}, same end")


NAN_IN_ONE_IMAGE = """
from model.detector import Detector
calls, predict = [], Detector.predict_raw
def spoilt(self, batch):
    predictions, grid = predict(self, batch)
    calls.append(self.training)
    if sum(calls) == 10 and os.environ.get("RANK", "1") == "1":
        predictions.logits[1] = float("nan")
    return predictions, grid
Detector.predict_raw = spoilt
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_nan_in_one_image(shapes, undisturbed, undisturbed_by_two, tmp_path, ranks):
    """On rank 1 where there are two: its error is on the screen, and the other does not wait for it."""
    out = tmp_path / "out"
    launcher = TWO_RANKS if ranks == 2 else ()
    run = Run(shapes, out, launcher=launcher, before=NAN_IN_ONE_IMAGE).until("step 9/")
    started = time.perf_counter()
    assert run.end() == 1 and "train.py: step 10: the loss is not finite" in run.said and "image ids" in run.said
    assert load_checkpoint(out)["step"] == 8
    error = next(line for line in run.said.splitlines() if "not finite" in line)
    tell(f"NaN, {ranks} rank(s)", f"ended after {time.perf_counter() - started:.0f} s; {error}")
    Run(shapes, out, launcher=launcher).ends_well()
    assert_same_run(out, undisturbed if ranks == 1 else undisturbed_by_two)


@pytest.mark.slow
def test_loader_process_killed(shapes, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = Run(shapes, out, workers=1).until("step 9/")
    os.kill(children(run.process.pid)[-1], signal.SIGKILL)
    assert run.end() == 1
    tell("loader process killed", next(line for line in run.said.splitlines() if "DataLoader worker" in line))
    Run(shapes, out).ends_well()
    assert_same_run(out, undisturbed)


SLOW_EVALUATION = """
import time
import eval
detect = eval.detect_dataset
def slow_detect(*args):
    print("evaluating", flush=True)
    time.sleep(60)
    return detect(*args)
eval.detect_dataset = slow_detect
"""


@pytest.mark.slow
def test_signal_in_an_evaluation(shapes, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = Run(shapes, out, before=SLOW_EVALUATION).until("evaluating")
    signalled = time.perf_counter()
    run.process.terminate()
    assert run.end() == 0 and time.perf_counter() - signalled < 10 and "stopped in the evaluation" in run.said, run.said
    tell("SIGTERM in an evaluation", run.said.splitlines()[-1])
    Run(shapes, out).ends_well()
    assert_same_run(out, undisturbed)


SLOW_METRICS = """
import datetime, time
import torch.distributed as dist
import eval
start, metrics, delays_s = dist.init_process_group, eval.coco_metrics, iter((10, 0))
dist.init_process_group = lambda *args, **more: start(*args, **more, timeout=datetime.timedelta(seconds=6))
eval.coco_metrics = lambda *args: (time.sleep(next(delays_s)), metrics(*args))[1]
"""


def test_evaluation_that_outlasts_the_time_limit_of_the_ranks(shapes, tmp_path):
    """Rank 0 computes the metrics alone; the other waits, and both go on."""
    out = tmp_path / "out"
    run = Run(shapes, out, "--eval-every", 1, launcher=TWO_RANKS, before=SLOW_METRICS, steps=7).ends_well()
    assert [line["step"] for line in log_of(out) if "AP" in line] == [5, 7], run.said


SPOILT_WEIGHTS = """
updates, update = [], torch.optim.AdamW.step
def spoil(self):
    update(self)
    updates.append(1)
    if len(updates) == 8:
        self.param_groups[0]["params"][0].data[0] = float("nan")
torch.optim.AdamW.step = spoil
"""


@pytest.mark.slow
def test_weights_that_are_not_finite_are_not_saved(shapes, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = Run(shapes, out, before=SPOILT_WEIGHTS)
    assert run.end() == 1 and "step 8: parameters that are not finite: 1," in run.said, run.said
    assert load_checkpoint(out)["step"] == 4
    tell("NaN in the weights", run.said.splitlines()[-1])
    Run(shapes, out).ends_well()
    assert_same_run(out, undisturbed)
