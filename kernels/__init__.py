"""Label assignment by optimal transport, and the losses of its result. Needs torch only; take the folder into any dense
detector.
"""

from .assign import ota_assign
from .config import Assignment, OTAConfig
from .grid import PointGrid
from .losses import box_loss, focal_loss
from .statistics import assignment_statistics

__all__ = [
    "Assignment", "OTAConfig", "PointGrid", "assignment_statistics", "box_loss", "focal_loss", "ota_assign",
]  # fmt: skip
