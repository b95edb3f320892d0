"""Where on the earth an image lies, as it goes from what is read into what is written.

A GeoTIFF says it with a few tags. They are kept as they are, so that even a reference system that has no number goes
into an output unchanged; only the transform is written anew, because outputs have other pixels than inputs.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from xcit.errors import BackendError

MISSING = 'pip install "xcit[giant]"'
"""What installs the packages that large images need."""

_PIXEL_SCALE, _TIE_POINTS, _TRANSFORM, _KEYS, _DOUBLES, _TEXTS = 33550, 33922, 34264, 34735, 34736, 34737
_RASTER_TYPE, _GEOGRAPHIC, _PROJECTED = 1025, 2048, 3072  # GeoKeys
_USER_DEFINED = 32767
_POINT = 2  # of the raster type: coordinates mean the middle of a pixel, not its corner

Transform = tuple[float, float, float, float, float, float]
"""a, b, c, d, e, f of x = a·column + b·row + c, y = d·column + e·row + f, for corners of pixels."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Georeference:
    """A coordinate reference system and the place of the pixels in it.

    Attributes:
        crs: the system: "EPSG:32633" where it has a number, else as WKT; None if unknown.
        transform: from pixels to its coordinates.
        keys: the GeoTIFF tags of the system (34735, 34736, 34737), as they were read; empty if there were none.
    """

    crs: str | None
    transform: Transform
    keys: tuple[tuple[int, tuple[int, ...] | tuple[float, ...] | str], ...] = ()

    def scaled(self, rows: float, columns: float) -> Georeference:
        """Return that of an image whose pixels are so many times as high and as wide, with the same top left corner.

        Args:
            rows: pixels of this image's height that one pixel of the other is high: 16 for features of 16 px patches.
            columns: likewise.
        """
        a, b, c, d, e, f = self.transform
        return replace(self, transform=(a * columns, b * rows, c, d * columns, e * rows, f))

    def moved(self, top: float, left: float) -> Georeference:
        """Return that of an image whose first pixel is this one's at (top, left), in pixels."""
        a, b, c, d, e, f = self.transform
        return replace(self, transform=(a, b, c + a * left + b * top, d, e, f + d * left + e * top))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, for the outputs that are no GeoTIFF."""
        return {"crs": self.crs, "transform": list(self.transform), "geotiff_keys": [list(key) for key in self.keys]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Georeference:
        """Read what ``to_json`` gave; KeyError, TypeError or ValueError where it did not."""
        a, b, c, d, e, f = (float(number) for number in data["transform"])
        keys = tuple(
            (int(code), value if isinstance(value, str) else tuple(value)) for code, value in data["geotiff_keys"]
        )
        return cls(None if data["crs"] is None else str(data["crs"]), (a, b, c, d, e, f), keys)

    def tags(self) -> list[tuple[int, str, int, Any]]:
        """Return the tags of a GeoTIFF as tifffile takes them: code, type, count, value.

        Raises:
            BackendError: the system came from another format, and rasterio, which translates it, is not installed.
        """
        keys = self.keys or _keys_of(self.crs)
        a, b, c, d, e, f = self.transform
        if b == d == 0 and a > 0 > e:
            place = [(_PIXEL_SCALE, "d", 3, (a, -e, 0.0)), (_TIE_POINTS, "d", 6, (0.0, 0.0, 0.0, c, f, 0.0))]
        else:
            matrix = (a, b, 0.0, c, d, e, 0.0, f, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0)
            place = [(_TRANSFORM, "d", 16, matrix)]
        system: list[tuple[int, str, int, Any]] = []
        for code, value in keys:
            if isinstance(value, str):
                system.append((code, "s", 0, value))
            else:
                system.append((code, "d" if code == _DOUBLES else "H", len(value), value))
        return [*place, *system]


def from_tags(tags: Mapping[int, Any], name: str) -> Georeference | None:
    """Return what the tags of a GeoTIFF say, or None if they say nothing that a transform could hold.

    Args:
        tags: values by code.
        name: of the file, for the log line about what cannot be kept.
    """
    if _KEYS not in tags and _TRANSFORM not in tags and _PIXEL_SCALE not in tags:
        return None
    directory = [int(n) for n in tags.get(_KEYS, (1, 1, 0, 0))]
    shift = 0.5 if _number(directory, _RASTER_TYPE) == _POINT else 0.0
    if _TRANSFORM in tags:
        m = [float(n) for n in tags[_TRANSFORM]]
        transform = (m[0], m[1], m[3], m[4], m[5], m[7])
    elif _PIXEL_SCALE in tags and len(tags.get(_TIE_POINTS, ())) == 6:
        (width, height), (column, row, _, x, y, _) = tags[_PIXEL_SCALE][:2], tags[_TIE_POINTS]
        transform = (width, 0.0, x - column * width, 0.0, -height, y + row * height)
    else:
        log.warning(
            "%s: is placed on the earth by control points, which outputs cannot keep; they have no place.", name
        )
        return None
    # what is kept means corners: the shift is taken into the transform, and out of the keys
    keys = []
    for code in (_KEYS, _DOUBLES, _TEXTS):
        if code in tags:
            value = tags[code]
            keys.append((code, value if isinstance(value, str) else tuple(value)))
    if shift:
        keys[0] = (_KEYS, tuple(_as_area(directory)))
    georeference = Georeference(_system(directory, tuple(keys)), transform, tuple(keys))
    return georeference.moved(-shift, -shift)


def from_rasterio(dataset: Any, name: str) -> Georeference | None:
    """Return the georeference of a dataset that rasterio has opened, or None if it has none."""
    if dataset.transform.is_identity:
        if dataset.gcps[0]:
            log.warning(
                "%s: is placed on the earth by control points, which outputs cannot keep; they have no place.", name
            )
        return None
    code = dataset.crs.to_epsg() if dataset.crs else None
    crs = f"EPSG:{code}" if code else (dataset.crs.to_wkt() if dataset.crs else None)
    a, b, c, d, e, f = dataset.transform[:6]
    return Georeference(crs, (a, b, c, d, e, f))


def _number(directory: list[int], key: int) -> int | None:
    """Look up a GeoKey whose value is a number in the directory itself."""
    for at in range(4, len(directory) - 3, 4):
        if directory[at] == key and directory[at + 1] == 0:
            return directory[at + 3]
    return None


def _as_area(directory: list[int]) -> list[int]:
    changed = list(directory)
    for at in range(4, len(directory) - 3, 4):
        if directory[at] == _RASTER_TYPE:
            changed[at + 3] = 1
    return changed


def _system(directory: list[int], keys: tuple[tuple[int, Any], ...]) -> str | None:
    """Name the system that GeoKeys describe: by its number, else by rasterio if that is installed."""
    for key in (_PROJECTED, _GEOGRAPHIC):
        code = _number(directory, key)
        if code is not None:
            if 0 < code < _USER_DEFINED:
                return f"EPSG:{code}"
            break
    if not keys:
        return None
    try:
        import rasterio
        from rasterio.io import MemoryFile
    except ModuleNotFoundError:
        return None  # the keys themselves are kept, and outputs get them
    place = (2.0, 0.0, 1.0, 0.0, -2.0, 1.0)  # any that GDAL does not take for none
    with rasterio.Env(), MemoryFile(_one_pixel(Georeference(None, place, keys))) as file, file.open() as dataset:
        return dataset.crs.to_wkt() if dataset.crs else None


def _keys_of(crs: str | None) -> tuple[tuple[int, Any], ...]:
    """Return the GeoTIFF tags of a system: what GDAL writes for it."""
    if crs is None:
        return ()
    try:
        import rasterio
        from rasterio.crs import CRS
        from rasterio.io import MemoryFile
    except ModuleNotFoundError:
        raise BackendError(
            f"A GeoTIFF in {crs[:40]} is written with rasterio, which is not installed: {MISSING}"
        ) from None
    import tifffile

    with rasterio.Env(), MemoryFile() as file:
        profile = {"driver": "GTiff", "height": 1, "width": 1, "count": 1, "dtype": "uint8"}
        transform = rasterio.Affine(2.0, 0.0, 1.0, 0.0, -2.0, 1.0)  # any that GDAL does not take for none
        with file.open(**profile, crs=CRS.from_user_input(crs), transform=transform):
            pass
        with tifffile.TiffFile(io.BytesIO(file.read())) as tif:
            page: Any = tif.pages[0]
            found = {code: page.tags.get(code) for code in (_KEYS, _DOUBLES, _TEXTS)}
    return tuple((code, tag.value) for code, tag in found.items() if tag is not None)


def _one_pixel(georeference: Georeference) -> bytes:
    import numpy as np
    import tifffile

    file = io.BytesIO()
    tifffile.imwrite(
        file, np.zeros((1, 1), dtype=np.uint8), photometric="minisblack", metadata=None, extratags=_extra(georeference)
    )
    return file.getvalue()


def _extra(georeference: Georeference) -> list[tuple[int, str, int, Any, bool]]:
    return [(*tag, True) for tag in georeference.tags()]
