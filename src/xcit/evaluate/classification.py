"""How good a classifier's predictions are, where each image has one class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from xcit.errors import ShapeError

CALIBRATION_BINS = 15
TOP = 5
"""The second figure of ImageNet's protocol: whether the right class is among the so many most probable ones."""


@dataclass(frozen=True)
class ClassificationMetrics:
    """Figures over a set of labelled images.

    Attributes:
        class_names: one a class.
        confusion: ``confusion[i][j]`` images of class i were taken for class j.
        calibration_error: expected calibration error, 0 to 1: how far the probability of the predicted class is from
            the share of predictions that are right, on average over 15 bins of that probability (Guo et al., 2017).
        loss: mean cross-entropy in nats, of plain labels (no smoothing).
        num_top5_correct: images whose class is among the five most probable ones; None with fewer than six classes,
            where it would be all of them.
    """

    class_names: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    calibration_error: float
    loss: float | None = None
    num_top5_correct: int | None = None

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
    def top5_accuracy(self) -> float | None:
        """Top-5 accuracy, 0 to 1; None with fewer than six classes."""
        return None if self.num_top5_correct is None else self.num_top5_correct / self.num_images

    @property
    def class_counts(self) -> tuple[int, ...]:
        """Images of each class."""
        return tuple(map(sum, self.confusion))

    @property
    def class_accuracies(self) -> tuple[float, ...]:
        """Share of each class's images that were predicted right; NaN for a class without images."""
        return tuple(row[i] / sum(row) if sum(row) else math.nan for i, row in enumerate(self.confusion))

    def mistakes(self) -> list[tuple[int, int, int]]:
        """Return (class, what it was taken for, images) for each kind of mistake that was made, most frequent first."""
        found = [
            (i, j, count) for i, row in enumerate(self.confusion) for j, count in enumerate(row) if count and i != j
        ]
        return sorted(found, key=lambda mistake: (-mistake[2], mistake[:2]))

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON has them; null for the accuracy of a class without images."""
        return {
            "num_images": self.num_images,
            "num_correct": self.num_correct,
            "accuracy": self.accuracy,
            "accuracy_interval_95": list(self.accuracy_interval),
            "num_top5_correct": self.num_top5_correct,
            "top5_accuracy": self.top5_accuracy,
            "loss": self.loss,
            "calibration_error": self.calibration_error,
            "class_accuracies": {
                name: None if math.isnan(value) else value
                for name, value in zip(self.class_names, self.class_accuracies, strict=True)
            },
            "confusion_matrix": [list(row) for row in self.confusion],
        }


class ClassificationTotals:
    """The figures of a set that comes batch by batch: counts, which are exact in any order of the batches, and sums.

    Memory does not grow with the number of images: a matrix of classes x classes, and the bins of the calibration.

    Args:
        class_names: one a class, in the order of the logits.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        classes = len(class_names)
        self.class_names = tuple(class_names)
        self.num_images = 0
        self._confusion = torch.zeros(classes * classes, dtype=torch.long)
        self._num_top5_correct = 0
        self._loss = 0.0
        self._bin_correct = torch.zeros(CALIBRATION_BINS, dtype=torch.long)
        self._bin_confidence = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)

    def update(self, logits: Float[Tensor, "images classes"], labels: Int64[Tensor, " images"]) -> None:
        """Add a batch.

        Args:
            logits: (n, classes), before the softmax, on any device; n may be 0.
            labels: (n,), the right classes, from 0.

        Raises:
            ShapeError: sizes or labels that do not fit together.
        """
        classes = len(self.class_names)
        if logits.ndim != 2 or logits.shape[1] != classes or labels.shape != logits.shape[:1]:
            raise ShapeError(
                f"Expected logits (n, {classes}) and labels (n,); got {tuple(logits.shape)} and {tuple(labels.shape)}."
            )
        if not len(labels):
            return
        if labels.min() < 0 or labels.max() >= classes:
            raise ShapeError(
                f"Labels go from {labels.min()} to {labels.max()}; there are the classes 0 to {classes - 1}."
            )
        logits, labels = logits.detach().float().cpu(), labels.cpu()
        guess = logits.argmax(dim=1)
        right = guess == labels
        self.num_images += len(labels)
        self._confusion += torch.bincount(labels * classes + guess, minlength=classes * classes)
        if classes > TOP:
            self._num_top5_correct += int((logits.topk(TOP, dim=1).indices == labels[:, None]).sum())
        self._loss += F.cross_entropy(logits.double(), labels, reduction="sum").item()
        confidence = logits.softmax(dim=1).gather(1, guess[:, None])[:, 0]
        edges = torch.linspace(0, 1, CALIBRATION_BINS + 1)
        # Bins hold their lower end; the last holds 1 as well, which float32 rounds a certain prediction to.
        bins = (torch.bucketize(confidence, edges, right=True) - 1).clamp(max=CALIBRATION_BINS - 1)
        self._bin_correct.index_add_(0, bins, right.long())
        self._bin_confidence.index_add_(0, bins, confidence.double())

    def compute(self) -> ClassificationMetrics:
        """Return the figures of all batches so far.

        Raises:
            ShapeError: no image has come yet.
        """
        if not self.num_images:
            raise ShapeError("There are no images to count, so there is no accuracy; n must be 1 or more.")
        classes = len(self.class_names)
        # In each bin: images x |mean confidence - share of right ones| = |sum of confidences - number of right ones|.
        gaps = (self._bin_confidence - self._bin_correct).abs()
        return ClassificationMetrics(
            class_names=self.class_names,
            confusion=tuple(tuple(row) for row in self._confusion.view(classes, classes).tolist()),
            calibration_error=gaps.sum().item() / self.num_images,
            loss=self._loss / self.num_images,
            num_top5_correct=self._num_top5_correct if classes > TOP else None,
        )


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
    totals = ClassificationTotals(class_names)
    totals.update(logits, labels)
    return totals.compute()


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
