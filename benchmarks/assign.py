"""Measure label assignment: parity with the float64 reference first, then the cost of a call.

    python -m benchmarks.assign [--workload single|coco|crowd|aerial] [--out FILE] [--repeats N]

On a CPU a workload is reduced to its first images. Reports no cost and exits with status 1 when a backend breaks the
numeric contract of ota_assign.
"""

import argparse
import sys
from dataclasses import asdict
from functools import partial

from benchmarks.measure import line, measure, start, write_report
from kernels import OTAConfig, ota_assign
from kernels.assign import HAS_TRITON
from tests.support.parity import EXCLUDED_SHARE, Parity, parity
from tests.support.scenes import WORKLOADS, Scene, make_workload

CPU_IMAGES = {"coco": 2, "crowd": 2, "aerial": 4}
# Ground truths x points for which the dense reference has memory (some 80 bytes each) and time.
COMPARED = {"cpu": 20_000_000, "cuda": 150_000_000}
TIMED = {"cpu": 500_000, "cuda": 50_000_000}
LIMITED = ("device_ms", "peak_mib", "host_syncs")
TARGETS = {"coco": (0.15, 32, 0), "crowd": (0.4, 64, 0), "aerial": (10, 512, 0)}  # of triton on one H200


def check_parity(scene: Scene, config: OTAConfig, backend: str) -> Parity:
    """Parity on the images that the reference has memory for."""
    images, room = [], COMPARED[scene.boxes.device.type]
    for image, count in enumerate(scene.gt_offsets.diff().tolist()):
        if count * scene.grid.num_points <= room:
            images.append(image)
            room -= count * scene.grid.num_points
    result = parity(scene, config, backend, images)
    result.require(result.points > 0, "no image is small enough to be compared")
    result.require(result.excluded_share < EXCLUDED_SHARE, f"{result.excluded_share:.2%} is too close to decide")
    print(f"{backend} against the float64 reference: {result}")
    return result


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=WORKLOADS, help="default: single on a CPU, coco on a GPU")
    args, device, about = start(parser, argv, repeats=50)
    gpu, config = device.type == "cuda", OTAConfig()
    name = args.workload or ("coco" if gpu else "single")
    workload = WORKLOADS[name]
    scene = make_workload(workload, None if gpu else CPU_IMAGES.get(name)).to(device)
    facts = {"workload": name, "images": len(scene.boxes), "images_of_workload": len(workload.counts)}
    facts |= {"image_size_px": workload.image_size, "points": scene.grid.num_points, "classes": workload.num_classes}
    facts |= {"ground_truths": len(scene.gt_boxes), "most_in_an_image": int(scene.gt_offsets.diff().max())}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))

    backends = ["torch", "triton"] if gpu and HAS_TRITON else ["torch"]
    parities = {backend: check_parity(scene, config, backend) for backend in backends}
    failures = [f"{name}, {backend}: {text}" for backend in backends for text in parities[backend].failures]
    if failures:
        sys.exit("\n".join(failures))
    print(f"\n{line('')}")
    if len(scene.gt_boxes) * scene.grid.num_points <= TIMED[device.type]:
        backends += ["reference"]
    report = {"about": facts, "parity": {name: asdict(result) for name, result in parities.items()}, "rows": {}}
    for backend in backends:
        repeats = max(3, args.repeats // 10) if backend == "reference" else args.repeats
        report["rows"][backend] = row = measure(partial(ota_assign, *scene, config, backend=backend), repeats, device)
        print(line(backend, row), flush=True)
        if backend == "triton" and name in TARGETS:
            limits = zip(LIMITED, TARGETS[name], strict=True)
            report["targets"] = {column: {"limit": limit, "measured": row[column]} for column, limit in limits}
            print(f"targets for an H200: {report['targets']}")
        write_report(args.out, about | {"workloads": {name: report}})


if __name__ == "__main__":
    main()
