"""Large rasters in the formats that GDAL reads (JPEG 2000, VRT, IMG, ...), by rasterio and windowed.

TIFF is read by tifffile, georeferenced or not, so that its pixels are the same whether rasterio is installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xcit.data.large_base import LargeImage, Stored, check_level, value_scale
from xcit.data.large_colour import Colour
from xcit.data.large_georeference import from_rasterio
from xcit.errors import DataError

_CACHE = 64 << 20
"""Bytes of decoded blocks that GDAL keeps; its own default is a twentieth of the machine's memory."""
_WORKING = 8 << 20
"""Bytes that GDAL takes besides. JPEG 2000 takes more, measured: the file, and its blocks as wide integers, several."""


class RasterImage(LargeImage):
    """A raster that rasterio opens."""

    format = "raster"

    def __init__(self, path: Path, *, level: int, bands: Sequence[int] | None) -> None:
        dataset = _opened(path)
        if dataset is None:
            raise DataError(f"{path}: is not an image in a format that can be read.")
        self._dataset = dataset
        try:
            factors = [(1, 1)]
            with _quiet():
                for factor in dataset.overviews(1) if dataset.count else ():
                    factors.append((factor, factor))
            levels = tuple((-(-dataset.height // a), -(-dataset.width // b)) for a, b in factors)
            check_level(level, levels, path)
            if level:
                dataset.close()
                self._dataset = dataset = _opened(path, overview_level=level - 1) or dataset
            if not dataset.count:
                raise DataError(f"{path}: holds no band of pixels; it may be a container: {_parts(dataset)}.")
            if len(set(dataset.dtypes)) > 1:
                raise DataError(f"{path}: its bands are of different types ({', '.join(dataset.dtypes)}).")
            dtype = np.dtype(dataset.dtypes[0])
            georeference = from_rasterio(dataset, str(path))
            block = dataset.block_shapes[0]
            scale = value_scale(dtype)
            stored = Stored(
                size=(dataset.height, dataset.width),
                dtype=dtype,
                colour=_colour(dataset, scale),
                block=(min(block[0], dataset.height), min(block[1], dataset.width)),
                bytes_in_memory=_held(dataset, path),
                is_windowed=tuple(block) != (dataset.height, dataset.width),
                levels=(*levels[:level], (dataset.height, dataset.width), *levels[level + 1 :]),
                scale=scale,
                nodata=dataset.nodata,
                georeference=georeference,
            )
            super().__init__(path, stored, level=level, bands=bands)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file."""
        self._dataset.close()

    def _window(self, top: int, left: int, height: int, width: int, samples: Sequence[int]) -> np.ndarray:
        from rasterio.windows import Window

        with _quiet():
            values = self._dataset.read([s + 1 for s in samples], window=Window(left, top, width, height))
        return values.transpose(1, 2, 0)


def _colour(dataset: Any, white: float) -> Colour:
    from rasterio.enums import ColorInterp

    kinds = list(dataset.colorinterp)
    alpha = kinds.index(ColorInterp.alpha) if ColorInterp.alpha in kinds and len(kinds) > 1 else None
    if kinds[0] == ColorInterp.palette:
        table = dataset.colormap(1)
        palette = np.zeros((max(table) + 1, 3), dtype=np.uint8)
        for index, colour in table.items():
            palette[index] = colour[:3]
        return Colour(len(kinds), "palette", palette, alpha=None if alpha is None else alpha + 2, white=255.0)
    cmyk = [ColorInterp.cyan, ColorInterp.magenta, ColorInterp.yellow, ColorInterp.black]
    return Colour(len(kinds), "cmyk" if kinds == cmyk and white == 255 else "plain", alpha=alpha, white=white)


def _held(dataset: Any, path: Path) -> int:
    rows, columns = dataset.block_shapes[0]
    block = rows * columns * dataset.count
    row_of_blocks = rows * dataset.width * dataset.count * np.dtype(dataset.dtypes[0]).itemsize
    held = max(_CACHE, row_of_blocks) + _WORKING
    return held + path.stat().st_size + 32 * block if dataset.driver.startswith("JP2") else held


def _parts(dataset: Any) -> str:
    names = dataset.subdatasets
    return f"name one of {', '.join(names[:3])}" if names else "it has no parts"


def _opened(path: Path, **options: Any) -> Any:
    """Return rasterio's dataset, or None if GDAL does not know the format."""
    import rasterio
    from rasterio.errors import RasterioIOError

    try:
        with _quiet():
            return rasterio.open(path, **options)
    except RasterioIOError as error:
        if "not recognized as being in a supported file format" in str(error):
            return None
        raise DataError(f"{path}: is a damaged or incomplete raster ({str(error).rstrip('.')}).") from None


class _quiet:  # noqa: N801
    """GDAL with a bounded cache, and without its warnings that a picture is not on the earth."""

    def __enter__(self) -> None:
        import rasterio
        from rasterio.errors import NotGeoreferencedWarning

        self._env = rasterio.Env(GDAL_CACHEMAX=_CACHE)
        self._env.__enter__()
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("ignore", NotGeoreferencedWarning)

    def __exit__(self, *error: Any) -> None:
        self._warnings.__exit__(*error)
        self._env.__exit__(*error)


def is_raster(path: Path) -> bool:
    """Return whether GDAL reads a file."""
    dataset = _opened(path)
    if dataset is None:
        return False
    dataset.close()
    return True
