"""What a detector found in one image: boxes, classes and scores as arrays, masks drawn when they are asked for.

A mask is kept as the square of probabilities over its box that the model gave. A hundred of them take a third of a
mebibyte, however large the image is; whole masks of an image of 12,000 x 9,000 pixels would take ten gibibytes.

Legend: n instances, the highest score first; (H, W) size of the upright image in pixels; S = 28 side of a square.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xcit.data.coco_masks import mask_rle
from xcit.errors import ConfigError
from xcit.ops.instance_masks import mask_window, paste_mask

INSIDE = 0.5
"""From this probability on a pixel belongs to the instance."""


@dataclass(frozen=True, eq=False)
class Detections:
    """The instances that were found in one image, or why it could not be looked at.

    Attributes:
        path: the file; None for an image or an array in memory.
        size: H, W of the image, upright; (0, 0) where there is an error.
        boxes: (n, 4) float32: x0, y0, x1, y1 in pixels within the upright image.
        labels: (n,) int64: classes from 0.
        names: of the classes, n texts.
        scores: (n,) float32: 0 to 1, falling.
        squares: (n, S, S) float32: each mask's probabilities, over its box; None from a model without masks.
        error: one sentence that names the image.
    """

    path: Path | None
    size: tuple[int, int] = (0, 0)
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    names: list[str] = field(default_factory=list)
    scores: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    squares: np.ndarray | None = None
    error: str | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def mask_window(self, i: int) -> tuple[int, int, int, int]:
        """Return y0, y1, x0, x1 of the pixels that instance i may cover, ends exclusive.

        Raises:
            ConfigError: the model has no masks.
            IndexError: there is no instance i.
        """
        squares = self._squares()
        return mask_window(torch.from_numpy(self.boxes[i]), self.size, squares.shape[-1])

    def cropped_probabilities(self, i: int) -> tuple[int, int, np.ndarray]:
        """Return y0, x0 and (rows, columns) float32: how likely each pixel of ``mask_window`` is of instance i.

        Raises:
            ConfigError: the model has no masks.
            IndexError: there is no instance i.
        """
        window = self.mask_window(i)
        square = torch.from_numpy(self._squares()[i])
        return window[0], window[2], paste_mask(square, torch.from_numpy(self.boxes[i]), window).numpy()

    def cropped_mask(self, i: int) -> tuple[int, int, np.ndarray]:
        """Return y0, x0 and (rows, columns) bool: the part of instance i's mask from row y0 and column x0 on.

        Everything outside it is False. Takes memory for the part alone.

        Raises:
            ConfigError: the model has no masks.
            IndexError: there is no instance i.
        """
        y0, x0, values = self.cropped_probabilities(i)
        return y0, x0, values >= INSIDE

    def mask(self, i: int) -> np.ndarray:
        """Return instance i's mask, (H, W) bool.

        Raises:
            ConfigError: the model has no masks.
            IndexError: there is no instance i.
        """
        y0, x0, part = self.cropped_mask(i)
        whole = np.zeros(self.size, dtype=bool)
        whole[y0 : y0 + part.shape[0], x0 : x0 + part.shape[1]] = part
        return whole

    def rle(self, i: int) -> dict[str, Any]:
        """Return instance i's mask as compressed RLE, {"size": [H, W], "counts": text}, as COCO's results have it.

        It is made from the part within its window; the whole mask is never in memory.

        Raises:
            ConfigError: the model has no masks.
            BackendError: faster-coco-eval is not installed.
        """
        y0, x0, part = self.cropped_mask(i)
        return mask_rle({"size": list(self.size), "counts": _run_lengths(y0, x0, part, self.size)}, *self.size)

    def resized(self, size: tuple[int, int]) -> Detections:
        """Return the same instances in the image scaled to another size, such as that of a thumbnail.

        Args:
            size: H, W in pixels.
        """
        y, x = (new / max(1, old) for new, old in zip(size, self.size, strict=True))
        return replace(self, size=size, boxes=self.boxes * np.array([x, y, x, y], np.float32))

    def to_coco(self, image_id: int, category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
        """Return the instances as COCO's results: image_id, category_id, bbox (x, y, width, height), score, and masks.

        Args:
            image_id: of the image, in the annotations that the results belong to.
            category_ids: of each class; instances of a class with None are left out.

        Raises:
            BackendError: there are masks, and faster-coco-eval is not installed.
        """
        results = []
        for i, (label, score) in enumerate(zip(self.labels.tolist(), self.scores.tolist(), strict=True)):
            category = category_ids[label]
            if category is None:
                continue
            x0, y0, x1, y1 = self.boxes[i].tolist()
            result = {
                "image_id": image_id,
                "category_id": category,
                "bbox": [round(side, 3) for side in (x0, y0, x1 - x0, y1 - y0)],
                "score": float(f"{score:.7g}"),
            }
            results.append(result if self.squares is None else result | {"segmentation": self.rle(i)})
        return results

    def _squares(self) -> np.ndarray:
        if self.squares is None:
            raise ConfigError("These detections have boxes but no masks: the model was built with with_masks=False.")
        return self.squares


def _run_lengths(y0: int, x0: int, part: np.ndarray, size: tuple[int, int]) -> list[int]:
    """Return the run lengths of a mask, column by column, False first, of which ``part`` is all that is not False."""
    H, W = size
    framed = np.pad(part.T, ((0, 0), (1, 1)))  # columns as rows, with False above and below
    edges = np.flatnonzero(framed[:, 1:] != framed[:, :-1])  # begin and end of each run by turns, column after column
    column, row = np.divmod(edges, len(part) + 1)
    places = (column + x0) * H + row + y0
    meet = np.flatnonzero(np.diff(places) == 0)  # a run to a column's foot that goes on at the head of the next
    places = np.delete(places, [meet, meet + 1])
    lengths = np.diff(np.concatenate([[0], places, [H * W]])).tolist()
    return lengths if lengths[-1] or len(lengths) == 1 else lengths[:-1]
