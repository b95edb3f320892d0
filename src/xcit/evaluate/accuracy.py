"""How often the right class comes first, or among the first five, where each image has a score for each class."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from xcit.evaluate.classification import wilson_interval

TOP5_CLASSES = 6
"""With fewer classes the right one is always among the first five."""


class Accuracy(NamedTuple):
    """Counts over a set of images."""

    num_images: int
    num_correct: int
    num_top5_correct: int | None
    """None with fewer than six classes."""

    @property
    def top1(self) -> float:
        """Share of images whose class comes first, 0 to 1."""
        return self.num_correct / self.num_images

    @property
    def top5(self) -> float | None:
        """Share of images whose class is among the first five; None with fewer than six classes."""
        return None if self.num_top5_correct is None else self.num_top5_correct / self.num_images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of ``top1`` (Wilson)."""
        return wilson_interval(self.num_correct, self.num_images)


def ranks(
    scores: Float[Tensor, "images classes"], labels: Int64[Tensor, " images"], floor: float | None = None
) -> Int64[Tensor, " images"]:
    """Return at which place, from 0, each image's class comes; of equal scores the class of the lower number first.

    Args:
        scores: the larger the likelier.
        labels: the right classes.
        floor: a class with this score or less comes last, behind all others.
    """
    classes = torch.arange(scores.shape[1], device=scores.device)
    own = scores.gather(1, labels[:, None])
    ahead = (scores > own) | ((scores == own) & (classes < labels[:, None]))
    places = ahead.sum(dim=1)
    if floor is not None:
        places = torch.where(own[:, 0] > floor, places, scores.shape[1])
    return places


def accuracy_of(places: Int64[Tensor, " images"], num_classes: int) -> Accuracy:
    """Count the places that ``ranks`` returned."""
    top5 = int((places < 5).sum()) if num_classes >= TOP5_CLASSES else None
    return Accuracy(len(places), int((places == 0).sum()), top5)
