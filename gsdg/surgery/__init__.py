"""Gradient surgery: per-domain gradients, a partition of them, and a rule that makes one update of them."""

from gsdg.surgery.diagnostics import Diagnostics
from gsdg.surgery.outliers import NormOutliers
from gsdg.surgery.partition import (
    Chunk,
    Groups,
    Partition,
    PerElement,
    PerFilter,
    PerModule,
    PerTensor,
    WholeModel,
)
from gsdg.surgery.rules.corgrad import CorGrad
from gsdg.surgery.surgery import GradSurgery, NonFiniteGradient, Surgery

__all__ = [
    "Chunk",
    "CorGrad",
    "Diagnostics",
    "GradSurgery",
    "Groups",
    "NonFiniteGradient",
    "NormOutliers",
    "Partition",
    "PerElement",
    "PerFilter",
    "PerModule",
    "PerTensor",
    "Surgery",
    "WholeModel",
]
