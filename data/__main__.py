"""Write a data set of generated shapes, for --data FOLDER: python -m data crowds --crowded-share 1"""

import argparse
from pathlib import Path

from data.shapes import CROWDED_SHARE, SIZE_PX, TRAIN_IMAGES, VAL_IMAGES, generate_shapes
from kernels.grid import MAX_SIDE_PX

parser = argparse.ArgumentParser(prog="python -m data", description=__doc__)
parser.add_argument("root", type=Path, help="folder to write; must not exist")
parser.add_argument("--crowded-share", type=float, default=CROWDED_SHARE, help="of the images, 0 to 1")
parser.add_argument("--one-class", action="store_true", help="every shape is of the class shape")
parser.add_argument("--train-images", type=int, default=TRAIN_IMAGES)
parser.add_argument("--val-images", type=int, default=VAL_IMAGES)
parser.add_argument("--size", type=int, default=SIZE_PX, dest="size_px", metavar="PX", help="side of an image")
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()
if args.root.exists():
    parser.error(f"{args.root} exists; name another folder")
bounded = 0 <= args.crowded_share <= 1 and 32 <= args.size_px <= MAX_SIDE_PX and 0 <= args.seed < 2**63
if not bounded or min(args.train_images, args.val_images) < 1:
    bounds = f"--size between 32 and {MAX_SIDE_PX} px, --seed between 0 and 2^63; each part has an image"
    parser.error(f"--crowded-share lies between 0 and 1, {bounds}")
generate_shapes(**vars(args))
print(f"wrote {args.root}; python train.py --data {args.root}")
