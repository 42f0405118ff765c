"""Detect objects in images: pictures with boxes, class names and scores, and one JSON file.

    python predict.py --weights runs/shapes-.../ota.safetensors photo.jpg folder "more/**/*.png"
    python predict.py --weights hf://user/repo --score 0.3 --out predictions photos

A folder means the images directly inside it; the glob "folder/**/*" reaches folders below. Writes to --out every image
under its own name (with a number where a name repeats) and detections.json: COCO result format plus file and category
names, where image_id counts the images from 1. An image that cannot be read is named; the exit status is then 1.
"""

import argparse
import glob
import itertools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from data import printable, resized_size
from data.draw import draw_detections
from data.files import IMAGE_SUFFIXES
from errors import UserError, run_script
from eval import coco_results
from images import ImageError, load_image
from model import DEFAULT_SCORE, Detector, load, write_file
from training.process import setup_distributed
from training.settings import number, positive

WRITTEN = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # kinds of pictures; of other images: PNG


def find_images(inputs: list[str]) -> list[Path]:
    """Return files as they are named (those that do not exist are reported later), and the images of folders and globs,
    sorted; each file once. Raises UserError."""
    images: dict[str, Path] = {}
    for name in inputs:
        paths = [path := Path(name).expanduser()]
        if path.is_dir() or (not path.exists() and glob.has_magic(name)):
            matches = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
            shown = (p for p in matches if p.is_file() and not p.name.startswith("."))
            paths = sorted(p for p in shown if p.suffix.lower() in IMAGE_SUFFIXES)
        for path in paths:
            images.setdefault(os.path.normpath(path.absolute()), path)
    if not images:
        raise UserError(f"no images in {', '.join(inputs)}; searched for {' '.join(IMAGE_SUFFIXES)}")
    return list(images.values())


def picture_paths(images: list[Path], out: Path) -> list[Path]:
    """Return the paths of pictures: the images' names in `out`, with a number if the name is taken; kinds of files that
    are not WRITTEN become PNG. Raises UserError: a picture would overwrite an image."""
    pictures: dict[str, Path] = {}  # by name in lower case, as some file systems have it
    for image in images:
        name = image.name if image.suffix.lower() in WRITTEN else f"{image.name}.png"
        names = (f"{n}-{name}" if n else name for n in itertools.count())
        name = next(name for name in names if name.lower() not in pictures)
        pictures[name.lower()] = out / name
    if overwritten := {path.resolve() for path in images} & {path.resolve() for path in pictures.values()}:
        raise UserError(f"the picture of {printable(min(overwritten))} would overwrite it; name another --out")
    return list(pictures.values())


def predict(
    detector: Detector, paths: list[Path], out: Path, score: float | None, batch_size: int
) -> tuple[list[dict], int]:
    """Write the pictures; return the detections of all images in COCO result format and how many images failed."""
    results, failed, pictures = [], 0, picture_paths(paths, out)

    def read(path: Path) -> Tensor:
        image = load_image(path)
        if min(resized_size(*image.shape[1:], detector.config.image_size)) < 1:
            raise ImageError(f"image file {path} is too narrow to be resized")
        return image

    with ThreadPoolExecutor(8) as pool, tqdm(total=len(paths), desc="predict", unit="image", disable=None) as bar:
        reading = [pool.submit(read, path) for path in paths[:batch_size]]
        for start in range(0, len(paths), batch_size):
            images = {}
            for i, future in enumerate(reading, start):
                try:
                    images[i] = future.result()
                except ImageError as error:
                    bar.write(printable(str(error)), file=sys.stderr)
                    failed += 1
            reading = [pool.submit(read, path) for path in paths[start + batch_size : start + 2 * batch_size]]
            detections = detector.predict(list(images.values()), score, batch_size)
            for (i, image), of_image in zip(images.items(), detections, strict=True):
                rows = zip(coco_results(i + 1, of_image, detector.category_ids), of_image.names, strict=True)
                results += [row | {"file_name": str(paths[i]), "category_name": name} for row, name in rows]
                picture = draw_detections(image, torch.empty(0, 4), *of_image)
                to_pil_image(picture).save(pictures[i], quality=92)
            bar.update(batch_size)
    return results, failed


def main() -> None:
    score = number(float, lambda value: 0 <= value <= 1, "a score from 0 to 1")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, globs")
    parser.add_argument("--weights", required=True, help="file written by train.py, or hf://user/repo[/file]")
    parser.add_argument("--out", type=Path, help="folder to write to; default: runs/predict-<time>")
    help_score = f"lowest score of a detection; default: its class's with the best F1 in training, or {DEFAULT_SCORE}"
    parser.add_argument("--score", type=score, help=help_score)
    parser.add_argument("--batch-size", type=positive, default=8, help="images at a time")
    parser.add_argument("--device", help="cuda, cpu or mps; default: cuda where there is one")
    args = parser.parse_args()
    paths = find_images(args.images)
    out = args.out or Path("runs") / f"predict-{time.strftime('%Y%m%d-%H%M%S')}"
    device, _, _ = setup_distributed(args.device)
    detector = load(args.weights).to(device)
    if args.score is None and set(detector.cuts) == {DEFAULT_SCORE}:
        print(
            f"note: {args.weights} names no scores with the best F1; --score {DEFAULT_SCORE} is taken", file=sys.stderr
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        results, failed = predict(detector, paths, out, args.score, args.batch_size)
        write_file(out / "detections.json", json.dumps(results).encode())
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error}; name another folder with --out") from error
    print(f"wrote {out}: {len(paths) - failed} pictures, detections.json with {len(results)} detections")
    if failed:
        sys.exit(f"predict.py: {failed} of {len(paths)} images could not be read, see above")


if __name__ == "__main__":
    run_script(main)
