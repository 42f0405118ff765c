"""Evaluate a trained detector on the validation part of its data set, with pycocotools.

    python eval.py --weights runs/shapes-.../ota.safetensors
    torchrun --nproc_per_node 8 eval.py --weights ota.safetensors --data coco

Everything but the pictures comes from the weights file. Writes detections.json (COCO result format) and
metrics.json beside the weights, or into --out. train.py calls `evaluate`.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import BOXES, CocoDataset, Split, collate, eval_transform, find_splits, printable, read_split
from data.checks import Records
from errors import UserError
from model import Detections, Detector, WeightsError, is_on_hub, load_weights, local_file
from model.batch import Batch, pack, padded_side
from training.process import from_main, ignore_interrupts, setup_distributed, wait_for_main
from training.settings import SettingsError, not_negative, positive

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def batches_of_one_size(dataset: CocoDataset, image_size: tuple[int, int], batch_size: int) -> list[list[int]]:
    """Indices of images that pad to the same size, so that no detection depends on the other images of a batch."""
    groups = defaultdict(list)
    for i, (height, width) in enumerate(dataset.resized_sizes(image_size).tolist()):
        groups[padded_side(height), padded_side(width)].append(i)
    return [group[i : i + batch_size] for _, group in sorted(groups.items()) for i in range(0, len(group), batch_size)]


def pack_samples(samples: list) -> tuple[Batch, list[dict]]:
    images, targets = collate(samples)
    return pack(images, targets), targets


def coco_results(image_id: int, detections: Detections, category_ids: list[int]) -> list[dict]:
    """Detections of an image in COCO result format."""
    boxes, scores, labels, _ = detections
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    rows = zip([[round(x, 3) for x in box] for box in boxes], scores.tolist(), labels.tolist(), strict=True)
    return [{"image_id": image_id, "category_id": category_ids[c], "bbox": box, "score": s} for box, s, c in rows]


@torch.no_grad()
def detect_dataset(
    detector: Detector, dataset: CocoDataset, device: torch.device, batch_size: int, workers: int
) -> list[dict]:
    """Detections of a data set in COCO result format, by image id: on rank 0 those of all ranks, elsewhere none."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = batches_of_one_size(dataset, detector.config.image_size, batch_size)[rank::world]
    settings = {"num_workers": workers, "worker_init_fn": ignore_interrupts, "pin_memory": device.type == "cuda"}
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=pack_samples, **settings)
    results, hidden = [], None if rank == 0 else True
    for batch, targets in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=hidden):
        scales = (torch.tensor([t["orig_size"] for t in targets]) / batch.sizes).flip(1).repeat(1, 2)
        for target, scale, detections in zip(targets, scales, detector(batch.to(device)), strict=True):
            detections = detections._replace(boxes=detections.boxes.cpu() * scale)
            results += coco_results(target["image_id"], detections, dataset.category_ids)
    if world > 1:
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(results, gathered)
        results = [r for part in gathered for r in part] if rank == 0 else []
    return sorted(results, key=lambda r: r["image_id"])


def coco_metrics(annotations: dict, results: list[dict]) -> dict:
    """pycocotools' twelve box numbers, and AP, AP50 and box count of every class; -1 where there are no boxes."""
    # pycocotools takes the id 0 for no match, keeps ids as floats, and leaves out areas outside of [0, 1e10].
    truth, records, results = COCO(), [], [dict(result) for result in results]  # loadRes writes into results
    for number, record in enumerate(annotations["annotations"], 1):
        _, _, width, height = record["bbox"]
        area = record.get("area") or 0
        area = area if 0 < area <= (width + 1) * (height + 1) else width * height
        records.append(record | {"id": number, "area": area})
    truth.dataset = {"info": {}, **annotations, "annotations": records}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        # loadRes refuses an empty list.
        evaluation = COCOeval(truth, truth.loadRes(results) if results else COCO(), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]  # IoU threshold, recall, class; all areas, 100 boxes
    per_class = {}
    for c, category_id in enumerate(evaluation.params.catIds):
        rows = precision[:, :, c]
        boxes = sum(not a["iscrowd"] for a in truth.loadAnns(truth.getAnnIds(catIds=[category_id])))
        ap, ap50 = (float(p[p > -1].mean()) if boxes else -1.0 for p in (rows, rows[0]))
        per_class[truth.cats[category_id]["name"]] = {"boxes": boxes, "AP": ap, "AP50": ap50}
    return {**dict(zip(METRICS, map(float, evaluation.stats[: len(METRICS)]), strict=True)), "per_class": per_class}


def evaluate(
    detector: Detector, dataset: CocoDataset, device: torch.device, batch_size: int = 8, workers: int = 2
) -> tuple[dict, list[dict]]:
    """Return metrics and detections of a data set made with `eval_transform`; all ranks call it, rank 0 has the result.

    Metrics are COCO's and those of the data set's form, such as CrowdHuman's.
    """
    training = detector.training
    results = detect_dataset(detector.eval(), dataset, device, batch_size, workers)
    detector.train(training)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    metrics = coco_metrics(dataset.annotations, results) if is_main else {}
    if is_main and dataset.split.form.metrics:
        metrics |= dataset.split.form.metrics(dataset.annotations, results)
    wait_for_main()
    return metrics, results


def print_table(metrics: dict) -> None:
    rows = [(printable(name), row) for name, row in metrics["per_class"].items()]
    width = max([5, *(len(name) for name, _ in rows)])
    print(f"{'class':{width}}   boxes     AP   AP50")
    for name, row in rows:
        scores = "  ".join("    -" if row[k] < 0 else f"{row[k]:.3f}" for k in ("AP", "AP50"))
        print(f"{name:{width}} {row['boxes']:7d}  {scores}")
    print("  ".join(f"{name} {metrics[name]:.3f}" for name in METRICS[:6]))
    print("  ".join(f"{name} {metrics[name]:.3f}" for name in METRICS[6:]))
    if extra := {name: metrics[name] for name in metrics if name.startswith("crowd_")}:
        print("  ".join(f"{name} {value:.3f}" for name, value in extra.items()))


def class_differences(metadata: dict, dataset: CocoDataset) -> str:
    """The first categories (id and name) that only one of the two has, as text; empty where all agree."""
    sources = (metadata["source"], metadata), (dataset.split.annotations, vars(dataset))
    sides = [(source, set(zip(has["category_ids"], has["class_names"], strict=True))) for source, has in sources]
    return "; ".join(
        f"only in {source}: " + ", ".join(f"{i} {printable(name)}" for i, name in sorted(classes - others)[:5])
        for (source, classes), (_, others) in (sides, sides[::-1])
        if classes - others
    )


def evaluation_dataset(
    splits: tuple[Split | None, Split | None],
    image_size: tuple[int, int],
    overfit: int | None = None,
    known_ids: Collection[int] = (),
    train_records: Records | None = None,
) -> CocoDataset:
    """Return the validation split; the training split, with a note, if there is none; with `overfit`, its first images.

    known_ids: category ids of the training. train_records: of the training split, if it was read before.
    """
    split = splits[0] if overfit or splits[1] is None else splits[1]
    records = (
        train_records if split is splits[0] and train_records is not None else from_main(lambda: read_split(split))
    )
    dataset = CocoDataset(split, eval_transform(image_size), first=overfit, known_ids=known_ids, records=records)
    if int(os.environ.get("RANK", 0)) == 0:
        if split is splits[0] and not overfit:
            note = "so the training part is evaluated; the AP does not measure how well the detector generalises"
            print(f"note: {split.annotations} has no validation part beside it, {note}", file=sys.stderr)
        print(f"evaluation on {dataset.split.annotations}: {describe(dataset)}")
    return dataset


def load_with_data(
    weights: Path, data: str | None, box: str | None = None, follow_links: bool = False
) -> tuple[Detector, CocoDataset, str]:
    """The detector in a file that train.py wrote, a data set with its classes, and the data set's name.

    `data` and `box` default to those of the training. Raises WeightsError, DatasetError, SettingsError.
    """
    detector, metadata = load_weights(weights)
    data = data or metadata.get("data")
    if data is None:
        raise WeightsError(f"{weights} does not name its data set; name one with --data")
    size, ids = detector.config.image_size, detector.category_ids
    splits = from_main(lambda: find_splits(data, box or metadata.get("box"), follow_links))
    dataset = evaluation_dataset(splits, size, known_ids=ids)
    if box and not dataset.split.form.boxes:
        raise SettingsError(f"--box {box} is for CrowdHuman; {dataset.split.annotations} has one kind of boxes")
    differences = class_differences(metadata | {"source": weights}, dataset)
    if differences:
        raise WeightsError(f"the classes do not fit: {differences}. Pass the fitting data set with --data.")
    return detector, dataset, data


def describe(dataset: CocoDataset) -> str:
    left_out = f"{dataset.dropped_boxes} degenerate boxes, {dataset.crowd_boxes} crowd regions"
    text = f"{len(dataset)} images, {len(dataset.class_names)} classes; left out: {left_out}"
    if dataset.grouping:
        text += f", category {dataset.grouping['id']} {printable(dataset.grouping['name'])}, which groups the others"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="file written by train.py, or hf://user/repo[/file]")
    parser.add_argument("--data", help="coco, crowdhuman, shapes or a folder; default: that of the training")
    parser.add_argument("--box", choices=BOXES, help="which of CrowdHuman's boxes; default: those of the training")
    parser.add_argument("--follow-links", action="store_true", help="read images that are links to other folders")
    parser.add_argument("--out", type=Path, help="folder; default: the weights', or eval-<data>-<box> in it")
    parser.add_argument("--batch-size", type=positive, default=8, help="images per rank")
    parser.add_argument("--workers", type=not_negative, default=2, help="loader processes per rank")
    parser.add_argument("--device", help="cuda, cpu or mps; default: cuda where there is one")
    args = parser.parse_args()

    device, rank, world = setup_distributed(args.device)
    weights = local_file(args.weights)
    detector, dataset, _ = load_with_data(weights, args.data, args.box, args.follow_links)
    metrics, results = evaluate(detector.to(device), dataset, device, args.batch_size, args.workers)
    if rank == 0:
        names = [name for name in (args.data and Path(args.data).resolve().name, args.box) if name]
        on_hub = is_on_hub(args.weights)
        folder = Path() if on_hub else weights.parent
        out = args.out or folder / ("-".join(["eval", *names]) if names or on_hub else "")
        out.mkdir(parents=True, exist_ok=True)
        (out / "detections.json").write_text(json.dumps(results))
        record = {"weights": args.weights, "data": str(dataset.split.annotations), "images": len(dataset)}
        (out / "metrics.json").write_text(json.dumps(record | metrics, indent=1))
        print_table(metrics)
        print(f"wrote {out / 'detections.json'} and {out / 'metrics.json'}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"eval.py: {error}")
