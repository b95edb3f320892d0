"""Images that an int8 file is calibrated on and judged by: from a folder, prepared as the model expects them.

Legend: B batch, C channels, H x W the image.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from xcit.data.images import find_images, open_image
from xcit.data.preprocess import Preprocessing
from xcit.data.sources import open_eval_set
from xcit.errors import ConfigError, DataError

NUM_IMAGES = 300
"""That calibration takes of a folder unless told otherwise: NNCF's own choice, and enough for onnxruntime's ranges."""
CACHE_BYTES = 2**29
"""Prepared images beyond this many bytes are prepared again each time that they are needed."""
_PIXELS_A_BATCH = 8 * 224 * 224
"""Of a file that takes any number of images at once."""

log = logging.getLogger("xcit")


class PreparedImages(Sequence[np.ndarray]):
    """Images ready for the model, float32 (C, H, W) each. Those that cannot be read are left out, with a log line.

    Args:
        readers: of each image: returns it, or raises DataError.
        preprocessing: what the model expects.
        what: these images are for, for messages, such as "calibration".

    Attributes:
        skipped: how many were left out.
        positions: of the images among ``readers``.

    Raises:
        DataError: none can be read.
    """

    def __init__(self, readers: Sequence[Callable[[], Image.Image]], preprocessing: Preprocessing, what: str) -> None:
        self._readers, self._preprocessing = readers, preprocessing
        self._cache: dict[int, np.ndarray] = {}
        self.positions: list[int] = []
        reasons = []
        space = CACHE_BYTES
        for position, read in enumerate(readers):
            try:
                pixels = preprocessing(read()).numpy()
            except DataError as error:
                reasons.append(str(error))
                continue
            self.positions.append(position)
            space -= pixels.nbytes
            if space >= 0:
                self._cache[position] = pixels
        self.skipped = len(reasons)
        if not self.positions:
            raise DataError(f"None of the {len(readers)} images for {what} can be read. The first: {reasons[0]}")
        if reasons:
            log.warning(
                "%d of %d images for %s cannot be read and are left out. The first: %s",
                len(reasons), len(readers), what, reasons[0],
            )  # fmt: skip

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # an int or a slice, as of any sequence
        """Return an image, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = self.positions[index]
        pixels = self._cache.get(position)
        return self._preprocessing(self._readers[position]()).numpy() if pixels is None else pixels


@dataclass(frozen=True)
class Validation:
    """Images whose classes are known."""

    name: str
    """Of the folder."""
    images: PreparedImages
    labels: np.ndarray
    """(images,) int64: of each the class, by the number of its logit."""


def calibration_images(
    source: str | os.PathLike[str], preprocessing: Preprocessing, num_images: int = NUM_IMAGES
) -> PreparedImages:
    """Return images to calibrate on.

    Args:
        source: a folder, searched to any depth, or what else ``find_images`` takes.
        preprocessing: what the model expects.
        num_images: at most, taken at even distances from all in their natural order, so that each folder below gets
            its share.

    Raises:
        DataError: no images, or none that can be read.
        ConfigError: fewer than one image.
    """
    if num_images < 1:
        raise ConfigError(f"The number of calibration images is {num_images}; it must be 1 or more.")
    paths = find_images([source])
    if len(paths) > num_images:
        paths = [paths[i * len(paths) // num_images] for i in range(num_images)]
    return PreparedImages([_Reader(path, preprocessing.in_chans) for path in paths], preprocessing, "calibration")


def validation_images(
    source: str | os.PathLike[str], preprocessing: Preprocessing, class_names: Sequence[str]
) -> Validation:
    """Return labelled images to judge by, as `xcit eval` reads them: class folders, a list, shards.

    Args:
        source: of a data set with parts its test part is taken, or else its val part.
        preprocessing: what the model expects.
        class_names: the model's, in the order of its logits; numbers where it has none.

    Raises:
        DataError: no images, none that can be read, classes that the model lacks, or several classes an image.
    """
    found = open_eval_set(os.fspath(source), in_chans=preprocessing.in_chans, class_names=class_names)
    if found.multi_label:
        raise DataError(f"{source}: has several classes an image, so that there is no top-1; give class folders.")
    images = PreparedImages([_Opener(found.open, index) for index in range(len(found))], preprocessing, "validation")
    return Validation(Path(source).expanduser().resolve().name, images, np.asarray(found.labels)[images.positions])


def batches(images: Sequence[np.ndarray], number: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Yield images in batches.

    Args:
        images: float32 (C, H, W) each.
        number: in every batch; the last one is filled from the beginning. None for a number of the images' size.

    Yields:
        Images (B, C, H, W), and how many of them are new.
    """
    exact = number is not None
    number = number or max(1, _PIXELS_A_BATCH // images[0][0].size)
    for start in range(0, len(images), number):
        part = [images[i] for i in range(start, min(len(images), start + number))]
        filled = part + [images[i % len(images)] for i in range(number - len(part))] if exact else part
        yield np.stack(filled), len(part)


def batch_of(images: Sequence[np.ndarray], shape: tuple[int, int, int, int], first: int) -> torch.Tensor:
    """Return one batch of a given shape; images of another size are resized.

    Args:
        images: float32 (C, H, W) each.
        shape: (B, C, H, W).
        first: with which image to begin; after the last comes the first again.
    """
    B, _, H, W = shape
    picked = torch.from_numpy(np.stack([images[(first + i) % len(images)] for i in range(B)]))
    if picked.shape[2:] == (H, W):
        return picked
    return F.interpolate(picked, (H, W), mode="bilinear", antialias=True)


@dataclass(frozen=True)
class _Reader:
    path: Path
    in_chans: int

    def __call__(self) -> Image.Image:
        return open_image(self.path, self.in_chans)


@dataclass(frozen=True)
class _Opener:
    open: Callable[[int], Image.Image]
    index: int

    def __call__(self) -> Image.Image:
        return self.open(self.index)
