"""Probes against scikit-learn's own, on clouds whose best classifier is known."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from mmcontrast.errors import UserError
from mmcontrast.evaluation.classification import report
from mmcontrast.evaluation.probes import few_shot, knn, linear_probe, over_seeds


@pytest.fixture(autouse=True)
def one_thread():
    """Threads on so few rows wait for each other, where cores are shared for seconds."""
    with threadpool_limits(1):
        yield


CENTRES = F.normalize(torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), dim=1)


def cloud(number, noise=0.3):
    labels = torch.randint(4, (number,))
    return F.normalize(CENTRES[labels] + noise * torch.randn(number, 12, dtype=torch.float64), dim=1), labels


def test_a_linear_probe_is_as_good_as_the_best_strength_by_hand():
    (rows, labels), (test_rows, test_labels) = cloud(250, 0.6), cloud(500, 0.6)
    found = linear_probe(rows, labels, test_rows)
    by_hand = [
        LogisticRegression(C=10.0**e, max_iter=1000)
        .fit(rows.numpy(), labels.numpy())
        .score(test_rows.numpy(), test_labels.numpy())
        for e in range(-6, 5)
    ]
    top1 = report(found, test_labels, 4).values["top1"]
    assert top1 > max(by_hand) - 0.05 and top1 > min(by_hand) + 0.05
    assert torch.equal(found, linear_probe(rows, labels, test_rows))


def test_the_strength_is_chosen_by_what_is_held_out():
    labels = (torch.rand(300) < 0.15).long()  # of such small rows and rare a class a probe with C = 1 learns nothing
    rows = 0.01 * (CENTRES[labels] + 0.1 * torch.randn(300, 12, dtype=torch.float64))
    usual = LogisticRegression(max_iter=1000).fit(rows.numpy(), labels.numpy()).predict(rows.numpy())
    assert usual.sum() == 0 and (linear_probe(rows, labels, rows) == labels).double().mean() > 0.97


@pytest.mark.parametrize("temperature", [None, 0.07])
def test_neighbours_vote_as_scikit_learns(temperature):
    (rows, labels), (test_rows, _) = cloud(150, 0.8), cloud(60, 0.8)
    weights = "uniform" if temperature is None else lambda distances: np.exp((1 - distances) / temperature)
    theirs = KNeighborsClassifier(9, metric="cosine", weights=weights).fit(rows.numpy(), labels.numpy())
    assert knn(rows, labels, test_rows, 9, temperature=temperature).tolist() == theirs.predict(test_rows.numpy()).tolist()
    assert knn(rows[:5], labels[:5], rows[:5], 1).tolist() == labels[:5].tolist()


def test_few_shots_are_drawn_by_seed():
    # at this noise 25 a class are better than 3 by 0.08 or more
    (rows, labels), (test_rows, test_labels) = cloud(200, 0.6), cloud(300, 0.6)
    found = few_shot(rows, labels, test_rows, 3, seeds=(0, 1, 0))
    assert found.shape == (3, 300) and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    mean, deviation = over_seeds(found, test_labels)
    shares = [(row == test_labels).double().mean().item() for row in found]
    assert mean == pytest.approx(np.mean(shares)) and deviation == pytest.approx(np.std(shares, ddof=1)) and mean > 0.3
    many = over_seeds(few_shot(rows, labels, test_rows, 25), test_labels)
    assert many[0] > mean and np.isnan(over_seeds(found[:1], test_labels)[1])


def test_labels_of_classes_that_are_not_all_there():
    rows, labels = cloud(60)
    assert set(linear_probe(rows, labels * 3, rows).tolist()) <= {0, 3, 6, 9}
    alone = torch.cat([labels, torch.tensor([7])])  # a class of one sample is fitted to, never held out
    assert linear_probe(torch.cat([rows, -rows[:1]]), alone, -rows[:1]).shape == (1,)
    assert linear_probe(CENTRES, torch.arange(4), CENTRES).tolist() == [0, 1, 2, 3]


def test_mistakes(monkeypatch):
    rows, labels = cloud(30)
    with pytest.raises(UserError, match="few-shot with 40 a class: class \\d has \\d+ training samples"):
        few_shot(rows, labels, rows, 40)
    with pytest.raises(UserError, match=r"a probe needs two classes: all training labels are \[0\]"):
        linear_probe(rows, torch.zeros_like(labels), rows)
    with pytest.raises(ValueError, match="temperature 0: it must be more than 0"):
        knn(rows, labels, rows, temperature=0)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match="probes need scikit-learn: pip install 'mmcontrast\\[eval\\]'"):
        linear_probe(rows, labels, rows)
