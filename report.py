"""The page of `eval.py --report`: what a detector misses and what it invents, in one file that needs no network.

Its numbers are hotcoco's, from an evaluation of all detections and one of those that predict.py shows: from the score
with the best F1 of their class on. Kinds of errors: TIDE, Bolya et al., ECCV 2020, arXiv 2008.08115.
"""

import base64
import html
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from string import Template

import numpy as np
import torch
from torchvision.ops import box_convert
from torchvision.transforms.v2.functional import resize, to_pil_image
from torchvision.utils import draw_bounding_boxes

from data import CocoDataset, printable

Outcomes = dict[int, list[tuple[str, dict]]]  # image id -> keys of COLOURS, and records of detections and objects
COLOURS = {"right": "#1f78ff", "false": "#ffd700", "missed": "#e41a1c"}
WORST, PICTURE_PX = 4, 640  # pictures of a section, and their longer side
ERRORS = {  # a detection may have an object from IoU 0.5 on
    "Cls": "the object has another class",
    "Loc": "IoU 0.1 to 0.5 with an object of the class",
    "Both": "IoU 0.1 to 0.5 with an object of another class",
    "Dupe": "another detection has the object",
    "Bkg": "IoU below 0.1 with every object",
    "Miss": "an object with none of these errors",
    "FP": "false detections, all of them",
    "FN": "missed objects, all of them",
}
PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Evaluation report</title><style>
body { font: 16px/1.5 sans-serif; color: #222; max-width: 1100px; margin: auto; padding: 0 16px 48px }
p, figure { overflow-wrap: anywhere; margin-bottom: 8px }
div { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 4px 8px; text-align: right; border-bottom: 1px solid #ddd; font-weight: normal }
th { max-width: 12em; overflow-wrap: break-word }
th:first-child { text-align: left; position: sticky; left: 0; background: #fff }
section { display: grid; gap: 16px; grid-template-columns: repeat(auto-fill, minmax(160px, 1fr)) }
section.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)) }
figure { margin: 0 }
img, svg { width: 100% }
path { fill: none; stroke: #bbb }
span { padding: 4px }
</style></head><body><h1>Evaluation report</h1>
$body
</body></html>
""")


def write_report(out: Path, dataset: CocoDataset, metrics: dict, every, shown) -> None:
    """Write report.html and its pictures to a folder; `every` and `shown` are hotcoco's evaluations, see above."""
    names = [html.escape(printable(name)) for name in dataset.class_names]
    numbers = " · ".join(f"{name} {number(value)}" for name, value in metrics.items() if name != "per_class")
    precision, outcomes = every.eval["precision"], outcomes_by_image(shown)
    body = f"""
<p>{html.escape(printable(dataset.split.annotations))}: {len(dataset)} images, {dataset.num_boxes} objects.</p>
<p>{numbers}</p>
<h2>AP by class and size</h2>
<p>Small: under 32 x 32 px, large: over 96 x 96 px.</p>
{class_table(names, metrics["per_class"], precision)}
<h2>Precision and recall</h2>
<p>At IoU 0.5: recall to the right, precision upwards, both from 0 to 1.</p>
{curves(names, precision[0, :, :, 0, 2])}
<h2>Confusion</h2>
<p>Objects in rows, detections in columns, matched at IoU 0.5.</p>
{confusion_table(names, shown, outcomes)}
<h2>Kinds of errors</h2>
<p>Among all detections, down to the lowest score, and what AP50 gains if all errors of a kind are mended.</p>
{error_table(every.tide_errors())}"""
    legend = " ".join(f'<span style="border: 3px solid {colour}">{kind}</span>' for kind, colour in COLOURS.items())
    for kind, what in (("missed", "objects"), ("false", "detections")):
        figures = pictures(out, kind, dataset, names, outcomes) or "None."
        body += f'\n<h2>Images with the most {kind} {what}</h2><p>{legend}</p><section class="wide">{figures}</section>'
    (out / "report.html").write_text(PAGE.substitute(body=body), "utf-8")


def number(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"


def table(head: Iterable[str], rows: Iterable[Iterable]) -> str:
    """Return a table; cells are HTML already, and the first of a row is its heading."""
    cells = ["".join(f"<th>{cell}</th>" for cell in head)]
    cells += [f"<th>{name}</th>" + "".join(f"<td>{cell}</td>" for cell in row) for name, *row in rows]
    return f"<div><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table></div>"


def class_table(names: list[str], per_class: dict, precision: np.ndarray) -> str:
    """precision: pycocotools' over IoU threshold, recall, class, area, detections per image."""
    rows = []
    for c, (name, row) in enumerate(zip(names, per_class.values(), strict=True)):
        sizes = [p[p > -1].mean() if (p > -1).any() else -1 for p in np.moveaxis(precision[:, :, c, 1:, 2], -1, 0)]
        rows.append((name, row["boxes"], *map(number, (row["AP"], row["AP50"], *sizes, row["F1"], row["score"]))))
    return table(("class", "objects", "AP", "AP50", "small", "medium", "large", "best F1", "from score"), rows)


def curves(names: list[str], precision: np.ndarray) -> str:
    """Return a drawing for each class; precision (101, C) is that at the recalls 0, 0.01 ... 1, -1 without objects."""
    figures = []
    for name, values in zip(names, precision.T, strict=True):
        line = "L".join(f"{x} {100 - 100 * p:.1f}" for x, p in enumerate(values) if p > -1)
        line = f'<path style="stroke: #1f78ff; stroke-width: 2" d="M{line}"/>' if line else ""
        frame = '<path d="M0 0H100V100H0ZM0 50H100M50 0V100"/>'
        figures.append(f'<figure><svg viewBox="-1 -1 102 102">{frame}{line}</svg>{name}</figure>')
    return f"<section>{''.join(figures)}</section>"


def outcomes_by_image(evaluation) -> Outcomes:
    """Return what became of every detection and object, except in regions to ignore, with a match from IoU 0.5 on."""
    status, outcomes = evaluation.image_diagnostics(), defaultdict(list)
    kinds = {"tp": "right", "fp": "false", "fn": "missed"}
    for side, coco in (("dt_status", evaluation.coco_dt), ("gt_status", evaluation.coco_gt)):
        for record in coco.dataset["annotations"]:
            if kind := kinds.get(status[side].get(record["id"])):
                outcomes[record["image_id"]].append((kind, record))
    return outcomes


def confusion_table(names: list[str], evaluation, outcomes: Outcomes) -> str:
    # hotcoco's matrix has detections in regions to ignore as false; outcomes are without them.
    found = [record for image in outcomes.values() for kind, record in image if kind != "missed"]
    truth = evaluation.coco_gt
    confusion = type(evaluation)(truth, truth.loadRes(found), "bbox").confusion_matrix()
    rows = []
    for name, *cells in zip([*names, "nothing there"], confusion["matrix"], confusion["normalized"], strict=True):
        shaded = '<span style="background: rgb(31 120 255 / {:.2f})">{}</span>'
        rows.append((name, *(shaded.format(share / 2, n) if n else "" for n, share in zip(*cells, strict=True))))
    return table(("", *names, "missed"), rows)


def error_table(errors: dict) -> str:
    gains, counts = errors["delta_ap"], errors["counts"]
    rows = ((f"{kind}: {text}", counts.get(kind, ""), f"{gains[kind]:.3f}") for kind, text in ERRORS.items())
    return table(("", "errors", "AP50 gain"), rows)


def pictures(out: Path, kind: str, dataset: CocoDataset, names: list[str], outcomes: Outcomes) -> str:
    """Draw the images with the most outcomes of a kind into files, and return them as figures."""
    places = np.argsort([image["id"] for image in dataset.images])  # hotcoco's image 1 is that with the lowest id
    counts = Counter(image for image, rows in outcomes.items() for k, _ in rows if k == kind)
    figures = []
    for n, (image, _) in enumerate(counts.most_common(WORST), 1):
        place = places[image - 1]
        pixels, target = dataset[place]
        picture = resize(pixels, None, max_size=PICTURE_PX, antialias=True)
        boxes = box_convert(torch.tensor([record["bbox"] for _, record in outcomes[image]]), "xywh", "xyxy")
        boxes *= picture.shape[2] / target["orig_size"][1]
        picture = draw_bounding_boxes(picture, boxes, colors=[COLOURS[k] for k, _ in outcomes[image]], width=3)
        to_pil_image(picture).save(path := out / f"report-{kind}-{n}.png")
        caption = html.escape(printable(dataset.images[place]["file_name"]))
        for outcome in COLOURS:
            classes = Counter(names[record["category_id"] - 1] for k, record in outcomes[image] if k == outcome)
            caption += f"<br>{outcome}: {', '.join(f'{count} {name}' for name, count in classes.items()) or 'none'}"
        source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        figures.append(f'<figure><img src="{source}" alt="">{caption}</figure>')
    return "".join(figures)
