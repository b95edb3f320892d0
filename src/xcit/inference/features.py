"""What a model sees in an image, as a vector: for search, for probes, for a classifier of one's own.

A classifier works as well as a backbone that was trained without labels: its head is left aside.
Legend: B batch, N patch tokens, C embed_dim.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xcit.data.preprocess import Preprocessing
from xcit.errors import ConfigError, DataError
from xcit.inference.stream import ImageStream, Item, Source, evaluating
from xcit.models.dialects import layout_of
from xcit.models.weights import bare
from xcit.models.xcit import XCiT

POOLS = ("token", "avg", "both", "gem")
"""How the final tokens become one vector: the class token; the mean of the patch tokens; the class token, then that
mean; the generalised mean of the patch tokens."""

MULTI_SCALE = (1.0, 2**-0.5, 0.5)
"""The scales of DINO's image retrieval."""

GEM_FLOOR = 1e-6
"""Least value that enters a generalised mean, which is of positive numbers only."""

_SHAPES_NO_FEATURE = ("num_classes", "global_pool", "attn_form", "drop_path_rate")


class Features(NamedTuple):
    """The features of one image, or why there are none."""

    path: Path | None
    """The file; None for an image or an array in memory."""
    name: str
    """The file as it was given, or "image 3" for the fourth one."""
    vector: np.ndarray | None
    """(dim,) float32, of whatever length; None when there is an error."""
    error: str | None = None
    """One sentence that names the image."""


class FeatureExtractor(ImageStream):
    """Turn images into vectors with an XCiT and the preprocessing that its weights expect.

    The vectors are as the model gives them. Whoever compares them by cosine normalises their length.

    Args:
        model: what ``create_model`` takes as a name (with ``pretrained=True``: an architecture means its distilled
            weights at 224 px, ``dino_xcit_small_12_p16`` the backbone that DINO trained), the path of a checkpoint, or
            an ``XCiT`` itself, compiled or not. A model that is passed stays the caller's: it is used where it lies
            and is neither moved nor left in another mode.
        pool: one of ``POOLS``.
        device: "auto", "cpu", "cuda", "cuda:1" or "mps". For a model that is passed, "auto" is the device it is on.
        batch_size: images that go through the model at once; None for as many as have the pixels of 32 images of 224.
        image_size: side in pixels (or height and width) of what the model gets, instead of what its weights expect.
        preprocessing: instead of the one that ``model.pretrained_cfg`` describes.
        scales: the prepared image is resized by each of these factors, in (0, 8], and the features are averaged.
            ``MULTI_SCALE`` has DINO's.
        gem_p: the exponent of the generalised mean, more than 0: 1 is the mean, a large one near the maximum.

    Attributes:
        model: the model.
        device: where it runs.
        preprocessing: how images are prepared.
        dim: length of a vector.
        batch_size: images in a batch.
        settings: what a file or an index notes about where its vectors come from; plain values that JSON takes.

    Raises:
        UnknownNameError: no such model.
        CheckpointError: its weights cannot be had; for a file that does not say of which architecture they are, the
            message says how to load it.
        ConfigError: no such pool; a class token of a model that has none; a scale at which an image would be smaller
            than a patch; another number out of its range; or what ``Predictor`` refuses.
        BackendError: the device is not available here.

    Example:
        >>> extract = xcit.FeatureExtractor("dino_xcit_small_12_p16")
        >>> extract("photos/").shape
        (120, 384)

    Source: [dino] eval_knn.py (class token), eval_image_retrieval.py (scales), eval_copy_detection.py (GeM, p = 4,
    there beside the class token).
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | nn.Module,
        *,
        pool: str = "token",
        device: str = "auto",
        batch_size: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        preprocessing: Preprocessing | None = None,
        scales: Sequence[float] = (1.0,),
        gem_p: float = 4.0,
    ) -> None:
        self.pool, self.scales, self.gem_p = pool, tuple(float(scale) for scale in scales), float(gem_p)
        self._check_settings()
        super().__init__(
            model, device=device, batch_size=batch_size, image_size=image_size, preprocessing=preprocessing
        )
        xcit = bare(self.model)
        size, patch_size = min(self.preprocessing.image_size), xcit.config["patch_size"]
        if int(size * min(self.scales)) < patch_size:
            raise ConfigError(
                f"At scale {min(self.scales):g} an image of {size} px is smaller than one patch of {patch_size}; use a "
                f"scale of {patch_size / size:.3g} or more, or a larger image_size."
            )
        self.dim = xcit.embed_dim * (2 if pool == "both" else 1)
        self.settings: dict[str, Any] = {
            "model": type(xcit).__name__ if isinstance(model, nn.Module) else os.fspath(model),
            "architecture": _architecture(xcit),
            "pool": pool,
            "dim": self.dim,
            "scales": list(self.scales),
            "gem_p": self.gem_p if pool == "gem" else None,
            "dtype": str(next(xcit.parameters()).dtype).removeprefix("torch."),
            "preprocessing": self.preprocessing.to_cfg(),
        }

    @property
    def fingerprint(self) -> str:
        """Hexadecimal checksum of all that the features depend on: two extractors with the same one give the same.

        That is the weights but for the classifier's, the architecture, the preprocessing, the pooling and the scales;
        not the device, the batch size, or where the weights came from. It is computed anew each time, since the weights
        of a model that was passed may change.
        """
        xcit = bare(self.model)
        config = {k: v for k, v in xcit.config.items() if k not in _SHAPES_NO_FEATURE and not k.endswith("drop_rate")}
        settings = {k: v for k, v in self.settings.items() if k not in ("model", "architecture")}
        digest = hashlib.sha256(json.dumps([config, settings], sort_keys=True).encode())
        for name, tensor in sorted(xcit.state_dict().items()):
            if not name.startswith("head."):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def __call__(self, images: Source | Iterable[Source]) -> Float[np.ndarray, "images dim"]:
        """Return the features of each image.

        Args:
            images: a file, a folder or a pattern (see ``find_images``), a Pillow image, an array (see
                ``array_to_image``), or any number of these.

        Returns:
            (n, dim) float32, in the images' order.

        Raises:
            DataError: an image that cannot be read; none is left out. ``stream`` carries on instead.
            ConfigError: an object that is no image, or a batch that does not fit in memory.
            CheckpointError: the model's weights are not finite.
        """
        vectors = []
        for features in self.stream(images):
            if features.vector is None:
                raise DataError(features.error or features.name)
            vectors.append(features.vector)
        return np.stack(vectors) if vectors else np.empty((0, self.dim), dtype=np.float32)

    def stream(self, images: Source | Iterable[Source]) -> Iterator[Features]:
        """Yield the features of each image as they are made; one that cannot be read has ``error`` set.

        ``images`` is read as far ahead as two batches and a few images, so that it may be endless.
        """
        for items, rows in self._batches(images):
            yield from self._features(items, rows)

    def tensors(self, batch: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch dim"]:
        """Return the features of images that are prepared already, of any size.

        Args:
            batch: normalised as ``preprocessing`` does; it is moved to the model's device.

        Returns:
            (B, dim) float32 on the model's device, without gradients. Values that are not finite are not looked for.
        """
        with torch.no_grad(), evaluating(self.model):
            return self._compute(batch.to(self.device, next(self.model.parameters()).dtype))

    def _features(self, items: list[Item], rows: Tensor) -> Iterator[Features]:
        finite = rows.isfinite().all(dim=1)
        if not bool(finite.all()):
            self.check_weights()
        vectors = iter(zip(finite.tolist(), rows.numpy(), strict=True))
        for item in items:
            if item.error:
                yield Features(item.path, item.name, None, item.error)
                continue
            is_finite, vector = next(vectors)
            if is_finite:
                yield Features(item.path, item.name, vector.copy())  # which does not hold on to the whole batch
            else:
                yield Features(
                    item.path,
                    item.name,
                    None,
                    f"{item.name}: the model's features are NaN or infinite, though its weights are finite: something "
                    f"overflows in {self.settings['dtype']}; use a wider type.",
                )

    def _compute(self, batch: Tensor) -> Tensor:
        total = torch.zeros(len(batch), self.dim, device=batch.device)
        for scale in self.scales:
            images = batch
            if scale != 1:
                images = F.interpolate(batch, scale_factor=scale, mode="bilinear", align_corners=False)
            total += pooled_features(bare(self.model), images, self.pool, self.gem_p).float()
        return total / len(self.scales)

    @property
    def _width(self) -> int:
        return self.dim

    def _check_model(self, model: XCiT) -> None:
        if self.pool in ("token", "both") and model.cls_token is None:
            raise ConfigError(
                f"The model has no class token (variant {model.config['variant']}), which pool={self.pool!r} asks for; "
                f"use pool='avg'."
            )

    def _check_settings(self) -> None:
        problems = []
        if self.pool not in POOLS:
            problems.append(f"pool is {self.pool!r}; it must be one of {', '.join(POOLS)}")
        if not self.scales or not all(0 < scale <= 8 for scale in self.scales):
            problems.append(f"scales are {self.scales}; there must be one or more, each more than 0 and at most 8")
        if not 0 < self.gem_p < float("inf"):
            problems.append(f"gem_p is {self.gem_p}; it must be a number more than 0")
        if problems:
            raise ConfigError("; ".join(problems) + ".")


def pooled_features(
    model: XCiT, images: Float[Tensor, "batch chans height width"], pool: str = "token", gem_p: float = 4.0
) -> Float[Tensor, "batch dim"]:
    """Return the final tokens of images as one vector each, in the mode the model is in, with gradients if enabled.

    The generalised mean of a channel over the patches is ``mean(max(x, 1e-6) ** p) ** (1 / p)``.

    Args:
        model: its head is not asked.
        images: (B, C, H, W), prepared.
        pool: one of ``POOLS``.
        gem_p: the exponent of "gem".

    Returns:
        (B, C), or (B, 2 C) for "both".
    """
    tokens = model.forward_features(images)
    patches = tokens[:, model.num_prefix_tokens :]
    if pool == "token":
        return tokens[:, 0]
    if pool == "avg":
        return patches.mean(dim=1)
    if pool == "both":
        return torch.cat((tokens[:, 0], patches.mean(dim=1)), dim=1)
    return patches.float().clamp_min(GEM_FLOOR).pow(gem_p).mean(dim=1).pow(1 / gem_p)


def _architecture(model: XCiT) -> str:
    layout = layout_of(model.state_dict())
    variant = model.config["variant"]
    name = "custom" if layout is None or layout.architecture is None else layout.architecture.id
    return name if variant == "none" else f"{name} ({variant})"
