"""Audit how far Sinkhorn is from the exact optimum: labels and costs, over eps and iterations.

    python -m studies.audit [--weights FILE [--data DIR] | --workload single|coco|crowd] [--images N] [--out DIR]

Audits the predictions of a detector with its settings of OTA except eps and iterations, or synthetic ones without
--weights. Needs scipy. Sinkhorn and the linear program (studies/exact.py) solve the same problem with the same float32
costs, in float64. Sums are over the images, points are candidate points; c_bg is the cost of a point's background
label, D that of a pair relative to it.

    exact cost     sum_j c_bg,j + sum of D over the pairs of the exact plan
    plan cost      sum_j r_j c_bg,j + sum of D pi, where Sinkhorn's plan pi sends point j r_j units instead of one
    residual       mean over the points of |r_j - 1|; where it is large, pi is no plan and may cost less than exact
    bound          lower bound on the exact cost from Sinkhorn's potentials
    rounded cost   cost of the plan after it was made to meet its marginals (kernels/statistics.py)
    gap            (rounded cost - bound) / rounded cost of each image
    unrounded      images whose plan could not be made to send all supplies
    violations     images without bound <= exact cost, or without exact cost <= rounded cost where all is sent
    changed        points with another label than in the exact plan; share: of the exact plan's positives

A point takes the label of its largest sender. `rescaled` first divides every row of the plan by its maximum, `plain`
does not; they decode the exact plan alike. Writes audit.json and audit.png into --out.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.measure import write_report
from benchmarks.tables import audits_table
from errors import UserError, run_script
from eval import load_with_data
from kernels import OTAConfig
from kernels.assign_torch import solve
from kernels.config import Plan
from kernels.statistics import background_cost, dual_potentials, duality_gap, units_in_marginals, units_received
from studies.exact import DUAL_TOLERANCE, NoPlanError, exact_labels, exact_pairs, highs
from studies.predictions import predicted_scene
from tests.support.scenes import WORKLOADS, Scene, make_workload
from training.environment import environment
from training.settings import positive

EPS = (1.0, 0.1, 0.01)
ITERATIONS = (10, 50, 100, 300, 1000)
DECODINGS = {"rescaled": True, "plain": False}
ROUNDING = 1e-16  # shown in place of a residual of 0, on a logarithmic axis
PAPER = (0.1, 50)  # eps and iterations (section 4.1)


@dataclass
class Row:
    """One eps and number of iterations, summed over the images."""

    eps: float
    iterations: int
    plan_cost: float = 0.0
    residual: float = 0.0
    gaps: list[float] = field(default_factory=list)
    unrounded: int = 0
    violations: int = 0
    decoded: Counter = field(default_factory=Counter)  # decoding -> points changed


@dataclass
class Audit:
    """The exact plans of all images together, and the rows to compare with them."""

    images: int = 0
    ground_truths: int = 0
    points: int = 0
    positives: int = 0
    cost: float = 0.0
    without_plan: list[str] = field(default_factory=list)  # names of images
    rows: list[Row] = field(default_factory=lambda: [Row(eps, count) for eps in EPS for count in ITERATIONS])

    def report(self) -> dict:
        """For JSON, with the ratios to the exact plans, which are None where there is no positive."""

        def ratio(value: float, whole: float) -> float | None:
            return value / whole if self.positives else None

        rows = []
        for row in self.rows:
            plan = {"plan_cost_ratio": ratio(row.plan_cost, self.cost), "residual": ratio(row.residual, self.points)}
            plan |= {"median_gap": median(row.gaps) if row.gaps else None}
            counts = row.decoded.items()
            decoded = {name: {"changed": n, "changed_share": ratio(n, self.positives)} for name, n in counts}
            rows.append(vars(row) | plan | {"decoded": decoded})
        return vars(self) | {"rows": rows}


def add_bounds(row: Row, plan: Plan, cost_bg: Tensor, exact_cost: float) -> None:
    """Add an image's bound and gap, and whether they are right; costs include cost_bg (A,)."""
    (u, v), units, background = dual_potentials(plan, row.eps), units_in_marginals(plan), float(cost_bg.sum())
    bound = background + float(plan.k.double() @ u + v.sum())
    rounded = background + float(units @ plan.cost.double())
    tolerance, unsent = DUAL_TOLERANCE * len(plan.points), float(plan.k.sum() - units.sum())
    row.gaps.append(float(duality_gap(plan, cost_bg, row.eps)))
    row.unrounded += unsent > tolerance
    row.violations += bound > exact_cost + tolerance or (unsent <= tolerance and exact_cost > rounded + tolerance)


def audit_image(audit: Audit, name: str, scene: Scene, config: OTAConfig) -> None:
    """Add one image, B = 1, or its name to `without_plan` if its ground truths supply more than their points take."""
    plan = solve(scene, replace(config, iterations=1))[1]  # for its costs and supplies, which no iteration changes
    try:
        pairs = exact_pairs(plan)
    except NoPlanError:
        audit.without_plan.append(name)
        return
    exact, cost_bg = exact_labels(plan, pairs), background_cost(scene.logits, plan, config)
    exact_cost = float(cost_bg.sum() + plan.cost[pairs].double().sum())
    audit.images += 1
    audit.ground_truths += int((plan.k > 0).sum())
    audit.points += len(plan.points)
    audit.positives += int(plan.k.sum())
    audit.cost += exact_cost
    for row in audit.rows:
        for decoding, rescale in DECODINGS.items():
            setting = replace(config, eps=row.eps, iterations=row.iterations, rescale=rescale)
            match, plan = solve(scene, setting)
            labels = match.gt_index.flatten()[plan.points]
            row.decoded[decoding] += int((labels != exact).sum())
        received = units_received(plan)[0]
        row.plan_cost += float(received @ cost_bg + plan.log_plan.exp() @ plan.cost.double())
        row.residual += float((received - 1).abs().sum())
        add_bounds(row, plan, cost_bg, exact_cost)


def draw(report: dict, path: Path) -> None:
    """Labels changed, cost and residual over the iterations, a line for every eps."""
    figure = Figure((15, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    for eps, color, marker in zip(EPS, ("tab:orange", "tab:blue", "tab:green"), "^os", strict=True):
        rows = [row for row in report["rows"] if row["eps"] == eps]
        style = {"color": color, "marker": marker, "markersize": 5}
        for decoding, line in zip(DECODINGS, ("-", "--"), strict=True):
            shares = [100 * row["decoded"][decoding]["changed_share"] for row in rows]
            axes[0].plot(ITERATIONS, shares, line, label=f"eps {eps:g}, {decoding}", **style)
        axes[1].plot(ITERATIONS, [row["plan_cost_ratio"] for row in rows], **style)
        axes[2].plot(ITERATIONS, [max(row["residual"], ROUNDING) for row in rows], **style)
    titles = (
        ("labels that differ from the exact plan's", "% of its positives"),
        ("cost of Sinkhorn's plan (below 1: demands not met)", "times the exact optimum"),
        ("residual: units received too many or too few", "mean over the candidate points"),
    )
    for axis, (title, unit) in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="Sinkhorn iterations", ylabel=unit, xscale="log")
        axis.set_xticks(ITERATIONS, [str(count) for count in ITERATIONS])
        axis.minorticks_off()
        axis.axvline(PAPER[1], color="gray", linewidth=1, linestyle=":", zorder=0)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(bottom=0)
    axes[1].axhline(1, color="black", linewidth=1, zorder=0)
    axes[2].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), ncols=6, loc="outside lower center")
    what = f"{report['source']}: {report['images']} images, {report['positives']:,} positives"
    figure.suptitle(f"{what}. Dotted: the paper's {PAPER[1]} iterations, at eps {PAPER[0]:g}")
    figure.savefig(path, dpi=110)


def scenes_of(args: argparse.Namespace) -> tuple[str, OTAConfig, Iterator[tuple[str, Scene]]]:
    """The name of what is audited, OTA's settings, and (name, scene) of every image."""
    if args.weights is None:
        if args.data:
            raise UserError("--data needs --weights, whose predictions are audited there")
        images = make_workload(WORKLOADS[args.workload], args.images).images()
        scenes = ((f"image {b}", scene) for b, scene in enumerate(images))
        return f"synthetic workload {args.workload}", OTAConfig(), scenes
    detector, dataset, data = load_with_data(args.weights, args.data)
    images = enumerate(dataset.images[: args.images])
    scenes = ((image["file_name"], predicted_scene(detector, dataset, i)[1]) for i, image in images)
    return f"{args.weights.name} on {Path(data).name}", detector.config.ota, scenes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="file written by train.py")
    parser.add_argument("--data", help="coco, crowdhuman, shapes or a folder; default: what it was trained on")
    parser.add_argument("--workload", choices=("single", "coco", "crowd"), default="coco", help="without --weights")
    parser.add_argument("--images", type=positive, default=50, help="the first ones")
    parser.add_argument("--out", type=Path, default=Path("runs/audit"), help="folder to write to")
    args = parser.parse_args(argv)
    highs()  # raises where scipy is missing, before anything is computed

    source, config, scenes = scenes_of(args)
    audit = Audit()
    for name, scene in scenes:
        audit_image(audit, name, scene, config)
    report = {"source": source, "assigner": asdict(config)} | audit.report()
    if audit.without_plan:
        print(f"left out, because the supplies do not fit the candidate points: {', '.join(audit.without_plan)}")
    write_report(args.out / "audit.json", environment(torch.device("cpu")) | {"scipy": version("scipy")} | report)
    if audit.positives:
        print(audits_table({source: report}))
        draw(report, args.out / "audit.png")
    print(f"\nwrote {args.out / 'audit.json'}" + (" and audit.png" if audit.positives else ""))


if __name__ == "__main__":
    run_script(main)
