"""What the parts cost, measured only after they have been shown to be right."""

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def environment(device: torch.device) -> dict[str, str | int]:
    """What a measurement was made on and with, and when."""
    here = str(Path(__file__).parent)
    about = {
        "device": _device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "torchvision": _version("torchvision"), "timm": _version("timm"), "triton": _version("triton"),
        "pycocotools": _version("pycocotools"), "python": platform.python_version(),
        "commit": _first_line("git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    if device.type == "cuda" and torch.version.cuda:
        about["driver"] = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return about


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _first_line(*command: str) -> str:
    """What a command prints first; "unknown" when it fails, as git does outside a checkout."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
