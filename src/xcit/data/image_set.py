"""A set of labelled images wherever they lie: in folders, listed in a table, in tar shards, in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image


class NamedImages(Protocol):
    """Images that have names and are decoded when asked for, whatever else is known of them."""

    @property
    def names(self) -> Sequence[str]:
        """What each is called in messages and lists."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> Image.Image:
        """Return the image at a position; raises DataError where it cannot be read."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, decoded one by one when asked for. Worker processes get a copy, so it must be picklable.

    Attributes:
        class_names: one a class, in the order of the logits.
        names: what each image is called in messages and lists, such as its path.
        labels: (n,) int64, the class of each image from 0; or (n, classes) bool, where an image may have several.
        read: decodes the image of a number, in the mode of ``channels`` ("RGB" for 3, "L" for 1); raises DataError
            where it cannot.
        numbers: (n,) int64, the number that ``read`` knows each image by.
    """

    class_names: tuple[str, ...]
    names: Sequence[str]
    labels: np.ndarray
    read: Callable[[int], Image.Image]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def open(self, index: int) -> Image.Image:
        """Return the image at a position.

        Raises:
            DataError: it cannot be read or decoded; the message names the file.
        """
        return self.read(int(self.numbers[index]))

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes, or none."""
        return self.labels.ndim == 2

    @property
    def class_counts(self) -> np.ndarray:
        """(classes,) int64: images of each class."""
        if self.multi_label:
            return self.labels.sum(axis=0, dtype=np.int64)
        return np.bincount(self.labels, minlength=len(self.class_names)).astype(np.int64)

    def subset(self, positions: Sequence[int] | np.ndarray) -> ImageSet:
        """Return the images at these positions, in this order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return replace(
            self,
            names=[self.names[i] for i in chosen],
            labels=self.labels[chosen],
            numbers=self.numbers[chosen],
        )


class DataSplits(NamedTuple):
    """A data set in its parts, all with the same classes in the same order."""

    train: ImageSet
    """What the weights are fitted to."""
    val: ImageSet
    """What choices are made on: the epoch that is kept, when to stop."""
    test: ImageSet | None
    """Looked at once, when all choices are made; None where the data has no such part."""
    notes: tuple[str, ...] = ()
    """What a user should hear about the data, a sentence each: an empty class, a part that was split off."""
