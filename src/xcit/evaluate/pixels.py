"""What the features of a model stand beside: the pixels themselves, and their principal components."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from xcit.data.datasets import EvalImages
from xcit.data.image_set import ImageSet
from xcit.data.loading import default_workers, eval_loader
from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.evaluate.embedding import SetFeatures
from xcit.evaluate.run import Skipped, next_batch, why_broken

LARGEST_SIDE = 32
"""Pixels a side: beyond, they are too many numbers an image to compare or to fit anything to."""

LARGEST_ARRAY = 8 * 2**30
"""Bytes: all images are held in memory."""


def pixel_preprocessing(preprocessing: Preprocessing) -> Preprocessing:
    """Return a model's preprocessing at its size, or at 32 pixels on the shorter side if that is less."""
    shrink = min(1.0, LARGEST_SIDE / min(preprocessing.image_size))
    H, W = (max(1, round(side * shrink)) for side in preprocessing.image_size)
    return replace(preprocessing, image_size=(H, W))


def pixel_set(
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    num_workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> SetFeatures:
    """Return the pixels of a set's images as features: on the scale of 0 to 1, not normalised.

    Args:
        images: with one class an image.
        preprocessing: size, crop and channels; see ``pixel_preprocessing``.
        num_workers: processes that decode; None chooses by the number of cores.
        on_progress: called with the number of images done.

    Raises:
        ConfigError: several classes an image, or more pixels than should be held in memory.
        DataError: not one image can be decoded.
    """
    if images.multi_label:
        raise ConfigError("Probes are for images with one class each; these may have several.")
    chans = preprocessing.in_chans
    plain = replace(preprocessing, mean=(0.0,) * chans, std=(1.0,) * chans)
    H, W = plain.image_size
    if len(images) * chans * H * W * 4 > LARGEST_ARRAY:
        raise ConfigError(
            f"The pixels of {len(images):,} images of {H} x {W} px would take "
            f"{len(images) * chans * H * W * 4 / 2**30:.0f} GiB of memory; leave that baseline out."
        )
    features = np.zeros((len(images), chans * H * W), dtype=np.float32)
    decoded = np.zeros(len(images), dtype=bool)
    workers = default_workers() if num_workers is None else num_workers
    batches = iter(eval_loader(EvalImages(images, plain), 256, num_workers=min(workers, -(-len(images) // 256))))
    done = 0
    while (batch := next_batch(batches)) is not None:
        features[batch.indices.numpy()] = batch.images.flatten(1).numpy()
        decoded[batch.indices.numpy()] = batch.decoded.numpy()
        done += len(batch.labels)
        if on_progress is not None:
            on_progress(done)
    if not decoded.any():
        raise DataError(f"None of the {len(images)} images could be decoded. The first: {why_broken(images, 0)}")
    skipped = tuple(Skipped(images.names[i], why_broken(images, i)) for i in np.flatnonzero(~decoded).tolist())
    return SetFeatures(features, images.labels.astype(np.int64), decoded, skipped)


class PrincipalComponents:
    """The directions in which features vary most, found on some and applied to any.

    Args:
        fitted_to: whose mean and directions.
        dim: how many directions; at most as many as features, and one less than images.

    Attributes:
        mean: (D,) float64.
        directions: (D, dim) float64, orthonormal, the one of most variance first.
    """

    def __init__(self, fitted_to: SetFeatures, dim: int) -> None:
        rows, _ = fitted_to.usable()
        self.mean = rows.mean(axis=0, dtype=np.float64)
        covariance = np.zeros((rows.shape[1], rows.shape[1]))
        for start in range(0, len(rows), 8192):
            centred = rows[start : start + 8192] - self.mean
            covariance += centred.T @ centred
        dim = max(1, min(dim, rows.shape[1], len(rows) - 1))
        self.directions = np.linalg.eigh(covariance)[1][:, ::-1][:, :dim]

    def __call__(self, embedded: SetFeatures) -> SetFeatures:
        """Return the features along these directions."""
        projected = (embedded.features - self.mean) @ self.directions
        return embedded._replace(features=projected.astype(np.float32))
