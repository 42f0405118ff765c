"""Recipes and flags of train.py. A flag that is given overrides the value of its recipe."""

import argparse
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from data import is_crowdhuman
from data.crowdhuman import BOXES
from errors import UserError
from kernels import OTAConfig
from kernels.config import CENTER_PRIORS, CLS_COSTS, REG_COSTS
from kernels.grid import MAX_SIDE_PX
from model import DetectorConfig
from model.assigners import STRATEGIES
from model.assigners.hungarian import NO_SCIPY

COCO = {  # the paper's (section 4.1)
    "pretrained": True, "backbone": "resnet50", "channels": 256, "head_convs": 4, "image_size": [800],
    "steps": 90_000, "epochs": None, "batch_size": 16, "optimizer": "sgd", "lr": 0.01, "weight_decay": 1e-4,
    "schedule": "step", "warmup": 1000, "eval_every": 3, "max_detections": 100,
}  # fmt: skip
CROWDHUMAN = COCO | {  # the paper's, too; an image has up to 400 people
    "image_size": [800, 1400], "steps": 30_000, "eval_every": 5, "max_detections": 500, "box": "fbox",
}  # fmt: skip
OWN = COCO | {
    "image_size": [480], "steps": None, "epochs": 36, "batch_size": 8, "optimizer": "adamw", "lr": 4e-4,
    "weight_decay": 0.05, "schedule": "cosine", "warmup": 200,
    "per_q": 3,  # docs/assignment.md, "What the supply should follow"
}  # fmt: skip
SHAPES = OWN | {
    "pretrained": False, "backbone": "test_resnet", "channels": 64, "head_convs": 2, "image_size": [160],
    "epochs": 14, "batch_size": 8, "lr": 4e-3, "warmup": 100, "eval_every": 7, "radius": 3, "top_q": 10,
    "per_q": 1,
}  # fmt: skip
RECIPES = {"coco": COCO, "crowdhuman": CROWDHUMAN, "shapes": SHAPES}
LR_BATCH = 16  # --lr is for this many images a step
OVERFIT = {"epochs": None, "steps": 500, "eval_every": 10**9}  # evaluated at the end only
# What may change when a run is continued. The data set's path may, too: its annotation file is compared instead.
FREE_FLAGS = {
    "data", "workers", "out", "resume", "save_every", "eval_every", "log_every", "device", "fast_eval", "profile",
    "follow_links",
}  # fmt: skip


class SettingsError(UserError):
    """Flags that do not fit each other, the data or the machine; the message names them."""


def whole(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    """The type of a flag that takes integers from `least` to `most`."""

    def number(text: str) -> int:
        if not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return int(text)

    return number


positive, not_negative, side_px, seed = whole(1), whole(0), whole(1, MAX_SIDE_PX), whole(-(2**63), 2**63 - 1)


def finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return float(text)


def parse_args(description: str = "") -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_off = argparse.BooleanOptionalAction
    group = parser.add_argument_group("data")
    group.add_argument("--data", default="shapes", help="coco, crowdhuman, shapes or a folder of any of README's forms")
    group.add_argument("--follow-links", action="store_true", help="read images that are links to other folders")
    group.add_argument("--box", choices=BOXES, help="CrowdHuman's full, visible or head boxes; default: fbox")
    group.add_argument("--image-size", type=side_px, nargs="+", metavar="PX", help="shorter side [longest side]")
    group.add_argument("--multi-scale", type=side_px, nargs="+", metavar="PX",
                       help="train every image at one of these shorter sides, drawn at random")  # fmt: skip
    group.add_argument("--group-aspect", action=on_off, default=True, help="batches of tall or of wide images only")
    group.add_argument("--workers", type=not_negative, help="loader processes per rank")
    group.add_argument("--ignore-crowd", action=on_off, default=True, help="iscrowd regions are no negatives")
    group.add_argument("--bad-images", choices=("stop", "skip"), default="stop", help="skip: up to 1 %% or 10 of them")
    group.add_argument("--overfit", type=positive, metavar="K",
                       help="learn the first K images by heart, in 500 steps and without augmentation")  # fmt: skip
    group = parser.add_argument_group("model")
    group.add_argument("--backbone", help="any timm model with features at strides 8, 16 and 32")
    group.add_argument("--pretrained", action=on_off, help="timm's weights for the backbone")
    group.add_argument("--frozen-norm", action=on_off, help="the backbone's batch norms are constants; as --pretrained")
    group.add_argument("--init", type=Path, metavar="WEIGHTS", help="start from a file that train.py wrote")
    group.add_argument("--channels", type=positive, help="width of neck and head")
    group.add_argument("--head-convs", type=not_negative, help="convolutions per head tower")
    group.add_argument("--max-detections", type=positive, help="that an image has at most, the best ones")
    group = parser.add_argument_group("optimisation")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=positive)
    length.add_argument("--steps", type=positive)
    group.add_argument("--batch-size", type=positive, help="images a step, over all ranks")
    group.add_argument("--accumulate", type=positive, default=1, metavar="N",
                       help="take a step's images in N passes, for less memory; same gradient")  # fmt: skip
    group.add_argument("--lr", type=finite, help=f"peak learning rate for {LR_BATCH} images a step; scaled linearly")
    group.add_argument("--optimizer", choices=("sgd", "adamw"))
    group.add_argument("--weight-decay", type=finite)
    group.add_argument("--schedule", choices=("step", "cosine"), help="step: / 10 after 2/3 and 8/9 of the steps")
    group.add_argument("--warmup", type=not_negative, help="steps of linear warm-up")
    group.add_argument("--clip-norm", type=finite, metavar="NORM", help="scale the gradient down to this norm at most")
    group.add_argument("--ema", type=finite, metavar="DECAY",
                       help="evaluate and save a moving average of the weights; 0.9998, say")  # fmt: skip
    group.add_argument("--seed", type=seed, default=0)
    group = parser.add_argument_group("assignment (defaults: the paper's, and --per-q 3 for data of your own)")
    group.add_argument("--assigner", choices=STRATEGIES, default="ota", help="strategy; the flags below are for ota")
    group.add_argument("--center-prior", choices=CENTER_PRIORS)
    group.add_argument("--radius", type=finite, help="closest: radius^2 points a level; radius: in strides")
    group.add_argument("--top-q", type=positive, help="best IoUs that a dynamic k sums up")
    group.add_argument("--per-q", type=positive, help="and of at most one in PER_Q of the object's candidates")
    group.add_argument("--fixed-k", type=positive, help="the same supply for every object instead of a dynamic k")
    group.add_argument("--cls-cost", choices=CLS_COSTS)
    group.add_argument("--reg-cost", choices=REG_COSTS)
    group.add_argument("--alpha", type=finite, help="weight of the regression cost")
    group.add_argument("--eps", type=finite, help="entropic regularisation")
    group.add_argument("--iterations", type=positive, help="of Sinkhorn-Knopp")
    group.add_argument("--rescale", action=on_off, help="divide plan rows by their maximum before decoding")
    group = parser.add_argument_group("speed")
    group.add_argument("--bf16", action=on_off, help="bfloat16 network, float32 assignment and losses; on GPUs with it")
    group.add_argument("--channels-last", action=on_off, default=True, help="memory layout of images and weights")
    group.add_argument("--compile", nargs="?", const="default", choices=("default", "reduce-overhead"),
                       help="torch.compile, in this mode; images are padded to few sizes")  # fmt: skip
    group.add_argument("--device", help="cuda, cpu or mps; default: cuda where there is one")
    group = parser.add_argument_group("run")
    group.add_argument("--out", type=Path, help="folder of the run; default runs/<data>-<time>")
    group.add_argument(
        "--eval-every", type=positive, metavar="EPOCHS", help="evaluate (and save) this often; always last"
    )
    group.add_argument("--fast-eval", action="store_true", help="with the package faster-coco-eval, not pycocotools")
    group.add_argument("--save-every", type=positive, default=1000, metavar="STEPS", help="checkpoint this often")
    group.add_argument("--resume", choices=("auto", "never"), default="auto",
                       help="auto: continue the run in --out; never: refuse a folder that holds one")  # fmt: skip
    group.add_argument("--log-every", type=positive, default=50, metavar="STEPS")
    group.add_argument("--profile", type=positive, metavar="N", help="trace N steps after some to warm up, then exit")
    args = parser.parse_args()

    if args.assigner == "hungarian" and importlib.util.find_spec("scipy") is None:
        parser.error(NO_SCIPY)
    if args.assigner != "ota":
        given = [field.name for field in dataclasses.fields(OTAConfig) if getattr(args, field.name) is not None]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} is a setting of --assigner ota, not of {args.assigner}")
    known = "crowdhuman" if is_crowdhuman(args.data) else args.data
    if args.box and known != "crowdhuman":
        parser.error(f"--box {args.box} is for CrowdHuman; --data {args.data} has one kind of boxes")
    recipe = RECIPES.get(known, OWN) | (OVERFIT if args.overfit else {})
    recipe["frozen_norm"] = recipe["pretrained"] if args.pretrained is None else args.pretrained
    if args.epochs or args.steps:
        recipe["epochs"] = recipe["steps"] = None
    if args.center_prior not in (None, "closest"):
        recipe.pop("radius", None)  # the recipes' radius belongs to "closest"
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if len(args.image_size) == 1:
        args.image_size.append(round(args.image_size[0] * 1333 / 800))
    if len(args.image_size) != 2 or not args.image_size[0] <= args.image_size[1] <= MAX_SIDE_PX:
        parser.error(
            f"--image-size takes the shorter and the longest side, up to {MAX_SIDE_PX} px, not {args.image_size}"
        )
    if args.multi_scale and max(args.multi_scale) > args.image_size[1]:
        parser.error(f"--multi-scale {max(args.multi_scale)} is over the longest side, --image-size {args.image_size}")
    if args.multi_scale and args.overfit:
        parser.error("--overfit trains without augmentation, so not with --multi-scale")
    if args.compile == "reduce-overhead" and args.accumulate > 1:
        parser.error("--compile reduce-overhead overwrites the gradients that --accumulate adds up; take --compile")
    if args.lr <= 0 or args.weight_decay < 0:
        parser.error(f"--lr must be positive and --weight-decay not negative: {args.lr}, {args.weight_decay}")
    if args.clip_norm is not None and args.clip_norm <= 0:
        parser.error(f"--clip-norm must be positive, not {args.clip_norm}")
    if args.ema is not None and not 0 < args.ema < 1:
        parser.error(f"--ema is a decay between 0 and 1, such as 0.9998, not {args.ema}")
    return args


def detector_config(args: argparse.Namespace, num_classes: int) -> DetectorConfig:
    """Raises SettingsError."""
    ota = {field.name: getattr(args, field.name) for field in dataclasses.fields(OTAConfig)}
    try:
        return DetectorConfig(
            num_classes=num_classes,
            backbone=args.backbone,
            image_size=tuple(args.image_size),
            channels=args.channels,
            head_convs=args.head_convs,
            max_detections=args.max_detections,
            frozen_norm=args.frozen_norm,
            assigner=args.assigner,
            ota=OTAConfig(**{name: value for name, value in ota.items() if value is not None}),
        )
    except ValueError as error:
        raise SettingsError(str(error)) from error
