"""Studies: strategies compared, and pictures of assignments, of a detector that has learned nothing.

Slow: two strategies trained and compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from matplotlib.colors import to_hex
from torchvision.ops import box_iou

from benchmarks.tables import seeds_table
from data import CocoDataset, DatasetError, find_splits, generate_shapes
from errors import UserError
from eval import load_with_data
from kernels import OTAConfig, PointGrid, ota_assign
from model import save_weights
from model.assigners import STRATEGIES, assign_with_statistics
from studies import audit, compare, draw_assignment
from studies.compare import COLUMNS, STUDIES, crowded_images, flags_of
from studies.draw_assignment import COLORS, colors_of, generated_crowd, toy_scene
from studies.predictions import find_image, predicted_scene
from tests.support.detectors import tiny_detector
from tests.support.pictures import record_figures
from tests.support.scenes import make_scene

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A generated data set of one training image and three of validation."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(root, train_images=1, val_images=3, size_px=96, seed=2)
    return root


@pytest.fixture(scope="module")
def dataset(shapes) -> CocoDataset:
    return CocoDataset(find_splits(str(shapes))[1])


@pytest.fixture(scope="module")
def weights(shapes, dataset, tmp_path_factory):
    detector = tiny_detector(num_classes=5, image_size=(96, 160), ota=OTAConfig(radius=3))
    path = tmp_path_factory.mktemp("weights") / "ota.safetensors"
    classes = {"class_names": dataset.class_names, "category_ids": dataset.category_ids}
    save_weights(path, detector, classes | {"data": str(shapes)})
    return path


# compare


def test_contestants_are_flags_of_train():
    assert flags_of("atss") == ["--assigner", "atss"]
    expected = ["--assigner", "ota", "--ota", "center_prior=none", "top_q=10"]
    assert flags_of("ota:center_prior=none,top_q=10") == expected
    for contestant in (name for study in STUDIES.values() for name in study):
        assert flags_of(contestant)[1] == contestant.partition(":")[0]


@pytest.mark.parametrize(
    "contestant, message",
    [("otta", "otta is none of ota, fcos"), ("ota:radios=3", "'radios=3' is no key=value with a key of alpha, eps"),
     ("atss:radius=3", "radius=3 is for ota alone")],
    ids=["strategy", "setting", "setting-of-ota"],
)  # fmt: skip
def test_unknown_contestant(contestant, message, tmp_path):
    with pytest.raises(UserError, match=message):
        compare.main(["--assigners", "ota", contestant, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_crowded_images():
    """Boxes of 10 x 10 px. Image 1: 5 px apart, IoU 1/3; image 2: 6 px, IoU 1/4; image 3: one is a crowd region."""
    boxes = [(1, 0, 0), (1, 5, 0), (2, 0, 0), (2, 6, 0), (3, 0, 0), (3, 1, 1)]
    rows = [{"image_id": i, "bbox": [x, 0, 10, 10], "iscrowd": crowd} for i, x, crowd in boxes]
    assert crowded_images({"annotations": rows}) == {1}


def test_table_has_means_and_deviations():
    seeds = [{"AP": ap, "seconds": 60.0, "per_class": {"cat": 0.5}} for ap in (0.1, 0.2, 0.3)]
    lines = seeds_table({"ota": seeds, "fcos": seeds[:1]}, {"AP": "AP", "cat": "cats", "seconds": "s"}).splitlines()
    assert lines[0] == "|  | AP | cats | s | seeds |" and lines[3] == "| fcos | 0.100 | 0.500 | 60 | 1 |"
    assert lines[2] == "| ota | 0.200 ± 0.100 | 0.500 ± 0.000 | 60 ± 0 | 3 |"


def test_runs_become_rows_a_table_and_a_plot(weights, tmp_path, monkeypatch, capsys):
    """Runs as train.py leaves them, without the training."""

    def finished_run(command: list[str], **_) -> CompletedProcess:
        folder, seed = (command[command.index(flag) + 1] for flag in ("--out", "--seed"))
        assert command[command.index("--steps") + 1] == "3"  # what stands after -- goes to train.py
        Path(folder).mkdir()
        metrics = {name: 0.25 + 0.5 * int(seed) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
        metrics |= {"per_class": {"disk": {"AP": 0.5, "AP50": 1, "boxes": 3}}, "total_s": 7.0}
        lines = [{"step": 2, "positives_per_gt": 1.5, "ambiguous": 0.125}, {"step": 3, "AP": 0.5}]
        Path(folder, "metrics.json").write_text(json.dumps(metrics))
        Path(folder, "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        Path(folder, "ota.safetensors").write_bytes(weights.read_bytes())
        return CompletedProcess(command, 0, "AP 0.25\n", "")

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=finished_run))
    figures, out = record_figures(monkeypatch), str(tmp_path)
    compare.main(["--assigners", "ota:radius=3", "fcos", "--seeds", "0", "1", "--out", out, "--", "--steps", "3"])
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report["command"].endswith("-- --steps 3") and {"commit", "torch"} <= report.keys()
    assert [[row["AP"] for row in rows] for rows in report["rows"].values()] == [[0.25, 0.75]] * 2
    row = report["rows"]["ota:radius=3"][0]
    assert set(COLUMNS) <= row.keys() and row["positives_per_gt"] == 1.5 and row["ambiguous_share"] == 0.125
    assert row["per_class"] == {"disk": 0.5} and row["seconds"] == 7 and -1 <= row["AP_crowded"] <= 1
    assert "| fcos | 0.500 ± 0.354 |" in capsys.readouterr().out
    dots, mean, *_ = figures[0].axes[0].lines
    assert list(dots.get_xdata()) == [0.25, 0.75] and list(mean.get_xdata()) == [0.5, 0.5]
    assert [text.get_text() for text in figures[0].axes[0].get_yticklabels()] == ["ota:radius=3", "fcos"]


def test_training_that_fails_ends_the_study_with_its_message(tmp_path, monkeypatch):
    failed = SimpleNamespace(run=lambda command, **_: CompletedProcess(command, 1, "", "no images"))
    monkeypatch.setattr(compare, "subprocess", failed)
    with pytest.raises(UserError, match="train.py --data shapes --assigner ota(.|\n)*failed:\nno images"):
        compare.main(["--assigners", "ota", "--out", str(tmp_path)])
    assert not (tmp_path / "compare.json").exists()


@pytest.mark.slow
def test_two_strategies_side_by_side(tmp_path):
    generate_shapes(tmp_path / "shapes", train_images=8, val_images=4, size_px=64)
    flags = ["--image-size", "64", "--batch-size", "4", "--steps", "3", "--backbone", "test_resnet", "--no-pretrained"]
    command = [sys.executable, "-m", "studies.compare", "--data", str(tmp_path / "shapes"), "--seeds", "0", "1"]
    command += ["--assigners", "ota:radius=3", "fcos", "--out", str(tmp_path / "out"), "--", *flags, "--channels", "16"]
    for _ in range(2):  # the second time nothing is left to be trained
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
        assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    rows = [row for name in ("ota:radius=3", "fcos") for row in record["rows"][name]]
    assert len(rows) == 4 and all(row["positives_per_gt"] > 0 and set(COLUMNS) <= row.keys() for row in rows)


# draw_assignment


def test_labels_are_those_of_ota_assign_and_ambiguity_that_of_the_log():
    scene, config = make_scene(PointGrid.for_image((104, 136), (8, 16, 32)), (5, 0, 7), 3, seed=1), OTAConfig()
    match, ambiguous, numbers = assign_with_statistics("ota", scene, config)
    expected = ota_assign(*scene, config, backend="torch")
    assert all(torch.equal(one, other) for one, other in zip(match, expected, strict=True))
    points = sum(len(draw_assignment.solve(image, config)[1].points) for image in scene.images())
    assert ambiguous.shape == match.gt_index.shape and not ambiguous[1].any()
    assert int(ambiguous.sum()) == round(float(numbers["ambiguous"]) * points) > 0


def test_boxes_that_meet_differ_in_colour():
    boxes = generated_crowd()[2].gt_boxes
    colors = colors_of(boxes)
    met = (box_iou(boxes, boxes) > 0).fill_diagonal_(False)
    assert met.any() and all(colors[i] != colors[j] for i, j in met.nonzero().tolist())
    same = colors_of(torch.tensor([[0.0, 0, 9, 9]]).repeat(25, 1))  # more than there are colours
    assert set(same[: len(COLORS)]) == set(COLORS) and len(same) == 25


def test_pictures_of_a_generated_crowd(tmp_path, monkeypatch, capsys):
    figures, strategies = record_figures(monkeypatch), STRATEGIES[:2]
    draw_assignment.main(["--out", str(tmp_path), "--strategies", *strategies])
    assert f"wrote {tmp_path / 'levels.png'}" in capsys.readouterr().out
    for name in ("levels.png", "plan.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    levels, plan = figures

    # A row of levels.png has a strategy's positive points in the colours of their objects, and rings around others.
    _, _, scene, config = generated_crowd()
    points, colors = scene.grid.points(), colors_of(scene.gt_boxes)
    per_row = len(levels.axes) // len(strategies)
    for row, strategy in enumerate(strategies):
        match, ambiguous, _ = assign_with_statistics(strategy, scene, config)
        expected = {(*points[n].tolist(), colors[c]) for n, c in enumerate(match.gt_index[0].tolist()) if c >= 0}
        drawn, rings = set(), 0
        for axis in levels.axes[row * per_row : (row + 1) * per_row]:
            _, dots, around = axis.collections
            places = zip(dots.get_offsets().tolist(), dots.get_facecolors(), strict=True)
            drawn |= {(*place, to_hex(color)) for place, color in places}
            rings += len(around.get_offsets())
            assert len(axis.patches) == len(scene.gt_boxes)
        assert drawn == expected and rings == int(ambiguous.sum())

    # plan.png: every object sends its supply, every point receives one unit, and some point has two senders.
    scene = toy_scene()
    sent = [[axis.images[0].get_array() for axis in plan.axes[5 * level :][:4]] for level in range(3)]
    *objects, background = (torch.cat([torch.tensor(row[i].filled(0)).flatten() for row in sent]) for i in range(4))
    titles = [f"object {i + 1} supplies {round(float(units.sum()))}" for i, units in enumerate(objects)]
    assert [axis.get_title() for axis in plan.axes[:3]] == titles
    total = torch.stack([*objects, background]).sum(0)
    torch.testing.assert_close(total, torch.ones(scene.grid.num_points, dtype=torch.float64), rtol=0, atol=1e-2)
    contended = (torch.stack(objects) > 0.05).sum(0) > 1
    assert contended.any() and assign_with_statistics("ota", scene, OTAConfig())[1][0, contended].all()


def test_pictures_and_audit_of_a_detector(weights, dataset, tmp_path, monkeypatch):
    figures = record_figures(monkeypatch)
    draw_assignment.main(["--weights", str(weights), "--image", "1", "--strategies", "ota", "--out", str(tmp_path)])
    name = dataset.images[1]["file_name"]
    assert figures[0].get_suptitle().startswith(f"{name} of shapes, ota.safetensors\n")
    assert len(figures[0].axes[0].patches) == len(dataset[1][1]["boxes"])

    detector, dataset, _ = load_with_data(weights, None)
    image, scene = predicted_scene(detector, dataset, 1)  # the image as the detector sees it
    assert image.shape == (3, 96, 96) and int(scene.gt_offsets[-1]) == len(dataset[1][1]["boxes"])
    assert scene.boxes.shape == (1, scene.grid.num_points, 4) and scene.logits.shape == (1, scene.grid.num_points, 5)

    monkeypatch.setattr(audit, "ITERATIONS", (10,))
    audit.main(["--weights", str(weights), "--images", "2", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["source"] == "ota.safetensors on shapes" and report["images"] == 2
    assert report["assigner"]["radius"] == 3 and report["positives"] > 0


def test_image_is_found_by_index_by_name_and_by_its_objects(dataset):
    counts = [len(dataset[i][1]["boxes"]) for i in range(3)]
    assert find_image(dataset, "2") == 2
    assert find_image(dataset, "000002.jpg") == 1
    assert counts[find_image(dataset, None)] == max(counts)
    for wanted in ("3", "-1", "other.jpg"):
        with pytest.raises(DatasetError, match=f"--image {wanted} is neither a file name in .* nor an index in 0..2"):
            find_image(dataset, wanted)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "1"], "--data and --image need --weights"),
        (["--image", "1"], "--data and --image need --weights"),
        (["--weights", "none.safetensors"], "there is no weights file none.safetensors"),
    ],
    ids=["data", "image", "no-weights"],
)
def test_flags_that_draw_nothing_are_named(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        draw_assignment.main([*flags, "--out", str(tmp_path)])
