"""Zero-shot classification: a phrase is the mean embedding of its prompts, a class as near as the nearest of its phrases."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def phrase_embedding(prompts: Tensor) -> Tensor:
    """Unit [D] of a phrase in every template, unit [T, D] (CLIP, arXiv:2103.00020, section 3.1.4)."""
    return F.normalize(prompts.mean(0), dim=0)


def zero_shot_metrics(embeddings: Tensor, classes: Sequence[Tensor], labels: Tensor) -> dict[str, float]:
    """Of samples [N, D] among classes of phrases [P, D] each, with labels int64 [N]: positions in `classes`.

    top1: the share of samples nearest to their own class. mean_per_class: the mean over classes of that share.
    """
    if not len(labels):
        return {"top1": float("nan"), "mean_per_class": float("nan"), "num_samples": 0}
    scores = torch.stack([(embeddings @ phrases.T).amax(1) for phrases in classes], 1)
    right = scores.argmax(1) == labels
    per_class = [right[labels == label].double().mean() for label in labels.unique()]
    return {
        "top1": right.double().mean().item(),
        "mean_per_class": torch.stack(per_class).mean().item(),
        "num_samples": len(labels),
    }
