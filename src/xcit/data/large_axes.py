"""Which axis of a stored array is which, and how an array that lies in a file uncompressed is read by windows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from xcit.errors import ConfigError, DataError

_BANDS = "CS"  # of these axes every element is a band; S are the samples of one pixel


class Axes:
    """The axes of an array that holds an image.

    Args:
        names: a letter an axis, in the array's order: Y, X, C or S for bands. Of any other axis the first element is
            the image, as of a file with several pages the first one is.
        shape: of the array.
        path: for messages.

    Attributes:
        size: (H, W).
        num_bands: of all band axes together; a later axis counts faster.

    Raises:
        ConfigError: the names do not fit the array, or name no image.
    """

    def __init__(self, names: str, shape: Sequence[int], path: Path) -> None:
        self.names, self.shape = names.upper(), tuple(shape)
        if len(self.names) != len(self.shape) or len(set(self.names)) != len(self.names):
            raise ConfigError(
                f"{path}: its array is {self.shape}; axes are {names!r}, but it takes one letter for each."
            )
        if "Y" not in self.names or "X" not in self.names[self.names.index("Y") :]:
            raise ConfigError(f"{path}: its axes are {names!r}; an image has Y and X, in this order.")
        self.y, self.x = self.names.index("Y"), self.names.index("X")
        self.size = (self.shape[self.y], self.shape[self.x])
        self._band_axes = [i for i, name in enumerate(self.names) if name in _BANDS]
        self.num_bands = int(np.prod([self.shape[i] for i in self._band_axes], dtype=int))

    @property
    def passed_over(self) -> dict[str, int]:
        """Axes of which the first element alone is read, and how many there are."""
        known = {"Y", "X", *_BANDS}
        return {name: n for name, n in zip(self.names, self.shape, strict=True) if name not in known and n > 1}

    def index(self, band: int) -> tuple[int, ...]:
        """Return the index of a band's first pixel."""
        index = [0] * len(self.shape)
        for axis in reversed(self._band_axes):
            band, index[axis] = divmod(band, self.shape[axis])
        return tuple(index)


def guess_axes(shape: Sequence[int], path: Path) -> str:
    """Return the axes of an array that has no names: (H, W) or (H, W, C), as everywhere in this library.

    Raises:
        DataError: another number of axes, or one that looks like (C, H, W).
    """
    if len(shape) == 2:
        return "YX"
    if len(shape) == 3 and shape[0] >= shape[2]:
        return "YXC"
    advice = "say which axis is which, as in axes='CYX' (C bands, Y rows, X columns)"
    raise DataError(f"{path}: its array is {tuple(shape)}, expected (H, W) or (H, W, C); {advice}.")


class RawSamples:
    """Samples that lie in a file uncompressed and in order, read by position.

    Read, not mapped: where a mapped file is cut off, the whole process dies.

    Args:
        file: open, unbuffered.
        offset: of the first byte.
        axes: of the array.
        dtype: of the samples as they are stored.
    """

    def __init__(self, file: BinaryIO, offset: int, axes: Axes, dtype: np.dtype) -> None:
        self._file, self._offset, self._axes, self._dtype = file, offset, axes, dtype
        sizes = [*itertools.accumulate(reversed(axes.shape), lambda a, b: a * b)]
        self._strides = [dtype.itemsize, *(dtype.itemsize * n for n in sizes[:-1])][::-1]
        self._inner = self._strides[axes.x] // dtype.itemsize  # samples that a pixel has in one place

    @property
    def num_bytes(self) -> int:
        """Bytes from the first to the last."""
        return int(np.prod(self._axes.shape, dtype=np.int64)) * self._dtype.itemsize

    def window(self, top: int, left: int, height: int, width: int, samples: Sequence[int]) -> np.ndarray:
        """Return (h, w, len(samples)) in native byte order.

        Raises:
            EOFError: the file ends before.
        """
        native = self._dtype.newbyteorder("=")
        starts = [self._start(band) for band in samples]
        places = sorted({start - start % self._strides[self._axes.x] for start in starts})
        out = None
        for place in places:  # planes, of which each holds one sample or more a pixel
            plane = self._plane(place, top, left, height, width)
            if len(places) == 1 and list(samples) == list(range(self._inner)):
                return plane.astype(native, copy=False)
            out = np.empty((height, width, len(samples)), dtype=native) if out is None else out
            for number, start in enumerate(starts):
                if place <= start < place + self._strides[self._axes.x]:
                    out[..., number] = plane[..., (start - place) // self._dtype.itemsize]
        assert out is not None
        return out

    def _start(self, band: int) -> int:
        return sum(i * stride for i, stride in zip(self._axes.index(band), self._strides, strict=True))

    def _plane(self, place: int, top: int, left: int, height: int, width: int) -> np.ndarray:
        row, column = self._strides[self._axes.y], self._strides[self._axes.x]
        out = np.empty((height, width, self._inner), dtype=self._dtype)
        begin = self._offset + place + top * row + left * column
        whole = row == width * column
        flat = out.reshape(-1).view(np.uint8).data
        step = width * column
        for number, size in [(0, height * step)] if whole else [(i, step) for i in range(height)]:
            self._fill(flat[number * step : number * step + size], begin + number * row)
        return out

    def _fill(self, into: memoryview, at: int) -> None:
        self._file.seek(at)
        done = 0
        while done < len(into):
            count = self._file.readinto(into[done:])  # type: ignore[attr-defined]
            if not count:
                raise EOFError("the file is cut off")
            done += count
