"""A segmenter's logits of one image at stride 4: of the whole image at once, or window by window with blended seams.

By windows, the rows of logits are made when they are asked for, from the top down, and forgotten after that. Hence the
memory that they take grows with the image's width and with the window, not with the image's height.

Legend: K classes; (H, W) the image in its own pixels; (h, w) at the size at which the model looks; (hl, wl) its logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xcit.errors import ShapeError
from xcit.models.pyramid import STRIDES
from xcit.models.row_maps import between
from xcit.models.segmentation import SegmentationModel

STRIDE = STRIDES[0]
"""Pixels of the image a pixel of the logits."""
LEAST = STRIDES[-1]
"""A side that is shorter is padded to this, by repeating the last row or column: the pyramid needs it."""
STRIP = 2**21
"""Pixels that are converted to numbers at once."""

Span = tuple[int, int]
"""Begin and end, exclusive."""


@dataclass(frozen=True)
class Picture:
    """An image at the size at which the model looks; pixels are scaled and normalised where they are asked for.

    Scaled bilinearly without antialiasing (``align_corners=False``). So were the images in the released models'
    training, but these were then rounded to whole values of 0 to 255; here the values stay real numbers. A side below
    32 px is lengthened by repeating the last row or column.

    Attributes:
        pixels: (C, H, W) uint8, of any size; or (C, h, w) floating point, scaled and normalised already.
        size: h, w.
        mean: of each channel, of values from 0 to 1.
        std: likewise.
    """

    pixels: Tensor
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]

    def crop(self, rows: Span, columns: Span) -> Tensor:
        """Return a part, normalised: (C, rows, columns) float32; beyond the image its last row and column repeat."""
        y, x = (torch.arange(*span).clamp(max=side - 1) for span, side in zip((rows, columns), self.size, strict=True))
        if self.pixels.is_floating_point():
            return self.pixels[:, y[:, None], x]
        C, H, W = self.pixels.shape
        mean, std = (torch.tensor(list(each)).view(C, 1, 1) for each in (self.mean, self.std))
        part = torch.empty(C, len(y), len(x))
        (top, bottom, down), (left, right, across) = between(y, H, self.size[0]), between(x, W, self.size[1])
        down, across = down.float(), across.float()
        step = max(1, STRIP // max(1, len(x)))
        for start in range(0, len(y), step):  # the four neighbours of all pixels at once would be four images
            now = slice(start, start + step)
            upper, lower = top[now, None], bottom[now, None]
            t = across.view(1, 1, -1)
            above = torch.lerp(self.pixels[:, upper, left].float(), self.pixels[:, upper, right].float(), t)
            if self.size != (H, W):
                below = torch.lerp(self.pixels[:, lower, left].float(), self.pixels[:, lower, right].float(), t)
                above = torch.lerp(above, below, down[now].view(1, -1, 1))
            part[:, now] = above.div_(255).sub_(mean).div_(std)
        return part

    def ready(self) -> Picture:
        """Return the picture with all its pixels scaled and normalised, padded to the least size."""
        h, w = (max(LEAST, side) for side in self.size)
        return self if self.pixels.is_floating_point() else Picture(self.crop((0, h), (0, w)), self.size, (), ())


class LowLogits(ABC):
    """Logits at stride 4 that can be had from the top down.

    Attributes:
        size: h, w.
        extent: pixels that the logits stretch over, at least ``size``: what lies beyond it is padding.
        shape: K, hl, wl.
        device: of the logits.
    """

    size: tuple[int, int]
    extent: tuple[int, int]
    shape: tuple[int, int, int]
    device: torch.device

    @abstractmethod
    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows of logits, (K, end - begin, wl); ``begin`` must not lie above that of the call before."""


class WholeLogits(LowLogits):
    """The logits of an image that went through the model whole.

    Args:
        low: (K, hl, wl).
        size: h, w.
        extent: h, w with the padding.
    """

    def __init__(self, low: Tensor, size: tuple[int, int], extent: tuple[int, int]) -> None:
        self.low, self.size, self.extent, self.device = low, size, extent, low.device
        self.shape = (low.shape[0], low.shape[1], low.shape[2])

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows of logits."""
        return self.low[:, begin:end]


class _Side(NamedTuple):
    """How windows lie along one side of the image."""

    starts: list[int]
    length: int
    """Of a window, in pixels."""
    extent: int


class WindowLogits(LowLogits):
    """The logits of an image that goes through the model window by window.

    Windows begin at multiples of 4 px, so that their logits lie on one grid, and are spread evenly. Where they overlap,
    each counts less towards its own edge (a squared sine), so that no seam is seen; the weights of all add up to one.
    Along a side that one window covers the logits are those of the whole image.

    Args:
        model: in evaluation mode.
        picture: the image.
        window: side of a window in pixels, a multiple of 32.
        stride: pixels from a window to the next at most, a multiple of 4.
        flip: the model sees each window mirrored, and its logits are mirrored back.
        batch_size: windows at once.
    """

    def __init__(
        self,
        model: SegmentationModel,
        picture: Picture,
        window: int,
        stride: int,
        *,
        flip: bool = False,
        batch_size: int = 1,
    ) -> None:
        self.model, self.picture, self.flip, self.batch_size = model, picture, flip, batch_size
        self.size = picture.size
        self._down, self._across = (_side(length, window, stride) for length in picture.size)
        self.extent = self._down.extent, self._across.extent
        self._num_done = 0
        self._first = 0  # the row of the logits that the buffer begins with
        first = self._window_row(0)
        K, rows, columns = first[0].shape
        self.device = first[0].device
        self._wy, self._wx = _weights(self._down, rows), _weights(self._across, columns)
        self.shape = (K, _total(self._down, rows), _total(self._across, columns))
        self._buffer = first[0].new_zeros(K, 0, self.shape[2])
        self._add(first)

    def rows(self, begin: int, end: int) -> Tensor:
        """Return rows of logits; the windows that they need go through the model."""
        assert begin >= self._first, "rows can be had from the top down only"
        while self._num_done < len(self._down.starts) and self._down.starts[self._num_done] // STRIDE < end:
            self._buffer = self._buffer[:, begin - self._first :]
            self._first = begin
            self._add(self._window_row(self._num_done))
        return self._buffer[:, begin - self._first : end - self._first]

    def _window_row(self, i: int) -> list[Tensor]:
        """Return the logits of the windows that lie beside each other."""
        top = self._down.starts[i]
        found: list[Tensor] = []
        for start in range(0, len(self._across.starts), self.batch_size):
            lefts = self._across.starts[start : start + self.batch_size]
            crops = [
                self.picture.crop((top, top + self._down.length), (left, left + self._across.length)) for left in lefts
            ]
            found += low_logits(self.model, torch.stack(crops), self.flip)
        return found

    def _add(self, lows: list[Tensor]) -> None:
        i = self._num_done
        rows = lows[0].shape[1]
        self._num_done += 1
        top = self._down.starts[i] // STRIDE - self._first
        if top + rows <= 0:  # nothing of it is asked for: a much smaller image passes rows over
            return
        lacking = top + rows - self._buffer.shape[1]
        if lacking > 0:
            self._buffer = torch.cat([self._buffer, self._buffer.new_zeros(self.shape[0], lacking, self.shape[2])], 1)
        for j, low in enumerate(lows):
            left = self._across.starts[j] // STRIDE
            weights = (self._wy[i][:, None] * self._wx[j]).to(low)
            begin = max(0, -top)  # rows above were asked for and are gone
            place = self._buffer[:, top + begin : top + rows, left : left + low.shape[2]]
            place.addcmul_(low[:, begin:], weights[begin:])


def low_logits(model: SegmentationModel, images: Tensor, flip: bool = False) -> Tensor:
    """Return a model's logits of normalised images, in float32 or wider, (B, K, hl, wl) on the model's device.

    Args:
        model: in evaluation mode.
        images: (B, C, h, w) on any device.
        flip: mirror the images and, back again, the logits.
    """
    parameter = next(model.parameters())
    images = images.to(parameter.device, parameter.dtype)
    low = model.forward_low(images.flip(-1) if flip else images)
    if low.ndim != 4 or len(low) != len(images):
        raise ShapeError(f"forward_low gave {tuple(low.shape)} for {len(images)} images; it must give (B, K, hl, wl).")
    low = low.to(torch.promote_types(low.dtype, torch.float32))
    return low.flip(-1) if flip else low


def whole_logits(model: SegmentationModel, pictures: Sequence[Picture], *, flip: bool = False) -> list[LowLogits]:
    """Let images of one size go through a model together, whole.

    Args:
        model: in evaluation mode.
        pictures: of the same ``size``.
        flip: as of ``low_logits``.
    """
    h, w = pictures[0].size
    extent = max(LEAST, h), max(LEAST, w)
    images = torch.stack([picture.crop((0, extent[0]), (0, extent[1])) for picture in pictures])
    return [WholeLogits(low, (h, w), extent) for low in low_logits(model, images, flip)]


def _side(length: int, window: int, stride: int) -> _Side:
    if length <= window:
        padded = max(LEAST, length)
        return _Side([0], padded, padded)
    extent = -(-length // STRIDE) * STRIDE
    steps = -(-(extent - window) // stride)
    room = (extent - window) // STRIDE
    # Rounded to the grid of the logits no two are further apart than the stride, which is a multiple of it.
    return _Side([STRIDE * ((2 * i * room + steps) // (2 * steps)) for i in range(steps + 1)], window, extent)


def _total(side: _Side, low: int) -> int:
    return low if len(side.starts) == 1 else side.extent // STRIDE


def _weights(side: _Side, low: int) -> Tensor:
    """Return how much each window counts at each of its logits along a side, (windows, low) float64."""
    if len(side.starts) == 1:
        return torch.ones(1, low, dtype=torch.float64)
    if low != side.length // STRIDE:
        raise ShapeError(f"A window of {side.length} px gave {low} logits a side; its stride must be {STRIDE}.")
    bell = np.sin(np.pi * (np.arange(low) + 0.5) / low) ** 2
    total = np.zeros(side.extent // STRIDE)
    for start in side.starts:
        total[start // STRIDE : start // STRIDE + low] += bell
    return torch.from_numpy(np.stack([bell / total[s // STRIDE : s // STRIDE + low] for s in side.starts]))
