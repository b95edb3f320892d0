"""Files that appear whole or not at all, whenever the power goes."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xcit.errors import ExportError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system calls a disk, a quota or a limit that a file does not fit into."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it holds either all of the data or what it held before.

    Args:
        path: where to; its folder is made if need be.
        data: the whole content.

    Raises:
        ExportError: no space, no permission, or the like. No partial file is left behind.
    """
    with replacing(path, num_bytes=len(data)) as partial, partial.open("xb") as file:
        file.write(data)


@contextmanager
def replacing(path: Path, *, num_bytes: int | None = None) -> Iterator[Path]:
    """Yield the name of a file to write; when the block ends without an error it takes the place of ``path``.

    For writers that want a name instead of bytes. It has the ending of ``path``, by which some choose a format. The
    data is on the disk before the name changes.

    Args:
        path: where to; its folder is made if need be.
        num_bytes: how much will be written, for the message that a disk is full.

    Raises:
        ExportError: an OSError within the block or from the replacement: no space, no permission, or the like. No
            partial file is left behind.
    """
    partial = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as err:
        if err.errno in FULL:
            needed = "" if num_bytes is None else f"{_amount(num_bytes)} are needed; "
            advice = f"{needed}make room"
        else:
            advice = "name a folder that you may write to"
        raise ExportError(f"{path} could not be written: {err.strerror or err}; {advice}.") from err


def _amount(num_bytes: int) -> str:
    if num_bytes >= 2**20:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**10:.1f} KiB" if num_bytes >= 2**10 else f"{num_bytes} bytes"
