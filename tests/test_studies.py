"""Studies: strategies compared, pictures of assignments, and Sinkhorn beside the exact plan."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from matplotlib.colors import to_hex

from data import CocoDataset, find_splits, generate_shapes
from errors import UserError
from kernels import Inputs, OTAConfig, PointGrid, assignment_statistics
from kernels.assign_torch import solve
from kernels.config import Plan
from kernels.statistics import dual_potentials, units_in_marginals
from model import save_weights
from model.assigners import assign_with_statistics
from studies import audit, compare, draw_assignment
from studies.compare import COLUMNS, crowded_images
from studies.draw_assignment import colors_of, generated_crowd
from studies.exact import DUAL_TOLERANCE, exact_pairs, exact_units
from tests.support.backends import GRID, C
from tests.support.detectors import tiny_detector
from tests.support.scenes import make_scene, trained_predictions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CocoDataset:
    """Three generated images."""
    root = tmp_path_factory.mktemp("data") / "shapes"
    generate_shapes(root, train_images=1, val_images=3, size_px=96, seed=2)
    return CocoDataset(find_splits(str(root))[1])


@pytest.fixture(scope="module")
def weights(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "ota.safetensors"
    about = {"class_names": dataset.class_names, "category_ids": dataset.category_ids}
    about["data"] = str(dataset.split.annotations.parents[1])
    save_weights(path, tiny_detector(num_classes=5, image_size=(96, 160), ota=OTAConfig(radius=3)), about)
    return path


def test_crowded_images():
    """Boxes of 10 x 10 px. Image 1: 5 px apart, IoU 1/3; image 2: 6 px, IoU 1/4; image 3: one is a crowd region."""
    boxes = [(1, 0, 0), (1, 5, 0), (2, 0, 0), (2, 6, 0), (3, 0, 0), (3, 1, 1)]
    rows = [{"image_id": i, "bbox": [x, 0, 10, 10], "iscrowd": crowd} for i, x, crowd in boxes]
    assert crowded_images({"annotations": rows}) == {1}


def test_runs_become_rows_a_table_and_a_plot(weights, tmp_path, monkeypatch, capsys):
    """Runs as train.py leaves them, without the training."""

    def finished_run(command: list[str], **_) -> CompletedProcess:
        folder, seed = (command[command.index(flag) + 1] for flag in ("--out", "--seed"))
        Path(folder).mkdir()
        metrics = {name: 0.25 + 0.5 * int(seed) for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
        metrics |= {"per_class": {"disk": {"AP": 0.5, "AP50": 1, "boxes": 3}}, "total_s": 7.0}
        lines = [{"step": 2, "positives_per_gt": 1.5, "ambiguous": 0.125}, {"step": 3, "AP": 0.5}]
        Path(folder, "metrics.json").write_text(json.dumps(metrics))
        Path(folder, "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
        Path(folder, "ota.safetensors").write_bytes(weights.read_bytes())
        return CompletedProcess(command, 0, "AP 0.25\n", "")

    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=finished_run))
    with pytest.raises(UserError, match="--assigners ota:radios=3: 'radios=3' is no key=value"):
        compare.main(["--assigners", "ota:radios=3", "--out", str(tmp_path)])
    compare.main(["--assigners", "ota:radius=3", "fcos", "--seeds", "0", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "compare.json").read_text())
    assert [[row["AP"] for row in rows] for rows in report["rows"].values()] == [[0.25, 0.75]] * 2
    row = report["rows"]["ota:radius=3"][0]
    assert set(COLUMNS) <= row.keys() and row["positives_per_gt"] == 1.5 and row["ambiguous_share"] == 0.125
    assert row["per_class"] == {"disk": 0.5} and row["seconds"] == 7 and -1 <= row["AP_crowded"] <= 1
    assert "| fcos | 0.500 ± 0.354 |" in capsys.readouterr().out
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_of_a_generated_crowd(tmp_path, figures):
    draw_assignment.main(["--out", str(tmp_path), "--strategies", "ota"])
    for name in ("levels.png", "plan.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    levels, plan = figures

    # levels.png has the positive points in the colours of their objects.
    _, _, scene, config = generated_crowd()
    points, colors = scene.grid.points(), colors_of(scene.gt_boxes)
    match, _, _ = assign_with_statistics("ota", scene, config)
    expected = {(*points[n].tolist(), colors[c]) for n, c in enumerate(match.gt_index[0].tolist()) if c >= 0}
    dots = [axis.collections[1] for axis in levels.axes]
    drawn = [zip(d.get_offsets().tolist(), d.get_facecolors(), strict=True) for d in dots]
    assert {(*place, to_hex(color)) for level in drawn for place, color in level} == expected

    # In plan.png every point receives one unit, and every object sends its supply.
    sent = [[axis.images[0].get_array() for axis in plan.axes[5 * level :][:4]] for level in range(3)]
    *objects, background = (torch.cat([torch.tensor(row[i].filled(0)).flatten() for row in sent]) for i in range(4))
    titles = [f"object {i + 1} supplies {round(float(units.sum()))}" for i, units in enumerate(objects)]
    assert [axis.get_title() for axis in plan.axes[:3]] == titles
    total = torch.stack([*objects, background]).sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-2)


def test_pictures_and_audit_of_a_detector(weights, dataset, tmp_path, figures, monkeypatch):
    out = str(tmp_path)
    draw_assignment.main(["--weights", str(weights), "--image", "1", "--strategies", "ota", "--out", out])
    name = dataset.images[1]["file_name"]
    assert figures[0].get_suptitle().startswith(f"{name} of shapes, ota.safetensors\n")
    assert len(figures[0].axes[0].patches) == len(dataset[1][1]["boxes"])

    monkeypatch.setattr(audit, "ITERATIONS", (10,))
    audit.main(["--weights", str(weights), "--images", "2", "--out", out])
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["source"] == "ota.safetensors on shapes" and report["images"] == 2
    assert report["assigner"]["radius"] == 3 and report["positives"] > 0


def least_cost_by_brute_force(plan: Plan) -> float:
    """Over all labellings that meet the supplies."""
    rows, points = len(plan.k), len(plan.points)
    cost = torch.full((rows + 1, points), torch.inf, dtype=torch.float64)
    cost[-1] = 0
    cost[plan.gt, torch.searchsorted(plan.points, plan.flat_point)] = plan.cost.double()
    labels = torch.tensor(list(product(range(rows + 1), repeat=points)))
    meets = torch.stack([(labels == i).sum(1) == k for i, k in enumerate(plan.k)]).all(0)
    return float(cost[labels[meets], torch.arange(points)].sum(1).min())


def test_least_cost_is_that_of_brute_force():
    """Two objects, and a row that takes no part."""
    boxes, labels = torch.tensor([[2.0, 2, 22, 16], [8, 4, 31, 18], [2, 2, 9, 9]]), torch.tensor([0, 1, -1])
    grid = PointGrid((8, 16), ((3, 4), (2, 2)))
    logits, predicted = trained_predictions(grid, boxes[:2], labels[:2], 2, torch.Generator().manual_seed(3))
    _, plan = solve(Inputs(logits[None], predicted[None], boxes, labels, torch.tensor([0, 3]), grid), OTAConfig())
    assert 4 < len(plan.points) < 12 and len(plan.gt) > len(plan.points)
    pairs = exact_pairs(plan)
    assert torch.equal(torch.bincount(plan.gt[pairs], minlength=3), plan.k) and plan.k[2] == 0 < plan.k[:2].min()
    assert torch.bincount(plan.flat_point[pairs]).max() == 1
    assert float(plan.cost[pairs].double().sum()) == pytest.approx(least_cost_by_brute_force(plan), abs=1e-9)


@pytest.mark.parametrize(("prior", "reg_cost"), [("closest", "iou"), ("radius", "giou"), ("none", "smooth_l1")])
def test_bound_and_rounded_plan_enclose_the_exact_cost(prior, reg_cost):
    """10 scenes, before and after Sinkhorn has converged. Few of the plans cannot send all supplies."""
    config, complete = OTAConfig(center_prior=prior, reg_cost=reg_cost), 0
    for seed in range(10):
        scene = make_scene(GRID, (4 + seed,), C, seed, crowded=bool(seed % 2), size_px=(12, 90))
        for eps, iterations in ((1.0, 10), (0.1, 1), (0.1, 50), (0.01, 1000)):
            plan = solve(scene, replace(config, eps=eps, iterations=iterations))[1]
            cost, tolerance = plan.cost.double(), DUAL_TOLERANCE * len(plan.points)
            (u, v), units, k = dual_potentials(plan, eps), units_in_marginals(plan), plan.k.double()
            sent, received = torch.bincount(plan.gt, units), torch.bincount(plan.flat_point, units)
            assert units.min() >= 0 and received.max() <= 1 + 1e-12
            assert (sent <= k + 1e-12).all()
            complete += bool(sent.sum() > k.sum() - tolerance)
            for supplies in (sent, k):
                assert supplies @ u + v.sum() <= exact_units(plan, supplies) @ cost + tolerance
            assert exact_units(plan, sent) @ cost <= units @ cost + tolerance
    assert complete >= 32


@pytest.mark.parametrize("settings", [[(1, 50), (0.1, 50), (0.01, 5000)], [(0.1, 1), (0.1, 10), (0.1, 50)]])
def test_gap_falls_with_eps_and_iterations(settings):
    scene = make_scene(GRID, (5, 9), C, seed=1, crowded=True)
    configs = [OTAConfig(eps=eps, iterations=iterations) for eps, iterations in settings]
    gaps = [assignment_statistics(scene, config)[2]["gap"].item() for config in configs]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 3 * gaps[-1] > 0
    assert gaps[-1] < 5 * configs[-1].eps  # what is left is the price of eps


def test_audit_writes_table_report_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit, "ITERATIONS", (10, 50))
    audit.main(["--images", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["source"] == "synthetic workload coco" and report["images"] == 1
    assert {"scipy", "commit", "assigner"} <= report.keys() and report["positives"] > 0
    rows = {(row["eps"], row["iterations"]): row for row in report["rows"]}
    assert list(rows) == list(product((1.0, 0.1, 0.01), (10, 50)))
    assert rows[1.0, 10]["decoded"]["plain"]["changed"] > 0 and "residual" in capsys.readouterr().out
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match="--data needs --weights"):
        audit.main(["--data", "shapes"])
