"""Compile every Triton kernel in every form that its launcher asks for, without a GPU.

    python -m benchmarks.compile [--targets sm_90 ...] [--brief] [--out FILE]    # Triton 3.6 or later

The launchers run on CPU tensors. A hook records what Triton would compile, before anything is compiled or launched,
and a pool of processes compiles it. Exits with status 1 when a form does not compile, spills registers, or needs more
shared memory or registers than a block of threads can have.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.measure import write_report
from benchmarks.tables import markdown
from kernels import OTAConfig, PointGrid, assign, box_loss, focal_loss, ota_assign
from kernels.config import CENTER_PRIORS, CLS_COSTS, REG_COSTS
from tests.support.scenes import Scene, make_scene
from training.environment import environment

# GPU, and what a block of threads can have: bytes of shared memory, from sm_90 on with the 1 KiB that CUDA reserves;
# registers of 32 bits. CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; Hopper Tuning
# Guide, 1.4.2.4; AMD GPU specifications (rocm.docs.amd.com), LDS and VGPR file of a compute unit.
TARGETS = {
    "sm_75": (GPUTarget("cuda", 75, 32), 64 * 1024, 64 * 1024),
    "sm_80": (GPUTarget("cuda", 80, 32), 163 * 1024, 64 * 1024),
    "sm_89": (GPUTarget("cuda", 89, 32), 99 * 1024, 64 * 1024),
    "sm_90": (GPUTarget("cuda", 90, 32), 228 * 1024, 64 * 1024),
    "sm_100": (GPUTarget("cuda", 100, 32), 228 * 1024, 64 * 1024),
    "sm_120": (GPUTarget("cuda", 120, 32), 99 * 1024, 64 * 1024),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 64 * 1024, 128 * 1024),
}


@dataclass
class Binary:
    """A form of a kernel that a launch needs, and what the compiled form takes."""

    target: str
    module: str
    kernel: str
    inputs: str  # name of the first inputs that need it
    constants: dict[str, str | int | bool]  # the kernel's tl.constexpr parameters
    num_warps: int
    specialization: str  # Triton's JSON of types, constants, alignments and options
    registers: int = 0  # of a thread; AMD: vector registers
    shared_bytes: int = 0  # of a block of threads; from sm_90 on with the 1 KiB that CUDA reserves if it has any
    spills: int = 0  # NVIDIA: instructions that access the stack; AMD: vector registers
    error: str = ""

    def failures(self) -> list[str]:
        gpu, shared_bytes, registers = TARGETS[self.target]
        threads = self.num_warps * gpu.warp_size
        texts = {
            self.error: self.error,
            f"spills {self.spills} registers or accesses to them": self.spills,
            f"takes {self.shared_bytes:,} of {shared_bytes:,} bytes of shared memory": self.shared_bytes > shared_bytes,
            f"takes {self.registers} x {threads} of {registers:,} registers": self.registers * threads > registers,
        }
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        form = f"{self.kernel} ({constants}, {self.inputs}) for {self.target}"
        return [f"{form}: {text}" for text, holds in texts.items() if holds]


def every_form(brief: bool) -> Iterator[tuple[str, Scene, OTAConfig]]:
    """Names of inputs, inputs and settings that together make the launchers ask for every form; `brief`: one a kernel.

    Triton compiles anew for integers that are 1 or divisible by 16 and for addresses that 16 does not divide. As in a
    COCO batch, N and C of the first inputs are divisible, B and G are not.
    """
    scene = make_scene(PointGrid.for_image((128, 192)), (4, 3, 2), 80)
    if brief:
        yield "float32", scene, OTAConfig()
        return
    for prior, cls_cost, reg_cost, rescale in product(CENTER_PRIORS, CLS_COSTS, REG_COSTS, (True, False)):
        yield "float32", scene, OTAConfig(center_prior=prior, cls_cost=cls_cost, reg_cost=reg_cost, rescale=rescale)
    for dtype in (torch.bfloat16, torch.float16):
        lower = scene._replace(logits=scene.logits.to(dtype), boxes=scene.boxes.to(dtype))
        yield str(dtype).removeprefix("torch."), lower, OTAConfig()
    odd = make_scene(PointGrid.for_image((100, 150)), (4, 3, 2), 91)
    unaligned = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in odd[:5]]
    one = make_scene(PointGrid((8,), ((1, 1),)), (1,), 1)
    for prior in CENTER_PRIORS:
        yield "unaligned", odd._make([*unaligned, odd.grid]), OTAConfig(center_prior=prior)
        yield "ones", one, OTAConfig(iterations=1, top_q=1, fixed_k=1, center_prior=prior, radius=1)


def launch(scene: Scene, config: OTAConfig) -> None:
    """Launch the kernels of an assignment, of both losses and of their gradients."""
    ota_assign(*scene, config, backend="triton")
    logits, boxes = (tensor.detach().requires_grad_() for tensor in scene[:2])
    gt_index = torch.zeros(boxes.shape[:2], dtype=torch.int64)
    for ignored in (None, gt_index == 0):
        focal_loss(logits, gt_index, scene.gt_labels, ignored, backend="triton").backward()
    iou = torch.zeros(gt_index.shape)
    sum(box_loss(boxes, logits[..., 0], gt_index, iou, scene.gt_boxes, backend="triton")).backward()


def set_target(target: str) -> None:
    """Let Triton's driver answer as if the GPU were present, each target as a device, because caches are per device."""
    answers = {"device": lambda: target, "stream": lambda device: 0, "target": lambda: TARGETS[target][0]}
    triton.runtime.driver.set_active(SimpleNamespace(**{f"get_current_{name}": f for name, f in answers.items()}))


def record_binaries(target: str, brief: bool) -> list[Binary]:
    """Run the launchers as if on a GPU, and record what Triton would compile."""
    binaries: dict[str, Binary] = {}

    def record(inputs: str, *, fn, compile, **_) -> bool:
        constants = {p.name: compile["constants"][(p.num,)] for p in fn.jit_function.params if p.is_constexpr}
        key = compile["specialization_data"]
        binaries.setdefault(key, Binary(target, fn.module, fn.name, inputs, constants, compile["num_warps"], key))
        return True  # neither compile nor launch

    set_target(target)
    assign.COMPILED = False  # accept tensors on a CPU
    for inputs, scene, config in every_form(brief):
        triton.knobs.runtime.jit_cache_hook = partial(record, inputs)
        launch(scene, config)
    triton.knobs.runtime.jit_cache_hook = None
    return list(binaries.values())


def compile_binary(binary: Binary) -> Binary:
    set_target(binary.target)
    try:
        compiled = getattr(import_module(binary.module), binary.kernel).preload(binary.specialization)
    except Exception as error:
        binary.error = f"{type(error).__name__}: {error}"
        return binary
    read = read_cubin if "cubin" in compiled.asm else read_amdgcn
    binary.registers, static_bytes, binary.spills = read(compiled.asm, binary)
    binary.shared_bytes = static_bytes + compiled.metadata.shared
    return binary


def read_cubin(asm: dict[str, str | bytes], binary: Binary) -> tuple[int, int, int]:
    """Registers, bytes of static shared memory and spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(rf"Function {binary.kernel}:\s+REG:(\d+) STACK:\d+ SHARED:(\d+)", text)
    return int(usage[1]), int(usage[2]), len(re.findall(r"\b(?:STL|LDL)\b", text))


def read_amdgcn(asm: dict[str, str | bytes], _: Binary) -> tuple[int, int, int]:
    note = dict(re.findall(r"^ +\.(\w+): +(\d+)$", asm["amdgcn"], re.MULTILINE))
    return tuple(int(note[name]) for name in ("vgpr_count", "group_segment_fixed_size", "vgpr_spill_count"))


def table(binaries: list[Binary]) -> str:
    """A row for each binary, with those constants of its kernel that vary."""
    fields, rows = ("inputs", "target", "num_warps", "registers", "shared_bytes", "spills"), []
    for binary in sorted(binaries, key=lambda b: (b.kernel, str(b.constants), b.inputs)):
        forms = [other.constants for other in binaries if other.kernel == binary.kernel]
        varying = [f"{n}={v}" for n, v in binary.constants.items() if any(form[n] != v for form in forms)]
        rows.append((binary.kernel, " ".join(varying), *(getattr(binary, field) for field in fields)))
    return markdown(("kernel", "constants", *fields), rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--brief", action="store_true", help="one form of each kernel")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled, unset it")
    recorded = [binary for target in args.targets for binary in record_binaries(target, args.brief)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        binaries = list(pool.map(compile_binary, recorded))
    failures = [text for binary in binaries for text in binary.failures()]
    print(table(binaries), f"{len(binaries)} binaries, {len(failures)} failures", *failures, sep="\n")
    rows = [{name: value for name, value in asdict(b).items() if name != "specialization"} for b in binaries]
    write_report(args.out, environment(torch.device("cpu")) | {"binaries": rows, "failures": failures})
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
