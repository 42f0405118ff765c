"""Ahead-of-time compilation of the Triton kernels, which needs no GPU: benchmarks/compile.py.

A form of each kernel for one NVIDIA and one AMD GPU; none may spill. All forms for all take minutes: pytest -m slow.
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


def kernel_names() -> set[str]:
    source = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    return set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))


@pytest.mark.parametrize(
    ("targets", "flags"),
    [(["sm_90", "gfx942"], ["--brief"]), pytest.param(list(aot.TARGETS), [], marks=pytest.mark.slow)],
    ids=["brief", "every-form-for-every-target"],
)
def test_kernels_compile_and_fit(targets, flags, tmp_path):
    """In another process, because the kernels are interpreted in this one."""
    path = tmp_path / "binaries.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile", "--out", str(path), "--targets", *targets, *flags]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    for target in targets:
        binaries = [b for b in json.loads(path.read_text())["binaries"] if b["target"] == target]
        inputs = {name: {b["inputs"] for b in binaries if b["kernel"] == name} for name in kernel_names()}
        assert {b["kernel"] for b in binaries} == inputs.keys()
        if flags:
            assert all(kinds == {"float32"} for kinds in inputs.values())
            continue
        pairs = [b["constants"] for b in binaries if b["kernel"] == "_pairs_kernel" and b["inputs"] == "float32"]
        forms = {(c["PRIOR"], c["CLS"], c["REG"]) for c in pairs}
        assert forms == set(product(CENTER_PRIORS, CLS_COSTS, REG_COSTS))
        assert {b["constants"]["RESCALE"] for b in binaries if b["kernel"] == "_sinkhorn_kernel"} == {True, False}
        for kernel in ("_pairs_kernel", *LOSSES):
            assert inputs[kernel] >= {"float32", "bfloat16", "float16", "unaligned"}, kernel


def test_failures():
    """A binary at the limits of its GPU, and what is over them."""
    fits = {
        "target": "sm_90", "module": "kernels.some", "kernel": "_some_kernel", "inputs": "float32",
        "constants": {"BLOCK": 128}, "num_warps": 4, "specialization": "", "registers": 128,
        "shared_bytes": 228 * 1024, "spills": 0,
    }  # fmt: skip
    assert not aot.Binary(**fits).failures()
    assert not aot.Binary(**fits | {"target": "gfx942", "shared_bytes": 2**16}).failures()
    for change, text in (
        ({"error": "CompilationError: no"}, "CompilationError: no"),
        ({"spills": 7}, "spills 7 registers"),
        ({"shared_bytes": 228 * 1024 + 16}, "233,488 of 233,472 bytes of shared memory"),
        ({"num_warps": 32}, "128 x 1024 of 65,536 registers"),
        ({"target": "gfx942"}, "of 65,536 bytes of shared memory"),
    ):
        (failure,) = aot.Binary(**fits | change).failures()
        assert failure.startswith("_some_kernel (BLOCK=128, float32) for ") and text in failure


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        aot.main([])
