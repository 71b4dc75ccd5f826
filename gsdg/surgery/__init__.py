"""Gradient surgery: per-domain gradients, a partition of them, and a rule that makes one update of them."""

from gsdg.surgery.partition import Chunk
from gsdg.surgery.rules import CorGrad
from gsdg.surgery.surgery import GradSurgery, NonFiniteGradient, Surgery

__all__ = ["Chunk", "CorGrad", "GradSurgery", "NonFiniteGradient", "Surgery"]
