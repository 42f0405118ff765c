"""Training and evaluation by two ranks under torchrun give what one process gives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eval as eval_script
import train
from data import generate_shapes
from tests.support import two_ranks
from tests.support.runs import TWO_RANKS, flags_of, log_of, metrics_of
from training.folder import load_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The folder of one launch of two_ranks.py; 24 images are evaluated, in several batches of each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    generate_shapes(folder / "shapes", train_images=16, val_images=24, size_px=96)
    done = subprocess.run(
        [sys.executable, *TWO_RANKS, two_ranks.__file__, folder], env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "said").write_text(done.stdout)
    return folder


def test_first_rank_reads_for_all_and_its_error_is_everyones(folder):
    assert [(folder / f"read{rank}").read_text() for rank in (0, 1)] == ["0, rank 0 cannot read"] * 2


def test_two_ranks_train_like_one_and_stop_together(call, folder, tmp_path):
    """Each takes its half of a step's images, in two passes. A signal to rank 1 ends both; one rank goes on."""
    stopped, flags = folder / "stopped", (*two_ranks.WITHOUT_NORM, "--log-every", 1)
    assert load_checkpoint(stopped)["step"] == 3
    call(train, *flags_of(folder / "shapes", tmp_path, *flags, save_every=1, steps=5))
    assert "after step 3 of 5" in call(train, *flags_of(folder / "shapes", stopped, *flags, steps=5))
    one, two = (load_file(path / "ota.safetensors") for path in (tmp_path, stopped))
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)


def test_two_ranks_evaluate_the_weights_that_they_save(call, folder, tmp_path):
    """Their batch norms differ after a step. Rank 0 computes the metrics alone, for longer than a collective may take;
    rank 1 waits, and both go on."""
    assert [line["step"] for line in log_of(folder / "out") if "AP" in line] == [4, 7]
    call(eval_script, "--weights", folder / "out" / "ota.safetensors", "--out", tmp_path, "--device", "cpu")
    alone, training, of_eval = (metrics_of(path) for path in (tmp_path, folder / "out", folder / "eval"))
    for name in eval_script.METRICS:
        assert training[name] == pytest.approx(alone[name], abs=1e-6) == of_eval[name], name
    assert of_eval["images"] == 24 and alone["AP50"] > 0
    assert (folder / "said").read_text().count(f"AP {alone['AP']:.3f}  AP50") == 2  # said by one rank of each script
