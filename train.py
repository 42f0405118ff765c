"""Train the detector with optimal transport assignment. One file, top to bottom; flags: training/settings.py.

    python train.py                                        generated shapes, minutes on a CPU
    torchrun --nproc_per_node 8 train.py --data coco       the COCO recipe of the paper
    torchrun --nproc_per_node 8 train.py --data crowdhuman people in crowds, as in the paper
    python train.py --data DIR --epochs 25 ...             a data set of your own: COCO layout, YOLO, Pascal VOC, ...

Writes ota.safetensors, best.safetensors, log.jsonl, args.json, metrics.json, curves.png and samples.png into --out,
and checkpoints: the same command with the same --out continues a run that was ended, exactly.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import CocoDataset, DatasetError, find_splits, read_split, train_transform
from data.dataset import SeededDataset, batches_from, seed_of, training_sides
from data.layouts import data_name
from errors import UserError, run_script
from eval import describe, evaluate, evaluation_dataset, print_table
from model import Detector, init_weights
from model.batch import Batch, pack, static_sides
from model.head import Predictions
from model.losses import mean_positives
from training.environment import environment, memory_warning
from training.folder import LOWER_LR, WARMUP_STEPS, RunFolder, resume, start_trace
from training.process import StopRequest, from_main, ignore_interrupts, setup_distributed
from training.settings import FREE_FLAGS, LR_BATCH, RECIPES, detector_config, explain, fit_to_machine, parse_args

SMALL_PX, SMALL_SHARE = 2, 0.05  # a warning where so many boxes are so small after resizing
TIMED_STEPS = 5  # from which the time of the others is estimated, after as many slow ones


def load_data(args: argparse.Namespace, say: Callable) -> tuple[CocoDataset, CocoDataset]:
    """Return the training and the evaluation data set, read by one rank of a machine. Raises DatasetError."""
    split, val_split, _ = from_main(lambda: find_splits(args.data, args.box, args.follow_links, args.strict))
    if split is None:
        raise DatasetError(f"--data {args.data} has no training split")
    transform = train_transform(args.image_size, args.augment, args.multi_scale)
    records = from_main(lambda: read_split(split, args.bad_images == "stop"))
    dataset = CocoDataset(split, transform, args.bad_images, args.overfit, records=records)
    say(f"training on {split.annotations}: {describe(dataset)}")
    if not dataset.num_boxes:
        raise DatasetError(f"{split.annotations} has no boxes to learn from: {describe(dataset)}")
    if (small := dataset.share_under(SMALL_PX, args.image_size)) > SMALL_SHARE:
        what = f"under {SMALL_PX} px wide or high at --image-size {' '.join(map(str, args.image_size))}"
        say(f"warning: {small:.0%} of the boxes are {what}, too small to learn; are they in px, and is the size right?")
    val_split = split if args.overfit or not val_split else val_split
    checked = records if val_split is split and args.bad_images == "stop" else None
    classes = dataset.classes | {"source": split.annotations}
    val_dataset = evaluation_dataset(val_split, args.image_size, classes, first=args.overfit, records=checked)
    return dataset, val_dataset


def pack_passes(samples: list, passes: int, sides: tuple[int, ...]) -> tuple[list[Batch], list[int]]:
    """Return a rank's share of a step as one batch for each pass of gradient accumulation, and its image ids."""
    images, targets = zip(*samples, strict=True)
    size = len(images) // passes
    parts = [slice(i, i + size) for i in range(0, len(images), size)]
    return [pack(images[part], targets[part], sides) for part in parts], [t["image_id"] for t in targets]


def create_detector(args: argparse.Namespace, dataset: CocoDataset, device: torch.device, say: Callable) -> Detector:
    detector = Detector(detector_config(args, len(dataset.class_names)), args.pretrained and not args.init).to(device)
    detector.class_names, detector.category_ids = dataset.class_names, dataset.category_ids
    if args.init:
        say(init_weights(detector, args.init, dataset.class_names))
    images = args.batch_size // (int(os.environ.get("WORLD_SIZE", 1)) * args.accumulate)
    longest = args.image_size[1]
    sizes = dataset.resized_sizes((max(training_sides(args.image_size, args.augment, args.multi_scale)), longest))
    if args.augment == "strong":  # crops are wide or tall, and a batch is padded for both
        sizes = np.array([[longest, longest]])
    if warning := memory_warning(detector, images, sizes, args.optimizer, args.bf16):
        say(warning, flush=True)
    origin = f"from {args.init}" if args.init else "pretrained" if args.pretrained else "from scratch"
    say(f"{args.backbone} ({origin}), {sum(p.numel() for p in detector.parameters()) / 1e6:.1f} M parameters")
    return detector


def compile_detector(detector: Detector, args: argparse.Namespace, say: Callable) -> tuple[int, ...]:
    """Compile the detector in place; return the few sides that images are padded to, px."""
    shortest = min(training_sides(args.image_size, args.augment, args.multi_scale))
    sides = static_sides(shortest, args.image_size[1])
    torch._dynamo.config.recompile_limit = max(8, len(sides) ** 2)
    torch.backends.cudnn.benchmark = True
    parts = detector.compile_training(args.compile)
    say(f"torch.compile takes {parts}, anew for each padded image size; sides are {', '.join(map(str, sides))} px")
    return sides


def create_optimizer(detector: Detector, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD decays every parameter, a little; AdamW decays kernels only, a lot."""
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "fused": detector.mean.is_cuda}  # fused: one launch
    if args.optimizer == "sgd":
        return torch.optim.SGD(detector.parameters(), momentum=0.9, **options)
    kernels, others = ([p for p in detector.parameters() if (p.ndim > 1) == wide] for wide in (True, False))
    return torch.optim.AdamW([{"params": kernels}, {"params": others, "weight_decay": 0.0}], **options)


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Linear scaling with the batch, linear warm-up, then steps (/ 10 at 2/3 and 8/9) or half a cosine."""
    peak = args.lr * args.batch_size / LR_BATCH
    warmup = min(1.0, (step + 1) / max(1, min(args.warmup, steps // 2)))
    if args.schedule == "step":
        return peak * warmup * 0.1 ** ((3 * step >= 2 * steps) + (9 * step >= 8 * steps))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def backward(model: nn.Module, detector: Detector, batches: list[Batch], bf16: bool) -> tuple[dict, Predictions]:
    """Compute a step's gradients, one pass a batch; return the loss terms and the predictions of the last pass.

    A loss is a sum over positives, divided by their number. Several passes add up the gradients of the sums, and divide
    by the positives of all: except for batch norm, these are the gradients of one pass over all images."""
    total, terms = 0.0, {}
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last or model is detector else model.no_sync():
            with torch.autocast(detector.mean.device.type, torch.bfloat16, enabled=bf16):
                losses, assignment, predictions = model(batch)
            if len(batches) == 1:
                sum(losses.values()).backward()
                return {name: value.detach() for name, value in losses.items()}, predictions
            positives = mean_positives(assignment)
            sums = {name: value * positives.clamp(min=1) for name, value in losses.items()}
            sum(sums.values()).backward()
        total = total + positives
        terms = {name: value.detach() + terms.get(name, 0.0) for name, value in sums.items()}
    total = total.clamp(min=1)
    torch._foreach_div_([p.grad for p in detector.parameters() if p.grad is not None], total)
    return {name: value / total for name, value in terms.items()}, predictions


def read_losses(pending: list[tuple[int, list[int], Tensor]], names: list[str], source: Path) -> list[dict[str, float]]:
    """Wait for the values of the `pending` steps (step, image ids, values). Raises UserError: one is not finite."""
    rows = torch.stack([values for *_, values in pending]).tolist()
    for (step, image_ids, _), row in zip(pending, rows, strict=True):
        if not all(map(math.isfinite, row)):
            text = ", ".join(f"{name} {value:g}" for name, value in zip(names, row, strict=True))
            what = f"the {'gradient' if all(map(math.isfinite, row[:3])) else 'loss'} is not finite ({text})"
            images = f"image ids {', '.join(map(str, image_ids))} of {source}"
            raise UserError(f"step {step + 1}: {what}; {images}. {LOWER_LR}")
    return [dict(zip(names, row, strict=True)) for row in rows]


def describe_run(args: argparse.Namespace, dataset: CocoDataset, device: torch.device) -> tuple[Path, dict, dict]:
    """Return the run's folder, its settings, and those of them that decide its result."""
    out = args.out or Path("runs") / f"{data_name(args.data)}-{time.strftime('%Y%m%d-%H%M%S')}"
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    identity = {"annotation file (SHA-256)": dataset.digest[:16], "images": len(dataset)}
    identity |= {f"--{name.replace('_', '-')}": value for name, value in flags.items() if name not in FREE_FLAGS}
    return out, {"command": " ".join(sys.argv), "args": flags, **environment(device)}, identity


@contextlib.contextmanager
def eagerly(compiled: bool):
    """Compile nothing and search no algorithms: evaluation images have sizes that are seen once."""
    stance = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    with stance, torch.backends.cudnn.flags(enabled=True, benchmark=False):
        yield


def evaluate_now(
    detector: Detector, dataset: CocoDataset, step: int, args: argparse.Namespace, folder: RunFolder | None
) -> dict:
    """Return metrics, on the main rank, which writes them and the weights."""
    if folder:
        folder.save_weights(detector, step, None)  # an evaluation can take long
    if dist.is_initialized():  # DDP gives rank 0's batch norm statistics to the others at the start of a step only
        for buffer in detector.buffers():
            dist.broadcast(buffer, 0)
    with eagerly(args.compile):
        metrics, _ = evaluate(detector, dataset, workers=args.workers)
    if folder:
        folder.write_evaluation(detector, step, metrics, dataset.split.name)
    return metrics


def log_values(window: list[dict[str, float]], statistics: dict[str, Tensor]) -> dict[str, float]:
    """Losses are means over the window, the other numbers are the latest step's."""
    means = {name: sum(row[name] for row in window) / len(window) for name in ("cls", "box", "iou")}
    latest = window[-1] | {name: value.item() for name, value in statistics.items()}
    return {"loss": sum(means.values())} | latest | means


def main() -> None:
    started, args = time.time(), parse_args(__doc__)
    device, rank, world = setup_distributed(args.device)
    is_main = rank == 0
    say = print if is_main else (lambda *_, **__: None)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    dataset, val_dataset = load_data(args, say)
    fit_to_machine(args, len(dataset), device, world)
    epoch_steps = len(dataset) // args.batch_size
    steps, evaluation_steps = args.steps or args.epochs * epoch_steps, args.eval_every * epoch_steps

    detector = create_detector(args, dataset, device, say)
    ema = ModelEmaV3(detector, args.ema, use_warmup=True) if args.ema else None
    evaluated = ema.module if ema else detector
    sides = compile_detector(detector, args, say) if args.compile else ()
    model = detector
    if world > 1:
        model = DistributedDataParallel(detector, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = create_optimizer(detector, args)

    out, settings, identity = describe_run(args, dataset, device)
    parts = {"model": detector, "optimizer": optimizer} | ({"ema": ema.module} if ema else {})  # its counter: step
    checkpoint, complete = resume(out, identity, parts)
    start, log, window = 0, [], []  # window: the losses since the last line of the log
    if checkpoint:
        start, window = checkpoint["step"], checkpoint["window"]
        if complete and start == steps:
            return say(f"the run in {out} is complete, all {steps} steps; name another folder with --out for a new one")
        log = [json.loads(line) for line in checkpoint["log"].splitlines()]
        settings = json.loads(checkpoint["settings"])
        settings.setdefault("continued", []).append({"step": start, "ranks": world, **environment(device)})
        say(f"continuing the run in {out} after step {start} of {steps}")
    end = start + WARMUP_STEPS + args.profile if args.profile else steps
    if end > steps:
        raise UserError(f"--profile {args.profile} takes {end - start} steps, the run has {steps - start}")
    rate = f"{args.lr * args.batch_size / LR_BATCH:g} = {args.lr:g} x {args.batch_size} / {LR_BATCH}"
    place = f"{world} x {device.type} in {'bfloat16' if args.bf16 else 'float32'}"
    say(explain(args, dataset, steps))
    say(f"{steps} steps of {args.batch_size} images on {place}; learning rate {rate}", flush=True)
    data = args.data if args.data in RECIPES else str(Path(args.data).expanduser().absolute())
    metadata = dataset.classes | {"data": data, "box": args.box}
    folder = RunFolder(out, settings, identity, metadata, steps, start, log) if is_main else None

    if is_main and not checkpoint:
        folder.save_checkpoint(0, window, parts)  # by which a run that ends before its next one is recognised
    del checkpoint
    keys = batches_from(start, steps, dataset.tall, args.batch_size, args.seed, rank, world)
    packer = partial(pack_passes, passes=args.accumulate, sides=sides)
    options = {"num_workers": args.workers, "pin_memory": device.type == "cuda", "worker_init_fn": ignore_interrupts}
    batches = iter(DataLoader(SeededDataset(dataset, args.seed), batch_sampler=keys, collate_fn=packer, **options))
    stop, pending, metrics = StopRequest(is_main), [], {}
    bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=None if is_main else True)
    trace = start_trace(args.profile, out / "trace.json", device) if args.profile and is_main else None
    logged, clock, waited = start, time.perf_counter(), 0.0

    model.train()
    for step in range(start, end + 1):  # the last round only evaluates
        if not args.profile and (step == steps or (step and step % evaluation_steps == 0)):
            paused = time.perf_counter()
            stop.set_at_once(True)
            metrics = evaluate_now(evaluated, val_dataset, step, args, folder)
            stop.set_at_once(False)
            clock += time.perf_counter() - paused
        if step == end:
            break
        asked = time.perf_counter()
        passes, image_ids = next(batches)
        waited += time.perf_counter() - asked

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args)
        torch.manual_seed(seed_of(args.seed, "step", step, rank))
        passes = [batch.to(device) for batch in passes]
        for batch in passes if args.compile else ():
            batch.mark_ragged()
        values, predictions = backward(model, detector, passes, args.bf16)
        if args.clip_norm:
            values["grad_norm"] = nn.utils.clip_grad_norm_(detector.parameters(), args.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if ema:
            ema.update(detector, done)
        pending.append((step, image_ids, torch.stack(list(values.values()))))
        bar.update()
        if trace:
            trace.step()

        stopped_by = stop.agreed()  # waits for the other ranks, not for a GPU
        logging = done % args.log_every == 0 or done == steps
        saving = stopped_by or done == steps or done % args.save_every == 0 or done % evaluation_steps == 0
        if done == start + TIMED_STEPS:
            timed = time.perf_counter()
        timing = done == start + 2 * TIMED_STEPS < steps
        if logging or saving or timing or device.type == "cpu":  # elsewhere reading waits for the device
            window += read_losses(pending, list(values), dataset.split.annotations)
            pending.clear()
        if timing and is_main:
            left = tqdm.format_interval((steps - done) * (time.perf_counter() - timed) / TIMED_STEPS)
            tqdm.write(f"some {left} for the other {steps - done} steps, without evaluations")
            sys.stdout.flush()
        if logging and is_main:
            seconds, lr = time.perf_counter() - clock, optimizer.param_groups[0]["lr"]
            line = {"step": done, "epoch": round(done / epoch_steps, 3), "lr": lr}
            line |= {"images_per_s": (done - logged) * args.batch_size / seconds, "data_wait": waited / seconds}
            line |= log_values(window, detector.statistics(predictions, passes[-1]))
            folder.write_step(line, bar, seconds_left=(steps - done) * seconds / (done - logged))
        if logging:
            window, logged, clock, waited = [], done, time.perf_counter(), 0.0
        if saving and is_main:
            folder.save_checkpoint(done, window, parts)
        if stopped_by:
            bar.close()
            if stopped_by == signal.SIGINT and is_main:
                folder.save_weights(evaluated, done, None)
                print(f"interrupted after step {done}; weights are in {out / 'ota.safetensors'}")
            stop.leave(f"by {stopped_by.name} after step {done}", stopped_by)
    bar.close()
    if is_main and not args.profile:
        with eagerly(args.compile):
            folder.finish(evaluated, val_dataset, metrics, time.time() - started)
        print_table(metrics)
        scripts = (("eval.py", ""), ("predict.py", " photo.jpg"), ("export.py", ""))
        print("next:", "; ".join(f"python {s} --weights {out / 'ota.safetensors'}{more}" for s, more in scripts))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    run_script(main)
