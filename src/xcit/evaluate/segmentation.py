"""How good label maps are: the confusion matrix of pixels, and mIoU, mAcc and aAcc from it.

Counts are exact whole numbers, so that those of images, batches and processes can be added in any order.

Legend: K classes; the matrix's rows are what is true, its columns what was predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from xcit.data.mask_set import IGNORE
from xcit.errors import ShapeError

STRIP = 2**22
"""Pixels that are counted at once: each takes eight bytes meanwhile, several times."""


@dataclass(frozen=True, eq=False)
class SegmentationFigures:
    """Figures over all pixels that are not ignored; shares from 0 to 1.

    A class that neither is there nor was predicted has neither IoU nor accuracy (NaN), and the means leave it out. One
    that was predicted without being there has the IoU 0, and no accuracy.

    Attributes:
        matrix: (K, K) int64, [truth, predicted].
        iou: (K,): intersection over union: pixels that are of a class and were predicted so, of those that are or were.
        acc: (K,): of a class's pixels, the share that was predicted so.
        miou: mean of ``iou``.
        macc: mean of ``acc``.
        aacc: share of all pixels that were predicted right.

    Source: the metrics of mmsegmentation, by which ADE20k's figures are published.
    """

    matrix: Int64[Tensor, "classes classes"]
    iou: Float64[Tensor, " classes"]
    acc: Float64[Tensor, " classes"]
    miou: float
    macc: float
    aacc: float

    @property
    def num_pixels(self) -> int:
        """All pixels that were counted."""
        return int(self.matrix.sum())

    def to_dict(self, class_names: Sequence[str] | None = None) -> dict[str, Any]:
        """Return all figures as JSON has them; null for what a class does not have.

        Args:
            class_names: K names; None for the classes' numbers.

        Raises:
            ShapeError: names that are not as many as the classes.
        """
        names = [str(i) for i in range(len(self.iou))] if class_names is None else list(class_names)
        if len(names) != len(self.iou):
            raise ShapeError(f"There are {len(names)} class_names for figures of {len(self.iou)} classes.")
        return {
            "num_pixels": self.num_pixels,
            "miou": _or_none(self.miou),
            "macc": _or_none(self.macc),
            "aacc": _or_none(self.aacc),
            "classes": [
                {"name": name, "iou": _or_none(iou), "acc": _or_none(acc), "num_pixels": count}
                for name, iou, acc, count in zip(
                    names, self.iou.tolist(), self.acc.tolist(), self.matrix.sum(1).tolist(), strict=True
                )
            ],
        }


def confusion(
    labels: Tensor | np.ndarray, mask: Tensor | np.ndarray, num_classes: int
) -> Int64[Tensor, "classes classes"]:
    """Count the pixels of an image by what they are and what they were taken for.

    Args:
        labels: (H, W) predicted classes, 0 to K - 1, of any integer type.
        mask: (H, W) true classes, 0 to K - 1, or ``IGNORE``; such pixels do not count, whatever was predicted.
        num_classes: K.

    Returns:
        (K, K) int64 on the CPU, [truth, predicted]. Matrices of several images add up.

    Raises:
        ShapeError: maps of different sizes, of another type, or with classes that there are not.
    """
    predicted, truth = (
        each.detach().cpu().numpy() if isinstance(each, Tensor) else np.asarray(each) for each in (labels, mask)
    )
    if predicted.shape != truth.shape:
        raise ShapeError(
            f"The labels are {' x '.join(map(str, predicted.shape))}, the mask is {' x '.join(map(str, truth.shape))}; "
            f"bring the labels to the size of the mask first."
        )
    if predicted.dtype.kind not in "iu" or truth.dtype.kind not in "iu":
        raise ShapeError(f"The labels are {predicted.dtype}, the mask is {truth.dtype}; both must be integers.")
    counts = np.zeros(num_classes * num_classes, np.int64)
    predicted, truth = predicted.reshape(-1), truth.reshape(-1)
    for start in range(0, len(truth), STRIP):
        part, right = predicted[start : start + STRIP], truth[start : start + STRIP]
        for what, values, least in (("labels", part, 0), ("values of the mask", right, IGNORE)):
            if values.min() < least or values.max() >= num_classes:
                raise ShapeError(
                    f"The {what} go from {values.min()} to {values.max()}; there are the classes 0 to "
                    f"{num_classes - 1}" + (f", and {IGNORE} for what is ignored." if least == IGNORE else ".")
                )
        counted = right != IGNORE
        pairs = right[counted].astype(np.int64) * num_classes + part[counted].astype(np.int64)
        counts += np.bincount(pairs, minlength=num_classes * num_classes)
    return torch.from_numpy(counts.reshape(num_classes, num_classes))


def segmentation_figures(matrix: Tensor) -> SegmentationFigures:
    """Return the figures of a confusion matrix.

    Args:
        matrix: (K, K) whole numbers, [truth, predicted]; a sum of what ``confusion`` returned.

    Returns:
        The figures, NaN throughout where no pixel was counted.

    Raises:
        ShapeError: no square matrix.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ShapeError(f"Expected a matrix (K, K) of counts; got {tuple(matrix.shape)}.")
    matrix = matrix.detach().cpu().long()
    right, true, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou = right.double() / (true + predicted - right).double()  # 0 / 0 is NaN
    acc = right.double() / true.double()
    aacc = right.sum().double() / true.sum().double()
    return SegmentationFigures(matrix, iou, acc, float(iou.nanmean()), float(acc.nanmean()), float(aacc))


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
