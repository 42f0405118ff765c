"""The benchmarks on tiny cases: reports are complete, and no cost is reported when parity is broken."""

import json
import math
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as every_benchmark
from benchmarks import assign, losses, measure, tables, train_step
from benchmarks.measure import COLUMNS, MIB
from kernels import PointGrid
from model import Detector
from model.batch import pack
from tests.support.scenes import WORKLOADS, Workload, make_workload

pytestmark = pytest.mark.usefixtures("one_thread")
TINY_STEP = train_step.Case("resnet18", (64, 64), 2)


@pytest.fixture(autouse=True)
def tiny_cases(monkeypatch):
    """Run on a CPU even where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(WORKLOADS, "single", Workload((64, 96), (8, 16), 3, (2, 3), (10, 50)))
    monkeypatch.setattr(losses, "POINTS", 50)
    monkeypatch.setattr(train_step, "CASES", {"cpu": {"tiny": TINY_STEP}})
    monkeypatch.setattr(train_step, "WARMUP_STEPS", 0)
    monkeypatch.setattr(train_step, "LEAST_STEPS", 1)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def run(module, path, *flags: str) -> dict:
    module.main(["--out", str(path), "--repeats", "1", *flags])
    report = json.loads(path.read_text())
    assert {"device", "torch", "commit", "date"} <= report.keys()
    return report


def assert_costs(row: dict) -> None:
    assert 0 < row["ms_quantile_20"] <= row["ms_median"] <= row["ms_quantile_80"] and row["peak_mib"] > 0
    assert row.keys() >= set(COLUMNS.split()) and row["calls"] >= 1
    assert row["kernel_launches"] is row["host_syncs"] is None  # of a GPU


def test_assign(tmp_path, capsys):
    report = run(assign, tmp_path / "new" / "assign.json")["workloads"]["single"]
    assert report["about"]["ground_truths"] == 5 and report["parity"]["torch"]["failures"] == []
    assert list(report["rows"]) == ["torch", "reference"]
    for row in report["rows"].values():
        assert_costs(row)
    assert "torch against the float64 reference: Parity(images=2" in capsys.readouterr().out


def test_assign_reports_no_cost_when_parity_is_broken(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tests.support.parity.PLAN_TOLERANCE", -1)
    with pytest.raises(SystemExit, match="single, torch: image 0: plan differs by"):
        assign.main(["--out", str(tmp_path / "assign.json")])
    assert not (tmp_path / "assign.json").exists() and "ms_median" not in capsys.readouterr().out


def test_losses(tmp_path):
    report = run(losses, tmp_path / "losses.json", "--images", "2")
    assert list(report["results"]["float32"]) == ["torchvision", "torch"]
    for row in report["results"]["float32"].values():
        assert_costs(row)
        assert row["useful_gb_per_s"] > 0


def test_losses_report_no_cost_when_parity_is_broken(tmp_path, monkeypatch, capsys):
    focal_loss = losses.focal_loss
    monkeypatch.setattr(losses, "focal_loss", lambda *inputs, **more: 1.001 * focal_loss(*inputs, **more))
    with pytest.raises(SystemExit, match="the gradient is off by 1.0e-03 of its largest entry"):
        losses.main(["--images", "1", "--out", str(tmp_path / "losses.json")])
    assert not (tmp_path / "losses.json").exists() and "ms_median" not in capsys.readouterr().out


def test_train_step(tmp_path, monkeypatch):
    """Too little memory for a contestant costs its row alone."""

    def large(case, device, compiled):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")

    contestants = {name: train_step.CONTESTANTS[name] for name in ("ours", "torchvision")}
    monkeypatch.setattr(train_step, "CONTESTANTS", {"large": large} | contestants)
    case = run(train_step, tmp_path / "step.json")["cases"]["tiny"]
    assert list(case["rows"]) == list(case["sanity"]) == ["large", *contestants]
    assert case["rows"].pop("large") == {"skipped": "OutOfMemoryError: CUDA out of memory. Tried to allocate"}
    ours, theirs = (case["sanity"][name] for name in contestants)
    assert ours["parameters"] == theirs["parameters"] + 5  # the learned scale of every level
    assert ours["tflop"] == pytest.approx(theirs["tflop"], rel=1e-3) and ours["tflop"] > 0
    for row in case["rows"].values():
        assert_costs(row)
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms_median"]) and row["tflop_per_s"] > 0
        assert list(row["phase_ms"]) == ["network", "assignment and losses", "backward", "optimizer"]
        assert min(row["phase_ms"].values()) > 0


def test_train_step_reports_no_cost_when_a_loss_is_not_finite(tmp_path, monkeypatch, capsys):
    def broken(self, batch):
        losses, *more = forward(self, batch)
        return {name: loss * math.nan for name, loss in losses.items()}, *more

    forward = Detector.forward
    monkeypatch.setattr(Detector, "forward", broken)
    path = tmp_path / "step.json"
    with pytest.raises(SystemExit, match="tiny, ours: a loss or the gradient is 0 or not finite"):
        train_step.main(["--out", str(path)])
    assert not path.exists() and "ms_median" not in capsys.readouterr().out


def test_both_sides_have_the_same_feature_maps():
    ours, theirs = (
        contestant(TINY_STEP, torch.device("cpu"), False) for contestant in list(train_step.CONTESTANTS.values())[:2]
    )
    images, targets = train_step.make_samples(TINY_STEP)
    batch = pack(images, targets)
    with torch.no_grad():
        maps = ours.model.backbone(ours.model.normalise(batch.images, batch.sizes))
        normalised = theirs.model.transform([image.float() / 255 for image in images])[0].tensors
        for one, other in zip(maps, theirs.model.backbone(normalised).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_ground_truths_of_a_step_are_those_of_the_coco_workload():
    workload = WORKLOADS["coco"]
    _, targets = train_step.make_samples(train_step.Case("resnet50", workload.image_size, len(workload.counts)))
    assert tuple(len(target["boxes"]) for target in targets) == workload.counts
    assert torch.equal(targets[0]["boxes"], make_workload(workload, images=1).gt_boxes)


def test_compile_exits_with_the_failures_that_it_reports(tmp_path, monkeypatch, capsys):
    """Here of a kernel that is not there; the kernels that are there are compiled in test_compile.py."""
    pytest.importorskip("triton")
    from benchmarks import compile as aot

    binary = aot.Binary("sm_90", "kernels.nowhere", "_no_kernel", "float32", {"BLOCK": 128}, 4, "")
    monkeypatch.setattr(aot, "record_binaries", lambda target, brief: [binary])
    monkeypatch.setattr(aot, "set_target", lambda target: None)
    monkeypatch.setattr(aot, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(aot.triton.knobs.runtime, "interpret", False)
    path = tmp_path / "compile.json"
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--targets", "sm_90", "--out", str(path)])
    *_, count, failure = capsys.readouterr().out.splitlines()
    report = json.loads(path.read_text())
    assert stopped.value.code == 1 and count == "1 binaries, 1 failures" and report["failures"] == [failure]
    assert failure.startswith("_no_kernel (BLOCK=128, float32) for sm_90: ModuleNotFoundError")
    assert [(b["kernel"], b["registers"]) for b in report["binaries"]] == [("_no_kernel", 0)]


def test_peak_memory_leaves_out_inputs_and_outputs():
    def call() -> tuple[torch.Tensor]:
        return (torch.ones(4 * MIB, dtype=torch.int8)[: MIB // 2].clone(),)

    row = measure.measure(call, 3, torch.device("cpu"))
    assert row["peak_mib"] == pytest.approx(4, abs=0.01) and row["calls"] == 3


def test_an_interrupted_write_keeps_the_previous_report(tmp_path):
    path = tmp_path / "report.json"
    measure.write_report(path, {"row": 1})
    with pytest.raises(TypeError):
        measure.write_report(path, {"row": PointGrid})
    assert json.loads(path.read_text()) == {"row": 1}


def test_a_gpu_and_a_cpu_have_plans_of_their_own():
    gpu, cpu = every_benchmark.planned("NVIDIA H100 80GB HBM3"), every_benchmark.planned(None)
    assert list(gpu)[0] == "assign-coco-h100-80gb-hbm3.json" and list(cpu)[0] == "assign-single-cpu.json"
    assert all({"assign", "losses", "train_step", "compile"} == {c[0] for c in p.values()} for p in (gpu, cpu))


def test_the_budget_ends_the_run_and_a_failure_is_reported(tmp_path, monkeypatch, capsys):
    def process(command, cwd, timeout):
        assert timeout <= 60
        calls.append(command[2])
        if len(calls) == 3:
            raise TimeoutExpired(command, timeout)
        return CompletedProcess(command, returncode=len(calls) - 1)

    calls = []
    monkeypatch.setattr(every_benchmark, "subprocess", SimpleNamespace(run=process, TimeoutExpired=TimeoutExpired))
    assert every_benchmark.main(["--budget", "60", "--out", str(tmp_path)]) == 1
    assert calls == ["benchmarks.assign", "benchmarks.losses", "benchmarks.train_step"]
    printed = capsys.readouterr().out
    assert "the 60 s of --budget are over" in printed and "failed: losses" in printed


# Tables


def test_tables_of_the_documents_are_those_of_the_results(monkeypatch):
    """Every table is shown, and python -m benchmarks.tables changes nothing."""
    written = {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.update({path: text}))
    runpy.run_path(tables.__file__, run_name="__main__")
    assert tuple(written) == tables.DOCUMENTS
    for path, text in written.items():
        assert text == path.read_text(), "run python -m benchmarks.tables"
    assert all(f"<!-- table: {name} -->" in "".join(written.values()) for name in tables.TABLES)


def test_table_of_costs(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    rows = {"torch": {"ms_median": 1234.56, "peak_mib": 0.24}, "large": {"skipped": "OutOfMemoryError"}}
    report = {"device": "a CPU", "date": "2026-11-28T10:00:00", "workloads": {"single": {"rows": rows}}}
    measure.write_report(tmp_path / "benchmarks" / "results" / "assign-x.json", report)
    lines = tables.costs("assign-*.json", "workloads").splitlines()
    assert lines[2:] == ["| single | torch | 1,234.6 | 0.2 | a CPU | 2026-11-28 |"]
