"""Averages of the weights along training, evaluated beside the weights: `trainer/averaging=ema | swa | swad`.

Any algorithm can have them and none is changed by them: it trains, and is recorded, as it would without.
"""

from gsdg.averaging.base import Averaging
from gsdg.averaging.ema import EMA
from gsdg.averaging.swa import SWA
from gsdg.averaging.swad import SWAD

__all__ = ["EMA", "SWA", "SWAD", "Averaging"]
