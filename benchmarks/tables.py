"""Write the tables of README.md and docs/ from the files in benchmarks/results: python -m benchmarks.tables

A table stands between <!-- table: NAME --> and <!-- end -->, NAME is a key of TABLES.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parents[1]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
AUDITS = ("shapes", "bccd", "coco", "crowd")
CELLS = {"RBC": "red cells", "WBC": "white cells", "Platelets": "platelets"}
POINTS, AMBIGUOUS = {"positives_per_gt": "points / object"}, {"ambiguous_share": "ambiguous"}
SIZES, APS = {"APs": "AP small", "APm": "AP medium"}, {name: name for name in ("AP", "AP50", "AP75")}
FOUND = {name: name for name in ("first 1x", "first 2x", "first 3x")}
DIGITS = {"positives_per_gt": 1, "ambiguous_share": 2, "seconds": 0}


def results(pattern: str) -> Iterator[dict]:
    for path in sorted((ROOT / "benchmarks" / "results").glob(pattern)):
        yield json.loads(path.read_text())


def markdown(head: tuple, rows: list[tuple]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))


def runs() -> str:
    """Trainings, a row for each."""
    rows = []
    for run in (run for report in results("train-*.json") for run in report.get("runs", {"": report}).values()):
        if metrics := run.get("metrics"):
            numbers = f"{metrics['AP']:.3f}", f"{metrics['AP50']:.3f}", f"{metrics['total_s'] / 60:.1f}"
            place = run["device"], run["commit"][:7], run["date"][:10]
            rows.append((run.get("title") or run["command"], *numbers, *place))
    return markdown(("run", "AP", "AP50", "minutes", "machine", "commit", "date"), rows)


def costs(pattern: str, key: str) -> str:
    """Measured calls, a row for each."""
    rows = [
        (case, name, f"{row['ms_median']:,.1f}", f"{row['peak_mib']:,.1f}", report["device"], report["date"][:10])
        for report in results(pattern)
        for case, content in report[key].items()
        for name, row in content.get("rows", content).items()
        if "skipped" not in row
    ]
    return markdown(("inputs", "backend", "ms", "memory, MiB", "on", "measured"), rows)


def strategies() -> str:
    """Milliseconds and MiB of every strategy, a column for each number of boxes."""
    tables = []
    for report in results("strategies-*.json"):
        rows = {}
        for row in report["results"].values():
            for name, cost in row.items():
                rows.setdefault(name, [name]).append(f"{cost['ms_median']:,.0f} ms, {cost['peak_mib']:,.0f} MiB")
        tables.append(markdown((report["device"], *report["results"]), [*rows.values()]))
    return "\n\n".join(tables)


def seeds_table(rows: dict[str, list[dict]], columns: dict[str, str]) -> str:
    """Mean and standard deviation over the seeds of trainings; a column is a number or an AP of a class."""
    lines = []
    for title, seeds in rows.items():
        cells = []
        for column in columns:
            values = [seed[column] if column in seed else seed["per_class"][column] for seed in seeds]
            digits = DIGITS.get(column, 3)
            spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.{digits}f}{spread}")
        lines.append((title, *cells, len(seeds)))
    return markdown(("", *columns.values(), "seeds"), lines)


def compare(name: str, columns: dict[str, str], rows: slice = slice(None)) -> str:
    (report,) = results(f"compare-{name}.json")
    return seeds_table(dict(list(report["rows"].items())[rows]), columns)


def audits_table(reports: dict[str, dict]) -> str:
    """Audits of studies/audit.py side by side, by their names."""
    columns = ("changed", "cost", "residual", "gap")
    head = ("eps", "iterations", *(f"{name}: {column}" for name in reports for column in columns))
    rows = []
    for lines in zip(*(report["rows"] for report in reports.values()), strict=True):
        cells = []
        for r in lines:
            changed = f"{r['decoded']['rescaled']['changed_share']:.1%}"
            cells += [changed, f"{r['plan_cost_ratio']:.3f}", f"{r['residual']:.0e}", f"{r['median_gap']:.2%}"]
        rows.append((lines[0]["eps"], lines[0]["iterations"], *cells))
    counts = []
    for name, report in reports.items():
        plans = [sum(row[key] for row in report["rows"]) for key in ("unrounded", "violations")]
        sizes = report["images"], report["ground_truths"], report["positives"]
        counts.append((name, *sizes, report["images"] * len(report["rows"]), *plans))
    names = ("", "images", "objects", "positives", "plans", "unrounded", "violations")
    return f"{markdown(head, rows)}\n\n{markdown(names, counts)}"


TABLES = {
    "runs": runs,
    "assign": partial(costs, "assign-*.json", "workloads"),
    "losses": partial(costs, "losses-*.json", "results"),
    "strategies": strategies,
    "train_step": partial(costs, "train-step-*.json", "cases"),
    "crowds": partial(compare, "crowds", APS | SIZES | POINTS | AMBIGUOUS),
    "torchvision": partial(compare, "torchvision", APS | SIZES),
    "bccd": partial(compare, "bccd", APS | CELLS | POINTS, slice(9)),
    "supply": partial(compare, "bccd", APS | CELLS | POINTS, slice(9, None)),
    "augment": partial(compare, "augment", APS | CELLS),
    "augment_320": partial(compare, "augment-320", APS | CELLS),
    "augment_shapes": partial(compare, "augment-shapes", APS | SIZES),
    "labels_bccd": partial(compare, "labels-bccd", FOUND),
    "labels_shapes": partial(compare, "labels-shapes", FOUND),
    "studies": partial(compare, "studies", {"AP": "AP", "AP75": "AP75"} | POINTS | AMBIGUOUS),
    "audits": lambda: audits_table({name: next(results(f"audit-{name}.json")) for name in AUDITS}),
}


def filled(text: str) -> str:
    """The document with its tables written anew."""
    pattern = r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", text, flags=re.DOTALL)


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(filled(path.read_text()))
