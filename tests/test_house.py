"""The house: imports follow DESIGN's direction, sizes stay readable, and README's count of lines is right."""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
GROUND = {"errors", "images", "kernels"}
MAY_IMPORT = {  # room -> the rooms below it
    "errors": set(),
    "images": {"errors"},
    "kernels": set(),
    "data": GROUND,
    "model": GROUND,
    "training": GROUND | {"data", "model"},
    "data/__main__": GROUND | {"data", "training"},  # a script: a data set is checked with the settings of a training
    "report": GROUND | {"data"},
    "eval": GROUND | {"data", "model", "training", "report"},
    "train": GROUND | {"data", "model", "training", "eval"},
    "predict": GROUND | {"data", "model", "training", "eval"},
    "export": GROUND | {"data", "model", "training", "eval"},
}
PRODUCT = set(MAY_IMPORT)
MAY_IMPORT |= {"benchmarks": PRODUCT | {"tests"}, "studies": PRODUCT | {"tests", "benchmarks"}}
ROOMS = set(MAY_IMPORT) | {"tests"}
READING_PATH = (
    "kernels/assign_reference.py", "kernels/assign_torch.py", "model/head.py", "model/losses.py", "model/detector.py",
    "train.py",
)  # fmt: skip


def files() -> list[Path]:
    folders = [ROOT / room for room in MAY_IMPORT if (ROOT / room).is_dir()]
    return [p.relative_to(ROOT) for p in (*ROOT.glob("*.py"), *(p for folder in folders for p in folder.rglob("*.py")))]


def room_of(path: Path) -> str:
    script = path.with_suffix("").as_posix()
    return script if script in MAY_IMPORT else path.parts[0]


def imported(path: Path) -> set[str]:
    """Packages and rooms that a file imports anywhere, in functions as well; a relative import stays in its room."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_no_import_runs_upwards():
    upwards = {str(p): imported(p) & ROOMS - MAY_IMPORT[room_of(p)] - {room_of(p)} for p in files()}
    assert not {path: rooms for path, rooms in upwards.items() if rooms}
    assert imported(Path("train.py")) > {"data", "model"} and len(files()) > 50  # the search finds something


def test_kernels_import_only_torch_and_triton():
    others = {str(p): imported(p) - {"torch", "triton", *sys.stdlib_module_names} for p in files()}
    assert not {path: names for path, names in others.items() if names and path.startswith("kernels")}


def test_kernels_assign_to_flat_targets():
    """Triton 3.6 cannot compile a kernel with (a, b), c = ..."""
    nodes = [n for path in (ROOT / "kernels").glob("*_triton.py") for n in ast.walk(ast.parse(path.read_text()))]
    kernels = [n for n in nodes if any("triton.jit" in ast.unparse(d) for d in getattr(n, "decorator_list", ()))]
    targets = [t for n in kernels for node in ast.walk(n) if isinstance(node, ast.Assign) for t in node.targets]
    nested = [
        ast.unparse(t) for t in targets if isinstance(t, ast.Tuple) and any(isinstance(e, ast.Tuple) for e in t.elts)
    ]
    assert len(targets) > 200 and not nested


def test_files_of_the_product_are_readable():
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in files() if room_of(path) in PRODUCT}
    assert not {name: count for name, count in lines.items() if count > 350}


def test_reading_path_has_the_lines_that_the_readme_states():
    lines = sum(len((ROOT / path).read_text().splitlines()) for path in READING_PATH)
    stated = re.search(r"reading path[^\n]*?([\d,]+) lines", (ROOT / "README.md").read_text(), re.IGNORECASE)
    assert stated, f"README.md does not say that the reading path has about {lines:,} lines"
    assert abs(int(stated[1].replace(",", "")) - lines) <= 0.03 * lines, f"the reading path has {lines:,} lines"
