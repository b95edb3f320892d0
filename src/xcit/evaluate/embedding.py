"""A set of labelled images as an array of features: what every probe of a frozen backbone starts from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from xcit.data.image_set import ImageSet
from xcit.data.loading import default_workers, eval_loader
from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.evaluate.run import AUTOCAST, Precision, QuietImages, Skipped, next_batch, why_broken
from xcit.inference.devices import is_out_of_memory
from xcit.inference.features import FeatureExtractor


class SetFeatures(NamedTuple):
    """The features of a set, a row an image, in the set's order."""

    features: np.ndarray
    """(n, dim) float32; zeros where the image could not be decoded."""
    labels: np.ndarray
    """(n,) int64, the class of each."""
    decoded: np.ndarray
    """(n,) bool."""
    skipped: tuple[Skipped, ...] = ()
    """The images that could not be decoded, and why."""

    def usable(self) -> tuple[np.ndarray, np.ndarray]:
        """Return features and labels of the images that could be decoded."""
        if self.decoded.all():
            return self.features, self.labels
        return self.features[self.decoded], self.labels[self.decoded]

    def subset(self, positions: np.ndarray) -> SetFeatures:
        """Return the rows at these positions; what was skipped stays with the whole."""
        return SetFeatures(self.features[positions], self.labels[positions], self.decoded[positions])


def embed_set(
    model: nn.Module | FeatureExtractor,
    images: ImageSet,
    preprocessing: Preprocessing | None = None,
    *,
    pool: str = "token",
    batch_size: int | None = None,
    num_workers: int | None = None,
    precision: Precision = "32",
    max_bad_fraction: float = 0.1,
    on_progress: Callable[[int], None] | None = None,
) -> SetFeatures:
    """Return the features of all images of a set, decoded by worker processes.

    Args:
        model: an ``XCiT``, in whatever mode and on whatever device, in which it is left; or an extractor, which brings
            its own preprocessing and pooling.
        images: with one class an image.
        preprocessing: how they are prepared; None for the model's own.
        pool: one of ``xcit.inference.features.POOLS``.
        batch_size: images at once; None for as many as have the pixels of 32 images of 224.
        num_workers: processes that decode; 0 does it in this one; None chooses by the number of cores.
        precision: float32, or autocast to bfloat16 or float16.
        max_bad_fraction: share of the images that may fail to decode, 0 to 1.
        on_progress: called after each batch with the number of images done, the skipped ones included.

    Raises:
        ConfigError: an empty set, several classes an image, what ``FeatureExtractor`` refuses, a batch that does not
            fit in memory, or features that overflow.
        CheckpointError: the model's weights are not finite.
        DataError: more images are broken than may be.
        BackendError: a worker process died.
    """
    if images.multi_label:
        raise ConfigError("Probes are for images with one class each; these may have several.")
    if not len(images):
        raise ConfigError("There are no images to probe the model with.")
    if isinstance(model, FeatureExtractor):
        extract = model
    else:
        extract = FeatureExtractor(model, pool=pool, preprocessing=preprocessing, batch_size=batch_size)
    step = batch_size or extract.batch_size
    workers = default_workers() if num_workers is None else num_workers
    device = extract.device
    loader = eval_loader(
        QuietImages(images, extract.preprocessing),
        step,
        num_workers=min(workers, -(-len(images) // step)),
        pin_memory=device.type == "cuda",
    )
    features = np.zeros((len(images), extract.dim), dtype=np.float32)
    decoded = np.zeros(len(images), dtype=bool)
    bad: list[int] = []
    done = 0
    batches = iter(loader)
    while (batch := next_batch(batches)) is not None:
        good = batch.decoded
        if not bool(good.all()):
            bad += batch.indices[~good].tolist()
            if len(bad) > max_bad_fraction * len(images):
                raise DataError(
                    f"{len(bad)} of {len(images)} images cannot be decoded so far, more than the share of "
                    f"{max_bad_fraction:g} that may fail. The first: {why_broken(images, bad[0])} Mend or remove them."
                )
        if bool(good.any()):
            positions = batch.indices[good].numpy()
            features[positions] = _rows(extract, batch.images[good], precision)
            decoded[positions] = True
        done += len(batch.labels)
        if on_progress is not None:
            on_progress(done)
    if not decoded.any():
        raise DataError(f"None of the {len(images)} images could be decoded. The first: {why_broken(images, 0)}")
    skipped = tuple(Skipped(images.names[index], why_broken(images, index)) for index in bad)
    return SetFeatures(features, images.labels.astype(np.int64), decoded, skipped)


def _rows(extract: FeatureExtractor, batch: torch.Tensor, precision: Precision) -> np.ndarray:
    out_of_memory = False
    cast = torch.autocast(extract.device.type, AUTOCAST[precision]) if precision in AUTOCAST else nullcontext()
    try:
        with cast:
            rows = extract.tensors(batch).float().cpu()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        out_of_memory = True
    if out_of_memory:  # outside of the handler: the error's traceback would keep the failed batch's memory
        N, _, H, W = batch.shape
        way_out = f"take --batch-size {N // 2}" if N > 1 else "take smaller images, a smaller model or another device"
        raise ConfigError(f"Out of memory on {extract.device} with {N} images of {H} x {W} px at once; {way_out}.")
    if not bool(rows.isfinite().all()):
        extract.check_weights()
        raise ConfigError(
            "The model's features are NaN or infinite, though its weights are finite: something overflows in "
            f"{extract.settings['dtype'] if precision == '32' else precision}; compute in a wider type."
        )
    return rows.numpy()
