"""Train the detector with optimal transport assignment. One file, top to bottom.

    python train.py                                        generated shapes, minutes on a CPU
    torchrun --nproc_per_node 8 train.py --data coco       the COCO recipe of the paper
    python train.py --data DIR --epochs 25 ...             a data set of your own in COCO layout

Writes ota.safetensors, log.jsonl, args.json, metrics.json, curves.png and samples.png into --out.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from data import CocoDataset, DatasetError, collate, eval_transform, find_splits, train_transform
from data.draw import draw_curves, draw_detections, save_contact_sheet
from eval import evaluate, evaluation_split, print_table, setup_distributed
from kernels import OTAConfig
from kernels.config import CENTER_PRIORS, CLS_COSTS, REG_COSTS
from model import BackboneError, Detector, DetectorConfig, save_weights

# Settings: the defaults of --data coco are the paper's recipe, a flag overrides a recipe's value

COCO = {
    "pretrained": True, "backbone": "resnet50", "channels": 256, "head_convs": 4, "image_size": [800],
    "steps": 90_000, "epochs": None, "batch_size": 16, "optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4,
    "schedule": "step", "warmup": 1000, "eval_every": 3,
}  # fmt: skip
OWN = COCO | {"steps": None, "epochs": 36, "optimizer": "adamw", "lr": 4e-4, "weight_decay": 0.05, "schedule": "cosine",
              "warmup": 200}  # fmt: skip
SHAPES = OWN | {
    "pretrained": False, "backbone": "test_resnet", "channels": 64, "head_convs": 2, "image_size": [160],
    "epochs": 14, "batch_size": 8, "lr": 4e-3, "warmup": 100, "eval_every": 7, "radius": 3, "top_q": 10,
}  # fmt: skip
RECIPES = {"coco": COCO, "shapes": SHAPES}
LR_BATCH = 16  # --lr is for this many images a step


class SettingsError(ValueError):
    """Flags that do not fit each other, the data or the machine; the message names them."""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_off = argparse.BooleanOptionalAction
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="shapes", help="coco, shapes or a folder in COCO layout")
    group.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="shorter side [longest side]")
    group.add_argument("--workers", type=int, help="loader processes per rank")
    group = parser.add_argument_group("model")
    group.add_argument("--backbone", help="any timm model with features at strides 8, 16 and 32")
    group.add_argument("--pretrained", action=on_off, help="timm's weights for the backbone")
    group.add_argument("--channels", type=int, help="width of neck and head")
    group.add_argument("--head-convs", type=int, help="convolutions per head tower")
    group = parser.add_argument_group("optimisation")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int)
    length.add_argument("--steps", type=int)
    group.add_argument("--batch-size", type=int, help="images a step, over all ranks")
    group.add_argument("--lr", type=float, help=f"peak learning rate for {LR_BATCH} images a step; scaled linearly")
    group.add_argument("--optimizer", choices=("sgd", "adamw"))
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--schedule", choices=("step", "cosine"), help="step: / 10 after 2/3 and 8/9 of the steps")
    group.add_argument("--warmup", type=int, help="steps of linear warm-up")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("assignment (defaults: the paper's; small images want --radius 3 --top-q 10)")
    group.add_argument("--center-prior", choices=CENTER_PRIORS)
    group.add_argument("--radius", type=float, help="closest: radius^2 points a level; radius: in strides")
    group.add_argument("--top-q", type=int, help="best IoUs that a dynamic k sums up")
    group.add_argument("--fixed-k", type=int, help="the same supply for every object instead of a dynamic k")
    group.add_argument("--cls-cost", choices=CLS_COSTS)
    group.add_argument("--reg-cost", choices=REG_COSTS)
    group.add_argument("--alpha", type=float, help="weight of the regression cost")
    group.add_argument("--eps", type=float, help="entropic regularisation")
    group.add_argument("--iterations", type=int, help="of Sinkhorn-Knopp")
    group.add_argument("--rescale", action=on_off, help="divide plan rows by their maximum before decoding")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="folder of the run; default runs/<data>-<time>")
    group.add_argument("--eval-every", type=int, metavar="EPOCHS", help="evaluate (and save) this often; always last")
    group.add_argument("--log-every", type=int, default=50, metavar="STEPS")
    group.add_argument("--device", help="cuda, cpu or mps; default: cuda where there is one")
    args = parser.parse_args()

    recipe = RECIPES.get(args.data, OWN).copy()
    if args.epochs or args.steps:
        recipe["epochs"] = recipe["steps"] = None
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if len(args.image_size) == 1:
        args.image_size.append(round(args.image_size[0] * 1333 / 800))
    if len(args.image_size) != 2 or not 0 < args.image_size[0] <= args.image_size[1]:
        parser.error(f"--image-size takes the shorter and the longest side in px, not {args.image_size}")
    for name in ("epochs", "steps", "batch_size", "lr", "eval_every", "log_every"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    return args


def detector_config(args: argparse.Namespace, num_classes: int) -> DetectorConfig:
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(OTAConfig)}
    try:
        return DetectorConfig(
            num_classes=num_classes, backbone=args.backbone, image_size=tuple(args.image_size), channels=args.channels,
            head_convs=args.head_convs, assigner=OTAConfig(**{k: v for k, v in given.items() if v is not None}),
        )  # fmt: skip
    except ValueError as error:
        raise SettingsError(str(error)) from error


def environment() -> dict:
    packages = ("torch", "torchvision", "timm", "pycocotools", "numpy", "pillow")
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        commit = None  # not a git checkout
    return {
        "commit": commit,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "command": " ".join(sys.argv),
    }


@torch.no_grad()
def draw_samples(detector: Detector, dataset: CocoDataset, device: torch.device, path: Path, count: int = 8) -> None:
    """Images spread over the data set with their true boxes, and detections of at least 0.5."""
    pictures = []
    for i in range(0, len(dataset), -(-len(dataset) // count)):
        image, target = dataset[i]
        found = detector([image.to(device)])[0]
        kept = found["scores"] >= 0.5
        found = {name: value[kept] for name, value in found.items()}
        pictures.append(draw_detections(image, target["boxes"], found, dataset.class_names))
    save_contact_sheet(pictures, path)


def create_optimizer(detector: Detector, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only. Group learning rates are set every step."""
    weights = [p for p in detector.parameters() if p.ndim > 1]
    others = [p for p in detector.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=args.lr)


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Linear scaling with the batch, linear warm-up, then steps (/ 10 at 2/3 and 8/9) or half a cosine."""
    peak = args.lr * args.batch_size / LR_BATCH
    warmup = min(1.0, (step + 1) / max(1, min(args.warmup, steps // 2)))
    if args.schedule == "step":
        return peak * warmup * 0.1 ** ((3 * step >= 2 * steps) + (9 * step >= 8 * steps))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def endless(loader: DataLoader, sampler: DistributedSampler):
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def main() -> None:
    args = parse_args()
    device, rank, world = setup_distributed(args.device)
    is_main = rank == 0
    say = print if is_main else (lambda *_: None)
    torch.manual_seed(args.seed + rank)  # ranks flip differently; weights start from rank 0's

    # data
    if args.data == "shapes":
        say("shapes: generated on first use, which takes some seconds")
    if not is_main:
        dist.barrier()  # the main rank writes a generated set first
    train_split = find_splits(args.data)[0]
    if is_main and world > 1:
        dist.barrier()
    dataset = CocoDataset(train_split, train_transform(args.image_size))
    val_dataset = CocoDataset(evaluation_split(args.data), eval_transform(args.image_size))
    if val_dataset.category_ids != dataset.category_ids or val_dataset.class_names != dataset.class_names:
        raise DatasetError(f"{val_dataset.split.annotations} and {train_split.annotations} differ in their categories")
    say(
        f"{args.data}: {len(dataset)} training images, {len(val_dataset)} for evaluation ({val_dataset.split.name}), "
        f"{len(dataset.class_names)} classes; left out: {dataset.dropped_boxes} degenerate boxes, "
        f"{dataset.crowd_boxes} crowd regions"
    )
    config = detector_config(args, len(dataset.class_names))
    if args.batch_size % world or args.batch_size > len(dataset):
        raise SettingsError(
            f"--batch-size {args.batch_size} must divide by the {world} ranks and not pass the {len(dataset)} images"
        )
    workers = args.workers if args.workers is not None else min(4, max(1, (os.cpu_count() or 1) // world))
    sampler = DistributedSampler(dataset, world, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(
        dataset, args.batch_size // world, sampler=sampler, num_workers=workers, collate_fn=collate, drop_last=True,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0,
    )  # fmt: skip
    epoch_steps = len(loader)
    steps = args.steps or args.epochs * epoch_steps

    # model
    detector = Detector(config, args.pretrained).to(device)
    model = detector
    if world > 1:
        model = DistributedDataParallel(detector, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = create_optimizer(detector, args)
    say(
        f"{args.backbone} ({'pretrained' if args.pretrained else 'from scratch'}), "
        f"{sum(p.numel() for p in detector.parameters()) / 1e6:.1f} M parameters; {steps} steps of {args.batch_size} "
        f"images on {world} x {device.type}; learning rate {args.lr * args.batch_size / LR_BATCH:g} = "
        f"{args.lr:g} x {args.batch_size} / {LR_BATCH}"
    )

    # the run's folder
    out = args.out or Path("runs") / f"{Path(args.data).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    log: list[dict] = []
    if is_main:
        if (out / "log.jsonl").exists():
            raise SettingsError(f"{out} holds a run already; name another folder with --out")
        out.mkdir(parents=True, exist_ok=True)
        settings = {"args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}, **environment()}
        (out / "args.json").write_text(json.dumps(settings, indent=1))

    def write_log(line: dict) -> None:
        log.append(line)
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def save(step: int, metrics: dict | None) -> None:
        save_weights(
            out / "ota.safetensors",
            detector,
            {
                "class_names": dataset.class_names,
                "category_ids": dataset.category_ids,
                "data": args.data if args.data in RECIPES else str(Path(args.data).absolute()),
                "training": {"step": step, "steps": steps, "metrics": metrics, **settings},
            },
        )

    # Ctrl-C ends the run after the step, with the weights saved; torchrun then ends the other ranks.
    stop = []
    signal.signal(signal.SIGINT, (lambda *_: stop.append(True)) if is_main else signal.SIG_IGN)

    batches = endless(loader, sampler)
    bar = tqdm(total=steps, unit="step", dynamic_ncols=True, disable=None if is_main else True)
    model.train()
    window_start, window_wait, window_losses = time.perf_counter(), 0.0, []
    for step in range(steps):
        waited = time.perf_counter()
        images, targets = next(batches)
        window_wait += time.perf_counter() - waited
        lr = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr

        losses = model([image.to(device, non_blocking=True) for image in images], targets)
        loss = sum(losses.values())
        if not torch.isfinite(loss):  # waits for the device
            terms = ", ".join(f"{name} {value.item():g}" for name, value in losses.items())
            ids = ", ".join(str(t["image_id"]) for t in targets)
            raise FloatingPointError(
                f"step {step}: the loss is not finite ({terms}); image ids {ids} of {train_split.annotations}. "
                "A lower --lr or a longer --warmup is the usual remedy."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        bar.update()
        window_losses.append({name: value.detach() for name, value in losses.items()})

        done = step + 1
        if is_main and (done % args.log_every == 0 or done == steps):
            seconds = time.perf_counter() - window_start
            means = {name: torch.stack([w[name] for w in window_losses]).mean().item() for name in losses}
            boxes = sum(len(t["labels"]) for t in targets)
            line = {
                "step": done, "epoch": round(done / epoch_steps, 3), "lr": lr, "loss": sum(means.values()), **means,
                "positives_per_gt": (detector.last_assignment.gt_index >= 0).sum().item() / max(1, boxes),
                "images_per_s": len(window_losses) * args.batch_size / seconds, "data_wait": window_wait / seconds,
            }  # fmt: skip
            write_log(line)
            eta_s = (steps - done) * seconds / len(window_losses)
            text = (
                f"loss {line['loss']:.3f} (cls {line['cls']:.3f} box {line['box']:.3f} iou {line['iou']:.3f})  "
                f"pos/gt {line['positives_per_gt']:.1f}  {line['images_per_s']:.1f} img/s  "
                f"wait {line['data_wait']:.0%}"
            )
            bar.set_postfix_str(text)
            if bar.disable:  # no terminal: a line a log step
                print(f"step {done}/{steps}  {text}  eta {int(eta_s) // 60}:{int(eta_s) % 60:02d}", flush=True)
            window_start, window_wait, window_losses = time.perf_counter(), 0.0, []

        if stop:
            bar.close()
            save(done, None)
            print(f"interrupted after step {done}; weights are in {out / 'ota.safetensors'}")
            sys.exit(130)
        if done == steps or done % (args.eval_every * epoch_steps) == 0:
            metrics, _ = evaluate(detector, val_dataset, device, workers=workers)
            if is_main:
                write_log({"step": done, "split": val_dataset.split.name, **metrics})
                save(done, metrics)
                tqdm.write(
                    f"step {done}: AP {metrics['AP']:.4f}  AP50 {metrics['AP50']:.4f} ({val_dataset.split.name})"
                )
            window_start, window_wait, window_losses = time.perf_counter(), 0.0, []
    bar.close()

    if is_main:
        print_table(metrics)
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
        draw_curves(log, out / "curves.png")
        draw_samples(detector.eval(), val_dataset, device, out / "samples.png")
        print(f"wrote {out}: ota.safetensors, log.jsonl, metrics.json, curves.png, samples.png")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, DatasetError, BackboneError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
