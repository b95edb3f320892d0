"""Large images in array files: ``.npy``, and zarr (versions 2 and 3, OME-Zarr pyramids too)."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xcit.data.large_axes import Axes, RawSamples, guess_axes
from xcit.data.large_base import LargeImage, Stored, check_level, value_scale
from xcit.data.large_colour import Colour
from xcit.data.large_georeference import MISSING, Georeference
from xcit.errors import BackendError, ConfigError, DataError

GEOREFERENCE = "georeference"
"""Under which the attributes of a zarr that this library wrote hold ``Georeference.to_json``; also the ending, before
``.json``, of the file that stands beside an ``.npy``."""
_CHUNKS_AT_ONCE = 10  # zarr's own default for async.concurrency

log = logging.getLogger(__name__)


def georeference_file(path: Path) -> Path:
    """Return where the georeference of an ``.npy`` stands."""
    return path.with_name(f"{path.stem}.{GEOREFERENCE}.json")


def stored_georeference(data: Any, where: str) -> Georeference:
    """Read what this library wrote.

    Raises:
        DataError: it is something else.
    """
    try:
        return Georeference.from_json(data)
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where}: its georeference is not one that xcit wrote; remove it or write it again.") from None


def _georeference_beside(path: Path) -> Georeference | None:
    beside = georeference_file(path)
    if not beside.exists():
        return None
    try:
        data = json.loads(beside.read_bytes())
    except ValueError:
        data = ()  # not ours
    return stored_georeference(data, str(beside))


class NumpyImage(LargeImage):
    """An ``.npy`` of (H, W) or (H, W, C), or of other ``axes``."""

    format = "npy"

    def __init__(self, path: Path, *, bands: Sequence[int] | None, axes: str | None) -> None:
        self._file = path.open("rb", buffering=0)
        try:
            shape, dtype = self._header(path)
            named = Axes(axes or guess_axes(shape, path), shape, path)
            self._raw = RawSamples(self._file, self._file.tell(), named, dtype)
            missing = self._file.tell() + self._raw.num_bytes - path.stat().st_size
            if missing > 0:
                raise DataError(f"{path}: is cut off; {missing:,} bytes are missing of an array {shape} of {dtype}.")
            scale = value_scale(dtype)
            stored = Stored(
                size=named.size,
                dtype=dtype,
                colour=Colour(named.num_bands, white=scale),
                block=(1, named.size[1]),
                bytes_in_memory=0,
                is_windowed=True,
                levels=(named.size,),
                scale=scale,
                georeference=_georeference_beside(path),
            )
            super().__init__(path, stored, bands=bands)
        except BaseException:
            self._file.close()
            raise

    def _header(self, path: Path) -> tuple[tuple[int, ...], np.dtype]:
        try:
            version = np.lib.format.read_magic(self._file)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reader(self._file)
        except Exception as error:  # numpy raises whatever the damage provokes
            raise DataError(f"{path}: is a damaged .npy file ({error}).") from None
        if fortran and len(shape) > 1:
            raise DataError(f"{path}: is stored by columns; save it by rows, from np.ascontiguousarray(array).")
        if dtype.kind not in "buif":
            raise DataError(f"{path}: holds {dtype}; pixels are integers or floating-point numbers.")
        return shape, dtype

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def _window(self, top: int, left: int, height: int, width: int, samples: Sequence[int]) -> np.ndarray:
        return self._raw.window(top, left, height, width, samples)


class ZarrImage(LargeImage):
    """A zarr array, or a group that holds one, or OME-Zarr's multiscales."""

    format = "zarr"

    def __init__(self, path: Path, *, level: int, bands: Sequence[int] | None, axes: str | None) -> None:
        try:
            import zarr
        except ModuleNotFoundError:
            raise BackendError(f"{path}: zarr images need zarr, which is not installed: {MISSING}") from None
        try:
            node = zarr.open(str(path), mode="r")
            arrays, names, attributes = self._levels(node, path)
        except DataError:
            raise
        except Exception as error:  # zarr raises whatever the damage provokes
            raise DataError(f"{path}: is a damaged zarr ({str(error).rstrip('.') or type(error).__name__}).") from None
        named = [Axes(axes or names or guess_axes(a.shape, path), a.shape, path) for a in arrays]
        levels = tuple(a.size for a in named)
        check_level(level, levels, path)
        self._array, self._axes = arrays[level], named[level]
        if self._axes.passed_over:
            log.warning("%s: of %s the first is read.", path, self._axes.passed_over)
        self._marks = [path / name for name in ("zarr.json", ".zarray", ".zgroup") if (path / name).exists()]
        dtype, scale = np.dtype(self._array.dtype), value_scale(self._array.dtype)
        chunks = self._array.chunks
        block = (min(chunks[self._axes.y], self._axes.size[0]), min(chunks[self._axes.x], self._axes.size[1]))
        # then every band would decode the chunks of all the others again
        self._bands_together = any(chunks[i] > 1 for i, name in enumerate(self._axes.names) if name in "CS")
        place = attributes.get(GEOREFERENCE)
        georeference = None if place is None else stored_georeference(place, str(path))
        if georeference is not None and level:
            georeference = georeference.scaled(levels[0][0] / levels[level][0], levels[0][1] / levels[level][1])
        stored = Stored(
            size=self._axes.size,
            dtype=dtype,
            colour=Colour(self._axes.num_bands, white=scale),
            block=block,
            bytes_in_memory=int(np.prod(chunks, dtype=np.int64)) * dtype.itemsize * 2 * _CHUNKS_AT_ONCE,
            is_windowed=block != self._axes.size,
            levels=levels,
            scale=scale,
            georeference=georeference,
        )
        super().__init__(path, stored, level=level, bands=bands)

    @staticmethod
    def _levels(node: Any, path: Path) -> tuple[list[Any], str | None, dict[str, Any]]:
        """Return the arrays, the full resolution first, the names of their axes, and the attributes."""
        attributes = dict(node.attrs)
        if not hasattr(node, "array_keys"):
            return [node], _dimension_names(node), attributes
        scales = attributes.get("multiscales") or attributes.get("ome", {}).get("multiscales")
        if scales:
            arrays = [node[entry["path"]] for entry in scales[0]["datasets"]]
            names = [axis if isinstance(axis, str) else axis["name"] for axis in scales[0].get("axes", ())]
            return arrays, "".join(name[:1].upper() for name in names) or None, attributes
        keys = sorted(node.array_keys())
        if len(keys) == 1:
            array = node[keys[0]]
            return [array], _dimension_names(array), {**attributes, **array.attrs}
        listed = f"it holds {', '.join(keys)}; name one: {path / keys[0]}" if keys else "it holds no array"
        raise DataError(f"{path}: is a zarr group without OME-Zarr's multiscales, and {listed}.")

    def close(self) -> None:
        """Nothing is held open."""

    def _window(self, top: int, left: int, height: int, width: int, samples: Sequence[int]) -> np.ndarray:
        # a chunk that is not there means its fill value, hence a folder that is gone would read as an empty image
        for mark in self._marks:
            if not mark.exists():
                raise FileNotFoundError("it is no longer there")
        axes = self._axes
        every = range(axes.num_bands)
        if (len(samples) > 1 and self._bands_together) or list(samples) == list(every):
            index: list[Any] = [slice(None) if name in "CS" else 0 for name in axes.names]
            index[axes.y], index[axes.x] = slice(top, top + height), slice(left, left + width)
            values = np.asarray(self._array[tuple(index)])
            kept = [name for name in axes.names if name in "YXCS"]
            order = [kept.index(name) for name in ("Y", "X", *(k for k in kept if k in "CS"))]
            values = values.transpose(order).reshape(height, width, -1)
            values = values if list(samples) == list(every) else values[..., list(samples)]
            return values.astype(self.dtype, copy=False)
        out = np.empty((height, width, len(samples)), dtype=self.dtype)
        for number, band in enumerate(samples):
            index = list(axes.index(band))
            index[axes.y], index[axes.x] = slice(top, top + height), slice(left, left + width)
            out[..., number] = self._array[tuple(index)]
        return out


def _dimension_names(array: Any) -> str | None:
    """Return the axes that an array names itself (zarr 3, or xarray's attribute), if they are such as name an image."""
    names = getattr(array.metadata, "dimension_names", None) or array.attrs.get("_ARRAY_DIMENSIONS")
    if not names or any(not name for name in names):
        return None
    first = "".join(
        {"band": "C", "latitude": "Y", "lat": "Y", "longitude": "X", "lon": "X"}.get(name.lower(), name[:1].upper())
        for name in names
    )
    return first if len(set(first)) == len(first) and {"Y", "X"} <= set(first) else None


def is_zarr(path: Path) -> bool:
    """Return whether a folder is a zarr array or group."""
    return any((path / name).is_file() for name in ("zarr.json", ".zarray", ".zgroup"))


def no_axes(axes: str | None, path: Path, what: str) -> None:
    """Refuse ``axes`` for a format whose axes are known.

    Raises:
        ConfigError: they were given.
    """
    if axes is not None:
        raise ConfigError(f"{path}: axes are for TIFF, .npy and zarr; those of {what} are known.")
