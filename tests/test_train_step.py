"""benchmarks/train_step.py on a tiny case: both sides are there with all their numbers, and the gate holds."""

import json
import math
from dataclasses import replace

import pytest
import torch

from benchmarks import train_step
from benchmarks.contestants import CONTESTANTS, PHASES, Case, Sanity, make_batch
from benchmarks.scenes import WORKLOADS, make_workload
from model import detector

TINY = Case("resnet18", (64, 64), 2)


@pytest.fixture
def tiny_case(monkeypatch):
    """The only one, on a CPU in float32 even where there is a GPU, and with as few steps as can be."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(train_step, "CASES", {"cpu": {"tiny": TINY}})
    monkeypatch.setattr(train_step, "MATMUL_SIDE", {"cpu": 128})
    monkeypatch.setattr(train_step, "CONTESTANTS", {name: CONTESTANTS[name] for name in ("ours", "torchvision")})
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def test_report_has_both_sides_with_all_costs(tiny_case, tmp_path, capsys):
    path = tmp_path / "step.json"
    assert train_step.main(["--out", str(path), "--repeats", "2"]) == 0
    report = json.loads(path.read_text())
    assert {"device", "torch", "commit", "date", "precision", "matmul_tflop_per_s"} <= report.keys()
    case = report["cases"]["tiny"]
    assert list(case["rows"]) == list(case["sanity"]) == ["ours", "torchvision"]
    ours, theirs = case["sanity"].values()
    assert ours["points"] == theirs["points"] == 2 * (64 + 16 + 4 + 1 + 1)
    assert ours["parameters"] == theirs["parameters"] + 5  # the learned scale of every level
    assert ours["tflop"] == pytest.approx(theirs["tflop"], rel=1e-3) and ours["tflop"] > 0
    assert case["host_syncs_of_ours"] == {}  # there is no device to wait for
    for name, row in case["rows"].items():
        assert row["steps"] == 2 and 0 < row["ms_quantile_20"] <= row["ms_median"] <= row["ms_quantile_80"], name
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms_median"])
        assert tuple(row["phase_share"]) == tuple(row["phase_ms"]) == PHASES
        assert sum(row["phase_share"].values()) == pytest.approx(1) and min(row["phase_share"].values()) > 0
        assert row["peak_mib"] > row["resident_mib"] > 0 and row["tflop_per_s"] > 0 and row["matmul_share"] > 0
        assert row["kernel_launches"] is row["copies_and_memsets"] is row["host_syncs"] is None
    printed = capsys.readouterr().out
    assert all(f"tiny: {name}" in printed for name in case["rows"])


def test_nothing_is_told_when_a_loss_is_not_finite(tiny_case, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_step, "CONTESTANTS", {"ours": CONTESTANTS["ours"]})
    losses_of = detector.detection_losses

    def spoilt(*args):
        return {name: loss * math.nan for name, loss in losses_of(*args).items()}

    monkeypatch.setattr(detector, "detection_losses", spoilt)
    path = tmp_path / "step.json"
    assert train_step.main(["--out", str(path)]) == 1 and not path.exists()
    printed = capsys.readouterr()
    assert "tiny, ours: the losses are not finite" in printed.err and "img/s" not in printed.out


@pytest.mark.parametrize(
    "changes",
    [{"losses": {"cls": math.inf}}, {"gradient_norm": 0.0}, {"gradient_norm": math.nan}, {"positives": 0}],
    ids=["loss-not-finite", "no-gradient", "gradient-not-finite", "no-positives"],
)
def test_gate_names_the_one_thing_that_is_wrong(changes):
    healthy = Sanity(parameters=1, points=9, positives=2, losses={"cls": 1.0}, gradient_norm=1.0, tflop=None)
    assert healthy.failures() == [] and len(replace(healthy, **changes).failures()) == 1


def test_ground_truths_are_those_of_the_coco_workload():
    workload = WORKLOADS["coco"]
    batch = make_batch(Case("resnet50", workload.image_size, len(workload.counts)), torch.device("cpu"))
    assert tuple(batch.gt_offsets.diff().tolist()) == workload.counts
    first = make_workload(workload, images=1).gt_boxes
    assert torch.equal(batch.gt_boxes[: len(first)], first)
    assert batch.images.shape == (16, 3, 800, 1344) and batch.images.dtype == torch.uint8
