"""Ahead-of-time compilation of the Triton kernels, which needs no GPU: benchmarks/compile.py.

One form of each kernel for one GPU; none may spill. All forms for all GPUs take minutes: pytest -m slow.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
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


@pytest.mark.parametrize(
    ("targets", "flags"),
    [(["sm_90"], ["--brief"]), pytest.param(list(aot.TARGETS), [], marks=pytest.mark.slow)],
    ids=["brief", "every-form-for-every-target"],
)
def test_kernels_compile_and_fit(targets, flags, tmp_path):
    """In another process, because the kernels are interpreted in this one."""
    path = tmp_path / "binaries.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.compile", "--out", str(path), "--targets", *targets, *flags]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    source = "\n".join(path.read_text() for path in (ROOT / "kernels").glob("*.py"))
    for target in targets:
        binaries = [b for b in json.loads(path.read_text())["binaries"] if b["target"] == target]
        assert {b["kernel"] for b in binaries} == set(re.findall(r"^def (\w+_kernel)\(", source, re.MULTILINE))
        if flags:
            continue
        assert {b["inputs"] for b in binaries} >= {"float32", "bfloat16", "float16", "unaligned"}
        constants = [b["constants"] for b in binaries]
        forms = {(c["PRIOR"], c["CLS"], c["REG"]) for c in constants if {"PRIOR", "CLS", "REG"} <= c.keys()}
        assert forms == set(product(CENTER_PRIORS, CLS_COSTS, REG_COSTS))
        assert {c["RESCALE"] for c in constants if "RESCALE" in c} == {True, False}


def test_failures(monkeypatch):
    """A binary at the limits of its GPU, and what is over them; interpreted kernels are refused."""
    fits = aot.Binary("sm_90", "kernels.some", "_some_kernel", "float32", {"BLOCK": 128}, 4, "", 128, 228 * 1024)
    assert not fits.failures()
    for change, text in (
        (dict(error="CompilationError: no"), "CompilationError: no"),
        (dict(spills=7), "spills 7 registers"),
        (dict(shared_bytes=228 * 1024 + 16), "233,488 of 233,472 bytes of shared memory"),
        (dict(num_warps=32), "128 x 1024 of 65,536 registers"),
    ):
        (failure,) = replace(fits, **change).failures()
        assert failure.startswith("_some_kernel (BLOCK=128, float32) for ") and text in failure
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit, match="TRITON_INTERPRET is set"):
        aot.main([])
