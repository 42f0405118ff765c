"""Label assignment by optimal transport. Needs torch only; take the folder into any dense detector."""

from .assign import ota_assign
from .config import Assignment, OTAConfig
from .grid import PointGrid
from .statistics import assignment_statistics

__all__ = ["Assignment", "OTAConfig", "PointGrid", "assignment_statistics", "ota_assign"]
