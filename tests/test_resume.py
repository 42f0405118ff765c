"""Runs that are killed, told to stop or robbed of their disk, and what the same command makes of them afterwards.

The full list of faults takes minutes: pytest -m slow -s tests/test_resume.py says what happened in each.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from data import generate_shapes
from data.order import SeededDataset, batches_from
from eval import SettingsError
from model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
STEPS = 30
SMALL = (
    *("--backbone", "test_resnet", "--no-pretrained", "--channels", 32, "--head-convs", 1, "--device", "cpu"),
    *("--image-size", 64, "--batch-size", 4, "--lr", 4e-3, "--warmup", 5, "--log-every", 3, "--eval-every", 4),
)
TIMES = ("images_per_s", "data_wait")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("resume") / "shapes"
    generate_shapes(root, train_images=21, val_images=4, size_px=96)  # 5 steps an epoch, one image left over
    return root


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
        command = [sys.executable, *launcher, script, "--data", shapes, *SMALL, "--steps", steps,
                   "--save-every", save_every, "--workers", workers, "--out", out, *args]  # fmt: skip
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
def undisturbed(shapes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    Run(shapes, out, workers=1).ends_well()
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


def test_killed_run_continues_bit_for_bit(shapes, undisturbed, tmp_path):
    out = tmp_path / "out"
    for step, workers in ((3, 0), (15, 2)):
        run = Run(shapes, out, workers=workers).until(f"step {step}/")
        run.process.kill()  # and the next start, at once, finds the folder free
        run.end()
    last = Run(shapes, out).ends_well()
    assert "continuing the run" in last.said and f"of {STEPS}" in last.said
    assert_same_run(out, undisturbed)
    assert len(list(out.glob("checkpoint-*.pt"))) == 2 and not list(out.glob(".*"))

    again = Run(shapes, out).ends_well()
    assert f"is complete, all {STEPS} steps" in again.said
    assert_same_run(out, undisturbed)


def test_signals_stop_after_the_step_with_a_checkpoint(shapes, undisturbed, tmp_path):
    out = tmp_path / "out"
    for number, step in ((signal.SIGTERM, 3), (signal.SIGUSR1, 12), (signal.SIGINT, 21)):
        run = Run(shapes, out, workers=1, save_every=1000, start_new_session=True).until(f"step {step}/")
        signalled = time.perf_counter()
        os.killpg(run.process.pid, number)  # as schedulers and terminals do: to the loader processes, too
        code = run.end()
        assert time.perf_counter() - signalled < 10 and code == (130 if number == signal.SIGINT else 0), run.said
        assert "stopped" in run.said and "continues the run" in run.said and "Traceback" not in run.said
        assert step <= load_checkpoint(out)["step"] < step + 9
    Run(shapes, out).ends_well()
    assert_same_run(out, undisturbed)


def test_batches_are_a_function_of_the_step():
    whole = list(batches_from(0, 12, 21, 4, seed=1))
    assert list(batches_from(7, 12, 21, 4, seed=1)) == whole[7:]
    ranks = [list(batches_from(0, 12, 21, 4, 1, rank, 2)) for rank in (0, 1)]
    assert [one + two for one, two in zip(*ranks, strict=True)] == whole
    epochs = [[i for batch in whole[e : e + 5] for _, i in batch] for e in (0, 5)]
    assert all(len(set(epoch)) == 20 for epoch in epochs) and epochs[0] != epochs[1]
    assert list(batches_from(0, 12, 21, 4, seed=2)) != whole


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
    with pytest.raises(CheckpointError, match="every checkpoint.*--out"):
        load_checkpoint(tmp_path)


def test_checkpoint_runs_no_code(tmp_path, capsys):
    save_checkpoint(tmp_path, {"step": 1, "model": Path("x")})
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path)
    assert "weights_only" in capsys.readouterr().err.lower().replace("weights only", "weights_only")


def test_elastic_restarts_need_a_name(monkeypatch, shapes):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(shapes)])
    with pytest.raises(SettingsError, match="--max-restarts needs --out"):
        train.main()
