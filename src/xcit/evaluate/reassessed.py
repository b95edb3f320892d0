"""Accuracy by labels of which several may be right for one image, as ReaL's for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xcit.errors import ShapeError
from xcit.evaluate.classification import wilson_interval


@dataclass(frozen=True)
class ReassessedAccuracy:
    """How often the most probable class is one of those that are right.

    Attributes:
        num_images: images that have a label; the others are left out.
        num_correct: images whose predicted class is among their labels.
        num_unlabelled: images without a label.
    """

    num_images: int
    num_correct: int
    num_unlabelled: int

    @property
    def accuracy(self) -> float:
        """Share of the labelled images, 0 to 1."""
        return self.num_correct / self.num_images

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson)."""
        return wilson_interval(self.num_correct, self.num_images)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON has them."""
        return {
            "num_images": self.num_images,
            "num_unlabelled": self.num_unlabelled,
            "num_correct": self.num_correct,
            "accuracy": self.accuracy,
            "accuracy_interval_95": list(self.accuracy_interval),
        }


def reassessed_accuracy(predicted: Sequence[int], targets: Sequence[Sequence[int]]) -> ReassessedAccuracy:
    """Compare predicted classes with the sets of classes that are right.

    Args:
        predicted: a class an image.
        targets: the right classes of each image; none, where nobody could tell.

    Raises:
        ShapeError: not as many of the one as of the other, or no image that has a label.

    Source: Beyer et al., "Are we done with ImageNet?", 2020, and their published code.
    """
    if len(predicted) != len(targets):
        raise ShapeError(f"There are {len(predicted)} predictions, but labels for {len(targets)} images.")
    judged = [guess in right for guess, right in zip(predicted, targets, strict=True) if right]
    if not judged:
        raise ShapeError("None of the images has a label, so there is no accuracy.")
    return ReassessedAccuracy(len(judged), sum(judged), len(targets) - len(judged))
