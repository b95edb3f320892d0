"""Figures over predictions, against scikit-learn, SciPy, torchmetrics and hand counts."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss, recall_score
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

from xcit.errors import ShapeError
from xcit.evaluate.classification import ClassificationTotals, classification_metrics, predicted, wilson_interval

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
        (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long), "no images to count.*1 or more"),
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


# --- totals -----------------------------------------------------------------------------------------------------------


def many_classes(n=400, classes=12, seed=2):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    logits = 1.5 * torch.randn(n, classes, generator=g) + 2 * torch.nn.functional.one_hot(labels, classes)
    return logits, labels, [f"class {i}" for i in range(classes)]


@pytest.mark.parametrize("seed", range(4))
def test_against_torchmetrics(seed):
    logits, labels, names = many_classes(seed=seed)
    metrics = classification_metrics(logits, labels, names)
    expected = multiclass_calibration_error(logits.softmax(1), labels, num_classes=12, n_bins=15, norm="l1")
    assert metrics.calibration_error == pytest.approx(expected.item(), abs=1e-6)
    for k, value in ((1, metrics.accuracy), (5, metrics.top5_accuracy)):
        expected = multiclass_accuracy(logits, labels, num_classes=12, top_k=k, average="micro")
        assert value == pytest.approx(expected.item(), abs=1e-6)
    assert metrics.loss == pytest.approx(log_loss(labels, logits.double().softmax(1), labels=range(12)), rel=1e-9)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_batches_give_what_the_whole_gives(batch):
    logits, labels, names = many_classes()
    whole = classification_metrics(logits, labels, names)
    totals = ClassificationTotals(names)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(batch))
    for part in order.split(batch):
        totals.update(logits[part], labels[part])
    parts = totals.compute()
    assert (parts.confusion, parts.num_top5_correct) == (whole.confusion, whole.num_top5_correct)
    assert parts.calibration_error == pytest.approx(whole.calibration_error, abs=1e-12)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)


def test_an_empty_batch_counts_nothing():
    logits, labels, names = many_classes(5)
    totals = ClassificationTotals(names)
    totals.update(logits[:0], labels[:0])
    with pytest.raises(ShapeError, match="no images"):
        totals.compute()
    totals.update(logits, labels)
    assert totals.compute() == classification_metrics(logits, labels, names)


@pytest.mark.parametrize(("classes", "known"), [(5, False), (6, True)])
def test_top_5_of_five_classes_is_no_figure(classes, known):
    names = list("abcdef")[:classes]
    metrics = classification_metrics(torch.eye(classes), torch.arange(classes), names)
    assert (metrics.top5_accuracy is not None) == known
    assert (metrics.to_dict()["top5_accuracy"] is not None) == known


def test_certain_predictions_share_the_last_bin():
    """Two images at probability 1 and two at 0.95, one of each wrong: one bin, so |mean of confidences - 1/2|."""
    certain, sure = 200.0, math.log(0.95 / 0.05)
    logits = torch.tensor([[certain, 0], [certain, 0], [sure, 0], [sure, 0]])
    metrics = classification_metrics(logits, torch.tensor([0, 1, 0, 1]), ("a", "b"))
    assert logits.softmax(1)[0, 0] == 1
    assert metrics.calibration_error == pytest.approx(0.975 - 0.5, abs=1e-6)


def test_mistakes_are_the_matrix_without_its_diagonal():
    logits, labels, names = many_classes()
    metrics = classification_metrics(logits, labels, names)
    mistakes = metrics.mistakes()
    assert [count for *_, count in mistakes] == sorted((count for *_, count in mistakes), reverse=True)
    again = np.diag(np.diag(np.array(metrics.confusion)))
    for true, guess, count in mistakes:
        assert true != guess
        again[true, guess] = count
    assert np.array_equal(again, metrics.confusion)
    assert metrics.class_counts == tuple(torch.bincount(labels, minlength=12).tolist())
