"""Small runs of train.py: their flags, processes of their own that can be killed, and the comparison of two runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent.parent
DETECTOR = ("--backbone", "test_resnet", "--no-pretrained", "--channels", 32, "--head-convs", 1)
CPU = ("--device", "cpu", "--workers", 0)
SMALL = (
    *(*DETECTOR, "--device", "cpu", "--image-size", 64, "--batch-size", 4),
    *("--lr", 4e-3, "--warmup", 5, "--log-every", 3, "--eval-every", 4),
)
TORCHRUN = ("-m", "torch.distributed.run")
TWO_RANKS = (*TORCHRUN, "--standalone", "--nproc_per_node", "2")
# Wider than 64 px, so that level 6 is wider than a point: torch 2.11 and 2.14 have, with bfloat16 on some CPUs, garbage
# for the weights' gradient of a 3 x 3 convolution with stride 2 over a single column.
SWITCHES = (
    *("--ema", 0.9, "--accumulate", 2, "--clip-norm", 0.5, "--bf16"),
    *("--augment", "light", "--multi-scale", 72, 88, 104),
)
TIMES = ("images_per_s", "data_wait")


def flags_of(shapes: Path, out: Path, *args, save_every: int = 4, workers: int = 0, steps: int = 30) -> list:
    """Return the flags of a small run; a later flag in `args` wins."""
    run = ["--data", shapes, "--out", out, "--steps", steps, "--save-every", save_every, "--workers", workers]
    return [*SMALL, *run, *args]


class Run:
    """A start of train.py in a process of its own; `before` is code that breaks something, `launcher` a torchrun."""

    def __init__(self, shapes, out, *args, launcher=(), before="", **flags):
        script = ROOT / "train.py"
        if before:
            script = out.with_suffix(".faulty.py")
            script.write_text(
                f"import os, runpy, signal, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport torch\n{before}\n"
                f"sys.argv[0] = 'train.py'\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
            )
        command = [sys.executable, *launcher, script, *flags_of(shapes, out, *args, **flags)]
        self.process = subprocess.Popen(
            [str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.said = ""

    def until(self, start_of_line: str) -> "Run":
        """Read on until a line begins so; fail if the run ends before."""
        for line in self.process.stdout:
            self.said += line
            if line.startswith(start_of_line):
                return self
        raise AssertionError(f"never said {start_of_line!r}:\n{self.said}")

    def end(self, timeout: float = 300) -> int:
        """Wait for the end; return the exit status."""
        self.said += self.process.communicate(timeout=timeout)[0]
        return self.process.returncode

    def ends_well(self) -> "Run":
        assert self.end() == 0, self.said
        return self


def log_of(out: Path) -> list[dict]:
    """Return the lines of the log without times."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def metrics_of(out: Path) -> dict:
    return json.loads((out / "metrics.json").read_text())


def assert_same_run(out: Path, other: Path) -> None:
    """Compare log, weights and metrics, except times: bit for bit."""
    assert log_of(out) == log_of(other)
    one, two = (load_file(folder / "ota.safetensors") for folder in (out, other))
    assert one.keys() == two.keys() and not [name for name in one if not torch.equal(one[name], two[name])]
    assert metrics_of(out) | {"total_s": 0} == metrics_of(other) | {"total_s": 0}
