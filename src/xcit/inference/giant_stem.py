"""From an image that is read by windows to a folded XCiT's first tokens, a few rows at a time.

Legend: H x W the image; (Hp, Wp) patch grid; C embed_dim.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from xcit.data.large_base import value_scale
from xcit.errors import ConfigError, ShapeError
from xcit.models.folded_models import FoldedTrunk
from xcit.models.folded_stem import stem_rows
from xcit.models.row_maps import Filled, RowMap

log = logging.getLogger(__name__)


class Windows(Protocol):
    """What is read: a ``LargeImage``, or an array as ``ArrayImage``."""

    size: tuple[int, int]
    channels: int
    scale: float
    nodata: float | None
    bytes_in_memory: int

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Return (height, width, channels)."""
        ...


class ArrayImage:
    """An array (H, W), (H, W, C) as an image of which windows are read.

    Raises:
        ShapeError: another shape, or nothing in it.
    """

    nodata: float | None = None
    bytes_in_memory = 0

    def __init__(self, array: np.ndarray) -> None:
        if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.kind not in "buif":
            raise ShapeError(f"Expected an image (H, W) or (H, W, C) of numbers, got {array.shape} of {array.dtype}.")
        self._array = array if array.ndim == 3 else array[..., None]
        self.size = (array.shape[0], array.shape[1])
        self.channels = self._array.shape[2]
        self.scale = value_scale(array.dtype)

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Return (height, width, C)."""
        return self._array[top : top + height, left : left + width]


def image_rows(
    image: Windows,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    dtype: torch.dtype,
    device: torch.device,
    least: int = 1,
) -> RowMap:
    """Return an image's rows as a model takes them: values from 0 to 1, minus the mean, divided by the deviation.

    What is no measurement (NaN, the file's "nothing here") becomes the mean, 0.

    Args:
        image: what is read.
        mean: of each channel.
        std: likewise.
        dtype: of the result.
        device: likewise.
        least: a side below so many pixels is lengthened to them by repeating the last row or column.

    Raises:
        ConfigError: an image of another number of channels.
    """
    if image.channels != len(mean):
        raise ConfigError(
            f"The image has {image.channels} bands and the model takes {len(mean)}; choose {len(mean)} of them "
            f"(bands, counted from 1)."
        )
    H, W = image.size
    shift = torch.tensor(list(mean), dtype=torch.float64).to(dtype)
    factor = torch.tensor([1 / value for value in std], dtype=torch.float64).to(dtype)
    told = False

    def rows(begin: int, end: int) -> Tensor:
        nonlocal told
        top, bottom = min(begin, H - 1), min(end, H)
        window = np.asarray(image.read(top, 0, bottom - top, W))
        missing = np.isnan(window) if window.dtype.kind == "f" else None
        if image.nodata is not None:
            empty = window == image.nodata
            missing = empty if missing is None else missing | empty
        if window.dtype == np.uint32 or (window.dtype.kind in "iu" and window.dtype.itemsize > 4):
            window = window.astype(np.float64)
        x = torch.from_numpy(window).to(dtype) if window.flags.writeable else torch.tensor(window).to(dtype)
        x = x.div_(image.scale).sub_(shift).mul_(factor)
        if missing is not None and missing.any():
            x[torch.from_numpy(missing)] = 0
            if not told:
                told = True
                log.warning("Parts of the image are no measurements (NaN or nodata); they count as the mean.")
        x = x.permute(2, 0, 1).unsqueeze(0)
        if end - begin > bottom - top:  # below the image
            x = torch.cat((x, x[:, :, -1:].expand(-1, -1, end - begin - (bottom - top), -1)), dim=2)
        if least > W:
            x = torch.cat((x, x[..., -1:].expand(-1, -1, -1, least - W)), dim=3)
        return x.to(device)

    return Filled(len(mean), max(H, least), max(W, least), rows)


def token_rows(trunk: FoldedTrunk, image: RowMap) -> RowMap:
    """Return the first tokens, positional encoding included, as a map (1, C, Hp, Wp) of rows.

    Raises:
        ShapeError: an image smaller than a patch.
    """
    p = trunk.patch_size
    if min(image.height, image.width) < p:
        raise ShapeError(
            f"The image is {image.height} x {image.width} px, less than one patch of {p} x {p}; enlarge it first."
        )
    x = stem_rows(trunk.patch_embed, image)
    position = trunk.pos_embeder
    if position is None:
        return x
    down, across = position.parts(x.height, x.width)
    across = across.T.unsqueeze(1)  # (C, 1, Wp)
    embedded = x.reader()

    def with_position(begin: int, end: int) -> Tensor:
        return embedded.rows(begin, end) + (down[begin:end].T.unsqueeze(2) + across)

    return Filled(x.channels, x.height, x.width, with_position)
