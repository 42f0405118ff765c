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
from collections.abc import Collection
from pathlib import Path

import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (
    BOXES,
    CocoDataset,
    collate,
    eval_transform,
    find_splits,
    printable,
    resized_size,
)
from errors import UserError
from model import Detector, WeightsError, is_on_hub, load_weights, local_file
from model.batch import padded_side
from training.process import ignore_interrupts, setup_distributed, wait_for_main
from training.settings import SettingsError, not_negative, positive

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def batches_of_one_size(images: list[dict], image_size: tuple[int, int], batch_size: int) -> list[list[int]]:
    """Indices of images that pad to the same size, so that no detection depends on the images beside it.

    images: records with `height` and `width` in px.
    """
    groups = defaultdict(list)
    for i, image in enumerate(images):
        height, width = resized_size(image["height"], image["width"], image_size)
        groups[padded_side(height), padded_side(width)].append(i)
    return [group[i : i + batch_size] for _, group in sorted(groups.items()) for i in range(0, len(group), batch_size)]


def coco_results(image_id: int, boxes: Tensor, scores: Tensor, labels: Tensor, category_ids: list[int]) -> list[dict]:
    """Detections of an image in COCO result format. boxes (n, 4) x1 y1 x2 y2 px, scores (n,), labels (n,)."""
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1)
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[int(label)],
            "bbox": [round(x, 3) for x in box],
            "score": score,
        }
        for box, score, label in zip(sides.tolist(), scores.tolist(), labels.tolist(), strict=True)
    ]


@torch.no_grad()
def detect(detector: Detector, dataset: CocoDataset, device: torch.device, batch_size: int, workers: int) -> list[dict]:
    """Detections of a data set in COCO result format, by image id; all of them on rank 0, none elsewhere."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = batches_of_one_size(dataset.images, detector.config.image_size, batch_size)[rank::world]
    loader = DataLoader(
        dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate, worker_init_fn=ignore_interrupts
    )
    results = []
    for images, targets in tqdm(
        loader, desc="evaluate", unit="batch", leave=False, disable=None if rank == 0 else True
    ):
        detections = detector([i.to(device) for i in images])
        columns = [torch.column_stack([d["boxes"], d["scores"], d["labels"]]) for d in detections]
        found = torch.cat(columns).cpu().split([len(rows) for rows in columns])
        for image, target, rows in zip(images, targets, found, strict=True):
            height, width = target["orig_size"]
            boxes = rows[:, :4] * torch.tensor([width / image.shape[2], height / image.shape[1]]).repeat(2)
            results += coco_results(target["image_id"], boxes, *rows[:, 4:].unbind(1), dataset.category_ids)
    if world > 1:
        gathered = [None] * world if rank == 0 else None
        dist.gather_object(results, gathered)
        results = [r for part in gathered for r in part] if rank == 0 else []
    return sorted(results, key=lambda r: r["image_id"])


def faster_coco_eval() -> tuple[type, type]:
    """The classes of a package that computes the numbers of pycocotools in less time."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise SettingsError("--fast-eval needs the package faster-coco-eval: pip install faster-coco-eval") from error
    return COCO, COCOeval_faster


def for_evaluators(annotations: dict, results: list[dict]) -> tuple[dict, list[dict]]:
    """Both as evaluators need them: with ids from 1 on, for ids become floats there and 0 stands for no match, and with
    areas that fit the boxes, for an object whose area is outside of [0, 1e10] does not count.

    Images and categories keep the order of their ids, so detections of equal scores keep theirs.
    """
    new_image, new_category = (
        {old: new for new, old in enumerate(sorted(record["id"] for record in annotations[key]), 1)}
        for key in ("images", "categories")
    )

    def renumbered(record: dict, **more) -> dict:
        ids = {"image_id": new_image[record["image_id"]], "category_id": new_category[record["category_id"]]}
        return {"bbox": record["bbox"], **ids, **more}

    truth = {
        "info": {},
        "images": [{"id": new} for new in new_image.values()],
        "categories": [category | {"id": new_category[category["id"]]} for category in annotations["categories"]],
        "annotations": [
            renumbered(record, id=number, area=_area(record), iscrowd=record["iscrowd"])
            for number, record in enumerate(annotations["annotations"], 1)
        ],
    }
    return truth, [renumbered(result, score=result["score"]) for result in results]


def _area(record: dict) -> float:
    """The record's own, of a segment as a rule, or the box's where there is none or one that is not within the box."""
    area, (_, _, width, height) = record.get("area"), record["bbox"]
    fits = isinstance(area, int | float) and 0 < area <= (width + 1) * (height + 1)
    return area if fits else width * height


def coco_metrics(annotations: dict, results: list[dict], fast: bool = False) -> dict:
    """pycocotools' twelve box numbers, and AP, AP50 and box count of every class; -1 where there are no boxes."""
    index, evaluator = faster_coco_eval() if fast else (COCO, COCOeval)
    truth = index()
    truth.dataset, results = for_evaluators(annotations, results)
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        # loadRes cannot take an empty list: an index without annotations is what it would give.
        found = truth.loadRes(results) if results else index()
        evaluation = evaluator(truth, found, "bbox")
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
    detector: Detector,
    dataset: CocoDataset,
    device: torch.device,
    batch_size: int = 8,
    workers: int = 2,
    fast: bool = False,
) -> tuple[dict, list[dict]]:
    """Metrics and detections of a data set made with `eval_transform`; on all ranks at once, result on rank 0.

    Metrics are COCO's, and for a data set in CrowdHuman's form its own as well.
    """
    training = detector.training
    results = detect(detector.eval(), dataset, device, batch_size, workers)
    detector.train(training)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    metrics = coco_metrics(dataset.annotations, results, fast) if is_main else {}
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
    if "crowd_AP" in metrics:
        print(
            f"CrowdHuman's own: AP {metrics['crowd_AP']:.3f}  MR^-2 {metrics['crowd_MR']:.3f}  "
            f"JI {metrics['crowd_JI']:.3f} of scores over {metrics['crowd_JI_score']:g}"
        )


def class_differences(metadata: dict, dataset: CocoDataset) -> str:
    """The first categories (id and name) that are only on one side; empty where all agree."""
    here = set(zip(metadata["category_ids"], metadata["class_names"], strict=True))
    there = set(zip(dataset.category_ids, dataset.class_names, strict=True))
    return "; ".join(
        f"only in {source}: " + ", ".join(f"{i} {printable(name)}" for i, name in sorted(only)[:5])
        for source, only in ((metadata["source"], here - there), (dataset.split.annotations, there - here))
        if only
    )


def evaluation_dataset(
    data: str,
    image_size: tuple[int, int],
    overfit: int | None = None,
    box: str | None = None,
    follow_links: bool = False,
    known_ids: Collection[int] = (),
) -> CocoDataset:
    """The validation part, or, said aloud, the training part of a data set that has no other, or only its first
    `overfit` images with objects. known_ids: the category ids of the training."""
    train, val = find_splits(data, box, follow_links)
    val = None if overfit else val
    dataset = CocoDataset(val or train, eval_transform(image_size), first=overfit, known_ids=known_ids)
    if int(os.environ.get("RANK", 0)) == 0:
        if val is None and not overfit:
            print(
                f"note: {data} has no validation part, so the training part is evaluated; "
                "the AP tells how well it was learned, not how well it generalises",
                file=sys.stderr,
            )
        print(f"evaluation on {dataset.split.annotations}: {describe(dataset)}")
    return dataset


def load_with_data(
    weights: Path, data: str | None, box: str | None = None, follow_links: bool = False
) -> tuple[Detector, CocoDataset, str]:
    """The detector of a file that train.py wrote, a data set with its classes to evaluate it on, and what that is
    called; unless given, `data` and `box` are those of the training. Raises WeightsError, DatasetError, SettingsError.
    """
    detector, metadata = load_weights(weights)
    data = data or metadata.get("data")
    if data is None:
        raise WeightsError(f"{weights} does not say what it was trained on; name the data set with --data")
    size, ids = detector.config.image_size, detector.category_ids
    dataset = evaluation_dataset(data, size, None, box or metadata.get("box"), follow_links, ids)
    if box and not dataset.split.form.boxes:
        raise SettingsError(f"--box {box} is for CrowdHuman; {dataset.split.annotations} has one kind of boxes")
    differences = class_differences(metadata | {"source": weights}, dataset)
    if differences:
        raise WeightsError(f"the classes do not fit: {differences}. Pass the fitting data set with --data.")
    return detector, dataset, data


def describe(dataset: CocoDataset) -> str:
    text = (
        f"{len(dataset)} images, {len(dataset.class_names)} classes; left out: "
        f"{dataset.dropped_boxes} degenerate boxes, {dataset.crowd_boxes} crowd regions"
    )
    if dataset.grouping:
        text += f", category {dataset.grouping['id']} {printable(dataset.grouping['name'])}, which groups the others"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="file written by train.py, or hf://user/repo[/file]")
    parser.add_argument("--data", help="coco, crowdhuman, shapes or a folder; default: what it was trained on")
    parser.add_argument("--box", choices=BOXES, help="which of CrowdHuman's boxes; default: those it was trained on")
    parser.add_argument("--follow-links", action="store_true", help="read images that are links to other folders")
    parser.add_argument("--out", type=Path, help="folder; default: the weights', or eval-<data>-<box> in it")
    parser.add_argument("--batch-size", type=positive, default=8, help="images per rank")
    parser.add_argument("--workers", type=not_negative, default=2, help="loader processes per rank")
    parser.add_argument("--device", help="cuda, cpu or mps; default: cuda where there is one")
    parser.add_argument("--fast-eval", action="store_true", help="with the package faster-coco-eval, not pycocotools")
    args = parser.parse_args()

    if args.fast_eval:
        faster_coco_eval()  # missing: say so before the detections are made
    device, rank, world = setup_distributed(args.device)
    weights = local_file(args.weights)
    detector, dataset, _ = load_with_data(weights, args.data, args.box, args.follow_links)
    metrics, results = evaluate(detector.to(device), dataset, device, args.batch_size, args.workers, args.fast_eval)
    if rank == 0:
        of = [Path(args.data).resolve().name] if args.data else []
        of += [args.box] if args.box else []
        folder = Path() if is_on_hub(args.weights) else weights.parent
        out = args.out or folder / ("-".join(["eval", *of]) if of or is_on_hub(args.weights) else "")
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
