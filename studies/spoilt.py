"""How many label errors a ranking finds: errors are put into a training set, detectors trained on it, suspects ranked.

    python -m studies.spoilt --data DIR --seeds 0 1 2 --out runs/spoilt [-- FLAGS OF train.py]

Each seed has its own errors, of four kinds, each in `--share` of the boxes, no box in two of them:

    class      another class, all equally likely
    box        moved and scaled until its IoU with the true box is 0.3 to 0.6
    extra      a box where no object is: the shape and the class of a random one, IoU under 0.1 with all of its image
    missing    left out; found by a detection that is listed and has an IoU of 0.5 or more with it

A detector is trained on the spoilt set. Rankings of the annotations and of the detections without one (see
studies/label_errors.py) are compared by the share of the errors that are among the first 1, 2 and 3 times as many
suspects as there are errors. Needs hotcoco. Writes spoilt.json; the same command again leaves out complete runs.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import write_report
from data import CocoDataset, find_splits
from data.report import write_coco
from errors import UserError, run_script
from eval import coco_evaluation, detect_dataset, load_with_data
from kernels import ota_assign
from model import Detector
from model.batch import Batch, pack
from model.losses import detection_losses
from studies.compare import split_flags, train
from studies.label_errors import find_suspects
from studies.predictions import by_image, overlaps
from training.environment import environment

KINDS = ("class", "box", "extra", "missing")
MOVED_IOU, FREE_IOU, FOUND_IOU = (0.3, 0.6), 0.1, 0.5
MOVE, SCALE = 0.4, 0.4  # bounds of a shift in sides of the box, and of the logarithm of a scale
TRIES = 1000
TIMES = (1, 2, 3)  # as many suspects as errors
LISTS = ("annotations", "missing")


def box_record(corner: np.ndarray, side: np.ndarray) -> dict:
    return {"bbox": [*corner.tolist(), *side.tolist()], "area": float(side.prod())}


def move(record: dict, image: dict, random: np.random.Generator) -> bool:
    """Move the box of an annotation; False if chance finds no place inside the image with an IoU of MOVED_IOU."""
    corner, side = np.array(record["bbox"][:2]), np.array(record["bbox"][2:])
    for _ in range(TRIES):
        low = (corner + random.uniform(-MOVE, MOVE, 2) * side).clip(0)
        high = (low + side * np.exp(random.uniform(-SCALE, SCALE, 2))).clip(max=(image["width"], image["height"]))
        moved = box_record(low, high - low)
        if min(high - low) > 0 and MOVED_IOU[0] <= overlaps([record], [moved]) <= MOVED_IOU[1]:
            record.update(moved)
            return True
    return False


def place(record: dict, image: dict, others: list[dict], random: np.random.Generator) -> bool:
    """Move the box of an annotation to where `image` has none; False if chance finds no place."""
    side = np.array(record["bbox"][2:])
    room = np.array([image["width"], image["height"]]) - side
    for _ in range(TRIES if min(room) >= 0 else 0):
        placed = box_record(random.uniform(0, room), side)
        if not others or overlaps([placed], others).max() < FREE_IOU:
            record.update(placed, image_id=image["id"])
            return True
    return False


def spoil(truth: dict, share: float, seed: int) -> tuple[dict, list[dict]]:
    """Return the content of a COCO file with errors, and these: the annotation with its `kind`, and as `id` None if it
    is a missing one."""
    random, count = np.random.default_rng(seed), round(share * len(truth["annotations"]))
    images, category_ids = {i["id"]: i for i in truth["images"]}, [c["id"] for c in truth["categories"]]
    annotations, errors = {a["id"]: dict(a) for a in truth["annotations"]}, []
    victims = iter(random.permutation([a["id"] for a in truth["annotations"] if not a["iscrowd"]]).tolist())
    for kind in KINDS:
        done = []
        while len(done) < count:
            record, made = annotations[next(victims)], True
            if kind == "class":
                record["category_id"] = int(random.choice([c for c in category_ids if c != record["category_id"]]))
            elif kind == "box":
                made = move(record, images[record["image_id"]], random)
            elif kind == "missing":
                del annotations[record["id"]]
            else:
                image = truth["images"][random.integers(len(images))]
                others = [a for a in annotations.values() if a["image_id"] == image["id"]]
                record = record | {"id": max(annotations) + 1}
                if made := place(record, image, others, random):
                    annotations[record["id"]] = record
            if made:
                done.append(record | {"kind": kind, "id": None if kind == "missing" else record["id"]})
        errors += done
    return truth | {"annotations": [*annotations.values()]}, errors


def add_losses(detector: Detector, dataset: CocoDataset, annotations: list[dict]) -> None:
    """Add to the annotations among the suspects what `training_losses` yields."""
    suspects, labelled = {s["id"]: s for s in annotations}, by_image(dataset.annotations["annotations"])
    for i, image in enumerate(dataset.images):
        sample, target = dataset[i]
        losses = training_losses(detector, pack([sample], [target]))
        for annotation, of_annotation in zip(labelled[image["id"]], losses, strict=True):
            suspects[annotation["id"]] |= of_annotation


@torch.no_grad()
def training_losses(detector: Detector, batch: Batch) -> Iterator[dict]:
    """Yield for each ground truth of a batch of one image its training loss, the mean of its points, and with the
    classes doubled; it is infinite if it gets no point."""
    raw, grid = detector.predict_raw(detector.normalise(batch.images, batch.sizes))
    truth = batch.gt_boxes, batch.gt_labels
    match = ota_assign(*raw[:2], *truth, batch.gt_offsets, grid, detector.config.ota)
    for row in range(len(truth[0])):
        mine = match.gt_index == row
        alone = match._replace(gt_index=torch.where(mine, row, -1))
        terms = detection_losses(raw, alone, *truth, ~mine)
        loss = sum(map(float, terms.values())) if mine.any() else math.inf
        yield {"loss": loss, "loss, classes doubled": loss + float(terms["cls"])}


def hotcoco_suspects(dataset: CocoDataset, results: list[dict]) -> dict[str, list[dict]]:
    """Return the label errors that hotcoco lists as suspects: annotations of a wrong class, and missing ones."""
    evaluation = coco_evaluation(dataset.annotations, results)  # which counts annotations and results from 1
    ids = [None, *(annotation["id"] for annotation in dataset.annotations["annotations"])]
    suspects = {"wrong_label": [], "missing_annotation": []}
    for error in evaluation.image_diagnostics(score_thr=min(r["score"] for r in results))["label_errors"]:
        suspects[error["type"]].append(results[error["dt_id"] - 1] | {"id": ids[error["gt_id"] or 0]})
    return dict(zip(LISTS, suspects.values(), strict=True))


def shares_found(ranked: list[dict], errors: list[dict]) -> dict:
    """The share of the errors among the first 1, 2 and 3 times as many suspects, and of each kind among the last."""
    waiting, found, counts = list(errors), [], []
    for suspect in ranked[: TIMES[-1] * len(errors)]:
        if hit := next((error for error in waiting if is_found(error, suspect)), None):
            waiting.remove(hit)
            found.append(hit["kind"])
        counts.append(len(found))
    counts += [len(found)] * (TIMES[-1] * len(errors) - len(counts))
    shares = {f"first {n}x": counts[n * len(errors) - 1] / len(errors) for n in TIMES}
    kinds = Counter(error["kind"] for error in errors)
    return shares | {kind: found.count(kind) / count for kind, count in kinds.items()}


def is_found(error: dict, suspect: dict) -> bool:
    if error["id"] is not None:
        return error["id"] == suspect["id"]
    return error["image_id"] == suspect["image_id"] and bool(overlaps([error], [suspect]) >= FOUND_IOU)


def rankings(suspects: dict[str, list[dict]], listed: dict[str, list[dict]], seed: int) -> dict[str, dict[str, list]]:
    """List -> name of a ranking -> the suspects, most suspicious first."""
    names = {"annotations": ("price", "loss", "loss, classes doubled"), "missing": ("score",)}
    random, orders = np.random.default_rng(seed), {}
    for kind, keys in names.items():
        orders[kind] = {key: sorted(suspects[kind], key=lambda s, key=key: -s[key]) for key in keys}
        orders[kind]["hotcoco"] = sorted(listed[kind], key=lambda s: -s["score"])
        orders[kind]["random"] = [suspects[kind][i] for i in random.permutation(len(suspects[kind]))]
    return orders


def search(weights: Path) -> tuple[dict, dict]:
    """The suspects in the training split of a detector, with the losses of annotations, and hotcoco's."""
    detector, dataset, _ = load_with_data(weights, None, "train")
    results = detect_dataset(detector.eval(), dataset, batch_size=8, workers=0)
    suspects = find_suspects(detector, dataset, results)
    add_losses(detector, dataset, suspects["annotations"])
    return suspects, hotcoco_suspects(dataset, results)


def main(argv: list[str] | None = None) -> None:
    flags, more, command = split_flags("studies.spoilt", argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="what train.py takes")
    parser.add_argument("--share", type=float, default=0.05, help="of the boxes, for each kind of error")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(flags)
    halves, rows = [CocoDataset(split) for split in find_splits(args.data) if split], {}
    if len(halves[0].class_names) < 2:
        raise UserError(f"--data {args.data} has one class, and none to confuse it with")
    for seed in args.seeds:
        spoilt, errors = spoil(halves[0].annotations, args.share, seed)
        if not (root := args.out / f"data-{seed}").exists():
            write_coco(halves, root)
            (root / "annotations" / "instances_train.json").write_text(json.dumps(spoilt))
        run = train("ota", seed, str(root), args.out, more, torch.get_num_threads())
        for kind, orders in rankings(*search(run / "ota.safetensors"), seed).items():
            wanted = [e for e in errors if (e["kind"] == "missing") == (kind == "missing")]
            for name, order in orders.items():
                row = shares_found(order, wanted) | {"seed": seed}
                rows.setdefault(f"{kind}: {name}", []).append(row)
                print(f"{seed} {kind}: {name}: {row}", flush=True)
    write_report(args.out / "spoilt.json", {"command": command, **environment(torch.device("cpu")), "rows": rows})
    print(f"wrote {args.out / 'spoilt.json'}")


if __name__ == "__main__":
    run_script(main)
