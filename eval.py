"""Evaluate a trained detector on the validation part of its data set, with pycocotools.

    python eval.py --weights runs/shapes-.../ota.safetensors
    torchrun --nproc_per_node 8 eval.py --weights ota.safetensors --data coco

Everything but the pictures comes from the weights file. Writes detections.json (COCO result format) and
metrics.json beside the weights, or into --out. `evaluate` is what train.py calls, too.
"""

import argparse
import contextlib
import io
import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import CocoDataset, DatasetError, collate, eval_transform, find_splits, resized_size
from model import BackboneError, Detector, WeightsError, load_weights

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def setup_distributed(device: str | None) -> tuple[torch.device, int, int]:
    """Device, rank and world size; starts the process group when torchrun has set one up."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world


def batches_of_one_size(dataset: CocoDataset, image_size: tuple[int, int], batch_size: int) -> list[list[int]]:
    """Indices of images that pad to the same size, so that no detection depends on the images beside it."""
    groups = defaultdict(list)
    for i, image in enumerate(dataset.images):
        height, width = resized_size(image["height"], image["width"], image_size)
        groups[-(-height // 32), -(-width // 32)].append(i)
    return [group[i : i + batch_size] for _, group in sorted(groups.items()) for i in range(0, len(group), batch_size)]


@torch.no_grad()
def detect(detector: Detector, dataset: CocoDataset, device: torch.device, batch_size: int, workers: int) -> list[dict]:
    """Detections of a data set in COCO result format, by image id; all of them on rank 0, none elsewhere."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = batches_of_one_size(dataset, detector.config.image_size, batch_size)[rank::world]
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate)
    results = []
    for images, targets in tqdm(
        loader, desc="evaluate", unit="batch", leave=False, disable=None if rank == 0 else True
    ):
        for image, target, found in zip(images, targets, detector([i.to(device) for i in images]), strict=True):
            height, width = target["orig_size"]
            boxes = found["boxes"].cpu() * torch.tensor([width / image.shape[2], height / image.shape[1]]).repeat(2)
            boxes[:, 2:] -= boxes[:, :2]
            for box, score, label in zip(
                boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True
            ):
                results.append(
                    {
                        "image_id": target["image_id"],
                        "category_id": dataset.category_ids[label],
                        "bbox": [round(x, 3) for x in box],
                        "score": score,
                    }
                )
    if world > 1:
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(results, gathered)
        results = [r for part in gathered for r in part] if rank == 0 else []
    return sorted(results, key=lambda r: r["image_id"])


def coco_metrics(annotations: dict, results: list[dict]) -> dict:
    """pycocotools' twelve box numbers, and AP, AP50 and box count of every class; -1 where there are no boxes."""
    truth = COCO()
    truth.dataset = {"info": {}, **annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        # loadRes cannot take an empty list: an index without annotations is what it would give.
        found = truth.loadRes([dict(r) for r in results]) if results else COCO()  # it writes into what it is given
        evaluation = COCOeval(truth, found, "bbox")
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
    return {**dict(zip(METRICS, map(float, evaluation.stats), strict=True)), "per_class": per_class}


def evaluate(
    detector: Detector, dataset: CocoDataset, device: torch.device, batch_size: int = 8, workers: int = 2
) -> tuple[dict, list[dict]]:
    """Metrics and detections of a data set made with `eval_transform`; on all ranks at once, result on rank 0."""
    training = detector.training
    results = detect(detector.eval(), dataset, device, batch_size, workers)
    detector.train(training)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    return (coco_metrics(dataset.annotations, results) if is_main else {}), results


def print_table(metrics: dict) -> None:
    width = max([5, *map(len, metrics["per_class"])])
    print(f"{'class':{width}}   boxes     AP   AP50")
    for name, row in metrics["per_class"].items():
        scores = "  ".join("    -" if row[k] < 0 else f"{row[k]:.3f}" for k in ("AP", "AP50"))
        print(f"{name:{width}} {row['boxes']:7d}  {scores}")
    print("  ".join(f"{name} {metrics[name]:.3f}" for name in METRICS[:6]))
    print("  ".join(f"{name} {metrics[name]:.3f}" for name in METRICS[6:]))


def check_classes(metadata: dict, dataset: CocoDataset, weights: Path) -> None:
    """Raises WeightsError when the data set's classes are not those that the weights were trained on."""
    trained = dict(zip(metadata["category_ids"], metadata["class_names"], strict=True))
    there = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    if trained != there:
        only_weights = [f"{i} {n}" for i, n in trained.items() if there.get(i) != n][:5]
        only_data = [f"{i} {n}" for i, n in there.items() if trained.get(i) != n][:5]
        raise WeightsError(
            f"the classes of {weights} ({len(trained)}) are not those of {dataset.split.annotations} ({len(there)}); "
            f"first differences: weights {only_weights}, data {only_data}. Pass the fitting data set with --data."
        )


def evaluation_split(data: str):
    """The validation part, or, said aloud, the training part of a data set that has no other."""
    train, val = find_splits(data)
    if val is None and int(os.environ.get("RANK", 0)) == 0:
        print(
            f"note: {data} has no validation part, so the training part is evaluated; "
            "the AP tells how well it was learned, not how well it generalises",
            file=sys.stderr,
        )
    return val or train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="file written by train.py")
    parser.add_argument("--data", help="coco, shapes or a folder in COCO layout; default: what it was trained on")
    parser.add_argument("--out", type=Path, help="folder of detections.json and metrics.json; default: the weights'")
    parser.add_argument("--batch-size", type=int, default=8, help="images per rank")
    parser.add_argument("--workers", type=int, default=2, help="loader processes per rank")
    parser.add_argument("--device", help="cuda, cpu or mps; default: cuda where there is one")
    args = parser.parse_args()

    device, rank, world = setup_distributed(args.device)
    detector, metadata = load_weights(args.weights)
    split = evaluation_split(args.data or metadata["data"])
    dataset = CocoDataset(split, eval_transform(detector.config.image_size))
    check_classes(metadata, dataset, args.weights)
    if rank == 0:
        print(f"{args.weights}: {len(dataset.class_names)} classes; {split.annotations}: {len(dataset)} images")
    metrics, results = evaluate(detector.to(device), dataset, device, args.batch_size, args.workers)
    if rank == 0:
        print_table(metrics)
        out = args.out or args.weights.parent
        out.mkdir(parents=True, exist_ok=True)
        (out / "detections.json").write_text(json.dumps(results))
        record = {"weights": str(args.weights), "data": str(split.annotations), "images": len(dataset), **metrics}
        (out / "metrics.json").write_text(json.dumps(record, indent=1))
        print(f"wrote {out / 'detections.json'} and {out / 'metrics.json'}")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (DatasetError, WeightsError, BackboneError) as error:
        sys.exit(f"eval.py: {error}")
