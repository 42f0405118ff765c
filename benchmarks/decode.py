"""Image files to resized images: same pixels first, then images per second of one core, beside the plain PIL pipeline.

    python -m benchmarks.decode [--data DIR] [--out FILE] [--images N] [--rounds N]

The plain pipeline is that of torchvision's reference scripts: PIL opens, converts to RGB and resizes (bilinear, with
antialiasing), torchvision makes a float tensor of it and normalises. The loader's is `load_image` and `eval_transform`:
its uint8 images are normalised on the device; what that costs on a core is shown too. Times are CPU time on one thread.
Without --data on generated JPEGs. Reports no time, and ends with status 1, when the pixels differ too much.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from data import eval_transform, find_splits
from images import load_image
from training.environment import environment

GENERATED = ((640, 480), (1280, 960))  # width, height in px
SHORTER_SIDES = (800, 480, 320)
MAX_DIFFERENCE = 0.1  # of 255 levels, mean over all pixels; the rounding of two integer resizers
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Pipeline = Callable[[Path], Tensor]


def pil_resize(path: Path, resize: v2.Transform) -> Image.Image:
    with Image.open(path) as image:
        return resize(image.convert("RGB"))


def pipelines(image_size: tuple[int, int]) -> dict[str, Pipeline]:
    """The plain pipeline and the loader's, both to uint8 and both to normalised float32 (3, H, W)."""
    resize = eval_transform(image_size)
    normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    to_tensor = v2.PILToTensor()
    return {
        "plain": lambda path: normalise(to_tensor(pil_resize(path, resize))),
        "plain_uint8": lambda path: to_tensor(pil_resize(path, resize)),
        "loader_normalised": lambda path: normalise(resize(load_image(path))),
        "loader": lambda path: resize(load_image(path)),
    }


def mean_difference(paths: list[Path], calls: dict[str, Pipeline]) -> float:
    """Mean absolute difference of the two uint8 results, in levels of 255."""
    differences = [(calls["loader"](p).int() - calls["plain_uint8"](p).int()).abs().double().mean() for p in paths]
    return torch.stack(differences).mean().item()


def images_per_s(paths: list[Path], calls: dict[str, Pipeline], rounds: int) -> dict[str, float]:
    """Images per CPU second of each pipeline, median over rounds; the pipelines take turns."""
    seconds = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.process_time()
            for path in paths:
                call(path)
            seconds[name].append(time.process_time() - started)
    return {name: len(paths) / median(values) for name, values in seconds.items()}


def write_jpegs(folder: Path, width: int, height: int, count: int) -> list[Path]:
    """Pictures of colour blotches and noise, about as large in bytes as photographs of their size."""
    rng, paths = np.random.default_rng(0), []
    folder.mkdir()
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 20, width // 20, 3), np.uint8))
        picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float32)
        picture = picture + 6 * rng.standard_normal((height, width, 1), np.float32)
        paths.append(folder / f"{i}.jpg")
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def sets_of_images(data: str | None, count: int, folder: Path) -> dict[str, list[Path]]:
    if data is None:
        return {f"{w} x {h}": write_jpegs(folder / f"{w}x{h}", w, h, count) for w, h in GENERATED}
    split = next(filter(None, find_splits(data)))
    return {Path(data).name: sorted(p for p in split.images.iterdir() if p.is_file())[:count]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder in COCO layout; default: generated JPEGs")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--images", type=int, default=24, help="at most, of each set")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = []
    print(f"{'images':>12}  to px  difference  plain/s  loader/s  ratio  both to uint8  both normalised")
    with tempfile.TemporaryDirectory() as folder:
        for name, paths in sets_of_images(args.data, args.images, Path(folder)).items():
            size_kb = sum(path.stat().st_size for path in paths) / len(paths) / 1e3
            for shorter in SHORTER_SIDES:
                calls = pipelines((shorter, round(shorter * 1333 / 800)))
                difference = mean_difference(paths, calls)
                if difference > MAX_DIFFERENCE:
                    sys.exit(f"{name} to {shorter} px: pixels differ by {difference:.3f} levels, so no time is told")
                rate = images_per_s(paths, calls, args.rounds)
                ratios = {
                    "ratio": rate["loader"] / rate["plain"],
                    "ratio_uint8": rate["loader"] / rate["plain_uint8"],
                    "ratio_normalised": rate["loader_normalised"] / rate["plain"],
                }
                about = {"set": name, "images": len(paths), "mean_file_kb": size_kb, "shorter_side_px": shorter}
                rows.append(about | {"mean_difference": difference, "images_per_cpu_s": rate} | ratios)
                print(
                    f"{name:>12}  {shorter:5d}  {difference:10.4f}  {rate['plain']:7.1f}  {rate['loader']:8.1f}  "
                    f"{ratios['ratio']:5.2f}  {ratios['ratio_uint8']:13.2f}  {ratios['ratio_normalised']:15.2f}"
                )
    if args.out:
        about = environment(torch.device("cpu")) | {"rounds": args.rounds, "image_sets": rows}
        args.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
