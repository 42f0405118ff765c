"""What other projects get: the wheel, kernels/ as the package ota_triton and nothing else; a repository of the Hub."""

import email
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import kernels
from kernels.assign import HAS_TRITON
from tests.support.backends import ORDINARY, scene_of

pytest.importorskip("setuptools", "77", reason="setuptools 77 builds the wheel: pip install -e '.[test]'")

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# With the installed copy and, once that has assigned, with the repository's folder in the same process.
ASSIGN = f"""
import sys
import torch
import ota_triton

def assign(package):
    logits, boxes = torch.zeros(1, 4, 2), torch.tensor([[[0.0, 0, 16, 16]]]).expand(1, 4, 4)
    inputs = logits, boxes, torch.tensor([[1.0, 1, 15, 13]]), torch.tensor([1]), torch.tensor([0, 1])
    grid, config = package.PointGrid((8,), ((2, 2),)), package.OTAConfig(iterations=3)
    return [
        package.ota_assign(*(x.to("{DEVICE}") for x in inputs), grid, config, backend=backend).gt_index.tolist()
        for backend in backends
    ]

backends = sys.argv[2:]
sys.path.append(sys.argv[1])
found = assign(ota_triton)
import kernels
assert kernels.ota_assign is not ota_triton.ota_assign and assign(kernels) == assign(ota_triton) == found
print(ota_triton.__file__, found)
"""


def test_wheel_is_one_package_that_assigns_beside_the_folder(tmp_path):
    """In a process that finds the repository after the wheel, so that both copies register their Triton operators."""
    source = tmp_path / "source"  # a copy, as setuptools builds inside of the source
    left_out = shutil.ignore_patterns(".*", "build", "datasets", "runs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = [*pip, "wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")  # unpacking installs it anywhere
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {path.name for path in (ROOT / "kernels").glob("*.py")}
    assert names == {f"ota_triton/{name}" for name in {*modules, "py.typed"}}

    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (about,) = (tmp_path / "installed").glob("*.dist-info/METADATA")
    about = email.message_from_string(about.read_text())
    assert about["Version"] == kernels.__version__
    page = about.get_payload()
    assert page.strip() == (ROOT / "docs" / "embedding.md").read_text().strip()
    assert not re.findall(r"\]\((?!https?:)", page)  # a link to another file would lead nowhere
    backends = ["torch", "triton"] if HAS_TRITON else ["torch"]
    interpreter = {"TRITON_INTERPRET": "1"} if DEVICE == "cpu" else {}
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")} | interpreter
    command = [sys.executable, "-c", ASSIGN, ROOT, *backends]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, _, found = done.stdout.strip().partition(" ")
    assert Path(path).parent == tmp_path / "installed" / "ota_triton"
    expected = [[0, 0, 0, 0]]  # the points predict the same, so that the box has all of them
    assert found == str([expected] * len(backends))


def test_hub_repository_loads_as_the_hub_loads_it(tmp_path, monkeypatch):
    """A variant is a module whose name is the `id` of its metadata, and so is the namespace of its operators."""
    subprocess.run([sys.executable, ROOT / "hub" / "build.py", tmp_path], check=True)
    scene = scene_of([ORDINARY])
    for backend in ("cpu", "cuda", "rocm"):
        variant = tmp_path / "build" / f"torch-{backend}"
        about = json.loads((variant / "metadata.json").read_text())
        assert about["backend"] == {"type": backend}
        assert {*about["digest"]["files"], "metadata.json"} == {path.name for path in variant.iterdir()}
        spec = importlib.util.spec_from_file_location(about["id"], variant / "__init__.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, about["id"], module)
        spec.loader.exec_module(module)
        match, expected = (package.ota_assign(*scene, backend="torch") for package in (module, kernels))
        assert torch.equal(match.gt_index, expected.gt_index) and hasattr(getattr(torch.ops, about["id"]), "assign")
    assert not [name for name in kernels.__all__ if f"`{name}`" not in (tmp_path / "README.md").read_text()]
