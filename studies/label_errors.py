"""Which labels are wrong: the annotations of a data set ranked by their price, and the objects that may lack one.

    python -m studies.label_errors --weights FILE [--data DIR] [--most N] [--out DIR]

The detector is one that was trained on these labels. The price of an annotation is what a unit of its supply costs on
average in Sinkhorn's plan pi under the detector's predictions,

    price_i = sum_j pi_ij c_ij / k_i        (c of equation 6 of the paper, with half the weight alpha on the boxes)

A box of a wrong class, in a wrong place or where no object is finds no point that predicts it, so every point that it
can get is dear. An object that may lack an annotation is a detection that overlaps none with an IoU of 0.3; these are
ranked by score. docs/labels.md has what this finds, and why not otherwise. Writes suspects.json, both lists, and
suspects.png, crops around the first of each.
"""

import argparse
import json
from dataclasses import replace
from itertools import chain
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from data import CocoDataset, printable
from errors import run_script
from eval import detect_dataset, load_with_data
from images import load_image
from kernels import OTAConfig
from kernels.assign_torch import solve
from kernels.statistics import background_cost
from model import Detector, make_folder
from studies.predictions import by_image, overlaps, predicted_scene
from tests.support.scenes import Scene
from training.settings import positive

BOX_WEIGHT = 0.5  # of alpha
MET_IOU = 0.3  # from which on a detection concerns an annotation
CONFIDENT = 0.5  # of the score with the best F1 of its class
SHEET = {"annotations": 16, "missing": 8}  # crops of suspects.png
COLUMNS, MARGIN, DPI = 6, 0.6, 110  # of the sheet; a crop reaches so many sides of its box beyond it


def prices(scene: Scene, config: OTAConfig) -> Tensor:
    """Return the mean cost (G,) float64 of a unit of each ground truth of an image; NaN where it supplies none."""
    config = replace(config, alpha=BOX_WEIGHT * config.alpha)
    _, plan = solve(scene, config)
    of_background = background_cost(scene.logits, plan, config)[plan.column]
    cost = plan.log_plan.exp() * (plan.cost + of_background)
    return cost.new_zeros(len(plan.k)).index_add(0, plan.gt, cost) / plan.k


def find_suspects(detector: Detector, dataset: CocoDataset, results: list[dict]) -> dict[str, list[dict]]:
    """Return all `annotations`, the dearest first, and the detections that overlap none as `missing`, the best first.

    Of `results`, those of `detect_dataset`, count those that reach half of the detector's `cuts`. A suspect has
    image_id, file_name, bbox, category_id and reason; an annotation also id, price and `detection`, the one that
    overlaps it most, or None if no IoU reaches 0.3; a missing one its score.
    """
    cuts = dict(zip(detector.category_ids, detector.cuts, strict=True))
    names = dict(zip(detector.category_ids, detector.class_names, strict=True))
    truth, found = by_image(dataset.annotations["annotations"]), by_image(results)
    annotations, missing = [], []
    for i, image in enumerate(dataset.images):
        labelled = truth[image["id"]]
        detections = [d for d in found[image["id"]] if d["score"] >= CONFIDENT * cuts[d["category_id"]]]
        iou = overlaps(labelled, detections)
        costs = prices(predicted_scene(detector, dataset, i)[1], detector.config.ota).tolist()
        for annotation, price, row in zip(labelled, costs, iou, strict=True):
            best = int(row.argmax()) if len(row) and row.max() >= MET_IOU else None
            detection = None if best is None else detections[best] | {"iou": float(row[best])}
            suspect = {key: annotation[key] for key in ("id", "image_id", "bbox", "category_id")}
            suspect |= {"price": price, "reason": reason(annotation, detection, names), "detection": detection}
            annotations.append(suspect | {"file_name": image["file_name"]})
        for detection, most in zip(detections, iou.amax(0) if labelled else [0] * len(detections), strict=True):
            if most < MET_IOU:
                why = f"not labelled: {names[detection['category_id']]}"
                missing.append(detection | {"reason": why, "file_name": image["file_name"]})
    annotations.sort(key=lambda s: s["price"], reverse=True)
    missing.sort(key=lambda s: s["score"], reverse=True)
    return {"annotations": annotations, "missing": missing}


def reason(annotation: dict, detection: dict | None, names: dict[int, str]) -> str:
    """What the detector finds where the annotation is."""
    name = names[annotation["category_id"]]
    if detection is None:
        return f"{name}: nothing found there"
    if detection["category_id"] != annotation["category_id"]:
        return f"{name}: found as {names[detection['category_id']]}"
    return f"{name}: found with an IoU of {detection['iou']:.2f}"


def draw_suspects(suspects: dict[str, list[dict]], images: Path, path: Path) -> None:
    """Draw crops around the first suspects: annotations red, detections blue, reason and rank above."""
    shown = [*chain(*(list(enumerate(suspects[kind][:count], 1)) for kind, count in SHEET.items()))]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure((2.6 * COLUMNS, 3 * max(rows, 1)), layout="constrained")
    for axis, (rank, suspect) in zip(figure.subplots(max(rows, 1), COLUMNS).flat, shown, strict=False):
        boxes = [(suspect["bbox"], "tab:red" if "price" in suspect else "tab:blue")]
        if suspect.get("detection"):
            boxes.append((suspect["detection"]["bbox"], "tab:blue"))
        axis.imshow(load_image(images / suspect["file_name"]).permute(1, 2, 0).numpy())
        for (x, y, w, h), color in boxes:
            axis.add_patch(Rectangle((x, y), w, h, fill=False, edgecolor=color, linewidth=2))
        x, y, w, h = suspect["bbox"]
        side = max(w, h) * (1 + 2 * MARGIN)
        axis.set_xlim(x + w / 2 - side / 2, x + w / 2 + side / 2)
        axis.set_ylim(y + h / 2 + side / 2, y + h / 2 - side / 2)
        value = f"price {suspect['price']:.1f}" if "price" in suspect else f"score {suspect['score']:.2f}"
        axis.set_title(f"{rank}. {value}\n{printable(suspect['reason'])}", fontsize=9)
    for axis in figure.axes:
        axis.set(xticks=[], yticks=[])
        axis.set_axis_on() if axis.images else axis.set_axis_off()
    figure.savefig(path, dpi=DPI)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="file written by train.py")
    parser.add_argument("--data", help="whose training split is searched; default: that of the training")
    parser.add_argument("--most", type=positive, default=200, help="suspects of each list in suspects.json")
    parser.add_argument("--out", type=Path, default=Path("runs/label-errors"), help="folder to write to")
    args = parser.parse_args(argv)
    detector, dataset, _ = load_with_data(args.weights, args.data, "train")
    make_folder(args.out)  # before the work
    suspects = find_suspects(detector.eval(), dataset, detect_dataset(detector, dataset, batch_size=8, workers=2))
    first = {kind: rows[: args.most] for kind, rows in suspects.items()}
    (args.out / "suspects.json").write_text(json.dumps(first, indent=1))
    draw_suspects(suspects, dataset.split.images, args.out / "suspects.png")
    for kind, rows in suspects.items():
        print(f"{kind}: {len(rows)}; the first: " + "; ".join(f"{s['file_name']} {s['reason']}" for s in rows[:3]))
    print(f"wrote {args.out / 'suspects.json'} and {args.out / 'suspects.png'}")


if __name__ == "__main__":
    run_script(main)
