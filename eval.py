"""Evaluate a trained detector on the validation split of its data set, or another, with COCO's metrics.

    python eval.py --weights runs/shapes-.../ota.safetensors
    torchrun --nproc_per_node 8 eval.py --weights ota.safetensors --data coco

Everything except the pictures comes from the weights file. Writes detections.json (COCO result format) and
metrics.json beside the weights, or into --out, and report.html with --report. train.py calls `evaluate`.
"""

import argparse
import contextlib
import json
import sys
from collections import Counter, defaultdict
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import BOXES, SPLITS, CocoDataset, Split, eval_transform, find_splits, printable, read_split
from data.layouts import data_name
from data.problems import repair_lines
from errors import UserError, run_script
from model import DEFAULT_SCORE, Detections, Detector, is_on_hub, load_weights, local_file, make_folder
from model.batch import Batch, pack, padded_side
from report import write_report
from training.process import from_main, ignore_interrupts, setup_distributed, wait_for_main
from training.settings import not_negative, positive

try:
    from hotcoco import COCO, COCOeval  # pycocotools' numbers bit for bit, in less time
except ImportError:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def batches_of_one_size(dataset: CocoDataset, image_size: tuple[int, int], batch_size: int) -> list[list[int]]:
    """Indices of images that pad to the same size, so that no detection depends on the other images of a batch."""
    groups = defaultdict(list)
    for i, (height, width) in enumerate(dataset.resized_sizes(image_size).tolist()):
        groups[padded_side(height), padded_side(width)].append(i)
    return [group[i : i + batch_size] for _, group in sorted(groups.items()) for i in range(0, len(group), batch_size)]


def pack_samples(samples: list) -> tuple[Batch, tuple[dict, ...]]:
    images, targets = zip(*samples, strict=True)
    return pack(images, targets), targets


def coco_results(image_id: int, detections: Detections, category_ids: list[int]) -> list[dict]:
    """Return the detections of an image in COCO result format."""
    boxes, scores, labels, _ = detections
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    rows = zip([[round(x, 3) for x in box] for box in boxes], scores.tolist(), labels.tolist(), strict=True)
    return [{"image_id": image_id, "category_id": category_ids[c], "bbox": box, "score": s} for box, s, c in rows]


@torch.no_grad()
def detect_dataset(detector: Detector, dataset: CocoDataset, batch_size: int, workers: int) -> list[dict]:
    """Return detections in COCO result format, by image id: on rank 0 those of all ranks, elsewhere none."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = batches_of_one_size(dataset, detector.config.image_size, batch_size)[rank::world]
    settings = {"num_workers": workers, "worker_init_fn": ignore_interrupts, "pin_memory": detector.mean.is_cuda}
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=pack_samples, **settings)
    results, hidden = [], None if rank == 0 else True
    for batch, targets in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=hidden):
        scales = (torch.tensor([t["orig_size"] for t in targets]) / batch.sizes).flip(1).repeat(1, 2)
        for target, scale, detections in zip(targets, scales, detector(batch.to(detector.mean.device)), strict=True):
            detections = detections._replace(boxes=detections.boxes.cpu() * scale)
            results += coco_results(target["image_id"], detections, dataset.category_ids)
    gathered = [results] * world if rank == 0 else None
    if world > 1:
        dist.gather_object(results, gathered)
    return sorted((r for part in gathered or () for r in part), key=lambda r: r["image_id"])


def coco_evaluation(annotations: dict, results: list[dict]) -> COCOeval:
    """Return an evaluation of boxes. Ids count from 1, those of images and classes in the order of the file's ids."""
    # pycocotools takes the id 0 for no match, and keeps ids as floats; hotcoco refuses negative ones.
    old_ids = (sorted(record["id"] for record in annotations[name]) for name in ("images", "categories"))
    image_ids, category_ids = ({old: new for new, old in enumerate(ids, 1)} for ids in old_ids)

    def renumbered(records: list[dict]) -> list[dict]:
        places = ((image_ids[record["image_id"]], category_ids[record["category_id"]]) for record in records)
        ids = ({"id": n, "image_id": i, "category_id": c} for n, (i, c) in enumerate(places, 1))
        return [record | new for record, new in zip(records, ids, strict=True)]

    truth, found = COCO(), renumbered(results)
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in image_ids.values()],
        "categories": [{"id": c, "name": str(c)} for c in category_ids.values()],
        "annotations": renumbered(annotations["annotations"]),
    }
    with contextlib.redirect_stdout(None):  # print is silent
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found) if found else COCO(), "bbox")  # loadRes refuses []
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def coco_metrics(annotations: dict, results: list[dict]) -> dict:
    """Return COCO's twelve box numbers, and for every class box count, AP, AP50 and `best_cut`; -1 without boxes."""
    evaluation, per_class = coco_evaluation(annotations, results), {}
    # IoU threshold, recall, class; all areas, 100 boxes
    precision, scores = (evaluation.eval[name][:, :, :, 0, 2] for name in ("precision", "scores"))
    counts = Counter(a["category_id"] for a in annotations["annotations"] if not a["iscrowd"])
    for c, category in enumerate(sorted(annotations["categories"], key=itemgetter("id"))):
        rows, boxes = precision[:, :, c], counts[category["id"]]
        ap, ap50 = (float(p[p > -1].mean()) if boxes else -1.0 for p in (rows, rows[0]))
        f1, score = best_cut(rows[0], scores[0, :, c], evaluation.params.recThrs)
        row = {"boxes": boxes, "AP": ap, "AP50": ap50, "F1": f1 if boxes else -1.0, "score": score}
        per_class[category["name"]] = row
    return {**dict(zip(METRICS, map(float, evaluation.stats[: len(METRICS)]), strict=True)), "per_class": per_class}


def best_cut(precision: np.ndarray, scores: np.ndarray, recall: np.ndarray) -> tuple[float, float]:
    """Return the largest F1 = 2 P R / (P + R) of a class, and the score from which on detections have it.

    The arrays are pycocotools' over recall, where precision is the largest at that recall or above.
    """
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
    best = int(f1.argmax())
    return (float(f1[best]), float(scores[best])) if f1[best] > 0 else (0.0, DEFAULT_SCORE)


def evaluate(detector: Detector, dataset: CocoDataset, batch_size: int = 8, workers: int = 2) -> tuple[dict, list]:
    """Return metrics, COCO's and those of the data set's form, and detections, and set the detector's `cuts`; all ranks
    call it, on rank 0 it has effect. The data set is made with `eval_transform`."""
    training, form, metrics = detector.training, dataset.split.form, {}
    results = detect_dataset(detector.eval(), dataset, batch_size, workers)
    detector.train(training)
    if not dist.is_initialized() or dist.get_rank() == 0:
        metrics = coco_metrics(dataset.annotations, results)
        detector.cuts = [row["score"] for row in metrics["per_class"].values()]
        metrics |= form.metrics(dataset.annotations, results) if form.metrics else {}
    wait_for_main()
    return metrics, results


def print_table(metrics: dict) -> None:
    rows = [(printable(name), row) for name, row in metrics["per_class"].items()]
    width = max([5, *(len(name) for name, _ in rows)])
    print(f"{'class':{width}}   boxes     AP   AP50     F1 from score")
    for name, row in rows:
        scores = "  ".join("    -" if row[k] < 0 else f"{row[k]:.3f}" for k in ("AP", "AP50", "F1"))
        print(f"{name:{width}} {row['boxes']:7d}  {scores}      {row['score']:.3f}")
    crowd = [name for name in metrics if name.startswith("crowd_")]
    for names in filter(None, (METRICS[:6], METRICS[6:], crowd)):
        print("  ".join(f"{name} {metrics[name]:.3f}" for name in names))


def describe(dataset: CocoDataset) -> str:
    left_out = f"{dataset.dropped_boxes} degenerate boxes, {dataset.crowd_boxes} crowd regions"
    counts = f"{len(dataset)} images, {len(dataset.class_names)} classes; left out: {left_out}"
    return "\n  repaired: ".join([counts, *repair_lines(dataset.repairs)])


def evaluation_dataset(split: Split, image_size: tuple[int, int], classes: dict, **options) -> CocoDataset:
    """Return `split`, with a note if it is a whole training split; options: `first` and `records` of CocoDataset.
    Raises DatasetError unless it has the class_names and category_ids in `classes`, whose file is their source."""
    options["records"] = options.get("records") or from_main(lambda: read_split(split))
    dataset = CocoDataset(split, eval_transform(image_size), known=classes, **options)
    if not dist.is_initialized() or dist.get_rank() == 0:
        if split.name == "train" and not options.get("first"):
            note = "is the training split; an AP on it does not measure how well the detector generalises"
            print(f"note: {split.annotations} {note}", file=sys.stderr)
        print(f"evaluation on {split.annotations}: {describe(dataset)}")
    dataset.require_classes(classes)
    return dataset


def load_with_data(
    weights: Path, data: str | None, name: str | None = None, box: str | None = None, **how: bool
) -> tuple[Detector, CocoDataset, str]:
    """Return the detector in a file that train.py wrote, a split with its classes, and the data set's name. `data` and
    `box` default to those of the training, `name` to "val" or, without one, "train"; `how`: follow_links and strict of
    `find_splits`. Raises UserError."""
    detector, metadata = load_weights(weights)
    if (data := data or metadata.get("data")) is None:
        raise UserError(f"{weights} names no data set; name the data set with --data")
    splits = from_main(lambda: find_splits(data, box or metadata.get("box"), **how))
    split = getattr(splits, name) if name else splits.val or splits.train
    if split is None:
        found = " and ".join(other.name for other in splits if other)
        raise UserError(f"{data} has no {name or 'val'} split, only {found}; name another split or another data set")
    if box and not split.form.boxes:
        raise UserError(f"--box {box} is for CrowdHuman; {split.annotations} has one kind of boxes")
    return detector, evaluation_dataset(split, detector.config.image_size, metadata | {"source": weights}), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="file written by train.py, or hf://user/repo[/file]")
    parser.add_argument("--data", help="coco, crowdhuman, shapes or a folder; default: that of the training")
    parser.add_argument("--split", choices=SPLITS, help="default: val, or train where there is no val")
    parser.add_argument("--box", choices=BOXES, help="which of CrowdHuman's boxes; default: those of the training")
    parser.add_argument("--follow-links", action="store_true", help="read images that are links to other folders")
    parser.add_argument("--strict", action="store_true", help="stop for flaws that would be repaired, too")
    parser.add_argument("--out", type=Path, help="folder; default: the weights', or eval-<data>-<split>-<box> in it")
    parser.add_argument("--batch-size", type=positive, default=8, help="images per rank")
    parser.add_argument("--workers", type=not_negative, default=2, help="loader processes per rank")
    parser.add_argument("--report", action="store_true", help="write report.html, a page on the errors; needs hotcoco")
    parser.add_argument("--device", help="cuda, cpu or mps; default: cuda where there is one")
    args = parser.parse_args()
    if args.report and not hasattr(COCOeval, "tide_errors"):
        raise UserError('--report needs hotcoco: pip install -e ".[report]"')
    device, rank, world = setup_distributed(args.device)
    weights = local_file(args.weights)
    how = {"follow_links": args.follow_links, "strict": args.strict}
    detector, dataset, _ = load_with_data(weights, args.data, args.split, args.box, **how)
    names = [name for name in (args.data and data_name(args.data), args.split, args.box) if name]
    folder, name = (Path(), "eval") if is_on_hub(args.weights) else (weights.parent, "eval" if names else "")
    out = args.out or folder / "-".join([name, *names])
    from_main(lambda: make_folder(out))  # before the work
    metrics, results = evaluate(detector.to(device), dataset, args.batch_size, args.workers)
    if rank == 0:
        (out / "detections.json").write_text(json.dumps(results))
        about = {"weights": args.weights, "data": str(dataset.split.annotations), "images": len(dataset)}
        (out / "metrics.json").write_text(json.dumps(about | metrics, indent=1))
        print_table(metrics)
        print(f"wrote {out / 'detections.json'} and {out / 'metrics.json'}")
        if args.report:
            cuts = dict(zip(dataset.category_ids, detector.cuts, strict=True))
            shown = [result for result in results if result["score"] >= cuts[result["category_id"]]]
            evaluations = (coco_evaluation(dataset.annotations, some) for some in (results, shown))
            write_report(out, dataset, metrics, *evaluations)
            print(f"wrote {out / 'report.html'}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
