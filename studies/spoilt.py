"""How many label errors a ranking finds: errors are put into a training set, detectors trained on it, suspects ranked.

    python -m studies.spoilt --data DIR --seeds 0 1 2 --out runs/spoilt [-- FLAGS OF train.py]

Each seed has its own errors, of four kinds, each in `--share` of the boxes, no box in two of them:

    class      another class, all equally likely
    box        moved and scaled until its IoU with the true box is 0.3 to 0.6
    extra      a box where no object is: the shape and the class of a random one, IoU under 0.1 with all of its image
    missing    left out; found by a detection that is listed and has an IoU of 0.5 or more with it

Three detectors are trained: on the spoilt set, and, with as many steps, on each half of its images. Rankings of the
annotations and of the detections without one (studies/label_errors.py) are compared by the share of the errors that are
among the first 1, 2 and 3 times as many suspects as there are errors; "crossed" is each half ranked by the detector of
the other. Needs hotcoco. Writes spoilt.json; a command that is started again leaves out complete runs.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_convert

from benchmarks.measure import write_report
from data import CocoDataset, eval_transform, find_splits
from data.report import write_coco
from errors import UserError, run_script
from eval import coco_evaluation, detect_dataset
from kernels import Assignment, Inputs, OTAConfig, focal_loss, ota_assign
from kernels.assign_torch import solve
from model import Detector, load_weights
from model.batch import pack
from model.head import Predictions
from model.losses import detection_losses
from studies.compare import split_flags, train
from studies.label_errors import find_suspects, mean_unit
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


def write_parts(halves: list[CocoDataset], spoilt: dict, root: Path) -> dict[str, Path]:
    """Write the spoilt set and halves of its images, each as a data set of its own; return their folders by name."""
    parts = {"all": spoilt["images"], "even": spoilt["images"][::2], "odd": spoilt["images"][1::2]}
    for name, images in parts.items():
        if not (root / name).exists():
            write_coco(halves, root / name)
            ids = {image["id"] for image in images}
            records = [a for a in spoilt["annotations"] if a["image_id"] in ids]
            part = json.dumps(spoilt | {"images": images, "annotations": records})
            (root / name / "annotations" / "instances_train.json").write_text(part)
    return {name: root / name for name in parts}


@torch.no_grad()
def add_other_values(detector: Detector, dataset: CocoDataset, suspects: dict[str, list[dict]]) -> None:
    """Add to the suspects of `find_suspects` what else they can be ranked by: to annotations what `training_losses`
    returns, to missing ones what `detection_values` returns."""
    annotations, missing = map(by_image, (suspects[name] for name in LISTS))
    labelled = by_image(dataset.annotations["annotations"])
    for i, image in enumerate(dataset.images):
        sample, target = dataset[i]
        batch = pack([sample], [target])
        raw, grid = detector.predict_raw(detector.normalise(batch.images, batch.sizes))
        truth = Inputs(*raw[:2], batch.gt_boxes, batch.gt_labels, batch.gt_offsets, grid)
        match = ota_assign(*truth, detector.config.ota)
        losses = dict(zip([a["id"] for a in labelled[image["id"]]], training_losses(raw, match, truth), strict=True))
        for suspect in annotations[image["id"]]:
            suspect |= losses[suspect["id"]]
        if found := missing[image["id"]]:
            boxes = box_convert(torch.tensor([d["bbox"] for d in found]), "xywh", "xyxy")
            boxes = boxes * (batch.sizes[0] / torch.tensor(target["orig_size"])).flip(0).repeat(2)
            labels = torch.tensor([dataset.category_ids.index(d["category_id"]) for d in found])
            objects = truth._replace(gt_boxes=boxes, gt_labels=labels, gt_offsets=torch.tensor([0, len(found)]))
            for suspect, values in zip(
                found, detection_values(objects, match, truth, detector.config.ota), strict=True
            ):
                suspect |= values


def training_losses(raw: Predictions, match: Assignment, truth: Inputs) -> Iterator[dict]:
    """Yield for each ground truth of an image its training loss, the mean of its points, and with the classes doubled;
    it is infinite if it gets no point."""
    for row in range(len(truth.gt_boxes)):
        mine = match.gt_index == row
        alone = match._replace(gt_index=torch.where(mine, row, -1))
        terms = detection_losses(raw, alone, truth.gt_boxes, truth.gt_labels, ~mine)
        loss = sum(map(float, terms.values())) if mine.any() else math.inf
        yield {"loss": loss, "loss, classes doubled": loss + float(terms["cls"])}


def detection_values(objects: Inputs, match: Assignment, truth: Inputs, config: OTAConfig) -> Iterator[dict]:
    """Yield for each detection, assigned as if it were a ground truth, its worth, what a unit of its supply would save,
    and the focal loss of its points under the true labels, the mean."""
    own, plan = solve(objects, config)
    for row, cost in enumerate(mean_unit(plan, plan.cost).tolist()):
        mine = own.gt_index == row
        loss = focal_loss(truth.logits, torch.where(mine, match.gt_index, -1), truth.gt_labels, ~mine)
        yield {"worth": -cost, "loss": float(loss / mine.sum().clamp(min=1))}


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
    names = {"annotations": ("price", "loss", "loss, classes doubled"), "missing": ("score", "worth", "loss")}
    random, orders = np.random.default_rng(seed), {}
    for kind, keys in names.items():
        orders[kind] = {key: sorted(suspects[kind], key=lambda s, key=key: -s[key]) for key in keys}
        orders[kind]["hotcoco"] = sorted(listed[kind], key=lambda s: -s["score"])
        orders[kind]["random"] = [suspects[kind][i] for i in random.permutation(len(suspects[kind]))]
    return orders


def search(weights: Path, root: Path) -> tuple[dict, dict]:
    """The suspects of a data set under a detector with all values, and hotcoco's."""
    detector, metadata = load_weights(weights)
    dataset = CocoDataset(find_splits(str(root))[0], eval_transform(detector.config.image_size))
    results = detect_dataset(detector.eval(), dataset, batch_size=8, workers=0)
    suspects = find_suspects(detector, dataset, results)
    add_other_values(detector, dataset, suspects)
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
        parts = write_parts(halves, spoilt, args.out / f"data-{seed}")
        runs = {
            name: train("ota", seed, str(root), args.out / name, more, torch.get_num_threads()) / "ota.safetensors"
            for name, root in parts.items()
        }
        crossed = search(runs["even"], parts["odd"]), search(runs["odd"], parts["even"])
        merged = tuple({name: a[name] + b[name] for name in LISTS} for a, b in zip(*crossed, strict=True))
        for variant, found in (("", search(runs["all"], parts["all"])), (", crossed", merged)):
            for kind, orders in rankings(*found, seed).items():
                wanted = [e for e in errors if (e["kind"] == "missing") == (kind == "missing")]
                for name, order in orders.items():
                    row = shares_found(order, wanted) | {"seed": seed}
                    rows.setdefault(f"{kind}: {name}{variant}", []).append(row)
                    print(f"{seed} {kind}: {name}{variant}: {row}", flush=True)
    write_report(args.out / "spoilt.json", {"command": command, **environment(torch.device("cpu")), "rows": rows})
    print(f"wrote {args.out / 'spoilt.json'}")


if __name__ == "__main__":
    run_script(main)
