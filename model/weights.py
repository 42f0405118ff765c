"""One file for a trained detector: safetensors weights and a JSON string of metadata; from the disk or the hub."""

import dataclasses
import json
from pathlib import Path

import huggingface_hub
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from kernels import OTAConfig

from .checkpoint import write_file
from .detector import Detector, DetectorConfig

FORMAT = "ota-triton/1"
HUB = "hf://"
HUB_FILE = "ota.safetensors"


class WeightsError(ValueError):
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
    """What `save_weights` was given. Raises WeightsError."""
    return json.loads(_read(path)[0])


def _read(path: Path, with_tensors: bool = False) -> tuple[str, dict[str, torch.Tensor]]:
    """The JSON in a file's header, and its tensors. Raises WeightsError."""
    if not path.is_file():
        raise WeightsError(f"there is no weights file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get("ota")
            tensors = {name: file.get_tensor(name) for name in file.keys()} if with_tensors else {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is no safetensors file, or it is truncated: {error}") from error
    if header is None:
        raise WeightsError(f"{path} holds tensors but no detector of this project: train.py writes what is needed")
    return header, tensors


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
    """The detector in evaluation mode, on the CPU, and its metadata. Raises WeightsError."""
    path = Path(path)
    header, tensors = _read(path, with_tensors=True)
    try:
        metadata = json.loads(header)
        if metadata["format"] != FORMAT:
            raise WeightsError(f"{path} has format {metadata['format']!r}, this version reads {FORMAT!r}")
        architecture = metadata["architecture"]
        config = architecture | {
            "assigner": OTAConfig(**architecture["assigner"]),
            "image_size": tuple(architecture["image_size"]),
        }
        detector = Detector(DetectorConfig(**config))
        for name in ("mean", "std"):  # the file's own: timm's defaults may change
            getattr(detector, name).copy_(torch.tensor(metadata["normalisation"][name]).view(3, 1, 1))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path} has metadata that this version cannot read: {error!r}") from error
    try:
        detector.load_state_dict(tensors)
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit the architecture that its own metadata name: {error}") from error
    for name in ("class_names", "category_ids"):
        values = metadata.get(name, getattr(detector, name))
        if len(values) != detector.config.num_classes:
            raise WeightsError(f"{path} has {len(values)} {name} for {detector.config.num_classes} classes")
        setattr(detector, name, values)
    return detector.eval(), metadata
