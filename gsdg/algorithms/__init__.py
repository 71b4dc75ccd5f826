"""One algorithm per file. To add one, start from a copy of `erm.py`."""

from gsdg.algorithms.arm import ARM
from gsdg.algorithms.base import Algorithm
from gsdg.algorithms.cad import CAD
from gsdg.algorithms.cdann import CDANN
from gsdg.algorithms.dann import DANN
from gsdg.algorithms.eqrm import EQRM
from gsdg.algorithms.erm import ERM
from gsdg.algorithms.fish import Fish
from gsdg.algorithms.fishr import Fishr
from gsdg.algorithms.gga_l import GGAL
from gsdg.algorithms.grad_surgery import GradSurgery
from gsdg.algorithms.groupdro import GroupDRO
from gsdg.algorithms.iga import IGA
from gsdg.algorithms.irm import IRM
from gsdg.algorithms.matching import CORAL, MMD, CausIRLCORAL, CausIRLMMD
from gsdg.algorithms.mixstyle import MixStyle
from gsdg.algorithms.mixup import Mixup
from gsdg.algorithms.mldg import MLDG
from gsdg.algorithms.mtl import MTL
from gsdg.algorithms.pseudo_label import PseudoLabel
from gsdg.algorithms.rsc import RSC
from gsdg.algorithms.sagm import SAGM
from gsdg.algorithms.sagnet import SagNet
from gsdg.algorithms.sam import SAM
from gsdg.algorithms.sd import SD
from gsdg.algorithms.selfreg import SelfReg
from gsdg.algorithms.vrex import VREx

__all__ = [
    "ARM",
    "CAD",
    "CDANN",
    "CORAL",
    "DANN",
    "EQRM",
    "ERM",
    "GGAL",
    "IGA",
    "IRM",
    "MLDG",
    "MMD",
    "MTL",
    "RSC",
    "SAGM",
    "SAM",
    "SD",
    "Algorithm",
    "CausIRLCORAL",
    "CausIRLMMD",
    "Fish",
    "Fishr",
    "GradSurgery",
    "GroupDRO",
    "MixStyle",
    "Mixup",
    "PseudoLabel",
    "SagNet",
    "SelfReg",
    "VREx",
]
