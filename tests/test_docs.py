"""Every code block of README.md, CONTRIBUTING.md and docs/ runs, in order; trainings run in a small form."""

import argparse
import importlib.util
import re
import runpy
import shlex
import shutil
import sys
import tomllib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributed.run import get_args_parser

import eval as eval_script
import kernels
import predict
import train
from data import generate_shapes
from data.shapes import shapes_folder
from kernels import OTAConfig, PointGrid, ota_assign
from tests.support.detectors import EXPORT_FLAGS
from tests.support.embedding import names_of
from tests.support.runs import CPU, DETECTOR
from tests.support.sets import copy_as_yolo, generate_crowds

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {page: re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S) for page in PAGES}
SUPERVISION = importlib.util.find_spec("supervision")
SMALL = (*DETECTOR, *CPU, "--image-size", 64, "--batch-size", 2, "--steps", 1)
SCRIPTS = {  # script -> its module and the flags that make it small
    "train.py": (train, SMALL),
    "eval.py": (eval_script, CPU),
    "predict.py": (predict, ("--device", "cpu")),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, call, exported):
    """A folder with everything that the commands name."""
    folder = tmp_path_factory.mktemp("docs")
    generate_shapes(folder / "my-data", train_images=4, val_images=4, size_px=96)
    copy_as_yolo(folder / "my-data", folder / "my-yolo-data")
    for name in ("path/to/bccd", "datasets/coco", f"datasets/{shapes_folder()}"):
        shutil.copytree(folder / "my-data", folder / name)
    for half in ("train", "val"):
        (folder / f"datasets/coco/{half}").rename(folder / f"datasets/coco/{half}2017")
        annotations = folder / f"datasets/coco/annotations/instances_{half}.json"
        annotations.rename(annotations.with_stem(f"instances_{half}2017"))
    generate_crowds(folder / "datasets/crowdhuman", 96)
    for name in ("photo.jpg", "folder/one.jpg", "more/deep/two.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 70), "grey").save(folder / name)
    if SUPERVISION:
        import supervision

        with supervision.VideoSink(str(folder / "film.mp4"), supervision.VideoInfo(96, 96, 5)) as film:
            film.write_frame(np.zeros((96, 96, 3), np.uint8))
    call(train, "--data", folder / "my-data", *SMALL, "--out", folder / "run")
    shutil.copy(folder / "run" / "ota.safetensors", folder)
    shutil.copy(exported / "ota.onnx", folder)
    for run in ("first", "audit-shapes", "audit-bccd"):
        shutil.copytree(folder / "run", folder / "runs" / run)
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run(page, workspace, call, monkeypatch):
    monkeypatch.chdir(workspace)
    monkeypatch.setenv("OTA_DATA", str(workspace / "datasets"))
    monkeypatch.setitem(sys.modules, "ota_triton", kernels)  # the wheel has the same under this name
    for language, code in BLOCKS[page]:
        assert language in ("python", "sh"), f"a block of {language!r}"
        if language == "python":
            if SUPERVISION or "import supervision" not in code:
                exec(code, {})
            continue
        for line in code.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                run_command(words, call, workspace, monkeypatch)


def run_command(words: list[str], call, workspace: Path, monkeypatch) -> None:
    program, *arguments = words
    if program == "torchrun":
        launch = get_args_parser().parse_args(arguments)
        program, arguments = "python", [launch.training_script, *launch.training_script_args]
    if program == "python" and arguments[0] == "-m":
        check_module_flags(arguments[1], arguments[2:], monkeypatch)
    elif program == "python" and arguments[0] == "export.py":
        assert arguments == ["export.py", *EXPORT_FLAGS]  # the fixture `exported` has run it
    elif program == "python":
        module, small = SCRIPTS[arguments[0]]
        assert (ROOT / arguments[0]).is_file()
        call(module, *reduced(arguments[1:], small, workspace))
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.fullmatch(r"\.(?:\[(\w+)\])?", arguments[-1])
        assert arguments[0] == "install" and named and (named[1] is None or named[1] in extras)
    else:
        check_pytest(program, arguments)


def reduced(arguments: list[str], small: tuple, workspace: Path) -> list:
    """Return the arguments with `small` instead of theirs; every training goes into a new folder."""
    arguments = shlex.split(re.sub(r"--(steps|epochs|out) \S+", "", shlex.join(arguments)))
    number = len(list(workspace.glob("out-*")))
    return [*arguments, *small, "--out", workspace / f"out-{number}"]


def check_module_flags(module: str, arguments: list[str], monkeypatch) -> None:
    """Have the flags parsed, and stop there: tests of their own run these modules in a small form."""
    if module == "benchmarks.tables":  # has no flags
        assert arguments == []
        return

    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def parse_only(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with monkeypatch.context() as patch, warnings.catch_warnings(), pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        patch.setattr(sys, "argv", [module, *arguments])
        warnings.simplefilter("ignore", RuntimeWarning)  # of runpy: other tests have imported the module
        runpy.run_module(module, run_name="__main__")


def check_pytest(program: str, arguments: list[str]) -> None:
    assert program == "pytest"
    assert all((ROOT / word).exists() for word in arguments if word.startswith("tests"))
    markers = {arguments[i + 1] for i, word in enumerate(arguments) if word == "-m"}
    assert markers <= {"slow", "gpu"}


def predictions() -> tuple:
    generator = torch.Generator().manual_seed(0)
    strides, sizes = (8, 16), ((9, 12), (5, 6))
    class_maps = [torch.randn(2, 3, *size, generator=generator).to(DEVICE) for size in sizes]
    distance_maps = [30 * torch.rand(2, 4, *size, generator=generator).to(DEVICE) for size in sizes]
    gt_boxes = [torch.tensor([[4.0, 4, 50, 40], [30, 20, 90, 70]]).to(DEVICE), torch.zeros(0, 4, device=DEVICE)]
    gt_labels = [torch.tensor([1, 2], device=DEVICE), torch.zeros(0, dtype=torch.int64, device=DEVICE)]
    return class_maps, distance_maps, strides, gt_boxes, gt_labels


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "fullgraph"])
def test_assignment_for_another_detector(compiled):
    """docs/embedding.md's function gives what ota_assign gives for the same points, in one graph too."""
    class_maps, distance_maps, strides, gt_boxes, gt_labels = predictions()
    assign = names_of("def assign(")["assign"]
    if compiled:
        assign = torch.compile(assign, fullgraph=True, backend="eager")
    match = assign(class_maps, distance_maps, strides, gt_boxes, gt_labels)

    grid = PointGrid.for_image((72, 96), strides)
    logits = torch.cat([m.reshape(2, 3, -1) for m in class_maps], 2).transpose(1, 2)
    left, top, right, bottom = torch.cat([m.reshape(2, 4, -1) for m in distance_maps], 2).unbind(1)
    x, y = grid.points(DEVICE).unbind(1)
    boxes = torch.stack([x - left, y - top, x + right, y + bottom], -1)
    offsets = torch.tensor([0, 2, 2], device=DEVICE)
    expected = ota_assign(logits, boxes, gt_boxes[0], gt_labels[0], offsets, grid, OTAConfig())
    assert (match.gt_index[0] >= 0).any() and (match.gt_index[1] == -1).all()
    assert all(torch.equal(one, other) for one, other in zip(match, expected, strict=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    """Files that a page links to exist, and headings too."""
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve()
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)", file.read_text(), re.M)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target
