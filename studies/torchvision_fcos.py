"""torchvision's FCOS with its own labels and with OTA's, as in docs/embedding.md, on one data set.

    python -m studies.torchvision_fcos --data crowds --out runs/torchvision.json

Both have this repository's backbone, the same initial weights, images in the same order and the same schedule. Labels
differ, and with them the target of the third branch: centerness, or the IoU. Writes COCO's AP of every seed.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from benchmarks.measure import write_report
from benchmarks.tables import APS, SIZES, seeds_table
from data import CocoDataset, eval_transform, find_splits, train_transform
from data.dataset import SeededDataset, batches_from
from errors import UserError, run_script
from eval import coco_metrics, coco_results
from kernels import OTAConfig
from model import Detections
from tests.support.embedding import torchvision_detector
from training.environment import environment

SIZE_PX, BATCH_SIZE, LEARNING_RATE = 128, 8, 3e-3
PER_Q = {"FCOS's own": None, "OTA, paper": 1, "OTA, per_q 3": 3}


def train(model: nn.Module, dataset: CocoDataset, steps: int, batch_size: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    samples = SeededDataset(dataset, seed)
    for keys in batches_from(0, steps, dataset.tall, batch_size, seed):
        images, targets = zip(*(samples[key] for key in keys), strict=True)
        optimizer.zero_grad()
        sum(model([image / 255 for image in images], list(targets)).values()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def metrics_of(model: nn.Module, dataset: CocoDataset) -> dict:
    results = []
    for image, target in dataset:
        (found,) = model.eval()([image / 255])
        detections = Detections(found["boxes"], found["scores"], found["labels"], dataset.class_names)
        results += coco_results(target["image_id"], detections, dataset.category_ids)
    return coco_metrics(dataset.annotations, results)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="what train.py takes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    (train_split, val_split, _), size = find_splits(args.data), (SIZE_PX, SIZE_PX)
    if not train_split or not val_split:
        raise UserError(f"--data {args.data} needs a training and a validation split")
    training = CocoDataset(train_split, train_transform(size, "flip"))
    validation = CocoDataset(val_split, eval_transform(size))
    about = {"command": f"python -m studies.torchvision_fcos --data {args.data}", "steps": args.steps}
    about |= environment(torch.device("cpu"))
    rows: dict[str, list[dict]] = {labels: [] for labels in PER_Q}
    for seed in args.seeds:
        for labels, seeds in rows.items():
            per_q = PER_Q[labels]
            model = torchvision_detector("OTAFCOS" if per_q else "FCOS", len(training.class_names), seed, SIZE_PX)
            model.config = per_q and OTAConfig(per_q=per_q)
            train(model, training, args.steps, BATCH_SIZE, seed)
            seeds.append(metrics_of(model, validation) | {"seed": seed})
            print(f"{labels}, seed {seed}: AP {seeds[-1]['AP']:.3f}  AP50 {seeds[-1]['AP50']:.3f}", flush=True)
            write_report(args.out, about | {"rows": rows})
    print(seeds_table(rows, APS | SIZES))


if __name__ == "__main__":
    run_script(main)
