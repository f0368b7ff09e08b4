"""mmcontrast: pretrain, evaluate and fine-tune multimodal contrastive models. The names below need torch alone.

They are imported when they are asked for: the command sets what OpenMP reads before torch is loaded, and starts at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcontrast.objectives import Objective, Pairing, contrastive_loss
    from mmcontrast.score import Direction, score_statistics

__version__ = "0.1.0"
__all__ = ["Direction", "Objective", "Pairing", "__version__", "contrastive_loss", "score_statistics"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mmcontrast' has no attribute {name!r}")
    home = "mmcontrast.score" if name in ("Direction", "score_statistics") else "mmcontrast.objectives"
    return getattr(importlib.import_module(home), name)
