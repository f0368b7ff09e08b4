"""The tables of objectives, pairings and scores by the names that configs and `contrastive_loss` use."""

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
from mmcontrast.objectives.pairing import AllPairs, Anchor
from mmcontrast.objectives.siglip import SigLIP

OBJECTIVES = {
    "infonce": InfoNCE,
    "dcl": DCL,
    "siglip": SigLIP,
    "hard_negative": HardNegative,
    "debiased": Debiased,
    "multi_positive": MultiPositive,
    "global": GlobalContrastive,
    "distillation": Distillation,
    "hybrid": Hybrid,
}
SCORES = {"lorentz": Hyperbolic}
PAIRINGS = {"all_pairs": AllPairs, "anchor": Anchor, "multilinear": Multilinear}
