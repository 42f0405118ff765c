"""The machine and the versions that a run or a measurement was made with."""

import datetime
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def environment(device: torch.device) -> dict[str, str | int]:
    """Return device, versions, commit and date, as JSON."""
    about = {"device": _device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    about |= {package: _version(package) for package in ("torchvision", "timm", "triton", "pycocotools")}
    about["python"] = platform.python_version()
    about["commit"] = _first_line("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")
    about["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
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
    """Return the first line that a command prints, "unknown" when it fails, as git does outside a checkout."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
