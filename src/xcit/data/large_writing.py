"""What all large results have in common: rows are added from top to bottom, and the whole appears at the end.

Legend: H x W the result, C its channels.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from xcit.data.large_georeference import Georeference
from xcit.errors import ExportError, ShapeError, XCiTError
from xcit.files import FULL, write_atomic

COMMIT_SECONDS = 2.0
"""How often rows are put down for good, where the output can be gone on with."""
_ROWS_BYTES = 32 << 20
"""Bytes that a row of tiles should not exceed: they are gathered in memory."""
_TILE_BYTES = 4 << 20

log = logging.getLogger(__name__)


class DenseOutput(ABC):
    """A result that is being written; a context manager. ``open_dense_output`` makes one.

    When the block ends without an error the result takes its name. When it ends with one, or the process is killed,
    what had that name before is still there; without a key the temporary is removed.

    Attributes:
        path: where the result will be.
        shape: (H, W) or (H, W, C).
        dtype: of the values.
        rows_written: rows that need not be written any more; more than 0 at the beginning after ``resume``.
        bytes_in_memory: what writing holds.
    """

    def __init__(
        self,
        path: Path,
        shape: Sequence[int],
        dtype: Any,
        *,
        georeference: Georeference | None,
        key: str | None,
        resume: bool,
        block_rows: int,
    ) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), np.dtype(dtype)
        self.georeference = georeference
        self._block_rows = block_rows
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.bytes_in_memory = (block_rows if block_rows > 1 else 0) * self._row_bytes
        self._kept, self._done = key is not None, False
        name = uuid.uuid4().hex[:8] if key is None else self._fingerprint(key)
        self._partial = path.with_name(f".{path.stem}.{name}.partial{path.suffix}")
        self._progress = self._partial.with_name(f"{self._partial.name}.progress")
        self._rows: np.ndarray | None = None  # those of a block that is not complete
        self.rows_written, self._stored, self._committed = 0, 0, 0.0
        with self._told():
            path.parent.mkdir(parents=True, exist_ok=True)
            state = self._resumable() if resume else None
            if state is None:
                _remove(self._partial)
                self._progress.unlink(missing_ok=True)
                self._check_space()
                self._begin()
            else:
                try:
                    self._go_on(state["state"])
                    self.rows_written = self._stored = int(state["rows"])
                except (OSError, KeyError, TypeError, ValueError):
                    log.warning("%s: what was written of it before cannot be gone on with; it is begun again.", path)
                    self._end(False)
                    _remove(self._partial)
                    self._progress.unlink(missing_ok=True)
                    self._begin()

    def _fingerprint(self, key: str) -> str:
        georeference = self.georeference.to_json() if self.georeference else None
        made_of = [key, list(self.shape), str(self.dtype), self._block_rows, georeference]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:12]

    def _resumable(self) -> dict[str, Any] | None:
        if not (self._progress.exists() and self._partial.exists()):
            return None
        try:
            state = json.loads(self._progress.read_bytes())
        except ValueError:
            return None
        return state if isinstance(state, dict) else None

    def _check_space(self) -> None:
        needed = self._least_bytes()
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise ExportError(
                f"{self.path} takes {_amount(needed)}, and {_amount(free)} are free there; make room, or name another "
                f"folder."
            )

    # what the formats do

    @abstractmethod
    def _least_bytes(self) -> int:
        """Return what the result takes on the disk, at least."""

    @abstractmethod
    def _begin(self) -> None:
        """Make the temporary."""

    @abstractmethod
    def _go_on(self, state: Any) -> None:
        """Open the temporary that there is, as it was when ``_sync`` returned the state."""

    @abstractmethod
    def _put(self, top: int, rows: np.ndarray) -> None:
        """Write a block of rows, or the last rows."""

    @abstractmethod
    def _sync(self) -> Any:
        """Put everything on the disk, and return the state as plain data."""

    @abstractmethod
    def _end(self, whole: bool) -> None:
        """Let go of the temporary, after all rows or before."""

    def _beside(self) -> None:  # noqa: B027 (most have nothing)
        """Write what stands beside the result, just before it appears."""

    # what the user does

    def write(self, top: int, rows: np.ndarray) -> None:
        """Add rows.

        Args:
            top: the first of them: ``rows_written``.
            rows: (h, W) or (h, W, C), of the output's type.

        Raises:
            ShapeError: other rows than the next, or of another shape or type.
            ExportError: no space or the like.
        """
        rows = np.asarray(rows)
        fits = rows.shape[1:] == self.shape[1:] and rows.dtype == self.dtype and rows.ndim == len(self.shape)
        if not fits or top != self.rows_written or top + len(rows) > self.shape[0]:
            expected = f"(rows, {', '.join(map(str, self.shape[1:]))}) of {self.dtype}"
            raise ShapeError(
                f"{self.path}: rows {rows.shape} of {rows.dtype} came for row {top}; expected {expected} for row "
                f"{self.rows_written} of {self.shape[0]}."
            )
        with self._told():
            self.rows_written += len(rows)
            if self._block_rows == 1:
                self._put(top, rows)
                self._stored = self.rows_written
            else:
                self._gather(rows)
            if self._kept and time.monotonic() - self._committed > COMMIT_SECONDS:
                self._commit()

    def _gather(self, rows: np.ndarray) -> None:
        """Write what makes whole blocks, and keep the rest."""
        while len(rows):
            if self._rows is None:
                self._rows = np.empty((self._block_rows, *self.shape[1:]), dtype=self.dtype)
                self._gathered = 0
            take = min(len(rows), self._block_rows - self._gathered)
            self._rows[self._gathered : self._gathered + take] = rows[:take]
            self._gathered += take
            rows = rows[take:]
            if self._gathered == self._block_rows or self._stored + self._gathered == self.shape[0]:
                self._put(self._stored, self._rows[: self._gathered])
                self._stored += self._gathered
                self._gathered = 0

    def flush(self) -> int:
        """Put down for good what makes whole blocks of rows, and return how many rows a resumed output begins with."""
        with self._told():
            self._commit()
        return self._stored

    def _commit(self) -> None:
        state = {"rows": self._stored, "state": self._sync()}
        if self._kept:
            write_atomic(self._progress, json.dumps(state).encode())
        self._committed = time.monotonic()

    def close(self) -> None:
        """Give the result its name; all rows must have been written.

        Raises:
            ShapeError: rows are missing.
            ExportError: no space or the like.
        """
        if self._done:
            return
        if self.rows_written != self.shape[0]:
            self.abandon()
            raise ShapeError(f"{self.path}: {self.rows_written} of {self.shape[0]} rows were written; it is not whole.")
        try:
            with self._told():
                self._sync()
                self._end(True)
                self._beside()
                _replace(self._partial, self.path)
                self._progress.unlink(missing_ok=True)
        except BaseException:
            self.abandon()
            raise
        self._done = True

    def abandon(self) -> None:
        """Stop writing. The temporary is removed, or, with a key, kept for ``resume``."""
        if self._done:
            return
        self._done = True
        self._rows = None
        with suppress(OSError):  # what ends the writing is told already
            self._end(False)
        if not self._kept:
            with suppress(OSError):
                _remove(self._partial)
                self._progress.unlink(missing_ok=True)

    def __enter__(self) -> DenseOutput:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say what the system refuses in one sentence."""
        try:
            yield
        except XCiTError:
            self.abandon()
            raise
        except OSError as error:
            self.abandon()
            if error.errno in FULL:
                advice = f"{_amount(self._least_bytes())} are needed at least; make room"
                advice += " and go on: what has been written is kept" if self._kept else ""
            else:
                advice = "name a folder that you may write to"
            raise ExportError(f"{self.path} could not be written: {error.strerror or error}; {advice}.") from error


def tile_sides(shape: Sequence[int], itemsize: int, smallest: int) -> tuple[int, int]:
    """Return rows and columns of a tile such that a row of tiles fits into memory well, and a tile into a cache."""
    channels = shape[2] if len(shape) == 3 else 1
    rows = columns = 256
    while rows > smallest and rows * shape[1] * channels * itemsize > _ROWS_BYTES:
        rows //= 2
    while columns > smallest and rows * columns * channels * itemsize > _TILE_BYTES:
        columns //= 2
    return rows, columns


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace(partial: Path, path: Path) -> None:
    """Give a temporary its name; the change of names is on the disk too when this returns."""
    if path.is_dir():  # a folder cannot take the place of another
        old = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.old{path.suffix}")
        path.rename(old)
        try:
            partial.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old)
    else:
        partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # not for folders here
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def _amount(num_bytes: int) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:.1f} {unit}"
    return f"{num_bytes} bytes"
