"""Ahead-of-time compilation of the Triton kernels, which needs no GPU: benchmarks/compile.py.

Every kernel for every target as the default settings have it; on sm_90 none may spill. Every form of them takes
minutes: pytest -m slow tests/test_compile.py.
"""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from kernels.config import CENTER_PRIORS, CLS_COSTS, REG_COSTS

triton = pytest.importorskip("triton", reason="Triton is not installed")
if not hasattr(triton, "knobs"):
    pytest.skip(f"Triton {triton.__version__} cannot be asked what it would compile", allow_module_level=True)
try:
    CUOBJDUMP = triton.knobs.nvidia.cuobjdump.path
except RuntimeError:
    pytest.skip("this build of Triton comes without cuobjdump", allow_module_level=True)

from benchmarks import compile as aot  # noqa: E402

ROOT = Path(__file__).parents[1]


LOSSES = ("_focal_loss_kernel", "_focal_gradient_kernel", "_box_loss_kernel", "_box_gradient_kernel")


def compile_in_a_process(path: Path, *args: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """A process of its own, for here the kernels may be interpreted; and the binaries that it wrote down."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile", "--json", str(path), *args]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return process, json.loads(path.read_text())["binaries"] if path.exists() else []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("compile") / "binaries.json"
    return compile_in_a_process(path, "--brief", *aot.TARGETS)


def test_every_kernel_compiles_and_fits(run, capsys):
    process, _ = run
    with capsys.disabled():
        print(f"\n{process.stdout}")
    assert process.returncode == 0, process.stderr


def of_target(binaries: list[dict], target: str) -> list[dict]:
    """Its binaries, of every kernel there is."""
    found = [binary for binary in binaries if binary["target"] == target]
    source = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    assert {b["kernel"] for b in found} == set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))
    return found


def assert_every_form(binaries: list[dict]) -> None:
    pairs = {
        tuple(b["constants"][name] for name in ("PRIOR", "CLS", "REG"))
        for b in binaries
        if b["kernel"] == "_pairs_kernel" and b["inputs"] == "float32"
    }
    assert pairs == set(product(CENTER_PRIORS, CLS_COSTS, REG_COSTS))
    sinkhorn = [b for b in binaries if b["kernel"] == "_sinkhorn_kernel"]
    assert {b["constants"]["RESCALE"] for b in sinkhorn} == {True, False}
    for kernel in ("_pairs_kernel", "_sinkhorn_kernel", *LOSSES):
        inputs = {b["inputs"] for b in binaries if b["kernel"] == kernel}
        assert inputs >= {"float32", "bfloat16", "float16", "strided"}


def test_nothing_is_missing(run):
    for target in aot.TARGETS:
        assert {binary["inputs"] for binary in of_target(run[1], target)} == {"float32"}


@pytest.mark.slow
def test_every_form_for_every_target(tmp_path, capsys):
    process, binaries = compile_in_a_process(tmp_path / "binaries.json")
    with capsys.disabled():
        print(f"\n{process.stdout}")
    assert process.returncode == 0, process.stderr
    for target in aot.TARGETS:
        assert_every_form(of_target(binaries, target))


def binary(**changes) -> aot.Binary:
    fields = {
        "target": "sm_90", "module": "kernels.some", "kernel": "_some_kernel", "inputs": "float32",
        "constants": {"BLOCK": 128}, "num_warps": 4, "specialization": "", "registers": 128,
        "static_shared_bytes": 0, "dynamic_shared_bytes": 227 * 1024, "stack_bytes": 0, "spills": 0,
    }  # fmt: skip
    return aot.Binary(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        pytest.param({}, None, id="all-that-fits"),
        pytest.param({"stack_bytes": 16}, "0 instructions access 16 bytes of stack", id="stack"),
        pytest.param({"stack_bytes": 16, "spills": 7}, "7 instructions access 16 bytes of stack", id="spills"),
        pytest.param({"static_shared_bytes": 16}, "232,464 bytes of shared memory, a block .* 232,448", id="shared"),
        pytest.param({"num_warps": 32}, "128 x 1024 registers, a block .* 65,536", id="registers"),
        pytest.param(
            {"target": "gfx942", "dynamic_shared_bytes": 2**16, "stack_bytes": 8, "spills": 2}, None, id="amd-may-spill"
        ),
        pytest.param({"target": "gfx942"}, "a block of threads has 65,536", id="amd-shared"),
    ],
)
def test_complaints(changes, sentence):
    found = aot.complaints(binary(**changes))
    if sentence is None:
        assert found == []
    else:
        assert len(found) == 1 and found[0].startswith("_some_kernel (BLOCK=128, float32) for ")
        assert re.search(sentence, found[0])


def test_interpreted_kernels_are_refused():
    command = [sys.executable, "-m", "benchmarks.compile", "--targets", "sm_90"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 1 and "TRITON_INTERPRET" in process.stderr
