"""How good a classifier's predictions are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from xcit.errors import ShapeError

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class ClassificationMetrics:
    """Figures over a set of labelled images.

    Attributes:
        class_names: one a class.
        confusion: ``confusion[i][j]`` images of class i were taken for class j.
        calibration_error: expected calibration error, 0 to 1: how far the probability of the predicted class is from
            the share of predictions that are right, on average over 15 bins of that probability (Guo et al., 2017).
    """

    class_names: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration_error: float

    @property
    def num_images(self) -> int:
        """All images."""
        return sum(map(sum, self.confusion))

    @property
    def num_correct(self) -> int:
        """Images whose most probable class is theirs."""
        return sum(row[i] for i, row in enumerate(self.confusion))

    @property
    def accuracy(self) -> float:
        """Top-1 accuracy, 0 to 1."""
        return self.num_correct / self.num_images

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """95 % confidence interval of the accuracy (Wilson)."""
        return wilson_interval(self.num_correct, self.num_images)

    @property
    def class_accuracies(self) -> tuple[float, ...]:
        """Share of each class's images that were predicted right; NaN for a class without images."""
        return tuple(row[i] / sum(row) if sum(row) else math.nan for i, row in enumerate(self.confusion))

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON has them; null for the accuracy of a class without images."""
        return {
            "num_images": self.num_images,
            "num_correct": self.num_correct,
            "accuracy": self.accuracy,
            "accuracy_interval_95": list(self.accuracy_interval),
            "calibration_error": self.calibration_error,
            "class_accuracies": {
                name: None if math.isnan(value) else value
                for name, value in zip(self.class_names, self.class_accuracies, strict=True)
            },
            "confusion_matrix": [list(row) for row in self.confusion],
        }


def classification_metrics(
    logits: Float[Tensor, "images classes"], labels: Int64[Tensor, " images"], class_names: Sequence[str]
) -> ClassificationMetrics:
    """Compare a classifier's logits with the truth.

    Args:
        logits: (n, classes), before the softmax; at least one image.
        labels: (n,), the right classes, from 0.
        class_names: one a class.

    Raises:
        ShapeError: no images, or sizes or labels that do not fit together.
    """
    classes = len(class_names)
    if logits.ndim != 2 or len(logits) == 0 or logits.shape[1] != classes or labels.shape != logits.shape[:1]:
        raise ShapeError(
            f"Expected logits (n, {classes}) and labels (n,) with n of 1 or more; got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ShapeError(f"Labels go from {labels.min()} to {labels.max()}; there are the classes 0 to {classes - 1}.")
    logits, labels = logits.detach().float().cpu(), labels.cpu()
    confusion = multiclass_confusion_matrix(logits.argmax(dim=1), labels, num_classes=classes)
    calibration = multiclass_calibration_error(
        logits.softmax(dim=1), labels, num_classes=classes, n_bins=CALIBRATION_BINS, norm="l1"
    )
    return ClassificationMetrics(
        class_names=tuple(class_names),
        confusion=tuple(tuple(row) for row in confusion.tolist()),
        calibration_error=calibration.item(),
    )


def wilson_interval(num_correct: int, num_images: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of a proportion, which stays within 0 and 1 also when all is right.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    z = 1.959963984540054  # 97.5 % quantile of the normal distribution
    p, n = num_correct / num_images, num_images
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def predicted(logits: Float[Tensor, "images classes"]) -> tuple[Int64[Tensor, " images"], Float[Tensor, " images"]]:
    """Return each image's most probable class and its probability."""
    probability, label = torch.softmax(logits.float(), dim=1).max(dim=1)
    return label, probability
