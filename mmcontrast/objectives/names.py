"""The objectives and pairings that configs and `contrastive_loss` know by name."""

from mmcontrast.objectives.infonce import InfoNCE
from mmcontrast.objectives.pairing import AllPairs, Anchor
from mmcontrast.objectives.siglip import SigLIP

OBJECTIVES = {"infonce": InfoNCE, "siglip": SigLIP}
PAIRINGS = {"all_pairs": AllPairs, "anchor": Anchor}
