"""The exact solver against brute force and the dense problem, and what the audit says about Sinkhorn beside it."""

import builtins
import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from scipy.optimize import linprog

from errors import UserError
from kernels import Inputs, OTAConfig, PointGrid
from kernels.assign_reference import assign_image, decode
from kernels.assign_torch import solve
from kernels.config import Plan
from kernels.statistics import units_received
from studies import audit as audit_script
from studies.audit import Audit, audit_image, background_cost, count_labels
from studies.exact import NoPlanError, exact_labels, exact_pairs
from tests.support.pictures import record_figures
from tests.support.scenes import Scene, make_scene, trained_predictions

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = PointGrid.for_image((104, 136), (8, 16, 32))


def least_cost_by_brute_force(plan: Plan) -> float:
    """Over all labellings that meet the supplies."""
    rows, points = len(plan.k), len(plan.points)
    cost = torch.full((rows + 1, points), torch.inf, dtype=torch.float64)
    cost[-1] = 0
    cost[plan.gt, torch.searchsorted(plan.points, plan.flat_point)] = plan.cost.double()
    labels = torch.tensor(list(product(range(rows + 1), repeat=points)))
    meets = torch.stack([(labels == i).sum(1) == k for i, k in enumerate(plan.k)]).all(0)
    return float(cost[labels[meets], torch.arange(points)].sum(1).min())


def exact_cost(plan: Plan) -> float:
    return float(plan.cost[exact_pairs(plan)].double().sum())


def dense_plan(scene: Scene, config: OTAConfig) -> dict[str, torch.Tensor]:
    """The (m + 1) x n problem of the paper in float64, background row and points without candidates included."""
    predictions = scene.logits[0].double(), scene.boxes[0].double()
    return assign_image(*predictions, scene.gt_boxes.double(), scene.gt_labels, scene.grid, config)


# The exact solver


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
    assert exact_cost(plan) == pytest.approx(least_cost_by_brute_force(plan), abs=1e-9)


@pytest.mark.parametrize("prior", ["closest", "radius", "none"])
def test_candidate_pairs_are_as_good_as_the_dense_problem(prior):
    config = OTAConfig(center_prior=prior)
    scene = make_scene(PointGrid.for_image((56, 72), (8, 16)), (5,), 3, seed=2, size_px=(12, 60))
    dense = dense_plan(scene, config)
    rows, columns = dense["cost"].shape
    supply = torch.cat([dense["k"], columns - dense["k"].sum(0, keepdim=True)]).double()
    equal = torch.cat([torch.eye(rows).repeat_interleave(columns, 1), torch.eye(columns).repeat(1, rows)])
    demand = torch.cat([supply, torch.ones(columns, dtype=torch.float64)])
    cost, bounds = dense["cost"].flatten(), [(0, 1 if c < torch.inf else 0) for c in dense["cost"].flatten()]
    cost = cost.masked_fill(cost.isinf(), 0)
    least = linprog(cost.numpy(), A_eq=equal.numpy(), b_eq=demand.numpy(), bounds=bounds, method="highs")

    _, plan = solve(scene, config)
    assert torch.equal(plan.k, dense["k"])
    by_pairs = exact_cost(plan) + float(dense["cost"][-1].sum())
    assert by_pairs == pytest.approx(least.fun, rel=1e-5)  # the pairs' costs are float32
    labels = torch.full((columns,), rows - 1)
    labels[plan.points] = exact_labels(plan, exact_pairs(plan)) % rows  # -1 becomes the last row, background
    assert torch.equal(labels, torch.from_numpy(least.x).view(rows, columns).argmax(0))

    exact = torch.nn.functional.one_hot(labels, rows).T.double().log()  # an integral plan
    for rescale in (True, False):
        assert torch.equal(decode(exact, OTAConfig(rescale=rescale)), labels)


def test_images_of_a_batch_are_solved_as_each_alone():
    scene = make_scene(GRID, (4, 0, 7), 3, seed=5)
    alone = sum(exact_cost(solve(image, OTAConfig())[1]) for image in scene.images())
    assert exact_cost(solve(scene, OTAConfig())[1]) == pytest.approx(alone, rel=1e-12)


# The audit


def test_image_without_a_plan_is_named_and_image_without_ground_truth_counts_for_nothing():
    """Two small boxes about one point: each has it as its only candidate."""
    boxes, labels = torch.tensor([[10.0, 10, 14, 14], [10.5, 10.5, 13.5, 13.5]]), torch.tensor([0, 1])
    predictions = (t[None] for t in trained_predictions(GRID, boxes, labels, 3, torch.Generator().manual_seed(0)))
    scene, audit = Scene(*predictions, boxes, labels, torch.tensor([0, 2]), GRID), Audit()
    with pytest.raises(NoPlanError, match="2 units of 2 ground truths do not fit their 1 points"):
        exact_pairs(solve(scene, OTAConfig())[1])
    audit_image(audit, "two-on-one.jpg", scene, OTAConfig())
    assert audit.without_plan == ["two-on-one.jpg"] and audit.images == 0
    assert audit.report()["rows"][0]["plan_cost_ratio"] is None
    audit_image(audit, "empty", make_scene(GRID, (0,), 3), OTAConfig())
    assert (audit.images, audit.positives, audit.points, audit.cost) == (1, 0, 0, 0.0)


def test_labels_are_counted_beside_the_exact_ones():
    scene, config = make_scene(GRID, (5,), 3, seed=4), OTAConfig()
    _, plan = solve(scene, config)
    labels, cost_bg = exact_labels(plan, exact_pairs(plan)), float(background_cost(scene, plan, config).sum())
    counts = count_labels(labels, labels, plan, cost_bg)
    assert (counts["changed"], counts["supply_error"], counts["positives"]) == (0, 0, int(plan.k.sum()))
    assert counts["cost"] == pytest.approx(cost_bg + exact_cost(plan))

    other, positive, negative = labels.clone(), (labels >= 0).nonzero()[:, 0], (labels < 0).nonzero()[:, 0]
    other[positive[0]], other[negative[0]] = -1, 2
    counts = count_labels(other, labels, plan, cost_bg)
    assert [counts[name] for name in ("lost", "gained", "moved", "changed")] == [1, 1, 0, 2]


def test_converged_plans_cost_more_than_the_exact_one_and_those_of_a_small_eps_come_close():
    """Within 1 % of the least cost and 3 % of the labels; eps 1 is far away however long it takes."""
    audit = Audit()
    for b, scene in enumerate(make_scene(GRID, (5, 9), 3, seed=9, size_px=(20, 90)).images()):
        audit_image(audit, f"image {b}", scene, OTAConfig())
    rows = {(row["eps"], row["iterations"]): row for row in audit.report()["rows"]}
    best, blurred = rows[0.01, 1000], rows[1.0, 1000]
    assert 0.999 < best["plan_cost_ratio"] < 1.01 and best["residual"] < 1e-3
    assert max(labels["changed_share"] for labels in best["decoded"].values()) < 0.03
    assert blurred["plan_cost_ratio"] > 1.1 and blurred["residual"] < 1e-12
    for eps in (1.0, 0.1):
        converged = [row["plan_cost_ratio"] for (e, _), row in rows.items() if e == eps and row["residual"] < 1e-5]
        assert converged and min(converged) > 1


@pytest.mark.parametrize("iterations", [10, 1000])
def test_plan_of_a_small_eps_is_that_of_the_log_domain(iterations):
    """What the audit reads of it: cost and residual."""
    scene, config = make_scene(GRID, (6,), 3, seed=8), OTAConfig(eps=0.01, iterations=iterations)
    dense = dense_plan(scene, config)
    _, plan = solve(scene, config)
    sent = dense["log_plan"].exp()
    expected = (sent * dense["cost"].masked_fill(dense["cost"].isinf(), 0))[:, plan.points].sum()
    received = units_received(plan)[0]
    cost = received @ background_cost(scene, plan, config) + plan.log_plan.exp() @ plan.cost.double()
    assert float(cost) == pytest.approx(float(expected), rel=1e-3)
    assert torch.allclose(received, sent.sum(0)[plan.points], atol=2e-3)


def test_settings_of_the_assignment_are_kept():
    """The audit of another center prior is that of another problem."""
    scene, audits = make_scene(GRID, (5,), 3, seed=8), []
    for config in (OTAConfig(), replace(OTAConfig(), center_prior="none", fixed_k=3)):
        audits.append(Audit(rows=[]))
        audit_image(audits[-1], "image", scene, config)
    assert audits[1].positives == 15 != audits[0].positives and audits[1].points > audits[0].points


def test_command_writes_table_report_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(audit_script, "ITERATIONS", (10, 50))
    figures = record_figures(monkeypatch)
    audit_script.main(["--images", "1", "--out", str(tmp_path)])
    report = json.loads((tmp_path / "audit.json").read_text())
    assert report["source"] == "synthetic workload coco" and report["images"] == 1
    assert {"scipy", "commit", "assigner"} <= report.keys() and report["positives"] > 0
    rows = {(row["eps"], row["iterations"]): row for row in report["rows"]}
    assert list(rows) == list(product((1.0, 0.1, 0.01), (10, 50)))
    assert rows[1.0, 10]["decoded"]["plain"]["changed"] > 0 and "residual" in capsys.readouterr().out

    (figure,) = figures
    changed, cost, residual = ([line.get_ydata() for line in axis.lines] for axis in figure.axes)
    assert "synthetic workload coco: 1 images" in figure.get_suptitle()
    for i, eps in enumerate((1.0, 0.1, 0.01)):
        of_eps = [rows[eps, iterations] for iterations in (10, 50)]
        assert list(cost[i]) == [row["plan_cost_ratio"] for row in of_eps]
        assert list(residual[i]) == [max(row["residual"], 1e-16) for row in of_eps]
        for decoding, line in zip(("rescaled", "plain"), changed[2 * i :], strict=False):
            assert list(line) == [100 * row["decoded"][decoding]["changed_share"] for row in of_eps]


def test_missing_scipy_and_data_without_weights_are_named(monkeypatch, tmp_path):
    with pytest.raises(UserError, match="--data needs --weights"):
        audit_script.main(["--data", "shapes"])

    def without_scipy(name, *args, imported=builtins.__import__):
        if name.startswith("scipy"):
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(UserError, match=r'needs the package scipy: pip install -e "\.\[test\]"'):
        audit_script.main(["--out", str(tmp_path)])
