"""What a segmenter saw in one image: a class for every pixel, how sure that is, and how much of the image each takes.

Legend: K classes; (H, W) size of the upright image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STRIP = 2**22
"""Pixels that are counted at once."""


class Area(NamedTuple):
    """What a class takes of an image."""

    label: int
    """From 0."""
    name: str
    num_pixels: int
    share: float
    """Of the image, 0 to 1."""


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The classes of an image's pixels, or why it could not be looked at.

    Attributes:
        path: the file; None for an image or an array in memory.
        size: H, W of the image, upright; (0, 0) where there is an error.
        labels: (H, W) uint8, or uint16 from 256 classes on: the most probable class, from 0.
        scores: (H, W) float16: its probability, 0 to 1; of several scales the mean.
        class_names: one a class.
        palette: (K, 3) uint8: a colour a class.
        error: one sentence that names the image.
    """

    path: Path | None
    size: tuple[int, int] = (0, 0)
    labels: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float16))
    class_names: Sequence[str] = ()
    palette: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.uint8))
    error: str | None = None

    def areas(self) -> list[Area]:
        """Return the classes that are present, the largest first."""
        counts = class_counts(self.labels, len(self.class_names))
        order = np.argsort(-counts, kind="stable")
        return [
            Area(label, self.class_names[label], int(counts[label]), int(counts[label]) / self.labels.size)
            for label in order.tolist()
            if counts[label]
        ]

    def mask(self, label: int) -> np.ndarray:
        """Return where a class is, (H, W) bool."""
        return self.labels == label

    def to_dict(self) -> dict[str, Any]:
        """Return size and areas as JSON has them; the maps themselves are for image files."""
        height, width = self.size if self.error is None else (None, None)
        return {
            "file": None if self.path is None else str(self.path),
            "height": height,
            "width": width,
            "areas": [
                {"label": area.label, "name": area.name, "pixels": area.num_pixels, "share": float(f"{area.share:.6g}")}
                for area in self.areas()
            ],
            "error": self.error,
        }


def class_counts(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return how many pixels each class has, (K,) int64."""
    counts = np.zeros(num_classes, np.int64)
    flat = labels.reshape(-1)
    for start in range(0, len(flat), STRIP):  # which are eight bytes each while they are counted
        counts += np.bincount(flat[start : start + STRIP], minlength=num_classes)
    return counts
