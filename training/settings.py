"""Recipes and flags of train.py. A flag that is given overrides the value of its recipe."""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from data import AUGMENTATIONS, BOXES, CocoDataset, find_form, printable
from errors import UserError
from kernels import OTAConfig
from kernels.grid import MAX_SIDE_PX
from model import DetectorConfig
from model.assigners import STRATEGIES
from model.assigners.hungarian import NO_SCIPY

COCO = dict(  # the paper's (section 4.1), and so are CROWDHUMAN's; an image there has up to 400 people
    pretrained=True, backbone="resnet50", channels=256, head_convs=4, image_size=[800], steps=90_000, epochs=None,
    batch_size=16, optimizer="sgd", lr=0.01, weight_decay=1e-4, schedule="step", warmup=1000, eval_every=3,
    max_detections=100, augment="flip", ota={},
)  # fmt: skip
CROWDHUMAN = COCO | dict(image_size=[800, 1400], steps=30_000, eval_every=5, max_detections=500, box="fbox")
OWN = COCO | dict(
    image_size=[480], steps=None, epochs=36, batch_size=8, optimizer="adamw", lr=4e-4, weight_decay=0.05,
    schedule="cosine", warmup=200, augment="light",  # docs/data.md, "Augmentation"
    ota={"per_q": 3},  # docs/assignment.md, "What the supply should follow"
)  # fmt: skip
SHAPES = OWN | dict(
    pretrained=False, backbone="test_resnet", channels=64, head_convs=2, image_size=[160], epochs=14, lr=4e-3,
    warmup=100, eval_every=7, augment="flip", ota={"radius": 3, "top_q": 10},
)  # fmt: skip
RECIPES = {"coco": COCO, "crowdhuman": CROWDHUMAN, "shapes": SHAPES}
CLASSES_SHOWN = 10
LR_BATCH = 16  # --lr is for this many images a step
OVERFIT = {"epochs": None, "steps": 500, "eval_every": 10**9, "augment": "none"}  # evaluated at the end only
# Settings that may change when a run is continued; for data the annotation file is compared.
FREE_FLAGS = (
    "data", "workers", "out", "save_every", "eval_every", "log_every", "device", "profile", "follow_links", "strict",
)  # fmt: skip

OTA_DEFAULTS = dataclasses.asdict(OTAConfig())


def number(kind: type, is_valid: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """Return the type of a flag that takes a finite number."""

    def parse(text: str) -> float:
        with suppress(ValueError, OverflowError):
            if math.isfinite(value := kind(text)) and is_valid(value):
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")

    return parse


positive = number(int, lambda n: 0 < n < 2**31, "an integer of at least 1")
not_negative = number(int, lambda n: 0 <= n < 2**31, "an integer of at least 0")
side_px = number(int, lambda n: 0 < n <= MAX_SIDE_PX, f"a side of 1 to {MAX_SIDE_PX} px")
seed = number(int, lambda n: -(2**63) <= n < 2**63, "an integer of 64 bits")
above_zero = number(float, lambda x: x > 0, "a finite number above 0")
at_least_zero = number(float, lambda x: x >= 0, "a finite number of at least 0")
decay = number(float, lambda x: 0 < x < 1, "a decay between 0 and 1, such as 0.9998")


def recipe_for(data: str) -> tuple[str, dict]:
    """Return the name, a column of docs/training.md, and the flags of the recipe for --data."""
    name = find_form(data).recipe or data
    return (name, RECIPES[name]) if name in RECIPES else ("other data", OWN)


def ota_setting(text: str) -> tuple[str, object]:
    """Parse key=value of --ota; a value is a number, true, false, null or a word."""
    name, equals, value = text.partition("=")
    if not equals or name not in OTA_DEFAULTS:
        raise argparse.ArgumentTypeError(f"{text!r} is no key=value with a key of {', '.join(OTA_DEFAULTS)}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def add_data_flags(add: Callable) -> None:
    """Add the flags for how a data set is read and how the training sees it."""
    add("--follow-links", action="store_true", help="read images that are links to other folders")
    add("--strict", action="store_true", help="stop for flaws that would be repaired, too")
    add("--box", choices=BOXES, help="CrowdHuman's full, visible or head boxes; default: fbox")
    add("--image-size", type=side_px, nargs="+", metavar="PX", help="shorter side [longest side]")
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in AUGMENTATIONS.items())
    add("--augment", choices=AUGMENTATIONS, help=meanings)
    add("--multi-scale", type=side_px, nargs="+", metavar="PX", help="draw each image's shorter side from these")


def add_ota_flag(add: Callable) -> None:
    defaults = " ".join(f"{name}={json.dumps(value)}" for name, value in OTA_DEFAULTS.items()).replace('"', "")
    help_ota = f"settings of --assigner ota, as in kernels/config.py; the paper's: {defaults}"
    add("--ota", type=ota_setting, nargs="+", metavar="KEY=VALUE", help=help_ota)


def create_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_off = argparse.BooleanOptionalAction
    add = parser.add_argument_group("data").add_argument
    add("--data", default="shapes", help="coco, crowdhuman, shapes or a folder in a layout of docs/data.md")
    add_data_flags(add)
    add("--workers", type=not_negative, help="loader processes per rank")
    add("--bad-images", choices=("stop", "skip"), default="stop", help="skip: up to 1 %% or 10 of them")
    add("--overfit", type=positive, metavar="K", help="learn the first K images by heart: 500 steps, no augmentation")
    add = parser.add_argument_group("model").add_argument
    add("--backbone", help="any timm model with features at strides 8, 16 and 32")
    add("--pretrained", action=on_off, help="timm's weights for the backbone, with its batch norms frozen")
    add("--init", type=Path, metavar="WEIGHTS", help="start from a file that train.py wrote")
    add("--channels", type=positive, help="width of neck and head")
    add("--head-convs", type=not_negative, help="convolutions per head tower")
    group = parser.add_argument_group("optimisation")
    add = group.add_mutually_exclusive_group().add_argument
    add("--epochs", type=positive)
    add("--steps", type=positive)
    add = group.add_argument
    add("--batch-size", type=positive, help="images a step, over all ranks")
    add("--accumulate", type=positive, default=1, metavar="N", help="passes per step: less memory, same gradient")
    add("--lr", type=above_zero, help=f"peak learning rate for {LR_BATCH} images a step; scaled linearly")
    add("--optimizer", choices=("sgd", "adamw"))
    add("--weight-decay", type=at_least_zero)
    add("--schedule", choices=("step", "cosine"), help="step: / 10 after 2/3 and 8/9 of the steps")
    add("--warmup", type=not_negative, help="steps of linear warm-up")
    add("--clip-norm", type=above_zero, metavar="NORM", help="scale the gradient down to this norm at most")
    add("--ema", type=decay, metavar="DECAY", help="evaluate and save a moving average of the weights; e.g. 0.9998")
    add("--seed", type=seed, default=0)
    add = parser.add_argument_group("assignment").add_argument
    add("--assigner", choices=STRATEGIES, default="ota", help="strategy of label assignment")
    add_ota_flag(add)
    add = parser.add_argument_group("speed").add_argument
    add("--bf16", action=on_off, help="bfloat16 network, float32 assignment and losses; default: on GPUs that have it")
    add("--compile", nargs="?", const="default", choices=("default", "reduce-overhead"), help="mode of torch.compile")
    add("--device", help="cuda, cpu or mps; default: cuda if there is one")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="folder of the run, continued if it holds this run; default runs/<data>-<time>")
    add("--eval-every", type=positive, metavar="EPOCHS", help="evaluate (and save) this often; always last")
    add("--save-every", type=positive, default=1000, metavar="STEPS", help="checkpoint this often")
    add("--log-every", type=positive, default=50, metavar="STEPS")
    add("--profile", type=positive, metavar="N", help="trace N steps after some to warm up, then exit")
    return parser


def parse_args(description: str = "") -> argparse.Namespace:
    """Return the flags with the values of their recipe filled in; `ota` has all settings of OTAConfig."""
    parser = create_parser(description)
    args = parser.parse_args()
    if args.assigner == "hungarian" and importlib.util.find_spec("scipy") is None:
        parser.error(NO_SCIPY)
    if args.assigner != "ota" and args.ota:
        parser.error(f"--ota is for --assigner ota, not for {args.assigner}")
    if args.overfit and (args.multi_scale or args.augment not in (None, "none")):
        flag = "--multi-scale" if args.multi_scale else f"--augment {args.augment}"
        parser.error(f"--overfit trains without augmentation, so not with {flag}")
    changes = OVERFIT if args.overfit else {}
    fill_in(args, parser, changes | ({"epochs": None, "steps": None} if args.epochs or args.steps else {}))
    if args.out is None and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        parser.error("--max-restarts needs --out: ranks that start again find their checkpoint by it")
    if args.compile == "reduce-overhead" and args.accumulate > 1:
        parser.error("--compile reduce-overhead overwrites the gradients that --accumulate adds up; take --compile")
    return args


def fill_in(args: argparse.Namespace, parser: argparse.ArgumentParser, changes: dict) -> None:
    """Fill in what no flag gives, from the data set's recipe with `changes`; `ota` becomes OTAConfig's settings."""
    if args.box and not find_form(args.data).boxes:
        parser.error(f"--box {args.box} is for CrowdHuman; --data {args.data} has one kind of boxes")
    recipe = recipe_for(args.data)[1] | changes
    given, ota = dict(args.ota or ()), dict(recipe["ota"])
    if given.get("center_prior", "closest") != "closest":
        ota.pop("radius", None)  # the recipes' radius belongs to "closest"
    try:
        args.ota = dataclasses.asdict(OTAConfig(**ota | given))
    except (TypeError, ValueError) as error:
        parser.error(f"--ota: {error}")
    vars(args).update((name, value) for name, value in recipe.items() if getattr(args, name, None) is None)
    if len(size := args.image_size) == 1:
        size = args.image_size = [*size, round(size[0] * 1333 / 800)]
    if len(size) != 2 or not size[0] <= size[1] <= MAX_SIDE_PX:
        parser.error(f"--image-size takes the shorter and the longest side, up to {MAX_SIDE_PX} px, not {size}")
    if args.multi_scale and max(args.multi_scale) > size[1]:
        parser.error(f"--multi-scale {max(args.multi_scale)} is over the longest side, --image-size {size}")


def fit_to_machine(args: argparse.Namespace, images: int, device: torch.device, world: int) -> None:
    """Fill in --bf16 and --workers, and reduce the batch of --overfit. Raises UserError."""
    if args.bf16 is None:
        args.bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.workers is None:
        args.workers = min(4, max(1, (os.cpu_count() or 1) // world))
    if args.overfit:
        args.batch_size = min(args.batch_size, images)
    if args.batch_size % (world * args.accumulate) or args.batch_size > images:
        rule = f"divide by {world} ranks x {args.accumulate} passes (--accumulate) and not pass the {images} images"
        raise UserError(f"--batch-size {args.batch_size} must {rule}")


def explain(args: argparse.Namespace, dataset: CocoDataset, steps: int) -> str:
    """Return the lines that say what a run learns, for how long and in which sizes, and what decides that."""
    ranked = sorted(zip(dataset.class_counts, dataset.class_names, strict=True), key=lambda row: -row[0])
    boxes = [f"{printable(name)} {count}" for count, name in ranked]
    if len(boxes) > CLASSES_SHOWN:
        boxes = [*boxes[: CLASSES_SHOWN - 3], f"{len(boxes) - CLASSES_SHOWN} more, the rarest three", *boxes[-3:]]
    name, recipe = recipe_for(args.data)
    flags = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    given = [flag for flag in flags if flag.removeprefix("--").removeprefix("no-").replace("-", "_") in recipe]
    epochs, (shorter, longest) = steps * args.batch_size / len(dataset), args.image_size
    return (
        f"{len(ranked)} classes, from the annotation file, and their boxes: {', '.join(boxes)}\n"
        f"{epochs:.1f} epochs, shorter side {shorter} px, longest {longest} px, --augment {args.augment}, "
        f"from the recipe for {name} in docs/training.md{' except for ' * bool(given)}{' '.join(given)}"
    )


def detector_config(args: argparse.Namespace, num_classes: int) -> DetectorConfig:
    same = {name: getattr(args, name) for name in ("backbone", "channels", "head_convs", "max_detections", "assigner")}
    size, ota = tuple(args.image_size), OTAConfig(**args.ota)
    return DetectorConfig(num_classes, image_size=size, frozen_norm=args.pretrained, ota=ota, **same)
