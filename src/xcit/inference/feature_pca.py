"""What a model tells apart: the three directions in which its patch features vary most, as red, green and blue.

Patches of one colour have like features. One basis serves any number of images or frames, so that a colour means the
same in all of them. Legend: B images, (Hp, Wp) patch grid, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from xcit.errors import CheckpointError, DataError, ShapeError
from xcit.inference.stream import evaluating
from xcit.models.xcit import XCiT

OUTLIERS = 1.0
"""Per cent of the patches at either end that are clipped when a component is spread over a colour's range."""


class FeatureBasis(NamedTuple):
    """Three directions in feature space and what values they take."""

    mean: np.ndarray
    """(C,)."""
    components: np.ndarray
    """(3, C), orthonormal, those that vary most first; zeros where there are not so many."""
    low: np.ndarray
    """(3,): what is drawn black."""
    high: np.ndarray
    """(3,): what is drawn in full colour."""
    explained: np.ndarray
    """(3,): the share of all variance along each."""
    foreground: FeatureBasis | None
    """For pictures of the foreground alone, the directions among its patches; those here only tell it apart."""


def patch_features(
    model: XCiT, images: Float[Tensor, "batch chans height width"]
) -> Float[np.ndarray, "batch rows columns channels"]:
    """Return the final patch tokens, after the last norm, on their grid, as float64.

    Args:
        model: on any device; it is run in eval mode and without gradients, and left in the mode it was in.
        images: as the model takes them; they are moved to its device and dtype.

    Raises:
        CheckpointError: the features are not finite.
    """
    parameter = next(model.parameters())
    with torch.inference_mode(), evaluating(model):
        tokens = model.forward_features(images.to(parameter.device, parameter.dtype))[:, model.num_prefix_tokens :]
    if not tokens.isfinite().all():
        raise CheckpointError(
            "The model's features are NaN or infinite: its training has diverged, its file is damaged, or something "
            "overflows in its dtype."
        )
    patch = model.config["patch_size"]
    grid = (-(-images.shape[2] // patch), -(-images.shape[3] // patch))
    return tokens.cpu().double().unflatten(1, grid).numpy()


def fit_basis(
    features: Iterable[Float[np.ndarray, "rows columns channels"]], *, foreground: bool = False
) -> FeatureBasis:
    """Find the three directions in which patches vary most, over all images together.

    The same features give the same basis: a direction points to where its largest entry is positive.

    Args:
        features: of each image (Hp, Wp, C); the grids may differ.
        foreground: split the patches in two by the first direction, at zero, and find the directions anew among
            those of one side: the side to which fewer of the patches at the images' borders belong.

    Raises:
        DataError: no image, or none whose patches differ.
        ShapeError: the features are not (rows, columns, channels), or of different widths.
    """
    grids = list(features)
    if not grids:
        raise DataError("There are no features to find directions in.")
    if any(grid.ndim != 3 or grid.shape[2] != grids[0].shape[2] for grid in grids):
        raise ShapeError(f"Features are (rows, columns, channels); got {sorted({grid.shape for grid in grids})}.")
    rows = np.concatenate([grid.reshape(-1, grid.shape[2]) for grid in grids]).astype(np.float64)
    basis = _principal(rows)
    if not foreground:
        return basis
    border = np.concatenate([_border(grid.shape[:2]).ravel() for grid in grids])
    first = (rows - basis.mean) @ basis.components[0]
    at_border = [border[side].mean() if side.any() else 1.0 for side in (first > 0, first <= 0)]
    if at_border[1] < at_border[0]:  # the first direction is to point to the foreground
        sign = np.array([-1.0, 1.0, 1.0])
        basis = basis._replace(
            components=basis.components * sign[:, None],
            low=np.where(sign < 0, -basis.high, basis.low),
            high=np.where(sign < 0, -basis.low, basis.high),
        )
        first = -first
    return basis._replace(foreground=_principal(rows[first > 0]))


def feature_colours(
    features: Float[np.ndarray, "rows columns channels"], basis: FeatureBasis
) -> Float[np.ndarray, "rows columns 3"]:
    """Return the patches' colours.

    Args:
        features: of one image.
        basis: of ``fit_basis``, from this image or others.

    Returns:
        (Hp, Wp, 3), float64 from 0 to 1; where the basis has a foreground, zeros outside of it.
    """
    values = (features - basis.mean) @ basis.components.T
    if basis.foreground is not None:
        inside = values[..., :1] > 0
        return np.where(inside, feature_colours(features, basis.foreground), 0.0)
    span = basis.high - basis.low
    return np.where(span > 0, (values - basis.low) / np.where(span > 0, span, 1), 0.5).clip(0, 1)


def _principal(rows: np.ndarray) -> FeatureBasis:
    """Return the three principal directions of the rows (n, C)."""
    mean = rows.mean(axis=0)
    centred = rows - mean
    variances, directions = np.linalg.eigh(centred.T @ centred / len(rows))  # ascending
    largest = max(variances[-1], 0.0)
    if largest <= 1e-20 * max(1.0, float(np.square(rows).mean())):
        raise DataError("All patches have the same features, so there is nothing to tell apart.")
    components = np.zeros((3, rows.shape[1]))
    explained = np.zeros(3)
    for i in range(min(3, rows.shape[1])):
        if variances[-1 - i] > 1e-12 * largest:
            direction = directions[:, -1 - i]
            components[i] = direction * np.sign(direction[np.abs(direction).argmax()])
            explained[i] = variances[-1 - i] / variances.clip(0).sum()
    low, high = np.percentile(centred @ components.T, [OUTLIERS, 100 - OUTLIERS], axis=0)
    return FeatureBasis(mean, components, low, high, explained, None)


def _border(grid: tuple[int, int]) -> np.ndarray:
    border = np.ones(grid, dtype=bool)
    border[1:-1, 1:-1] = False
    return border
