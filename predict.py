"""Detect objects in images: pictures with boxes, class names and scores, and one JSON file.

    python predict.py --weights runs/shapes-.../ota.safetensors photo.jpg folder "more/**/*.png"
    python predict.py --weights hf://user/repo --score 0.5 --out predictions photos

A folder means the images directly inside it; the glob "folder/**/*" reaches folders below. Writes to --out every image
under its own name (images of the same name into folders of their own) and detections.json: COCO result format plus file
and category names, where image_id counts the images from 1. An image that cannot be read is named, the others come out,
and the exit status is 1.
"""

import argparse
import glob
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from data import printable, resized_size
from data.draw import draw_detections
from errors import UserError
from eval import coco_results
from images import ImageError, load_image
from model import Detector, load, write_file
from training.process import setup_distributed
from training.settings import SettingsError, positive

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # of images in folders; and written as they are
JPEG_QUALITY = 92
THREADS = min(8, os.cpu_count() or 1)


def normalised(path: Path) -> Path:
    """Absolute, without `..`; links are kept."""
    return Path(os.path.normpath(path.absolute()))


def find_images(inputs: list[str]) -> list[Path]:
    """Files as they are named, and the images of folders and globs, sorted; each file once.

    A name without a file is kept, to be reported with the files that cannot be read.
    Raises SettingsError: there is no image at all.
    """
    paths = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir() or (not path.exists() and glob.has_magic(name)):
            matches = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
            paths += sorted(p for p in matches if p.is_file() and p.suffix.lower() in SUFFIXES)
        else:
            paths.append(path)
    if not paths:
        suffixes = " ".join(SUFFIXES)
        raise SettingsError(f"no images in {', '.join(inputs)}; folders and globs are searched for {suffixes}")
    once = {}
    for path in paths:
        once.setdefault(normalised(path), path)
    return list(once.values())


def picture_paths(images: list[Path], out: Path) -> list[Path]:
    """Where to write the picture of every image, all different: its name in `out`, or, where several images share the
    name, below `out` as below the folder that the images have in common. A kind of file that is not written, such as
    GIF, becomes a PNG; a path that is taken gets a number. Raises SettingsError: a picture would overwrite an image.
    """
    names = [p.name if p.suffix.lower() in SUFFIXES else f"{p.name}.png" for p in images]
    folders = defaultdict(list)
    for image, name in zip(images, names, strict=True):
        folders[name.lower()].append(normalised(image).parent)
    pictures: dict[Path, None] = {}  # in order, and quick to look up
    for image, name in zip(images, names, strict=True):
        shared = folders[name.lower()]
        below = normalised(image).parent.relative_to(os.path.commonpath(shared)) if len(shared) > 1 else ""
        candidates = (out / below / (f"{n}-{name}" if n else name) for n in itertools.count())
        pictures[next(path for path in candidates if path not in pictures)] = None
    if overwritten := {path.resolve() for path in images} & {path.resolve() for path in pictures}:
        first = printable(min(overwritten))
        raise SettingsError(f"the picture of {first} would overwrite it; name another folder with --out")
    return list(pictures)


def predict(detector: Detector, paths: list[Path], out: Path, score: float, batch_size: int) -> tuple[list[dict], int]:
    """Write the pictures; return the detections of all images in COCO result format and how many images failed."""
    results, failed, pictures = [], 0, picture_paths(paths, out)

    def read(path: Path) -> Tensor | ImageError:
        try:
            image = load_image(path)
        except ImageError as error:
            return error
        is_too_narrow = min(resized_size(*image.shape[1:], detector.config.image_size)) < 1
        return ImageError(f"image file {path} is too narrow to be resized") if is_too_narrow else image

    with ThreadPoolExecutor(THREADS) as pool, tqdm(total=len(paths), desc="predict", unit="image", disable=None) as bar:
        waiting = [pool.submit(read, path) for path in paths[:batch_size]]
        for start in range(0, len(paths), batch_size):
            images = [future.result() for future in waiting]
            waiting = [pool.submit(read, path) for path in paths[start + batch_size : start + 2 * batch_size]]
            good = [i for i, image in enumerate(images, start) if isinstance(image, Tensor)]
            detections = iter(detector.predict([images[i - start] for i in good], score, batch_size))
            for i, image in enumerate(images, start):
                if isinstance(image, ImageError):
                    failed += 1
                    bar.write(printable(str(image)), file=sys.stderr)
                    continue
                found = next(detections)
                rows = coco_results(i + 1, found, detector.category_ids)
                rows = zip(rows, found.names, strict=True)
                results += [row | {"file_name": str(paths[i]), "category_name": name} for row, name in rows]
                picture = draw_detections(image, torch.empty(0, 4), *found)
                pictures[i].parent.mkdir(parents=True, exist_ok=True)
                to_pil_image(picture).save(pictures[i], quality=JPEG_QUALITY)
            bar.update(len(images))
    return results, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, folders, globs")
    parser.add_argument("--weights", required=True, help="file written by train.py, or hf://user/repo[/file]")
    parser.add_argument("--out", type=Path, help="folder to write to; default: runs/predict-<time>")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score of a detection; default 0.5")
    parser.add_argument("--batch-size", type=positive, default=8, help="images at a time")
    parser.add_argument("--device", help="cuda, cpu or mps; default: cuda where there is one")
    args = parser.parse_args()
    if not 0 <= args.score <= 1:
        parser.error(f"--score is between 0 and 1, not {args.score}")

    paths = find_images(args.images)
    out = args.out or Path("runs") / f"predict-{time.strftime('%Y%m%d-%H%M%S')}"
    device, _, _ = setup_distributed(args.device)
    detector = load(args.weights).to(device)
    try:
        out.mkdir(parents=True, exist_ok=True)
        results, failed = predict(detector, paths, out, args.score, args.batch_size)
        write_file(out / "detections.json", json.dumps(results).encode())
    except OSError as error:
        raise SettingsError(f"cannot write to {out}: {error}; name another folder with --out") from error
    done = len(paths) - failed
    print(f"wrote {out}: {done} picture{'s' * (done != 1)}, detections.json with {len(results)} detections")
    if failed:
        sys.exit(f"predict.py: {failed} of {len(paths)} images could not be read, see above")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"predict.py: {error}")
