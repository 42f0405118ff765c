"""Label assignment by optimal transport. Needs torch only; take the folder into any dense detector."""

from .assign import ota_assign
from .config import Assignment, OTAConfig
from .grid import PointGrid

__all__ = ["Assignment", "OTAConfig", "PointGrid", "ota_assign"]
