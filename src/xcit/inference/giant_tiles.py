"""The usual way with an image that is too large: tiles, each a whole image to the model, side by side.

It is here to compare with. No tile knows of another: attention, LPI and positions end at its edges.

Legend: H x W the image, p the patch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xcit.errors import ConfigError
from xcit.inference.giant import Classified, GiantImages
from xcit.inference.giant_run import Source, opened
from xcit.inference.segment_image import label_type
from xcit.inference.segment_windows import LEAST
from xcit.models.folded_models import FoldedXCiT
from xcit.models.segmentation import SegmentationModel, resize


class TiledImages:
    """Runs a model over an image tile by tile.

    Args:
        giant: the model and how it sees images.
        tile: side of a tile in pixels, a multiple of 32; those on the right and below may be smaller.

    Raises:
        ConfigError: another side.
    """

    def __init__(self, giant: GiantImages, tile: int) -> None:
        if tile < LEAST or tile % LEAST:
            raise ConfigError(f"tiles are {tile} px; they must be a multiple of {LEAST}.")
        self._giant, self._tile = giant, tile

    def classify(self, image: Source, **options: Any) -> Classified:
        """Return the mean of the tiles' logits and features, each tile counting by its area."""
        trunk = self._giant.model
        if not isinstance(trunk, FoldedXCiT):
            raise ConfigError("The model is no classifier.")
        logits: Any = 0.0
        features: Any = 0.0
        total = 0
        for _, _, x in self._tiles(image, "classify", options):
            tokens = trunk.forward_features(x)
            pooled = tokens[0, 0] if trunk.global_pool == "token" else tokens[0, trunk.num_prefix_tokens :].mean(dim=0)
            area = x.shape[2] * x.shape[3]
            if trunk.head is not None:
                logits = logits + area * trunk(x)[0].cpu().double().numpy()
            features = features + area * pooled.cpu().double().numpy()
            total += area
        return Classified(None if trunk.head is None else logits / total, features / total)

    def features(self, image: Source, **options: Any) -> np.ndarray:
        """Return the final features of every patch, (h, w, C) float32, as the tiles give them."""
        trunk = self._giant.model
        if not isinstance(trunk, FoldedXCiT):
            raise ConfigError("The model has no final features.")
        p = trunk.patch_size
        placed = [
            (top // p, left // p, _grid(trunk.forward_features(x)[0, trunk.num_prefix_tokens :], x, p))
            for top, left, x in self._tiles(image, "features", options)
        ]
        return _joined(placed, np.float32)

    def segment(self, image: Source, **options: Any) -> np.ndarray:
        """Return the class of every pixel, (H, W), as the tiles give them."""
        model = self._giant.model
        if not isinstance(model, SegmentationModel):
            raise ConfigError("The model is no segmenter.")
        placed = []
        for top, left, x in self._tiles(image, "segment", options):
            logits = resize(model.forward_low(x), x.shape[-2:])[0]
            placed.append((top, left, logits.argmax(dim=0).unsqueeze(-1).cpu().numpy()))
        return _joined(placed, label_type(model.num_classes))[..., 0]

    def _tiles(self, image: Source, task: str, options: dict[str, Any]) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the place of each tile and the tile (1, C, rows, columns), as the model takes it."""
        with ExitStack() as stack, torch.inference_mode():
            windows = opened(stack, image, options)
            rows = self._giant.setup.image_rows(windows, task)
            reader = rows.reader()
            least = LEAST if task == "segment" else self._giant.setup.trunk.patch_size
            for top, bottom in _spans(rows.height, self._tile, least):
                band = reader.rows(top, bottom)
                for left, right in _spans(rows.width, self._tile, least):
                    yield top, left, band[..., left:right].contiguous(memory_format=torch.channels_last)


def _spans(side: int, tile: int, least: int) -> list[tuple[int, int]]:
    """Return where tiles begin and end; what is left over and smaller than the least belongs to the one before."""
    starts = [start for start in range(0, side, tile) if start == 0 or side - start >= least]
    return list(zip(starts, [*starts[1:], side], strict=True))


def _grid(tokens: Tensor, x: Tensor, p: int) -> np.ndarray:
    return tokens.unflatten(0, (-(-x.shape[2] // p), -1)).float().cpu().numpy()


def _joined(placed: list[tuple[int, int, np.ndarray]], dtype: Any) -> np.ndarray:
    height, width = (max(at[axis] + at[2].shape[axis] for at in placed) for axis in (0, 1))
    whole = np.zeros((height, width, placed[0][2].shape[2]), dtype)
    for top, left, tile in placed:
        whole[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return whole
