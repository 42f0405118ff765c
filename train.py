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
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

from benchmarks import environment
from data import CocoDataset, DatasetError, collate, find_splits, train_transform
from data.draw import draw_curves, draw_detections, save_contact_sheet
from eval import (
    SettingsError,
    class_differences,
    describe,
    evaluate,
    evaluation_dataset,
    ignore_interrupts,
    not_negative,
    positive,
    print_table,
    setup_distributed,
)
from kernels import OTAConfig
from kernels.config import CENTER_PRIORS, CLS_COSTS, REG_COSTS
from model import BackboneError, Detector, DetectorConfig, save_weights

# Settings: the defaults of --data coco are the paper's recipe, a flag overrides a recipe's value

COCO = {
    "pretrained": True, "backbone": "resnet50", "channels": 256, "head_convs": 4, "image_size": [800],
    "steps": 90_000, "epochs": None, "batch_size": 16, "optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4,
    "schedule": "step", "warmup": 1000, "eval_every": 3,
}  # fmt: skip
OWN = COCO | {
    "image_size": [480], "steps": None, "epochs": 36, "batch_size": 8, "optimizer": "adamw", "lr": 4e-4,
    "weight_decay": 0.05, "schedule": "cosine", "warmup": 200,
}  # fmt: skip
SHAPES = OWN | {
    "pretrained": False, "backbone": "test_resnet", "channels": 64, "head_convs": 2, "image_size": [160],
    "epochs": 14, "batch_size": 8, "lr": 4e-3, "warmup": 100, "eval_every": 7, "radius": 3, "top_q": 10,
}  # fmt: skip
RECIPES = {"coco": COCO, "shapes": SHAPES}
LR_BATCH = 16  # --lr is for this many images a step


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_off = argparse.BooleanOptionalAction
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="shapes", help="coco, shapes or a folder in COCO layout")
    group.add_argument("--image-size", type=int, nargs="+", metavar="PX", help="shorter side [longest side]")
    group.add_argument("--workers", type=not_negative, help="loader processes per rank")
    group.add_argument("--ignore-crowd", action=on_off, default=True, help="iscrowd regions are no negatives")
    group.add_argument("--bad-images", choices=("stop", "skip"), default="stop", help="skip: up to 1 %% or 10 of them")
    group = parser.add_argument_group("model")
    group.add_argument("--backbone", help="any timm model with features at strides 8, 16 and 32")
    group.add_argument("--pretrained", action=on_off, help="timm's weights for the backbone")
    group.add_argument("--channels", type=positive, help="width of neck and head")
    group.add_argument("--head-convs", type=not_negative, help="convolutions per head tower")
    group = parser.add_argument_group("optimisation")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive)
    length.add_argument("--steps", type=positive)
    group.add_argument("--batch-size", type=positive, help="images a step, over all ranks")
    group.add_argument("--lr", type=float, help=f"peak learning rate for {LR_BATCH} images a step; scaled linearly")
    group.add_argument("--optimizer", choices=("sgd", "adamw"))
    group.add_argument("--weight-decay", type=float)
    group.add_argument("--schedule", choices=("step", "cosine"), help="step: / 10 after 2/3 and 8/9 of the steps")
    group.add_argument("--warmup", type=not_negative, help="steps of linear warm-up")
    group.add_argument("--seed", type=int, default=0)
    group = parser.add_argument_group("assignment (defaults: the paper's; small images want --radius 3 --top-q 10)")
    group.add_argument("--center-prior", choices=CENTER_PRIORS)
    group.add_argument("--radius", type=float, help="closest: radius^2 points a level; radius: in strides")
    group.add_argument("--top-q", type=positive, help="best IoUs that a dynamic k sums up")
    group.add_argument("--fixed-k", type=positive, help="the same supply for every object instead of a dynamic k")
    group.add_argument("--cls-cost", choices=CLS_COSTS)
    group.add_argument("--reg-cost", choices=REG_COSTS)
    group.add_argument("--alpha", type=float, help="weight of the regression cost")
    group.add_argument("--eps", type=float, help="entropic regularisation")
    group.add_argument("--iterations", type=positive, help="of Sinkhorn-Knopp")
    group.add_argument("--rescale", action=on_off, help="divide plan rows by their maximum before decoding")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="folder of the run; default runs/<data>-<time>")
    group.add_argument(
        "--eval-every", type=positive, metavar="EPOCHS", help="evaluate (and save) this often; always last"
    )
    group.add_argument("--log-every", type=positive, default=50, metavar="STEPS")
    group.add_argument("--device", help="cuda, cpu or mps; default: cuda where there is one")
    args = parser.parse_args()

    recipe = RECIPES.get(args.data, OWN).copy()
    if args.epochs or args.steps:
        recipe["epochs"] = recipe["steps"] = None
    if args.center_prior not in (None, "closest"):
        recipe.pop("radius", None)  # the recipes' radius belongs to "closest"
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if len(args.image_size) == 1:
        args.image_size.append(round(args.image_size[0] * 1333 / 800))
    if len(args.image_size) != 2 or not 0 < args.image_size[0] <= args.image_size[1]:
        parser.error(f"--image-size takes the shorter and the longest side in px, not {args.image_size}")
    if args.lr <= 0 or args.weight_decay < 0:
        parser.error(f"--lr must be positive and --weight-decay not negative: {args.lr}, {args.weight_decay}")
    return args


def detector_config(args: argparse.Namespace, num_classes: int) -> DetectorConfig:
    assigner = {field.name: getattr(args, field.name) for field in dataclasses.fields(OTAConfig)}
    try:
        return DetectorConfig(
            num_classes=num_classes,
            backbone=args.backbone,
            image_size=tuple(args.image_size),
            channels=args.channels,
            head_convs=args.head_convs,
            frozen_norm=args.pretrained,
            assigner=OTAConfig(**{name: value for name, value in assigner.items() if value is not None}),
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error


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
    """SGD's small weight decay goes to every parameter, AdamW's, far stronger, to kernels only."""
    if args.optimizer == "sgd":
        return torch.optim.SGD(detector.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay)
    kernels = [p for p in detector.parameters() if p.ndim > 1]
    others = [p for p in detector.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": kernels}, {"params": others, "weight_decay": 0.0}],
                             lr=args.lr, weight_decay=args.weight_decay)  # fmt: skip


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
    started = time.time()
    args = parse_args()
    device, rank, world = setup_distributed(args.device)
    is_main = rank == 0
    say = print if is_main else (lambda *_: None)
    torch.manual_seed(args.seed + rank)  # ranks flip differently; weights start from rank 0's

    # data
    if args.data == "shapes" and world > 1:  # the main rank writes a generated set, the others wait
        if is_main:
            find_splits(args.data)
        dist.barrier()
    train_split, _ = find_splits(args.data)
    if train_split is None:
        raise DatasetError(f"--data {args.data} has a validation part, but no training part")
    dataset = CocoDataset(train_split, train_transform(args.image_size), args.ignore_crowd, args.bad_images)
    say(f"training on {train_split.annotations}: {describe(dataset)}")
    if not dataset.num_boxes:
        raise DatasetError(f"{train_split.annotations} has no boxes to learn from: {describe(dataset)}")
    val_dataset = evaluation_dataset(args.data, args.image_size)
    classes = {"class_names": dataset.class_names, "category_ids": dataset.category_ids}
    differences = class_differences(classes | {"source": train_split.annotations}, val_dataset)
    if differences:
        raise DatasetError(f"the two parts of {args.data} differ in their categories: {differences}")
    config = detector_config(args, len(dataset.class_names))
    if args.batch_size % world or args.batch_size > len(dataset):
        raise SettingsError(
            f"--batch-size {args.batch_size} must divide by the {world} ranks and not pass the {len(dataset)} images"
        )
    workers = args.workers if args.workers is not None else min(4, max(1, (os.cpu_count() or 1) // world))
    sampler = DistributedSampler(dataset, world, rank, seed=args.seed, drop_last=True)
    loader = DataLoader(
        dataset, args.batch_size // world, sampler=sampler, num_workers=workers, collate_fn=collate, drop_last=True,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0, worker_init_fn=ignore_interrupts,
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
        settings = {
            "command": " ".join(sys.argv),
            "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
            **environment(device),
        }
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
                **classes,
                "data": args.data if args.data in RECIPES else str(Path(args.data).absolute()),
                "training": {"step": step, "steps": steps, "metrics": metrics, **settings},
            },
        )

    # Ctrl-C ends the run after the step, with the weights saved; torchrun then ends the other ranks.
    stop = []

    def request_stop(*_) -> None:
        stop.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step; once more to quit at once")

    signal.signal(signal.SIGINT, request_stop if is_main else signal.SIG_IGN)

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
        if is_main:
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
            paused = time.perf_counter()
            if is_main:
                save(done, None)  # an evaluation can take long
            if world > 1:  # DDP gives rank 0's batch norm statistics to the others at the start of a step only
                for buffer in detector.buffers():
                    dist.broadcast(buffer, 0)
            metrics, _ = evaluate(detector, val_dataset, device, workers=workers)
            if is_main:
                write_log({"step": done, "split": val_dataset.split.name, **metrics})
                save(done, metrics)
                scores = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50"))
                tqdm.write(f"step {done}: {scores} ({val_dataset.split.name})")
            window_start += time.perf_counter() - paused
    bar.close()

    if is_main:
        print_table(metrics)
        record = {
            "data": str(val_dataset.split.annotations),
            "images": len(val_dataset),
            "total_s": round(time.time() - started),
        }
        (out / "metrics.json").write_text(json.dumps(record | metrics, indent=1))
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
