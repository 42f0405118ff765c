"""The commands train.py and eval.py: what they write, print and refuse, and the quality of the default run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import eval as eval_script
import train
from data import DatasetError, generate_shapes
from errors import UserError, run_script
from model import load_weights
from tests.support.runs import CPU, DETECTOR, ROOT, log_of, metrics_of
from training import environment

SMALL = (*DETECTOR, *CPU)
SHORT = (*SMALL, "--image-size", 64, "--batch-size", 2, "--steps", 2, "--warmup", 1)


def run(*args, **environment: str) -> str:
    """Run a command in a process of its own, which must end well; return its standard output."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# A run that learns two images by heart


@pytest.fixture(scope="module")
def two_images(tmp_path_factory) -> Path:
    """A data set of two training images and no validation part."""
    root = tmp_path_factory.mktemp("two") / "shapes"
    generate_shapes(root, train_images=2, val_images=0, size_px=96)
    (root / "annotations" / "instances_val.json").unlink()
    return root


@pytest.fixture(scope="module")
def trained(call, two_images, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    said = call(
        *(train, "--data", two_images, *SMALL, "--image-size", 96, "--batch-size", 2, "--steps", 100),
        *("--augment", "flip", "--lr", 0.032, "--warmup", 20, "--ota", "radius=3", "top_q=10"),
        *("--eval-every", 1000, "--out", out),
    )
    assert "100 steps of 2 images on 1 x cpu in float32; learning rate 0.004 = 0.032 x 2 / 16" in said
    assert "5 classes, from the annotation file, and their boxes: " in said
    assert "100.0 epochs, shorter side 96 px, longest 160 px, --augment flip, from the recipe for other data" in said
    assert " for the other 90 steps, without evaluations" in said
    assert said.splitlines()[-1].count(f"--weights {out / 'ota.safetensors'}") == 3
    assert f"AP {metrics_of(out)['AP']:.3f}  AP50" in said and "warning" not in said
    return out


def test_two_images_are_learned_by_heart(trained):
    assert metrics_of(trained)["AP"] > 0.9
    first, last, evaluation = log_of(trained)
    assert (first["step"], last["step"], evaluation["split"]) == (50, 100, "train")
    assert last["loss"] < 0.5 * first["loss"] == pytest.approx(0.5 * sum(first[name] for name in ("cls", "box", "iou")))
    line = json.loads((trained / "log.jsonl").read_text().splitlines()[0])
    assert {
        "lr",
        "images_per_s",
        "data_wait",
        "positives_per_gt",
        "mean_k",
        "one_point",
        "ambiguous",
        "residual",
        "gap",
    } <= set(line)


def test_folder_of_a_run_holds_what_is_promised(trained, two_images):
    files = {"ota.safetensors", "best.safetensors", "log.jsonl", "args.json", "metrics.json", "run.lock"}
    files |= {"curves.png", "samples.png", "checkpoint-00000000.pt", "checkpoint-00000100.pt"}
    assert {path.name for path in trained.iterdir()} - {"tensorboard"} == files
    Image.open(trained / "curves.png").load()
    assert Image.open(trained / "samples.png").size == (2 * 402 + 2, 402 + 2)  # two images of 400 px, 2 px around each
    settings = json.loads((trained / "args.json").read_text())
    assert settings["args"]["steps"] == 100 and settings["torch"] == torch.__version__
    assert {"commit", "command", "device", "timm", "date"} <= set(settings)
    metadata = load_weights(trained / "ota.safetensors")[1]
    assert metadata["class_names"] == ["circle", "square", "triangle", "star", "ring"]
    assert metadata["category_ids"] == [1, 2, 3, 4, 5] and metadata["data"] == str(two_images)
    assert metadata["architecture"]["image_size"] == [96, 160] and metadata["architecture"]["ota"]["top_q"] == 10
    assert metadata["training"]["step"] == 100 and metadata["training"]["metrics"]["AP"] == metrics_of(trained)["AP"]


def test_eval_gives_the_ap_of_the_training_and_refuses_other_classes(call, trained, two_images, changed, tmp_path):
    weights = trained / "ota.safetensors"
    said = call(eval_script, "--weights", weights, "--out", tmp_path, *CPU)
    metrics = metrics_of(tmp_path)
    assert f"AP {metrics['AP']:.3f}  AP50" in said and "triangle" in said and metrics["images"] == 2
    for name in eval_script.METRICS:
        assert metrics[name] == pytest.approx(metrics_of(trained)[name], abs=1e-6), name
    results = json.loads((tmp_path / "detections.json").read_text())
    assert all(set(r) == {"image_id", "category_id", "bbox", "score"} for r in results)
    truth = COCO(two_images / "annotations" / "instances_train.json")
    assert len(truth.loadRes(str(tmp_path / "detections.json")).anns) == len(results) > 10

    other = changed(lambda content: content["categories"][1].update(name="rhombus"))
    with pytest.raises(DatasetError, match="2 square.*2 rhombus.*--data"):
        call(eval_script, "--weights", weights, "--data", other)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file cannot be written: .*--out"):
        call(eval_script, "--weights", weights, "--out", tmp_path / "file", *CPU)


# Refusals and warnings


REFUSED = {
    "no-data": (["--data", "nowhere"], "nowhere does not exist"),
    "batch-over-images": (["--batch-size", "8"], "--batch-size 8 .* 2 images"),
    "short-profile": (["--profile", "2"], "--profile 2 takes 7 steps, the run has 2"),
    "no-backbone": (["--backbone", "resnet999"], "resnet999.*--backbone"),
    "odd-channels": (["--channels", "30"], "--channels"),
    "no-hub": (["--pretrained"], "cannot reach the hub(.|\n)*--no-pretrained"),
    "no-device": (["--device", "toaster"], "rank 0 cannot use --device toaster"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_train_stops_with_a_name(call, two_images, tmp_path, monkeypatch, name):
    def unreachable(*_, **__):
        raise OSError("cannot reach the hub")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    args, message = REFUSED[name]
    with pytest.raises(UserError, match=message):
        call(train, "--data", two_images, *SHORT, "--out", tmp_path / "out", *args)
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_error_for_people_is_one_line_and_status_1(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=None))
    with pytest.raises(SystemExit) as stop:
        run_script(mock.Mock(side_effect=UserError("--lr is wrong")))
    assert stop.value.code == "train.py: --lr is wrong"  # Python prints a text on stderr, and ends with status 1


class Refusing(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> None:
        try:
            {}[i]
        except KeyError as error:
            raise DatasetError("a.jpg: cut off\n  twice") from error


def test_error_in_a_loader_process_has_no_traceback_either():
    loader = torch.utils.data.DataLoader(Refusing(), num_workers=1)
    with pytest.raises(SystemExit, match=r": a\.jpg: cut off\n  twice$") as stop:
        run_script(lambda: next(iter(loader)))
    assert stop.value.code.count("\n") == 1


def test_set_without_boxes_is_refused(call, changed, tmp_path):
    root = changed(lambda content: content.update(annotations=[]))
    with pytest.raises(DatasetError, match="no boxes to learn from"):
        call(train, "--data", root, *SHORT, "--out", tmp_path)


def test_small_boxes_and_too_little_memory_are_warned_of(call, changed, tmp_path, monkeypatch):
    """The size in the warning, and what is learned, follow --augment."""

    def shrink(content: dict) -> None:
        for record in content["annotations"]:
            record["bbox"] = [5, 5, 1.5, 30] if record["id"] % 2 else [5, 5, 30, 30]

    monkeypatch.setattr(environment, "available_bytes", lambda *_: 2**20)
    root, losses = changed(shrink), set()
    for augment, size in {"none": "64 x 64", "flip": "64 x 64", "light": "80 x 80", "strong": "107 x 107"}.items():
        said = call(train, "--data", root, *SHORT, "--augment", augment, "--out", tmp_path / augment)
        assert "% of the boxes are under 2 px wide or high at --image-size 64 107" in said
        assert f"warning: a step of 2 images of up to {size} px" in said and "--image-size" in said
        losses.add(log_of(tmp_path / augment)[0]["loss"])
    assert len(losses) == 4


# To try things out


def test_profile_leaves_a_trace_and_no_step(call, two_images, tmp_path):
    args = ("--data", two_images, *SHORT, "--steps", 20, "--eval-every", 99, "--out", tmp_path)
    said = call(train, "--profile", 2, *args)
    assert "2 steps after 5" in said and "aten::" in said
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sum("Optimizer.step" in event.get("name", "") for event in events) == 2
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-00000000.pt"]


def test_overfit_takes_the_first_images_and_init_the_weights_of_a_file(call, trained, changed, tmp_path):
    weights = trained / "ota.safetensors"
    args = ("--data", changed(), *SHORT, "--batch-size", 4, "--overfit", 3, "--init", weights)
    said = call(train, *args, "--out", tmp_path / "out")
    assert "2 steps of 3 images" in said and metrics_of(tmp_path / "out")["images"] == 3  # not the 4 of --batch-size
    assert f"weights from {weights}, which has the same 5 classes" in said


# Other systems and terminals


NAMES = ["自行车", "lone \ud800", "\x1b[31mred\x1b[0m", "two\nlines", "\u202eright to left"]
LESS_THAN_LINUX = """
import os, runpy, signal, sys
sys.modules["triton"] = sys.modules["fcntl"] = None
del signal.SIGUSR1, os.O_DIRECTORY
runpy.run_path("train.py", run_name="__main__")
import export, predict
"""


def test_system_without_triton_locks_and_posix_signals_and_an_ascii_terminal(changed, tmp_path):
    """As Windows, which opens no folders, and macOS. No name acts on the terminal; the files have names as they are."""

    def rename(content: dict) -> None:
        content["categories"] = [c | {"name": n} for c, n in zip(content["categories"], NAMES, strict=True)]

    ascii_only = {"PYTHONIOENCODING": "ascii", "OMP_NUM_THREADS": "1"}
    said = run("-c", LESS_THAN_LINUX, "--data", changed(rename), *SHORT, "--out", tmp_path / "out", **ascii_only)
    assert said.count("two\\nlines") == 2 and "\\u81ea" in said and "\x1b[31m" not in said
    per_class = metrics_of(tmp_path / "out")["per_class"]
    assert set(per_class) == set(NAMES)
    cuts = load_weights(tmp_path / "out" / "ota.safetensors")[0].cuts
    assert cuts == [per_class[name]["score"] for name in NAMES]


# Minutes


@pytest.mark.slow
def test_default_command_reaches_the_quality_of_the_readme(tmp_path):
    """README: AP 0.663, AP50 0.884; other machines gave AP 0.670 and 0.673. The floors leave room for such rounding,
    which is a tenth of what a broken assignment, loss or schedule costs."""
    run("train.py", "--out", tmp_path / "out", OTA_DATA=str(tmp_path))
    metrics = metrics_of(tmp_path / "out")
    assert metrics["AP"] >= 0.64 and metrics["AP50"] >= 0.87, metrics


@pytest.mark.slow
def test_compiled_network_learns_like_the_eager_one(changed, tmp_path):
    """Minutes of compilation. Images of 96 x 96 px need one padded size, so the network is compiled once."""
    root, losses = changed(), {}
    for flags in ((), ("--compile",)):
        out = tmp_path / f"out{len(flags)}"
        said = run("train.py", "--data", root, *SHORT, "--steps", 8, "--log-every", 2, *flags, "--out", out)
        assert ("sides are 64, " in said) == bool(flags)
        losses[flags] = [line["loss"] for line in log_of(out) if "loss" in line]
    assert losses["--compile",] == pytest.approx(losses[()], rel=0.02)
