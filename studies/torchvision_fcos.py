"""torchvision's FCOS with its own labels and with OTA's, as in docs/embedding.md, on one data set.

    python -m studies.torchvision_fcos --data crowds --out runs/torchvision.json

Both have this repository's backbone, the same initial weights, images in the same order and the same schedule. Labels
differ, and with them the target of the third branch: centerness, or the IoU. Writes COCO's AP of every seed.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import FCOS

from benchmarks.measure import write_report
from benchmarks.tables import APS, SIZES, seeds_table
from data import CocoDataset, eval_transform, find_splits, train_transform
from data.dataset import SeededDataset, batches_from
from eval import coco_metrics, coco_results
from model import Detections
from model.backbone import Backbone
from tests.support.embedding import names_of
from training.environment import environment

SIZE_PX, CHANNELS, BATCH_SIZE, LEARNING_RATE, SCORE = 128, 64, 8, 3e-3, 0.05


class Levels(nn.Module):
    """The backbone as torchvision takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.out_channels = Backbone("test_resnet", CHANNELS, pretrained=False), CHANNELS

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        return {str(level): features for level, features in enumerate(self.backbone(images))}


def create(labels: str, num_classes: int, seed: int) -> FCOS:
    names, settings = names_of("torchvision"), {"min_size": SIZE_PX, "max_size": SIZE_PX, "score_thresh": SCORE}
    torch.manual_seed(seed)
    if labels == "FCOS's own":
        return FCOS(Levels(), num_classes, **settings)
    return names["OTAFCOS"](Levels(), num_classes, anchor_generator=names["CenteredAnchors"](1), **settings)


def train(model: FCOS, dataset: CocoDataset, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    samples = SeededDataset(dataset, seed)
    for keys in batches_from(0, steps, dataset.tall, BATCH_SIZE, seed):
        images, targets = zip(*(samples[key] for key in keys), strict=True)
        optimizer.zero_grad()
        sum(model([image / 255 for image in images], list(targets)).values()).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def metrics_of(model: FCOS, dataset: CocoDataset) -> dict:
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
    (train_split, val_split), size = find_splits(args.data), (SIZE_PX, SIZE_PX)
    training = CocoDataset(train_split, train_transform(size, "flip"))
    validation = CocoDataset(val_split, eval_transform(size))
    about = {"command": f"python -m studies.torchvision_fcos --data {args.data}", "steps": args.steps}
    about |= environment(torch.device("cpu"))
    rows: dict[str, list[dict]] = {"FCOS's own": [], "OTA": []}
    for seed in args.seeds:
        for labels, seeds in rows.items():
            model = create(labels, len(training.class_names), seed)
            train(model, training, args.steps, seed)
            seeds.append(metrics_of(model, validation) | {"seed": seed})
            print(f"{labels}, seed {seed}: AP {seeds[-1]['AP']:.3f}  AP50 {seeds[-1]['AP50']:.3f}", flush=True)
            write_report(args.out, about | {"rows": rows})
    print(seeds_table(rows, APS | SIZES))


if __name__ == "__main__":
    main()
