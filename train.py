"""Train the detector with optimal transport assignment. One file, top to bottom; flags: training/settings.py.

    python train.py                                        generated shapes, minutes on a CPU
    torchrun --nproc_per_node 8 train.py --data coco       the COCO recipe of the paper
    torchrun --nproc_per_node 8 train.py --data crowdhuman people in crowds, as in the paper
    python train.py --data DIR --epochs 25 ...             a data set of your own: COCO layout, CrowdHuman's, Pascal VOC

Writes ota.safetensors, best.safetensors, log.jsonl, args.json, metrics.json, curves.png and samples.png into --out,
and checkpoints: the same command with the same --out continues a run that was ended, exactly.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import CocoDataset, DatasetError, collate, find_splits, train_transform
from data.draw import draw_detections, save_contact_sheet
from data.order import SeededDataset, batches_from, seed_of
from errors import UserError
from eval import class_differences, describe, evaluate, evaluation_dataset, faster_coco_eval, print_table
from model import (
    Detector,
    init_weights,
    write_file,
)
from model.batch import Batch, pack, padded_side
from model.losses import mean_positives
from training.checkpoint import previous_checkpoint, writing
from training.environment import environment
from training.folder import RunFolder
from training.memory import available_bytes, step_bytes
from training.process import StopRequest, ignore_interrupts, setup_distributed, wait_for_main
from training.settings import FREE_FLAGS, LR_BATCH, RECIPES, SettingsError, detector_config, parse_args
from training.trace import WARMUP_STEPS, StepTrace

SMALL_PX, SMALL_SHARE = 2, 0.05  # a warning where so many boxes are so small after resizing


def static_sides(shortest: int, longest: int) -> tuple[int, ...]:
    """Sides that images are padded to for torch.compile, px: from the shortest to the longest, a third of it apart."""
    intervals = max(1, round(3 * (longest - shortest) / shortest))
    return tuple(sorted({padded_side(shortest + (longest - shortest) * i // intervals) for i in range(intervals + 1)}))


def pack_passes(samples: list, passes: int, sides: tuple[int, ...]) -> tuple[list[Batch], list[int]]:
    """A rank's share of a step as one batch for each pass of gradient accumulation, and its image ids."""
    images, targets = collate(samples)
    size = len(images) // passes
    parts = [slice(i, i + size) for i in range(0, len(images), size)]
    return [pack(images[part], targets[part], sides) for part in parts], [t["image_id"] for t in targets]


@contextlib.contextmanager
def eagerly(compiled: bool):
    """Without compiling anything, or searching algorithms, for images whose sizes are seen once."""
    if not compiled:
        yield
        return
    torch.backends.cudnn.benchmark = False
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.backends.cudnn.benchmark = True


def create_optimizer(detector: Detector, args: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD's small weight decay goes to every parameter, AdamW's, far stronger, to kernels only."""
    fused = next(detector.parameters()).device.type == "cuda"  # one launch
    if args.optimizer == "sgd":
        return torch.optim.SGD(
            detector.parameters(), lr=args.lr, momentum=0.9, weight_decay=args.weight_decay, fused=fused
        )
    kernels = [p for p in detector.parameters() if p.ndim > 1]
    others = [p for p in detector.parameters() if p.ndim <= 1]
    return torch.optim.AdamW([{"params": kernels}, {"params": others, "weight_decay": 0.0}],
                             lr=args.lr, weight_decay=args.weight_decay, fused=fused)  # fmt: skip


def learning_rate(step: int, steps: int, args: argparse.Namespace) -> float:
    """Linear scaling with the batch, linear warm-up, then steps (/ 10 at 2/3 and 8/9) or half a cosine."""
    peak = args.lr * args.batch_size / LR_BATCH
    warmup = min(1.0, (step + 1) / max(1, min(args.warmup, steps // 2)))
    if args.schedule == "step":
        return peak * warmup * 0.1 ** ((3 * step >= 2 * steps) + (9 * step >= 8 * steps))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def backward(
    model: nn.Module, detector: Detector, batches: list[Batch], bf16: bool, measure: bool = False
) -> dict[str, Tensor]:
    """Gradients of a step, in as many passes as there are batches; returns the loss terms on the device, and, with
    `measure`, the statistics of the last pass's assignment.

    A loss is a sum over the positives of its batch. With several passes the sums' gradients are added up and divided
    by the positives of all, so that they are those of one pass over all images, but for batch norm.
    """
    device_type, total, terms = detector.mean.device.type, 0.0, {}
    for i, batch in enumerate(batches):
        last = i == len(batches) - 1
        with contextlib.nullcontext() if last or model is detector else model.no_sync():
            with torch.autocast(device_type, torch.bfloat16, enabled=bf16):
                losses, assignment, predictions = model(batch)
            statistics = detector.statistics(predictions, batch) if measure and last else {}
            if len(batches) == 1:
                sum(losses.values()).backward()
                return {name: value.detach() for name, value in losses.items()} | statistics
            positives = mean_positives(assignment)
            sums = {name: value * positives.clamp(min=1) for name, value in losses.items()}
            sum(sums.values()).backward()
        total = total + positives
        terms = {name: value.detach() + terms.get(name, 0.0) for name, value in sums.items()}
    total = total.clamp(min=1)
    torch._foreach_div_([p.grad for p in detector.parameters() if p.grad is not None], total)
    return {name: value / total for name, value in terms.items()} | statistics


def warn_of_memory(detector: Detector, dataset: CocoDataset, args: argparse.Namespace, world: int) -> None:
    """Before the system ends the process without a word: an estimate of a step's memory, where there is less."""
    sizes = dataset.resized_sizes((max(args.multi_scale or args.image_size[:1]), args.image_size[1]))
    images = args.batch_size // (world * args.accumulate)
    needed = step_bytes(detector, images * int(sizes.prod(1).max()), args.optimizer, args.bf16)
    available = available_bytes(detector.mean.device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if needed > available:
        height, width = sizes[sizes.prod(1).argmax()]
        print(
            f"warning: a step of {images} images of up to {height} x {width} px needs some {needed / 2**30:.0f} GiB of "
            f"memory, more than the {available / 2**30:.0f} there are; a smaller --image-size or --batch-size, or "
            "--accumulate, needs less",
            flush=True,
        )


class StepRecord(NamedTuple):
    """A step that the device may still be busy with; its numbers are read when the next one is under way."""

    step: int
    image_ids: list[int]
    names: list[str]
    values: Tensor  # on the host, valid once `copied` has happened
    copied: torch.cuda.Event | None
    line: dict | None  # for the log, without the values

    @classmethod
    def of(cls, step: int, image_ids: list[int], values: dict[str, Tensor], line: dict | None) -> "StepRecord":
        stacked, copied = torch.stack([value.detach() for value in values.values()]), None
        if stacked.is_cuda:
            host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
            stacked, copied = host.copy_(stacked, non_blocking=True), torch.cuda.Event()
            copied.record()
        return cls(step, image_ids, list(values), stacked, copied, line)

    def read(self) -> dict[str, float]:
        if self.copied:
            self.copied.synchronize()
        return dict(zip(self.names, self.values.tolist(), strict=True))


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


def main() -> None:
    started = time.time()
    args = parse_args(__doc__)
    device, rank, world = setup_distributed(args.device)
    is_main = rank == 0
    say = print if is_main else (lambda *_: None)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    if args.bf16 is None:
        args.bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        raise SettingsError("--max-restarts needs --out: ranks that start again find their checkpoint by it")
    if args.fast_eval:
        faster_coco_eval()  # missing: say so before the training

    # data
    if args.data == "shapes" and world > 1:  # the main rank writes a generated set, the others wait
        if is_main:
            find_splits(args.data)
        wait_for_main()
    train_split, _ = find_splits(args.data, args.box or "fbox", args.follow_links)
    if train_split is None:
        raise DatasetError(f"--data {args.data} has a validation part, but no training part")
    transform = train_transform(args.image_size, 0.0 if args.overfit else 0.5, args.multi_scale)
    dataset = CocoDataset(train_split, transform, args.ignore_crowd, args.bad_images, args.overfit)
    say(f"training on {train_split.annotations}: {describe(dataset)}")
    if not dataset.num_boxes:
        raise DatasetError(f"{train_split.annotations} has no boxes to learn from: {describe(dataset)}")
    if args.overfit and args.batch_size > len(dataset):
        say(f"--overfit: a batch is all {len(dataset)} images, not {args.batch_size}")
        args.batch_size = len(dataset)
    small = dataset.share_under(SMALL_PX, args.image_size)
    if small > SMALL_SHARE:
        say(
            f"warning: {small:.0%} of the boxes are under {SMALL_PX} px wide or high at --image-size "
            f"{' '.join(map(str, args.image_size))}, too small to be learned; are they in px, and is the size right?"
        )
    val_dataset = evaluation_dataset(
        args.data, args.image_size, args.overfit, args.box, args.follow_links, dataset.category_ids
    )
    classes = {"class_names": dataset.class_names, "category_ids": dataset.category_ids}
    differences = class_differences(classes | {"source": train_split.annotations}, val_dataset)
    if differences:
        raise DatasetError(f"the two parts of {args.data} differ in their categories: {differences}")
    config = detector_config(args, len(dataset.class_names))
    if args.batch_size % (world * args.accumulate) or args.batch_size > len(dataset):
        raise SettingsError(
            f"--batch-size {args.batch_size} must divide by {world} ranks x {args.accumulate} passes (--accumulate) "
            f"and not pass the {len(dataset)} images"
        )
    workers = args.workers if args.workers is not None else min(4, max(1, (os.cpu_count() or 1) // world))
    epoch_steps = len(dataset) // args.batch_size
    steps = args.steps or args.epochs * epoch_steps

    # model
    detector = Detector(config, args.pretrained and not args.init).to(device)
    if args.init:
        say(init_weights(detector, args.init, dataset.class_names))
    detector.use_memory_format(torch.channels_last if args.channels_last else torch.contiguous_format)
    if is_main:
        warn_of_memory(detector, dataset, args, world)
    ema = ModelEmaV3(detector, args.ema, use_warmup=True) if args.ema else None
    evaluated = ema.module if ema else detector
    model, sides = detector, ()
    if args.compile:
        sides = static_sides(min(args.multi_scale or args.image_size), args.image_size[1])
        torch._dynamo.config.recompile_limit = max(8, len(sides) ** 2)
        torch.backends.cudnn.benchmark = True
        parts = detector.compile_training(args.compile)
        say(f"torch.compile takes {parts}, anew for each padded image size; sides are {', '.join(map(str, sides))} px")
    if world > 1:
        model = DistributedDataParallel(detector, device_ids=[device.index] if device.type == "cuda" else None)
    optimizer = create_optimizer(detector, args)
    start_from = f"from {args.init}" if args.init else "pretrained" if args.pretrained else "from scratch"
    say(
        f"{args.backbone} ({start_from}), {sum(p.numel() for p in detector.parameters()) / 1e6:.1f} M parameters; "
        f"{steps} steps of {args.batch_size} images on {world} x {device.type} in "
        f"{'bfloat16' if args.bf16 else 'float32'}; learning rate {args.lr * args.batch_size / LR_BATCH:g} = "
        f"{args.lr:g} x {args.batch_size} / {LR_BATCH}"
    )

    # the run's folder, where only the main rank reads and writes
    out = args.out or Path("runs") / f"{Path(args.data).resolve().name}-{time.strftime('%Y%m%d-%H%M%S')}"
    settings = {
        "command": " ".join(sys.argv),
        "args": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        **environment(device),
    }
    checkpoint, finished, identity = None, False, {}
    if is_main:
        digest = hashlib.sha256()
        for path in train_split.files():
            with open(path, "rb") as file:
                hashlib.file_digest(file, lambda: digest)  # goes on where the file before ended
        identity = {"annotation file (SHA-256)": digest.hexdigest()[:16], "images": len(dataset)}
        identity |= {f"--{k.replace('_', '-')}": v for k, v in settings["args"].items() if k not in FREE_FLAGS}
        checkpoint = previous_checkpoint(out, identity, args.resume)
        finished = checkpoint is not None and checkpoint["step"] == steps and (out / "metrics.json").exists()
    if world > 1:
        received = [checkpoint, finished]
        dist.broadcast_object_list(received)
        checkpoint, finished = received
    if finished:
        say(f"the run in {out} is complete, all {steps} steps of it; name another folder with --out for a new one")
        return
    start, log, window, continued = 0, [], [], checkpoint is not None
    if continued:
        start, window = checkpoint["step"], checkpoint["window"]
        log = [json.loads(line) for line in checkpoint["log"].splitlines()]
        settings = json.loads(checkpoint["settings"])
        settings.setdefault("continued", []).append({"step": start, "ranks": world, **environment(device)})
        detector.load_state_dict(checkpoint["model"])
        for group, own in zip(checkpoint["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
            group["fused"] = own["fused"]  # the device's, which may be another now
        optimizer.load_state_dict(checkpoint["optimizer"])
        if ema:  # its counter is the step
            ema.module.load_state_dict(checkpoint["ema"])
        say(f"continuing the run in {out} after step {start} of {steps}")
    if args.profile and steps - start < args.profile + WARMUP_STEPS:
        raise SettingsError(
            f"--profile {args.profile} takes {args.profile + WARMUP_STEPS} steps, {WARMUP_STEPS} of them to warm up; "
            f"the run has {steps - start}"
        )
    del checkpoint
    folder = None
    if is_main:
        data = args.data if args.data in RECIPES else str(Path(args.data).absolute())
        folder = RunFolder(out, settings, identity, classes | {"data": data, "box": args.box}, steps, start, log)

    def save_progress(step: int) -> None:
        state = {"window": window, "optimizer": optimizer.state_dict()}
        folder.save_checkpoint(step, state | ({"ema": ema.module.state_dict()} if ema else {}), detector)

    if is_main and not continued:
        save_progress(0)  # a run that ends before its first checkpoint can be told from another one
    stop = StopRequest(is_main)

    loader = DataLoader(
        SeededDataset(dataset, args.seed), num_workers=workers, pin_memory=device.type == "cuda",
        batch_sampler=batches_from(start, steps, len(dataset), args.batch_size, args.seed, rank, world,
                                   dataset.tall if args.group_aspect else None),
        collate_fn=partial(pack_passes, passes=args.accumulate, sides=sides), worker_init_fn=ignore_interrupts,
    )  # fmt: skip
    batches = iter(loader)
    bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True, disable=None if is_main else True)
    trace = StepTrace(args.profile, out / "trace.json" if is_main else None, device) if args.profile else None
    pending, compiled_sizes = None, set()

    def account_for(record: StepRecord | None) -> None:
        """Stop at a loss that is not finite; write the log line of a logging step."""
        if record is None:
            return
        values = record.read()
        terms = {name: values[name] for name in ("cls", "box", "iou")}
        if not all(map(math.isfinite, values.values())):
            text = ", ".join(f"{name} {value:g}" for name, value in values.items())
            what = "gradient" if all(map(math.isfinite, terms.values())) else "loss"
            raise FloatingPointError(
                f"step {record.step + 1}: the {what} is not finite ({text}); image ids "
                f"{', '.join(map(str, record.image_ids))} of {train_split.annotations}. "
                "A lower --lr or a longer --warmup is the usual remedy."
            )
        if not is_main:
            return
        window.append(terms)
        if record.line is None:
            return
        means = {name: sum(w[name] for w in window) / len(window) for name in terms}
        window.clear()
        line = record.line | {"loss": sum(means.values())} | values | means
        folder.write_line(line)
        text = (
            f"loss {line['loss']:.3f} (cls {line['cls']:.3f} box {line['box']:.3f} iou {line['iou']:.3f})  "
            f"pos/gt {line['positives_per_gt']:.1f}  {line['images_per_s']:.1f} img/s  wait {line['data_wait']:.0%}"
        )
        bar.set_postfix_str(text)
        if bar.disable:  # no terminal: a line a log step
            eta_s = int((steps - line["step"]) * args.batch_size / line["images_per_s"])
            print(f"step {line['step']}/{steps}  {text}  eta {eta_s // 60}:{eta_s % 60:02d}", flush=True)

    model.train()
    window_start, window_wait, window_steps = time.perf_counter(), 0.0, 0
    evaluation_steps = args.eval_every * epoch_steps
    for step in range(start, steps + 1):  # the last round only evaluates
        if trace and trace.done():
            return
        if not trace and (step == steps or (step and step % evaluation_steps == 0)):
            paused = time.perf_counter()
            stop.set_at_once(True)
            if is_main:
                folder.save_weights(evaluated, step, None)  # an evaluation can take long
            if world > 1:  # DDP gives rank 0's batch norm statistics to the others at the start of a step only
                for buffer in evaluated.buffers():
                    dist.broadcast(buffer, 0)
            with eagerly(args.compile):
                metrics, _ = evaluate(evaluated, val_dataset, device, workers=workers, fast=args.fast_eval)
            stop.set_at_once(False)
            if is_main:
                folder.write_evaluation(evaluated, step, metrics, val_dataset.split.name)
            window_start += time.perf_counter() - paused
        if step == steps:
            break

        waited = time.perf_counter()
        passes, image_ids = next(batches)
        window_wait += time.perf_counter() - waited
        if new := {tuple(b.images.shape) for b in passes} - compiled_sizes if args.compile else ():
            compiled_sizes |= new
            for _, _, height, width in new:
                tqdm.write(f"step {step}: compiling for images of {height} x {width} px") if is_main else None
        lr = learning_rate(step, steps, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        torch.manual_seed(seed_of(args.seed, "step", step, rank))
        done = step + 1
        logging = done % args.log_every == 0 or done == steps
        passes = [batch.to(device) for batch in passes]
        if args.compile:
            for batch in passes:
                batch.mark_ragged()
        values = backward(model, detector, passes, args.bf16, measure=logging and is_main)
        if args.clip_norm:
            values["grad_norm"] = nn.utils.clip_grad_norm_(detector.parameters(), args.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema:
            ema.update(detector, done)
        bar.update()

        window_steps += 1
        line = None
        if logging and is_main:
            seconds = time.perf_counter() - window_start
            line = {
                "step": done, "epoch": round(done / epoch_steps, 3), "lr": lr,
                "images_per_s": window_steps * args.batch_size / seconds, "data_wait": window_wait / seconds,
            }  # fmt: skip
            window_start, window_wait, window_steps = time.perf_counter(), 0.0, 0
        account_for(pending)
        pending = StepRecord.of(step, image_ids, values, line)

        stopped_by = stop.agreed()
        if stopped_by or done == steps or done % args.save_every == 0 or done % evaluation_steps == 0:
            account_for(pending)
            pending = None
            if is_main:
                save_progress(done)
        if stopped_by:
            bar.close()
            if stopped_by == signal.SIGINT and is_main:
                folder.save_weights(evaluated, done, None)
                print(f"interrupted after step {done}; weights are in {out / 'ota.safetensors'}")
            stop.leave(f"by {stopped_by.name} after step {done}", stopped_by)
    bar.close()

    if is_main:
        record = {
            "data": str(val_dataset.split.annotations),
            "images": len(val_dataset),
            "total_s": round(time.time() - started),
        }
        with writing(out), eagerly(args.compile):
            write_file(out / "metrics.json", json.dumps(record | metrics, indent=1).encode())  # complete now
            draw_samples(evaluated.eval(), val_dataset, device, out / "samples.png")
        folder.draw()
        folder.close()
        print_table(metrics)
        print(f"wrote {out}: ota.safetensors, best.safetensors, log.jsonl, metrics.json, curves.png, samples.png")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (UserError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
