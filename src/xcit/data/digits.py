"""Handwritten digits that need no download: scikit-learn's 1,797 grey images of 8 x 8 pixels, white ink on black.

They are the test part of the UCI "Optical Recognition of Handwritten Digits" data (Alpaydin and Kaynak, 1998), written
by 13 people. The three parts below are drawn from all of them, so the same hands stand in each: accuracy on the
held-out part is accuracy on new digits of known writers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from xcit.data.preprocess import Preprocessing
from xcit.errors import BackendError, ConfigError

try:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError:
    raise BackendError('The digits come with scikit-learn, which is not installed: pip install "xcit[train]"') from None

CLASS_NAMES = tuple("0123456789")
TEST_FRACTION = 0.2
SPLIT_SEED = 0
"""Fixed, and no option: a digit that is held out once is held out in every run, whatever its seed."""
WHITE = 16
"""Scikit-learn's images count ink from 0 to 16."""


@dataclass(frozen=True)
class Digits:
    """Some of the digits, as they are stored.

    Attributes:
        images: (n, 8, 8) uint8, 0 black (paper) to 255 white (ink).
        labels: (n,) int64, the digit.
        indices: (n,) int64, the position of each in scikit-learn's data.
    """

    images: np.ndarray
    labels: np.ndarray
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """Return one digit as a Pillow image in mode "L", 8 x 8."""
        return Image.fromarray(self.images[index])

    def subset(self, positions: Sequence[int]) -> Digits:
        """Return the digits at these positions, in this order."""
        chosen = np.asarray(positions, dtype=np.int64)
        return Digits(self.images[chosen], self.labels[chosen], self.indices[chosen])


class DigitSplits(NamedTuple):
    """The digits in three parts without overlap, each with the classes in the same proportion."""

    train: Digits
    """What the weights are fitted to."""
    val: Digits
    """What choices are made on: size, epochs, augmentation, and the epoch that is kept."""
    test: Digits
    """The held-out fifth, which is looked at once, when all choices are made."""


def digit_splits(val_fraction: float = 0.2) -> DigitSplits:
    """Return the digits in their three parts; the same ones on every call.

    Args:
        val_fraction: share of what is not held out that serves for validation, between 0.05 and 0.5.

    Raises:
        ConfigError: the share is out of its range.
    """
    if not 0.05 <= val_fraction <= 0.5:
        raise ConfigError(f"val_fraction is {val_fraction}; it must be between 0.05 and 0.5.")
    data = load_digits()
    images = np.rint(data.images * (255 / WHITE)).astype(np.uint8)
    labels = data.target.astype(np.int64)

    def part(indices: np.ndarray) -> Digits:
        return Digits(images[indices], labels[indices], indices)

    rest, test = _stratified(np.arange(len(labels)), labels, TEST_FRACTION)
    train, val = _stratified(rest, labels, val_fraction)
    return DigitSplits(part(train), part(val), part(test))


def _stratified(indices: np.ndarray, labels: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    first, second = train_test_split(
        indices, test_size=fraction, stratify=labels[indices], random_state=SPLIT_SEED, shuffle=True
    )
    return np.sort(first), np.sort(second)


def digit_preprocessing(train: Digits, image_size: int) -> Preprocessing:
    """Return how a picture of a digit is prepared: grey, enlarged by bicubic interpolation, normalised.

    Args:
        train: the digits whose enlarged pixels give mean and standard deviation.
        image_size: pixels a side.
    """
    unit = Preprocessing((image_size, image_size), mean=(0.0,), std=(1.0,), in_chans=1)
    pixels = torch.stack([unit(train.picture(i)) for i in range(len(train))]).double()
    mean, std = round(pixels.mean().item(), 4), round(pixels.std().item(), 4)
    return Preprocessing((image_size, image_size), mean=(mean,), std=(std,), in_chans=1)
