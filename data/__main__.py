"""Data sets on the command line.

    python -m data generate crowds --crowded-share 1     write generated shapes, for --data crowds
    python -m data check my-data --image-size 480        check a data set, count what is in it, draw samples

Flags: python -m data check --help.
"""

import argparse
import sys
from pathlib import Path

from data.dataset import train_transform
from data.files import DatasetError
from data.layouts import find_splits
from data.problems import culprit_lines
from data.report import SAMPLES, open_splits, print_tables, repeated_images, save_samples, unusable_images, write_coco
from data.shapes import CROWDED_SHARE, SIZE_PX, TRAIN_IMAGES, VAL_IMAGES, generate_shapes
from errors import run_script
from kernels import OTAConfig
from kernels.grid import MAX_SIDE_PX
from training.settings import add_data_flags, add_ota_flag, fill_in, seed


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="generate | check")
    add = commands.add_parser("generate", description="Write a data set of generated shapes.").add_argument
    add("root", type=Path, help="folder to write; must not exist")
    add("--crowded-share", type=float, default=CROWDED_SHARE, help="of the images, 0 to 1")
    add("--one-class", action="store_true", help="every shape is of the class shape")
    add("--train-images", type=int, default=TRAIN_IMAGES)
    add("--val-images", type=int, default=VAL_IMAGES)
    add("--size", type=int, default=SIZE_PX, dest="size_px", metavar="PX", help="side of an image")
    add("--seed", type=int, default=0)
    about = "Check a data set, print its counts and draw samples. Exit status 1 if there are problems."
    add = commands.add_parser("check", description=about).add_argument
    add("data", metavar="DATA", help="coco, crowdhuman, shapes or a folder, as --data of train.py")
    add_data_flags(add)
    add_ota_flag(add)
    add("--seed", type=seed, default=0, help="of the samples that are drawn, as in train.py")
    add("--sheet", type=Path, default="check.png", metavar="FILE", help=f"of {SAMPLES} samples; default: %(default)s")
    add("--write", type=Path, metavar="DIR", help="write the set as read, in COCO layout; must not exist")
    return parser


def generate(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    del args.command
    if args.root.exists():
        parser.error(f"{args.root} exists; name another folder")
    bounded = 0 <= args.crowded_share <= 1 and 32 <= args.size_px <= MAX_SIDE_PX and 0 <= args.seed < 2**63
    if not bounded or min(args.train_images, args.val_images) < 1:
        bounds = f"--size between 32 and {MAX_SIDE_PX} px, --seed between 0 and 2^63; each part has an image"
        parser.error(f"--crowded-share lies between 0 and 1, {bounds}")
    generate_shapes(**vars(args))
    print(f"wrote {args.root}; python train.py --data {args.root}")


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    fill_in(args, parser, {})
    if args.write and args.write.exists():
        parser.error(f"--write {args.write} exists; name another folder")
    transform = train_transform(args.image_size, args.augment, args.multi_scale)
    splits = find_splits(args.data, args.box, args.follow_links, args.strict)
    datasets, problems = open_splits(splits, transform)
    sound = not problems
    for dataset in datasets:
        print(f"{dataset.split.name}: {dataset.split.annotations}")
        print("\n".join(culprit_lines(dataset.repairs)) or "  nothing to repair")
    if splits.val is None:
        print("val: none, so a training evaluates on the training split")
    try:
        if datasets:
            print(f"\nsizes and points at --image-size {' '.join(map(str, args.image_size))}")
            print_tables(datasets, args.image_size, OTAConfig(**args.ota))
            problems += culprit_lines(unusable_images(datasets) | repeated_images(datasets))
        if args.write and sound:
            write_coco(datasets, args.write)
            print(f"\nwrote {args.write}; python train.py --data {args.write}")
        elif args.write:
            problems.append(f"--write {args.write}: not written because of these problems")
        if datasets:
            save_samples(datasets[0], args.seed, args.sheet)
            print(f"\nwrote {args.sheet}: samples of {datasets[0].split.name} as the training sees them")
    except (OSError, DatasetError) as error:
        problems.append(str(error))
    print("\n".join(["\nproblems:", *problems] if problems else ["\nno problems"]))
    if problems:
        sys.exit(1)


def main() -> None:
    parser = create_parser()
    args = parser.parse_args()
    {"generate": generate, "check": check}[args.command](args, parser)


if __name__ == "__main__":
    run_script(main)
