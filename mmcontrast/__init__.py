"""mmcontrast: pretrain, evaluate and fine-tune multimodal contrastive models. Importing it needs torch alone."""

from mmcontrast.objectives import Objective, Pairing, contrastive_loss
from mmcontrast.score import Direction, score_statistics

__version__ = "0.1.0"
__all__ = ["Direction", "Objective", "Pairing", "__version__", "contrastive_loss", "score_statistics"]
