"""Label assignment by optimal transport, and the detection losses that follow from it.

Needs only torch (and triton on a GPU), so the folder can be copied into any dense detector.
"""

from .assign import ota_assign
from .config import Assignment, Inputs, OTAConfig
from .grid import PointGrid
from .losses import box_loss, focal_loss
from .statistics import assignment_statistics

__version__ = "0.1.0"
__all__ = ["Assignment", "Inputs", "OTAConfig", "PointGrid"]
__all__ += ["assignment_statistics", "box_loss", "focal_loss", "ota_assign"]
