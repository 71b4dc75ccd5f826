"""Averages of the weights along training, evaluated in addition to the weights: `trainer/averaging=ema | swa | swad`.

They work with any algorithm and do not change its training or its records.
"""

from gsdg.averaging.base import Averaging
from gsdg.averaging.ema import EMA
from gsdg.averaging.swa import SWA
from gsdg.averaging.swad import SWAD

__all__ = ["EMA", "SWA", "SWAD", "Averaging"]
