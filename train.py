"""Train the detector with optimal transport assignment. One file, top to bottom.

    python train.py                                        generated shapes, minutes on a CPU
    torchrun --nproc_per_node 8 train.py --data coco       the COCO recipe of the paper
    python train.py --data DIR --epochs 25 ...             a data set of your own in COCO layout

Writes ota.safetensors, log.jsonl, args.json, metrics.json, curves.png and samples.png into --out, and checkpoints:
the same command with the same --out continues a run that was ended, exactly.
"""

import argparse
import dataclasses
import hashlib
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
from torch.utils.data import DataLoader
from tqdm import tqdm

from benchmarks import environment
from data import CocoDataset, DatasetError, collate, find_splits, train_transform
from data.draw import draw_curves, draw_detections, save_contact_sheet
from data.order import SeededDataset, batches_from, seed_of
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
from model import (
    BackboneError,
    CheckpointError,
    Detector,
    DetectorConfig,
    previous_checkpoint,
    save_checkpoint,
    save_weights,
    write_file,
    writing,
)

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
# What may change when a run is continued. The data set's path may, too: its annotation file is compared instead.
FREE_FLAGS = {"data", "workers", "out", "resume", "save_every", "eval_every", "log_every", "device"}


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
    group.add_argument("--save-every", type=positive, default=1000, metavar="STEPS", help="checkpoint this often")
    group.add_argument("--resume", choices=("auto", "never"), default="auto",
                       help="auto: continue the run in --out; never: refuse a folder that holds one")  # fmt: skip
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


def main() -> None:
    started = time.time()
    args = parse_args()
    device, rank, world = setup_distributed(args.device)
    is_main = rank == 0
    say = print if is_main else (lambda *_: None)
    torch.manual_seed(args.seed)
    if args.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise SettingsError("--max-restarts needs --out: ranks that start again find their checkpoint by it")

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
    epoch_steps = len(dataset) // args.batch_size
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

    # the run's folder, where only the main rank reads and writes
    out = args.out or Path("runs") / f"{Path(args.data).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = {
        "command": " ".join(sys.argv),
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        **environment(device),
    }
    checkpoint, finished = None, False
    if is_main:
        with open(train_split.annotations, "rb") as file:
            identity = {"annotation file (SHA-256)": hashlib.file_digest(file, "sha256").hexdigest()[:16]}
        identity |= {"images": len(dataset)}
        identity |= {f"--{k.replace('_', '-')}": v for k, v in vars(args).items() if k not in FREE_FLAGS}
        checkpoint = previous_checkpoint(out, identity, args.resume)
        finished = checkpoint is not None and checkpoint["step"] == steps and (out / "metrics.json").exists()
    if world > 1:
        received = [checkpoint, finished]
        dist.broadcast_object_list(received)
        checkpoint, finished = received
    if finished:
        say(f"the run in {out} is complete, all {steps} steps of it; name another folder with --out for a new one")
        return
    start, log, window_losses, continued = 0, [], [], checkpoint is not None
    if continued:
        start = checkpoint["step"]
        window_losses = [{name: v.to(device) for name, v in terms.items()} for terms in checkpoint["window_losses"]]
        log = [json.loads(line) for line in checkpoint["log"].splitlines()]
        settings = json.loads(checkpoint["settings"])
        settings.setdefault("continued", []).append({"step": start, "ranks": world, **environment(device)})
        detector.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        say(f"continuing the run in {out} after step {start} of {steps}")
    del checkpoint

    def log_text() -> str:
        return "".join(json.dumps(line) + "\n" for line in log)

    def write_log(line: dict) -> None:
        log.append(line)
        with writing(out), open(out / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def save(step: int, metrics: dict | None) -> None:
        metadata = {
            **classes,
            "data": args.data if args.data in RECIPES else str(Path(args.data).absolute()),
            "training": {"step": step, "steps": steps, "metrics": metrics, **settings},
        }
        with writing(out):
            save_weights(out / "ota.safetensors", detector, metadata)

    def save_progress(step: int) -> None:
        """Without random states: every step and every sample seeds its own. The learning rate follows the step."""
        spoilt = [name for name, p in detector.named_parameters() if not torch.isfinite(p).all()]
        if spoilt:
            raise FloatingPointError(
                f"step {step}: parameters that are not finite: {len(spoilt)}, {spoilt[0]} first; so no checkpoint is "
                f"written; the one before is in {out}. A lower --lr or a longer --warmup is the usual remedy."
            )
        state = {
            "step": step, "identity": json.dumps(identity), "settings": json.dumps(settings), "log": log_text(),
            "window_losses": window_losses, "model": detector.state_dict(), "optimizer": optimizer.state_dict(),
        }  # fmt: skip
        with writing(out):
            save_checkpoint(out, state)

    if is_main:
        with writing(out):
            write_file(out / "args.json", json.dumps(settings, indent=1).encode())
            if continued:  # lines that were written after the checkpoint will be written again
                write_file(out / "log.jsonl", log_text().encode())
        if not continued:
            save_progress(0)  # a run that ends before its first checkpoint can be told from another one

    # SIGTERM and SIGUSR1 (a scheduler wants the machine) end the run after the step, with a checkpoint and status 0;
    # Ctrl-C does, too, with the weights and status 130. In an evaluation, whose checkpoint is there already, at once.
    stop: list[int] = []
    evaluating = False

    def leave() -> None:
        say(f"stopped in the evaluation after step {step}; the same command continues the run")
        sys.exit(130 if signal.SIGINT in stop else 0)

    def request_stop(number: int, _) -> None:
        stop.append(number)
        if evaluating:
            leave()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            tqdm.write("stopping after this step; once more to quit at once")

    def agreed_stop() -> int:
        """The same answer on all ranks: one integer, on the CPU, which waits for the other ranks but for no GPU."""
        request = torch.tensor(max(stop, default=0))
        if world > 1:
            dist.all_reduce(request, dist.ReduceOp.MAX)
        return int(request)

    signal.signal(signal.SIGINT, request_stop if is_main else signal.SIG_IGN)
    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGUSR1, request_stop)

    loader = DataLoader(
        SeededDataset(dataset, args.seed), num_workers=workers, collate_fn=collate, pin_memory=device.type == "cuda",
        batch_sampler=batches_from(start, steps, len(dataset), args.batch_size, args.seed, rank, world),
        worker_init_fn=ignore_interrupts,
    )  # fmt: skip
    batches = iter(loader)
    bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=None if is_main else True)
    model.train()
    window_start, window_wait, window_steps = time.perf_counter(), 0.0, 0
    evaluation_steps = args.eval_every * epoch_steps
    for step in range(start, steps + 1):  # the last round only evaluates
        if step == steps or (step and step % evaluation_steps == 0):
            paused = time.perf_counter()
            evaluating = True
            if stop:
                leave()
            if is_main:
                save(step, None)  # an evaluation can take long
            if world > 1:  # DDP gives rank 0's batch norm statistics to the others at the start of a step only
                for buffer in detector.buffers():
                    dist.broadcast(buffer, 0)
            metrics, _ = evaluate(detector, val_dataset, device, workers=workers)
            evaluating = False
            if is_main:
                save(step, metrics)
                write_log({"step": step, "split": val_dataset.split.name, **metrics})
                scores = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("AP", "AP50"))
                tqdm.write(f"step {step}: {scores} ({val_dataset.split.name})")
            window_start += time.perf_counter() - paused
        if step == steps:
            break

        waited = time.perf_counter()
        images, targets = next(batches)
        window_wait += time.perf_counter() - waited
        lr = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_of(args.seed, "step", step, rank))

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
            window_steps += 1

        done = step + 1
        if is_main and (done % args.log_every == 0 or done == steps):
            seconds = time.perf_counter() - window_start
            means = {name: torch.stack([w[name] for w in window_losses]).mean().item() for name in losses}
            boxes = sum(len(t["labels"]) for t in targets)
            line = {
                "step": done, "epoch": round(done / epoch_steps, 3), "lr": lr, "loss": sum(means.values()), **means,
                "positives_per_gt": (detector.last_assignment.gt_index >= 0).sum().item() / max(1, boxes),
                "images_per_s": window_steps * args.batch_size / seconds, "data_wait": window_wait / seconds,
            }  # fmt: skip
            write_log(line)
            eta_s = (steps - done) * seconds / window_steps
            text = (
                f"loss {line['loss']:.3f} (cls {line['cls']:.3f} box {line['box']:.3f} iou {line['iou']:.3f})  "
                f"pos/gt {line['positives_per_gt']:.1f}  {line['images_per_s']:.1f} img/s  "
                f"wait {line['data_wait']:.0%}"
            )
            bar.set_postfix_str(text)
            if bar.disable:  # no terminal: a line a log step
                print(f"step {done}/{steps}  {text}  eta {int(eta_s) // 60}:{int(eta_s) % 60:02d}", flush=True)
            window_start, window_wait, window_steps = time.perf_counter(), 0.0, 0
            window_losses = []

        stopped_by = agreed_stop()
        if is_main and (stopped_by or done == steps or done % args.save_every == 0 or done % evaluation_steps == 0):
            save_progress(done)
        if stopped_by:
            bar.close()
            if stopped_by == signal.SIGINT and is_main:
                save(done, None)
                print(f"interrupted after step {done}; weights are in {out / 'ota.safetensors'}")
            say(f"stopped by {signal.Signals(stopped_by).name} after step {done}; the same command continues the run")
            sys.exit(130 if stopped_by == signal.SIGINT else 0)
    bar.close()

    if is_main:
        print_table(metrics)
        record = {
            "data": str(val_dataset.split.annotations),
            "images": len(val_dataset),
            "total_s": round(time.time() - started),
        }
        with writing(out):
            draw_curves(log, out / "curves.png")
            draw_samples(detector.eval(), val_dataset, device, out / "samples.png")
            write_file(out / "metrics.json", json.dumps(record | metrics, indent=1).encode())  # last: complete now
        print(f"wrote {out}: ota.safetensors, log.jsonl, metrics.json, curves.png, samples.png")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (SettingsError, DatasetError, BackboneError, CheckpointError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
