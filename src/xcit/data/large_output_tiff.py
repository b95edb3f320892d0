"""Large results as tiled BigTIFF.

The directory comes first, with tables of the tiles' places that are filled in as the tiles are appended: the file can
be gone on with at any row of tiles, and no tile is written twice.

Source: the BigTIFF design (version 43, 8-byte offsets), TIFF 6.0, GeoTIFF 1.1 (through ``Georeference.tags``).
"""

from __future__ import annotations

import os
import struct
import zlib
from typing import Any

import numpy as np

from xcit.data.large_writing import DenseOutput, tile_sides
from xcit.errors import ConfigError

_SHORT, _LONG, _ASCII, _DOUBLE, _LONG8 = 3, 4, 2, 12, 16
_CODES = {_SHORT: "H", _LONG: "I", _DOUBLE: "d", _LONG8: "Q"}
_OFFSETS, _COUNTS = 324, 325
_DEFLATE, _NONE = 8, 1
_SMALLEST = 16  # sides of tiles are multiples of it


class TiffOutput(DenseOutput):
    """A ``.tif``: integers are compressed, floating-point numbers, which hardly would get smaller, are not."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._file: Any = None
        path, shape, dtype = args
        self._channels = shape[2] if len(shape) == 3 else 1
        if self._channels > 65535 or max(shape[:2]) >= 2**32:
            raise ConfigError(f"{path} would hold {shape}; a TIFF has at most 65535 channels; take .zarr or .npy.")
        self._tile = tile_sides(shape, dtype.itemsize, _SMALLEST)
        self._grid = (-(-shape[0] // self._tile[0]), -(-shape[1] // self._tile[1]))
        self._compressed = dtype.kind in "iu"
        super().__init__(*args, **options, block_rows=self._tile[0])
        self.bytes_in_memory += 3 * self._tile[0] * self._tile[1] * self._channels * dtype.itemsize

    def _least_bytes(self) -> int:
        tiles = self._grid[0] * self._grid[1]
        tile = self._tile[0] * self._tile[1] * self._channels * self.dtype.itemsize
        return tiles * (16 + (0 if self._compressed else tile))

    def _begin(self) -> None:
        head, self._tables = self._directory()
        self._file = self._partial.open("xb", buffering=0)
        self._write(0, head)
        self._position = len(head)

    def _go_on(self, state: Any) -> None:
        _, self._tables = self._directory()
        self._position = int(state["end"])
        if self._partial.stat().st_size < self._position:
            raise ValueError("less is there than was written")
        self._file = self._partial.open("r+b", buffering=0)
        self._file.truncate(self._position)

    def _put(self, top: int, rows: np.ndarray) -> None:
        height, width = self._tile
        row = top // height
        rows = rows.reshape(len(rows), self.shape[1], self._channels)
        offsets, counts = [], []
        for column in range(self._grid[1]):
            part = rows[:, column * width : (column + 1) * width]
            tile = np.zeros((height, width, self._channels), dtype=self.dtype.newbyteorder("<"))
            tile[: part.shape[0], : part.shape[1]] = part
            data: Any = tile.reshape(-1).view(np.uint8).data
            if self._compressed:
                data = zlib.compress(data)
            self._write(self._position, data)
            offsets.append(self._position)
            counts.append(len(data))
            self._position += len(data)
        for table, values in zip(self._tables, (offsets, counts), strict=True):
            self._write(table + 8 * row * self._grid[1], struct.pack(f"<{len(values)}Q", *values))

    def _sync(self) -> Any:
        os.fsync(self._file.fileno())
        return {"end": self._position}

    def _end(self, whole: bool) -> None:
        if self._file is not None:
            self._file.close()

    def _write(self, at: int, data: Any) -> None:
        """Write all of it: an unbuffered file may take a part."""
        view = memoryview(data)
        self._file.seek(at)
        while view:
            view = view[self._file.write(view) :]

    def _directory(self) -> tuple[bytes, tuple[int, int]]:
        """Return the beginning of the file, and where its two tables stand: the tiles' offsets and byte counts."""
        count, tiles = self._channels, self._grid[0] * self._grid[1]
        kind = {"u": 1, "i": 2, "f": 3}[self.dtype.kind]
        colours = 3 if count == 3 and self.dtype == np.uint8 else 1
        tags: list[tuple[int, int, Any]] = [
            (256, _LONG, (self.shape[1],)),
            (257, _LONG, (self.shape[0],)),
            (258, _SHORT, (8 * self.dtype.itemsize,) * count),
            (259, _SHORT, (_DEFLATE if self._compressed else _NONE,)),
            (262, _SHORT, (2 if colours == 3 else 1,)),  # RGB, or the least value is black
            (277, _SHORT, (count,)),
            (284, _SHORT, (1,)),  # the samples of a pixel stand together
            (322, _LONG, (self._tile[1],)),
            (323, _LONG, (self._tile[0],)),
            (_OFFSETS, _LONG8, (0,) * tiles),
            (_COUNTS, _LONG8, (0,) * tiles),
            (339, _SHORT, (kind,) * count),
        ]
        if count > colours:
            tags.append((338, _SHORT, (0,) * (count - colours)))  # further samples, of no particular kind
        types = {"d": _DOUBLE, "H": _SHORT, "s": _ASCII}
        for code, letter, _, value in self.georeference.tags() if self.georeference else ():
            tags.append((code, types[letter], value))
        tags.sort(key=lambda tag: tag[0])
        places: dict[int, int] = {}
        entries, values = b"", b""
        begin = 16 + 8 + 20 * len(tags) + 8
        for number, (code, type_, value) in enumerate(tags):
            if type_ == _ASCII:
                data = value.encode() + b"\0"
                length = len(data)
            else:
                data, length = struct.pack(f"<{len(value)}{_CODES[type_]}", *value), len(value)
            entry = struct.pack("<HHQ", code, type_, length)
            if len(data) <= 8:
                places[code] = 16 + 8 + 20 * number + 12
                entries += entry + data.ljust(8, b"\0")
            else:
                values += bytes(-len(values) % 8)
                places[code] = begin + len(values)
                entries += entry + struct.pack("<Q", places[code])
                values += data
        head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, 16) + struct.pack("<Q", len(tags)) + entries + bytes(8) + values
        return head + bytes(-len(head) % 16), (places[_OFFSETS], places[_COUNTS])
