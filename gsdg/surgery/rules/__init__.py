"""The rules: how the domain gradients of each part, or of each element, are combined. One rule per file."""

from gsdg.surgery.rules.agr_rand import AgrRand
from gsdg.surgery.rules.agr_sum import AgrSum
from gsdg.surgery.rules.aligned_mtl import AlignedMTL
from gsdg.surgery.rules.and_mask import AndMask
from gsdg.surgery.rules.base import ElementRule, GramRule, Rule, Weighting
from gsdg.surgery.rules.cagrad import CAGrad
from gsdg.surgery.rules.corgrad import CorGrad
from gsdg.surgery.rules.dualproj import DualProj
from gsdg.surgery.rules.graddrop import GradDrop
from gsdg.surgery.rules.gradvac import GradVac
from gsdg.surgery.rules.imtl_g import IMTLG
from gsdg.surgery.rules.mean import Mean, Sum
from gsdg.surgery.rules.mgda import MGDA
from gsdg.surgery.rules.nash import NashMTL
from gsdg.surgery.rules.pcgrad import PCGrad
from gsdg.surgery.rules.sand_mask import SandMask
from gsdg.surgery.rules.torchjd import TorchJD
from gsdg.surgery.rules.upgrad import UPGrad

__all__ = [
    "IMTLG",
    "MGDA",
    "AgrRand",
    "AgrSum",
    "AlignedMTL",
    "AndMask",
    "CAGrad",
    "CorGrad",
    "DualProj",
    "ElementRule",
    "GradDrop",
    "GradVac",
    "GramRule",
    "Mean",
    "NashMTL",
    "PCGrad",
    "Rule",
    "SandMask",
    "Sum",
    "TorchJD",
    "UPGrad",
    "Weighting",
]
