"""The detector: images -> raw predictions -> losses or detections."""

# ruff: noqa: F401
from .detector import DEFAULT_SCORE, Detector, DetectorConfig
from .postprocess import Detections
from .weights import init_weights, is_on_hub, load, load_weights, local_file, make_folder, save_weights, write_file
