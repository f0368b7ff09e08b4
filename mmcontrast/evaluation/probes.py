"""Probes: predict labels from embeddings, by logistic regression or by nearest neighbours.

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
    """Sweep the L2 strength of a logistic regression on a held-out fifth of the training rows, fit it to all, and predict
    (CLIP, arXiv:2103.00020, appendix A.3: from 10⁻⁶ to 10⁶, down to eighths of a decade around the best; of equally good ones
    the strongest). A class's only sample is never held out.

    Args:
        rows, labels: [N, D] and [N].
        test_rows: [M, D].
        seed: of the draw of held-out rows.

    Returns:
        int64 [M] predictions, on the device of `test_rows`.

    Raises:
        UserError: if scikit-learn is not installed, or labels are all the same.
    """
    rows, labels = rows.cpu(), labels.cpu()
    held_out = _draw_per_class(labels, lambda number: min(number - 1, ceil(HELD_OUT * number)), seed)
    fitted_to = torch.ones(len(labels), dtype=torch.bool)
    fitted_to[held_out] = False
    accuracies: dict[float, float] = {}

    def evaluate_exponent(exponent: float) -> None:
        if exponent not in accuracies and abs(exponent) <= DECADES:
            predicted = _fit(rows[fitted_to], labels[fitted_to], 10**exponent).predict(_array(rows[held_out]))
            accuracies[exponent] = float((predicted == _array(labels[held_out])).mean())

    def best() -> float:
        return min(accuracies, key=lambda exponent: (-accuracies[exponent], exponent))

    if not len(held_out) or len(labels[fitted_to].unique()) < 2:
        accuracies[0.0] = 0.0  # nothing to choose by
    else:
        with warnings.catch_warnings(action="ignore"):  # far from the best C lbfgs does not converge
            for exponent in range(-DECADES, DECADES + 1, 2):
                evaluate_exponent(exponent)
            for step in (1, 1 / 2, 1 / 4, 1 / 8):
                centre = best()
                evaluate_exponent(centre - step)
                evaluate_exponent(centre + step)
    return _predictions(_fit(rows, labels, 10 ** best()), test_rows)


def few_shot(
    rows: Tensor, labels: Tensor, test_rows: Tensor, shots: int, *, seeds: Sequence[int] = range(5), c: float = 1.0
) -> Tensor:
    """Fit and apply a logistic regression to a few rows of each class for every seed; arguments as `linear_probe`'s.

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
    drawn = [_draw_per_class(labels, lambda _: shots, seed) for seed in seeds]
    return torch.stack([_predictions(_fit(rows[rows_of_seed], labels[rows_of_seed], c), test_rows) for rows_of_seed in drawn])


def over_seeds(predictions: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return (mean, standard deviation) over seeds of the accuracy of predictions [S, M]; NaN deviation for one seed."""
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
    """Predict the class with most votes among the k nearest unit rows by cosine, the first of equal ones; arguments as
    `linear_probe`'s.

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
    cosines, indices = nearest(test_rows, rows, min(k, len(rows)))
    cosines = cosines if distances is None else distances.value(cosines)
    votes = torch.ones_like(cosines) if temperature is None else ((cosines - cosines[:, :1]) / temperature).exp()
    predictions = labels.new_empty(len(test_rows))
    for start in range(0, len(test_rows), TILE):
        tile = slice(start, start + TILE)
        sums = votes.new_zeros(len(votes[tile]), int(labels.max()) + 1)
        predictions[tile] = sums.scatter_add_(1, labels[indices[tile]], votes[tile]).argmax(1)
    return predictions


def _draw_per_class(labels: Tensor, how_many: Callable[[int], int], seed: int) -> Tensor:
    """Draw rows of every class and return their indices; `how_many`: maps the size of a class to the number of its rows."""
    generator = torch.Generator().manual_seed(seed)
    places = [(labels == label).nonzero().squeeze(1) for label in labels.unique()]
    return torch.cat([rows[torch.randperm(len(rows), generator=generator)[: how_many(len(rows))]] for rows in places])


def _fit(rows: Tensor, labels: Tensor, c: float) -> Any:
    """Fit scikit-learn's logistic regression with C = c."""
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
