"""Objectives and pairings, and `contrastive_loss`. A new one is a file here, a line below and one in names.py."""

from mmcontrast.objectives.base import Objective
from mmcontrast.objectives.contrastive import contrastive_loss
from mmcontrast.objectives.dcl import DCL
from mmcontrast.objectives.debiased import Debiased
from mmcontrast.objectives.distillation import Distillation
from mmcontrast.objectives.global_contrastive import GlobalContrastive
from mmcontrast.objectives.hard_negative import HardNegative
from mmcontrast.objectives.hybrid import Hybrid
from mmcontrast.objectives.hyperbolic import Hyperbolic
from mmcontrast.objectives.infonce import InfoNCE
from mmcontrast.objectives.multi_positive import MultiPositive
from mmcontrast.objectives.multilinear import Multilinear
from mmcontrast.objectives.names import OBJECTIVES, PAIRINGS, SCORES
from mmcontrast.objectives.pairing import AllPairs, Anchor, Pairing
from mmcontrast.objectives.siglip import SigLIP

__all__ = [
    "DCL",
    "OBJECTIVES",
    "PAIRINGS",
    "SCORES",
    "AllPairs",
    "Anchor",
    "Debiased",
    "Distillation",
    "GlobalContrastive",
    "HardNegative",
    "Hybrid",
    "Hyperbolic",
    "InfoNCE",
    "MultiPositive",
    "Multilinear",
    "Objective",
    "Pairing",
    "SigLIP",
    "contrastive_loss",
]
