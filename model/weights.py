"""One file for a trained detector: safetensors weights and a JSON string of metadata; from the disk or the hub."""

import dataclasses
import json
import os
from pathlib import Path

import huggingface_hub
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.overrides import TorchFunctionMode

from errors import UserError
from kernels import OTAConfig

from .detector import Detector, DetectorConfig
from .fields import Rule, first_flaw, integer, list_of, number, one_of_type, optional

FORMAT, HUB, HUB_FILE = "ota-triton/1", "hf://", "ota.safetensors"
FLOATS = torch.float32, torch.float16, torch.bfloat16, torch.float64  # any of them is taken for any other


def write_file(path: Path, data: bytes) -> None:
    """Write all or nothing: after a crash `path` holds the old bytes or all of the new. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)


def make_folder(folder: Path) -> None:
    """Make the folder unless it is there. Raises UserError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error}; name another folder with --out") from error


OBJECT = one_of_type(dict, "an object")
SCORE = number(0, 1)
NAME: Rule = lambda v: isinstance(v, str) and v.strip() != "", "a name"
# A file's metadata, which choose no address of the network. DetectorConfig and OTAConfig have rules for their fields.
RULES: dict[str, Rule] = {
    "format": (lambda value: value == FORMAT, f"{FORMAT!r}, which this version reads"),
    "architecture": OBJECT,
    "architecture.backbone": (lambda v: isinstance(v, str) and timm.is_model(v), f"a model of timm {timm.__version__}"),
    "architecture.ota": OBJECT,
    "architecture.image_size": one_of_type(list, "a list of two sides"),
    "normalisation": OBJECT,
    "normalisation.mean": list_of(number(-1000, 1000), "three numbers from -1000 to 1000", 3),
    "normalisation.std": list_of(number(0.001, 1000), "three numbers from 0.001 to 1000", 3),
    "class_names": optional(list_of(NAME, "a list of distinct names")),
    "category_ids": optional(list_of(integer(-(2**63), 2**63 - 1), "a list of distinct whole numbers")),
    "cuts": optional((lambda v: isinstance(v, list) and all(map(SCORE[0], v)), "a list of numbers from 0 to 1")),
    "data": optional(one_of_type(str, "the name of a data set")),
    "box": optional(one_of_type(str | None, "the name of a kind of boxes")),
    "training": optional(OBJECT),
    "training.metrics": optional(one_of_type(dict | None, "an object")),
    "training.metrics.AP": optional(one_of_type(int | float, "a number")),
}


def save_weights(path: Path, detector: Detector, metadata: dict) -> None:
    """Write all or nothing. `metadata` is JSON, to which the detector's own is added. Raises OSError."""
    normalisation = {name: getattr(detector, name).flatten().tolist() for name in ("mean", "std")}
    about = {"format": FORMAT, "architecture": dataclasses.asdict(detector.config), "normalisation": normalisation}
    about["cuts"] = detector.cuts
    tensors = {name: t.detach().cpu().contiguous() for name, t in detector.state_dict().items()}
    write_file(Path(path), save(tensors, metadata={"ota": json.dumps(about | metadata)}))


def load(weights: str | Path) -> Detector:
    """Return a detector for evaluation, on the CPU, from train.py's file or hf://user/repo[/file]. Raises UserError."""
    return load_weights(local_file(weights))[0]


def is_on_hub(weights: str | Path) -> bool:
    return str(weights).startswith(HUB)


def local_file(weights: str | Path) -> Path:
    """Return a path; download a file of the hub, ota.safetensors unless named, into its cache. Raises UserError."""
    if not is_on_hub(weights):
        return Path(weights)
    user, repo, file = (*str(weights).removeprefix(HUB).split("/", 2), "", "")[:3]
    try:
        return Path(huggingface_hub.hf_hub_download(f"{user}/{repo}", file or HUB_FILE))
    except Exception as error:  # network, hub, disk or name
        remedy = "Check name and connection (HF_TOKEN for private repositories), or give the path of a downloaded file."
        wanted = f"no {file or HUB_FILE} for {weights} (hf://user/repo or hf://user/repo/file)"
        raise UserError(f"the hub gives {wanted}: {type(error).__name__}: {error}\n{remedy}") from error


def load_weights(path: Path) -> tuple[Detector, dict]:
    """Return the detector in evaluation mode, on the CPU, and its metadata. Raises UserError.

    Tensors are compared by name, shape and type first, so a file takes no more memory than the weights in it.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no weights file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("ota")
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no safetensors file, or it is truncated: {error}") from error
    if header is None:
        raise UserError(f"{path} holds tensors, but no detector of this project, as train.py writes it")
    try:
        metadata, config = _parse(header)
        with _Weightless():
            needed = _shapes(Detector(config).state_dict())
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise UserError(f"{path} has metadata that this version cannot read: {error}") from error
    stored = _shapes(tensors)
    if names := sorted(n for n in stored.keys() | needed.keys() if stored.get(n) != needed.get(n)):
        what = f"{path} does not fit the architecture in its metadata: {len(names)} tensors differ, {names[0][:100]!r}"
        raise UserError(f"{what} first: {stored.get(names[0], 'missing')}, needed: {needed.get(names[0], 'none')}")
    detector = Detector(config)  # the first one lacks the numbers of buffers that no file holds
    detector.load_state_dict(tensors)
    for name, tensor in detector.state_dict().items():
        if not tensor.isfinite().all() or (name.endswith("running_var") and tensor.min() < 0):
            raise UserError(f"{path} has values in {name!r} that are NaN, infinite or a negative variance")
    for name in ("mean", "std"):  # the file's: timm's defaults may change
        getattr(detector, name).copy_(torch.tensor(metadata["normalisation"][name]).view(3, 1, 1))
    for name in ("class_names", "category_ids", "cuts"):
        setattr(detector, name, metadata.setdefault(name, getattr(detector, name)))
        if len(metadata[name]) != config.num_classes:
            raise UserError(f"{path} has {len(metadata[name])} {name} for {config.num_classes} classes")
    return detector.eval(), metadata


def _shapes(state: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{list(t.shape)} {'float' if t.dtype in FLOATS else t.dtype}" for name, t in state.items()}


def _parse(header: str) -> tuple[dict, DetectorConfig]:
    metadata = json.loads(header)
    architecture = metadata.get("architecture") if isinstance(metadata, dict) else None
    if isinstance(architecture, dict) and "ota" not in architecture:  # names before: strategy, and assigner for ota
        architecture |= {"ota": architecture.get("assigner"), "assigner": architecture.pop("strategy", "ota")}
    if flaw := first_flaw(metadata, RULES):
        raise ValueError(flaw)
    ota = _build(OTAConfig, "architecture.ota", architecture["ota"])
    new = {"ota": ota, "image_size": tuple(architecture["image_size"])}
    return metadata, _build(DetectorConfig, "architecture", architecture | new)


def _build(config: type, name: str, values: dict):
    if unknown := values.keys() - {field.name for field in dataclasses.fields(config)}:
        raise ValueError(f"{name} has the unknown field {min(unknown)[:100]!r}")
    try:
        return config(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from error


class _Weightless(TorchFunctionMode):
    """Give parameters a shape and a type, but no memory. torch.device("meta") would also take the numbers that timm's
    models compute as tensors while they are built."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        makers = torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn
        return function(*args, **(kwargs or {}) | ({"device": "meta"} if function in makers else {}))


def init_weights(detector: Detector, path: Path, class_names: list[str]) -> str:
    """Start `detector` from a file's weights, normalisation and statistics of norms; return a sentence about them.

    The class layer of the head stays as it is if the file's classes are not `class_names`. Raises UserError.
    """
    other, metadata = load_weights(path)
    for name in ("backbone", "channels", "head_convs"):
        theirs, ours = (getattr(config, name) for config in (other.config, detector.config))
        if theirs != ours:
            raise UserError(f"{path} (--init) is another network: {name} is {theirs}, not {ours}")
    names = metadata["class_names"]
    weights = {n: t for n, t in other.state_dict().items() if names == class_names or not n.startswith("head.cls.")}
    detector.load_state_dict(weights, strict=False)  # frozen norms count no batches
    detector.mean.copy_(other.mean)
    detector.std.copy_(other.std)
    differ = f"; the class layer of the head starts afresh: its {len(names)} classes are not these {len(class_names)}"
    return f"weights from {path}" + (differ if names != class_names else f", which has the same {len(names)} classes")
