"""Accuracy by several right labels, by hand."""

import pytest

from xcit.errors import ShapeError
from xcit.evaluate.classification import wilson_interval
from xcit.evaluate.reassessed import reassessed_accuracy


def test_by_hand():
    """Right by the second of two labels, wrong, without a label (left out), right by the only one."""
    real = reassessed_accuracy([3, 3, 3, 0], [(1, 3), (1, 2), (), (0,)])
    assert (real.num_images, real.num_correct, real.num_unlabelled) == (3, 2, 1)
    assert real.accuracy == pytest.approx(2 / 3)
    assert real.accuracy_interval == wilson_interval(2, 3)
    assert real.to_dict()["num_unlabelled"] == 1


@pytest.mark.parametrize(
    ("predicted", "targets", "message"), [([1], [], "1 predictions, but labels for 0"), ([1], [()], "None of")]
)
def test_refusals(predicted, targets, message):
    with pytest.raises(ShapeError, match=message):
        reassessed_accuracy(predicted, targets)
