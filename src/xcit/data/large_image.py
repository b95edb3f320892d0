"""Images of any size, read by windows, whatever their format.

=====================  =========================================  =====================================================
file, by its content   read by                                    a window costs
=====================  =========================================  =====================================================
TIFF, BigTIFF          tifffile (tiles, strips, pyramids, OME)    the tiles that it touches; one row of tiles is kept
.npy                   position in the file                       itself
zarr (2, 3, OME)       zarr                                       the chunks that it touches
PNG, JPEG, WebP, ...   Pillow                                     the whole image, decoded once, is kept
JPEG 2000, VRT, ...    rasterio (GDAL), where it is installed     the blocks that it touches; a cache of 64 MiB is kept
=====================  =========================================  =====================================================

What the file may hold and what becomes of it: as in ``images`` (transparency composited on white, palettes and CMYK to
RGB, EXIF orientation applied, of several pages the first), except that values keep their type and are not scaled:
``LargeImage.scale`` is the value of white. A georeferenced image is not turned.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from xcit.data.large_array import NumpyImage, ZarrImage, is_zarr, no_axes
from xcit.data.large_base import LargeImage, fill_nodata, value_scale
from xcit.data.large_georeference import MISSING, Georeference
from xcit.data.large_plain import PlainImage, identified
from xcit.data.large_tiff import TiffImage, is_tiff
from xcit.errors import ConfigError, DataError

__all__ = ["Georeference", "LargeImage", "fill_nodata", "open_large_image", "value_scale"]

_JPEG_2000 = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")

log = logging.getLogger(__name__)


def open_large_image(
    path: str | os.PathLike[str], *, level: int = 0, bands: Sequence[int] | None = None, axes: str | None = None
) -> LargeImage:
    """Open an image of which windows are to be read.

    Nothing is decoded yet; ``LargeImage.bytes_in_memory`` says what the first window will take.

    Args:
        path: a file, recognised by its content, or the folder of a zarr.
        level: which resolution of a pyramid: 0 for the full one, up to ``len(LargeImage.levels) - 1``.
        bands: which of its bands, counted from 1, in the order that is wanted; None for all. Bands that are chosen are
            given as they are: transparency counts as one, and nothing is composited. Those of palettes, CMYK and YCbCr
            are red, green and blue.
        axes: what the axes of the array mean, a letter each, where the file does not say or says it wrong: Y rows, X
            columns, C bands, S samples of a pixel; of others the first element is read. For TIFF (pages count as an
            axis), .npy and zarr.

    Returns:
        A context manager with ``read``.

    Raises:
        DataError: the file is missing, empty, damaged, or of an unknown format or layout; the message names it.
        ConfigError: a level, bands or axes that it does not have.
        BackendError: a package that its format needs is not installed; the message names the extra.
    """
    path = Path(path)
    try:
        if path.is_dir():
            if not is_zarr(path):
                raise DataError(f"{path}: is a folder, and not a zarr (which has zarr.json, .zarray or .zgroup).")
            return ZarrImage(path, level=level, bands=bands, axes=axes)
        with path.open("rb") as file:
            begin = file.read(24)
        if not begin:
            raise DataError(f"{path}: is empty (0 bytes).")
        if is_tiff(begin):
            return TiffImage(path, level=level, bands=bands, axes=axes)
        if begin.startswith(b"\x93NUMPY"):
            _no_level(level, path)
            return NumpyImage(path, bands=bands, axes=axes)
        return _picture(path, begin, level=level, bands=bands, axes=axes)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file.") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}.") from None


def _picture(path: Path, begin: bytes, *, level: int, bands: Sequence[int] | None, axes: str | None) -> LargeImage:
    """Open what is neither TIFF nor an array."""
    no_axes(axes, path, "pictures and rasters")
    has_rasterio = importlib.util.find_spec("rasterio") is not None
    tiled = begin.startswith(_JPEG_2000)
    if not (tiled and has_rasterio) and (found := identified(path)) is not None:
        image = PlainImage(path, *found, bands=bands)
        try:
            _no_level(level, path)
        except ConfigError:
            image.close()
            raise
        if tiled:
            log.warning("%s: is decoded whole, as rasterio, which reads windows of it, is missing: %s", path, MISSING)
        return image
    if has_rasterio:
        from xcit.data.large_raster import RasterImage, is_raster

        if is_raster(path):
            return RasterImage(path, level=level, bands=bands)
    advice = "" if has_rasterio else f" GDAL's formats (VRT, IMG, ...) need rasterio: {MISSING}"
    raise DataError(f"{path}: is not an image in a format that can be read; it begins with {begin!r}.{advice}")


def _no_level(level: int, path: Path) -> None:
    if level:
        raise ConfigError(f"{path}: level {level} was asked for; it holds one resolution, which is 0.")
