"""One algorithm a file; `erm.py` is the one to copy."""

from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.erm import ERM
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.irm import IRM

__all__ = ["ERM", "IRM", "Algorithm", "GradSurgery"]
