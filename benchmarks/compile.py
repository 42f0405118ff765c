"""Every Triton kernel in every form that a launcher can ask for, compiled for GPUs that are not there.

    python -m benchmarks.compile [--targets sm_90 ...] [--brief sm_80 ...] [--json FILE]    # Triton 3.6 or later

The launchers run on CPU tensors. Triton's own launch code decides what to compile, a hook takes that order before
anything is compiled or launched, and a pool of processes carries it out. Ends with status 1 when a kernel is never
launched, does not compile, spills on sm_90, or takes more shared memory or registers than a block of threads can have.
"""

import argparse
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import kernels
from kernels import OTAConfig, PointGrid
from kernels.assign_triton import ota_assign_triton
from kernels.box_loss_triton import box_gradient, box_sums
from kernels.config import CENTER_PRIORS, CLS_COSTS, REG_COSTS
from kernels.focal_triton import focal_gradient, focal_sum
from tests.support.scenes import Scene, make_scene
from training.environment import environment


class Target(NamedTuple):
    """A GPU, and what one block of threads can have there."""

    gpu: GPUTarget
    shared_bytes: int
    reserved_bytes: int  # shared memory that cuobjdump counts although it comes on top of that limit
    registers: int  # of 32 bits, over all threads


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": shared memory and registers per thread
# block; CUDA keeps 1 KiB more for itself (Hopper Tuning Guide, 1.4.2.4). gfx942: AMD GPU specifications
# (rocm.docs.amd.com), LDS and VGPR file of a compute unit.
TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, 0, 64 * 1024),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, 1024, 64 * 1024),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024, 1024, 64 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, 0, 128 * 1024),
}

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pretend(target: str) -> None:
    """Answer what Triton asks its driver before a launch, for a GPU that is not there."""
    driver = SimpleNamespace(
        get_current_device=lambda: target,  # Triton keeps a cache per device, so every target is a device of its own
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGETS[target].gpu,
    )
    triton.runtime.driver.set_active(driver)


@dataclass
class Order:
    """One binary that launches need; `inputs` names the first that did."""

    target: str
    module: str
    kernel: str
    inputs: str
    constants: dict[str, str | int | bool]  # the kernel's tl.constexpr parameters
    num_warps: int
    specialization: str  # Triton's own JSON of types, constants, alignments and options

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants.items())
        return f"{self.kernel} ({constants}, {self.inputs}) for {self.target}"


@dataclass
class Binary(Order):
    """What one thread (registers, stack) or one block of threads (shared memory) of a binary takes."""

    registers: int  # AMD: vector registers
    static_shared_bytes: int
    dynamic_shared_bytes: int
    stack_bytes: int
    spills: int  # NVIDIA: instructions that access the stack; AMD: vector registers spilled
    scalar_registers: int | None = None  # AMD only
    scalar_spills: int | None = None  # AMD only: kept in lanes of vector registers


def assign(scene: Scene, config: OTAConfig) -> None:
    ota_assign_triton(scene, config)


def losses(scene: Scene, gt_index: Tensor, ignored: Tensor | None) -> None:
    """Both losses and their gradients; gt_index (B, N)."""
    logits, boxes, gt_boxes, gt_labels, _, _ = scene
    points, one = logits[..., 0], torch.ones(())
    focal_sum(logits, gt_index, gt_labels, ignored)
    focal_gradient(one, logits, gt_index, gt_labels, ignored)
    iou = torch.zeros(gt_index.shape)
    box_sums(boxes, points, gt_index, iou, gt_boxes)
    box_gradient(torch.ones(2), boxes, points, gt_index, iou, gt_boxes)


def unaligned(tensor: Tensor) -> Tensor:
    """The same numbers at an address that 16 does not divide."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


def brief_calls() -> Iterator[tuple[str, Callable[[], None]]]:
    """Every kernel once, for float32 predictions of 80 classes; one prior has a kernel of its own."""
    scene = make_scene(PointGrid.for_image((128, 192)), (4, 3, 2), 80)
    for prior in ("closest", "none"):
        yield "float32", partial(assign, scene, OTAConfig(center_prior=prior))
    yield "float32", partial(losses, scene, torch.zeros(scene.logits.shape[:2], dtype=torch.int64), None)


def every_call() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names of inputs, and calls that together make the launchers ask for all that they can ask for.

    Triton compiles anew for integers that are 1 or divisible by 16 and for pointers that are not aligned. As in a
    COCO batch, N and C are divisible and B and G are neither; "strided" is the general case, "ones" the most special.
    """
    for inputs, scene, config in every_assignment():
        yield inputs, partial(assign, scene, config)
    for inputs, scene in every_prediction():
        gt_index = torch.zeros(scene.logits.shape[:2], dtype=torch.int64)
        for ignored in (None, gt_index == 0):
            yield inputs, partial(losses, scene, gt_index, ignored)


def every_prediction() -> Iterator[tuple[str, Scene]]:
    """The losses make their inputs contiguous, so that "strided" is an odd number of classes at an odd address."""
    grid = PointGrid.for_image((128, 192))
    for inputs, dtype in FLOATS.items():
        scene = make_scene(grid, (4, 3, 2), 80)
        yield inputs, scene._replace(logits=scene.logits.to(dtype), boxes=scene.boxes.to(dtype))
    for inputs, num_classes in (("strided", 91), ("ones", 1)):
        scene = make_scene(grid, (4, 3, 2), num_classes)
        yield inputs, Scene(*map(unaligned, scene[:5]), grid)


def every_assignment() -> Iterator[tuple[str, Scene, OTAConfig]]:
    scene = make_scene(PointGrid.for_image((128, 192)), (4, 3, 2), 80)
    for prior, cls_cost, reg_cost, rescale in product(CENTER_PRIORS, CLS_COSTS, REG_COSTS, (True, False)):
        yield "float32", scene, OTAConfig(center_prior=prior, cls_cost=cls_cost, reg_cost=reg_cost, rescale=rescale)
    for inputs, dtype in FLOATS.items():
        yield inputs, scene._replace(logits=scene.logits.to(dtype), boxes=scene.boxes.to(dtype)), OTAConfig()
    odd = make_scene(PointGrid.for_image((100, 150)), (4, 3, 2), 7)
    strided = Scene(*(torch.stack([tensor] * 3, -1)[..., 1] for tensor in odd[:5]), odd.grid)
    one = make_scene(PointGrid((8,), ((1, 1),)), (1,), 1)
    for prior in CENTER_PRIORS:
        yield "strided", strided, OTAConfig(center_prior=prior)
        yield "ones", one, OTAConfig(iterations=1, top_q=1, fixed_k=1, center_prior=prior, radius=1)


def take_orders(target: str, calls: Iterator[tuple[str, Callable[[], None]]]) -> list[Order]:
    """Run the launchers as if on a GPU, and take what Triton would compile."""
    orders: dict[str, Order] = {}

    def take(inputs: str, *, fn, compile, **_) -> bool:
        constants = {p.name: compile["constants"][(p.num,)] for p in fn.jit_function.params if p.is_constexpr}
        data = compile["specialization_data"]
        orders.setdefault(data, Order(target, fn.module, fn.name, inputs, constants, compile["num_warps"], data))
        return True  # do not compile, and so do not launch

    pretend(target)
    for inputs, call in calls:
        triton.knobs.runtime.jit_cache_hook = partial(take, inputs)
        call()
    triton.knobs.runtime.jit_cache_hook = None
    return list(orders.values())


def find_kernels() -> set[tuple[str, str]]:
    """Module and name of every kernel in the folder kernels/."""
    modules = [import_module(f"kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
    functions = [f.fn for module in modules for f in vars(module).values() if isinstance(f, triton.JITFunction)]
    return {(fn.__module__, fn.__name__) for fn in functions if fn.__name__.endswith("_kernel")}


def carry_out(order: Order) -> Binary:
    """Compile, then read what the binary takes. RuntimeError when it does not compile."""
    pretend(order.target)
    try:
        compiled = getattr(import_module(order.module), order.kernel).preload(order.specialization)
    except Exception as error:  # of any kind, and some kinds cannot be sent to another process
        raise RuntimeError(f"{type(error).__name__}: {error}") from None
    taken = read_cubin(compiled.asm, order) if "cubin" in compiled.asm else read_amdgcn(compiled.asm)
    return Binary(**vars(order), dynamic_shared_bytes=compiled.metadata.shared, **taken)


def read_cubin(asm: dict[str, str | bytes], order: Order) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(rf"Function {order.kernel}:\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    registers, stack, shared = map(int, usage.groups())
    shared = max(shared - TARGETS[order.target].reserved_bytes, 0)  # not counted where a kernel needs none
    spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
    return {"registers": registers, "static_shared_bytes": shared, "stack_bytes": stack, "spills": spills}


def read_amdgcn(asm: dict[str, str | bytes]) -> dict[str, int]:
    note = dict(re.findall(r"^ +\.(\w+): +(\d+)$", asm["amdgcn"], re.MULTILINE))
    names = {
        "registers": "vgpr_count", "scalar_registers": "sgpr_count", "spills": "vgpr_spill_count",
        "scalar_spills": "sgpr_spill_count", "static_shared_bytes": "group_segment_fixed_size",
        "stack_bytes": "private_segment_fixed_size",
    }  # fmt: skip
    return {name: int(note[theirs]) for name, theirs in names.items()}


def complaints(binary: Binary) -> list[str]:
    """What forbids this binary, in sentences."""
    target, found = TARGETS[binary.target], []
    threads = binary.num_warps * target.gpu.warp_size
    shared = binary.static_shared_bytes + binary.dynamic_shared_bytes
    if binary.target == "sm_90" and (binary.stack_bytes or binary.spills):
        found.append(f"spills: {binary.spills} instructions access {binary.stack_bytes} bytes of stack, expected none")
    if shared > target.shared_bytes:
        found.append(f"takes {shared:,} bytes of shared memory, a block of threads has {target.shared_bytes:,}")
    if binary.registers * threads > target.registers:
        found.append(f"takes {binary.registers} x {threads} registers, a block of threads has {target.registers:,}")
    return [f"{binary} {what}." for what in found]


def compile_all(orders: list[Order]) -> tuple[list[Binary], list[str]]:
    """The binaries, on all CPU cores, and what went wrong, in sentences."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        futures = [pool.submit(carry_out, order) for order in orders]
    errors = [future.exception() for future in futures]
    binaries = [future.result() for future, error in zip(futures, errors, strict=True) if error is None]
    wrong = [f"{order} fails. {error}" for order, error in zip(orders, errors, strict=True) if error is not None]
    return binaries, wrong + [sentence for binary in binaries for sentence in complaints(binary)]


def print_table(binaries: list[Binary]) -> None:
    """A line per binary, with those constants of its kernel that vary, and a line per target."""
    row = "{:17} {:23} {:8} {:6} {:>5} {:>4} {:>5} {:>13} {:>5} {:>6} {:>11}".format
    print(row(*"kernel configuration inputs target warps regs sgprs shared_bytes stack spills sgpr_spills".split()))
    for b in sorted(binaries, key=lambda b: (b.kernel, list(map(str, b.constants.values())), b.inputs)):
        forms = [other.constants for other in binaries if other.kernel == b.kernel]
        varying = {name: value for name, value in b.constants.items() if any(form[name] != value for form in forms)}
        configuration = " ".join(value if isinstance(value, str) else f"{n}={value}" for n, value in varying.items())
        shared = f"{b.static_shared_bytes} + {b.dynamic_shared_bytes}"
        taken = (b.registers, b.scalar_registers, shared, b.stack_bytes, b.spills, b.scalar_spills)
        print(row(b.kernel, configuration, b.inputs, b.target, b.num_warps, *map(str, taken)).replace("None", "   -"))
    print("shared_bytes: static + dynamic; spills: instructions that access the stack, on AMD registers")
    for target in dict.fromkeys(b.target for b in binaries):
        own = [b for b in binaries if b.target == target]
        spilling, most = sum(b.stack_bytes + b.spills > 0 for b in own), max(b.registers for b in own)
        print(f"{target}: {len(own)} binaries, {spilling} of them spill, up to {most} registers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--brief", nargs="+", choices=TARGETS, default=[], help="every kernel only once for these")
    parser.add_argument("--json", type=Path, help="where to write the table")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled, unset it")

    start = time.perf_counter()
    calls = {target: brief_calls if target in args.brief else every_call for target in args.targets + args.brief}
    orders = [order for target, call in calls.items() for order in take_orders(target, call())]
    never = sorted(find_kernels() - {(order.module, order.kernel) for order in orders})
    binaries, wrong = compile_all(orders)
    wrong += [f"{module}.{kernel} is launched by no call: can any input reach it?" for module, kernel in never]
    print_table(binaries)
    print(f"{len(binaries)} of {len(orders)} binaries in {time.perf_counter() - start:.0f} s, {len(wrong)} complaints")
    if args.json:
        rows = [{k: v for k, v in vars(b).items() if k != "specialization"} for b in binaries]
        report = {"environment": environment(torch.device("cpu")), "binaries": rows, "wrong": wrong}
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
