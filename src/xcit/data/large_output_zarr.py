"""Large results as zarr (version 3), in chunks of rows and columns with all channels."""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np

from xcit.data.large_array import GEOREFERENCE
from xcit.data.large_georeference import MISSING
from xcit.data.large_writing import DenseOutput, sync_folder, tile_sides
from xcit.errors import BackendError


class ZarrOutput(DenseOutput):
    """A ``.zarr``."""

    def __init__(self, *args: Any, **options: Any) -> None:
        path, shape, dtype = args
        try:
            import zarr
        except ModuleNotFoundError:
            raise BackendError(f"{path} is written with zarr, which is not installed: {MISSING}") from None
        self._zarr: Any = zarr
        self._array: Any = None
        rows, columns = tile_sides(shape, dtype.itemsize, 1)
        self._chunks = (min(rows, shape[0]), min(columns, shape[1]), *shape[2:])
        self._unsynced: set[int] = set()
        super().__init__(*args, **options, block_rows=self._chunks[0])
        self.bytes_in_memory += 3 * int(np.prod(self._chunks, dtype=np.int64)) * dtype.itemsize  # one, and compressed

    def _least_bytes(self) -> int:
        return 0  # it is compressed

    def _begin(self) -> None:
        self._array = self._zarr.create_array(
            str(self._partial),
            shape=self.shape,
            dtype=self.dtype,
            chunks=self._chunks,
            dimension_names=("y", "x", "c")[: len(self.shape)],
            attributes=None if self.georeference is None else {GEOREFERENCE: self.georeference.to_json()},
        )

    def _go_on(self, state: Any) -> None:
        if state != {"chunks": list(self._chunks)}:
            raise ValueError("other chunks")
        try:
            self._array = self._zarr.open_array(str(self._partial), mode="r+")
        except Exception as error:  # zarr raises whatever the damage provokes
            raise ValueError(str(error)) from error

    def _put(self, top: int, rows: np.ndarray) -> None:
        # One chunk at a time: of several, zarr would go on with the others after one has failed, and write into a
        # folder that is being removed.
        for left in range(0, self.shape[1], self._chunks[1]):
            columns = slice(left, left + self._chunks[1])
            self._array[top : top + len(rows), columns] = rows[:, columns]
        self._unsynced.add(top // self._chunks[0])

    def _sync(self) -> Any:
        for row in sorted(self._unsynced):
            for folder, _, files in os.walk(self._partial / "c" / str(row)):
                for name in files:
                    with open(os.path.join(folder, name), "rb+") as file:  # noqa: PTH118, PTH123 (thousands of them)
                        os.fsync(file.fileno())
        self._unsynced.clear()
        sync_folder(self._partial)
        return json.loads(json.dumps({"chunks": self._chunks}))

    def _end(self, whole: bool) -> None:
        self._array = None
