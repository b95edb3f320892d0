"""Image sets as a data loader takes them: decoded, distorted or prepared, and safe from files that are broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from xcit.data.batches import LabelledImages
from xcit.data.image_set import ImageSet, NamedImages
from xcit.data.preprocess import Preprocessing
from xcit.data.sampling import Draw, derive_seed, seeded
from xcit.errors import DataError

MAX_TRIES = 20
"""Images in a row that cannot be decoded. With a tenth of all broken, so many are a matter of 1 in 10^20."""


class Opened(NamedTuple):
    """What came of a draw."""

    image: Image.Image
    index: int  # type: ignore[assignment]  # a tuple has a method of that name
    """Its position in the set."""
    decoded: bool
    """Whether it is the image that was drawn, and not one that stands in for it."""


def open_drawn(images: NamedImages, draw: Draw) -> Opened:
    """Return the drawn image, or where it cannot be decoded another one, which the draw's seed decides.

    Raises:
        DataError: nor can any of the next so many be decoded; with the reason of the first.
    """
    index, seed = draw
    first: DataError | None = None
    for attempt in range(MAX_TRIES):
        try:
            return Opened(images.open(index), index, first is None)
        except DataError as err:
            first = first or err
            index = derive_seed(seed, attempt) % len(images)
    raise DataError(f"{MAX_TRIES} images in a row could not be decoded. The first: {first}")


class TrainImages(Dataset[LabelledImages]):
    """Images to train on, distorted anew for each draw.

    In place of an image that cannot be decoded another one comes, which the draw's seed decides.

    Args:
        images: which ones.
        transform: distorts and normalises: a Pillow image to a tensor (chans, height, width). Its random numbers may
            come from the global generators of Python, NumPy and torch.
    """

    check = "xcit data check"

    def __init__(self, images: ImageSet, transform: Callable[[Image.Image], Tensor]) -> None:
        self.images = images
        self.transform = transform
        self.labels = _labels(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, draw: Draw) -> LabelledImages:
        """Return one drawn image.

        Raises:
            DataError: too many images in a row cannot be decoded; with the reason of the first.
        """
        opened = open_drawn(self.images, draw)
        with seeded(draw.seed):
            pixels = self.transform(opened.image)
        return LabelledImages(pixels, self.labels[opened.index], torch.tensor(draw.index), torch.tensor(opened.decoded))


class EvalImages(Dataset[LabelledImages]):
    """Images to judge a model by, prepared as its weights expect. One that cannot be decoded is marked as such.

    Args:
        images: which ones.
        preprocessing: resizes, crops and normalises.
    """

    def __init__(self, images: ImageSet, preprocessing: Preprocessing) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.labels = _labels(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> LabelledImages:
        """Return one image; zeros if it cannot be decoded."""
        try:
            pixels = self.preprocessing(self.images.open(index))
        except DataError:
            size = self.preprocessing.image_size
            pixels = torch.zeros(self.preprocessing.in_chans, *size)
            return LabelledImages(pixels, self.labels[index], torch.tensor(index), torch.tensor(False))
        return LabelledImages(pixels, self.labels[index], torch.tensor(index), torch.tensor(True))


def _labels(images: ImageSet) -> Tensor:
    return torch.from_numpy(images.labels.astype(np.float32 if images.multi_label else np.int64))
