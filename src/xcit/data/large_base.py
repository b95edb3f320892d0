"""What all large images have in common: windows of them are read, whatever the format.

Legend: H x W the image, upright; h x w a window of it; C the bands that were chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from xcit.data.large_colour import Colour
from xcit.data.large_georeference import Georeference
from xcit.errors import ConfigError, DataError, ShapeError, XCiTError


def value_scale(dtype: Any) -> float:
    """Return the value that means 1 (white, full intensity) in samples of a type.

    255 for uint8, 65535 for uint16, and so on for unsigned integers. 1 for floating point, for booleans, and for signed
    integers, which are measurements (heights, temperatures) and have no white.

    Args:
        dtype: of the samples.
    """
    dtype = np.dtype(dtype)
    return float(np.iinfo(dtype).max) if dtype.kind == "u" else 1.0


def fill_nodata(window: np.ndarray, nodata: float | None, value: float) -> np.ndarray:
    """Return a window with a value in place of what is no measurement.

    Args:
        window: (h, w, C).
        nodata: the value that stands for "nothing here", as ``LargeImage.nodata``; None for none. NaN counts always.
        value: what to put there; the window's type must be able to hold it.

    Returns:
        (h, w, C) of the same type; the window itself if nothing is missing.
    """
    missing = np.isnan(window) if window.dtype.kind == "f" else np.zeros((), dtype=bool)
    if nodata is not None:
        missing = missing | (window == nodata)
    if not missing.any():
        return window
    return np.where(missing, window.dtype.type(value), window)


@dataclass(frozen=True)
class Stored:
    """How an image lies in its file.

    Attributes:
        size: (height, width) as stored.
        dtype: of the stored samples.
        colour: what they mean.
        block: (rows, columns) that the file gives at once.
        bytes_in_memory: what reading windows of it holds in memory, besides the windows.
        is_windowed: a window takes less than decoding the whole.
        levels: sizes of all resolutions, the full one first.
        orientation: 1 to 8, EXIF's number of how the stored image is to be turned.
        scale: the value of white.
        nodata: the value of "nothing here".
        georeference: of the stored image.
    """

    size: tuple[int, int]
    dtype: np.dtype
    colour: Colour
    block: tuple[int, int]
    bytes_in_memory: int
    is_windowed: bool
    levels: tuple[tuple[int, int], ...]
    orientation: int = 1
    scale: float = 1.0
    nodata: float | None = None
    georeference: Georeference | None = None


class LargeImage(ABC):
    """An image of which windows are read, by one thread at a time; a context manager. ``open_large_image`` makes one.

    Attributes:
        path: the file, or a zarr's folder.
        format: "tiff", "npy", "zarr", "raster" (GDAL through rasterio) or "plain" (Pillow).
        size: (H, W) in pixels, upright, of the level that is read.
        channels: C, the bands that ``read`` gives.
        dtype: of what ``read`` gives: the file's own type; uint8 for palettes; booleans for 1 bit.
        scale: the value that means white: ``value_scale(dtype)``, but 4095 for 12 bits in uint16, and the like.
        nodata: the value that the file declares to mean "nothing here", or None. ``read`` gives it as it is.
        georeference: where the image lies, of the level that is read; None if the file does not say.
        levels: (H, W) of each resolution that the file holds, the full one first.
        level: the one that is read.
        block: (rows, columns) that the file gives at once; windows in multiples of it are read fastest.
        is_windowed: whether a window can be read without decoding the whole.
        bytes_in_memory: what reading costs in memory, besides the windows: the tiles of one row, which are kept for
            the next window, or the whole decoded image where the format cannot do better.
    """

    format: str

    def __init__(self, path: Path, stored: Stored, *, level: int = 0, bands: Sequence[int] | None = None) -> None:
        self.path = path
        self._stored = stored
        colour = stored.colour
        self._turn = _Turn(stored.orientation, stored.size)
        self.size = self._turn.size
        if min(self.size) < 1:
            raise DataError(f"{path}: has no pixels ({self.size[0]} x {self.size[1]}).")
        self._bands = None if bands is None else _chosen(bands, colour.num_bands, path)
        self._direct = colour.kind == "plain" and (self._bands is not None or colour.alpha is None)
        self.channels = len(self._bands) if self._bands is not None else colour.num_bands - (colour.alpha is not None)
        self.dtype = colour.dtype or stored.dtype.newbyteorder("=")
        if self.dtype.kind not in "buif":
            raise DataError(f"{path}: has pixels of {self.dtype}; they must be integers or floating-point numbers.")
        if colour.alpha is not None and self._bands is None and self.dtype.kind == "i":
            raise DataError(f"{path}: has transparency, but its type ({self.dtype}) has no white; choose bands.")
        self.scale, self.nodata, self.georeference = stored.scale, stored.nodata, stored.georeference
        self.levels = tuple(_Turn(stored.orientation, size).size for size in stored.levels)
        self.level = level
        self.block = stored.block if not self._turn.across else (stored.block[1], stored.block[0])
        self.is_windowed, self.bytes_in_memory = stored.is_windowed, stored.bytes_in_memory

    def __enter__(self) -> LargeImage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    @abstractmethod
    def _window(self, top: int, left: int, height: int, width: int, samples: Sequence[int]) -> np.ndarray:
        """Return stored samples (h, w, len(samples)); the window lies within the stored image."""

    def read(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """Return a window.

        Args:
            top: its first row.
            left: its first column.
            height: rows, at least 1.
            width: columns, at least 1.

        Returns:
            (h, w, C) in the file's own type and native byte order, contiguous.

        Raises:
            ShapeError: the window goes beyond the image; whoever wants more pads.
            DataError: what the file holds there is damaged or missing, or it has changed; the message says where.
        """
        H, W = self.size
        if not (0 <= top < top + height <= H and 0 <= left < left + width <= W):
            raise ShapeError(f"{self._where(top, left, height, width)} is not within its {H} x {W} px.")
        samples = self._bands if self._direct and self._bands is not None else range(self._stored.colour.num_stored)
        window = self._turn.stored(top, left, height, width)
        try:
            values = self._window(*window, samples)
        except XCiTError:
            raise
        except MemoryError:
            raise DataError(f"{self._where(top, left, height, width)} does not fit into memory; read less.") from None
        except Exception as error:  # decoders raise whatever the damage provokes
            reason = str(getattr(error, "strerror", None) or error).strip().rstrip(".") or type(error).__name__
            raise DataError(f"{self._where(top, left, height, width)} cannot be read: {reason}.") from error
        return np.ascontiguousarray(self._coloured(self._turn.upright(values)))

    def rows(self, band: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the image from top to bottom: the first row and (h, W, C) of each band, the last of which may be lower.

        Args:
            band: rows at once, at least 1.
        """
        if band < 1:
            raise ConfigError(f"The bands would be {band} rows high; take 1 or more.")
        for top in range(0, self.size[0], band):
            yield top, self.read(top, 0, min(band, self.size[0] - top), self.size[1])

    def _coloured(self, values: np.ndarray) -> np.ndarray:
        colour = self._stored.colour
        if self._direct:
            return colour.turned(values)
        bands = colour.bands(values, str(self.path))
        if self._bands is not None:
            return bands[..., list(self._bands)]
        return bands if colour.alpha is None else colour.on_white(bands)

    def _where(self, top: int, left: int, height: int, width: int) -> str:
        return f"{self.path}: the window of {height} x {width} px at row {top}, column {left}"


class _Turn:
    """Between an upright image and the stored one, which EXIF's orientation relates.

    Args:
        orientation: 1 to 8; others mean 1.
        stored: (height, width) of the stored image.
    """

    def __init__(self, orientation: int, stored: tuple[int, int]) -> None:
        self.across = orientation in (5, 6, 7, 8)
        self._up = orientation in (3, 4, 7, 8)
        self._left = orientation in (2, 3, 6, 7)
        self.size = (stored[1], stored[0]) if self.across else (stored[0], stored[1])

    def stored(self, top: int, left: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return where a window lies in the stored image."""
        top = self.size[0] - top - height if self._up else top
        left = self.size[1] - left - width if self._left else left
        return (left, top, width, height) if self.across else (top, left, height, width)

    def upright(self, values: np.ndarray) -> np.ndarray:
        """Turn a window of the stored image."""
        values = values.transpose(1, 0, 2) if self.across else values
        return values[:: -1 if self._up else 1, :: -1 if self._left else 1]


def _chosen(bands: Sequence[int], number: int, path: Path) -> tuple[int, ...]:
    wrong = [band for band in bands if not 1 <= band <= number]
    if wrong or not bands:
        shown = ", ".join(map(str, bands)) or "none"
        raise ConfigError(f"{path}: bands {shown} were asked for; it has {number}, counted from 1.")
    return tuple(band - 1 for band in bands)


def check_level(level: int, levels: Sequence[tuple[int, int]], path: Path) -> None:
    """Refuse a resolution that a file does not hold.

    Raises:
        ConfigError: it names those that there are.
    """
    if not 0 <= level < len(levels):
        sizes = ", ".join(f"{number}: {height} x {width}" for number, (height, width) in enumerate(levels))
        raise ConfigError(f"{path}: level {level} was asked for; it holds {sizes}.")
