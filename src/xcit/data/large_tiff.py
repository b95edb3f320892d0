"""Large TIFF and BigTIFF files by tifffile: tiled, in strips, pyramidal (SubIFDs, pages, OME, slide scanners').

Tiles are read and decoded one by one, so that a damaged one is known by its place, and those of one row are kept for
the next window. Uncompressed samples in order are read by their position.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from xcit.data.large_axes import Axes, RawSamples
from xcit.data.large_base import LargeImage, Stored, check_level, value_scale
from xcit.data.large_colour import Colour
from xcit.data.large_georeference import MISSING, from_tags
from xcit.errors import BackendError, DataError, XCiTError

_JPEG = (6, 7, 34892, 33007)  # compressions whose decoder needs tables from the page, and returns RGB for YCbCr
_SLIDES = ("svs", "scn", "ndpi", "bif", "philips")  # of whose images the largest is meant, not the first
_NODATA, _ORIENTATION, _EXTRA, _INKSET = 42113, 274, 338, 332
_PLAIN = (0, 1, 2, 34892)  # min is white, min is black, RGB, linear raw
_PALETTE, _CMYK, _YCBCR = 3, 5, 6
_PREMULTIPLIED, _ALPHA = 1, 2  # of ExtraSamples

log = logging.getLogger(__name__)


class TiffImage(LargeImage):
    """A TIFF, of which the first image is read, or the largest one of a slide scanner's file."""

    format = "tiff"

    def __init__(self, path: Path, *, level: int, bands: Sequence[int] | None, axes: str | None) -> None:
        try:
            import tifffile
        except ModuleNotFoundError:
            raise BackendError(f"{path}: TIFF images need tifffile, which is not installed: {MISSING}") from None
        self._file = path.open("rb", buffering=0)
        try:
            with _quiet():
                self._tif = tifffile.TiffFile(str(path))
                stored = self._stored_image(path, level, axes)
            super().__init__(path, stored, level=level, bands=bands)
        except XCiTError:
            self.close()
            raise
        except Exception as error:  # tifffile raises whatever the damage provokes, and so does what follows from it
            self.close()
            reason = str(error).rstrip(".") or type(error).__name__
            raise DataError(f"{path}: is a damaged or incomplete TIFF ({reason}).") from error

    def _stored_image(self, path: Path, level: int, axes: str | None) -> Stored:
        """Find the image and its resolutions, and say how it is stored."""
        found = self._tif.series
        if not found:
            raise DataError(f"{path}: is a damaged or incomplete TIFF (there is no image in it).")
        series = found[0]
        if any(getattr(self._tif, f"is_{kind}") for kind in _SLIDES):
            series = max(found, key=lambda one: int(np.prod(one.shape, dtype=np.int64)))
        named = [Axes(axes or one.axes, one.shape, path) for one in series.levels]
        levels = tuple(one.size for one in named)
        check_level(level, levels, path)
        chosen, first = series.levels[level], series.keyframe
        page = chosen.keyframe
        self._axes = named[level]
        self._check(path, page, chosen.dtype)
        if self._axes.passed_over:
            ways = "axes='CYX' reads pages as bands"
            log.warning("%s: of its %s the first is read; %s.", path, _counted(self._axes.passed_over), ways)
        self._raw, self._tiles = None, None
        if chosen.dataoffset is not None:
            dtype = np.dtype(self._tif.byteorder + chosen.dtype.char)
            self._raw = RawSamples(self._file, chosen.dataoffset, self._axes, dtype)
            block, held = (1, self._axes.size[1]), 0
        else:
            self._tiles = _Tiles(path, self._file, chosen, self._axes)
            block, held = self._tiles.block, self._tiles.held
        scale = _white(page)
        georeference = from_tags({tag.code: tag.value for tag in first.tags if 33550 <= tag.code <= 34737}, str(path))
        turned = 1 if georeference or _ORIENTATION not in first.tags else first.tags[_ORIENTATION].value
        if georeference is not None and level:
            georeference = georeference.scaled(levels[0][0] / levels[level][0], levels[0][1] / levels[level][1])
        return Stored(
            size=self._axes.size,
            dtype=np.dtype(chosen.dtype),
            colour=_colour(path, page, self._axes.num_bands, scale),
            block=block,
            bytes_in_memory=held,
            is_windowed=self._raw is not None or block != self._axes.size,
            levels=levels,
            orientation=turned,
            scale=scale,
            nodata=_nodata(first),
            georeference=georeference,
        )

    @staticmethod
    def _check(path: Path, page: Any, dtype: np.dtype | None) -> None:
        """Refuse at once what could not be decoded."""
        from tifffile import TIFF

        if dtype is None or page.dtype is None:
            raise DataError(f"{path}: has samples of {page.bitspersample} bits in a form that cannot be read.")
        if page.imagedepth > 1:
            raise DataError(f"{path}: is a volume of {page.imagedepth} layers; images have one. Save a layer of it.")
        try:
            if page.compression != 1:
                TIFF.DECOMPRESSORS[page.compression]
            if page.predictor != 1:
                TIFF.UNPREDICTORS[page.predictor]
        except KeyError as error:
            name = getattr(page.compression, "name", page.compression)
            if "imagecodecs" in str(error):
                raise BackendError(
                    f"{path}: is compressed ({name}) in a way that needs imagecodecs, which is not installed: {MISSING}"
                ) from None
            raise DataError(
                f"{path}: is compressed in a way that cannot be read ({name}); save it as deflate."
            ) from None

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
        if hasattr(self, "_tif"):
            self._tif.close()

    def _window(self, top: int, left: int, height: int, width: int, samples: Sequence[int]) -> np.ndarray:
        if self._raw is not None:
            return self._raw.window(top, left, height, width, samples)
        assert self._tiles is not None
        return self._tiles.window(top, left, height, width, samples)


class _Tiles:
    """Tiles or strips of a series, decoded when they are needed.

    Args:
        path: of the file, for messages.
        file: the same, open.
        series: tifffile's.
        axes: of the series.

    Attributes:
        block: (rows, columns) of a tile.
        held: bytes of the decoded tiles that are kept: those of one row.
    """

    def __init__(self, path: Path, file: Any, series: Any, axes: Axes) -> None:
        page = series.keyframe
        self._path, self._file, self._page, self._dtype = path, file, page, np.dtype(page.dtype)
        self._samples, self._inner = page.samplesperpixel, page.samplesperpixel if page.planarconfig == 1 else 1
        rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
        H, W = axes.size
        self.block = (min(rows, H), min(columns, W))
        self._tile = (rows if page.is_tiled else min(rows, H), columns)
        self._grid = (-(-H // rows), -(-W // columns))
        self._pages = list(series.pages) if hasattr(series, "pages") else list(series)
        planes = -(-axes.num_bands // self._inner)
        tile = self._tile[0] * self._tile[1] * self._inner * self._dtype.itemsize
        self.held = tile * self._grid[1] * planes
        self._kept: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._most = self._grid[1] * planes
        self._place = [self._locate(axes, band) for band in range(axes.num_bands)]
        self._jpeg = page.compression in _JPEG
        nodata = _nodata(page)
        self._empty = self._dtype.type(0)
        if nodata is not None:
            with suppress(ValueError, OverflowError):
                self._empty = self._dtype.type(nodata)

    def _locate(self, axes: Axes, band: int) -> tuple[int, int, int]:
        """Return the page, the plane in it, and the sample in that, of a band."""
        index = axes.index(band)
        # the pages are the leading axes of the series; the page's own are YX, YXS or SYX
        own = self._samples if "S" in axes.names else 1
        page, sample = 0, band % own if own > 1 else 0
        for name, size, at in zip(axes.names, axes.shape, index, strict=True):
            if name in "YXS":
                continue
            page = page * size + at
        return (page, 0, sample) if self._inner > 1 else (page, sample, 0)

    def window(self, top: int, left: int, height: int, width: int, samples: Sequence[int]) -> np.ndarray:
        """Return (h, w, len(samples))."""
        out = np.empty((height, width, len(samples)), dtype=self._dtype)
        wanted: OrderedDict[tuple[int, int], list[tuple[int, int]]] = OrderedDict()
        for number, band in enumerate(samples):
            page, plane, sample = self._place[band]
            wanted.setdefault((page, plane), []).append((number, sample))
        tile_rows, tile_columns = self._tile
        for row in range(top // tile_rows, (top + height - 1) // tile_rows + 1):
            for (page, plane), pairs in wanted.items():
                numbers, inner = [n for n, _ in pairs], [s for _, s in pairs]
                every = numbers == list(range(len(samples))) and inner == list(range(self._inner))
                for column in range(left // tile_columns, (left + width - 1) // tile_columns + 1):
                    y, x = row * tile_rows, column * tile_columns
                    y0, y1 = max(top, y), min(top + height, y + tile_rows)
                    x0, x1 = max(left, x), min(left + width, x + tile_columns)
                    tile = self._decoded(page, plane, row, column)[y0 - y : y1 - y, x0 - x : x1 - x]
                    place = out[y0 - top : y1 - top, x0 - left : x1 - left]
                    if every:
                        place[...] = tile
                    else:
                        for number, sample in pairs:
                            place[..., number] = tile[..., sample]
        return out

    def _decoded(self, page_number: int, plane: int, row: int, column: int) -> np.ndarray:
        """Return a tile, (rows, columns, samples); that of the lower or right border may be smaller."""
        index = (plane * self._grid[0] + row) * self._grid[1] + column
        key = (page_number, index)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        page = self._pages[page_number] if page_number < len(self._pages) else None
        if page is None or index >= len(page.dataoffsets) or index >= len(page.databytecounts):
            raise self._damaged(row, column, "its place in the file is not known")
        offset, count = page.dataoffsets[index], page.databytecounts[index]
        if count:
            tile = self._decode(page, index, self._bytes(offset, count, row, column), row, column)
        else:  # left out on purpose: nothing there
            tile = np.full((*self._tile, self._inner), self._empty, dtype=self._dtype)
        while len(self._kept) >= self._most:
            self._kept.popitem(last=False)
        self._kept[key] = tile
        return tile

    def _bytes(self, offset: int, count: int, row: int, column: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(count)
        while data and len(data) < count:  # a system gives at most 2 GiB at once
            more = self._file.read(count - len(data))
            if not more:
                break
            data += more
        if len(data) < count:
            raise self._damaged(row, column, f"the file is cut off: {len(data):,} of {count:,} bytes are there")
        return data

    def _decode(self, page: Any, index: int, data: bytes, row: int, column: int) -> np.ndarray:
        options = {"jpegtables": page.jpegtables, "jpegheader": self._page.jpegheader} if self._jpeg else {}
        try:
            values, _, _ = self._page.decode(data, index, _fullsize=self._page.is_tiled, **options)
        except Exception as error:  # decoders raise whatever the damage provokes
            if isinstance(error, ImportError) or "requires the 'imagecodecs'" in str(error):
                raise BackendError(
                    f"{self._path}: is decoded by imagecodecs, which is not installed: {MISSING}"
                ) from None
            raise self._damaged(row, column, str(error).strip().rstrip(".") or type(error).__name__) from error
        return values[0]

    def _damaged(self, row: int, column: int, reason: str) -> DataError:
        what, place = ("strip", f"{row}") if not self._page.is_tiled else ("tile", f"{row}, {column}")
        y, x = row * self._tile[0], column * self._tile[1]
        return DataError(f"{self._path}: its {what} {place}, at row {y}, column {x}, cannot be read: {reason}.")


def _colour(path: Path, page: Any, num_samples: int, white: float) -> Colour:
    """Say what the samples of a page mean."""
    photometric = int(page.photometric)
    extra = page.tags[_EXTRA].value if _EXTRA in page.tags else ()
    extra = tuple(int(kind) for kind in (extra if isinstance(extra, tuple) else (extra,)))
    kind: Any = "plain"
    first = num_samples - len(extra)
    eight = page.dtype == np.uint8
    if photometric == _PALETTE and page.colormap is not None:
        kind, first = "palette", 1
    elif photometric == _CMYK and first == 4 and (_INKSET not in page.tags or page.tags[_INKSET].value == 1):
        if not eight:
            raise DataError(f"{path}: is CMYK of {page.dtype}; convert it to RGB, or to CMYK of 8 bits, first.")
        kind = "cmyk"
    elif photometric == _YCBCR and page.compression not in _JPEG and page.compression in (1, 5, 8, 32773, 32946):
        if page.is_subsampled or not eight:
            raise DataError(f"{path}: is YCbCr in a form that cannot be read; convert it to RGB first.")
        kind = "ycbcr"
    elif photometric not in (*_PLAIN, _CMYK, _YCBCR):
        name = getattr(page.photometric, "name", photometric)
        raise DataError(f"{path}: its colours ({name}) cannot be read as RGB; convert it to RGB first.")
    alpha = next((first + i for i, what in enumerate(extra) if what in (_PREMULTIPLIED, _ALPHA)), None)
    palette = None
    if kind == "palette":
        palette = (page.colormap.T >> 8 if page.colormap.max() > 255 else page.colormap.T).astype(np.uint8)
    if alpha is not None:
        alpha += {"palette": 2, "cmyk": -1}.get(kind, 0)
    return Colour(
        num_samples,
        kind,
        palette=palette,
        alpha=alpha,
        premultiplied=_PREMULTIPLIED in extra,
        inverted=photometric == 0 and page.dtype.kind in "bu",
        white=255.0 if kind == "palette" else white,
    )


def _white(page: Any) -> float:
    """Return the value of white: below that of the type where samples have fewer bits."""
    bits = page.bitspersample
    if page.dtype is not None and page.dtype.kind == "u" and isinstance(bits, int) and bits < 8 * page.dtype.itemsize:
        return float(2**bits - 1) if int(page.photometric) != _PALETTE else 255.0
    return value_scale(page.dtype)


def _nodata(page: Any) -> float | None:
    """Return GDAL's "no data" value."""
    if _NODATA not in page.tags:
        return None
    try:
        return float(str(page.tags[_NODATA].value).strip("\0 "))
    except ValueError:
        return None


def _counted(axes: dict[str, int]) -> str:
    names = {"I": "pages", "Q": "pages", "Z": "layers", "T": "times"}
    return ", ".join(f"{number} {names.get(name, name)}" for name, number in axes.items())


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep tifffile from logging a line for each damaged tag: one sentence follows."""
    logger = logging.getLogger("tifffile")
    logger.addFilter(_nothing)
    try:
        yield
    finally:
        logger.removeFilter(_nothing)


def _nothing(record: logging.LogRecord) -> bool:
    return False


def is_tiff(begin: bytes) -> bool:
    """Return whether a file begins as a TIFF or BigTIFF does."""
    return begin[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
