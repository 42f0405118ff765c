"""The detector: images -> raw predictions -> losses or detections."""

from .backbone import BackboneError
from .detector import Detector, DetectorConfig
from .weights import WeightsError, load_weights, save_weights

__all__ = ["BackboneError", "Detector", "DetectorConfig", "WeightsError", "load_weights", "save_weights"]
