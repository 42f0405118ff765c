"""Assignment strategies side by side: the same network, initial weights, data order and schedule, another assigner.

    python -m studies.compare --data shapes --assigners ota fcos atss --seeds 0 1 2 --out runs/compare
    python -m studies.compare --study radius --data DIR --out runs/radius -- --epochs 12 --image-size 240

Each contestant is a name of --assigner, or ota with settings: ota:radius=3,top_q=10. Every run is one of train.py with
the flags after `--`, in its folder in --out; a command that is started again leaves out complete runs. Writes
compare.json and compare.png: AP, AP by size and class, AP of the crowded images (those with an object that another one
overlaps with an IoU of more than 0.3), points per object and share of ambiguous points in the last training batch, and
the seconds of the run's last process; mean and standard deviation over the seeds.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure

from benchmarks.measure import write_report
from benchmarks.tables import AMBIGUOUS, APS, POINTS, SIZES, seeds_table
from errors import UserError, run_script
from eval import coco_metrics, evaluate, load_with_data
from model.assigners import STRATEGIES
from studies.predictions import by_image, overlaps
from training.environment import environment
from training.settings import ota_setting

CROWDED_IOU = 0.3
PAPER = "ota:top_q=20,per_q=1"
STUDIES = {
    "strategies": STRATEGIES,
    "radius": [*(f"{PAPER},radius={r}" for r in (3, 5, 7, 9)), f"{PAPER},center_prior=none"],
    "fixed-k": [*(f"{PAPER},fixed_k={k}" for k in (1, 5, 10, 20)), PAPER],
    "per-q": [f"ota:top_q=20,per_q={n}" for n in (1, 2, 3, 4, 6)],
    "alpha": [f"{PAPER},alpha={alpha}" for alpha in (0.5, 1, 1.5, 3, 6)],
    "eps": [f"{PAPER},eps=1", f"{PAPER},eps=0.1", f"{PAPER},eps=0.01,iterations=500"],
    "iterations": [f"{PAPER},iterations={n}" for n in (1, 10, 50, 200)],
}
COLUMNS = APS | SIZES | {"APl": "AP large", "AP_crowded": "AP crowded"} | POINTS | AMBIGUOUS | {"seconds": "s"}


def split_flags(module: str, argv: list[str] | None) -> tuple[list[str], list[str], str]:
    """Return a study's own flags, those after `--`, which are for train.py, and the whole command."""
    flags = list(sys.argv[1:] if argv is None else argv)
    end = flags.index("--") if "--" in flags else len(flags)
    return flags[:end], flags[end + 1 :], f"python -m {module} {' '.join(flags)}"


def flags_of(contestant: str) -> list[str]:
    """Flags of train.py: "ota:radius=3,top_q=10" -> --assigner ota --ota radius=3 top_q=10."""
    strategy, _, settings = contestant.partition(":")
    if strategy not in STRATEGIES:
        raise UserError(f"--assigners {contestant}: {strategy} is none of {', '.join(STRATEGIES)}")
    if settings and strategy != "ota":
        raise UserError(f"--assigners {contestant}: {settings} is for ota alone")
    try:
        settings = [ota_setting(setting) and setting for setting in filter(None, settings.split(","))]
    except argparse.ArgumentTypeError as error:
        raise UserError(f"--assigners {contestant}: {error}") from error
    return ["--assigner", strategy, *(["--ota", *settings] if settings else [])]


def train(contestant: str, seed: int, data: str, out: Path, more: list[str], threads: int) -> Path:
    """Train a contestant, and return the folder of its run."""
    folder = out / f"{contestant.replace(':', '-').replace(',', '-')}-seed{seed}"
    command = [sys.executable, "train.py", "--data", data, *flags_of(contestant), "--seed", str(seed)]
    command += ["--out", str(folder), *more]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    if result.returncode:
        raise UserError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    print(f"{contestant}, seed {seed}: {result.stdout.strip().splitlines()[-1]}", flush=True)
    return folder


def crowded_images(annotations: dict) -> set[int]:
    """Ids of the images with an object that another one overlaps with an IoU of more than 0.3."""
    images = by_image(annotations["annotations"]).items()
    return {image for image, boxes in images if (overlaps(boxes, boxes).fill_diagonal_(0) > CROWDED_IOU).any()}


def crowded_ap(weights: Path, device: torch.device) -> float:
    """AP of the crowded images, -1 if there are none."""
    detector, dataset, _ = load_with_data(weights, None)
    truth, crowded = dict(dataset.annotations), crowded_images(dataset.annotations)
    if not crowded:
        return -1.0
    _, results = evaluate(detector.to(device), dataset)
    for name, key in (("images", "id"), ("annotations", "image_id")):
        truth[name] = [record for record in truth[name] if record[key] in crowded]
    return coco_metrics(truth, [result for result in results if result["image_id"] in crowded])["AP"]


def measure(folder: Path, seed: int, device: torch.device) -> dict:
    """A row of the table, kept in the folder of the run."""
    kept = folder / "compare.json"
    if not kept.exists():
        metrics = json.loads((folder / "metrics.json").read_text())
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        last = [line for line in lines if "positives_per_gt" in line][-1]
        row = {name: metrics[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl")}
        row |= {"per_class": {name: numbers["AP"] for name, numbers in metrics["per_class"].items()}}
        row |= {"positives_per_gt": last["positives_per_gt"], "ambiguous_share": last["ambiguous"]}
        row |= {"AP_crowded": crowded_ap(folder / "ota.safetensors", device), "seconds": metrics["total_s"]}
        kept.write_text(json.dumps(row | {"seed": seed}))
    return json.loads(kept.read_text())


def draw(rows: dict[str, list[dict]], title: str, path: Path) -> None:
    """AP and AP of the crowded images: a dot for every seed, a line for the mean."""
    figure = Figure((11, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, metric in zip(axes, ("AP", "AP_crowded"), strict=True):
        for y, (name, seeds) in enumerate(rows.items()):
            color, values = "tab:orange" if name.startswith("ota") else "tab:blue", [row[metric] for row in seeds]
            axis.plot(values, [y] * len(values), "o", color=color, alpha=0.6)
            axis.plot([mean(values)] * 2, [y - 0.32, y + 0.32], color=color, linewidth=3)
        axis.set(xlabel=COLUMNS[metric] + " (COCO)", yticks=range(len(rows)), yticklabels=list(rows))
        axis.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    flags, more, command = split_flags("studies.compare", argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="what train.py takes")
    parser.add_argument("--assigners", nargs="+", metavar="NAME", help="names of train.py, or ota:radius=3,top_q=10")
    parser.add_argument("--study", choices=STUDIES, default="strategies", help="instead of --assigners")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, which share the cores")
    parser.add_argument("--device", default="cpu", help="for the measurements after the training")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(flags)

    contestants = args.assigners or STUDIES[args.study]
    for contestant in contestants:
        flags_of(contestant)  # raises before the first training
    args.out.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // args.jobs)  # of a run's main process
    pairs = [(contestant, seed) for seed in args.seeds for contestant in contestants]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = list(pool.map(lambda pair: train(*pair, args.data, args.out, more, threads), pairs))
    rows: dict[str, list[dict]] = {contestant: [] for contestant in contestants}
    for (contestant, seed), folder in zip(pairs, folders, strict=True):
        rows[contestant].append(measure(folder, seed, torch.device(args.device)))
    shown = {name: title for name, title in COLUMNS.items() if any(s[name] >= 0 for row in rows.values() for s in row)}
    print(seeds_table(rows, shown))
    report = {"command": command, **environment(torch.device("cpu")), "rows": rows}
    write_report(args.out / "compare.json", report)
    title = f"{Path(args.data).name}: a dot for each of {len(args.seeds)} seeds, a line for their mean"
    draw(rows, title, args.out / "compare.png")
    print(f"wrote {args.out / 'compare.json'} and {args.out / 'compare.png'}")


if __name__ == "__main__":
    run_script(main)
