"""The exact solver against brute force, and the command of the audit."""

import json
from itertools import product

import pytest
import torch

from errors import UserError
from kernels import Inputs, OTAConfig, PointGrid
from kernels.assign_torch import solve
from kernels.config import Plan
from studies import audit as audit_script
from studies.exact import exact_pairs
from tests.support.scenes import trained_predictions

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_command_writes_table_report_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit_script, "ITERATIONS", (10, 50))
    audit_script.main(["--images", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["source"] == "synthetic workload coco" and report["images"] == 1
    assert {"scipy", "commit", "assigner"} <= report.keys() and report["positives"] > 0
    rows = {(row["eps"], row["iterations"]): row for row in report["rows"]}
    assert list(rows) == list(product((1.0, 0.1, 0.01), (10, 50)))
    assert rows[1.0, 10]["decoded"]["plain"]["changed"] > 0 and "residual" in capsys.readouterr().out
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(UserError, match="--data needs --weights"):
        audit_script.main(["--data", "shapes"])
