"""The tokens of a giant image: a grid of which rows are read and written, in memory or in a file.

Files are read and written by position and not mapped into memory: on a full disk a mapped page ends the process.

Legend: (h, w) the grid, C channels.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from xcit.errors import DataError, ExportError
from xcit.files import FULL
from xcit.models.row_maps import RowMap


class TokenGrid(ABC):
    """A grid of tokens.

    Attributes:
        shape: (h, w, C).
        dtype: of the values.
    """

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.shape[1] * self.shape[2] * self.dtype.itemsize

    @abstractmethod
    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows, (bottom - top, w, C) on the CPU, to be left as they are."""

    @abstractmethod
    def write(self, top: int, rows: Tensor) -> None:
        """Put rows (n, w, C) in their place."""

    def keep(self) -> None:
        """Put everything where it survives the process, if there is such a place."""
        return

    def close(self) -> None:
        """Let go of it."""
        return


class TokensInMemory(TokenGrid):
    """Tokens in one tensor."""

    def __init__(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self._x = torch.empty(shape, dtype=dtype)

    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows."""
        return self._x[top:bottom]

    def write(self, top: int, rows: Tensor) -> None:
        """Put rows in their place."""
        self._x[top : top + len(rows)] = rows


class TokensOnDisk(TokenGrid):
    """Tokens in a file, which is opened if it is there and whole, and else made at its full size.

    Attributes:
        was_there: whether it was opened.

    Raises:
        ExportError: no space, no permission.
    """

    def __init__(self, path: Path, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        super().__init__(shape, dtype)
        self.path = path
        size = shape[0] * self.row_bytes
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.was_there = path.exists() and path.stat().st_size == size
            self._file: IO[bytes] = path.open("r+b" if self.was_there else "w+b", buffering=0)
        except OSError as error:
            raise self._told(error) from error
        if not self.was_there:
            try:
                _reserve(self._file, size)
            except OSError as error:
                self._file.close()
                with suppress(OSError):
                    path.unlink()
                raise self._told(error) from error

    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows.

        Raises:
            DataError: the file has become shorter, or cannot be read.
        """
        rows = torch.empty((bottom - top, *self.shape[1:]), dtype=self.dtype)
        view = _bytes_of(rows)
        offset = top * self.row_bytes
        try:
            while len(view):
                count = os.preadv(self._file.fileno(), [view], offset)
                if not count:
                    raise DataError(f"{self.path}: has lost its end while it was in use; begin again.")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read: {error.strerror or error}.") from error
        return rows

    def write(self, top: int, rows: Tensor) -> None:
        """Put rows in their place.

        Raises:
            ExportError: no space or the like.
        """
        view = _bytes_of(rows.contiguous())
        offset = top * self.row_bytes
        try:
            while len(view):
                count = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[count:], offset + count
        except OSError as error:
            raise self._told(error) from error

    def keep(self) -> None:
        """Put everything on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._told(error) from error

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def _told(self, error: OSError) -> ExportError:
        advice = "make room, or name another folder for the tokens (--work)"
        if error.errno not in FULL:
            advice = "name a folder that you may write to (--work)"
        return ExportError(f"{self.path} could not be written: {error.strerror or error}; {advice}.")


class GridRows(RowMap):
    """Tokens as a map (1, C, h, w).

    Args:
        grid: the tokens.
        device: where their rows are wanted.
        height: of the map; None for the grid's.
        first: the row of the map with which the grid begins.
    """

    def __init__(self, grid: TokenGrid, device: torch.device, height: int | None = None, first: int = 0) -> None:
        h, w, C = grid.shape
        super().__init__(C, height or h, w)
        self._grid, self._device, self._first = grid, device, first

    def make(self, begin: int, end: int) -> Tensor:
        """Return rows, channels last."""
        begin, end = begin - self._first, end - self._first
        assert 0 <= begin < end <= self._grid.shape[0], "rows that the process does not have"
        return self._grid.read(begin, end).to(self._device).permute(2, 0, 1).unsqueeze(0)


def _reserve(file: IO[bytes], size: int) -> None:
    """Give a file its size, and its place on the disk where the system can."""
    file.truncate(size)
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _bytes_of(x: Tensor) -> memoryview:
    return memoryview(x.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
