"""The detector: images -> raw predictions -> losses or detections."""

from .backbone import BackboneError
from .checkpoint import CheckpointError, previous_checkpoint, save_checkpoint, write_file, writing
from .detector import Detections, Detector, DetectorConfig
from .weights import WeightsError, init_weights, is_on_hub, load, load_weights, local_file, read_metadata, save_weights

__all__ = [
    "BackboneError",
    "CheckpointError",
    "Detections",
    "Detector",
    "DetectorConfig",
    "WeightsError",
    "init_weights",
    "is_on_hub",
    "load",
    "load_weights",
    "local_file",
    "previous_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "save_weights",
    "write_file",
    "writing",
]
