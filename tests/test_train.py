"""The commands: training, evaluation, what they write and what they say when something is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import eval as eval_script
import train
from data import CocoDataset, DatasetError, eval_transform, find_splits, generate_shapes
from errors import UserError
from eval import batches_of_one_size, coco_metrics
from kernels import OTAConfig
from model import DetectorConfig, load_weights

ROOT = Path(__file__).parent.parent
CPU = ["--device", "cpu", "--workers", "0"]
TINY = ["--backbone", "test_resnet", "--no-pretrained", "--channels", "64", "--head-convs", "2", *CPU]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def command(*args, ranks: int = 1) -> list[str]:
    return [sys.executable, *(TORCHRUN if ranks > 1 else []), *map(str, args)]


def run(*args, ranks: int = 1) -> str:
    done = subprocess.run(command(*args, ranks=ranks), cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def four_images(tmp_path_factory) -> Path:
    """A data set of four generated training images and no validation part."""
    root = tmp_path_factory.mktemp("four") / "shapes"
    generate_shapes(root, train_images=4, val_images=0, size_px=128)
    (root / "annotations" / "instances_val.json").unlink()
    return root


@pytest.fixture(scope="module")
def trained(call, four_images, tmp_path_factory) -> Path:
    """The folder of a run that learned the four images by heart."""
    out = tmp_path_factory.mktemp("run") / "out"
    said = call(
        *(train, "--data", four_images, *TINY, "--image-size", 128, "--batch-size", 4, "--steps", 250),
        *("--lr", 8e-3, "--warmup", 20, "--ota", "radius=3", "top_q=10", "--eval-every", 1000, "--out", out),
    )
    assert "learning rate 0.002 = 0.008 x 4 / 16" in said
    return out


def test_four_images_are_learned_by_heart(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["AP"] > 0.9
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0] and lines[-1]["split"] == "train"
    assert set(lines[0]) >= {"step", "lr", "cls", "box", "iou", "positives_per_gt", "images_per_s", "data_wait"}


def test_run_folder_holds_what_is_promised(trained, four_images):
    for name in ("curves.png", "samples.png"):
        Image.open(trained / name).load()
    settings = json.loads((trained / "args.json").read_text())
    assert settings["args"]["steps"] == 250 and settings["torch"] == torch.__version__
    assert {"commit", "command", "device", "timm", "date"} <= set(settings)
    metadata = load_weights(trained / "ota.safetensors")[1]
    assert metadata["class_names"] == find_dataset(four_images).class_names
    assert metadata["category_ids"] == [1, 2, 3, 4, 5]
    assert metadata["architecture"]["image_size"] == [128, 213]
    assert metadata["architecture"]["ota"]["top_q"] == 10
    assert metadata["training"]["step"] == 250


def find_dataset(folder: Path) -> CocoDataset:
    return CocoDataset(find_splits(str(folder))[0], eval_transform((128, 213)))


@pytest.fixture(scope="module")
def evaluated(call, trained, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated")
    said = call(eval_script, "--weights", trained / "ota.safetensors", "--out", out, *CPU)
    assert f"AP {metrics_of(out)['AP']:.3f}  AP50" in said and "triangle" in said
    return out


def metrics_of(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def assert_same_metrics(one: Path, other: Path) -> None:
    for name in eval_script.METRICS:
        assert abs(metrics_of(one)[name] - metrics_of(other)[name]) < 1e-6, name


def test_eval_gives_the_ap_that_training_printed(trained, evaluated):
    assert_same_metrics(evaluated, trained)
    assert metrics_of(evaluated)["images"] == 4
    assert all(set(r) == {"image_id", "category_id", "bbox", "score"} for r in results_of(evaluated))


def test_two_ranks_evaluate_like_one(trained, tmp_path):
    said = run("eval.py", "--weights", trained / "ota.safetensors", "--out", tmp_path, *CPU, ranks=2)
    assert_same_metrics(tmp_path, trained)
    assert metrics_of(tmp_path)["images"] == 4 and f"AP {metrics_of(tmp_path)['AP']:.3f}  AP50" in said


def results_of(folder: Path) -> list[dict]:
    return json.loads((folder / "detections.json").read_text())


def test_eval_works_without_triton(trained, tmp_path):
    """And in a process of its own."""
    blocked = "import sys; sys.modules['triton'] = None; import runpy; runpy.run_path('eval.py', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", blocked, "--weights", trained / "ota.safetensors", "--out", tmp_path, *CPU],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same_metrics(tmp_path, trained)


def test_two_ranks_evaluate_the_weights_that_they_save(call, tmp_path):
    """The ranks' batch norms differ after a step; the validation part fills more than one batch."""
    generate_shapes(tmp_path / "shapes", train_images=16, val_images=24, size_px=96)
    out = tmp_path / "out"
    run("train.py", "--data", tmp_path / "shapes", *TINY, "--image-size", 96, "--batch-size", 4, "--steps", 60,
        "--lr", 8e-3, "--log-every", 20, "--eval-every", 100, "--out", out, ranks=2)  # fmt: skip
    assert len((out / "log.jsonl").read_text().splitlines()) == 4  # three log lines and one evaluation
    call(eval_script, "--weights", out / "ota.safetensors", "--out", tmp_path, *CPU)
    assert_same_metrics(tmp_path, out)
    assert metrics_of(out)["AP50"] > 0


RANKS = """
import sys
from data import DatasetError
from training.process import from_main, setup_distributed
_, rank, _ = setup_distributed("cpu")
def fail():
    raise DatasetError(f"rank {rank} cannot read")
read = from_main(lambda: [rank] * 1000)
try:
    from_main(fail)
except DatasetError as error:
    open(f"{sys.argv[1]}/{rank}", "w").write(f"{sum(read)}, {error}")
"""


def test_first_rank_reads_for_all_and_its_error_is_everyones(tmp_path):
    (tmp_path / "ranks.py").write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}){RANKS}")
    run(tmp_path / "ranks.py", tmp_path, ranks=2)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["0, rank 0 cannot read"] * 2


def test_ctrl_c_under_torchrun_leaves_usable_weights(four_images, tmp_path):
    """Of one process, as of other signals: test_resume.py."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("train.py", "--data", four_images, *TINY, "--image-size", 64, "--batch-size", 4, "--steps", 100_000,
                "--log-every", 1, "--eval-every", 100_000, "--workers", 1, "--out", out, ranks=2),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    said = ""
    for line in process.stdout:
        said += line
        if line.startswith("step 2/"):
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    process.wait(60)
    assert "interrupted after step" in said, said
    assert process.returncode != 0
    step = load_weights(out / "ota.safetensors")[1]["training"]["step"]
    assert 2 <= step < 100_000


@pytest.mark.parametrize(
    "args, error, message",
    [
        (["--data", "nowhere"], DatasetError, "nowhere does not exist"),
        (["--batch-size", "8"], UserError, r"--batch-size 8 .* 4 images"),
        (["--lr", "1e38"], UserError, r"step \d.*not finite \(cls .* box .*iou .*image ids \d"),
        (["--backbone", "resnet999"], UserError, "resnet999.*--backbone"),
        (["--device", "toaster"], UserError, "cannot use --device toaster"),
        (["--channels", "30"], UserError, "--channels"),
    ],
    ids=["no-data", "batch-over-images", "loss-not-finite", "no-backbone", "no-device", "odd-channels"],
)
def test_train_stops_with_a_name(call, four_images, tmp_path, args, error, message):
    base = ["--data", four_images, *TINY, "--image-size", "64", "--batch-size", "4", "--steps", "4", "--warmup", "1"]
    with pytest.raises(error, match=message):
        call(train, *base, "--out", tmp_path / "out", *args)


def test_set_without_boxes_is_refused(call, four_images, tmp_path):
    shutil.copytree(four_images, tmp_path / "empty")
    path = tmp_path / "empty" / "annotations" / "instances_train.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"annotations": []}))
    with pytest.raises(DatasetError, match="no boxes to learn from"):
        call(train, "--data", tmp_path / "empty", *TINY, "--out", tmp_path / "out")


@pytest.mark.parametrize("flag", ["--steps", "--batch-size", "--channels"])
def test_zero_is_refused_by_flag(call, capsys, flag):
    with pytest.raises(SystemExit):
        call(train, flag, "0")
    assert f"{flag}: 0 is not an integer of at least 1" in capsys.readouterr().err


def test_radius_of_a_recipe_belongs_to_its_prior(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--ota", "center_prior=radius"])
    assert train.detector_config(train.parse_args(), 5).ota.radius == 2.5


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["radius=2.5"], "OTAConfig.radius is 2.5: 'closest'"),
        (["top_q=0"], "OTAConfig.top_q is 0, it must be at least 1"),
        (["eps=nan"], "OTAConfig.eps"),
        (["alpha=x"], "OTAConfig.alpha is 'x', it must be a number"),
        (["cls_cost=hinge"], "OTAConfig.cls_cost is 'hinge', choose from focal, bce"),
        (["sigma=1"], "'sigma=1' is no key=value with a key of alpha, eps,"),
        (["top_q"], "'top_q' is no key=value"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_settings_of_ota_are_checked(call, capsys, args, message):
    with pytest.raises(SystemExit):
        call(train, "--ota", *args)
    assert message in capsys.readouterr().err


def test_settings_of_ota_override_the_recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--ota", "top_q=7", "fixed_k=null", "rescale=false"])
    expected = OTAConfig(radius=3, top_q=7, rescale=False)
    assert train.detector_config(train.parse_args(), 5).ota == expected


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--radius", "3"], "--radius is now --ota radius=VALUE"),
        (["--no-rescale"], "--no-rescale is now --ota rescale=VALUE"),
        (["--no-group-aspect"], "--no-group-aspect is always on"),
        (["--frozen-norm"], "--frozen-norm follows --pretrained"),
        (["--resume", "never"], "--resume is gone; .* --out"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_flags_of_before_name_the_new_form(call, capsys, args, message):
    with pytest.raises(SystemExit):
        call(train, *args)
    assert re.search(message, capsys.readouterr().err)


def test_train_refuses_a_folder_with_another_run(call, four_images, trained):
    before = (trained / "ota.safetensors").read_bytes()
    args = ["--data", four_images, *TINY, "--batch-size", "4", "--out", trained]
    with pytest.raises(UserError, match=r"holds step 250(.|\n)*--lr: was 0.008, is 0.01 now(.|\n)*--out"):
        call(train, *args, "--lr", "0.01", "--steps", "1")
    assert (trained / "ota.safetensors").read_bytes() == before


def test_pretrained_without_a_hub_is_one_clear_line(four_images, tmp_path):
    done = subprocess.run(
        command("train.py", "--data", four_images, "--pretrained", "--backbone", "resnet18", "--batch-size", "4",
                *CPU, "--out", tmp_path / "out"),
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1 and "--no-pretrained" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_coco_recipe_is_the_papers(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "coco"])
    args = train.parse_args()
    assert (args.backbone, args.pretrained, args.image_size, args.optimizer) == ("resnet50", True, [800, 1333], "sgd")
    assert (args.steps, args.batch_size, args.lr, args.weight_decay) == (90_000, 16, 0.01, 1e-4)
    assert train.detector_config(args, 80) == DetectorConfig(80, frozen_norm=True)
    rates = [train.learning_rate(step, 90_000, args) for step in (0, 500, 59_999, 60_000, 79_999, 80_000)]
    assert rates == pytest.approx([1e-5, 0.00501, 0.01, 0.001, 0.001, 0.0001])
    args.batch_size = 64
    assert train.learning_rate(50_000, 90_000, args) == pytest.approx(0.04)


def test_eval_refuses_other_classes(call, trained, four_images, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(four_images, other)
    path = other / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    content["categories"][1]["name"] = "rhombus"
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="2 square.*2 rhombus.*--data"):
        call(eval_script, "--weights", trained / "ota.safetensors", "--data", other)


def test_known_detections_give_known_numbers(four_images):
    annotations = find_dataset(four_images).annotations
    perfect = [
        {k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.9} for a in annotations["annotations"]
    ]
    assert coco_metrics(annotations, perfect)["AP"] == 1.0
    assert coco_metrics(annotations, [])["AP"] == 0.0

    # One class, two boxes, one found with IoU 0.75: precision 1 up to recall 0.5 (51 of 101 points), at the six
    # thresholds 0.5 to 0.75.
    truth = {
        "images": [{"id": 7, "width": 100, "height": 100, "file_name": "x.jpg"}],
        "categories": [{"id": 3, "name": "thing"}],
        "annotations": [
            {"id": i, "image_id": 7, "category_id": 3, "bbox": box, "area": 1600, "iscrowd": 0}
            for i, box in ((1, [0, 0, 40, 40]), (2, [50, 50, 40, 40]))
        ],
    }
    metrics = coco_metrics(truth, [{"image_id": 7, "category_id": 3, "bbox": [0, 0, 40, 30], "score": 0.5}])
    assert metrics["AP50"] == pytest.approx(51 / 101)
    assert metrics["AP"] == pytest.approx(0.6 * 51 / 101)
    assert metrics["per_class"]["thing"]["boxes"] == 2 and metrics["APl"] == -1


def test_detections_file_is_a_coco_result(evaluated, four_images):
    truth = COCO(four_images / "annotations" / "instances_train.json")
    assert len(truth.loadRes(str(evaluated / "detections.json")).anns) == len(results_of(evaluated)) > 10


def test_batches_hold_one_padded_size_and_every_image_once():
    sizes = np.array([(128, 170), (170, 128), (128, 170), (128, 170), (128, 128)])
    batches = batches_of_one_size(SimpleNamespace(resized_sizes=lambda _: sizes), (128, 213), 2)
    assert sorted(i for batch in batches for i in batch) == [0, 1, 2, 3, 4]
    assert sorted(map(len, batches)) == [1, 1, 1, 2]
