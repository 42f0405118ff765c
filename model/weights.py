"""One file for a trained detector: safetensors weights and a JSON string of metadata; from the disk or the hub."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import huggingface_hub
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.overrides import TorchFunctionMode

from errors import UserError
from kernels import OTAConfig

from .backbone import BackboneError
from .detector import Detector, DetectorConfig
from .fields import Rule, first_flaw, number, one_of_type, optional

FORMAT = "ota-triton/1"
HUB = "hf://"
HUB_FILE = "ota.safetensors"
FLOATS = ("F32", "F16", "BF16", "F64")  # as safetensors calls them; any is taken for any other


def write_file(path: Path, data: bytes) -> None:
    """Temporary file, sync, rename, sync of the folder: after a crash `path` holds the old bytes or all of the new."""
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
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _distinct(is_valid: Callable[[object], bool], words: str) -> Rule:
    return (
        lambda values: isinstance(values, list) and all(map(is_valid, values)) and len({*values}) == len(values),
        f"a list of distinct {words}",
    )


def _three(low: float, high: float) -> Rule:
    is_valid, words = number(low, high)
    return lambda v: isinstance(v, list) and len(v) == 3 and all(map(is_valid, v)), f"three of {words}"


OBJECT = one_of_type(dict, "an object")
# The metadata of a file. DetectorConfig and OTAConfig have the rules for their own fields.
RULES: dict[str, Rule] = {
    "format": (lambda value: value == FORMAT, f"{FORMAT!r}, which this version reads"),
    "architecture": OBJECT,
    "architecture.backbone": (  # a file chooses no address of the network
        lambda value: isinstance(value, str) and timm.is_model(value),
        f"a model that timm {timm.__version__} has by name",
    ),
    "architecture.ota": OBJECT,
    "architecture.image_size": one_of_type(list, "a list of two sides"),
    "normalisation": OBJECT,
    "normalisation.mean": _three(-1000, 1000),
    "normalisation.std": _three(0.001, 1000),
    "class_names": optional(_distinct(lambda name: isinstance(name, str) and name.strip() != "", "names")),
    "category_ids": optional(_distinct(lambda value: type(value) is int, "whole numbers")),
    "data": optional(one_of_type(str, "the name of a data set")),
    "box": optional(one_of_type(str | None, "the name of a kind of boxes")),
    "training": optional(OBJECT),
    "training.metrics": optional(one_of_type(dict | None, "an object")),
    "training.metrics.AP": optional(one_of_type(int | float, "a number")),
}


class WeightsError(UserError):
    """The file is no detector of this project; the message names the file and the reason."""


def save_weights(path: Path, detector: Detector, metadata: dict) -> None:
    """Whole or absent, see `write_file`. Raises OSError.

    `metadata` must be JSON; the architecture and the normalisation are added to it.
    """
    path = Path(path)
    metadata = {
        "format": FORMAT,
        "architecture": dataclasses.asdict(detector.config),
        "normalisation": {name: getattr(detector, name).flatten().tolist() for name in ("mean", "std")},
        **metadata,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in detector.state_dict().items()}
    write_file(path, save(tensors, metadata={"ota": json.dumps(metadata)}))


def init_weights(detector: Detector, path: Path, class_names: list[str]) -> str:
    """Start `detector` from the weights in a file; returns what was done, in a sentence. Raises WeightsError.

    The last convolution of the class tower stays as it is where the file's classes are not `class_names`.
    Normalisation statistics come from the file; so do those of batch norms, frozen or not.
    """
    other, metadata = load_weights(path)
    differences = [
        f"{name} {getattr(other.config, name)} there, {getattr(detector.config, name)} here"
        for name in ("backbone", "channels", "head_convs")
        if getattr(other.config, name) != getattr(detector.config, name)
    ]
    if differences:
        raise WeightsError(f"{path} (--init) is another network: {'; '.join(differences)}")
    same_classes = metadata["class_names"] == class_names
    weights = {n: t for n, t in other.state_dict().items() if same_classes or not n.startswith("head.cls.")}
    left = detector.load_state_dict(weights, strict=False).missing_keys
    left = [name for name in left if not name.startswith("head.cls.") and not name.endswith("num_batches_tracked")]
    if left:
        raise WeightsError(f"{path} (--init) lacks {', '.join(left[:5])}")
    for name in ("mean", "std"):
        getattr(detector, name).copy_(getattr(other, name))
    if same_classes:
        return f"weights from {path}, whose {len(class_names)} classes are these"
    return (
        f"weights from {path}; the class layer of the head starts afresh, for its {len(metadata['class_names'])} "
        f"classes are not these {len(class_names)}"
    )


def read_metadata(path: Path) -> dict:
    """Return what `save_weights` was given. Raises WeightsError."""
    with _opened(path) as file:
        return _metadata(path, file)[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """A file whose header has been read. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no safetensors file, or it is truncated: {error}") from error


def _metadata(path: Path, file: safe_open) -> tuple[dict, DetectorConfig]:
    """The metadata, and the architecture that they name. Raises WeightsError."""
    header = (file.metadata() or {}).get("ota")
    if header is None:
        raise WeightsError(f"{path} holds tensors but no detector of this project: train.py writes what is needed")
    try:
        metadata = json.loads(header)
        architecture = metadata.get("architecture") if isinstance(metadata, dict) else None
        if isinstance(architecture, dict) and isinstance(architecture.get("assigner"), dict):  # names of before
            architecture |= {"ota": architecture["assigner"], "assigner": architecture.pop("strategy", "ota")}
        if flaw := first_flaw(metadata, RULES):
            raise ValueError(flaw)
        architecture = metadata["architecture"]
        ota = _build(OTAConfig, "architecture.ota", architecture["ota"])
        image_size = tuple(architecture["image_size"])
        config = _build(DetectorConfig, "architecture", architecture | {"ota": ota, "image_size": image_size})
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, a number of thousands of digits
        raise WeightsError(f"{path} has metadata that this version cannot read: {error}") from error
    return metadata, config


def _build(config: type, name: str, values: dict):
    """A configuration of the fields in the section `name` of the metadata. Raises ValueError."""
    unknown = values.keys() - {field.name for field in dataclasses.fields(config)}
    if unknown:
        raise ValueError(f"{name} has the unknown field {min(unknown)[:100]!r}")
    try:
        return config(**values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from error


class _Weightless(TorchFunctionMode):
    """Whatever parameters are made of has a shape and a type, but takes no memory.

    torch.device("meta") would also take the numbers that many of timm's versions compute as tensors while they build.
    """

    MAKERS = {torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return function(*args, **kwargs | ({"device": "meta"} if function in self.MAKERS else {}))


def load(weights: str | Path) -> Detector:
    """A trained detector in evaluation mode, on the CPU, with its class names: all that `Detector.predict` needs.

    weights: a file that train.py wrote, or `hf://user/repo`, `hf://user/repo/file` on the Hugging Face hub.
    Raises WeightsError.
    """
    return load_weights(local_file(weights))[0]


def is_on_hub(weights: str | Path) -> bool:
    return str(weights).startswith(HUB)


def local_file(weights: str | Path) -> Path:
    """The path itself, or that of a file of the hub, which is downloaded unless it is in the hub's cache (HF_HOME).

    Without a file name it is ota.safetensors. Raises WeightsError.
    """
    if not is_on_hub(weights):
        return Path(weights)
    user, repo, file = (*str(weights).removeprefix(HUB).split("/", 2), "", "")[:3]
    if not user or not repo:
        raise WeightsError(f"{weights} is no name on the hub; wanted hf://user/repo or hf://user/repo/file")
    try:
        return Path(huggingface_hub.hf_hub_download(f"{user}/{repo}", file or HUB_FILE))
    except Exception as error:  # of the network, the hub, the disk, the name
        raise WeightsError(
            f"{weights}: {file or HUB_FILE} cannot be had from the hub: {type(error).__name__}: {error}\n"
            "Check the name and the connection (HF_TOKEN for a private repository), or download the file and name "
            "its path."
        ) from error


def load_weights(path: Path) -> tuple[Detector, dict]:
    """The detector in evaluation mode, on the CPU, and its metadata. Raises WeightsError.

    Tensors are compared by name, shape and type before the network is built: a file takes no more memory than the
    weights that it holds, and asks the network for nothing.
    """
    path = Path(path)
    with _opened(path) as file:
        metadata, config = _metadata(path, file)
        there = {name: file.get_slice(name) for name in file.keys()}
        there = {name: _kind(t.get_shape(), t.get_dtype() in FLOATS, t.get_dtype()) for name, t in there.items()}
        try:
            with _Weightless():
                needed = Detector(config).state_dict()
        except BackboneError as error:
            raise WeightsError(f"{path} has metadata that this version cannot read: architecture: {error}") from error
        needed = {name: _kind(t.shape, t.is_floating_point(), "I64") for name, t in needed.items()}
        differences = sorted(name for name in there.keys() | needed.keys() if there.get(name) != needed.get(name))
        if differences:
            name = differences[0]
            raise WeightsError(
                f"{path} does not fit the architecture that its own metadata name: {len(differences)} tensors differ, "
                f"{name[:100]!r} first: {there.get(name, 'missing')} there, {needed.get(name, 'none')} needed"
            )
        tensors = {name: file.get_tensor(name) for name in needed}
    detector = Detector(config)  # not the one above, some of whose buffers are in no file
    detector.load_state_dict(tensors)
    for name, tensor in detector.state_dict().items():
        if not tensor.isfinite().all() or (name.endswith("running_var") and tensor.min() < 0):
            raise WeightsError(f"{path} has values in {name!r} that are NaN, infinite or a negative variance")
    for name in ("mean", "std"):  # the file's own: timm's defaults may change
        getattr(detector, name).copy_(torch.tensor(metadata["normalisation"][name]).view(3, 1, 1))
    for name in ("class_names", "category_ids"):
        values = metadata.setdefault(name, getattr(detector, name))
        if len(values) != config.num_classes:
            raise WeightsError(f"{path} has {len(values)} {name} for {config.num_classes} classes")
        setattr(detector, name, values)
    return detector.eval(), metadata


def _kind(shape: Sequence[int], is_float: bool, other: str) -> str:
    return f"{list(shape)} {'float' if is_float else other}"
