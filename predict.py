"""Detect objects in images: pictures with boxes, class names and scores, and one JSON file.

    python predict.py --weights runs/shapes-.../ota.safetensors photo.jpg folder "more/**/*.png"
    python predict.py --weights hf://user/repo --score 0.5 --out predictions photos

A folder stands for the images in it, but not in folders below; the glob "folder/**/*" reaches those. Writes to --out
every image under its own name (of several with the same name, each into a folder of its own) and detections.json: COCO
result format plus file and category names, where image_id counts the images from 1. An image that cannot be read is
named, the others come out, and the exit status is 1.
"""

import argparse
import glob
import itertools
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from data import printable, resized_size
from data.draw import draw_detections
from errors import UserError
from eval import batches_of_one_size, coco_results
from images import ImageError, header_size, load_image
from model import Detector, load, write_file
from training.process import setup_distributed
from training.settings import SettingsError, positive

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")  # of images in folders; and written as they are
JPEG_QUALITY = 92
THREADS = min(8, os.cpu_count() or 1)


def whole(path: Path) -> Path:
    """Absolute, without `..`; links stay."""
    return Path(os.path.normpath(path.absolute()))


def find_images(inputs: list[str]) -> list[Path]:
    """Files as they are named, of folders and globs the images, sorted; each file once.

    A name with nothing behind it stays in, to be reported with the files that cannot be read.
    Raises SettingsError: there is no image at all.
    """
    found = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
        elif not path.exists() and glob.has_magic(name):
            matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
            found += [p for p in matches if p.is_file() and p.suffix.lower() in SUFFIXES]
        else:
            found.append(path)
    once = {}
    for path in found:
        once.setdefault(whole(path), path)
    found = list(once.values())
    if not found:
        raise SettingsError(
            f"no images in {', '.join(inputs)}; folders and globs are searched for {' '.join(SUFFIXES)}"
        )
    return found


def picture_paths(images: list[Path], out: Path) -> list[Path]:
    """Where the picture of every image goes, no two to the same place: its own name in `out`, or, where several images
    share that, below `out` as below the folder that these have in common. A kind of file that is not written, such as
    GIF, becomes a PNG; one that has still no place of its own gets a number. Raises SettingsError: a picture would take
    the place of an image."""
    names = [p.name if p.suffix.lower() in SUFFIXES else f"{p.name}.png" for p in images]
    sharing = defaultdict(list)
    for image, name in zip(images, names, strict=True):
        sharing[name.lower()].append(whole(image).parent)
    pictures: dict[Path, None] = {}  # in order, and quick to look up
    for image, name in zip(images, names, strict=True):
        parent, parents = whole(image).parent, sharing[name.lower()]
        folder = out / (parent.relative_to(os.path.commonpath(parents)) if len(parents) > 1 else "")
        numbered = (f"{n}-{name}" if n else name for n in itertools.count())
        pictures[next(folder / name for name in numbered if folder / name not in pictures)] = None
    taken = {path.resolve() for path in images} & {path.resolve() for path in pictures}
    if taken:
        raise SettingsError(
            f"the picture of {printable(min(taken))} would overwrite it; name another folder with --out"
        )
    return list(pictures)


def image_records(paths: list[Path], image_size: tuple[int, int]) -> tuple[list[dict], dict[Path, str]]:
    """Id, path and size of every image that has a usable header, and what is wrong with the others."""

    def read(path: Path) -> dict | str:
        try:
            width, height = header_size(path)
            if min(resized_size(height, width, image_size)) < 1:
                raise ValueError(f"{width} x {height} px are too narrow to be resized to {image_size[1]} px")
            return {"width": width, "height": height, "path": path}
        except FileNotFoundError:
            return f"there is no image file {path}"
        except Exception as error:  # Pillow's readers raise nearly anything on a broken file
            return f"image file {path} cannot be read: {error}"

    with ThreadPoolExecutor(THREADS) as pool:
        answers = dict(zip(paths, pool.map(read, paths), strict=True))
    records = [{"id": i, **answer} for i, answer in enumerate(answers.values(), 1) if isinstance(answer, dict)]
    return records, {path: answer for path, answer in answers.items() if isinstance(answer, str)}


def loaded(records: list[dict], batches: list[list[int]]) -> Iterator[list[tuple[dict, Tensor | ImageError]]]:
    """The records of every batch with their images, or why there is none; decoded while the batch before is used."""

    def read(i: int) -> tuple[dict, Tensor | ImageError]:
        try:
            return records[i], load_image(records[i]["path"])
        except ImageError as error:
            return records[i], error

    with ThreadPoolExecutor(THREADS) as pool:
        waiting = [pool.submit(read, i) for i in batches[0]] if batches else []
        for following in [*batches[1:], []]:
            ready, waiting = [future.result() for future in waiting], [pool.submit(read, i) for i in following]
            if ready:
                yield ready


def write_picture(path: Path, picture: Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(picture).save(path, quality=JPEG_QUALITY)


def predict(
    detector: Detector, paths: list[Path], out: Path, score: float, batch_size: int
) -> tuple[list[dict], dict[Path, str]]:
    """Writes the pictures; returns the detections of all images in COCO result format and the images that failed."""
    pictures = dict(zip(paths, picture_paths(paths, out), strict=True))
    records, failed = image_records(paths, detector.config.image_size)
    for message in failed.values():
        print(printable(message), file=sys.stderr)
    batches = batches_of_one_size(records, detector.config.image_size, batch_size)
    results = []
    with tqdm(total=len(records), desc="predict", unit="image", disable=None) as bar:
        for batch in loaded(records, batches):
            for record, error in batch:
                if isinstance(error, ImageError):
                    failed[record["path"]] = str(error)
                    bar.write(printable(error), file=sys.stderr)
            read = [(record, image) for record, image in batch if isinstance(image, Tensor)]
            detections = detector.predict([image for _, image in read], score, batch_size)
            for (record, image), found in zip(read, detections, strict=True):
                names = {"file_name": str(record["path"])}
                rows = coco_results(record["id"], *found[:3], detector.category_ids)
                results += [row | names | {"category_name": n} for row, n in zip(rows, found.names, strict=True)]
                picture = draw_detections(image, torch.empty(0, 4), found._asdict(), detector.class_names)
                write_picture(pictures[record["path"]], picture)
            bar.update(len(batch))
    return sorted(results, key=lambda row: row["image_id"]), failed


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
    done = len(paths) - len(failed)
    print(f"wrote {out}: {done} picture{'s' * (done != 1)}, detections.json with {len(results)} detections")
    if failed:
        sys.exit(f"predict.py: {len(failed)} of {len(paths)} images could not be read, see above")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"predict.py: {error}")
