"""Rules: what to make of the Gram matrices of the parts. One rule a file."""

from gsdg.surgery.rules.corgrad import CorGrad

__all__ = ["CorGrad"]
