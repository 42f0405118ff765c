"""Label assignment: parity with the float64 reference first, then what a call costs, and how far that is from a floor.

    python -m benchmarks.assign [--workload single|coco|crowd|aerial] [--out FILE] [--repeats N] [--threads N]

On a GPU all three workloads, one after the other, unless one is named; on a CPU fewer images of a workload. Reports no
cost of anything, and ends with status 1, when a backend breaks the numeric contract of ota_assign on one of them.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.calls import DENSE_LIMITS, Call, calls_of
from benchmarks.floor import Floor, Rates, floor_of, measure_rates
from benchmarks.measure import Row, measure
from kernels import OTAConfig
from tests.support.parity import EXCLUDED_SHARE, Parity, parity
from tests.support.scenes import WORKLOADS, Scene, make_workload
from training.environment import environment

CPU_IMAGES = {"coco": 2, "crowd": 2, "aerial": 4}
GPU_WORKLOADS = ("coco", "crowd", "aerial")
GRAPH = "triton graph"


class Target(NamedTuple):
    """What the triton backend may cost on one H200, without one wait of the host."""

    device_ms: float
    peak_mib: float


TARGETS = {"coco": Target(0.15, 32), "crowd": Target(0.4, 64), "aerial": Target(10, 512)}


@dataclass
class Contest:
    """A workload on a device, and every call of ota_assign that is compared and timed on it."""

    about: dict
    scene: Scene
    calls: dict[str, Call | str]


def make_contest(name: str, config: OTAConfig, device: torch.device) -> Contest:
    workload = WORKLOADS[name]
    counts = workload.counts[: CPU_IMAGES.get(name) if device.type == "cpu" else None]
    scene = make_workload(workload, len(counts)).to(device)
    about = {
        "workload": name, "images": len(counts), "images_of_workload": len(workload.counts),
        "image_size_px": workload.image_size, "points": scene.grid.num_points, "classes": workload.num_classes,
        "ground_truths": sum(counts), "most_in_an_image": max(counts),
    }  # fmt: skip
    reduced = f" of {len(workload.counts)}, a workload reduced for a CPU" if len(counts) < len(workload.counts) else ""
    height, width = workload.image_size
    print(
        f"\n{name}: images {len(counts)}{reduced}, {height} x {width}, points {scene.grid.num_points:,}, "
        f"classes {workload.num_classes}\nground truths {sum(counts):,}, at most {max(counts):,} in an image"
    )
    return Contest(about, scene, calls_of(scene, config))


def comparable_images(scene: Scene) -> list[int]:
    """Images of a batch, from the first one on, that the dense float64 reference has room and time for."""
    limits, images, total = DENSE_LIMITS[scene.boxes.device.type], [], 0
    for b, count in enumerate(scene.gt_offsets.diff().tolist()):
        size = count * scene.grid.num_points
        if size <= limits.image and total + size <= limits.compared:
            images.append(b)
            total += size
    return images


def compare(contest: Contest, config: OTAConfig) -> dict[str, Parity]:
    """Parity of every call but the reference's own, on the images that the dense reference can take."""
    images, results = comparable_images(contest.scene), {}
    for name, call in contest.calls.items():
        if name == "reference" or isinstance(call, str):
            continue
        backend = name if name in ("torch", "triton") else call
        results[name] = result = parity(contest.scene, config, backend, images)
        result.require(result.points > 0, "no image is small enough to compare")
        result.require(result.excluded_share < EXCLUDED_SHARE, f"{result.excluded_share:.2%} is too close to tell")
        print(
            f"parity of {name} with the float64 reference, {result.images} of {contest.about['images']} images: "
            f"{'BROKEN' if result.failures else 'holds'}; left open "
            f"{result.ground_truths_excluded} of {result.ground_truths:,} supplies, "
            f"{result.points_excluded} of {result.points:,} candidate points"
        )
    return results


def measure_rows(contest: Contest, repeats: int) -> dict[str, Row | str]:
    """What every call costs, printed row by row."""
    rows, device = {}, contest.scene.boxes.device
    print(
        f"\n{contest.about['workload']:<16}{'ms median':>10}{'20 %':>10}{'80 %':>10}{'peak MiB':>10}{'kernels':>9}"
        f"{'copies':>8}{'syncs':>7}{'reference / it':>16}"
    )
    for name, call in contest.calls.items():
        if isinstance(call, str):
            rows[name] = call
            print(f"{name:<16}{'-':>10}  {call}")
            continue
        calls = max(3, repeats // 10) if name == "reference" else repeats
        rows[name] = row = measure(call, calls, device, replay=name == GRAPH)
        reference = rows["reference"]
        ratio = f"{reference.ms_median / row.ms_median:.1f}" if isinstance(reference, Row) else "-"
        memory = "-" if row.peak_mib is None else f"{row.peak_mib:.1f}"
        counts = ("-" if n is None else f"{n:,}" for n in (row.kernel_launches, row.copies_and_memsets, row.host_syncs))
        print(
            f"{name:<16}{row.ms_median:>10.3f}{row.ms_quantile_20:>10.3f}{row.ms_quantile_80:>10.3f}{memory:>10}"
            "{:>9}{:>8}{:>7}".format(*counts)
            + f"{ratio:>16}"
        )
    return rows


def print_floor(floor: Floor, rates: Rates, rows: dict[str, Row | str]) -> None:
    print(
        f"floor: {floor.bytes / 1e6:.2f} MB for {floor.candidate_pairs:,} candidate pairs on "
        f"{floor.candidate_points:,} points, {floor.bytes_ms:.4f} ms at {rates.copy_gb_per_s:,.1f} GB/s of a copy"
    )
    if floor.chain_ms is not None:
        print(
            f"       and {floor.chain_ms:.4f} ms for the chain of iterations, {rates.round_trip_us:.3f} us a round trip"
        )
    for name, row in rows.items():
        if name.startswith("triton") and isinstance(row, Row):
            print(f"{name} takes {row.ms_median / floor.ms:.2f} times the floor")


def judge(target: Target, rows: dict[str, Row | str]) -> dict[str, dict]:
    """Limit, measured value (None if there is none) and verdict of every target, printed."""
    graph, plain = rows.get(GRAPH), rows.get("triton")
    limits = {
        "device_ms": (target.device_ms, graph.ms_median if isinstance(graph, Row) else None),
        "peak_mib": (target.peak_mib, plain.peak_mib if isinstance(plain, Row) else None),
        "host_syncs": (0, plain.host_syncs if isinstance(plain, Row) else None),
    }
    verdicts = {}
    for what, (limit, value) in limits.items():
        reached = None if value is None else value <= limit
        verdicts[what] = {"limit": limit, "measured": value, "reached": reached}
        outcome = "not measured" if value is None else f"{'reached' if reached else 'MISSED'}, {value:.4g}"
        times = f", {value / limit:.2f} times the limit" if value is not None and limit else ""
        print(f"target for an H200, {what} <= {limit:g}: {outcome}{times}")
    return verdicts


def write_report(path: Path, about: dict, workloads: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(about | {"workloads": workloads}, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=WORKLOADS, help="default: single on a CPU, the other three on a GPU")
    parser.add_argument("--out", type=Path, help="write what was measured, and on what, as JSON")
    parser.add_argument("--repeats", type=int, default=50, help="calls per row; the reference makes a tenth")
    parser.add_argument("--threads", type=int, help="CPU threads")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sys.stdout.reconfigure(line_buffering=True)  # a row is seen when it is measured, in a log file, too
    device, config = torch.device("cuda" if torch.cuda.is_available() else "cpu"), OTAConfig()
    about = environment(device)
    print(f"{about['device']}, threads {about['threads']}, torch {about['torch']}, triton {about['triton']}")

    names = (args.workload,) if args.workload else GPU_WORKLOADS if device.type == "cuda" else ("single",)
    contests, results, failures = {}, {}, []
    for name in names:
        contests[name] = make_contest(name, config, device)
        results[name] = compare(contests[name], config)
        failures += [f"{name}, {row}: {text}" for row, result in results[name].items() for text in result.failures]
    if failures:
        print("\n".join(failures), file=sys.stderr)
        return 1

    rates, workloads = measure_rates(device), {}
    if device.type == "cuda":
        print(f"\ncaches are flushed before each call; {GRAPH} is device time, the other rows count launching, too")
    for name, contest in contests.items():
        rows = measure_rows(contest, args.repeats)
        floor = floor_of(contest.scene, config, rates)
        print_floor(floor, rates, rows)
        workloads[name] = {
            "about": contest.about,
            "parity": {row: asdict(result) for row, result in results[name].items()},
            "rows": {row: {"skipped": cost} if isinstance(cost, str) else asdict(cost) for row, cost in rows.items()},
            "floor": asdict(floor) | asdict(rates),
        }
        if device.type == "cuda" and name in TARGETS:
            workloads[name]["targets"] = judge(TARGETS[name], rows)
        if args.out:
            write_report(args.out, about, workloads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
