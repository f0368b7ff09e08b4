"""Probes: what labels of some rows tell about others, by logistic regression or by neighbours. Predictions out.

Shapes: N training rows and M test rows of D dimensions; labels are int64 from 0. Rows are taken as they are: give unit rows.
"""

import warnings
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import torch
from torch import Tensor

from mmcontrast.errors import UserError
from mmcontrast.evaluation.neighbours import nearest
from mmcontrast.score import Lorentz

ITERATIONS = 1000  # of lbfgs
DECADES = 6  # to either side of C = 1
HELD_OUT = 0.2  # of each class, to choose C by
TILE = 4096
SMALL = 2**22  # numbers in the rows; below, threads wait for each other for most of the time


def linear_probe(rows: Tensor, labels: Tensor, test_rows: Tensor, *, seed: int = 0) -> Tensor:
    """Logistic regression whose L2 strength is swept on a held-out fifth of the training rows, then fitted to all of them
    (CLIP, arXiv:2103.00020, appendix A.3: from 10⁻⁶ to 10⁶, down to eighths of a decade around the best; of equally good ones
    the strongest). A class's only sample is never held out.

    Args:
        rows, labels: [N, D] and [N].
        test_rows: [M, D].
        seed: of what is held out.

    Returns:
        int64 [M] predictions, on the device of `test_rows`.

    Raises:
        UserError: if scikit-learn is not installed, or labels are all the same.
    """
    rows, labels = rows.cpu(), labels.cpu()
    held_out = _of_each_class(labels, lambda number: min(number - 1, ceil(HELD_OUT * number)), seed)
    fitted_to = torch.ones(len(labels), dtype=torch.bool)
    fitted_to[held_out] = False
    accuracies: dict[float, float] = {}

    def try_out(exponent: float) -> None:
        if exponent not in accuracies and abs(exponent) <= DECADES:
            found = _fitted(rows[fitted_to], labels[fitted_to], 10**exponent).predict(_array(rows[held_out]))
            accuracies[exponent] = float((found == _array(labels[held_out])).mean())

    def best() -> float:
        return min(accuracies, key=lambda exponent: (-accuracies[exponent], exponent))

    if not len(held_out) or len(labels[fitted_to].unique()) < 2:
        accuracies[0.0] = 0.0  # nothing to choose by
    else:
        with warnings.catch_warnings(action="ignore"):  # far from the best C lbfgs does not converge
            for exponent in range(-DECADES, DECADES + 1, 2):
                try_out(exponent)
            for step in (1, 1 / 2, 1 / 4, 1 / 8):
                around = best()
                try_out(around - step)
                try_out(around + step)
    return _predictions(_fitted(rows, labels, 10 ** best()), test_rows)


def few_shot(
    rows: Tensor, labels: Tensor, test_rows: Tensor, shots: int, *, seeds: Sequence[int] = range(5), c: float = 1.0
) -> Tensor:
    """Logistic regression from a few rows of each class, drawn anew for every seed; arguments as `linear_probe`'s.

    Args:
        shots: rows of a class.
        c: the inverse of the L2 strength, which so few rows cannot choose.

    Returns:
        int64 [S, M] predictions, a row a seed.

    Raises:
        UserError: also if a class has fewer rows.
    """
    numbers, counts = labels.unique(return_counts=True)
    if shots < 1 or int(counts.min()) < shots:
        rarest = int(numbers[counts.argmin()])
        raise UserError(f"few-shot with {shots} a class: class {rarest} has {int(counts.min())} training samples")
    rows, labels = rows.cpu(), labels.cpu()
    drawn = [_of_each_class(labels, lambda _: shots, seed) for seed in seeds]
    return torch.stack([_predictions(_fitted(rows[some], labels[some], c), test_rows) for some in drawn])


def over_seeds(predictions: Tensor, labels: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) over seeds of the share of predictions [S, M] that are right; NaN deviation for one seed."""
    right = (predictions == labels).double().mean(1)
    return right.mean().item(), right.std().item() if len(right) > 1 else float("nan")


def knn(
    rows: Tensor,
    labels: Tensor,
    test_rows: Tensor,
    k: int = 20,
    *,
    temperature: float | None = 0.07,
    distances: Lorentz | None = None,
) -> Tensor:
    """The class with most votes of the k nearest unit rows by cosine; of equal ones the first; arguments as `linear_probe`'s.

    Args:
        k: neighbours; all rows where there are fewer.
        distances: rows are points of a hyperboloid, as `Lorentz.rows` makes them: −distance takes the cosine's place.
        temperature: τ of a vote's weight exp(cosine / τ) (as DINO, arXiv:2104.14294, after Wu et al., arXiv:1805.01978); None:
            every vote counts 1.

    Returns:
        int64 [M] predictions.

    Raises:
        ValueError: for no training rows, or a k or temperature that is not positive.
    """
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature {temperature}: it must be more than 0, or None")
    cosines, found = nearest(test_rows, rows, min(k, len(rows)))
    cosines = cosines if distances is None else distances.value(cosines)
    votes = torch.ones_like(cosines) if temperature is None else ((cosines - cosines[:, :1]) / temperature).exp()
    predictions = labels.new_empty(len(test_rows))
    for start in range(0, len(test_rows), TILE):
        tile = slice(start, start + TILE)
        sums = votes.new_zeros(len(votes[tile]), int(labels.max()) + 1)
        predictions[tile] = sums.scatter_add_(1, labels[found[tile]], votes[tile]).argmax(1)
    return predictions


def _of_each_class(labels: Tensor, how_many: Callable[[int], int], seed: int) -> Tensor:
    """Places of rows drawn from every class: of so many there are, how many."""
    generator = torch.Generator().manual_seed(seed)
    places = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    return torch.cat([of[torch.randperm(len(of), generator=generator)[: how_many(len(of))]] for of in places])


def _fitted(rows: Tensor, labels: Tensor, c: float) -> Any:
    """scikit-learn's, with C = c."""
    try:
        from sklearn.linear_model import LogisticRegression
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise UserError("probes need scikit-learn: pip install 'mmcontrast[eval]'") from error
    if len(present := labels.unique()) < 2:
        raise UserError(f"a probe needs two classes: all training labels are {present.tolist()}")
    with threadpool_limits(1 if rows.numel() < SMALL else None):
        return LogisticRegression(C=c, max_iter=ITERATIONS).fit(_array(rows), _array(labels))


def _predictions(fitted: Any, rows: Tensor) -> Tensor:
    return torch.from_numpy(fitted.predict(_array(rows))).to(rows.device)


def _array(values: Tensor) -> Any:
    return (
        values.cpu().float().numpy() if values.is_floating_point() and values.dtype != torch.float64 else values.cpu().numpy()
    )
