"""Test-time adaptation: trained algorithms that adapt to a domain's unlabelled images. `gsdg.evaluate --adapt NAME`."""

from gsdg.adaptation.base import Adaptation as Adaptation
from gsdg.adaptation.bn import BN as BN
from gsdg.adaptation.t3a import T3A as T3A
from gsdg.adaptation.tent import Tent as Tent
