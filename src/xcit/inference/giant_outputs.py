"""Where a giant image's results go: a large file, row by row, or an array."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from xcit.data.large_georeference import Georeference
from xcit.data.large_output import open_dense_output
from xcit.errors import CheckpointError

if TYPE_CHECKING:
    from xcit.data.large_writing import DenseOutput
    from xcit.inference.giant_stream import Stream


class Sink:
    """Takes rows from top to bottom; a context manager.

    Attributes:
        array: all of them, if they go into no file and this process is the one that has them.
        height: rows of the whole.
    """

    def __init__(self, output: DenseOutput | None, shape: tuple[int, ...], dtype: Any, wanted: bool) -> None:
        self._output, self._dtype = output, np.dtype(dtype)
        self.height = shape[0]
        self.array = np.empty(shape, self._dtype) if output is None and wanted else None

    def __enter__(self) -> Sink:
        if self._output is not None:
            self._output.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._output is not None:
            self._output.__exit__(kind, error, at)

    def write(self, top: int, rows: np.ndarray) -> None:
        """Add rows."""
        rows = rows.astype(self._dtype, copy=False)
        if self._output is not None:
            self._output.write(top, rows)
        else:
            assert self.array is not None
            self.array[top : top + len(rows)] = rows

    def take(self, stream: Stream, bands: Iterable[Tensor]) -> np.ndarray | None:
        """Write the bands of all processes; return the array if they go into no file.

        Raises:
            CheckpointError: NaN or infinite values.
        """
        take_all([self], stream, ((_array(band),) for band in bands))
        return self.array


def take_all(sinks: Sequence[Sink], stream: Stream, bands: Iterable[tuple[np.ndarray, ...]]) -> None:
    """Write bands of rows, one array for each sink, from top to bottom."""
    top = 0
    with ExitStack() as stack:
        for each in sinks:
            stack.enter_context(each)
        for arrays in stream.processes.in_order(bands):
            for each, rows in zip(sinks, arrays, strict=True):
                each.write(top, rows)
            top += len(arrays[0])
            stream.within(top / sinks[0].height)


def _array(band: Tensor) -> np.ndarray:
    if not band.isfinite().all():
        raise CheckpointError("What comes out is NaN or infinite: something overflows in the model's type.")
    return band.numpy() if band.dtype.itemsize > 2 else band.float().numpy()


def sink(
    path: Path | None, shape: tuple[int, ...], dtype: Any, georeference: Georeference | None, *, wanted: bool = True
) -> Sink:
    """Return where a result goes: a file as of ``open_dense_output``, or, without a path, an array.

    Args:
        path: the file, if any.
        shape: of the whole result.
        dtype: likewise.
        georeference: likewise.
        wanted: whether this process is the one that writes.
    """
    output = None if path is None or not wanted else open_dense_output(path, shape, dtype, georeference=georeference)
    return Sink(output, shape, dtype, wanted)
