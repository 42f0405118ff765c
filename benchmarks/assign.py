"""Label assignment: parity with the float64 reference first, then milliseconds per call.

    python -m benchmarks.assign [--workload single|coco|crowd|aerial] [--out FILE] [--repeats N] [--threads N]

Reports no time, and ends with status 1, for a backend that breaks the numeric contract of ota_assign.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import environment
from benchmarks.scenes import WORKLOADS, Scene, make_workload
from kernels import Assignment, OTAConfig, ota_assign
from kernels.assign_reference import assign_image
from kernels.assign_torch import Plan, solve
from kernels.grid import valid_rows

BACKENDS = ("reference", "torch")
SOLVERS = {"torch": solve}  # backends whose candidates, costs and plan can be looked at

# The numeric contract, against the float64 reference on the same rounded inputs.
COST_TOLERANCE = 1e-5
PLAN_TOLERANCE = 1e-4
IOU_TOLERANCE = 1e-5
IOU_SUM_MARGIN = 1e-4  # k may differ when the sum of IoUs is this close to an integer
SCORE_MARGIN = 1e-3  # a match may differ when the two best plan entries are this close, relatively
EXCLUDED_SHARE = 1e-3  # what the two margins may exclude at most

CPU_IMAGES = {"coco": 2, "crowd": 2, "aerial": 4}
# Ground truths x points up to which the dense reference is run: one image for parity, one batch for time.
DENSE_LIMITS = {"cpu": (10_000_000, 500_000), "cuda": (20_000_000, 50_000_000)}


@dataclass
class Parity:
    """What was compared, how much of it the contract leaves open, and one sentence for every breach."""

    ground_truths: int = 0
    ground_truths_excluded: int = 0
    points: int = 0  # points that are a candidate
    points_excluded: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def excluded_share(self) -> float:
        compared = self.ground_truths + self.points
        return (self.ground_truths_excluded + self.points_excluded) / compared if compared else 0.0

    def require(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.failures.append(sentence)


def ambiguous_points(log_plan: Tensor, config: OTAConfig) -> Tensor:
    """Points (n,) whose two best entries of a (rescaled) plan (m + 1, n) are too close to tell apart."""
    score = log_plan - log_plan.amax(1, keepdim=True) if config.rescale else log_plan
    first, second = score.nan_to_num(nan=-math.inf, neginf=-math.inf).topk(2, dim=0).values
    return first - second <= SCORE_MARGIN


def parity(scene: Scene, config: OTAConfig, backend: str, images: list[int] | None = None) -> Parity:
    """Compare a backend's result on the whole batch with the reference on each of `images`; None is all."""
    match = ota_assign(*scene, config, backend=backend, check=False)
    plan = SOLVERS[backend](*scene, config) if backend in SOLVERS else None
    image, valid = valid_rows(scene.gt_boxes, scene.gt_labels, scene.gt_offsets, scene.logits.shape[-1])
    result = Parity()
    result.require(not match.k[~valid].any(), "a row that takes no part has k > 0")
    for b in range(scene.logits.shape[0]) if images is None else images:
        rows = (valid & (image == b)).nonzero()[:, 0]
        if len(rows):
            _compare_image(result, scene, config, match, plan, b, rows)
        else:
            result.require(bool((match.gt_index[b] == -1).all()), f"image {b} has no ground truth but matches")
    return result


def _compare_image(
    result: Parity, scene: Scene, config: OTAConfig, match: Assignment, plan: Plan | None, b: int, rows: Tensor
) -> None:
    exact = assign_image(
        scene.logits[b].double(), scene.boxes[b].double(), scene.gt_boxes[rows].double(), scene.gt_labels[rows],
        scene.grid, config,
    )  # fmt: skip
    candidates, k = exact["candidates"], match.k[rows].long()
    if plan is not None:
        found, cost, log_plan = _dense(plan, b, rows, scene)
        result.require(torch.equal(found, candidates), f"image {b}: candidates differ")
        if not torch.equal(found, candidates):
            return
        relative = (exact["cost"][:-1] - exact["cost"][-1])[candidates]
        close = torch.isclose(cost[candidates], relative, rtol=COST_TOLERANCE, atol=COST_TOLERANCE)
        result.require(bool(close.all()), f"image {b}: {int((~close).sum())} costs differ")

    lowest, highest = _possible_k(exact, config)
    result.ground_truths += len(rows)
    result.ground_truths_excluded += int((lowest != highest).sum())
    wrong = rows[(k < lowest) | (k > highest)].tolist()
    result.require(not wrong, f"image {b}: k differs for ground truths {wrong}")
    active = candidates.any(0)
    result.points += int(active.sum())
    if not torch.equal(k, exact["k"]):
        result.points_excluded += int(active.sum())  # another k is another plan
        return

    if plan is not None:
        sent = torch.cat([candidates, active[None]])
        error = float(torch.where(sent, log_plan.exp() - exact["log_plan"].exp(), 0).abs().max())
        result.require(error <= PLAN_TOLERANCE, f"image {b}: plan differs by {error:.1e}")
    expected = torch.cat([rows, rows.new_tensor([-1])])[exact["supplier"]]
    open_points = ambiguous_points(exact["log_plan"], config)
    result.points_excluded += int((open_points & active).sum())
    same = match.gt_index[b] == expected
    wrong = (~same & ~open_points).nonzero()[:, 0].tolist()
    result.require(not wrong, f"image {b}: points {wrong} are matched otherwise")
    iou = torch.cat([exact["iou"], torch.zeros_like(exact["iou"][:1])]).gather(0, exact["supplier"][None])[0]
    wrong = (same & ((match.iou[b] - iou).abs() > IOU_TOLERANCE)).nonzero()[:, 0].tolist()
    result.require(not wrong, f"image {b}: IoU differs at points {wrong}")


def _possible_k(exact: dict[str, Tensor], config: OTAConfig) -> tuple[Tensor, Tensor]:
    """The supplies (m,) that rounding of the IoU sums may lead to."""
    if config.fixed_k is not None:
        return exact["k"], exact["k"]
    iou, count = exact["iou"].masked_fill(~exact["candidates"], 0), exact["candidates"].sum(1)
    total = iou.topk(min(config.top_q, iou.shape[1]), dim=1).values.sum(1)
    margins = (-IOU_SUM_MARGIN, IOU_SUM_MARGIN)
    lowest, highest = (((total + margin).floor().long().clamp(min=1)).minimum(count) for margin in margins)
    return lowest, highest


def _dense(plan: Plan, b: int, rows: Tensor, scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates (m, n), relative cost (m, n) and log plan (m + 1, n) of image b."""
    num_points = scene.grid.num_points
    cost = torch.full((len(rows), num_points), math.inf, dtype=torch.float64, device=rows.device)
    log_plan = torch.full((len(rows) + 1, num_points), -math.inf, dtype=torch.float64, device=rows.device)
    pair = torch.isin(plan.gt, rows)
    i, j = torch.searchsorted(rows, plan.gt[pair]), plan.flat_point[pair] % num_points
    cost[i, j], log_plan[i, j] = plan.cost[pair].double(), plan.log_plan[pair].double()
    here = plan.points // num_points == b
    log_plan[-1, plan.points[here] % num_points] = plan.log_plan_bg[here].double()
    return torch.isfinite(cost), cost, log_plan


def time_ms(call: Callable[[], Assignment], repeats: int, device: torch.device) -> list[float]:
    """Milliseconds of every one of `repeats` calls, after a tenth as many to warm up."""
    for _ in range(1 + repeats // 10):
        call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
    return times


def measure_parity(scene: Scene, config: OTAConfig) -> dict[str, Parity]:
    """Parity of every backend on the images that are small enough for the dense reference."""
    counts = scene.gt_offsets.diff().tolist()
    limit = DENSE_LIMITS[scene.boxes.device.type][0]
    images = [b for b, count in enumerate(counts) if count * scene.grid.num_points <= limit]
    results = {}
    for backend in BACKENDS[1:]:
        results[backend] = result = parity(scene, config, backend, images)
        result.require(result.points > 0, "no image is small enough to compare")
        result.require(result.excluded_share < EXCLUDED_SHARE, f"{result.excluded_share:.2%} is too close to tell")
        print(
            f"parity of {backend} with the float64 reference, {len(images)} of {len(counts)} images: "
            f"{'BROKEN' if result.failures else 'holds'}; left open "
            f"{result.ground_truths_excluded} of {result.ground_truths:,} supplies, "
            f"{result.points_excluded} of {result.points:,} candidate points"
        )
    return results


def measure_ms(scene: Scene, config: OTAConfig, repeats: int) -> dict[str, dict[str, float]]:
    """Median and quantiles per backend, printed row by row; the reference only where it fits."""
    device, medians = scene.boxes.device, {}
    print(f"\n{'ms per call':<12}{'median':>10}{'20 %':>10}{'80 %':>10}{'reference / it':>17}")
    for backend in BACKENDS:
        if backend == "reference" and len(scene.gt_boxes) * scene.grid.num_points > DENSE_LIMITS[device.type][1]:
            print(f"{backend:<12}{'-':>10}{'-':>10}{'-':>10}{'too large here':>17}")
            continue
        calls = max(3, repeats // 10) if backend == "reference" else repeats
        times = time_ms(lambda b=backend: ota_assign(*scene, config, backend=b), calls, device)
        low, median, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        medians[backend] = {"median": median, "quantile_20": low, "quantile_80": high, "calls": calls}
        ratio = f"{medians['reference']['median'] / median:.1f}" if "reference" in medians else "-"
        print(f"{backend:<12}{median:>10.3f}{low:>10.3f}{high:>10.3f}{ratio:>17}")
    return medians


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, help="default: single on a CPU, coco on a GPU")
    parser.add_argument("--out", type=Path, help="write what was measured, and on what, as JSON")
    parser.add_argument("--repeats", type=int, default=50, help="calls per backend; the reference makes a tenth")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = args.workload or ("single" if device.type == "cpu" else "coco")
    workload, config = WORKLOADS[name], OTAConfig()
    counts = workload.counts[: CPU_IMAGES.get(name) if device.type == "cpu" else None]
    scene = make_workload(workload, len(counts)).to(device)
    about = {
        "workload": name, "images": len(counts), "image_size": workload.image_size, "points": scene.grid.num_points,
        "classes": workload.num_classes, "ground_truths": sum(counts), "most_in_an_image": max(counts),
        **environment(device),
    }  # fmt: skip
    reduced = f" of {len(workload.counts)} (fewer on a CPU)" if len(counts) < len(workload.counts) else ""
    height, width = workload.image_size
    print(
        f"{name}: images {len(counts)}{reduced}, {height} x {width}, points {scene.grid.num_points:,}, "
        f"classes {workload.num_classes}\nground truths {sum(counts):,}, at most {max(counts):,} in an image\n"
        f"{about['device']}, threads {about['threads']}, torch {about['torch']}, python {about['python']}"
    )

    results = measure_parity(scene, config)
    failures = [f"{backend}: {failure}" for backend, result in results.items() for failure in result.failures]
    if failures:
        print("\n".join(failures), file=sys.stderr)
        return 1
    medians = measure_ms(scene, config, args.repeats)
    if args.out:
        report = about | {"parity": {backend: asdict(result) for backend, result in results.items()}, "ms": medians}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
