"""benchmarks/train_step.py on a tiny case: both sides are there with all their numbers, and the gate holds."""

import json
import math
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import kernels
from benchmarks import train_step
from benchmarks.contestants import CONTESTANTS, MERGED_PHASES, PHASES, Case, Sanity, make_batch, targets_of
from model import Detector, assigners, detector
from model.batch import pack
from tests.support.scenes import WORKLOADS, make_workload

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


def test_compiled_as_a_whole_the_parts_up_to_the_losses_are_told_together(monkeypatch):
    """With stand-ins for torch.compile; the batch is padded and marked as train.py does it."""
    seen = []

    def compile_whole(model, mode):
        model.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs))
        return "network and losses"

    monkeypatch.setattr(Detector, "compile_training", compile_whole)
    batch = make_batch(TINY)
    with CONTESTANTS["ours"](TINY, batch, False) as contestant:
        contestant.compile()
        assert assigners.ota_assign is kernels.ota_assign  # nothing is marked inside of the region
        for _ in range(2):
            contestant.step()
            phases = contestant.phases_ms(contestant.moments)
        assert contestant.phases == MERGED_PHASES and len(phases) == 3 and min(phases) > 0
    expected = pack(list(batch.images), targets_of(batch), (64, 64))
    assert all(torch.equal(a, b) for a, b in zip(seen[0], expected, strict=True))
    assert len(expected.gt_boxes) == len(expected.ignore_boxes) == 64 > len(batch.gt_boxes)
    assert all(0 in seen[0][i]._dynamo_dynamic_indices for i in (2, 3, 5, 6))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("has_triton", [True, False], ids=["triton", "no-triton"])
@pytest.mark.parametrize("assigner", ["ota", "atss"])
def test_what_is_compiled(assigner, device, has_triton, monkeypatch):
    def part(name: str) -> SimpleNamespace:
        return SimpleNamespace(compile=lambda **settings: compiled.append((name, settings)))

    compiled = []
    model = part("detector")
    model.mean, model.config = SimpleNamespace(device=torch.device(device)), SimpleNamespace(assigner=assigner)
    model.backbone, model.head = part("backbone"), part("head")
    monkeypatch.setattr(detector, "HAS_TRITON", has_triton)
    settings = {"dynamic": False, "mode": "reduce-overhead"}
    parts = Detector.compile_training(model, "reduce-overhead")
    if device == "cuda" and has_triton and assigner == "ota":
        assert compiled == [("detector", settings)] and parts == "backbone, neck and head, assignment and losses"
    else:
        assert compiled == [("backbone", settings), ("head", settings)] and parts == "backbone, neck and head"


@pytest.mark.slow
@pytest.mark.parametrize("when", [0, 1], ids=["gate", "row"])
def test_too_little_memory_for_torchvision_costs_its_row_only(when, tiny_case, tmp_path, monkeypatch, capsys):
    calls = []

    def large(case, batch, bf16):
        calls.append(case)
        if len(calls) > when:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return CONTESTANTS["torchvision"](case, batch, bf16)

    monkeypatch.setattr(
        train_step, "CONTESTANTS", {"ours": CONTESTANTS["ours"], "torchvision": large, "last": CONTESTANTS["ours"]}
    )
    path = tmp_path / "step.json"
    assert train_step.main(["--out", str(path), "--repeats", "1"]) == 0
    rows = json.loads(path.read_text())["cases"]["tiny"]["rows"]
    assert rows["torchvision"] == {"skipped": "OutOfMemoryError: CUDA out of memory. Tried to allocate"}
    assert rows["ours"]["images_per_s"] > 0 and rows["last"]["images_per_s"] > 0


def test_any_other_failure_ends_the_run(tiny_case, monkeypatch):
    monkeypatch.setattr(train_step, "timed_steps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_step.main([])


def test_one_contestant_at_a_time_is_in_memory(tiny_case, tmp_path, monkeypatch):
    models = []

    def alone(case, batch, bf16):
        assert all(model() is None for model in models)
        return noted(case, batch, bf16)

    @contextmanager
    def noted(case, batch, bf16):
        with CONTESTANTS["ours"](case, batch, bf16) as contestant:
            models.append(weakref.ref(contestant.model))
            yield contestant

    monkeypatch.setattr(train_step, "CONTESTANTS", {"ours": alone, "again": alone})
    assert train_step.main(["--repeats", "1"]) == 0
    assert len(models) == 4  # a gate and a row for both


def test_compiled_rows_that_would_not_end_in_time_are_left_out(tiny_case, tmp_path):
    path = tmp_path / "step.json"
    assert train_step.main(["--out", str(path), "--repeats", "1", "--compile", "--budget", "60"]) == 0
    rows = json.loads(path.read_text())["cases"]["tiny"]["rows"]
    assert rows["ours"]["images_per_s"] > 0 and "left out, the 60 s of --budget" in rows["ours, compiled"]["skipped"]


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
    batch = make_batch(Case("resnet50", workload.image_size, len(workload.counts)))
    assert tuple(batch.gt_offsets.diff().tolist()) == workload.counts
    first = make_workload(workload, images=1).gt_boxes
    assert torch.equal(batch.gt_boxes[: len(first)], first)
    assert batch.images.shape == (16, 3, 800, 1344) and batch.images.dtype == torch.uint8
