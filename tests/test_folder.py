"""The folder of a run: log, best weights, curves, TensorBoard, whole checkpoints, one process at a time."""

import json
import multiprocessing
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import training.folder
from errors import UserError
from model import write_file
from tests.support.detectors import tiny_detector
from training.folder import RunFolder, load_checkpoint, resume, save_checkpoint


def folder_of(path: Path, log=(), step: int = 0) -> RunFolder:
    path.mkdir(exist_ok=True)
    return RunFolder(path, {"seed": 0}, {}, {"class_names": ["a", "b", "c"]}, 100, step, list(log))


def test_best_weights_are_kept_over_a_restart(tmp_path):
    detector, folder = tiny_detector(), folder_of(tmp_path / "out")
    for step, ap in ((10, 0.3), (20, 0.5), (30, 0.4), (40, 0.45)):
        if step == 40:
            folder = folder_of(tmp_path / "out", folder.log, step=30)
        detector.head.scales.data.fill_(step)
        folder.write_evaluation(detector, step, {"AP": ap, "AP50": ap, "per_class": {}}, "val")
    best, last = (load_file(tmp_path / "out" / f"{name}.safetensors")["head.scales"] for name in ("best", "ota"))
    assert best.unique().tolist() == [20] and last.unique().tolist() == [40]
    log = (tmp_path / "out" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [10, 20, 30, 40]


def test_log_goes_to_curves_and_to_tensorboard_if_it_is_installed(tmp_path, monkeypatch):
    """The curves are redrawn while the run goes on."""
    writer, curves = mock.MagicMock(), tmp_path / "curves.png"
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    folder = folder_of(tmp_path)
    losses = {"loss": 1.0, "cls": 0.5, "box": 0.3, "iou": 0.2, "positives_per_gt": 3.0, "mean_k": 4.0}
    folder.write_line({"step": 1} | losses)
    assert not curves.exists()
    monkeypatch.setattr(training.folder, "REDRAW_S", -1)
    folder.write_line({"step": 1, "split": "val", "AP": 0.1, "AP50": 0.2, "AP75": 0.1})
    Image.open(curves).load()
    numbers = {call.args for call in writer().add_scalar.call_args_list}
    assert numbers >= {("training/loss", 1.0, 1), ("evaluation/AP", 0.1, 1)}


# Checkpoints


def test_file_is_complete_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """A power cut loses whatever was not synced, in any order: so first the bytes, then the name, then the folder."""
    synced, sync, rename, path = {}, os.fsync, os.replace, tmp_path / "checkpoint.pt"

    def note_sync(descriptor):
        sync(descriptor)
        about = os.fstat(descriptor)
        synced[about.st_ino] = about.st_size

    def check_rename(source, target):
        assert synced.pop(os.stat(source).st_ino, 0) == 100_000 == os.stat(source).st_size
        synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", check_rename)
    write_file(path, b"x" * 100_000)
    assert tmp_path.stat().st_ino in synced

    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"x" * 100_000 and list(tmp_path.iterdir()) == [path]


def test_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {"step": step, "model": {"w": torch.full((50,), float(step))}})
    one, newest = sorted(tmp_path.iterdir())
    assert (one.name, newest.name) == ("checkpoint-00000002.pt", "checkpoint-00000003.pt")
    assert load_checkpoint(tmp_path)["model"]["w"].unique().tolist() == [3]
    data = bytearray(newest.read_bytes())
    data[data.index(torch.full((50,), 3.0).numpy().tobytes()) + 7] ^= 1  # one bit of a weight
    newest.write_bytes(data)
    assert load_checkpoint(tmp_path)["model"]["w"].unique().tolist() == [2]
    assert f"{newest} is damaged" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-00000002.pt", "checkpoint-00000003.damaged"]
    one.write_bytes(b"nothing")
    with pytest.raises(UserError, match="every checkpoint.*--out"):
        load_checkpoint(tmp_path)


def hold(folder: Path, started) -> None:
    resume(folder, {}, {})
    started.set()
    multiprocessing.Event().wait()


def test_one_process_at_a_time_uses_a_folder(tmp_path):
    """A process that is killed leaves the folder free, and the temporary file of a checkpoint is removed."""
    fork = multiprocessing.get_context("fork")
    started = fork.Event()
    holder = fork.Process(target=hold, args=(tmp_path, started), daemon=True)
    holder.start()
    assert started.wait(60)
    try:
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on .*--out"):
            resume(tmp_path, {}, {})
    finally:
        holder.kill()
        holder.join()
    (tmp_path / ".checkpoint-00000004.pt.1.tmp").touch()
    assert resume(tmp_path, {}, {}) == (None, False)
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]
