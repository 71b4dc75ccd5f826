"""One algorithm a file; `erm.py` is the one to copy."""

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.erm import ERM
from gsdg.algorithms.grad_surgery import GradSurgery

__all__ = ["ERM", "Algorithm", "GradSurgery"]
