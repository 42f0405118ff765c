"""The benchmarks on tiny cases: reports are complete, and no cost is reported when parity is broken."""

import json
import math
import runpy
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as every_benchmark
from benchmarks import assign, losses, measure, strategies, tables, train_step
from benchmarks.measure import COLUMNS, MIB
from kernels import PointGrid
from model import losses as model_losses
from model.assigners import STRATEGIES
from tests.support.scenes import WORKLOADS, Workload

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def tiny_cases(monkeypatch):
    """Run on a CPU even where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(WORKLOADS, "single", Workload((64, 96), (8, 16), 3, (2, 3), (10, 50)))
    monkeypatch.setattr(losses, "POINTS", 50)
    monkeypatch.setattr(train_step, "CASES", {"cpu": {"tiny": train_step.Case("resnet18", (64, 64), 2)}})
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


def assert_no_cost(module, message: str, path: Path, capsys) -> None:
    capsys.readouterr()  # what came before
    with pytest.raises(SystemExit, match=message):
        module.main(["--out", str(path)])
    assert not path.exists() and "ms_median" not in capsys.readouterr().out


def test_assign(tmp_path, monkeypatch, capsys):
    report = run(assign, tmp_path / "new" / "assign.json")["workloads"]["single"]
    assert report["about"]["ground_truths"] == 5 and report["parity"]["torch"]["failures"] == []
    assert list(report["rows"]) == ["torch", "reference"]
    for row in report["rows"].values():
        assert_costs(row)

    monkeypatch.setattr("tests.support.parity.PLAN_TOLERANCE", -1)
    assert_no_cost(assign, "single, torch: image 0: plan differs by", tmp_path / "assign.json", capsys)


def test_strategies(tmp_path, monkeypatch):
    monkeypatch.setattr(strategies, "GRID", PointGrid.for_image((64, 96), (8, 16, 32)))
    rows = run(strategies, tmp_path / "new.json", "--boxes", "2")["results"]["2 boxes"]
    assert list(rows) == [*STRATEGIES, "torchvision's FCOS", "torchvision's RetinaNet"]
    for row in rows.values():
        assert_costs(row)


def test_losses(tmp_path, monkeypatch, capsys):
    report = run(losses, tmp_path / "new.json", "--images", "2")
    assert list(report["results"]["float32"]) == ["torchvision", "torch"]
    for row in report["results"]["float32"].values():
        assert_costs(row)
        assert row["useful_gb_per_s"] > 0

    focal_loss = losses.focal_loss
    monkeypatch.setattr(losses, "focal_loss", lambda *inputs, **more: 1.001 * focal_loss(*inputs, **more))
    message = "the gradient is off by 1.0e-03 of its largest entry"
    assert_no_cost(losses, message, tmp_path / "losses.json", capsys)


def test_train_step(tmp_path, monkeypatch, capsys):
    contestants = {name: train_step.CONTESTANTS[name] for name in ("ours", "torchvision")}
    monkeypatch.setattr(train_step, "CONTESTANTS", contestants)
    case = run(train_step, tmp_path / "new.json")["cases"]["tiny"]
    ours, theirs = (case["sanity"][name] for name in contestants)
    assert ours["parameters"] == theirs["parameters"] + 5  # the learned scale of every level
    assert ours["tflop"] == pytest.approx(theirs["tflop"], rel=1e-3) and ours["tflop"] > 0
    for row in case["rows"].values():
        assert_costs(row)
        assert row["images_per_s"] == pytest.approx(2e3 / row["ms_median"]) and row["tflop_per_s"] > 0
        assert list(row["phase_ms"]) == ["network", "assignment and losses", "backward", "optimizer"]

    focal_loss = model_losses.focal_loss
    monkeypatch.setattr(model_losses, "focal_loss", lambda *inputs, **more: math.nan * focal_loss(*inputs, **more))
    message = "tiny, ours: a loss or the gradient is 0 or not finite"
    assert_no_cost(train_step, message, tmp_path / "step.json", capsys)


def test_peak_memory_leaves_out_inputs_and_outputs():
    def call() -> tuple[torch.Tensor]:
        return (torch.ones(4 * MIB, dtype=torch.int8)[: MIB // 2].clone(),)

    row = measure.measure(call, 3, torch.device("cpu"))
    assert row["peak_mib"] == pytest.approx(4, abs=0.01) and row["calls"] == 3


def test_tables_of_the_documents_are_those_of_the_results(monkeypatch):
    """Every table is shown, and python -m benchmarks.tables changes nothing."""
    written = {}
    monkeypatch.setattr(Path, "write_text", lambda path, text: written.update({path: text}))
    runpy.run_path(tables.__file__, run_name="__main__")
    assert tuple(written) == tables.DOCUMENTS
    for path, text in written.items():
        assert text == path.read_text(), "run python -m benchmarks.tables"
    assert all(f"<!-- table: {name} -->" in "".join(written.values()) for name in tables.TABLES)


def test_all_benchmarks_run_and_a_failure_is_the_exit_status(tmp_path, monkeypatch, capsys):
    modules = []

    def run(command, **_):
        modules.append(command[2])
        return subprocess.CompletedProcess(command, returncode=int(command[2] == "benchmarks.losses"))

    monkeypatch.setattr(subprocess, "run", run)
    assert every_benchmark.main(["--out", str(tmp_path)]) == 1
    assert modules == [f"benchmarks.{name}" for name in ("assign", "losses", "train_step", "strategies", "compile")]
    assert capsys.readouterr().out.endswith("failed: losses\n")
