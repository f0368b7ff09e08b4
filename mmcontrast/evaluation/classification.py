"""Classify samples by the nearest class, and report the quality of predictions.

Shapes: N samples, K classes, D dimensions, P phrases of a class, B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmcontrast.evaluation.bootstrap import Estimate

SCORES = 2**24  # in memory at a time
TOP5_CLASSES = 6  # the fewest classes for which top-5 is reported


def phrase_embedding(prompts: Tensor) -> Tensor:
    """Return the unit embedding [D] of a phrase from its prompts, unit [T, D]: the direction of their mean (CLIP,
    arXiv:2103.00020)."""
    return F.normalize(prompts.mean(0), dim=0)


@torch.no_grad()
def predict(embeddings: Tensor, classes: Sequence[Tensor], labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the class that each sample [N, D] is nearest to, and the rank of its label, from 1. A class is as near as the
    nearest of its phrases [P, D]; ties go to the first.

    Args:
        labels: int64 [N], positions in `classes`.

    Returns:
        (predictions, ranks), int64 [N]. O(N) memory beside the inputs.
    """
    phrases, sizes = torch.cat(list(classes)).T, [len(phrases) for phrases in classes]
    numbers = torch.arange(len(classes), device=embeddings.device)
    predictions, ranks = torch.empty_like(labels), torch.empty_like(labels)
    height = max(1, SCORES // phrases.shape[1])
    for start in range(0, len(labels), height):
        rows = slice(start, start + height)
        scores = embeddings[rows] @ phrases
        if len(classes) < phrases.shape[1]:
            scores = torch.stack([of_class.amax(1) for of_class in scores.split(sizes, 1)], 1)
        label = labels[rows, None]
        label_scores = scores.gather(1, label)
        predictions[rows] = scores.argmax(1)
        ranks[rows] = 1 + ((scores > label_scores) | ((scores == label_scores) & (numbers < label))).sum(1)
    return predictions, ranks


@dataclass(frozen=True)
class Report:
    """The quality of predictions.

    Attributes:
        estimates: `top1`, the accuracy; `top5`, the share of samples with their class among the first five, if ranks are known
            and there are 6 classes; `mean_per_class`, the mean recall (balanced accuracy); `macro_f1`.
            Means over classes leave out those without samples. NaN without any sample.
        precision, recall, f1: float64 [K]; 0 for a class where there is nothing to divide by.
        support: int64 [K], samples.
        confusion: int64 [K, K], samples by true (row) and predicted class.
    """

    estimates: dict[str, Estimate]
    precision: Tensor
    recall: Tensor
    f1: Tensor
    support: Tensor
    confusion: Tensor

    @property
    def values(self) -> dict[str, float]:
        return {name: estimate.value for name, estimate in self.estimates.items()}


def report(predictions: Tensor, labels: Tensor, num_classes: int, ranks: Tensor | None = None) -> Report:
    """Report on predictions and labels, int64 [N] from 0 to K − 1, and the labels' ranks, from 1, if they are known.

    Raises:
        ValueError: for a class outside 0 to K − 1.
    """
    cells = labels * num_classes + predictions
    for name, numbers in (("predictions", predictions), ("labels", labels)):
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < num_classes:
            raise ValueError(f"{name} go from {int(numbers.min())} to {int(numbers.max())}: there are {num_classes} classes")
    correct = predictions == labels

    def counts(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (hits, predictions, samples) of each class, [B, K] each."""
        zeros = weights.new_zeros(len(weights), num_classes)
        return (
            zeros.index_add(1, labels, weights * correct),
            zeros.index_add(1, predictions, weights),
            zeros.index_add(1, labels, weights),
        )

    def mean_per_class(weights: Tensor) -> Tensor:
        hits, _, samples = counts(weights)
        return _ratio(hits, samples).sum(1) / (samples > 0).sum(1)

    def macro_f1(weights: Tensor) -> Tensor:
        hits, predicted, samples = counts(weights)
        return (_ratio(2 * hits, predicted + samples) * (samples > 0)).sum(1) / (samples > 0).sum(1)

    estimates = {"top1": Estimate.of_mean(correct)}
    if ranks is not None and num_classes >= TOP5_CLASSES:
        estimates["top5"] = Estimate.of_mean(ranks <= 5)
    for statistic in (mean_per_class, macro_f1):
        estimates[statistic.__name__] = Estimate.of(statistic, len(labels), labels.device)
    once = torch.ones(1, len(labels), dtype=torch.float64, device=labels.device)
    hits, predicted, samples = (class_counts[0] for class_counts in counts(once))
    return Report(
        estimates,
        precision=_ratio(hits, predicted),
        recall=_ratio(hits, samples),
        f1=_ratio(2 * hits, predicted + samples),
        support=samples.long(),
        confusion=cells.bincount(minlength=num_classes**2).view(num_classes, num_classes),
    )


def _ratio(part: Tensor, total: Tensor) -> Tensor:
    """Return part / total; 0 where the total is 0."""
    return part / total.clamp(min=1)  # both are counts
