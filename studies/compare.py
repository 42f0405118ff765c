"""Assignment strategies side by side: the same network, initial weights, data order and schedule, another assigner.

    python -m studies.compare --data shapes --assigners ota fcos atss --seeds 0 1 2 --out runs/compare
    python -m studies.compare --study radius --data DIR --out runs/radius -- --epochs 12 --image-size 240

Each contestant is a name of --assigner, or ota with settings: ota:radius=3,top_q=10. Every run is one of train.py with
the flags after `--`, in a folder of its own in --out; a command that is started again leaves out what is complete.
Writes compare.json and compare.png: AP, AP50, AP75, AP by size, AP of the crowded images (those with an object that
another one overlaps with an IoU of more than 0.3), positives per object, ambiguous points per image, and seconds of the
run's last process, with whatever ran beside it; mean and spread (standard deviation) over the seeds.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torchvision.ops import box_iou

from eval import coco_metrics, evaluate
from kernels import OTAConfig
from model.assigners import STRATEGIES, assign_and_ambiguous
from studies.predictions import Predictor
from training.environment import environment

CROWDED_IOU = 0.3
FLAGS = {field: f"--{field.replace('_', '-')}" for field in OTAConfig.__dataclass_fields__}
PAPER = "ota:top_q=20,per_q=1"
STUDIES = {
    "strategies": STRATEGIES,
    "radius": (*(f"{PAPER},radius={r}" for r in (3, 5, 7, 9)), f"{PAPER},center_prior=none"),
    "fixed-k": (*(f"{PAPER},fixed_k={k}" for k in (1, 5, 10, 20)), PAPER),
    "per-q": tuple(f"ota:top_q=20,per_q={n}" for n in (1, 2, 3, 4, 6)),
    "alpha": tuple(f"{PAPER},alpha={alpha}" for alpha in (0.5, 1, 1.5, 3, 6)),
    "eps": (f"{PAPER},eps=1", f"{PAPER},eps=0.1", f"{PAPER},eps=0.01,iterations=500"),
    "iterations": tuple(f"{PAPER},iterations={n}" for n in (1, 10, 50, 200)),
}  # fmt: skip
COLUMNS = {
    "AP": "AP", "AP50": "AP50", "AP75": "AP75", "APs": "AP small", "APm": "AP medium", "APl": "AP large",
    "AP_crowded": "AP crowded", "positives_per_gt": "pos / object", "ambiguous": "ambiguous", "seconds": "s",
}  # fmt: skip


def flags_of(contestant: str) -> list[str]:
    """Flags of train.py: "ota:radius=3,top_q=10" -> --assigner ota --radius 3 --top-q 10."""
    strategy, _, settings = contestant.partition(":")
    if strategy not in STRATEGIES:
        raise SystemExit(f"--assigners {contestant}: {strategy} is none of {', '.join(STRATEGIES)}")
    flags = ["--assigner", strategy]
    if settings and strategy != "ota":
        raise SystemExit(f"--assigners {contestant}: {settings} is for ota alone")
    for setting in filter(None, settings.split(",")):
        name, _, value = setting.partition("=")
        if name not in FLAGS:
            raise SystemExit(f"--assigners {contestant}: {name} is none of {', '.join(FLAGS)}")
        flags += [FLAGS[name], value]
    return flags


def train(contestant: str, seed: int, data: str, out: Path, more: list[str], threads: int) -> Path:
    """The folder of the run, complete."""
    folder = out / f"{contestant.replace(':', '-').replace(',', '-')}-seed{seed}"
    command = [sys.executable, "train.py", "--data", data, *flags_of(contestant), "--seed", str(seed)]
    command += ["--out", str(folder), *more]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    print(f"{contestant}, seed {seed}: {result.stdout.strip().splitlines()[-1]}", flush=True)
    return folder


def crowded_images(annotations: dict) -> set[int]:
    """Ids of the images with an object that another one overlaps with an IoU of more than 0.3."""
    boxes: dict[int, list] = {}
    for annotation in annotations["annotations"]:
        if not annotation["iscrowd"]:
            x, y, w, h = annotation["bbox"]
            boxes.setdefault(annotation["image_id"], []).append([x, y, x + w, y + h])
    crowded = set()
    for image_id, rows in boxes.items():
        rows = torch.tensor(rows, dtype=torch.float64)
        if bool((box_iou(rows, rows).fill_diagonal_(0) > CROWDED_IOU).any()):
            crowded.add(image_id)
    return crowded


def assignment_of(predictor: Predictor) -> dict[str, float]:
    """Positives per object and ambiguous points per image that a trained detector's strategy gives on a data set."""
    config, positives, objects, ambiguous = predictor.detector.config, 0, 0, 0
    for i in range(len(predictor.dataset)):
        _, scene = predictor.scene(i)
        match, torn = assign_and_ambiguous(config.assigner, scene, config.ota)
        positives += int((match.gt_index >= 0).sum())
        objects += len(scene.gt_boxes)
        ambiguous += int(torn.sum())
    return {"positives_per_gt": positives / max(1, objects), "ambiguous": ambiguous / len(predictor.dataset)}


def measure(folder: Path, device: torch.device) -> dict[str, float]:
    """A row of the table, kept in the folder of the run."""
    kept = folder / "compare.json"
    if kept.exists():
        return json.loads(kept.read_text())
    metrics = json.loads((folder / "metrics.json").read_text())
    predictor = Predictor(folder / "ota.safetensors")
    truth, crowded = dict(predictor.dataset.annotations), crowded_images(predictor.dataset.annotations)
    row = {name: metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
    row |= assignment_of(predictor)
    row |= {"crowded_images": len(crowded), "seconds": metrics.get("total_s", -1), "AP_crowded": -1.0}
    if predictor.detector.config.assigner == "ota":
        row["settings"] = dataclasses.asdict(predictor.detector.config.ota)
    if crowded:
        _, results = evaluate(predictor.detector.to(device), predictor.dataset, device)
        for name, key in (("images", "id"), ("annotations", "image_id")):
            truth[name] = [record for record in truth[name] if record[key] in crowded]
        row["AP_crowded"] = coco_metrics(truth, [r for r in results if r["image_id"] in crowded])["AP"]
    kept.write_text(json.dumps(row))
    return row


def summary(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    """Mean and standard deviation over the seeds; the latter is 0 for one seed."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    return {n: [statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0] for n, v in columns.items()}


def print_table(table: dict[str, dict[str, list[float]]]) -> None:
    """Markdown; a column without boxes is left out."""
    shown = [name for name in COLUMNS if any(row[name][0] >= 0 for row in table.values())]
    print(f"| | {' | '.join(COLUMNS[name] for name in shown)} |\n|---|{'---|' * len(shown)}")
    for contestant, row in table.items():
        cells = []
        for name in shown:
            mean, spread = row[name]
            digits = 3 if name.startswith("AP") else 0 if name == "seconds" else 1
            cells.append(f"{mean:.{digits}f}" + (f" ± {spread:.{digits}f}" if spread else ""))
        print(f"| {contestant} | {' | '.join(cells)} |")


def draw(table: dict, rows: dict[str, list[dict]], title: str, path: Path) -> None:
    """AP and AP of the crowded images: a dot for every seed, a line for the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(table)
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.42 * len(names)), sharey=True, layout="constrained")
    for axis, metric in zip(axes, ("AP", "AP_crowded"), strict=True):
        for y, name in enumerate(names):
            color = "tab:orange" if name.startswith("ota") else "tab:blue"
            axis.plot([row[metric] for row in rows[name]], [y] * len(rows[name]), "o", color=color, alpha=0.6)
            axis.plot([table[name][metric][0]] * 2, [y - 0.32, y + 0.32], color=color, linewidth=3)
        axis.set(xlabel=COLUMNS[metric] + " (COCO)", yticks=range(len(names)), yticklabels=names)
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    own, more = sys.argv[1:], []
    if "--" in own:
        own, more = own[: own.index("--")], own[own.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="what train.py takes")
    parser.add_argument("--assigners", nargs="+", metavar="NAME", help="names of train.py, or ota:radius=3,top_q=10")
    parser.add_argument("--study", choices=STUDIES, default="strategies", help="instead of --assigners")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, which share the cores")
    parser.add_argument("--device", default="cpu", help="for the measurements after the training")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(own)

    contestants = args.assigners or STUDIES[args.study]
    for contestant in contestants:
        flags_of(contestant)  # a wrong name: say so before the first hour
    args.out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)  # of a run's main process
    pairs = [(contestant, seed) for seed in args.seeds for contestant in contestants]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda pair: train(*pair, args.data, args.out, more, threads), pairs))
    rows: dict[str, list[dict]] = {contestant: [] for contestant in contestants}
    for (contestant, _), folder in zip(pairs, folders, strict=True):
        rows[contestant].append(measure(folder, torch.device(args.device)))
    table = {contestant: summary(rows[contestant]) for contestant in contestants}
    print_table(table)
    record = {
        "command": f"python -m studies.compare {' '.join(sys.argv[1:])}", **environment(torch.device("cpu")),
        "seeds": args.seeds, "table": table, "rows": rows,
    }  # fmt: skip
    (args.out / "compare.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(
        table,
        rows,
        f"{Path(args.data).name}: a dot for each of {len(args.seeds)} seeds, a line for their mean",
        args.out / "compare.png",
    )
    print(f"wrote {args.out / 'compare.json'} and {args.out / 'compare.png'}")


if __name__ == "__main__":
    main()
