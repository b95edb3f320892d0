"""Large results (class maps, features), written from top to bottom: whole under their name, or not at all.

=========  =============================================  ================================================
ending     what it is                                     georeference
=========  =============================================  ================================================
.npy       (H, W) or (H, W, C)                            in a file beside it, ``NAME.georeference.json``
.zarr      the same, in chunks                            an attribute
.tif       tiles; BigTIFF; integers compressed (deflate)  GeoTIFF
=========  =============================================  ================================================

Rows are written under a temporary name in the same folder, which becomes the name at the end. With a ``key`` the
temporary stays after a kill or an error, and whoever computes the same goes on with it.

Legend: H x W the result, C its channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xcit.data.large_array import georeference_file
from xcit.data.large_georeference import Georeference
from xcit.data.large_output_tiff import TiffOutput
from xcit.data.large_output_zarr import ZarrOutput
from xcit.data.large_writing import DenseOutput
from xcit.errors import ConfigError, ExportError
from xcit.files import write_atomic

ENDINGS = (".npy", ".zarr", ".tif", ".tiff")


class NumpyOutput(DenseOutput):
    """An ``.npy``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._file: Any = None
        super().__init__(*args, **options, block_rows=1)

    def _least_bytes(self) -> int:
        return self._row_bytes * self.shape[0]

    def _begin(self) -> None:
        self._file = self._partial.open("xb")
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(self._file, header)
        self._offset = self._file.tell()

    def _go_on(self, state: Any) -> None:
        self._file = self._partial.open("r+b")
        self._offset, end = int(state["offset"]), int(state["end"])
        if self._partial.stat().st_size < end:
            raise ValueError("less is there than was written")
        self._file.truncate(end)
        self._file.seek(end)

    def _put(self, top: int, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)

    def _sync(self) -> Any:
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"offset": self._offset, "end": self._file.tell()}

    def _end(self, whole: bool) -> None:
        if self._file is not None:
            self._file.close()

    def _beside(self) -> None:
        beside = georeference_file(self.path)
        if self.georeference is None:
            beside.unlink(missing_ok=True)
        else:
            write_atomic(beside, json.dumps(self.georeference.to_json(), indent=1).encode())


def open_dense_output(
    path: str | os.PathLike[str],
    shape: Sequence[int],
    dtype: Any,
    *,
    georeference: Georeference | None = None,
    key: str | None = None,
    resume: bool = False,
) -> DenseOutput:
    """Begin a result that is written row by row, or go on with one.

    Args:
        path: where the result will be; its ending is one of ``ENDINGS``. What has this name is replaced at the end.
        shape: (H, W) or (H, W, C).
        dtype: of the values: integers or floating point; booleans too, except in ``.tif``.
        georeference: where the result lies; that of the image, scaled to the result's pixels.
        key: names what is computed (the image, the model, the options). With one the temporary is kept when something
            ends the writing; two writers must not have the same at once.
        resume: go on with what there is of the same key, shape, type and georeference: ``rows_written`` says from
            where. Without one, begin.

    Returns:
        A context manager with ``write``.

    Raises:
        ConfigError: another ending, shape or type; ``resume`` without a key.
        ExportError: the result does not fit on the disk, or cannot be written there.
        BackendError: zarr is not installed, or rasterio where a GeoTIFF's system needs it.
    """
    path, shape, dtype = Path(path), tuple(int(n) for n in shape), np.dtype(dtype)
    if path.suffix.lower() not in ENDINGS:
        raise ConfigError(f"{path} would hold a large result; its name must end in {', '.join(ENDINGS)}.")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ConfigError(f"{path} would hold {shape}; results are (H, W) or (H, W, C), each 1 or more.")
    tiff = path.suffix.lower() in (".tif", ".tiff")
    if dtype.kind not in "buif" or (tiff and dtype.kind == "b"):
        raise ConfigError(f"{path} would hold {dtype}; expected integers or floating-point numbers.")
    if resume and key is None:
        raise ConfigError(f"{path} is to be gone on with, but no key says what it is.")
    if path.is_dir() and (path.suffix.lower() != ".zarr" or not _ours(path)):
        raise ExportError(f"{path} could not be written: a folder has this name; name another file.")
    if path.suffix.lower() == ".zarr" and path.is_file():
        raise ExportError(f"{path} could not be written: a file has this name, and a zarr is a folder; name another.")
    kinds = {".npy": NumpyOutput, ".zarr": ZarrOutput}
    kind: Any = kinds.get(path.suffix.lower(), TiffOutput)
    return kind(path, shape, dtype.newbyteorder("="), georeference=georeference, key=key, resume=resume)


def _ours(path: Path) -> bool:
    """Return whether a folder may be replaced: it is a zarr, or empty."""
    return any((path / name).exists() for name in ("zarr.json", ".zarray", ".zgroup")) or not any(path.iterdir())
