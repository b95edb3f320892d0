"""Figures over predictions, against scikit-learn, SciPy and hand counts."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, recall_score

from xcit.errors import ShapeError
from xcit.evaluate.classification import classification_metrics, predicted, wilson_interval

NAMES = ("cat", "dog", "owl")


def random_case(n=500):
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (n,), generator=g)
    logits = torch.randn(n, 3, generator=g) + 1.5 * torch.nn.functional.one_hot(labels, 3)
    return logits, labels


def test_against_scikit_learn():
    logits, labels = random_case()
    metrics = classification_metrics(logits, labels, NAMES)
    guess = logits.argmax(1)
    assert metrics.accuracy == pytest.approx(accuracy_score(labels, guess))
    assert np.array_equal(metrics.confusion, confusion_matrix(labels, guess))
    assert metrics.class_accuracies == pytest.approx(recall_score(labels, guess, average=None))
    assert (metrics.num_images, metrics.num_correct) == (500, int((guess == labels).sum()))


def test_rows_are_the_truth():
    logits = torch.tensor([[0.0, 5.0, 0.0]])  # an image of class 0 that is taken for class 1
    assert classification_metrics(logits, torch.tensor([0]), NAMES).confusion == ((0, 1, 0), (0, 0, 0), (0, 0, 0))


def test_calibration_error_by_hand():
    """Four images at probability 0.8 of which two are right, and two at 0.5 + of which both are: |.8-.5|, |.52-1|."""
    eighty, fifty = math.log(0.8 / 0.2), math.log(0.52 / 0.48)
    logits = torch.tensor([[eighty, 0]] * 4 + [[fifty, 0]] * 2)
    labels = torch.tensor([0, 0, 1, 1, 0, 0])
    expected = (4 * 0.3 + 2 * 0.48) / 6
    assert classification_metrics(logits, labels, ("a", "b")).calibration_error == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("right", "n"), [(355, 360), (360, 360), (0, 7), (1, 2)])
def test_wilson_against_scipy(right, n):
    low, high = binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right, n) == pytest.approx((low, high), abs=1e-9)


def test_a_class_without_images():
    metrics = classification_metrics(torch.eye(3)[:2], torch.tensor([0, 1]), NAMES)
    assert metrics.class_accuracies[:2] == (1.0, 1.0)
    assert math.isnan(metrics.class_accuracies[2])
    assert metrics.to_dict()["class_accuracies"] == {"cat": 1.0, "dog": 1.0, "owl": None}


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), r"n of 1 or more; got \(0, 3\)"),
        (torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), r"logits \(n, 3\)"),
        (torch.zeros(2, 3), torch.zeros(3, dtype=torch.long), r"got \(2, 3\) and \(3,\)"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "Labels go from 0 to 3; there are the classes 0 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(logits, labels, message):
    with pytest.raises(ShapeError, match=message):
        classification_metrics(logits, labels, NAMES)


def test_predicted():
    label, probability = predicted(torch.tensor([[0.0, math.log(3)]]))
    assert label.tolist() == [1]
    assert probability.tolist() == pytest.approx([0.75])
