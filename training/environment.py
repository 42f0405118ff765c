"""Versions of the machine, and an estimate of whether a step fits into its memory."""

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from model import Detector

PROBE_PX = 256
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def environment(device: torch.device) -> dict[str, str | int]:
    """Return device, versions, commit and date, as JSON."""
    about = {"device": _device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    for package in ("torchvision", "timm", "triton", "pycocotools", "hotcoco"):
        about[package] = next((found.version for found in distributions(name=package)), "none")
    commit = _first_line("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about |= {"python": platform.python_version(), "commit": commit, "date": date}
    if device.type == "cuda" and torch.version.cuda:
        about["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return about


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: *(.*)", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return names[0] if names else platform.processor() or platform.machine()


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"  # as git outside a checkout


def step_bytes(detector: Detector, pixels: int, optimizer: str, bf16: bool) -> int:
    """Estimate a step's memory for images of `pixels` in all, in proportion to a small image: parameters, gradients,
    optimizer state and activations, without losses and the convolutions' work space."""
    kept, training = {}, detector.training

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):  # in eval mode no statistic changes
        detector.eval().predict_raw(torch.zeros(1, 3, PROBE_PX, PROBE_PX, device=detector.mean.device))
    detector.train(training)
    weights = {tensor.untyped_storage().data_ptr() for tensor in detector.state_dict().values()}
    activations = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
    parameters = sum(parameter.nbytes for parameter in detector.parameters())
    copies = {"sgd": 3, "adamw": 4}[optimizer]  # parameters, gradients and the optimizer's state
    return int(activations * pixels / PROBE_PX**2 * (0.5 if bf16 else 1)) + parameters * copies


def available_bytes(device: torch.device) -> float:
    """Return the free memory of a GPU, or a rank's share of the machine's; infinite where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    known = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")] if hasattr(os, "sysconf") else []
    if CGROUP_LIMIT.exists() and (limit := CGROUP_LIMIT.read_text().strip()).isdigit():
        known.append(int(limit))
    return min(known, default=float("inf")) / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def memory_warning(detector: Detector, images: int, sizes: np.ndarray, optimizer: str, bf16: bool) -> str:
    """Return a warning where a step of `images` images needs more memory than this rank has, else "".
    sizes (n, 2): height and width of the data set's images once resized, px"""
    height, width = sizes[sizes.prod(1).argmax()]
    needed = step_bytes(detector, images * int(height * width), optimizer, bf16)
    available = available_bytes(detector.mean.device)
    what = f"a step of {images} images of up to {height} x {width} px needs some {needed / 2**30:.0f} GiB of memory"
    remedy = "a smaller --image-size or --batch-size, or --accumulate, needs less"
    return f"warning: {what}, and {available / 2**30:.0f} are available; {remedy}" if needed > available else ""
