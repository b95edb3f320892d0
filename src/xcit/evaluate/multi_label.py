"""How good a classifier's predictions are, where an image may have several classes, or none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from xcit.errors import ShapeError


@dataclass(frozen=True)
class MultiLabelMetrics:
    """Figures over a set of images with several labels.

    Attributes:
        class_names: one a class.
        class_counts: images that have each class.
        average_precisions: of each class, 0 to 1: the area under its curve of precision over recall, as a sum of steps
            (no interpolation); NaN for a class that no image has.
        num_images: all images.
        loss: mean binary cross-entropy over images and classes, in nats.
    """

    class_names: tuple[str, ...]
    class_counts: tuple[int, ...]
    average_precisions: tuple[float, ...]
    num_images: int
    loss: float

    @property
    def mean_average_precision(self) -> float:
        """mAP, 0 to 1: the mean over the classes that some image has; NaN if there is none."""
        known = [value for value in self.average_precisions if not math.isnan(value)]
        return math.fsum(known) / len(known) if known else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON has them; null for the precision of a class that no image has."""

        def finite(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {
            "num_images": self.num_images,
            "mean_average_precision": finite(self.mean_average_precision),
            "loss": self.loss,
            "average_precisions": {
                name: finite(value) for name, value in zip(self.class_names, self.average_precisions, strict=True)
            },
            "class_counts": dict(zip(self.class_names, self.class_counts, strict=True)),
        }


class MultiLabelTotals:
    """The figures of a set that comes batch by batch.

    Exact average precision needs every score, so memory grows by 5 bytes for each image and class.

    Args:
        class_names: one a class, in the order of the logits.
    """

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        self.num_images = 0
        self._loss = 0.0
        self._logits: list[Tensor] = []
        self._targets: list[Tensor] = []

    def update(
        self,
        logits: Float[Tensor, "images classes"],
        targets: Float[Tensor, "images classes"] | Bool[Tensor, "images classes"],
    ) -> None:
        """Add a batch.

        Args:
            logits: (n, classes), before the sigmoid, on any device; n may be 0.
            targets: (n, classes), 1 where the image has the class, else 0.

        Raises:
            ShapeError: sizes that do not fit together, or other targets.
        """
        if logits.ndim != 2 or logits.shape[1] != len(self.class_names) or targets.shape != logits.shape:
            raise ShapeError(
                f"Expected logits and targets (n, {len(self.class_names)}); got {tuple(logits.shape)} and "
                f"{tuple(targets.shape)}."
            )
        logits, targets = logits.detach().float().cpu(), targets.cpu()
        if not ((targets == 0) | (targets == 1)).all():
            raise ShapeError("Targets must be 0 and 1: an image has a class or it has not.")
        self.num_images += len(logits)
        self._loss += F.binary_cross_entropy_with_logits(logits.double(), targets.double(), reduction="sum").item()
        self._logits.append(logits)
        self._targets.append(targets.bool())

    def compute(self) -> MultiLabelMetrics:
        """Return the figures of all batches so far.

        Raises:
            ShapeError: no image has come yet.
        """
        if not self.num_images:
            raise ShapeError("There are no images to count, so there is no precision; n must be 1 or more.")
        logits, targets = torch.cat(self._logits), torch.cat(self._targets)
        precisions = [
            # Ranks are all that counts; torchmetrics would round large logits to equal probabilities, hence ranks.
            binary_average_precision(_ranks(scores), truth.long()).item() if truth.any() else math.nan
            for scores, truth in zip(logits.T, targets.T, strict=True)
        ]
        return MultiLabelMetrics(
            class_names=self.class_names,
            class_counts=tuple(targets.sum(dim=0).tolist()),
            average_precisions=tuple(precisions),
            num_images=self.num_images,
            loss=self._loss / logits.numel(),
        )


def multi_label_metrics(
    logits: Float[Tensor, "images classes"],
    targets: Float[Tensor, "images classes"] | Bool[Tensor, "images classes"],
    class_names: Sequence[str],
) -> MultiLabelMetrics:
    """Compare a classifier's logits with the truth.

    Args:
        logits: (n, classes), before the sigmoid; at least one image.
        targets: (n, classes), 1 where the image has the class, else 0.
        class_names: one a class.

    Raises:
        ShapeError: no images, or sizes that do not fit together.
    """
    totals = MultiLabelTotals(class_names)
    totals.update(logits, targets)
    return totals.compute()


def _ranks(scores: Tensor) -> Tensor:
    """Return numbers between 0 and 1 in the order of the scores, equal ones for equal scores."""
    _, ranks = scores.unique(sorted=True, return_inverse=True)
    return ranks.double() / max(1, int(ranks.max()))
