"""Average precision and its like, against scikit-learn and by hand."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score

from xcit.errors import ShapeError
from xcit.evaluate.multi_label import MultiLabelTotals, multi_label_metrics


def case(n=200, classes=5):
    g = torch.Generator().manual_seed(3)
    targets = torch.rand(n, classes, generator=g) < 0.3
    logits = torch.randn(n, classes, generator=g) + targets
    return logits, targets, list("abcde")


@pytest.mark.parametrize("ties", [False, True])
def test_against_scikit_learn(ties):
    logits, targets, names = case()
    if ties:
        logits = logits.round()
    metrics = multi_label_metrics(logits, targets, names)
    expected = average_precision_score(targets, logits, average=None)
    assert metrics.average_precisions == pytest.approx(expected, abs=1e-6)
    assert metrics.mean_average_precision == pytest.approx(expected.mean(), abs=1e-6)
    assert metrics.class_counts == tuple(targets.sum(0).tolist())
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), targets.double())
    assert metrics.loss == pytest.approx(expected.item(), rel=1e-9)


def test_large_logits_keep_their_order():
    """As probabilities in float32, all of these would be 1."""
    logits, targets, names = case()
    shifted = multi_label_metrics(logits + 60, targets, names)
    assert shifted.average_precisions == pytest.approx(multi_label_metrics(logits, targets, names).average_precisions)


@pytest.mark.parametrize("batch", [1, 33, 500])
def test_batches_give_what_the_whole_gives(batch):
    logits, targets, names = case()
    totals = MultiLabelTotals(names)
    for part in torch.arange(len(logits)).split(batch):
        totals.update(logits[part], targets[part].float())
    whole, parts = multi_label_metrics(logits, targets, names), totals.compute()
    assert parts.average_precisions == whole.average_precisions
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)


def test_a_class_that_no_image_has():
    logits, targets, names = case()
    targets[:, 2] = False
    metrics = multi_label_metrics(logits, targets, names)
    assert math.isnan(metrics.average_precisions[2])
    others = [value for i, value in enumerate(metrics.average_precisions) if i != 2]
    assert metrics.mean_average_precision == pytest.approx(sum(others) / 4)
    assert metrics.to_dict()["average_precisions"]["c"] is None


def test_no_class_at_all():
    metrics = multi_label_metrics(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.bool), ["a", "b"])
    assert math.isnan(metrics.mean_average_precision)
    assert metrics.to_dict()["mean_average_precision"] is None


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), r"\(n, 2\); got \(2, 3\)"),
        (torch.zeros(2, 2), torch.zeros(3, 2, dtype=torch.bool), r"got \(2, 2\) and \(3, 2\)"),
        (torch.zeros(0, 2), torch.zeros(0, 2, dtype=torch.bool), "no images"),
        (torch.zeros(1, 2), torch.full((1, 2), 0.5), "must be 0 and 1"),
    ],
)
def test_what_does_not_fit_is_refused(logits, targets, message):
    with pytest.raises(ShapeError, match=message):
        multi_label_metrics(logits, targets, ["a", "b"])
