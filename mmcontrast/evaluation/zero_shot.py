"""Zero-shot classification: a class is the mean embedding of its prompts; a sample belongs to the class it is nearest."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def prompts_of(classes: Mapping[str, Sequence[str]], templates: Sequence[str]) -> dict[str, list[str]]:
    """Every phrase of every class in every template."""
    return {
        label: [template.format(phrase) for phrase in phrases for template in templates] for label, phrases in classes.items()
    }


def class_embedding(prompts: Tensor) -> Tensor:
    """Unit [D] of unit prompt embeddings [P, D] (CLIP, arXiv:2103.00020, section 3.1.4)."""
    return F.normalize(prompts.mean(0), dim=0)


def zero_shot_metrics(embeddings: Tensor, classes: Tensor, labels: Tensor) -> dict[str, float]:
    """Of samples [N, D] among classes [K, D], with labels int64 [N] in [0, K).

    top1: the share of samples nearest to their own class. mean_per_class: the mean over classes of that share.
    """
    if not len(labels):
        return {"top1": float("nan"), "mean_per_class": float("nan"), "num_samples": 0}
    right = (embeddings @ classes.T).argmax(1) == labels
    per_class = [right[labels == label].double().mean() for label in labels.unique()]
    return {
        "top1": right.double().mean().item(),
        "mean_per_class": torch.stack(per_class).mean().item(),
        "num_samples": len(labels),
    }
