"""Ahead-of-time compilation of the Triton kernels, which needs no GPU: benchmarks/compile.py.

A form of each kernel for every target; none may spill. All forms take minutes: pytest -m slow tests/test_compile.py.
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


def run_benchmark(path: Path, *flags: str, **environment: str) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """In another process, because the kernels may be interpreted in this one; and the binaries of its report."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "benchmarks.compile", "--out", str(path), *flags]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return process, json.loads(path.read_text())["binaries"] if path.exists() else []


def kernel_names() -> set[str]:
    source = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))


def test_every_kernel_compiles_and_fits(tmp_path, capsys):
    process, binaries = run_benchmark(tmp_path / "binaries.json", "--brief")
    with capsys.disabled():
        print(f"\n{process.stdout}")
    assert process.returncode == 0, process.stdout + process.stderr
    for target in aot.TARGETS:
        assert {b["kernel"] for b in binaries if b["target"] == target} == kernel_names()
    assert {b["inputs"] for b in binaries} == {"float32"}


@pytest.mark.slow
def test_every_form_for_every_target(tmp_path, capsys):
    process, everything = run_benchmark(tmp_path / "binaries.json")
    with capsys.disabled():
        print(f"\n{process.stdout}")
    assert process.returncode == 0, process.stdout + process.stderr
    for target in aot.TARGETS:
        binaries = [b for b in everything if b["target"] == target]
        assert {b["kernel"] for b in binaries} == kernel_names()
        pairs = [b["constants"] for b in binaries if b["kernel"] == "_pairs_kernel" and b["inputs"] == "float32"]
        forms = {(c["PRIOR"], c["CLS"], c["REG"]) for c in pairs}
        assert forms == set(product(CENTER_PRIORS, CLS_COSTS, REG_COSTS))
        assert {b["constants"]["RESCALE"] for b in binaries if b["kernel"] == "_sinkhorn_kernel"} == {True, False}
        for kernel in ("_pairs_kernel", *LOSSES):
            inputs = {b["inputs"] for b in binaries if b["kernel"] == kernel}
            assert inputs >= {"float32", "bfloat16", "float16", "unaligned"}, kernel


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        pytest.param({}, None, id="fits"),
        pytest.param({"error": "CompilationError: no"}, "CompilationError: no", id="does-not-compile"),
        pytest.param({"spills": 7}, "spills 7 registers", id="spills"),
        pytest.param({"shared_bytes": 228 * 1024 + 16}, "233,488 of 233,472 bytes of shared memory", id="shared"),
        pytest.param({"num_warps": 32}, "128 x 1024 of 65,536 registers", id="registers"),
        pytest.param({"target": "gfx942", "shared_bytes": 2**16}, None, id="amd-fits"),
        pytest.param({"target": "gfx942"}, "of 65,536 bytes of shared memory", id="amd-shared"),
    ],
)
def test_failures(changes, text):
    fields = {
        "target": "sm_90", "module": "kernels.some", "kernel": "_some_kernel", "inputs": "float32",
        "constants": {"BLOCK": 128}, "num_warps": 4, "specialization": "", "registers": 128,
        "shared_bytes": 228 * 1024, "spills": 0,
    }  # fmt: skip
    failures = aot.Binary(**(fields | changes)).failures()
    assert len(failures) == (text is not None)
    if text:
        assert failures[0].startswith("_some_kernel (BLOCK=128, float32) for ") and re.search(text, failures[0])


def test_interpreted_kernels_are_refused(tmp_path):
    process, _ = run_benchmark(tmp_path / "binaries.json", "--targets", "sm_90", TRITON_INTERPRET="1")
    assert process.returncode == 1 and "TRITON_INTERPRET" in process.stderr
